"""LoRAs: changes of weights, merged layer by layer while the networks are loaded.

Every layer is computed in float32 with its own rank and alpha, and rounded once into the precision
that the network runs in. Formulas are those of LyCORIS (arXiv:2309.14859), DoRA
(arXiv:2402.09353) and others named below, as AUTOMATIC1111's web UI and ComfyUI read them.

Which tensors of a file fit the model is known from names and shapes, before a weight is read.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tegula.errors import BrokenWeightsError
from tegula.models.files import Shapes, existing_file, open_tensors, read_json, read_metadata
from tegula.models.headers import refuse_gguf
from tegula.models.hub import (
    HubRepository,
    find_or_fetch,
    formats,
    is_hub_id,
    is_weights_file,
)
from tegula.models.identify import LORA, SD15, identify, refuse_other
from tegula.models.sd15.lora_names import (
    TEXT,
    UNET,
    find_layer_name,
    layers_by_name,
    split_name,
)
from tegula.models.stored import LOADING_FAILURES, StoredTensor

LORA_FILE = "pytorch_lora_weights.safetensors"
"""What diffusers calls the file of a LoRA."""

_BUNDLED_WORD = re.compile(r"^bundle_emb\.([^.]+)\.(?:string_to_param\..+|emb_params|clip_l)$")
"""An embedding in the file of a LoRA that was trained with it ("pivotal tuning")."""


# What the parts of a layer amount to.


def _changes(parts: Mapping[str, Tensor]) -> Iterator[tuple[Tensor, int]]:
    """Yield each change of a weight in a layer with its rank, 0 where alpha does not scale it.

    Raises:
        LookupError, RuntimeError: a part is missing, or parts do not fit each other.
    """
    if {"up", "down", "mid"} & parts.keys():
        up, down = parts["up"].flatten(1), parts["down"]
        if "mid" in parts:  # the kernel apart from the channels
            product = torch.einsum("abkl,oa,bi->oikl", parts["mid"], up, down.flatten(1))
        else:
            product = up @ down.flatten(1)
        yield product, len(down)
    if any(name.startswith("hada_") for name in parts):
        first, second = (_factor(parts, f"hada_w{n}", f"hada_t{n}") for n in (1, 2))
        yield first * second, len(parts["hada_w1_b"])
    if any(name.startswith("lokr_") for name in parts):
        first, second = (_factor(parts, f"lokr_w{n}", f"lokr_t{n}") for n in (1, 2))
        ranks = (len(parts[name]) for name in ("lokr_w2_b", "lokr_w1_b") if name in parts)
        yield torch.kron(first.flatten(1), second.flatten(1).contiguous()), next(ranks, 0)
    if "diff" in parts:
        yield parts["diff"], 0


def _all_changes(parts: Mapping[str, Tensor], base: Tensor) -> Iterator[tuple[Tensor, int]]:
    """Yield what a layer's parts make of its weight, as ``_changes`` says."""
    yield from _changes(parts)
    yield from _changes_of_base(parts, base)


def _changes_of_base(parts: Mapping[str, Tensor], base: Tensor) -> Iterator[tuple[Tensor, int]]:
    """Yield each change that depends on the weight, as ``_changes`` does the others.

    (IA)3 (arXiv:2205.05638) scales inputs or outputs, GLoRA (arXiv:2306.07967) is a low-rank
    function of the weight, and OFT (arXiv:2306.07280) turns blocks of outputs by Cayley's
    transform of what is stored, as kohya's trainer and LyCORIS write it.

    Raises:
        LookupError, RuntimeError: a part is missing, or parts do not fit each other.
    """
    flat = base.reshape(len(base), -1)  # a bias has one dimension
    if "on_input" in parts:  # LyCORIS keeps what is added to one
        scale, of_input = parts["ia3"].flatten(), parts["on_input"]
        # Without values, shapes alone tell.
        is_input = len(scale) == base.shape[1] if of_input.is_meta else bool(of_input.any())
        rest = [1] * (base.ndim - 2)
        yield base * scale.reshape((1, -1, *rest) if is_input else (-1, 1, *rest)), 0
    if "ia3_l" in parts:  # PEFT keeps the whole factor, for linear layers [1, in] or [out, 1]
        scale = parts["ia3_l"]
        if base.ndim > 2:
            raise ValueError("a convolution, where inputs and outputs look alike")
        yield base * ((scale[:, 0] if base.ndim == 1 else scale) - 1), 0
    if any(name.startswith("glora_") for name in parts):
        a1, a2, b1, b2 = (parts[f"glora_{name}"].flatten(1) for name in ("a1", "a2", "b1", "b2"))
        if a1.shape[0] == flat.shape[1]:  # the newer layout, by the shape of the first factor
            yield flat @ a1 @ a2 + b1 @ b2, a1.shape[1]
        else:
            yield flat @ a2 @ a1 + b2 @ b1, len(a1)
    if "oft_blocks" in parts:
        blocks = parts["oft_blocks"]
        count, size = blocks.shape[:2]
        skew = blocks - blocks.transpose(1, 2)
        is_limited = "alpha" in parts and not base.is_meta
        limit = float(parts["alpha"].item()) * len(flat) if is_limited else 0.0
        if limit > 0:
            length = skew.norm()
            skew = skew * ((length.clamp(max=limit) + 1e-8) / (length + 1e-8))
        one = torch.eye(size, dtype=skew.dtype, device=skew.device)
        turn = torch.linalg.solve(one - skew, one + skew, left=False)
        turned = torch.einsum("knm,kni->kmi", turn, flat.reshape(count, size, -1))
        lengths = parts["rescale"].reshape(-1, 1) if "rescale" in parts else 1.0
        yield turned.reshape(flat.shape) * lengths - flat, 0


