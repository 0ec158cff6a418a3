"""Threads and memory layout on a processor, chosen by trying them once.

A convolution like those of a UNet runs for a moment in every combination. What wins is
remembered in the cache folder, for this processor, torch and precision. Results do not
depend on it beyond rounding.
"""

from __future__ import annotations

import itertools
import json
import os
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import torch
from torch import nn

from tegula.errors import OptionError
from tegula.models.places import cache_folder

THREADS_VARIABLE = "TEGULA_THREADS"
LAYOUT_VARIABLE = "TEGULA_LAYOUT"
LAYOUTS = {"contiguous": False, "channels-last": True}
WORTH = 0.9
"""What is not faster than this share of the usual time is noise, and the usual is kept."""
_CHANNELS, _SIDE, _ROUNDS = 320, 32, 3


@dataclass(frozen=True)
class ProcessorChoice:
    """How nets run on a processor."""

    threads: int
    channels_last: bool


Probe = Callable[[ProcessorChoice], float]
"""Returns seconds; shorter is better."""


def choose(
    threads: Sequence[int], layouts: Sequence[bool], probe: Probe, rounds: int = _ROUNDS
) -> ProcessorChoice:
    """Return the fastest combination; the first one unless another is clearly faster.

    The combinations take turns, and of each the best time counts: other work on the
    machine meets all alike.
    """
    choices = [ProcessorChoice(*each) for each in itertools.product(threads, layouts)]
    if len(choices) == 1:
        return choices[0]
    turns = [[probe(choice) for choice in choices] for _ in range(rounds)]
    times = dict(zip(choices, map(min, zip(*turns, strict=True)), strict=True))
    best = min(choices, key=times.__getitem__)
    return best if times[best] < WORTH * times[choices[0]] else choices[0]


def processor_choice(dtype: torch.dtype, probe: Probe | None = None) -> ProcessorChoice:
    """Return what was chosen for this machine, or choose now, which takes half a second.

    ``TEGULA_THREADS`` and ``TEGULA_LAYOUT`` (contiguous or channels-last) fix their part.

    Raises:
        OptionError: one of the variables says something else.
    """
    usual = torch.get_num_threads()
    threads, layouts = _threads(usual), _layouts()
    key = repr((platform.processor(), os.cpu_count(), torch.__version__, dtype, threads, layouts))
    known = _remembered()
    if key in known:
        return known[key]
    chosen = choose(threads, layouts, probe or _probe_of(dtype))
    torch.set_num_threads(usual)
    if len(threads) * len(layouts) > 1:
        _remember({**known, key: chosen})
    return chosen


def lay_out(network: nn.Module, *, channels_last: bool) -> None:
    """Put the weights of a network into a memory layout, in place."""
    layout = torch.channels_last if channels_last else torch.contiguous_format
    network.to(memory_format=layout)  # type: ignore[call-overload]


def _threads(usual: int) -> tuple[int, ...]:
    named = os.environ.get(THREADS_VARIABLE)
    if named is None:
        fixed = "OMP_NUM_THREADS" in os.environ or usual == 1
        return (usual,) if fixed else (usual, max(1, usual // 2))
    if not named.isdecimal() or int(named) < 1:
        raise OptionError(f"{THREADS_VARIABLE} is a number from 1 up, not {named!r}.")
    return (int(named),)


def _layouts() -> tuple[bool, ...]:
    named = os.environ.get(LAYOUT_VARIABLE)
    if named is None:
        return (False, True)
    if named not in LAYOUTS:
        raise OptionError(f"{LAYOUT_VARIABLE} is {' or '.join(LAYOUTS)}, not {named!r}.")
    return (LAYOUTS[named],)


def _probe_of(dtype: torch.dtype) -> Probe:
    def probe(choice: ProcessorChoice) -> float:
        torch.set_num_threads(choice.threads)
        convolution = nn.Conv2d(_CHANNELS, _CHANNELS, 3, padding=1, dtype=dtype)
        lay_out(convolution, channels_last=choice.channels_last)
        picture = torch.zeros(1, _CHANNELS, _SIDE, _SIDE, dtype=dtype)
        with torch.inference_mode():
            seen = convolution(picture)
            start = time.perf_counter()
            convolution(seen)
        return time.perf_counter() - start

    return probe


def _remembered() -> dict[str, ProcessorChoice]:
    """Return what the cache folder holds; a file of another form is measured anew."""
    try:
        known = json.loads((cache_folder() / "processor.json").read_text(encoding="utf-8"))
        return {key: ProcessorChoice(**choice) for key, choice in known.items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}


def _remember(known: dict[str, ProcessorChoice]) -> None:
    path = cache_folder() / "processor.json"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        choices = {key: asdict(choice) for key, choice in known.items()}
        path.write_text(json.dumps(choices, indent=1), encoding="utf-8")
    except OSError:
        return  # it is only measured again
