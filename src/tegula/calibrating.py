"""Measuring how fast this machine is: the nets each alone, and all the rest without them.

The nets run on the shapes that an upscale runs them on. The rest is what an upscale takes
whose nets do nothing. Each is the least of a few runs, since whatever
else a machine does can only make it slower.
"""

from __future__ import annotations

import dataclasses
import io
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from tegula.calibration import Calibration
from tegula.images.encode import encode
from tegula.models.bundle import Bundle, ControlImage, ControlScale, Denoiser, WindowBatch
from tegula.models.costs import BundleCost, bundle_cost, prescaler_flops
from tegula.models.prescalers import Prescaler, PrescalerFacts, is_installed, list_prescalers
from tegula.models.prescalers.load import load_prescaler
from tegula.options import UpscaleOptions, resolve
from tegula.pipeline.prescale import DEFAULT_TILE
from tegula.pipeline.sampler import BatchSize
from tegula.upscaler import Upscaler, UpscaleResult

_SCALE = 4
_USUAL_SIDE = 1024
_FEW, _MANY = 1, 4
_RUNS = 3
_ENOUGH_S = 4.0
_FIRST_TILE = 80
_IDLE = "idle"
_MEGAPIXEL = 1e6


def calibrate(upscaler: Upscaler) -> Calibration:
    """Measure a loaded upscaler, in about a minute; ``start`` is left at 0."""
    bundle = upscaler.bundle
    cost = bundle_cost(bundle)
    few, many = (_outside(bundle, steps) for steps in (_FEW, _MANY))
    level = max(0.0, (many.refine - few.refine) / (many.levels - few.levels))
    measured = Calibration(
        prescalers=_prescaler_rates(bundle),
        denoiser=_denoiser_rate(bundle, cost),
        autoencoder=_autoencoder_rate(bundle, cost),
        prepare=few.prepare,
        prescale=few.prescale,
        refine=max(0.0, few.refine - few.levels * level),
        level=level,
        finish=few.finish,
        write=few.write,
        start=0.0,
        usual=0.0,
    )
    usual = Image.new("RGB", (_USUAL_SIDE, _USUAL_SIDE))
    _, _, plan = upscaler.prepare(usual, UpscaleOptions())
    return dataclasses.replace(measured, usual=sum(measured.seconds(plan).values()))


def started(
    upscaler: Upscaler, measured: Calibration, command: Callable[[Path, Path], Sequence[str]]
) -> Calibration:
    """Add how long a program takes beside its work, by running one.

    Args:
        upscaler: what was measured.
        measured: the calibration so far.
        command: the words of a program that upscales one file into another, as
            ``Upscaler.upscale`` does by itself.
    """
    with tempfile.TemporaryDirectory(prefix="tegula-") as folder:
        source, target = Path(folder, "source.png"), Path(folder, "target.png")
        _picture(upscaler.bundle.facts.window).save(source)
        _, _, plan = upscaler.prepare(source, UpscaleOptions(preset="fast"))
        began = time.perf_counter()
        subprocess.run(command(source, target), check=True, capture_output=True)  # noqa: S603
        spent = time.perf_counter() - began
    work = sum(measured.seconds(plan).values())
    write = measured.write * plan.width * plan.height / _MEGAPIXEL
    return dataclasses.replace(measured, start=max(0.0, spent - work - write))


def _denoiser_rate(bundle: Bundle, cost: BundleCost) -> float:
    facts = bundle.facts
    usual = resolve(UpscaleOptions(), facts.presets, facts.window, (1, 1))
    count, side = BatchSize.of(bundle, usual).windows, facts.window // facts.latent_factor
    picture = torch.zeros(count, 3, facts.window, facts.window, device=bundle.device)
    with torch.inference_mode():
        batch = WindowBatch(
            torch.zeros(count, facts.latent_channels, side, side, device=bundle.device),
            torch.tensor(1, device=bundle.device),
            bundle.text.encode([""]).expand(count, -1, -1),
            bundle.denoiser.embed_control(ControlImage(picture, picture)),
            ControlScale(1.0),
            slice(0, count),
        )
        seconds = _least(lambda: bundle.denoiser(batch), bundle.device)
    return count * cost.denoiser.flops.of(facts.window**2) / seconds


def _autoencoder_rate(bundle: Bundle, cost: BundleCost) -> float:
    side = bundle.facts.window
    picture = torch.zeros(1, 3, side, side, device=bundle.device)
    control = ControlImage(picture, picture)

    def there_and_back() -> Tensor:
        latents = bundle.autoencoder.encode(picture, control, torch.Generator())
        return bundle.autoencoder.decode(latents, control)

    with torch.inference_mode():
        seconds = _least(there_and_back, bundle.device)
    return (cost.encoder.flops.of(side**2) + cost.autodecoder.flops.of(side**2)) / seconds


def _prescaler_rates(bundle: Bundle) -> Mapping[str, float]:
    """Measure the prescalers that the presets of a bundle name, where they are here."""
    named = {values.prescaler for values in bundle.facts.presets.values()}
    nets = [facts.name for facts in list_prescalers() if facts.factor and facts.name in named]
    loaded = (
        load_prescaler(name, bundle.device, bundle.dtype) for name in nets if is_installed(name)
    )
    return {prescaler.facts.name: _prescaler_rate(prescaler) for prescaler in loaded}


