"""Networks by precision, each built once and kept for the whole run."""

from __future__ import annotations

from functools import cache, cached_property
from typing import Any

import torch

from bench.networks import NETWORKS, random_bundle
from bench.speed.job import Job
from bench.speed.loop import pipeline_of
from bench.speed.methods import Method
from tegula.models import BundleSettings
from tegula.models.device import pick_device, pick_dtype
from tegula.models.load import load_bundle
from tegula.models.optimise import optimise_bundle
from tegula.upscaler import Upscaler


class Models:
    """Builds what the methods of a job run on; each gets networks of its own."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self.device = pick_device(job.device)

    @cached_property
    def fastest(self) -> torch.dtype:
        """The fastest precision that tegula takes on the device."""
        return pick_dtype(self.device)

    def dtype(self, precision: str) -> torch.dtype:
        """Return the type of a precision by name."""
        return pick_dtype(self.device, precision)

    def upscaler(self, method: Method) -> Upscaler:
        """Return what runs a method of ours."""
        return self._upscaler(method.precision, **method.load)

    @property
    def plain(self) -> Upscaler:
        """Return ours in fp32, as it is loaded."""
        return self._upscaler("fp32")

    @cache  # noqa: B019 - as long as the run
    def _upscaler(
        self,
        precision: str,
        backend: str = "torch",
        *,
        compile: bool = False,  # noqa: A002
    ) -> Upscaler:
        if self._job.size == "mini":
            bundle = load_bundle(BundleSettings(), device=self.device, dtype=self.dtype(precision))
        else:
            bundle = random_bundle(self._job.size, self.device, self.dtype(precision))
        return Upscaler(optimise_bundle(bundle, backend, compiled=compile))

    @cache  # noqa: B019
    def pipeline(self, precision: str) -> Any:
        """Return diffusers' pipeline on networks of its own."""
        return pipeline_of(NETWORKS[self._job.size](self.device, self.dtype(precision)))
