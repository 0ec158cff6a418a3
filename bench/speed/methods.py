"""The methods of the comparison, as data: what each is, and what it switches on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from bench.speed.job import Job

LOOP, WHOLE, REFINERS, OURS = "loop", "whole", "refiners", "ours"
FAST = "auto"
DEVICES = ("cpu", "cuda", "mps")
LOOP_OVERLAPS = (0.125, 0.5)


@dataclass(frozen=True)
class Method:
    """One way to do a job.

    name: what tables call it.
    kind: ``loop`` and ``whole`` are diffusers' pipeline by tiles and at once, ``refiners``
        is its MultiUpscaler, ``ours`` is refine.
    precision: fp32, bf16 or fp16.
    overlap: share of a window or tile that neighbours have in common.
    options: what it changes of the job, by the names of ``UpscaleOptions``.
    load: the backend and whether to compile, as ``Upscaler.load`` takes them.
    same_work: whether it evaluates all that the job asks for.
    """

    name: str
    kind: str
    precision: str
    overlap: float
    options: Mapping[str, Any] = field(default_factory=dict)
    load: Mapping[str, Any] = field(default_factory=dict)
    same_work: bool = True


@dataclass(frozen=True)
class Rung:
    """One step of the ladder: what it switches on beside all the steps before.

    name: ``{fast}`` stands for the fastest precision of the device.
    options: by the names of ``UpscaleOptions``; load: by those of ``Upscaler.load``.
    same_work: whether all that the job asks for is still evaluated.
    runs_on, stays_on: devices where it is tried, and where the steps after it keep it.
    """

    name: str
    options: Mapping[str, Any] = field(default_factory=dict)
    load: Mapping[str, Any] = field(default_factory=dict)
    same_work: bool = True
    runs_on: tuple[str, ...] = DEVICES
    stays_on: tuple[str, ...] = DEVICES


LADDER = (
    Rung("one window at a time", {"window_batch": 1}, {"precision": "fp32"}),
    Rung("+ batches", {"window_batch": None}),
    Rung("+ {fast}", load={"precision": FAST}),
    Rung("+ OpenVINO", load={"backend": "openvino"}, runs_on=("cpu",), stays_on=()),
    Rung("+ compiled", load={"compile": True}, runs_on=("cpu", "cuda"), stays_on=("cuda",)),
    Rung("+ guidance on half the levels", {"guidance_end": 0.5}, same_work=False),
    Rung("+ features reused", {"feature_reuse": 2}, same_work=False),
    Rung("few unguided steps instead", same_work=False),
)
"""From fp32 and one window at a time to everything; the last takes its settings from the job."""


def methods_for(job: Job, fast: str) -> list[Method]:
    """Return the methods that make sense for a job, the peers first.

    Args:
        job: the work.
        fast: the fastest precision of the device, by name.
    """
    peers = () if job.size == "mini" else _peers(job, fast)
    return [*peers, *ladder(job, fast)]


def _peers(job: Job, fast: str) -> Iterator[Method]:
    for precision in dict.fromkeys(("fp32", fast)):
        for overlap in LOOP_OVERLAPS:
            name = f"diffusers by tiles, {overlap:.1%} overlap, {precision}"
            yield Method(name, LOOP, precision, overlap)
    yield Method(f"diffusers, whole canvas, {fast}", WHOLE, fast, 0.0)
    yield Method(f"refiners MultiUpscaler, {fast}", REFINERS, fast, job.overlap)


def ladder(job: Job, fast: str) -> list[Method]:
    """Add up the rungs, without those that change nothing for the job or the device."""
    kept: tuple[Mapping[str, Any], Mapping[str, Any]] = {}, {}
    methods: list[Method] = []
    for rung in LADDER:
        given = rung.options if rung is not LADDER[-1] else job.few
        options, load = {**kept[0], **given}, {**kept[1], **rung.load}
        if _makes_sense(rung, job, fast):
            methods.append(_method(rung, job, fast, options, load))
            kept = (options, load) if job.device in rung.stays_on else kept
    return methods


def _makes_sense(rung: Rung, job: Job, fast: str) -> bool:
    faster = rung.load.get("precision") != FAST or fast != "fp32"
    return faster and job.device in rung.runs_on and (rung.same_work or bool(job.few))


def _method(
    rung: Rung, job: Job, fast: str, options: Mapping[str, Any], load: Mapping[str, Any]
) -> Method:
    how = {name: value for name, value in load.items() if name != "precision"}
    precision = fast if load["precision"] == FAST else load["precision"]
    name = f"tegula: {rung.name.format(fast=fast)}"
    return Method(name, OURS, precision, job.overlap, options, how, rung.same_work)


def usual_method(job: Job, fast: str) -> Method:
    """Return the ladder up to where all the work is still done, without what does not stay."""
    for_all = [rung for rung in LADDER if rung.same_work and job.device in rung.stays_on]
    names = {f"tegula: {rung.name.format(fast=fast)}" for rung in for_all}
    return [method for method in ladder(job, fast) if method.name in names][-1]
