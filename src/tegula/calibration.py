"""How fast this machine is, as measured once, and the seconds that a plan takes on it."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tegula.folders import cache_folder, write_atomically

if TYPE_CHECKING:
    from tegula.models.bundle import Bundle
    from tegula.plan import Plan


COMMAND = "tegula doctor --calibrate"
_MEGAPIXEL = 1e6


@dataclass(frozen=True)
class Setting:
    """What speed depends on beside the work: a calibration holds for one of these."""

    device: str
    dtype: str
    threads: int
    bundle: str
    fingerprint: str
    torch: str

    @property
    def file(self) -> Path:
        """Where its calibration is kept."""
        words = json.dumps(dataclasses.asdict(self), sort_keys=True)
        name = hashlib.sha256(words.encode()).hexdigest()[:16]
        return _folder() / f"{name}.json"


@dataclass(frozen=True)
class Calibration:
    """What was measured.

    prescalers: FLOP/s by name. denoiser, autoencoder: FLOP/s.
    prepare: seconds for a megapixel of the source, outside the nets.
    prescale, refine, level, finish, write: seconds for a megapixel of the result, outside
        the nets; ``level`` once for every noise level, ``write`` as a PNG file.
    start: seconds until the program is ready for its first picture.
    usual: seconds of 1024x1024 at 2x with the balanced preset, in a program that is ready.
    """

    prescalers: Mapping[str, float]
    denoiser: float
    autoencoder: float
    prepare: float
    prescale: float
    refine: float
    level: float
    finish: float
    write: float
    start: float
    usual: float

    def seconds(self, plan: Plan) -> Mapping[str, float]:
        """Return the seconds of a plan by stage.

        A prescaler that was not measured counts as the slowest that was.
        """
        source, result = (
            width * height / _MEGAPIXEL
            for width, height in (plan.source, (plan.width, plan.height))
        )
        slowest = min(self.prescalers.values(), default=math.inf)
        prescaler = self.prescalers.get(plan.prescaler, slowest)
        nets = plan.denoise_flops / self.denoiser + plan.autoencoder_flops / self.autoencoder
        outside = (self.refine + plan.steps * self.level) * result if plan.windows else 0.0
        return {
            "prepare": self.prepare * source,
            "prescale": plan.prescale_flops / prescaler + self.prescale * result,
            "refine": nets + outside,
            "finish": self.finish * result,
        }


def setting_of(bundle: Bundle) -> Setting:
    """Return what the speed of a loaded bundle depends on."""
    import torch

    return Setting(
        _device_name(bundle.device),
        str(bundle.dtype).removeprefix("torch."),
        torch.get_num_threads() if bundle.device.type == "cpu" else 1,
        bundle.facts.name,
        bundle.facts.fingerprint,
        torch.__version__,
    )


def keep(setting: Setting, calibration: Calibration) -> Path:
    """Write a calibration down for later processes.

    Raises:
        PathError: the cache folder cannot be written.
    """
    told = {"setting": dataclasses.asdict(setting), "measured": dataclasses.asdict(calibration)}
    _folder().mkdir(parents=True, exist_ok=True)
    write_atomically(setting.file, json.dumps(told, indent=2).encode())
    return setting.file


def find(setting: Setting) -> Calibration | None:
    """Return the calibration for a setting; None where there is none."""
    return _read(setting.file)


def usual_seconds(bundle: str) -> float | None:
    """Return the seconds of a usual picture by the latest calibration of a bundle, if any.

    Args:
        bundle: its name.
    """
    files = sorted(_folder().glob("*.json"), key=lambda path: path.stat().st_mtime, reverse=True)
    for path in files:
        found = _read(path)
        if found is not None and json.loads(path.read_bytes())["setting"]["bundle"] == bundle:
            return found.usual
    return None


def _read(path: Path) -> Calibration | None:
    try:
        told: Any = json.loads(path.read_bytes())
        return Calibration(**told["measured"])
    except (OSError, ValueError, TypeError, KeyError):
        return None


def _folder() -> Path:
    return cache_folder() / "calibration"


def _device_name(device: Any) -> str:
    if device.type == "cuda":
        import torch

        return str(torch.cuda.get_device_name(device))
    return f"{device.type} {platform.node()} {platform.machine()}"
