"""What the parts that a LoRA file has for a layer make of the layer's weight.

Formulas are those of LyCORIS (arXiv:2309.14859), DoRA (arXiv:2402.09353) and others named below, as
AUTOMATIC1111's web UI and ComfyUI read them. All are computed in float32.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor


def changes(parts: Mapping[str, Tensor], base: Tensor) -> Iterator[tuple[Tensor, int]]:
    """Yield each change of a weight in a layer with its rank, 0 where alpha does not scale it.

    Args:
        parts: of the layer, by what they are; on the device "meta" shapes alone are computed.
        base: the weight.

    Raises:
        LookupError, RuntimeError, ValueError: a part is missing, or parts do not fit.
    """
    yield from _changes_alone(parts)
    yield from _changes_by_base(parts, base)


def _changes_alone(parts: Mapping[str, Tensor]) -> Iterator[tuple[Tensor, int]]:
    """Yield each change that does not depend on the weight."""
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


def _changes_by_base(parts: Mapping[str, Tensor], base: Tensor) -> Iterator[tuple[Tensor, int]]:
    """Yield each change that depends on the weight.

    (IA)3 (arXiv:2205.05638) scales inputs or outputs, GLoRA (arXiv:2306.07967) is a low-rank
    function of the weight, and OFT (arXiv:2306.07280) turns blocks of outputs by Cayley's
    transform of what is stored, as kohya's trainer and LyCORIS write it.
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


def shaped_like(change: Tensor, shape: Sequence[int]) -> Tensor:
    """Return a change in the shape of its weight: linear layers may be written as convolutions.

    Raises:
        ValueError: it is a change of another layer.
    """
    if change.numel() != torch.Size(shape).numel() or len(change) != shape[0]:
        raise ValueError(f"the shape {tuple(change.shape)} in place of {tuple(shape)}")
    return change.reshape(shape)


def decomposed(merged: Tensor, parts: Mapping[str, Tensor]) -> Tensor:
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
