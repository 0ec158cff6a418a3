"""Networks in, bundle out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from tegula.models.bundle import Bundle, BundleFacts
from tegula.models.sd15.bundle import SdAutoencoder, align, fingerprint, make_denoiser, move
from tegula.models.sd15.facts import PRESETS
from tegula.models.sd15.text import SdTextEncoder


@dataclass(frozen=True)
class Networks:
    """The networks of one model before they are joined; ``controlnet`` may be None."""

    unet: Any
    controlnet: Any
    autoencoder: Any
    text_model: Any
    tokenizer: Any

    @property
    def modules(self) -> tuple[nn.Module, ...]:
        """Return what holds weights, in the order of the fingerprint."""
        found = (self.unet, self.controlnet, self.autoencoder, self.text_model)
        return tuple(module for module in found if module is not None)


@dataclass(frozen=True)
class Identity:
    """What a bundle is called and under which licence its weights are."""

    name: str
    licence: str


def assemble(
    networks: Networks,
    identity: Identity,
    scheduler: Mapping[str, object],
    *,
    device: str | torch.device,
    dtype: torch.dtype,
) -> Bundle:
    """Join float32 networks to a bundle on a device; the networks are used up."""
    facts = _facts(identity, networks)
    for module in networks.modules:
        move(module, device=device, dtype=dtype)
        align(module)
    return Bundle(
        facts=facts,
        text=SdTextEncoder(networks.tokenizer, networks.text_model),
        denoiser=make_denoiser(networks.unet, networks.controlnet),
        autoencoder=SdAutoencoder(networks.autoencoder),
        scheduler=scheduler,
        device=torch.device(device),
        dtype=dtype,
        warnings=() if networks.controlnet is not None else (_NO_CONTROL_WARNING,),
    )


_NO_CONTROL_WARNING = (
    "This bundle has no ControlNet, so resemblance has no effect; keep creativity low."
)


def _facts(identity: Identity, networks: Networks) -> BundleFacts:
    levels = len(networks.unet.config.block_out_channels) - 1
    factor = 2 ** (len(networks.autoencoder.config.block_out_channels) - 1)
    multiple = factor * 2**levels
    window = int(networks.unet.config.sample_size) * factor
    return BundleFacts(
        name=identity.name,
        family="sd15",
        latent_factor=factor,
        latent_channels=int(networks.unet.config.in_channels),
        window=window,
        minimum_window=max(multiple, window // 2),
        window_multiple=multiple,
        presets=PRESETS,
        fingerprint=fingerprint(networks.modules),
        licence=identity.licence,
    )
