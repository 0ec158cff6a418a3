"""What a file of weights is, recognised by the names and shapes in it, without loading it.

Refusals name the family by it, and ``tegula doctor`` tells it of every file that it found.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path

from tegula.errors import BrokenWeightsError
from tegula.models.files import Shapes, read_shapes

SD15 = "Stable Diffusion 1.5"
_SDXL, _SD2, _SD3, _FLUX = "SDXL", "Stable Diffusion 2", "Stable Diffusion 3", "Flux"
_ANIMATE = "AnimateDiff"
_FAMILIES_BY_TEXT_WIDTH = {768: SD15, 1024: _SD2, 1280: "the SDXL refiner", 2048: _SDXL}
LATENT_CHANNELS = 4

CONTROL_LORA_MARK, DIFFERENCE_MARK = "lora_controlnet", "difference"
"""Tensors that tell a control-LoRA and a difference ControlNet."""

CHECKPOINT, UNET, TRANSFORMER = "checkpoint", "UNet", "transformer"
CONTROLNET, CONTROL_LORA, DIFFERENCE = "ControlNet", "control-LoRA", "difference ControlNet"
UNION = "union ControlNet"
AUTOENCODER, LIGHT_AUTOENCODER = "autoencoder", "light autoencoder (TAESD)"
LORA, EMBEDDING, TEXT_ENCODER = "LoRA", "embedding", "text encoder"
T2I_ADAPTER, IP_ADAPTER, PRESCALER = "T2I adapter", "IP adapter", "prescaler"
UNKNOWN = "file of unknown weights"


@dataclass(frozen=True)
class Identity:
    """What a file is.

    kind: one of the kinds of this module.
    family: the models it belongs to, such as "SDXL"; empty where the file does not tell.
    inputs: channels that a UNet takes; 0 where there is none.
    text_width: of the text that it takes, 0 if it is not known.
    """

    kind: str
    family: str = ""
    inputs: int = 0
    text_width: int = 0

    def __str__(self) -> str:
        article = "an" if self.kind[0].lower() in "aei" or self.kind.startswith("IP") else "a"
        family = f" for {self.family}" if self.family else ""
        variant = ""
        if self.inputs not in (0, LATENT_CHANNELS):
            variant = f", a variant with {self.inputs} input channels"
        return f"{article} {self.kind}{family}{variant}"

    @property
    def may_be_sd15(self) -> bool:
        """Whether nothing tells that it is of another family."""
        return self.family in ("", SD15)


def identify_file(path: Path) -> Identity:
    """Identify a file of weights.

    Raises:
        BrokenWeightsError: it is damaged, or no file of weights.
    """
    refuse_gguf(path)
    return identify(read_shapes(path), path)


def refuse_gguf(path: Path) -> None:
    """Make sure that a file is not of the GGUF format, which is for quantised transformers.

    Raises:
        BrokenWeightsError: it is.
    """
    try:
        with path.open("rb") as stream:
            is_gguf = stream.read(4) == b"GGUF"
    except OSError:
        is_gguf = False
    if is_gguf or path.suffix.lower() == ".gguf":
        raise BrokenWeightsError(
            f"{path} is a GGUF file, a format that tegula does not read; give the .safetensors "
            f"file of the same model."
        )


def identify(shapes: Shapes, path: Path | None = None) -> Identity:
    """Identify tensors by their names and shapes; the path helps with autoencoders."""
    names = shapes.keys()
    for find in (_adapter, _lora, _control, _diffusion, _autoencoder):
        found = find(shapes)
        if found is not None:
            if found == Identity(AUTOENCODER) and path is not None and _names_sdxl(path):
                return Identity(AUTOENCODER, _SDXL)
            return found
    if _any(names, r"(^|\.)text_model\.embeddings\.token_embedding\.weight$"):
        width = _width(shapes, r"token_embedding\.weight$")
        return Identity(TEXT_ENCODER, SD15 if width == 768 else "")
    if _any(names, r"(^|\.)(conv_first|model\.0|body\.0|conv_before_upsample|feats\.0)\."):
        return Identity(PRESCALER)
    return _embedding(shapes) or Identity(UNKNOWN)


def _adapter(shapes: Shapes) -> Identity | None:
    names = shapes.keys()
    if _any(names, r"^ip_adapter\.|to_k_ip\.weight$|^image_proj\."):
        return Identity(IP_ADAPTER)
    if _any(names, r"^(adapter\.)?body\.0\.(block1|resnets\.0\.block1)\.weight$"):
        return Identity(T2I_ADAPTER)
    return None


def _lora(shapes: Shapes) -> Identity | None:
    names = shapes.keys()
    if CONTROL_LORA_MARK in names:
        return Identity(CONTROL_LORA, _family_of_text(shapes))
    mark = (
        r"lora[_.](down|up|A|B)\b|_lora\.|hada_w1|lokr_w|lora_mid|dora_scale|^lora_|^lycoris_"
        r"|\.diff(_b)?$|^bundle_emb\."
    )
    if not _any(names, mark):
        return None
    if _any(names, r"double_blocks|single_transformer_blocks|single_blocks"):
        return Identity(LORA, _FLUX)
    if _any(names, r"joint_blocks|^transformer\.transformer_blocks"):
        return Identity(LORA, _SD3)
    if _any(names, r"motion_modules"):
        return Identity(LORA, _ANIMATE)
    # Stable Diffusion 1.5 has one transformer in each attention, SDXL up to ten.
    if _any(
        names, r"^lora_te2_|text_encoder_2|\.clip_g$|_blocks[._].*[._]transformer_blocks[._][1-9]"
    ):
        return Identity(LORA, _SDXL)
    if _any(names, r"text_model[._]encoder[._]layers[._](1[2-9]|2\d)[._]"):  # 1.5 has twelve
        return Identity(LORA, _SD2)
    return Identity(LORA, _family_of_text(shapes))


def _control(shapes: Shapes) -> Identity | None:
    names = shapes.keys()
    if _any(names, r"(^|\.)(task_embedding|control_add_embedding|transformer_layes)\b"):
        return Identity(UNION, _SDXL)
    if _any(names, r"(^|\.)(zero_convs|input_hint_block|controlnet_cond_embedding)\."):
        is_whole = _any(names, r"^model\.diffusion_model\.")
        kind = DIFFERENCE if DIFFERENCE_MARK in names else CONTROLNET
        return Identity(kind, "" if is_whole else _family_of_text(shapes))
    return None


def _diffusion(shapes: Shapes) -> Identity | None:
    names = shapes.keys()
    prefix = "model.diffusion_model."
    has_prefix = any(name.startswith(prefix) for name in names)
    kind = CHECKPOINT if has_prefix else TRANSFORMER
    if _any(names, r"(^|\.)double_blocks\.\d|^single_transformer_blocks\."):
        return Identity(kind, _FLUX)
    if _any(names, r"(^|\.)joint_blocks\.\d|^transformer_blocks\.0\.ff_context"):
        return Identity(kind, _SD3)
    entry = next(
        (
            shapes[name]
            for name in (f"{prefix}input_blocks.0.0.weight", "input_blocks.0.0.weight")
            if name in shapes
        ),
        shapes.get("conv_in.weight") if "time_embedding.linear_1.weight" in names else None,
    )
    if entry is None or len(entry) != 4:
        return Identity(UNKNOWN) if has_prefix else None
    width = _text_width(shapes)
    family = _FAMILIES_BY_TEXT_WIDTH.get(width, "")
    has_text = _any(names, r"^(cond_stage_model|conditioner\.embedders)\.")
    if _any(names, r"^conditioner\.embedders\.") and family in ("", SD15):
        family = _SDXL
    kind = CHECKPOINT if has_prefix and has_text else UNET
    return Identity(kind, family, entry[1], width)


def _autoencoder(shapes: Shapes) -> Identity | None:
    names = shapes.keys()
    if _any(names, r"^(taesd_)?(decoder|encoder)\.layers\.\d|^(taesd_\w+\.)?3\.conv\.0\.weight$"):
        return Identity(LIGHT_AUTOENCODER)
    if not _any(names, r"(^|\.)decoder\.(up\.0|up_blocks\.0|mid|mid_block)\."):
        return None
    entries = (s for name, s in shapes.items() if name.endswith("decoder.conv_in.weight"))
    latents = next((shape[1] for shape in entries if len(shape) == 4), 0)
    deeper = latents > LATENT_CHANNELS
    family = f"latents of {latents} channels, as {_SD3} and {_FLUX} have" if deeper else ""
    return Identity(AUTOENCODER, family)


def _embedding(shapes: Shapes) -> Identity | None:
    if {"clip_l", "clip_g"} <= shapes.keys():
        return Identity(EMBEDDING, _SDXL)
    if len(shapes) > 2 or not shapes:
        return None
    widths = {shape[-1] for shape in shapes.values() if len(shape) in (1, 2)}
    return Identity(EMBEDDING, _FAMILIES_BY_TEXT_WIDTH.get(max(widths, default=0), ""))


def _family_of_text(shapes: Shapes) -> str:
    return _FAMILIES_BY_TEXT_WIDTH.get(_text_width(shapes), "")


def _text_width(shapes: Shapes) -> int:
    """Return the width of the text that cross attention takes, which tells the family."""
    plain, lora = r"to_k\.weight", r"to_k[._].*(down|lora_A|hada_w[12]_b)(\.weight)?"
    return _width(shapes, rf"attn2[._](processor\.)?({plain}|{lora})$")


def family_of_width(width: object) -> str:
    """Return the family, other than 1.5, whose text is of this width; empty if none is known."""
    family = _FAMILIES_BY_TEXT_WIDTH.get(width, "") if isinstance(width, int) else ""
    return "" if family == SD15 else family


def _width(shapes: Shapes, pattern: str) -> int:
    found = re.compile(pattern)
    return next((s[1] for name, s in shapes.items() if len(s) >= 2 and found.search(name)), 0)


def _any(names: Iterable[str], pattern: str) -> bool:
    return any(map(re.compile(pattern).search, names))


def _names_sdxl(path: Path) -> bool:
    """Tell whether file or folder are named after SDXL: the shapes of its autoencoder are 1.5's."""
    names = (path.stem, path.absolute().parent.name)
    return any(re.search(r"sd_?xl|(^|[-_. ])xl([-_. ]|$)", name, re.IGNORECASE) for name in names)


def refuse_other(path: Path, identity: Identity, wanted: str, kinds: Collection[str]) -> None:
    """Make sure that a file is of one of these kinds, for Stable Diffusion 1.5.

    Args:
        path: of the file, for the sentence.
        identity: what it is.
        wanted: what it should be, with its article.
        kinds: the kinds that are taken.

    Raises:
        BrokenWeightsError: it is something else.
    """
    if identity.kind in kinds and identity.may_be_sd15:
        return
    raise BrokenWeightsError(f"{path} is {identity}; give {wanted} for {SD15}.")
