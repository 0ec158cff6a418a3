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
from tegula.models.headers import refuse_gguf

SD15 = "Stable Diffusion 1.5"
_SDXL, _SD2, _SD3, _FLUX = "SDXL", "Stable Diffusion 2", "Stable Diffusion 3", "Flux"
_ANIMATE = "AnimateDiff"
_TRANSFORMER = "a diffusion transformer, as Stable Diffusion 3, Flux and PixArt are"
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
        r"|\.diff(_b)?$|^bundle_emb\.|\.oft_(blocks|diag|R)\b|\.ia3_l|\.on_input$"
    )
    if not _any(names, mark):
        return None
    family = next((family for family, pattern in _LORA_NAMES if _any(names, pattern)), None)
    if family is None and _any(names, _TRANSFORMER_NAMES):
        family = _transformer(shapes)
    return Identity(LORA, _family_of_lora(shapes) if family is None else family)


_UPPER = r"text_model[._]encoder[._]layers[._](1[2-9]|[2-9]\d)[._]"  # 1.5 has twelve
_LORA_NAMES = (
    (_ANIMATE, r"motion_modules"),
    (
        "Hunyuan Video",
        r"(img|txt)_mlp[._]fc[12]|(img|txt)_mod[._]linear|token_refiner|modulation[._]linear"
        r"|double_blocks\.\d+\.(img|txt)_attn_(qkv|proj)",
    ),
    ("Qwen-Image", r"transformer_blocks[._]\d+[._](img|txt)_m(lp|od)[._]"),
    (_FLUX, r"double_blocks|single_transformer_blocks|single_blocks|guidance_embedder"),
    (_SD3, r"joint_blocks"),
    ("AuraFlow", r"joint_transformer_blocks|single_dit"),
    ("Wan", r"(^|[._])blocks[._]\d+[._]((self|cross)_attn[._][qkvo](_img)?|ffn[._][02])\."),
    ("Hunyuan DiT", r"(^|[._])blocks[._]\d+[._]attn[12][._](Wqkv|q_proj|kv_proj|out_proj)"),
    ("PixArt", r"adaln_single|caption_projection|cross_attn[._](q|kv)_linear"),
    (f"{_SD3} or {_FLUX}", r"^lora_te3_|text_encoder_3|t5xxl|^lora_te\d_encoder_block"),
    ("Stable Cascade", r"^lora_prior_|prior_unet"),
    # Two text encoders, up to ten transformers in an attention, and attention at the coarsest
    # place of the way up and not at the finest; the other networks do otherwise.
    (
        _SDXL,
        r"^lora_te2_text_model|text_encoder_2|(^|[._])clip_g\b|add_embedding|label_emb"
        r"|block(s[._]\d+)?[._].*transformer_blocks[._][1-9]"
        r"|up_blocks[._]0[._]attentions|output_blocks[._][012][._]1[._](transformer_blocks|proj_)",
    ),
)
"""Families by what is in the names of their LoRAs alone, the surest first."""
_TRANSFORMER_NAMES = (
    r"^(base_model\.model\.|diffusion_model\.)?(lora_|lycoris_)?(transformer[._])?"
    r"(single_)?transformer_blocks[._]\d"
)
_TRANSFORMER_WIDTHS = {1152: "PixArt", 1536: _SD3, 2240: "Sana", 2432: _SD3, 3072: _FLUX}
_PLAIN_WIDTHS = {1152: "PixArt", 1920: "CogVideoX", 2048: "LTX-Video", 3072: "CogVideoX"}
"""Families by the width of a transformer's layers: of those that text and picture share, and of
those that only the picture goes through."""


def _transformer(shapes: Shapes) -> str:
    """Return the family of a transformer by the width of its attention."""
    joined = _any(shapes, r"add_[kqv]_proj|to_add_out|ff_context")
    taken = r"[._]attn[12]?[._](processor[._])?(to_[qkv]|add_[kqv]_proj)[._].*(down|lora_A)"
    width = _width(shapes, rf"{_TRANSFORMER_NAMES}\d*{taken}")
    split = _any(shapes, rf"{_TRANSFORMER_NAMES}\d*[._]attn[12][._]")
    widths = _PLAIN_WIDTHS if split and not joined else _TRANSFORMER_WIDTHS
    return widths.get(width, f"{_SD3} or {_FLUX}" if joined else _TRANSFORMER)


def _family_of_lora(shapes: Shapes) -> str:
    """Return the family of a LoRA of a UNet and its text encoder, by widths and depths."""
    family = _family_of_text(shapes)
    if family:
        return family
    if _any(shapes, _UPPER):
        return _SD2
    # Attention and the first half of the feed-forward network take what the encoder is wide.
    taken = r"layers[._]\d+[._](self_attn[._][qkv]_proj|self_attn[._]out_proj|mlp[._]fc1)[._]"
    width = _width(shapes, rf"text_model[._]encoder[._]{taken}.*(down|lora_A)")
    if width in _TEXT_ENCODERS:
        return _TEXT_ENCODERS[width]
    # What one family has at a place of the way up is twice as wide as what another has there.
    place = r"up_blocks[._]1[._]attentions[._].*attn1[._]to_[qkv][._].*(down|lora_A)"
    return _SDXL if _width(shapes, place) == _HALF_WIDTH else ""


_HALF_WIDTH = 640
_TEXT_ENCODERS = {1024: _SD2, 1280: _SDXL}
"""Families by the width of the text encoder itself; SDXL's first one is that of 1.5."""


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
    # A change given whole, as "diff" is, has the width of the weight.
    plain = r"to_[kv]\.(weight|diff)"
    lora = r"to_[kv][._].*(down|lora_A(\.[^.]+)?|hada_w[12]_b)(\.weight)?"
    return _width(shapes, rf"attn2[._](processor[._])?({plain}|{lora})$")


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
