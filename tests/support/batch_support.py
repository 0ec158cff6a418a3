"""What actors of a batch run in tests: an upscaler without nets, which a picture may kill."""

from __future__ import annotations

import os
import signal
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from PIL import Image

from tegula.cli.pictures import Request
from tegula.images.encode import Encoded, encode


class KillingUpscaler:
    def upscale(self, source: Path, options: Any, cancelled: Any) -> Any:
        flag = source.with_suffix(".killed")
        if source.stem == "kills-once" and not flag.exists():
            flag.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        with Image.open(source) as picture:
            image = picture.resize((picture.width * 2, picture.height * 2))
        encoded = partial(_encoded, image)
        return SimpleNamespace(image=image, settings={}, seed=7, warnings=(), encoded=encoded)


def _encoded(
    image: Image.Image, file_format: str, quality: int, png_level: int, settings: Any
) -> Encoded:
    return encode(image, file_format, settings=settings)


@dataclass(frozen=True)
class KillingRequest(Request):
    def load_upscaler(self, console: Any) -> Any:
        return KillingUpscaler()
