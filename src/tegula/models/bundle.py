"""What the pipeline needs of a diffusion model, whatever its family.

A bundle is a text encoder, a denoiser (UNet and control path), an autoencoder and
scheduler settings. The pipeline knows these protocols alone, so Stable Diffusion 1.5, the
packaged mini model and the seeded tiny networks of the tests run through the same loop.

The pipeline computes in fp32; a bundle casts what it is given to its own precision and
back. Images are float tensors [n, 3, height, width], sRGB in 0..1. Latents are
[n, channels, height / factor, width / factor].
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.nn import functional

from tegula.models.device import constant
from tegula.models.prompt import PromptStyle
from tegula.options import PresetValues


@dataclass(frozen=True)
class ControlImage:
    """The pictures that keep refine to its subject, all at canvas size.

    prescaled: the prescaler's result, [n, 3, height, width] in 0..1.
    source: the prepared input enlarged by Lanczos alone, the same.
    weight: [n, 1, height, width], what the control scale is multiplied by at each place;
        None is 1 everywhere.
    """

    prescaled: Tensor
    source: Tensor
    weight: Tensor | None = None

    def weight_at(self, height: int, width: int) -> Tensor:
        """Return the weight at another size, [n, 1, height, width]."""
        if self.weight is None:
            return self.prescaled.new_ones((len(self.prescaled), 1, height, width))
        return functional.adaptive_avg_pool2d(self.weight, (height, width))


@dataclass(frozen=True)
class ControlScale:
    """How much weight the control path has.

    ``scale`` is the ControlNet conditioning scale (0..2). In ``guess_mode`` it fades
    from the middle block to the first one and only rows ``controlled`` receive it.
    """

    scale: float
    guess_mode: bool = False

    def on(self, device: torch.device) -> Tensor:
        """Return the scale as a tensor without dimensions.

        A number would be part of a compiled network, which is compiled anew for another.
        """
        return self.scale if isinstance(self.scale, Tensor) else constant(self.scale, device)


@dataclass(frozen=True)
class WindowBatch:
    """Equal windows for one forward pass.

    latents: [n, channels, h, w], already scaled for the model.
    timestep: scalar tensor, or [n] where the rows are at timesteps of their own.
    text: [n, tokens, width].
    control: what ``Denoiser.embed_control`` returned for these windows, n rows.
    control_scale: None switches the control path off for this step.
    controlled: the rows that the control path runs on; the others get none.
    """

    latents: Tensor
    timestep: Tensor
    text: Tensor
    control: Tensor
    control_scale: ControlScale | None
    controlled: slice

    def timesteps(self) -> Tensor:
        """Return the timestep of every row, float32 [n], on the device of the latents."""
        timestep = self.timestep.to(self.latents.device, torch.float32)
        return timestep.expand(len(self.latents))


class TextEncoder(Protocol):
    """Turns prompts into conditioning."""

    def encode(self, prompts: Sequence[str], style: PromptStyle = ...) -> Tensor:
        """Return [len(prompts), tokens, width]; all rows padded to one length."""
        ...

    def ignored_words(self, prompt: str) -> tuple[str, ...]:
        """Return the words of a prompt that the model does not know."""
        ...

    def unused_words(self, prompts: Sequence[str], style: PromptStyle) -> tuple[str, ...]:
        """Return the words that users have brought and that stand in none of the prompts."""
        ...


class Denoiser(Protocol):
    """UNet and control path together: predicts the clean latents, or their noise."""

    def embed_control(self, control: ControlImage) -> Tensor:
        """Encode the control windows once, before the first step; n rows."""
        ...

    def __call__(self, batch: WindowBatch) -> Tensor:
        """Return the prediction, shaped like ``batch.latents``."""
        ...

    def to_dtype(self, dtype: torch.dtype) -> Denoiser:
        """Return the same denoiser computing in another precision."""
        ...


Features = tuple[Tensor, ...]
"""What the second half of a denoiser takes from the first: tensors of n rows each."""


@runtime_checkable
class SplitDenoiser(Denoiser, Protocol):
    """A denoiser in two halves, of which the first may serve several steps.

    ``decode(encode(batch), batch.timestep, batch.text)`` is ``denoiser(batch)``.
    """

    def encode(self, batch: WindowBatch) -> Features:
        """Run the first half, with the control path."""
        ...

    def decode(self, features: Features, timestep: Tensor, text: Tensor) -> Tensor:
        """Run the second half at a timestep; return the prediction, n rows."""
        ...


class Autoencoder(Protocol):
    """Turns pictures into latents and back."""

    def encode(self, image: Tensor, control: ControlImage, generator: torch.Generator) -> Tensor:
        """Return the latents of an image; ``generator`` draws the posterior sample."""
        ...

    def decode(self, latents: Tensor, control: ControlImage) -> Tensor:
        """Return the image of the latents, not clamped."""
        ...

    def to_dtype(self, dtype: torch.dtype) -> Autoencoder:
        """Return the same autoencoder computing in another precision."""
        ...


@runtime_checkable
class TileableAutoencoder(Autoencoder, Protocol):
    """An autoencoder whose networks can be run in tiles.

    Their normalisations are over the whole picture, so tiles need statistics of the whole.
    The control image has no part in it.
    """

    @property
    def encoder(self) -> nn.Module:
        """The network that ``encode_moments`` runs."""
        ...

    @property
    def decoder(self) -> nn.Module:
        """The network that ``decode`` runs."""
        ...

    def encode_moments(self, image: Tensor) -> Tensor:
        """Return the posterior's moments, [n, 2 * channels, h, w], of an image in 0..1."""
        ...

    def draw(self, moments: Tensor, generator: torch.Generator) -> Tensor:
        """Return latents drawn from the posterior that the moments describe."""
        ...

    def with_norms(self, norms: Mapping[nn.Module, nn.Module]) -> TileableAutoencoder:
        """Return an autoencoder of the same weights with other layers in place of its norms.

        Args:
            norms: what stands for a layer of ``encoder`` or ``decoder``, by that layer.
        """
        ...


