"""The device that nets run on: which one, in which precision, what fits into its memory.

On a processor also with how many threads and in which memory layout.
"""

from __future__ import annotations

import copy
import itertools
import json
import math
import os
import platform
import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend

from tegula.errors import OptionError, PathError
from tegula.folders import cache_folder, write_atomically
from tegula.models import PRECISIONS

Owner = TypeVar("Owner")
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_BF16_PROBES = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
_AMPERE = (8, 0)
"""Compute capability of the first CUDA devices that multiply bfloat16 natively."""


def pick_device(name: str = "auto") -> torch.device:
    """Return the device of this name; ``auto`` takes CUDA, then MPS, then the CPU.

    Args:
        name: ``auto``, ``cpu``, ``cuda``, ``cuda:1``, ``mps``.

    Raises:
        OptionError: there is no such device on this machine.
    """
    counts = {
        "cuda": torch.cuda.device_count() if torch.cuda.is_available() else 0,
        "mps": int(torch.backends.mps.is_available()),
        "cpu": 1,
    }
    if name == "auto":
        return torch.device(next(kind for kind, count in counts.items() if count))
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise OptionError(f"device is auto, cpu, cuda, cuda:N or mps, not {name!r}.") from error
    if (device.index or 0) >= counts.get(device.type, 0):
        if device.type == "cuda" and not counts["cuda"]:
            raise OptionError(_why_no_cuda())
        raise OptionError(f"This machine has no device {name!r}; device auto takes what is there.")
    return device


def _why_no_cuda() -> str:
    if torch.version.cuda is None:
        return (
            "This torch is built without CUDA; install a build of it with CUDA, or leave device "
            "out to compute on the processor."
        )
    return (
        f"torch finds no GPU for its CUDA {torch.version.cuda}: there is none, or its driver is "
        f"older than that or does not run; see whether `nvidia-smi` works, update the driver, or "
        f"leave device out to compute on the processor."
    )


def pick_dtype(device: torch.device, precision: str = "auto") -> torch.dtype:
    """Return the data type to compute in.

    ``auto`` is bfloat16 on CPUs that multiply it natively (AVX512-BF16 or AMX; about
    twice as fast as float32) and on CUDA devices from Ampere on, float16 on older CUDA
    devices, and float32 elsewhere.

    Raises:
        OptionError: ``precision`` is none of ``PRECISIONS``, or bf16 on an older CUDA device.
    """
    if precision not in PRECISIONS:
        raise OptionError(f"precision is one of {', '.join(PRECISIONS)}, not {precision!r}.")
    recent = device.type == "cuda" and torch.cuda.get_device_capability(device) >= _AMPERE
    if precision == "bf16" and device.type == "cuda" and not recent:
        card = torch.cuda.get_device_name(device)
        raise OptionError(f"{card} is too old to multiply bf16; choose fp16 or auto.")
    if precision != "auto":
        return _DTYPES[precision]
    if device.type == "cuda":
        return torch.bfloat16 if recent else torch.float16
    # torch's probes are private, so one that is gone counts as no.
    probes: list[Callable[[], Any] | None] = [getattr(torch.cpu, n, None) for n in _BF16_PROBES]
    is_fast = device.type == "cpu" and any(probe is not None and probe() for probe in probes)
    return torch.bfloat16 if is_fast else torch.float32


# Memory: how many windows of a batch fit, and which side of a tile.
#
# These numbers are where to begin: what does not fit after all is tried again smaller.