def _factor(parts: Mapping[str, Tensor], name: str, core: str) -> Tensor:
    """Return a factor of LoHa or LoKr, given whole or as a product itself."""
    if name in parts:
        return parts[name]
    first, second = parts[f"{name}_a"], parts[f"{name}_b"]
    if core in parts:
        return torch.einsum("ijkl,jr,ip->prkl", parts[core], second, first)
    return first.flatten(1) @ second.flatten(1)


def _like(change: Tensor, shape: Sequence[int]) -> Tensor:
    """Return a change in the shape of its weight: linear layers may be written as convolutions.

    Raises:
        ValueError: it is a change of another layer.
    """
    if change.numel() != torch.Size(shape).numel() or len(change) != shape[0]:
        raise ValueError(f"the shape {tuple(change.shape)} in place of {tuple(shape)}")
    return change.reshape(shape)


def _decomposed(merged: Tensor, parts: Mapping[str, Tensor]) -> Tensor:
    """Return a weight with the lengths of its rows or columns set, as DoRA learned them.

    PEFT keeps a length for each output; in LyCORIS' files it may be one for each input.
    """
    lengths = parts.get("magnitude", parts.get("dora_scale"))
    if lengths is None:
        return merged
    is_by_output = "magnitude" in parts or lengths.ndim == 1 or len(lengths) == len(merged)
    rows = merged if is_by_output else merged.transpose(0, 1)
    own = rows.flatten(1).norm(dim=1).clamp(min=torch.finfo(rows.dtype).eps)
    scale: Tensor = (lengths.flatten() / own).reshape(-1, *[1] * (rows.ndim - 1))
    return merged * (scale if is_by_output else scale.transpose(0, 1))


# Files.

_UNREAD = {
    ".oft_R": "an OFT of PEFT's making",
    ".oft_diag": "an OFT of the first LyCORIS",
    ".oft_blocks": "a BOFT",
    ".boft_": "a BOFT of PEFT's making",
    ".vera_lambda": "a VeRA",
    ".hra_u": "an HRA",
}
"""Kinds of changes that are not read, by what their tensors are called."""


@dataclass(frozen=True)
class _Settings:
    """What PEFT writes beside the weights: alphas, which kohya's files hold as tensors.

    alphas: of single layers, by their names or the ends of them.
    is_root: whether alpha is divided by the root of the rank.
    """

    alpha: float
    alphas: Mapping[str, float]
    is_root: bool

    @classmethod
    def of(cls, found: Mapping[str, Any], path: Path) -> _Settings:
        """Return the settings in PEFT's names.

        Raises:
            BrokenWeightsError: they are not what they should be.
        """
        try:
            alphas = {str(k): float(v) for k, v in (found.get("alpha_pattern") or {}).items()}
            alpha = float(found["lora_alpha"])
            if not all(map(math.isfinite, (alpha, *alphas.values()))):
                raise ValueError("an alpha that is not finite")
        except LOADING_FAILURES as error:
            raise _odd_settings(path) from error
        return cls(alpha, alphas, bool(found.get("use_rslora")))

    def scale(self, layer: str, rank: int) -> float:
        """Return by what the product of a layer is multiplied."""
        own = (each for end, each in self.alphas.items() if f".{layer}".endswith(f".{end}"))
        return next(own, self.alpha) / (math.sqrt(rank) if self.is_root else rank)


