"""A card that is not there: tensors that say they lie on it, and what went there and back.

The numbers lie on the host all the same, so results can be compared. An operation on tensors of
both places fails, as it would on a card.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

CARD = torch.device("meta")
"""The one other device that every build of torch knows."""
_HOST = torch.device("cpu")
_COPIES = (torch.ops.aten.to, torch.ops.aten._to_copy, torch.ops.aten.copy_)


class OnCard(Tensor):
    """A tensor whose numbers are in ``host``."""

    host: Tensor

    @staticmethod
    def __new__(cls, host: Tensor) -> OnCard:
        made: OnCard = Tensor._make_wrapper_subclass(
            cls, host.shape, host.stride(), host.storage_offset(), dtype=host.dtype, device=CARD
        )
        return made

    def __init__(self, host: Tensor) -> None:
        self.host = host

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, function: Any, types: Any, given: Any = (), named: Any = None
    ) -> Any:
        raise AssertionError(f"{function} ran outside of the card")


@dataclass
class Traffic:
    """Shapes of what was copied to the card, and from it."""

    there: list[tuple[int, ...]] = field(default_factory=list)
    back: list[tuple[int, ...]] = field(default_factory=list)


class _Card(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self, traffic: Traffic) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.traffic = traffic

    def __torch_dispatch__(
        self, function: Any, types: Any, given: Any = (), named: Any = None
    ) -> Any:
        named = dict(named or {})
        tensors = [each for each in tree_flatten((given, named))[0] if isinstance(each, Tensor)]
        there = [each for each in tensors if isinstance(each, OnCard)]
        wanted = named.get("device")
        if wanted is None and function.overloadpacket is torch.ops.aten.to:
            wanted = next((each for each in given if isinstance(each, torch.device)), None)
        goes_there = bool(there) if wanted is None else torch.device(wanted).type == CARD.type
        if function.overloadpacket in _COPIES:
            source, target = given[0], goes_there
            if function.overloadpacket is torch.ops.aten.copy_:
                source, target = given[1], isinstance(given[0], OnCard)
            if target != isinstance(source, OnCard):
                (self.traffic.there if target else self.traffic.back).append(tuple(source.shape))
        elif there:
            strange = [each for each in tensors if not isinstance(each, OnCard) and each.ndim]
            assert not strange, f"{function} of tensors on the card and on the host"
        if wanted is not None and goes_there:
            named = {name: _HOST if name == "device" else each for name, each in named.items()}
            given = [_HOST if isinstance(each, torch.device) else each for each in given]
        plain = tree_map(_on_host, (given, named))
        result = function(*plain[0], **plain[1])
        for own, each in zip(given, plain[0], strict=True):
            if result is each and isinstance(own, OnCard) == goes_there:
                return own
        return tree_map(_on_card, result) if goes_there else result


def _on_host(value: Any) -> Any:
    return value.host if isinstance(value, OnCard) else value


def _on_card(value: Any) -> Any:
    return OnCard(value) if isinstance(value, Tensor) else value


@contextmanager
def card() -> Iterator[Traffic]:
    """Let tensors lie on a card, and count what travels."""
    traffic = Traffic()
    with _Card(traffic):
        yield traffic