@dataclass(frozen=True)
class BundleFacts:
    """What the pipeline must know about a bundle before running it.

    latent_factor: image pixels per latent pixel, along one side.
    latent_channels: channels of the canvas.
    window: default window side in image pixels; smaller ones down to
        ``minimum_window`` work, in multiples of ``window_multiple``.
    presets: the numbers behind each preset name for this bundle.
    fingerprint: a hash over the weights, part of a result's metadata.
    strongest_guidance: guidance scales above it break pictures and are lowered to it.
    reads_prompts: whether it understands what people write, and not some words alone.
    """

    name: str
    family: str
    latent_factor: int
    latent_channels: int
    window: int
    minimum_window: int
    window_multiple: int
    presets: Mapping[str, PresetValues]
    fingerprint: str
    licence: str
    strongest_guidance: float = 30.0
    reads_prompts: bool = True


WithLoras = Callable[[Sequence[tuple[str, float]]], AbstractContextManager[Sequence[str]]]


@dataclass(frozen=True)
class Bundle:
    """Everything refine needs, on one device in one precision.

    light_autoencoder: decodes the same latents quickly and roughly, for previews.
    window_bytes: memory that a default window takes in a guided forward pass, if measured.
    with_loras: given (file, weight) of LoRAs, merges them into the networks within a context,
        which returns warnings. None where the networks cannot be changed.
    compiles: whether torch compiles its networks, and the prescalers beside them.
    int8: whether the prescalers beside it may multiply 8-bit numbers.
    """

    facts: BundleFacts
    text: TextEncoder
    denoiser: Denoiser
    autoencoder: Autoencoder
    scheduler: Mapping[str, object]
    device: torch.device
    dtype: torch.dtype
    warnings: tuple[str, ...] = field(default=())
    light_autoencoder: Autoencoder | None = None
    window_bytes: int | None = None
    with_loras: WithLoras | None = None
    compiles: bool = False
    int8: bool = False
