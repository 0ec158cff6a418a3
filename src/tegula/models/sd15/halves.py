"""The UNet of diffusers in two halves.

The encoder (down and middle blocks) changes little from one noise level to the next, so
its answers can be handed to the decoder (up blocks) of several levels: "Faster
Diffusion" (Li et al., 2023). Both halves are plain functions of tensors.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from tegula.models.bundle import Features

Residuals = tuple[Sequence[Tensor], Tensor]
"""What a ControlNet adds to the skip connections, and to the middle."""


def encode(
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
    level = _embedded(unet, latents, timestep)
    hidden = unet.conv_in(latents)
    skips = [hidden]
    for block in unet.down_blocks:
        hidden, passed = block(hidden_states=hidden, temb=level, **_text(block, text))
        skips += passed
    hidden = unet.mid_block(hidden, level, **_text(unet.mid_block, text))
    if residuals is not None:
        down, middle = residuals
        skips = [skip + residual for skip, residual in zip(skips, down, strict=True)]
        hidden = hidden + middle
    return (hidden, *skips)


def decode(unet: Any, features: Features, timestep: Tensor, text: Tensor) -> Tensor:
    """Return the prediction at a noise level from the features of this or an earlier one."""
    hidden, skips = features[0], features[1:]
    level = _embedded(unet, hidden, timestep)
    for block in unet.up_blocks:
        count = len(block.resnets)
        passed, skips = skips[-count:], skips[:-count]
        hidden = block(
            hidden_states=hidden, temb=level, res_hidden_states_tuple=passed, **_text(block, text)
        )
    if unet.conv_norm_out:
        hidden = unet.conv_act(unet.conv_norm_out(hidden))
    prediction: Tensor = unet.conv_out(hidden)
    return prediction


def _embedded(unet: Any, like: Tensor, timestep: Tensor) -> Tensor:
    embedded: Tensor = unet.time_embedding(unet.get_time_embed(sample=like, timestep=timestep))
    return embedded


def _text(block: Any, text: Tensor) -> dict[str, Tensor]:
    reads = getattr(block, "has_cross_attention", False)
    return {"encoder_hidden_states": text} if reads else {}
