"""How long an upscale takes on this machine, learned from those that it has done.

Every upscale leaves, for each of its stages, how much work it was and how long it took.
A stage is assumed to need ``fixed + rate * work`` seconds: for a small picture the fixed
part is most of it, for a large one almost nothing. The line through the runs is Theil and Sen's:
its slope is the median of the slopes between any two of them, so that a few runs beside
other work on the machine, or the first of a program, do not skew it.

Before the first run, and far from all runs, what a short measure of the machine found stands in:
seconds for each unit of work, without a fixed part.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import math
import platform
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from tegula.errors import PathError
from tegula.folders import cache_folder, write_atomically
from tegula.progress import STAGES

if TYPE_CHECKING:
    from tegula.models.bundle import Bundle
    from tegula.plan import Plan

KEPT = 5
"""Runs of a stage that are kept of about the same work, that is, within a power of two."""

_APART = 1.25
"""Ratio of the work of two runs from which they say something about the slope."""

_FURTHEST = 16
"""Times the work of the largest run; beyond it nothing is said, as most of that may be fixed."""

Timed = tuple[float, float]
"""The work of one run of a stage, and its seconds."""


@dataclass(frozen=True)
class Conditions:
    """What speed depends on beside the work; rates hold under the same conditions alone.

    denoiser: how it runs: plainly, compiled, or by OpenVINO.
    version: of tegula, whose next one may be quicker.
    """

    device: str
    dtype: str
    threads: int
    bundle: str
    fingerprint: str
    denoiser: str
    torch: str
    version: str

    @property
    def file(self) -> Path:
        """Where its rates are kept."""
        words = json.dumps(dataclasses.asdict(self), sort_keys=True)
        return _folder() / f"{hashlib.sha256(words.encode()).hexdigest()[:16]}.json"


@dataclass(frozen=True)
class Rates:
    """The last runs of each stage.

    runs: by stage; those of prescalers that are nets by ``prescale`` and their name.
    usual: seconds of 1024x1024 at 2x with the balanced preset; None where unknown.
    measured: by the names of the runs, seconds for a unit of work, from a short measure.
    """

    runs: Mapping[str, Sequence[Timed]] = field(default_factory=dict)
    usual: float | None = None
    measured: Mapping[str, float] = field(default_factory=dict)

    def seconds(self, plan: Plan) -> Mapping[str, float] | None:
        """Return the seconds of a plan by stage; None where the runs do not tell.

        They do not where a stage has never run, or only on far less work than this, and
        was not measured either. A prescaler that has never run counts as the slowest that has.
        """
        found: dict[str, float] = {}
        for stage, (name, work) in work_of(plan).items():
            alike = [self.runs.get(name, ())]
            if stage == "prescale" and plan.tiles and not alike[0] and name not in self.measured:
                alike = [runs for key, runs in self.runs.items() if key.startswith("prescale ")]
            near = [runs for runs in alike if runs and work <= _FURTHEST * max(runs)[0]]
            if near:
                found[stage] = max(expected_seconds(runs, work) for runs in near)
            elif name in self.measured:
                found[stage] = work * self.measured[name]
            else:
                return None
        return {**dict.fromkeys(STAGES, 0.0), **found}

    def with_run(self, plan: Plan, seconds: Mapping[str, float]) -> Rates:
        """Add a run.

        Args:
            plan: its work.
            seconds: by stage; those that are missing say nothing about the machine.
        """
        works = {stage: work for stage, work in work_of(plan).items() if stage in seconds}
        added = {
            name: _last_of_each_size((*self.runs.get(name, ()), (work, seconds[stage])))
            for stage, (name, work) in works.items()
        }
        return dataclasses.replace(self, runs={**self.runs, **added})


def expected_seconds(runs: Sequence[Timed], work: float) -> float:
    """Return the seconds that so much work takes, by the runs of a stage, at least one.

    Where all runs were of about the same work, nothing is known of a fixed part, and more
    work is expected to take longer in proportion.
    """
    slopes = [
        (later[1] - earlier[1]) / (later[0] - earlier[0])
        for earlier, later in itertools.combinations(sorted(runs), 2)
        if later[0] > _APART * earlier[0]
    ]
    rate = median(slopes) if slopes else 0.0
    fixed = median(seconds - rate * done for done, seconds in runs)
    if rate <= 0 or fixed < 0:
        return work * median(seconds / done for done, seconds in runs)
    return fixed + rate * work


def conditions_of(bundle: Bundle, version: str) -> Conditions:
    """Return what the speed of a loaded bundle depends on, with this version of tegula.

    It is handed in, as ``tegula`` itself imports what lies above this module.
    """
    import torch

    device = bundle.device
    if device.type == "cuda":
        name = str(torch.cuda.get_device_name(device))
    else:
        name = f"{device.type} {platform.node()} {platform.machine()}"
    return Conditions(
        name,
        str(bundle.dtype).removeprefix("torch.") + (" int8" if bundle.int8 else ""),
        torch.get_num_threads() if device.type == "cpu" else 1,
        bundle.facts.name,
        bundle.facts.fingerprint,
        type(bundle.denoiser).__name__,
        torch.__version__,
        version,
    )


def find(conditions: Conditions) -> Rates:
    """Return what is known of the speed under these conditions, which may be nothing."""
    return _read(conditions.file)


def remember(
    conditions: Conditions, plan: Plan, seconds: Mapping[str, float], usual: Plan | None = None
) -> None:
    """Keep a run for later upscales and processes, if the cache folder can be written.

    Args:
        conditions: under which it was.
        plan: its work.
        seconds: by stage, as ``Rates.with_run`` takes them.
        usual: the plan of a usual picture, for ``usual_seconds``.
    """
    # Of two processes that write at once the later one wins, and a run of the other is lost.
    rates = find(conditions).with_run(plan, seconds)
    by_stage = rates.seconds(usual) if usual is not None else None
    if by_stage is not None:
        rates = dataclasses.replace(rates, usual=sum(by_stage.values()))
    _write(conditions, rates)


def remember_measure(conditions: Conditions, measured: Mapping[str, float]) -> None:
    """Keep what a short measure found, as ``remember`` keeps a run."""
    rates = find(conditions)
    _write(conditions, dataclasses.replace(rates, measured={**rates.measured, **measured}))


def _write(conditions: Conditions, rates: Rates) -> None:
    content = {"setting": dataclasses.asdict(conditions), **vars(rates)}
    try:
        conditions.file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(conditions.file, json.dumps(content, indent=1).encode())
    except (OSError, PathError):
        return  # the next estimate is only less exact


def usual_seconds(bundle: str) -> float | None:
    """Return the seconds of a usual picture where a bundle ran last; None if unknown.

    Args:
        bundle: its name.
    """
    latest, seconds = 0.0, None
    for path in _folder().glob("*.json"):
        usual = _read(path, bundle).usual
        changed = path.stat().st_mtime if usual is not None else 0.0
        if changed > latest:
            latest, seconds = changed, usual
    return seconds


def work_of(plan: Plan) -> Mapping[str, tuple[str, float]]:
    """Return for every stage with work under which name its runs are kept, and the work.

    It is FLOPs where nets run, pixels elsewhere.
    """
    source, result = math.prod(plan.source), plan.width * plan.height
    works: dict[str, tuple[str, float]] = {
        "prepare": ("prepare", source),
        "prescale": ("prescale", result),
        "refine": ("refine", plan.refine_flops),
        "finish": ("finish", result),
    }
    if plan.tiles:
        works["prescale"] = f"prescale {plan.prescaler}", plan.prescale_flops
    return {stage: (name, work) for stage, (name, work) in works.items() if work > 0}


def _last_of_each_size(runs: Iterable[Timed]) -> Sequence[Timed]:
    sizes: dict[int, list[Timed]] = defaultdict(list)
    for run in runs:
        sizes[round(math.log2(run[0]))].append(run)
    return [run for size in sorted(sizes) for run in sizes[size][-KEPT:]]


def _read(path: Path, bundle: str | None = None) -> Rates:
    """Read a file of rates, of this bundle alone if one is named; any other is empty."""
    try:
        content: Any = json.loads(path.read_bytes())
        if bundle is not None and content["setting"]["bundle"] != bundle:
            return Rates()
        runs = {
            str(name): [(float(work), float(seconds)) for work, seconds in timed if work > 0]
            for name, timed in content["runs"].items()
        }
        usual = content["usual"]
        measured = {str(name): float(each) for name, each in content["measured"].items()}
        return Rates(runs, None if usual is None else float(usual), measured)
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return Rates()


def _folder() -> Path:
    return cache_folder() / "rates"
