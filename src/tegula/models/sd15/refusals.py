"""Telling models of other families by headers and settings, before any weight is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tegula.errors import BrokenWeightsError
from tegula.models.files import read_json
from tegula.models.identify import (
    CHECKPOINT,
    LATENT_CHANNELS,
    UNET,
    Identity,
    family_of_width,
    refuse_other,
)
from tegula.models.sd15 import facts
from tegula.models.sd15.networks import Networks

_SDXL_SCALING = 0.13025
"""Factor by which SDXL scales its latents; that of Stable Diffusion 1.5 is 0.18215."""


def refuse_other_checkpoint(path: Path, identity: Identity, text_width: int) -> None:
    """Make sure that a file holds a UNet of Stable Diffusion 1.5.

    Args:
        path: of the file, for the sentence.
        identity: what it is.
        text_width: of the text that the model should take.

    Raises:
        BrokenWeightsError: it is of another family, or no checkpoint at all.
    """
    refuse_other(path, identity, "a checkpoint", (CHECKPOINT, UNET))
    if identity.text_width != text_width:
        raise _of_other_family(path, f"a model with text of width {identity.text_width}")
    if identity.inputs != LATENT_CHANNELS:
        raise _of_other_family(path, f"a variant with {identity.inputs} input channels")


def refuse_other_folder(folder: Path) -> None:
    """Make sure that a diffusers folder holds a Stable Diffusion 1.5 model.

    The tiny networks of the tests are narrower, so the width of the text is compared with
    that of the folder's own text encoder, unless it is known from another family.

    Raises:
        BrokenWeightsError: its UNet is of another family.
    """
    unet = read_json(folder / "unet" / "config.json")
    width: Any = unet.get("cross_attention_dim")
    own = read_json(folder / "text_encoder" / "config.json").get("hidden_size")
    fits = isinstance(width, int) and width == own and not family_of_width(width)
    if not fits and width != facts.TEXT_WIDTH:
        raise _of_other_family(
            folder, family_of_width(width) or f"a model with text of width {width}"
        )
    if unet.get("in_channels") != LATENT_CHANNELS:
        raise _of_other_family(folder, f"a variant with {unet.get('in_channels')} input channels")


def refuse_other_pipeline(folder: Path) -> None:
    """Make sure that the index of a diffusers folder, if there is one, fits the family.

    Raises:
        BrokenWeightsError: it holds a pipeline of another family.
    """
    index = folder / "model_index.json"
    if not index.is_file():
        return
    parts = read_json(index)
    if "unet" not in parts or "text_encoder_2" in parts:
        raise _of_other_family(folder, str(parts.get("_class_name")))


def refuse_mixed(networks: Networks) -> None:
    """Make sure that ControlNet and autoencoder belong to the UNet.

    Raises:
        BrokenWeightsError: one of them is of another family.
    """
    unet, controlnet = networks.unet.config, networks.controlnet
    if controlnet is not None and (
        controlnet.config.cross_attention_dim != unet.cross_attention_dim
        or list(controlnet.config.block_out_channels) != list(unet.block_out_channels)
    ):
        raise BrokenWeightsError(
            "The ControlNet does not fit this model; Stable Diffusion 1.5 needs "
            f"{facts.DEFAULT_CONTROLNET} or another one of that family."
        )
    channels = networks.autoencoder.config.latent_channels
    if channels != unet.in_channels:
        raise BrokenWeightsError(
            f"The autoencoder's latents have {channels} channels where the model takes "
            f"{unet.in_channels}; give one for Stable Diffusion 1.5, like {facts.DEFAULT_VAE}."
        )


def refuse_other_autoencoder(config: Path) -> None:
    """Make sure that the settings of an autoencoder are not SDXL's, whose weights look alike.

    Args:
        config: a config.json, which need not be there.

    Raises:
        BrokenWeightsError: they are.
    """
    if config.is_file() and read_json(config).get("scaling_factor") == _SDXL_SCALING:
        raise _of_other_family(config.parent, "an autoencoder for SDXL")


def _of_other_family(path: Path, what: str) -> BrokenWeightsError:
    return BrokenWeightsError(
        f"{path} is {what}, not Stable Diffusion 1.5; give one of that family."
    )