SHARE = 0.8
"""Share of the free memory to fill; the rest is for what kernels allocate and for fragments."""
MOST_WINDOWS = 64
"""Larger batches only take memory: a GPU is busy long before."""
KEPT_SHARE = 0.25
"""Share of the free memory for what only waits there for its next use."""
_OUT_OF_MEMORY_WORDS = (
    "out of memory",
    "can't allocate memory",
    "not enough memory",
    "status_alloc_failed",
)


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether an exception means that memory ran out, on any device.

    CUDA has a class for it. The CPU allocator, oneDNN, and the libraries of CUDA, where another
    program has filled the GPU, raise a plain RuntimeError.
    """
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and any(w in text for w in _OUT_OF_MEMORY_WORDS)


def free_memory(device: torch.device) -> int | None:
    """Return the bytes that can still be allocated on a GPU; None where that is unknown.

    What torch's allocator has in reserve counts as free.
    """
    if device.type != "cuda":
        return None
    free, _ = torch.cuda.mem_get_info(device)
    reserved = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(free) + int(reserved)


def windows_that_fit(free: int, window_bytes: int) -> int:
    """Return how many windows of a batch fit, from 1 to ``MOST_WINDOWS``.

    Args:
        free: bytes, as ``free_memory`` counts them.
        window_bytes: what one window takes in a forward pass, with both rows of guidance.
    """
    return max(1, min(MOST_WINDOWS, int(free * SHARE) // max(1, window_bytes)))


def side_that_fits(free: int, pixel_bytes: int, sides: tuple[int, int], multiple: int) -> int:
    """Return the side of the largest square that fits, a multiple of ``multiple``.

    Args:
        free: bytes, as ``free_memory`` counts them.
        pixel_bytes: what one pixel of the square takes in a forward pass.
        sides: the smallest and the largest answer, multiples themselves.
        multiple: what the net takes multiples of.
    """
    fitting = math.isqrt(int(free * SHARE) // max(1, pixel_bytes)) // multiple * multiple
    return max(sides[0], min(sides[1], fitting))


def home_of(size: int, device: torch.device) -> torch.device:
    """Return where to keep this many bytes: on the device itself, or on the host.

    What is kept on the host is moved to the device piece by piece as it is used.
    """
    free = free_memory(device)
    return device if free is None or size <= free * KEPT_SHARE else torch.device("cpu")


@lru_cache(maxsize=64)
def constant(numbers: float | tuple[float, ...], device: torch.device) -> Tensor:
    """Return numbers as float32 on a device, where they stay for the next time; not to be changed.

    A copy from the host waits until the device has done everything that came before.
    """
    with torch.inference_mode(mode=False):  # training takes some of them too
        return torch.tensor(numbers, dtype=torch.float32, device=device)


# Threads and memory layout on a processor.
#
# Which are fastest differs between processors by more than any rule predicts, so a
# convolution like those of a UNet runs for a moment in every combination. The fastest is
# remembered in the cache folder, for this processor, torch and precision. Results depend on
# it by rounding alone.

THREADS_VARIABLE = "TEGULA_THREADS"
LAYOUT_VARIABLE = "TEGULA_LAYOUT"
_LAYOUTS = {"contiguous": False, "channels-last": True}
_CLEARLY_FASTER = 0.9
"""Share of the time of torch's own choice; what takes more than this may be faster by chance."""
# The convolution that is timed: as wide as the first level of Stable Diffusion's UNet.
_CHANNELS, _SIDE, _ROUNDS = 320, 32, 3


@dataclass(frozen=True)
class ProcessorChoice:
    """How nets run on a processor."""

    threads: int
    channels_last: bool


Probe = Callable[[ProcessorChoice], float]
"""Returns seconds; shorter is better."""


def processor_choice(dtype: torch.dtype, probe: Probe | None = None) -> ProcessorChoice:
    """Return what was measured to be fastest on this machine, or measure it: half a second.

    While other programs keep the machine busy it is torch's own choice: beside them fewer threads
    often win, and what was measured then would be remembered when they are gone.

    ``TEGULA_THREADS`` and ``TEGULA_LAYOUT`` (contiguous or channels-last) fix their part.

    Raises:
        OptionError: one of the variables says something else.
    """
    default = torch.get_num_threads()
    threads, layouts = _threads_to_try(default), _layouts_to_try()
    key = repr((platform.processor(), os.cpu_count(), torch.__version__, dtype, threads, layouts))
    remembered = _remembered()
    if key in remembered:
        return remembered[key]
    if _is_busy():
        return ProcessorChoice(threads[0], layouts[0])
    fastest = choose_fastest(threads, layouts, probe or _probe_of(dtype))
    torch.set_num_threads(default)
    if len(threads) * len(layouts) > 1:
        _remember(key, fastest)
    return fastest


def _is_busy() -> bool:
    """Tell whether more than half of the processors had work in the last minute; not on Windows."""
    return hasattr(os, "getloadavg") and os.getloadavg()[0] > (os.cpu_count() or 1) / 2


def choose_fastest(
    threads: Sequence[int], layouts: Sequence[bool], probe: Probe
) -> ProcessorChoice:
    """Return the fastest combination; the first one unless another is clearly faster.

    The combinations take turns, and of each the best time counts, so that other work on the
    machine disturbs all alike.
    """
    choices = [ProcessorChoice(*each) for each in itertools.product(threads, layouts)]
    if len(choices) == 1:
        return choices[0]
    turns = [[probe(choice) for choice in choices] for _ in range(_ROUNDS)]
    times = dict(zip(choices, map(min, zip(*turns, strict=True)), strict=True))
    best = min(choices, key=times.__getitem__)
    return best if times[best] < _CLEARLY_FASTER * times[choices[0]] else choices[0]


def lay_out(network: nn.Module, *, channels_last: bool) -> None:
    """Put the weights of a network into a memory layout, in place."""
    layout = torch.channels_last if channels_last else torch.contiguous_format
    network.to(memory_format=layout)  # type: ignore[call-overload]


def with_shared_weights(
    owner: Owner,
    networks: Iterable[nn.Module],
    replaced: Mapping[nn.Module, nn.Module] | None = None,
) -> Owner:
    """Return a copy of what runs networks, with layers of its own and the very same weights.

    Args:
        owner: a network, or what has networks among its fields.
        networks: those whose weights are shared, so that a change of one is seen by the other.
        replaced: layers to put in the place of others, by these.
    """
    known: dict[int, Any] = {
        id(each): each
        for network in networks
        for each in (*network.parameters(), *network.buffers())
    }
    known |= {id(layer): other for layer, other in (replaced or {}).items()}
    return copy.deepcopy(owner, known)


