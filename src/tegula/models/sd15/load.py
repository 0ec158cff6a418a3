"""Loading any Stable Diffusion 1.5 model as a bundle, once ``find.py`` has found its parts."""

from __future__ import annotations

import dataclasses
import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import diffusers
import torch
import transformers

from tegula.models import BundleSettings
from tegula.models.bundle import Bundle
from tegula.models.hub import is_weights_file
from tegula.models.sd15 import facts
from tegula.models.sd15.find import FoundParts, find_sd15
from tegula.models.sd15.lora import Loras
from tegula.models.sd15.networks import Networks, assemble
from tegula.models.sd15.parts import (
    Part,
    light_autoencoder,
    load_part,
    tokenizer_from_folder,
)
from tegula.models.sd15.refusals import refuse_mixed
from tegula.models.sd15.text import read_inversions


def load_sd15(
    wanted: BundleSettings,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    config: str | None = None,
    name: str | None = None,
) -> Bundle:
    """Load a Stable Diffusion 1.5 model.

    Args:
        wanted: the model and its parts, as ``find_sd15`` takes them.
        device: where the bundle runs.
        dtype: the precision it is loaded and runs in.
        config: a diffusers folder whose configuration and tokenizer a checkpoint of
            unusual shape needs; None stands for the common one.
        name: the name in the bundle's facts; None takes that of the file or folder.

    Raises:
        MissingWeightsError: a part is not on this machine and cannot be downloaded.
        BrokenWeightsError: a part is damaged or of another family.
        OptionError: ``few_step`` is not a LoRA that tegula knows, or two embeddings have one name.
    """
    found = find_sd15(wanted, config)
    parts, chosen = found.parts, found.chosen
    with _quiet():
        networks = _load(parts, dtype, found.loras)
        refuse_mixed(networks)
        width = int(networks.text_model.config.hidden_size)
        inversions = read_inversions(found.embeddings, width, found.loras.words)
        networks = dataclasses.replace(networks, inversions=inversions)
        light = light_autoencoder(device, dtype)
    model = found.model
    path = Path(model)
    bundle = assemble(
        networks,
        parts.scheduler,
        name=name or (path.stem if is_weights_file(model) else path.name),
        licence=facts.LICENCE,
        device=device,
        dtype=dtype,
    )
    presets = chosen.presets(bundle.facts.presets)
    return dataclasses.replace(
        bundle,
        facts=dataclasses.replace(bundle.facts, presets=presets),
        warnings=(
            *bundle.warnings,
            *chosen.warnings,
            *found.loras.warnings,
            *_warnings_of_name(parts.controlnet),
        ),
        light_autoencoder=light,
    )


def _load(parts: FoundParts, dtype: torch.dtype, loras: Loras) -> Networks:
    """Load the networks one after the other, weight by weight, with the LoRAs in them."""
    unet = load_part(parts.unet, dtype, merge=loras.merge)
    return Networks(
        unet,
        load_part(parts.controlnet, dtype, unet) if parts.controlnet is not None else None,
        load_part(parts.autoencoder, dtype),
        load_part(parts.text_model, dtype, merge=loras.merge),
        tokenizer_from_folder(parts.tokenizer),
    )


_OTHER_CONTROL = (
    r"canny|depth|openpose|lineart|scribble|_seg|softedge|normal|mlsd|inpaint|shuffle|ip2p|hed"
)


def _warnings_of_name(controlnet: Part | None) -> tuple[str, ...]:
    """Warn of a ControlNet whose name tells another purpose: its weights do not."""
    name = "" if controlnet is None else controlnet.source.name
    if "tile" in name.lower() or not re.search(_OTHER_CONTROL, name, re.IGNORECASE):
        return ()
    return (f"{name} is not a ControlNet for tiles by its name; the picture may not be kept.",)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the remarks and bars of diffusers and transformers off the user's screen."""
    libraries = (diffusers.utils.logging, transformers.utils.logging)
    before = [(each.get_verbosity(), each.is_progress_bar_enabled()) for each in libraries]
    for library in libraries:
        library.set_verbosity(logging.CRITICAL)
        library.disable_progress_bar()
    try:
        yield
    finally:
        for library, (level, has_bars) in zip(libraries, before, strict=True):
            library.set_verbosity(level)
            if has_bars:
                library.enable_progress_bar()
