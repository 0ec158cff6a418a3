"""How long an upscale will take on this machine: by those before it, or by a short measure."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass, field

import torch
from PIL import Image

from tegula import rates
from tegula.models.prescalers import LANCZOS, Prescaler
from tegula.nets import Nets
from tegula.options import Preset, ResolvedOptions, UpscaleOptions
from tegula.pipeline.prescale import run_network
from tegula.pipeline.prescale_plan import padding
from tegula.plan import Plan
from tegula.resolve import resolve
from tegula.result import UpscaleResult

_LONG_WORK = 3e11, 3e13
"""FLOPs, on a processor and on a GPU, from which on an upscale is worth a measure of the machine;
half a second's, about."""
_MEASURED_WORK = 2e10, 2e12
"""FLOPs of a short measure of one net, about: a fraction of a second's."""
_SMALLEST_TILE, _LARGEST_TILE = 32, 512
_USUAL_SIDE = 1024
"""Side of the usual picture: its seconds stand for a model that a server has not run yet."""

Seconds = Mapping[str, float]
"""Seconds by stage."""


@dataclass
class Expectation:
    """What is known of the speed of one bundle on this machine.

    version: of tegula; what another one took says nothing.
    run: upscales a picture, without remembering how long it took.
    count: counts the work of it.
    """

    nets: Nets
    version: str
    run: Callable[[Image.Image, UpscaleOptions], UpscaleResult]
    count: Callable[[Image.Image, UpscaleOptions], Plan]
    _measured: dict[str, float] = field(default_factory=dict)

    def known(self, plan: Plan) -> Seconds | None:
        """Return how long a plan takes, judged by earlier upscales; None if unknown."""
        return rates.find(self._conditions).seconds(plan)

    def expected(self, plan: Plan) -> Seconds | None:
        """Return how long a plan takes; measured where it is long and nothing is known.

        Raises:
            NumericalError, OutOfMemoryError: as an upscale does.
        """
        return self.measured(plan) if plan.flops > _LONG_WORK[self._is_gpu] else self.known(plan)

    def measured(self, plan: Plan) -> Seconds:
        """Return how long a plan takes, from a short measure where no run tells.

        The measure takes less than a second for each net that was not measured yet, and is
        kept in the cache folder.

        Raises:
            NumericalError, OutOfMemoryError: as an upscale does.
        """
        found = rates.find(self._conditions)
        seconds = found.seconds(plan)
        if seconds is None:
            # The file may not keep what was measured before in this process.
            per_unit = {**found.measured, **self._measured}
            unmeasured = {name for name, _ in rates.work_of(plan).values()} - set(per_unit)
            self._measured |= self._measure(plan, unmeasured)
            rates.remember_measure(self._conditions, self._measured)
            seconds = rates.Rates(found.runs, None, {**per_unit, **self._measured}).seconds(plan)
        return seconds or {}

    def with_preset(self, preset: Preset, plan: Plan, options: UpscaleOptions) -> float:
        """Return the seconds of the same enlargement with another preset, all stages together.

        Args:
            preset: in place of that of the options.
            plan: of the enlargement.
            options: that it was planned with.

        Raises:
            ModelError: the prescaler of the preset is missing.
            NumericalError, OutOfMemoryError: as an upscale does.
        """
        unset = dict.fromkeys(("scale", "resolution", "crop"))
        options = options.replaced(**unset, regions=(), size=plan.size, preset=preset)
        other = self.nets.plan(plan.source, self._resolved(options, plan.source))
        return sum(self.measured(other).values())

    def learn(self, plan: Plan, seconds: Seconds) -> None:
        """Remember how long the stages took; of a usual picture, too, if it is known."""
        size = _USUAL_SIDE, _USUAL_SIDE
        options = self._resolved(UpscaleOptions(seed=0), size)
        is_known = options.prescaler in self.nets.prescalers
        usual = self.nets.plan(size, options) if is_known else None
        rates.remember(self._conditions, plan, seconds, usual)

    @property
    def _conditions(self) -> rates.Conditions:
        return rates.conditions_of(self.nets.bundle, self.version)

    @property
    def _is_gpu(self) -> bool:
        return self.nets.bundle.device.type != "cpu"

    def _resolved(self, options: UpscaleOptions, size: tuple[int, int]) -> ResolvedOptions:
        facts = self.nets.bundle.facts
        return resolve(options, facts.presets, facts.window, size)

    def _measure(self, plan: Plan, names: Set[str]) -> Mapping[str, float]:
        """Measure the seconds for a unit of work, by these names of runs."""
        net = next((name for name in names if plan.tiles and name.startswith("prescale ")), None)
        found: dict[str, float] = {}
        if net is not None:
            found |= self._measure_net(net, self.nets.prescaler(plan.prescaler))
        if names - {net}:
            found |= self._measure_diffusion()
        return found

    def _measure_net(self, name: str, prescaler: Prescaler) -> Mapping[str, float]:
        """Measure a prescaler alone, by one tile or two."""
        cost = self.nets.costs(prescaler).prescaler[prescaler.facts.factor]

        def work_of(side: int) -> float:
            return cost.of((side + 2 * padding(side, prescaler.facts)) ** 2)

        def run(side: int) -> Mapping[str, rates.Timed]:
            noise = torch.rand((side, side, 3), generator=torch.Generator().manual_seed(0))
            start = time.perf_counter()
            run_network(noise, prescaler)
            return {name: (work_of(side), time.perf_counter() - start)}

        enough = _MEASURED_WORK[self._is_gpu]
        return _seconds_for_work(run, work_of, _SMALLEST_TILE, _LARGEST_TILE, enough)

    def _measure_diffusion(self) -> Mapping[str, float]:
        """Measure all stages but for a net that enlarges, by one upscale or two of noise."""
        options = UpscaleOptions(
            scale=1, prescaler=LANCZOS, steps=2, creativity=1.0, seed=0, auto=False
        )

        def noise_of(side: int) -> Image.Image:
            return Image.effect_noise((side, side), 64).convert("RGB")

        def work_of(side: int) -> float:
            return self.count(noise_of(side), options).flops

        def run(side: int) -> Mapping[str, rates.Timed]:
            result = self.run(noise_of(side), options)
            works = rates.work_of(result.plan)
            return {name: (work, result.timings[s]) for s, (name, work) in works.items()}

        facts, enough = self.nets.bundle.facts, _MEASURED_WORK[self._is_gpu]
        return _seconds_for_work(run, work_of, facts.minimum_window, facts.window, enough)


def _seconds_for_work(
    run: Callable[[int], Mapping[str, rates.Timed]],
    work_of: Callable[[int], float],
    side: int,
    largest: int,
    enough: float,
) -> Mapping[str, float]:
    """Return the seconds for a unit of work, by name, from one square or two.

    The larger has about ``enough`` work. What the smaller takes is subtracted from both: for a
    quick net nearly all of that is overhead.
    """
    smaller = larger = run(side)
    if work_of(side) < enough:
        while work_of(side) < enough and 2 * side <= largest:
            side *= 2
        larger = run(side)
    found = {}
    for name, (work, seconds) in larger.items():
        less_work, less_seconds = smaller[name]
        is_larger = work > less_work and seconds > less_seconds
        found[name] = (seconds - less_seconds) / (work - less_work) if is_larger else seconds / work
    return found