def _threads_to_try(default: int) -> tuple[int, ...]:
    """Return all threads and half of them: one for each core where cores have two."""
    fixed = os.environ.get(THREADS_VARIABLE)
    if fixed is None:
        is_fixed = "OMP_NUM_THREADS" in os.environ or default == 1
        return (default,) if is_fixed else (default, max(1, default // 2))
    if not fixed.isdecimal() or int(fixed) < 1:
        raise OptionError(f"{THREADS_VARIABLE} is a number from 1 up, not {fixed!r}.")
    return (int(fixed),)


def _layouts_to_try() -> tuple[bool, ...]:
    fixed = os.environ.get(LAYOUT_VARIABLE)
    if fixed is None:
        return (False, True)
    if fixed not in _LAYOUTS:
        raise OptionError(f"{LAYOUT_VARIABLE} is {' or '.join(_LAYOUTS)}, not {fixed!r}.")
    return (_LAYOUTS[fixed],)


def _probe_of(dtype: torch.dtype) -> Probe:
    def probe(choice: ProcessorChoice) -> float:
        torch.set_num_threads(choice.threads)
        convolution = nn.Conv2d(_CHANNELS, _CHANNELS, 3, padding=1, dtype=dtype)
        lay_out(convolution, channels_last=choice.channels_last)
        picture = torch.zeros(1, _CHANNELS, _SIDE, _SIDE, dtype=dtype)
        with torch.inference_mode():
            features = convolution(picture)  # not timed: the first call prepares kernels
            start = time.perf_counter()
            convolution(features)
        return time.perf_counter() - start

    return probe


def _remembered() -> dict[str, ProcessorChoice]:
    """Return what the cache folder has; a file of another form is measured anew."""
    measured = _read_measured(_PROCESSOR_FILE)
    try:
        return {key: ProcessorChoice(**choice) for key, choice in measured.items()}
    except TypeError:
        return {}


def _remember(key: str, choice: ProcessorChoice) -> None:
    _keep_measured(_PROCESSOR_FILE, key, asdict(choice))


# Memory layout on a GPU.
#
# An H200 ran the autoencoder 1.5 times as fast with contiguous weights, and a prescaler 1.3 times
# as fast with channels last. So each part of a bundle runs for a moment in both, and what was
# faster is remembered for the GPU, torch, the precision and the network.


def fastest_layout(
    key: Sequence[object],
    networks: Sequence[nn.Module],
    run: Callable[[], object],
    seconds: Callable[[Callable[[], object]], float],
) -> bool:
    """Lay networks out as they run fastest; return whether that is channels last.

    Args:
        key: what decides which layout is faster, beside the networks.
        networks: are changed in place.
        run: runs them once.
        seconds: times a call, after one that prepares its kernels.
    """
    name = repr((torch.__version__, *key, *(_weights(network) for network in networks)))
    known = _read_measured(_LAYOUT_FILE).get(name)
    if not isinstance(known, bool):
        times = {}
        for channels_last in (False, True):
            for network in networks:
                lay_out(network, channels_last=channels_last)
            times[channels_last] = seconds(run)
        known = min(times, key=times.__getitem__)
        _keep_measured(_LAYOUT_FILE, name, known)
    for network in networks:
        lay_out(network, channels_last=known)
    return known


def known_layouts(card: str, dtype: torch.dtype) -> dict[str, bool]:
    """Return the networks that were measured on a card, and whether channels last was faster."""
    begin = repr((torch.__version__, card, dtype))[:-1]
    return {
        name: channels_last
        for key, channels_last in _read_measured(_LAYOUT_FILE).items()
        if key.startswith(begin) and isinstance(channels_last, bool)
        for name in re.findall(r"\('(\w+)', \d+\)", key[len(begin) :])
    }


def attention_kernel(device: torch.device, dtype: torch.dtype) -> str:
    """Return which of torch's kernels runs the attention of Stable Diffusion's finest level."""
    heads = torch.zeros(1, 8, 1024, 40, device=device, dtype=dtype)
    return SDPBackend(torch._fused_sdp_choice(heads, heads, heads)).name.lower().replace("_", " ")


def seconds_on_gpu(run: Callable[[], object], device: torch.device) -> float:
    """Return the shortest of three runs, after one that prepares kernels."""
    times = []
    for _ in range(4):
        torch.cuda.synchronize(device)
        start = time.perf_counter()
        run()
        torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    return min(times[1:])


def _weights(network: nn.Module) -> tuple[str, int]:
    return type(network).__name__, sum(each.numel() for each in network.parameters())


_PROCESSOR_FILE, _LAYOUT_FILE = "processor.json", "layouts.json"


def _read_measured(name: str) -> dict[str, Any]:
    """Return what was measured, of a file in the cache folder."""
    try:
        measured = json.loads((cache_folder() / name).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return measured if isinstance(measured, dict) else {}


def _keep_measured(name: str, key: str, value: object) -> None:
    path = cache_folder() / name
    # Read again: another process may have added its own while this one measured.
    measured = {**_read_measured(name), key: value}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps(measured, indent=1).encode())
    except (OSError, PathError):
        return  # it is only measured again
