"""The networks of Stable Diffusion 1.5 behind the protocols of a bundle, and joined to one."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from torch import Tensor, nn
from torch.nn import functional

from tegula.models.bundle import Bundle, BundleFacts, ControlImage, Features, WindowBatch
from tegula.models.device import with_shared_weights
from tegula.models.sd15.facts import PRESETS
from tegula.models.sd15.lora import Loras, open_loras
from tegula.models.sd15.lora_names import TEXT, UNET
from tegula.models.sd15.text import Inversion, SdTextEncoder

# The UNet of diffusers in two halves.
#
# What the encoder (down and middle blocks) returns changes little from one step to the next,
# so the decoders (up blocks) of several steps can share it: "Faster Diffusion" (Li et al.,
# 2023). Both halves are plain functions of tensors, and together what the UNet's own
# ``forward`` does.

Residuals = tuple[Sequence[Tensor], Tensor]
"""What a ControlNet adds to the skip connections, and to the middle."""


def run_encoder(
    unet: Any, latents: Tensor, timestep: Tensor, text: Tensor, residuals: Residuals | None
) -> Features:
    """Return the middle and the skip connections, with what the ControlNet adds to them.

    Args:
        unet: a ``UNet2DConditionModel``.
        latents: [n, channels, h, w], in sides that the UNet halves without remainder.
        timestep: scalar tensor.
        text: [n, tokens, width].
        residuals: of the ControlNet; None without control.
    """
    embedding = _embed_timestep(unet, latents, timestep)
    hidden = unet.conv_in(latents)
    skips = [hidden]
    for block in unet.down_blocks:
        hidden, passed = block(hidden_states=hidden, temb=embedding, **_text_argument(block, text))
        skips += passed
    hidden = unet.mid_block(hidden, embedding, **_text_argument(unet.mid_block, text))
    if residuals is not None:
        down, middle = residuals
        skips = [skip + residual for skip, residual in zip(skips, down, strict=True)]
        hidden = hidden + middle
    return (hidden, *skips)


def run_decoder(unet: Any, features: Features, timestep: Tensor, text: Tensor) -> Tensor:
    """Return the prediction at a timestep from the features of this or an earlier one."""
    hidden, skips = features[0], features[1:]
    embedding = _embed_timestep(unet, hidden, timestep)
    for block in unet.up_blocks:
        count = len(block.resnets)
        passed, skips = skips[-count:], skips[:-count]
        hidden = block(
            hidden_states=hidden,
            temb=embedding,
            res_hidden_states_tuple=passed,
            **_text_argument(block, text),
        )
    if unet.conv_norm_out:
        hidden = unet.conv_act(unet.conv_norm_out(hidden))
    prediction: Tensor = unet.conv_out(hidden)
    return prediction


def _embed_timestep(unet: Any, like: Tensor, timestep: Tensor) -> Tensor:
    embedded: Tensor = unet.time_embedding(unet.get_time_embed(sample=like, timestep=timestep))
    return embedded


def _text_argument(block: Any, text: Tensor) -> dict[str, Tensor]:
    attends = getattr(block, "has_cross_attention", False)
    return {"encoder_hidden_states": text} if attends else {}


# The protocols of ``tegula.models.bundle`` over the networks of diffusers.


@dataclass(frozen=True)
class SdDenoiser:
    """UNet and, where there is one, ControlNet, as ``make_denoiser`` joins them.

    ``controlnet`` takes what ``hint_encoder`` returned for a picture, so that the picture is
    encoded once and not at every step.
    """

    unet: Any
    controlnet: Any | None = None
    hint_encoder: nn.Module | None = None
    hint_is_bgr: bool = False

    @property
    def networks(self) -> tuple[nn.Module, ...]:
        """Return the networks that every step runs."""
        return (self.unet,) if self.controlnet is None else (self.unet, self.controlnet)

    @torch.no_grad()
    def embed_control(self, control: ControlImage) -> Tensor:
        """Return the prescaled picture as the ControlNet takes it, and the weight of control.

        They are one tensor, [n, channels + 1, h, w]; without ControlNet it is [n, 0].
        """
        picture = control.prescaled.to(precision_of(self.unet))
        if self.hint_encoder is None:
            return picture.new_zeros((len(picture), 0))
        embedded: Tensor = self.hint_encoder(picture.flip(1) if self.hint_is_bgr else picture)
        weight = control.weight_at(embedded.shape[-2], embedded.shape[-1])
        return torch.cat([embedded, weight.to(embedded.dtype)], 1)

    @torch.no_grad()
    def __call__(self, batch: WindowBatch) -> Tensor:
        """Return the prediction in the precision of this denoiser."""
        latents, text = self._cast(batch.latents), self._cast(batch.text)
        residuals = self._residuals(latents, text, batch)
        added: dict[str, Any] = {}
        if residuals is not None:
            added["down_block_additional_residuals"] = residuals[0]
            added["mid_block_additional_residual"] = residuals[1]
        prediction: Tensor = self.unet(
            latents, batch.timestep, encoder_hidden_states=text, return_dict=False, **added
        )[0]
        return prediction

    @torch.no_grad()
    def encode(self, batch: WindowBatch) -> Features:
        """Run ControlNet and the encoder of the UNet."""
        latents, text = self._cast(batch.latents), self._cast(batch.text)
        residuals = self._residuals(latents, text, batch)
        return run_encoder(self.unet, latents, batch.timestep, text, residuals)

    @torch.no_grad()
    def decode(self, features: Features, timestep: Tensor, text: Tensor) -> Tensor:
        """Run the decoder of the UNet on what ``encode`` returned, at this or a later timestep."""
        return run_decoder(self.unet, features, timestep, self._cast(text))

    def to_dtype(self, dtype: torch.dtype) -> SdDenoiser:
        """Return a copy in another precision, or this one if it has it already."""
        if precision_of(self.unet) == dtype:
            return self
        parts = (self.unet, self.controlnet, self.hint_encoder)
        unet, controlnet, hint_encoder = (
            move(copy.deepcopy(part), dtype=dtype) if part is not None else None for part in parts
        )
        return SdDenoiser(unet, controlnet, hint_encoder, self.hint_is_bgr)

    def _cast(self, values: Tensor) -> Tensor:
        return values.to(precision_of(self.unet))

    def _residuals(self, latents: Tensor, text: Tensor, batch: WindowBatch) -> Residuals | None:
        if self.controlnet is None or batch.control_scale is None:
            return None
        rows, count = batch.controlled, len(latents)
        control = batch.control[rows].to(latents.dtype)
        embedded, weight = control[:, :-1], control[:, -1:]
        down, middle = self.controlnet(
            latents[rows],
            batch.timestep[rows] if batch.timestep.ndim else batch.timestep,
            encoder_hidden_states=text[rows],
            controlnet_cond=embedded,
            conditioning_scale=batch.control_scale.on(latents.device),
            guess_mode=batch.control_scale.guess_mode,
            return_dict=False,
        )
        # Residuals have few sizes, and the weight is resampled once to each.
        weights = {
            size: functional.adaptive_avg_pool2d(weight, size)
            for size in {tuple(part.shape[-2:]) for part in (*down, middle)}
        }

        def placed(residual: Tensor) -> Tensor:
            return _spread(residual * weights[tuple(residual.shape[-2:])], rows, count)

        return [placed(part) for part in down], placed(middle)


def make_denoiser(unet: Any, controlnet: Any | None) -> SdDenoiser:
    """Join the networks, taking the picture encoder out of the ControlNet.

    The ControlNet given is changed by this: it no longer takes pictures.
    """
    if controlnet is None:
        return SdDenoiser(unet)
    encoder = controlnet.controlnet_cond_embedding
    is_bgr = controlnet.config.controlnet_conditioning_channel_order == "bgr"
    controlnet.controlnet_cond_embedding = nn.Identity()
    controlnet.register_to_config(controlnet_conditioning_channel_order="rgb")
    return SdDenoiser(unet, controlnet, encoder, is_bgr)


def _spread(residual: Tensor, rows: slice, count: int) -> Tensor:
    """Place the residual of some rows among zeros for the others."""
    if len(residual) == count:
        return residual
    spread = residual.new_zeros((count, *residual.shape[1:]))
    spread[rows] = residual
    return spread


@dataclass(frozen=True)
class SdAutoencoder:
    """The autoencoder of Stable Diffusion; its latents do not depend on the control."""

    network: Any

    @property
    def encoder(self) -> nn.Module:
        """Return the network that makes moments."""
        encoder: nn.Module = self.network.encoder
        return encoder

    @property
    def decoder(self) -> nn.Module:
        """Return the network that makes pictures."""
        decoder: nn.Module = self.network.decoder
        return decoder

    def encode(
        self,
        image: Tensor,
        control: ControlImage,  # noqa: ARG002
        generator: torch.Generator,
    ) -> Tensor:
        """Return a posterior sample, scaled to unit variance."""
        return self.draw(self.encode_moments(image), generator)

    @torch.no_grad()
    def encode_moments(self, image: Tensor) -> Tensor:
        """Return means and logarithmic variances, [n, 2 * channels, h, w]."""
        moments: Tensor = self.encoder((image * 2 - 1).to(precision_of(self.network)))
        last = self.network.quant_conv
        return moments if last is None else last(moments)

    def draw(self, moments: Tensor, generator: torch.Generator) -> Tensor:
        """Return latents of these moments, scaled to unit variance."""
        drawn: Tensor = DiagonalGaussianDistribution(moments).sample(generator)
        return drawn * float(self.network.config["scaling_factor"])

    @torch.no_grad()
    def decode(self, latents: Tensor, control: ControlImage) -> Tensor:  # noqa: ARG002
        """Return the picture, not clamped."""
        scaled = latents.to(precision_of(self.network)) / float(
            self.network.config["scaling_factor"]
        )
        first = getattr(self.network, "post_quant_conv", None)  # a light autoencoder has none
        picture: Tensor = self.decoder(scaled if first is None else first(scaled))
        return picture / 2 + 0.5

    def with_norms(self, norms: Mapping[nn.Module, nn.Module]) -> SdAutoencoder:
        """Return an autoencoder of the same weights with other layers in place of its norms."""
        return SdAutoencoder(with_shared_weights(self.network, [self.network], norms))

    def to_dtype(self, dtype: torch.dtype) -> SdAutoencoder:
        """Return a copy in another precision, or this one if it has it already."""
        if precision_of(self.network) == dtype:
            return self
        return SdAutoencoder(move(copy.deepcopy(self.network), dtype=dtype))


# All networks of a model, joined to a bundle.

_NO_CONTROL_WARNING = (
    "This bundle has no ControlNet, so resemblance has no effect; keep creativity low."
)


@dataclass(frozen=True)
class Networks:
    """The networks of one model before they are joined; ``controlnet`` may be None.

    inversions: words that the text encoder is to learn.
    """

    unet: Any
    controlnet: Any
    autoencoder: Any
    text_model: Any
    tokenizer: Any
    inversions: tuple[Inversion, ...] = ()

    @property
    def modules(self) -> tuple[nn.Module, ...]:
        """Return what holds weights, in the order of the fingerprint."""
        parts = (self.unet, self.controlnet, self.autoencoder, self.text_model)
        return tuple(module for module in parts if module is not None)


def assemble(
    networks: Networks,
    scheduler: Mapping[str, object],
    *,
    name: str,
    licence: str,
    device: str | torch.device,
    dtype: torch.dtype,
) -> Bundle:
    """Join networks to a bundle on a device; the networks given are changed by it."""
    unet, autoencoder = networks.unet.config, networks.autoencoder.config
    factor = 2 ** (len(autoencoder.block_out_channels) - 1)
    multiple = factor * 2 ** (len(unet.block_out_channels) - 1)
    window = int(unet.sample_size) * factor
    facts = BundleFacts(
        name=name,
        family="sd15",
        latent_factor=factor,
        latent_channels=int(unet.in_channels),
        window=window,
        minimum_window=max(multiple, window // 2),
        window_multiple=multiple,
        presets=PRESETS,
        fingerprint=fingerprint(networks.modules, networks.inversions),
        licence=licence,
    )
    text = SdTextEncoder.taught(networks.tokenizer, networks.text_model, networks.inversions)
    for module in networks.modules:
        move(module, device=device, dtype=dtype)
        align(module)
    return Bundle(
        facts=facts,
        text=text,
        denoiser=make_denoiser(networks.unet, networks.controlnet),
        autoencoder=SdAutoencoder(networks.autoencoder),
        scheduler=scheduler,
        device=torch.device(device),
        dtype=dtype,
        warnings=() if networks.controlnet is not None else (_NO_CONTROL_WARNING,),
        with_loras=partial(merged, networks),
    )


@contextmanager
def merged(networks: Networks, loras: Sequence[tuple[str, float]]) -> Iterator[tuple[str, ...]]:
    """Merge LoRAs into networks that are loaded, and put the own weights back at the end.

    Weights that are in half precision already are rounded once more by it, which loading a
    bundle with the LoRAs does not do.

    Args:
        networks: their weights are changed where they lie, so that compiled networks and whoever
            else runs them have the LoRAs too.
        loras: (file, weight), in this order.

    Returns:
        Sentences on what of the files is not used.

    Raises:
        BrokenWeightsError: a file is damaged, no LoRA, for another family, or not finite.
    """
    modules = {UNET: networks.unet, TEXT: networks.text_model}
    parameters = {
        (network, name): parameter.data
        for network, module in modules.items()
        for name, parameter in module.named_parameters()
    }
    shapes: dict[str, dict[str, tuple[int, ...]]] = {network: {} for network in modules}
    for (network, name), weight in parameters.items():
        shapes[network][name] = tuple(weight.shape)
    found = open_loras(loras, shapes)
    own: list[tuple[Tensor, Tensor]] = []
    try:
        for (network, name), weight in parameters.items():
            if name.removeprefix("text_model.") in found.changes[network]:
                before = weight.to("cpu", copy=True)
                own.append((weight, before))
                weight.copy_(found.merge(network, name, before, weight.dtype))
        yield (*found.warnings, *_words_not_learned(found))
    finally:
        for weight, before in own:
            weight.copy_(before)


def _words_not_learned(loras: Loras) -> Iterator[str]:
    """Yield a sentence for each embedding that a LoRA has with it: a run teaches no words."""
    for path, word, _ in loras.words:
        yield (
            f"The word {word} of {path.name} is not known to a prompt that names the LoRA; give "
            f"the LoRA when the model is loaded."
        )


def move(
    module: Any, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
) -> Any:
    """Move a network; diffusers' own ``to`` warns on every change of precision."""
    return nn.Module.to(module, device=device, dtype=dtype)


