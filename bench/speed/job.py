"""The work that every method does, by the size of the networks."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from skimage import data

from tegula.models.bundle import BundleFacts
from tegula.options import ResolvedOptions, UpscaleOptions
from tegula.pipeline.pictures import enlarge_lanczos, on_device, on_host
from tegula.resolve import resolve

Picture = NDArray[np.float32]
PROMPT, NEGATIVE = "a photo of a cat", "blurry"
SEED = 0


@dataclass(frozen=True)
class Job:
    """One picture, enlarged and refined.

    size: of the networks: full, small, tiny or mini.
    source, side: of the picture before and after, in pixels; it is square.
    steps, creativity: steps * creativity noise levels are run.
    few: settings of the shortest run worth having, for the last step of the ladder; empty
        where the job itself is as short.
    prescaler: what enlarges where a whole upscale is timed.
    """

    size: str
    source: int
    side: int
    steps: int
    creativity: float
    guidance_scale: float
    few: Mapping[str, Any]
    prescaler: str
    scheduler: str = "ddim"
    overlap: float = 0.125
    device: str = "cpu"

    @cached_property
    def levels(self) -> int:
        """How many noise levels the pipelines of diffusers run."""
        return int(self.steps * self.creativity)

    @cached_property
    def picture(self) -> Picture:
        """Return a photograph enlarged to the side of the result: what refine begins with."""
        return _resampled(self.photograph, self.side)

    @cached_property
    def photograph(self) -> Picture:
        """Return a photograph of the source's side."""
        return _resampled(data.astronaut().astype(np.float32) / np.float32(255), self.source)

    def options(self, **changes: Any) -> UpscaleOptions:
        """Return what the job asks of tegula, with changes."""
        usual: dict[str, Any] = {
            "size": (self.side, self.side),
            "prompt": PROMPT,
            "negative_prompt": NEGATIVE,
            "creativity": self.creativity,
            "resemblance": 1.0,
            "guidance_scale": self.guidance_scale,
            "steps": self.steps,
            "scheduler": self.scheduler,
            "overlap": self.overlap,
            "seed": SEED,
            "prescaler": "lanczos",
        }
        return UpscaleOptions(**(usual | changes))

    def resolved(self, facts: BundleFacts, **changes: Any) -> ResolvedOptions:
        """Return the same with nothing left open, for one stage alone."""
        settled = resolve(
            self.options(**changes), facts.presets, facts.window, (self.side, self.side)
        )
        scale = min(settled.guidance_scale, facts.strongest_guidance)
        return settled.replaced(guidance_scale=scale)


def _resampled(picture: Picture, side: int) -> Picture:
    return on_host(enlarge_lanczos(on_device(picture, torch.device("cpu")), (side, side)))


_FOUR_STEPS = {
    "steps": 4,
    "scheduler": "lcm",
    "guidance_scale": 1.0,
    "guidance_end": 1.0,
    "feature_reuse": 1,
}

JOBS: Mapping[str, Job] = {
    "full": Job("full", 1024, 2560, 20, 0.6, 5.0, _FOUR_STEPS, "realesrgan-x4plus"),
    "small": Job(
        "small", 256, 1024, 8, 0.5, 4.0, _FOUR_STEPS | {"steps": 2}, "realesrgan-animevideov3"
    ),
    "tiny": Job("tiny", 48, 96, 4, 0.5, 4.0, _FOUR_STEPS | {"steps": 1}, "lanczos"),
    "mini": Job("mini", 512, 1024, 1, 0.55, 1.0, {}, "realesrgan-x4plus", "lcm"),
}
QUICK_SIDES: Mapping[str, tuple[int, int]] = {
    "full": (512, 1408),
    "small": (256, 704),
    "mini": (256, 512),
    "tiny": (48, 96),
}


def job_for(size: str, device: str, *, quick: bool) -> Job:
    """Return the work for networks of a size; a smaller picture when it should be quick."""
    job = dataclasses.replace(JOBS[size], device=device)
    if not quick:
        return job
    source, side = QUICK_SIDES[size]
    return dataclasses.replace(job, source=source, side=side)