def _prescaler_rate(prescaler: Prescaler) -> float:
    """Measure on the largest tile, up to the usual one, that does not take too long."""
    network, side = prescaler.network, _FIRST_TILE
    assert network is not None  # noqa: S101 - only nets are measured
    flops = prescaler_flops(prescaler)
    while True:
        picture = torch.zeros(1, side, side, 3, device=prescaler.device).permute(0, 3, 1, 2)
        with torch.inference_mode():
            seconds = _least(partial(network, picture), prescaler.device)
        if 4 * seconds > _ENOUGH_S or side >= DEFAULT_TILE:
            return flops.of(side**2) / seconds
        side *= 2


def _least(run: Callable[[], object], device: torch.device) -> float:
    """Return the least seconds of a few runs, of fewer where one takes long."""
    began, best = time.perf_counter(), float("inf")
    for _ in range(_RUNS):
        start = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - start)
        if time.perf_counter() - began > _ENOUGH_S:
            break
    return best


@dataclass(frozen=True)
class _Outside:
    """Seconds for a megapixel, as ``Calibration`` has them; refine with all its levels."""

    prepare: float
    prescale: float
    refine: float
    finish: float
    write: float
    levels: int


def _outside(bundle: Bundle, steps: int) -> _Outside:
    """Measure an upscale whose nets do nothing."""
    denoiser, autoencoder = _IdleDenoiser(bundle.denoiser), _IdleAutoencoder(bundle)
    without = dataclasses.replace(bundle, denoiser=denoiser, autoencoder=autoencoder)
    idle = Upscaler(without, {_IDLE: _idle_prescaler(bundle)})
    options = UpscaleOptions(
        scale=_SCALE, prescaler=_IDLE, steps=steps, creativity=1.0, scheduler="ddim",
        guidance_scale=1.0, seed=0,
    )  # fmt: skip
    side = bundle.facts.window
    source = encode(_picture(side), "jpeg").data
    runs = [_timed(idle, source, options) for _ in range(2)]
    plan = runs[0].plan
    best = {stage: min(run.timings[stage] for run in runs) for stage in runs[0].timings}
    megapixels = plan.width * plan.height / _MEGAPIXEL
    start = time.perf_counter()
    encode(runs[0].image)
    write = time.perf_counter() - start
    return _Outside(
        best["prepare"] / (side * side / _MEGAPIXEL),
        best["prescale"] / megapixels,
        best["refine"] / megapixels,
        best["finish"] / megapixels,
        write / megapixels,
        plan.steps,
    )


def _timed(upscaler: Upscaler, source: bytes, options: UpscaleOptions) -> UpscaleResult:
    upscaler.prepare(io.BytesIO(source), options)
    return upscaler.upscale(io.BytesIO(source), options)


def _picture(side: int) -> Image.Image:
    """Return smooth noise, about as hard to compress as a photograph."""
    noise = np.random.default_rng(0).integers(0, 256, (side // 8, side // 8, 3), np.uint8)
    return Image.fromarray(noise).resize((side, side), Image.Resampling.BICUBIC)


@dataclass(frozen=True)
class _IdleDenoiser:
    """Embeds control as the denoiser does and predicts nothing."""

    real: Denoiser

    def embed_control(self, control: ControlImage) -> Tensor:
        return self.real.embed_control(control)

    def __call__(self, batch: WindowBatch) -> Tensor:
        return torch.zeros_like(batch.latents)

    def to_dtype(self, dtype: torch.dtype) -> _IdleDenoiser:  # noqa: ARG002
        return self


@dataclass(frozen=True)
class _IdleAutoencoder:
    """Gives latents of zeros for a picture, and the prescaled picture for latents."""

    bundle: Bundle

    def encode(
        self,
        image: Tensor,
        control: ControlImage,  # noqa: ARG002
        generator: torch.Generator,  # noqa: ARG002
    ) -> Tensor:
        facts, (count, _, height, width) = self.bundle.facts, image.shape
        factor, device = facts.latent_factor, self.bundle.device
        shape = (count, facts.latent_channels, height // factor, width // factor)
        return torch.zeros(shape, device=device)

    def decode(self, latents: Tensor, control: ControlImage) -> Tensor:  # noqa: ARG002
        return control.prescaled.clone()

    def to_dtype(self, dtype: torch.dtype) -> _IdleAutoencoder:  # noqa: ARG002
        return self


class _IdleNetwork(nn.Module):
    """Answers one colour of the size that a net would answer."""

    def forward(self, x: Tensor) -> Tensor:
        count, channels, height, width = x.shape
        return x[..., :1, :1].expand(count, channels, height * _SCALE, width * _SCALE)


def _idle_prescaler(bundle: Bundle) -> Prescaler:
    network = _IdleNetwork()
    facts = PrescalerFacts(
        name=_IDLE, description="", net="", factor=_SCALE, overlap=16, licence=""
    )
    return Prescaler(facts, network, network, bundle.device, bundle.dtype)