def precision_of(network: nn.Module) -> torch.dtype:
    """Return the precision of the first weight.

    The ``dtype`` of diffusers' networks visits all of their layers each time, which takes
    2 ms with the nets of Stable Diffusion.
    """
    return next(network.parameters()).dtype


_CACHE_LINE_BYTES = 64
"""Also the width of the widest registers."""


def align(module: nn.Module) -> None:
    """Copy weights that are not aligned in a CPU's memory, as those of a mapped file may be.

    Matrix kernels take other paths for them, which round differently on some processors: the
    same weights from another file would give another picture in its last bits.
    """
    for parameter in module.parameters():
        if parameter.device.type == "cpu" and parameter.data_ptr() % _CACHE_LINE_BYTES:
            parameter.data = parameter.data.clone(memory_format=torch.preserve_format)


_SAMPLES = 64
"""Weights of each tensor that enter the fingerprint: all of them would take seconds."""


def sample_of(weight: Tensor) -> Tensor:
    """Return some numbers of a weight, evenly spread, as float32."""
    flat = weight.detach().flatten()
    # Copied, for a view would keep the whole weight in memory.
    return flat[:: max(1, len(flat) // _SAMPLES)].to("cpu", torch.float32, copy=True)


def fingerprint(modules: Sequence[nn.Module], inversions: Sequence[Inversion] = ()) -> str:
    """Return a hash over some of the weights, the same whatever file they came from.

    Args:
        modules: networks, in the same order every time.
        inversions: words that the text encoder is yet to learn.

    A network that was loaded in another precision keeps samples of the exact weights, so that
    the hash does not depend on the precision either.
    """
    digest = hashlib.sha256()
    for module in modules:
        exact: Mapping[str, Tensor] = getattr(module, "exact_samples", {})
        for name, tensor in sorted(module.named_parameters()):
            sample = exact[name] if name in exact else sample_of(tensor)
            digest.update(f"{name}{tuple(tensor.shape)}".encode())
            digest.update(sample.numpy().tobytes())
    for inversion in inversions:
        digest.update(" ".join(inversion.words).encode())
        digest.update(sample_of(inversion.vectors).numpy().tobytes())
    return digest.hexdigest()[:16]
