"""`tegula plan`: what an upscale would take, without doing it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import click

from tegula.cli.batch import Batch, read_source
from tegula.cli.console import Console, Interruption, plural, wants_json
from tegula.cli.models import in_words
from tegula.cli.options import SectionedCommand
from tegula.cli.targets import Job
from tegula.cli.upscale import UPSCALE, request_of, work_of

if TYPE_CHECKING:
    from tegula.calibration import Calibration
    from tegula.plan import Memory, Plan
    from tegula.upscaler import Upscaler

_HELP = """Tell what an upscale would take: windows, FLOPs, memory and time.

\b
  tegula plan photo.jpg --scale 4

It takes the words of `tegula upscale` and writes nothing. Times need a measurement of
this machine, which `tegula doctor --calibrate` makes in a minute.
"""
_MEGAPIXEL = 1e6


@dataclass(frozen=True)
class Forecast:
    """What one picture would take; ``seconds`` by stage is None where nothing was measured."""

    job: Job
    plan: Plan
    memory: Memory
    seconds: Mapping[str, float] | None

    @property
    def told(self) -> dict[str, Any]:
        """Everything, for programs."""
        seconds = self.seconds
        return {
            "input": "-" if self.job.source is None else str(self.job.source),
            **dataclasses.asdict(self.plan),
            "flops": self.plan.flops,
            "memory": dataclasses.asdict(self.memory),
            "seconds": None if seconds is None else {**seconds, "total": sum(seconds.values())},
        }


def _run(**parameters: Any) -> None:
    ctx = click.get_current_context()
    console = Console(json=parameters["json"], quiet=parameters["quiet"])
    wants_json(ctx, json=console.json)
    interruption = Interruption()
    with interruption.installed():
        request = request_of(parameters, debug=bool(ctx.find_root().params["debug"]))
        work = work_of(parameters, request.options)
        upscaler = Batch(request, work, console, interruption).loaded()
        for job in work.jobs:
            source = read_source(job, request.options.max_pixels)
            forecast = _forecast(job, upscaler, upscaler.forecast(source, request.options))
            if console.json:
                console.data(forecast.told)
            else:
                click.echo("\n".join(lines(forecast)))


def _forecast(job: Job, upscaler: Upscaler, found: tuple[Plan, Memory]) -> Forecast:
    plan, memory = found
    measured = upscaler.calibration
    return Forecast(job, plan, memory, None if measured is None else _seconds(measured, plan))


def _seconds(calibration: Calibration, plan: Plan) -> Mapping[str, float]:
    """Return the seconds of the whole command: the program begins and writes a PNG file too."""
    write = calibration.write * plan.width * plan.height / _MEGAPIXEL
    return {"start": calibration.start, **calibration.seconds(plan), "write": write}


def lines(forecast: Forecast) -> list[str]:
    """Return what a person is told."""
    plan, seconds = forecast.plan, forecast.seconds
    source = f"{plan.source[0]}x{plan.source[1]}"
    passes = plural(plan.evaluations, "evaluation")
    rows = {
        "prescale": (plural(plan.tiles, "tile") if plan.tiles else "no net", plan.prescale_flops),
        "refine": (f"{plural(plan.windows, 'window')}, {passes}", plan.refine_flops),
        "total": ("", plan.flops),
    }
    told = [f"{forecast.job.name}: {source} to {plan.width}x{plan.height}, {plan.prescaler}"]
    for stage in ("start", "prepare", "prescale", "refine", "finish", "write", "total"):
        work, flops = rows.get(stage, ("", 0))
        if seconds is None and not flops:
            continue
        counted = f"{flops / 1e12:.2f} TFLOP" if flops else ""
        told.append(f"  {stage:<9} {work:<32} {counted:>14}{_took(stage, seconds)}".rstrip())
    return [*told, *_about_memory(forecast.memory), *_about_time(seconds)]


def _took(stage: str, seconds: Mapping[str, float] | None) -> str:
    if seconds is None:
        return ""
    spent = sum(seconds.values()) if stage == "total" else seconds[stage]
    return f"{spent:>10.1f} s"


def _about_memory(memory: Memory) -> list[str]:
    words = {"memory": memory.host, "on the GPU": memory.device}
    return [
        f"  {what:<9} up to {in_words(max(stages.values()))} beside the models, in "
        f"{max(stages, key=lambda stage: stages[stage])}"
        for what, stages in words.items()
        if stages
    ]


def _about_time(seconds: Mapping[str, float] | None) -> list[str]:
    from tegula.calibration import COMMAND

    if seconds is not None:
        return []
    return [f"  time      unknown: run `{COMMAND}` once with this model and device"]


PLAN = SectionedCommand(
    "plan",
    callback=_run,
    help=_HELP,
    short_help="Tell what an upscale would take.",
    params=UPSCALE.params,
)
