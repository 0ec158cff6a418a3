"""LoRAs: changes of weights, merged layer by layer while the networks are loaded.

Every layer is computed in float32 with its own rank and alpha, and rounded once into the precision
that the network runs in; ``lora_formulas.py`` has the arithmetic.

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
from tegula.models.retry import is_finite
from tegula.models.sd15.lora_formulas import changes, decomposed, shaped_like
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
            found = [shaped_like(change, shape) for change, _ in changes(empty, base)]
            decomposed(base, empty)
        except LOADING_FAILURES:
            return False
        return bool(found) and ("alpha" not in empty or empty["alpha"].numel() == 1)

    def apply(self, base: Tensor) -> Tensor:
        """Return a parameter with this added, in float32."""
        parts = {name: self._read(name) for name in self.parts}
        base = base.float()
        is_decomposed = bool({"magnitude", "dora_scale"} & parts.keys())
        merged = base
        for change, rank in changes(parts, base):
            factor = self._scale(parts, rank) * (1.0 if is_decomposed else self.weight)
            # In place, and rounded twice as a sum of the two is: torch.add with alpha rounds once.
            merged = (shaped_like(change, base.shape) * factor).add_(merged)
        if is_decomposed:
            merged = base + self.weight * (decomposed(merged, parts) - base)
        return merged

    def _scale(self, parts: Mapping[str, Tensor], rank: int) -> float:
        if not rank:
            return 1.0
        if "alpha" in parts:
            return float(parts["alpha"].item()) / rank
        return 1.0 if self.settings is None else self.settings.scale(self.layer, rank)

    def _read(self, name: str) -> Tensor:
        values = self.parts[name].read().float()
        if not is_finite(values):
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
            if not is_finite(weight, dtype=dtype):
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
