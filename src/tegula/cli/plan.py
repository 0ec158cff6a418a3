"""`tegula plan`: what an upscale would take, without doing it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import click

from tegula.cli.console import Console, Interruption, format_bytes, plural
from tegula.cli.options import SectionedCommand
from tegula.cli.targets import Job, read_source
from tegula.cli.upscale import EVERYDAY, PICTURES, SECTIONS, request_of, work_of
from tegula.progress import STAGES, about

if TYPE_CHECKING:
    from tegula.plan import Memory, Plan

_HELP = """Show what an upscale would take: windows, FLOPs, memory and time.

\b
  tegula plan photo.jpg --scale 4

It takes the arguments and options of `tegula upscale` and writes nothing. Times are
learned from the upscales that this machine has done with the model; where there are none,
they come from a measure of less than a second, which is rough.
"""
_ROWS = (*STAGES, "total")


def _plan(**parameters: Any) -> None:
    context = click.get_current_context()
    console = Console.open(json=parameters["json"], quiet=parameters["quiet"])
    with Interruption().installed():
        request = request_of(parameters, debug=bool(context.find_root().params["debug"]))
        work = work_of(parameters, request)
        upscaler = request.load_upscaler(console)
        of_all = 0.0
        for job in work.jobs:
            source = read_source(job, request.options.max_pixels)
            count = 1
            if request.all_frames:
                from tegula.images.frames import frame_facts

                count = frame_facts(source, request.options.max_pixels).count
            plan, memory = upscaler.forecast(source, request.options)
            by_stage = upscaler.expectation.measured(plan)
            seconds = {**by_stage, "total": sum(by_stage.values())}
            console.record(
                {
                    "input": job.input,
                    **({} if count == 1 else {"frames": count}),
                    **dataclasses.asdict(plan),
                    "flops": plan.flops,
                    "memory": dataclasses.asdict(memory),
                    "seconds": seconds,
                }
            )
            for line in _lines(job, plan, memory, seconds):
                console.text(line)
            if count > 1:
                console.text(f"  frames    {count}, each of them as the first, above")
            of_all += count * seconds["total"]
        if len(work.jobs) > 1:
            console.text(f"{plural(len(work.jobs), 'picture')}: about {about(of_all)}")


def _lines(job: Job, plan: Plan, memory: Memory, seconds: Mapping[str, float]) -> Iterator[str]:
    """Yield what a person reads: the size, a row for each stage with its time, memory."""
    source = f"{plan.source[0]}x{plan.source[1]}"
    yield f"{job.name}: {source} to {plan.width}x{plan.height}, {plan.prescaler}"
    passes = plural(plan.evaluations, "evaluation")
    rows = {
        "prescale": (plural(plan.tiles, "tile") if plan.tiles else "no net", plan.prescale_flops),
        "refine": (f"{plural(plan.windows, 'window')}, {passes}", plan.refine_flops),
        "total": ("", plan.flops),
    }
    for stage in _ROWS:
        work, flops = rows.get(stage, ("", 0))
        counted = f"{flops / 1e12:.2f} TFLOP" if flops else ""
        yield f"  {stage:<9} {work:<32} {counted:>14}{seconds[stage]:>10.1f} s"
    for place, stages in (("memory", memory.host), ("on the GPU", memory.device)):
        if stages:
            stage = max(stages, key=lambda stage: stages[stage])
            yield f"  {place:<9} up to {format_bytes(stages[stage])} beside the models, in {stage}"


PLAN = SectionedCommand(
    "plan",
    _plan,
    [PICTURES],
    SECTIONS,
    help_text=_HELP,
    short_help="Show what an upscale would take.",
    everyday=EVERYDAY,
)