@dataclass(frozen=True)
class _Change:
    """What a file has for one parameter of a network."""

    path: Path
    weight: float
    layer: str
    parts: Mapping[str, StoredTensor]
    settings: _Settings | None

    def fits(self, shape: Sequence[int]) -> bool:
        """Tell from shapes alone whether this changes a parameter of that shape."""
        empty = {n: torch.empty(each.shape, device="meta") for n, each in self.parts.items()}
        base = torch.empty(tuple(shape), device="meta")
        try:
            changes = [_like(change, shape) for change, _ in _all_changes(empty, base)]
            _decomposed(base, empty)
        except LOADING_FAILURES:
            return False
        return bool(changes) and ("alpha" not in empty or empty["alpha"].numel() == 1)

    def apply(self, base: Tensor) -> Tensor:
        """Return a parameter with this added, in float32."""
        parts = {name: self._read(name) for name in self.parts}
        base = base.float()
        is_decomposed = bool({"magnitude", "dora_scale"} & parts.keys())
        merged = base
        for change, rank in _all_changes(parts, base):
            factor = self._scale(parts, rank) * (1.0 if is_decomposed else self.weight)
            merged = merged + _like(change, base.shape) * factor
        if is_decomposed:
            merged = base + self.weight * (_decomposed(merged, parts) - base)
        return merged

    def _scale(self, parts: Mapping[str, Tensor], rank: int) -> float:
        if not rank:
            return 1.0
        if "alpha" in parts:
            return float(parts["alpha"].item()) / rank
        return 1.0 if self.settings is None else self.settings.scale(self.layer, rank)

    def _read(self, name: str) -> Tensor:
        values = self.parts[name].read().float()
        if not torch.isfinite(values).all():
            raise BrokenWeightsError(
                f"{self.path} holds numbers that are not finite, in {self.layer}; get it again, "
                f"or leave it out."
            )
        return values


@dataclass(frozen=True)
class Loras:
    """LoRAs that were found to fit a model, in their order; nothing of them is read yet.

    changes: by network, and by parameter in it.
    words: embeddings that come in the files of LoRAs, as (file, word, vectors).
    warnings: what of the files is not used.
    """

    changes: Mapping[str, Mapping[str, Sequence[_Change]]]
    words: tuple[tuple[Path, str, StoredTensor], ...] = ()
    warnings: tuple[str, ...] = ()

    def merge(self, network: str, name: str, weight: Tensor, dtype: torch.dtype) -> Tensor:
        """Return a parameter with the LoRAs merged, in float32 if they change it.

        Args:
            network: its folder, ``unet`` or ``text_encoder``; others are not changed.
            name: of the parameter.
            weight: its values.
            dtype: the precision that it will run in, in which it must stay finite.

        Raises:
            BrokenWeightsError: a LoRA holds numbers that are not finite, or is too strong.
        """
        changes = self.changes.get(network, {}).get(name.removeprefix("text_model."), ())
        for change in changes:
            weight = change.apply(weight)
            if not torch.isfinite(weight.to(dtype)).all():
                raise BrokenWeightsError(
                    f"{change.path} with weight {change.weight:g} takes {change.layer} beyond the "
                    f"numbers of {str(dtype).removeprefix('torch.')}; give it a smaller weight or "
                    f"a precision with a wider range."
                )
        return weight


def open_loras(loras: Sequence[tuple[str, float]], networks: Mapping[str, Shapes]) -> Loras:
    """Find out what LoRAs, given as (file or hub id, weight), change in a model.

    Args:
        loras: in the order in which they are merged. A weight of 0 changes nothing.
        networks: the shapes of parameters, by network and name.

    Raises:
        MissingWeightsError: a file is not there.
        BrokenWeightsError: a file is damaged, no LoRA, or for another family.
    """
    targets = [_Target.of(network, shapes) for network, shapes in networks.items()]
    changes: dict[str, dict[str, list[_Change]]] = {each.network: {} for each in targets}
    words: list[tuple[Path, str, StoredTensor]] = []
    warnings: list[str] = []
    for reference, weight in loras:
        path = lora_file(reference)
        refuse_gguf(path)
        tensors = open_tensors(path)
        bundled = {name: found[1] for name in tensors if (found := _BUNDLED_WORD.match(name))}
        words += [(path, word, tensors[name]) for name, word in bundled.items()]
        unused = tensors.keys() - bundled.keys()
        fits = False
        for target, parameter, names, change in _changes_of(path, weight, tensors, targets):
            unused, fits = unused - names, True
            if weight:
                changes[target.network].setdefault(parameter, []).append(change)
        _refuse_what_does_not_fit(path, tensors, fits=fits)
        if unused:
            warnings.append(
                f"{len(unused)} of the {len(tensors)} tensors in {path.name} are not used, such as "
                f"{' and '.join(sorted(unused)[:2])}: they fit no layer of this model, or are of a "
                f"kind that is not read."
            )
    return Loras(changes, tuple(words), tuple(warnings))


