"""How long an upscale will take on this machine: by those before it, or by a short measure."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass, field

import torch
from PIL import Image

from tegula import rates
from tegula.models.prescalers import LANCZOS
from tegula.nets import Nets
from tegula.options import Preset, ResolvedOptions, UpscaleOptions
from tegula.pipeline.prescale import run_network
from tegula.pipeline.prescale_plan import padding
from tegula.plan import Plan
from tegula.resolve import resolve
from tegula.result import UpscaleResult

_LONG_WORK = {"cpu": 3e11}
"""FLOPs from which on an upscale is worth a measure of the machine; half a second's, about."""
_LONG_ON_GPU = 3e13
_MEASURED_WORK = {"cpu": 2e10}
"""FLOPs of a short measure of one net, about: a fraction of a second's."""
_MEASURED_ON_GPU = 2e12
_SMALLEST_TILE, _LARGEST_TILE = 32, 512
_USUAL_SIDE = 1024
"""Of the usual picture, by whose seconds a server estimates a model that it has not run yet."""

Seconds = Mapping[str, float]
"""By stage."""


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

    def seconds(self, plan: Plan) -> Seconds | None:
        """Return how long a plan takes, judged by earlier upscales; None if unknown."""
        return rates.find(self._setting).seconds(plan)

    def seconds_before(self, plan: Plan) -> Seconds | None:
        """Return how long a plan takes; measured where it is long and nothing is known.

        Raises:
            NumericalError, OutOfMemoryError: as an upscale does.
        """
        long = _LONG_WORK.get(self.nets.bundle.device.type, _LONG_ON_GPU)
        return self.measured_seconds(plan) if plan.flops > long else self.seconds(plan)

    def measured_seconds(self, plan: Plan) -> Seconds:
        """Return how long a plan takes, from a short measure where no run tells.

        The measure takes less than a second for each net that was not measured yet, and is
        kept in the cache folder.

        Raises:
            NumericalError, OutOfMemoryError: as an upscale does.
        """
        known = rates.find(self._setting)
        seconds = known.seconds(plan)
        if seconds is None:
            known = dataclasses.replace(known, measured={**known.measured, **self._measured})
            missing = {name for name, _ in rates.work_of(plan).values()} - set(known.measured)
            self._measured |= self._measure(plan, missing)
            rates.remember_measure(self._setting, self._measured)
            measured = {**known.measured, **self._measured}
            seconds = rates.Rates(known.runs, None, measured).seconds(plan)
        return seconds or {}

    def seconds_with(self, preset: Preset, plan: Plan, options: UpscaleOptions) -> float:
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
        return sum(self.measured_seconds(other).values())

    def learn(self, plan: Plan, seconds: Seconds) -> None:
        """Remember how long the stages took; of a usual picture, too, if it is known."""
        size = _USUAL_SIDE, _USUAL_SIDE
        options = self._resolved(UpscaleOptions(seed=0), size)
        is_known = options.prescaler in self.nets.prescalers
        usual = self.nets.plan(size, options) if is_known else None
        rates.remember(self._setting, plan, seconds, usual)

    @property
    def _setting(self) -> rates.Setting:
        return rates.setting_of(self.nets.bundle, self.version)

    def _resolved(self, options: UpscaleOptions, size: tuple[int, int]) -> ResolvedOptions:
        facts = self.nets.bundle.facts
        return resolve(options, facts.presets, facts.window, size)

    def _measure(self, plan: Plan, missing: Set[str]) -> Mapping[str, float]:
        """Measure the seconds for a unit of work of those names that are missing."""
        net = next((name for name in missing if plan.tiles and name.startswith("prescale ")), None)
        enough = _MEASURED_WORK.get(self.nets.bundle.device.type, _MEASURED_ON_GPU)
        found: dict[str, float] = {}
        if net is not None:
            prescaler = self.nets.prescaler(plan.prescaler)
            cost = self.nets.costs(prescaler).prescaler[prescaler.facts.factor]

            def work_of_net(side: int) -> float:
                return cost.of((side + 2 * padding(side, prescaler.facts)) ** 2)

            def run_net(side: int) -> Mapping[str, rates.Timed]:
                noise = torch.rand((side, side, 3), generator=torch.Generator().manual_seed(0))
                start = time.perf_counter()
                run_network(noise, prescaler)
                return {net: (work_of_net(side), time.perf_counter() - start)}

            found |= _seconds_for_work(run_net, work_of_net, _SMALLEST_TILE, _LARGEST_TILE, enough)
        if missing - {net}:
            options = UpscaleOptions(
                scale=1, prescaler=LANCZOS, steps=2, creativity=1.0, seed=0, auto=False
            )

            def noise_of(side: int) -> Image.Image:
                return Image.effect_noise((side, side), 64).convert("RGB")

            def run_all(side: int) -> Mapping[str, rates.Timed]:
                result = self.run(noise_of(side), options)
                works = rates.work_of(result.plan)
                return {name: (work, result.timings[s]) for s, (name, work) in works.items()}

            def work_of_all(side: int) -> float:
                return self.count(noise_of(side), options).flops

            facts = self.nets.bundle.facts
            sides = facts.minimum_window, facts.window
            found |= _seconds_for_work(run_all, work_of_all, *sides, enough)
        return found


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
