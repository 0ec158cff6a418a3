"""The nets that upscales of one bundle run, loaded when they are first needed, and their work."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

from tegula.models.bundle import Bundle
from tegula.models.compiled import compile_prescaler
from tegula.models.costs import BundleCost, Cost, bundle_cost, prescaler_flops
from tegula.models.faces.networks import FaceRestorer, load_detector, load_restorer
from tegula.models.prescalers import Prescaler
from tegula.models.prescalers.load import load_prescaler, with_share
from tegula.options import ResolvedOptions
from tegula.pipeline.faces import FaceWork
from tegula.plan import Costs, Plan, make_plan

_FACE_PRESCALER = "realesrgan-x4plus"


@dataclass
class Nets:
    """A bundle with the prescalers and the restorers of faces beside it.

    prescalers: those that are loaded, by name.
    """

    bundle: Bundle
    prescalers: dict[str, Prescaler] = field(default_factory=dict)
    _shares: dict[str, Prescaler] = field(default_factory=dict)
    _restorers: dict[str, FaceRestorer] = field(default_factory=dict)
    _prescaler_costs: dict[str, Mapping[int | None, Cost]] = field(default_factory=dict)

    def prescaler(self, name: str, tuning: float | None = None) -> Prescaler:
        """Return a prescaler; with a share of its tuning where one is given.

        Raises:
            ModelError: it is unknown or missing.
        """
        if name not in self.prescalers:
            bundle = self.bundle
            loaded = load_prescaler(name, bundle.device, bundle.dtype, int8=bundle.int8)
            self.prescalers[name] = self._compiled(loaded)
        if tuning is None:
            return self.prescalers[name]
        # The last share is kept: most pictures of a folder are alike.
        last = with_share(self._shares.get(name, self.prescalers[name]), tuning)
        self._shares[name] = self._compiled(last)
        return self._shares[name]

    def _compiled(self, prescaler: Prescaler) -> Prescaler:
        """Compile a prescaler where the bundle is compiled, unless it is or multiplies int8."""
        is_to_be = self.bundle.compiles and prescaler.compiled is None and prescaler.ranges is None
        return compile_prescaler(prescaler) if is_to_be else prescaler

    def face_work(self, options: ResolvedOptions) -> FaceWork | None:
        """Load what restores faces; None where none is asked for.

        Raises:
            ModelError: the restorer is missing or broken.
        """
        if not options.faces:
            return None
        if options.faces not in self._restorers:
            self._restorers[options.faces] = load_restorer(options.faces, self.bundle.device)
        prescaler = self.prescaler(options.prescaler)
        if options.face_upsample and prescaler.network is None:
            prescaler = self.prescaler(_FACE_PRESCALER)
        return FaceWork(
            load_detector(),
            self._restorers[options.faces],
            prescaler if options.face_upsample else None,
            options,
        )

    def plan(
        self, source_size: tuple[int, int], options: ResolvedOptions, *, alpha: bool = False
    ) -> Plan:
        """Count the work of an upscale.

        Args:
            source_size: width and height.
            options: resolved for it.
            alpha: whether alpha goes through the prescaler, as one picture more.
        """
        plan = self._plan(options.prescaler, source_size, options)
        if options.drawing_prescaler:
            drawn = self._plan(options.drawing_prescaler, source_size, options)
            flops = plan.prescale_flops + drawn.prescale_flops
            plan = dataclasses.replace(plan, tiles=plan.tiles + drawn.tiles, prescale_flops=flops)
        if alpha:
            of_alpha = self._plan(options.prescaler, source_size, options)
            flops = plan.prescale_flops + of_alpha.prescale_flops
            plan = dataclasses.replace(plan, prescale_flops=flops)
        return plan

    def costs(self, prescaler: Prescaler) -> Costs:
        """Return what the bundle and a prescaler take; counted once."""
        name = prescaler.facts.name
        if name not in self._prescaler_costs:
            self._prescaler_costs[name] = prescaler_flops(prescaler)
        return Costs(self.bundle_cost, self._prescaler_costs[name])

    @cached_property
    def bundle_cost(self) -> BundleCost:
        """What the bundle takes."""
        return bundle_cost(self.bundle)

    def _plan(self, prescaler: str, source_size: tuple[int, int], options: ResolvedOptions) -> Plan:
        net = self.prescaler(prescaler)
        return make_plan(self.bundle, net.facts, self.costs(net), source_size, options)