def lora_file(reference: str) -> Path:
    """Return the file of a LoRA, downloaded if it is given by a hub id.

    Raises:
        MissingWeightsError: it is not there.
    """
    if is_weights_file(reference) or not is_hub_id(reference):
        return existing_file(reference)
    folder = find_or_fetch(HubRepository(reference, (LORA_FILE,)))
    return next(path for name in formats(LORA_FILE) if (path := folder / name).is_file())


@dataclass(frozen=True)
class _Target:
    """A network with the shapes of its parameters, and its layers by all of their names."""

    network: str
    shapes: Shapes
    layers: Mapping[str, str]

    @classmethod
    def of(cls, network: str, shapes: Shapes) -> _Target:
        """Return the target for a network with these parameters."""
        own = {name.removeprefix("text_model."): shape for name, shape in shapes.items()}
        return cls(network, own, layers_by_name(network, own))


def _changes_of(
    path: Path, weight: float, tensors: Mapping[str, StoredTensor], targets: Sequence[_Target]
) -> Iterator[tuple[_Target, str, set[str], _Change]]:
    """Yield the changes in a file that fit: of what, and the names of their tensors."""
    layers: dict[str, dict[str, str]] = {}
    for name in tensors:
        layer, part = split_name(name)
        if part:
            layers.setdefault(layer, {})[part] = name
    settings = _settings_of(path)
    for name, names in layers.items():
        bias = {"diff": names.pop("diff_b")} if "diff_b" in names else {}
        if "ia3_l" in names and tensors[names["ia3_l"]].shape[1] == 1:  # outputs, so biases too
            bias["ia3_l"] = names["ia3_l"]
        if "on_input" not in names:  # whole weights, which are not read
            names.pop("ia3", None)
        for kind, parts in (("weight", names), ("bias", bias)):
            stored = {part: tensors[each] for part, each in parts.items()}
            for target, layer in _find_layer(name, targets):
                change = _Change(path, weight, layer, stored, settings.get(target.network))
                shape = target.shapes.get(f"{layer}.{kind}")
                if shape is not None and change.fits(shape):
                    yield target, f"{layer}.{kind}", set(parts.values()), change


def _find_layer(name: str, targets: Sequence[_Target]) -> Iterator[tuple[_Target, str]]:
    networks, layer = find_layer_name(name)
    for target in targets:
        if target.network in networks and layer in target.layers:
            yield target, target.layers[layer]


def _settings_of(path: Path) -> Mapping[str, _Settings]:
    """Return what PEFT or diffusers wrote of alphas, by network.

    Raises:
        BrokenWeightsError: it cannot be read.
    """
    beside = path.parent / "adapter_config.json"
    if path.stem == "adapter_model" and beside.is_file():
        own = read_json(beside)
        if own.get("peft_type") == "IA3":  # it has no alpha
            return {}
        return {network: _Settings.of(own, path) for network in (UNET, TEXT)}
    remark = read_metadata(path).get("lora_adapter_metadata")
    if remark is None:
        return {}
    try:
        content = json.loads(remark)
        given = {
            network: {
                key.removeprefix(f"{network}."): content[key]
                for key in content
                if key.startswith(f"{network}.")
            }
            for network in (UNET, TEXT)
        }
    except LOADING_FAILURES as error:
        raise _odd_settings(path) from error
    return {network: _Settings.of(own, path) for network, own in given.items() if own}


def _odd_settings(path: Path) -> BrokenWeightsError:
    return BrokenWeightsError(f"The settings that belong to {path} cannot be read; get it again.")


def _refuse_what_does_not_fit(
    path: Path, tensors: Mapping[str, StoredTensor], *, fits: bool
) -> None:
    """Make sure that a file is a LoRA for this model; some layers of other families fit, too.

    Raises:
        BrokenWeightsError: it is not.
    """
    identity = identify({name: each.shape for name, each in tensors.items()}, path)
    if not fits or (identity.kind == LORA and not identity.may_be_sd15):
        refuse_other(path, identity, "a LoRA", (LORA,))
    unread = next((kind for mark, kind in _UNREAD.items() if any(mark in n for n in tensors)), None)
    if not fits and unread is not None:
        raise BrokenWeightsError(
            f"{path} is {unread}, a kind that tegula does not read; give a LoRA, LoHa, LoKr, "
            f"GLoRA, OFT of kohya's or LyCORIS' making, (IA)3 or DoRA for {SD15}."
        )
    if not fits:
        raise BrokenWeightsError(
            f"{path} is not a LoRA for {SD15}: none of its {len(tensors)} tensors, such as "
            f"{min(tensors)}, fits a layer of this model; give one made for it."
        )
