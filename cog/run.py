"""tegula/upscale as a Cog model: the same inputs, run by the catalogue's own code."""

from __future__ import annotations

import os
import tempfile
import time

from cog import BaseRunner, Input, Path
from tegula import Upscaler
from tegula.catalog import find, run, validate
from tegula.errors import OptionError
from tegula.models import BundleSettings
from tegula.progress import OnProgress, Progress
from tegula.server.engine import progress_line


class Runner(BaseRunner):
    """Enlarges pictures.

    The inputs are spelled out as literals, because ``cog build`` reads them from the text.
    """

    def setup(self) -> None:
        """Load the bundle that TEGULA_BUNDLE and its parts name, or the packaged one."""
        self.version = find("tegula/upscale")
        models = BundleSettings.from_environment()
        self.upscaler = Upscaler.load(**dict(models))
        self.folder = Path(tempfile.mkdtemp())

    def run(
        self,
        image: Path = Input(description="The picture to enlarge."),
        scale: float = Input(
            description="How many times as wide and high the result is.", default=2.0, ge=1, le=8
        ),
        preset: str = Input(
            description="Balanced suits most pictures, fast is quicker, best takes its time, exact "
            "invents nothing.",
            default="balanced",
            choices=["faithful", "balanced", "creative", "fast", "best", "exact"],
        ),
        prompt: str = Input(description="What the picture shows or should look like.", default=""),
        negative_prompt: str | None = Input(description="What to steer away from.", default=None),
        creativity: float | None = Input(
            description="How much may change: 0 nothing, 1 everything. Left out, the preset says.",
            default=None,
            ge=0,
            le=1,
        ),
        resemblance: float | None = Input(
            description="How firmly the structure of the source is kept. Left out, the preset says.",  # noqa: E501
            default=None,
            ge=0,
            le=3,
        ),
        hdr: float = Input(
            description="Opens shadows and highlights; 0 changes nothing.", default=0.0, ge=0, le=1
        ),
        mask: Path | None = Input(
            description="White where the picture may change, black where it stays.", default=None
        ),
        seamless: bool = Input(
            description="The picture is a pattern whose opposite edges meet.", default=False
        ),
        seed: int | None = Input(
            description="The same seed gives the same picture; random when left out.",
            default=None,
            ge=0,
            le=9223372036854775807,
        ),
        format: str = Input(
            description="Of the result.", default="png", choices=["png", "jpg", "webp"]
        ),
        strength_map: Path | None = Input(
            description="How much of the creativity each place gets: white all of it, black none.",
            default=None,
        ),
        regions: str = Input(
            description="Prompts for parts of the picture, a line each: x,y,width,height:prompt, in pixels or shares of the source.",  # noqa: E501
            default="",
        ),
    ) -> Path:
        """Return the file of the enlarged picture."""
        given = {
            "image": _content(image), "scale": scale, "preset": preset, "prompt": prompt,
            "negative_prompt": negative_prompt, "creativity": creativity,
            "resemblance": resemblance, "hdr": hdr, "mask": _content(mask), "seamless": seamless,
            "seed": seed, "format": format, "strength_map": _content(strength_map),
            "regions": regions,
        }  # fmt: skip
        outputs = run(
            self.version,
            validate(self.version, given),
            lambda _loras: self.upscaler,
            on_progress=_progress_log(),
            on_log=print,
        )
        output = next(outputs)
        # Cog does not remove output files; the next picture overwrites this one.
        file = self.folder / output.name
        file.write_bytes(output.data)
        return file


def _content(file: Path | None) -> bytes | None:
    """Read a file input; what does not begin like a URL, Cog passes on unchanged."""
    if file is None:
        return None
    if not isinstance(file, os.PathLike):
        raise OptionError("A picture is given as an http, https or data URL.")
    return file.read_bytes()  # type: ignore[attr-defined]


def _progress_log() -> OnProgress:
    """Return a listener that prints a line for every hundredth of the work into the log."""
    began_at, printed = time.monotonic(), -1

    def print_progress(progress: Progress) -> None:
        nonlocal printed
        percent = int(progress.fraction * 100)
        if percent > printed:
            printed = percent
            spent = time.monotonic() - began_at
            print(progress_line(progress.fraction, spent, progress.seconds_left))

    return print_progress
