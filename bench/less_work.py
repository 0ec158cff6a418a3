"""What each way to compute less saves, and how far it leads from the full computation.

`python -m bench.less_work` runs networks of Stable Diffusion's classes at a small size
with random weights, and mini; `--model NAME` runs a bundle of one's own instead, and only
that one tells how a picture of it looks. Work is counted in FLOPs of the denoiser, which
is the same on every machine; time is not measured.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from bench.networks import random_bundle
from bench.quality.judges import feature_distance, load_judge
from bench.quality.measures import psnr
from tegula.models import BundleSettings
from tegula.models.bundle import Bundle, ControlImage, Features, SplitDenoiser, WindowBatch
from tegula.models.costs import Counter
from tegula.models.device import pick_device, pick_dtype
from tegula.models.load import load_bundle
from tegula.options import ResolvedOptions, UpscaleOptions
from tegula.pipeline.adjust import flatness
from tegula.pipeline.pictures import on_device, on_host
from tegula.pipeline.refine import RefineJob, refine_canvas
from tegula.resolve import resolve

Picture = NDArray[np.float32]
Cases = Mapping[str, Mapping[str, Any]]

SIDE = 352
SEED = 1
_FULL = "everything"
SD: Cases = {
    _FULL: {},
    "guidance on the first three quarters": {"guidance_end": 0.75},
    "guidance on the middle half": {"guidance_start": 0.25, "guidance_end": 0.75},
    "features reused, every 2nd step": {"feature_reuse": 2},
    "features reused, every 3rd step": {"feature_reuse": 3},
    "both, first three quarters and 2nd step": {"guidance_end": 0.75, "feature_reuse": 2},
    "flat areas skip half of the steps": {"flat_skip": 0.5},
    "no guidance": {"guidance_scale": 1.0},
    "half as many steps": {"steps": 10},
}
MINI: Cases = {name: case for name, case in SD.items() if "feature_reuse" not in case}
_BASE: Mapping[str, Any] = {
    "steps": 20,
    "creativity": 0.6,
    "seed": SEED,
    "scheduler": "dpm++2m",
    "window": 128,
}
_GUIDANCE: Cases = {
    "sd15": {"guidance_scale": 5.0},
    "mini": {"guidance_scale": 2.0, "prompt": "sharp, detailed", "negative_prompt": "blurry"},
}


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("photograph", nargs="?", type=Path, help="default: scikit-image's rocket")
    parser.add_argument("--model", help="a bundle instead of random weights and mini")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--save", type=Path, metavar="FOLDER", help="keep the pictures there")
    arguments = parser.parse_args()
    device = pick_device(arguments.device)
    picture = _photograph(arguments.photograph)
    judge = load_judge("lite0")
    print("| weights | computed | work | PSNR | perceptual distance |")
    print("|---|---|---:|---:|---:|")
    for name, bundle in _bundles(arguments.model, device).items():
        cases = SD if bundle.facts.family == "sd15" else MINI
        full, all_flops = _refined(bundle, picture, cases[_FULL])
        for case, changes in cases.items():
            result, flops = _refined(bundle, picture, changes)
            distance = feature_distance(judge.look(result), judge.look(full))
            same = np.array_equal(result, full)
            cells = ("", "0") if same else (f"{psnr(result, full):.1f}", f"{distance:.4f}")
            print(
                f"| {name} | {case} | {flops / all_flops:.0%} | {cells[0]} | {cells[1]} |",
                flush=True,
            )
            if arguments.save is not None:
                _keep(arguments.save / f"{name}, {case}.png", result)


def _bundles(model: str | None, device: torch.device) -> Mapping[str, Bundle]:
    if model is not None:
        return {
            model: load_bundle(
                BundleSettings(bundle=model), device=device, dtype=pick_dtype(device)
            )
        }
    small = random_bundle("small", device, torch.float32)
    return {"random": small, "mini": load_bundle(BundleSettings(), device=device)}


def _photograph(path: Path | None) -> Picture:
    """Return a square of a photograph, halved and enlarged again."""
    if path is None:
        from skimage import data

        rgb = data.rocket()[:, -427:]
    else:
        rgb = np.asarray(Image.open(path).convert("RGB"))
    side = min(rgb.shape[:2])
    square = np.asarray(rgb[:side, :side], np.float32) / np.float32(255)
    small = cv2.resize(square, (SIDE // 2, SIDE // 2), interpolation=cv2.INTER_AREA)
    large = cv2.resize(small, (SIDE, SIDE), interpolation=cv2.INTER_LANCZOS4)
    return np.asarray(large, np.float32).clip(0, 1)


def _refined(bundle: Bundle, picture: Picture, case: Mapping[str, Any]) -> tuple[Picture, float]:
    """Return what a bundle makes of a picture, and the FLOPs of its denoiser."""
    counting = _counting(bundle.denoiser)
    options = _options(bundle, case)
    pixels, strength = on_device(picture, bundle.device), None
    if options.flat_skip:
        strength = 1 - options.flat_skip * flatness(pixels)
    with_count = dataclasses.replace(bundle, denoiser=counting)
    result = refine_canvas(RefineJob(with_count, pixels, pixels, options, strength=strength))
    return on_host(result), counting.flops


def _options(bundle: Bundle, case: Mapping[str, Any]) -> ResolvedOptions:
    guidance = _GUIDANCE[bundle.facts.family]
    options = UpscaleOptions(size=(SIDE, SIDE), **{**_BASE, **guidance, **case})
    return resolve(options, bundle.facts.presets, bundle.facts.window, (SIDE, SIDE))


class _Counting:
    """A denoiser whose FLOPs are counted: once for a row of each kind, then by rows."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner
        self.flops = 0.0
        self._per_row: dict[str, float] = {}

    def embed_control(self, control: ControlImage) -> Tensor:
        """Embed the control windows; not counted, since it is done once."""
        embedded: Tensor = self.inner.embed_control(control)
        return embedded

    def __call__(self, batch: WindowBatch) -> Tensor:
        """Run the whole denoiser."""
        prediction: Tensor = self._counted("__call__", len(batch.latents), batch)
        return prediction

    def to_dtype(self, dtype: torch.dtype) -> Any:
        """Return the denoiser inside in another precision."""
        return self.inner.to_dtype(dtype)

    def _counted(self, kind: str, rows: int, *given: Any) -> Any:
        run = getattr(self.inner, kind)
        if kind not in self._per_row:
            with Counter() as counter:
                run(*given)
            self._per_row[kind] = counter.flops / rows
        self.flops += rows * self._per_row[kind]
        return run(*given)


class _CountingHalves(_Counting):
    """The same of a denoiser in two halves."""

    def encode(self, batch: WindowBatch) -> Features:
        """Run the first half."""
        features: Features = self._counted("encode", len(batch.latents), batch)
        return features

    def decode(self, features: Features, timestep: Tensor, text: Tensor) -> Tensor:
        """Run the second half."""
        prediction: Tensor = self._counted("decode", len(text), features, timestep, text)
        return prediction


def _counting(denoiser: Any) -> _Counting:
    return (_CountingHalves if isinstance(denoiser, SplitDenoiser) else _Counting)(denoiser)


def _keep(path: Path, picture: Picture) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    cv2.imwrite(str(path), np.uint8(picture[..., ::-1] * 255 + 0.5))


if __name__ == "__main__":
    main()
