"""Where and with what a run was made."""

from __future__ import annotations

import platform
import subprocess
from importlib import metadata
from pathlib import Path

import torch

_FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "amx_int8", "asimd", "bf16")
_PROCESSOR = Path("/proc/cpuinfo")
_LIBRARIES = ("torch", "diffusers", "transformers", "numpy")


def describe(device: torch.device) -> dict[str, object]:
    """Return device, processor, libraries and commit."""
    return {
        "device": _device_name(device),
        "processor": _cpu_field("model name") or platform.processor() or platform.machine(),
        "features": _features(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "libraries": {name: metadata.version(name) for name in _LIBRARIES},
        "commit": _commit(),
    }


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _features() -> list[str]:
    known = (_cpu_field("flags") or _cpu_field("Features")).split()
    return [flag for flag in _FLAGS if flag in known]


def _cpu_field(name: str) -> str:
    if not _PROCESSOR.exists():
        return ""
    lines = (line.split(":", 1) for line in _PROCESSOR.read_text().splitlines() if ":" in line)
    return next((value.strip() for key, value in lines if key.strip() == name), "")


def _commit() -> str:
    """Return the commit, with a + where files under version control differ from it."""
    try:
        commit = _git("rev-parse", "--short=12", "HEAD")
        changed = _git("status", "--porcelain", "--untracked-files=no", "--", ":/src", ":/bench")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return commit + ("+" if changed else "")


def _git(*words: str) -> str:
    command = ["git", "-C", str(Path(__file__).parent), *words]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
