"""What nets take, by the size of what they see: FLOPs and memory, counted by torch.

Each net runs once on three tiny areas, and a parabola goes through the three counts:
convolutions grow with the area, attention with its square, and what is done once a row
does not grow. FLOPs are two for a multiply-add.

torch.utils.flop_counter counts FLOPs alone and hooks the modules of every thread; what is
alive at once has to be counted as well, so its table of formulas is used by a mode of our
own that does both.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from tegula.models.bundle import Bundle, ControlImage, ControlScale, SplitDenoiser, WindowBatch
from tegula.models.prescalers import Prescaler
from tegula.models.prescalers.networks import RRDBNet, SRVGGNetCompact, layers_with_sizes

T = TypeVar("T")
_AREAS = ((1, 1), (1, 2), (2, 2))


@dataclass(frozen=True)
class Cost:
    """A count that depends on pixels: ``fixed + linear * pixels + quadratic * pixels**2``."""

    fixed: float = 0.0
    linear: float = 0.0
    quadratic: float = 0.0

    def of(self, pixels: float) -> float:
        """Return the count for an area."""
        return self.fixed + pixels * (self.linear + pixels * self.quadratic)


@dataclass(frozen=True)
class NetCost:
    """FLOPs, and bytes that are alive at once beside the input and the weights."""

    flops: Cost = Cost()
    memory: Cost = Cost()


@dataclass(frozen=True)
class BundleCost:
    """What the nets of a bundle take, by image pixels.

    denoiser: one row of a batch. second_half: of the denoiser, where it has two.
    control: embedding one control window. embedded: bytes of the result, which is kept.
    encode, decode: one picture through the autoencoder.
    """

    denoiser: NetCost
    control: NetCost
    encode: NetCost
    decode: NetCost
    embedded: Cost = Cost()
    second_half: NetCost | None = None


def bundle_cost(bundle: Bundle) -> BundleCost:
    """Count what the nets of a bundle take, which costs a tenth of the work of a window."""
    side = bundle.facts.window_multiple
    shapes = [(side * down, side * across) for down, across in _AREAS]
    # The plain nets: compiled ones would be compiled for the shapes that are counted.
    plain = replace(
        bundle,
        denoiser=bundle.denoiser.to_dtype(bundle.dtype),
        autoencoder=bundle.autoencoder.to_dtype(bundle.dtype),
    )
    counts = [_counts(plain, *shape) for shape in shapes]
    pixels = [height * width for height, width in shapes]

    def fitted(net: str) -> NetCost:
        flops, memory = zip(*(count[net] for count in counts), strict=True)
        return NetCost(_parabola(pixels, flops), _line(pixels, memory))

    return BundleCost(
        fitted("denoiser"),
        fitted("control"),
        fitted("encode"),
        fitted("decode"),
        fitted("embedded").memory,
        fitted("second_half") if "second_half" in counts[0] else None,
    )


def prescaler_flops(prescaler: Prescaler) -> Mapping[int | None, Cost]:
    """Count the FLOPs of a prescaler by source pixels, for the factor of each of its heads."""
    heads = (prescaler, prescaler.smaller) if prescaler.smaller else (prescaler,)
    return {head.facts.factor: _head_flops(head) for head in heads}


def _head_flops(prescaler: Prescaler) -> Cost:
    if prescaler.network is None:
        return Cost()
    weights = (
        weight.numel() * size
        for layer, size in layers_with_sizes(prescaler.network)
        for weight in layer.parameters(recurse=False)
        if weight.ndim > 1
    )
    return Cost(linear=2 * sum(weights))


def prescaler_memory(prescaler: Prescaler, tile: int) -> Cost:
    """Count the bytes of a prescaler by source pixels, in tiles of this side.

    Nothing is computed: its weights and the picture are of shapes alone.
    """
    network = prescaler.network
    if not isinstance(network, RRDBNet | SRVGGNetCompact):
        return Cost()
    # torch takes a second to get ready for weights that are not there.
    weights = {
        name: torch.empty_like(tensor, device="meta")
        for name, tensor in network.state_dict().items()
    }
    picture = torch.empty(1, 3, tile, tile, device="meta")
    _, memory = _counted(lambda: functional_call(network, weights, (picture,)))[1]
    return Cost(linear=memory / tile**2)


def _counts(bundle: Bundle, height: int, width: int) -> Mapping[str, tuple[int, int]]:
    """Return FLOPs and peak bytes of each net on an area."""
    device = bundle.device
    # Compiled and converted denoisers hand out the plain one, whose work is the same.
    denoiser = bundle.denoiser.to_dtype(bundle.dtype)
    picture = torch.zeros(1, 3, height, width, device=device)
    control = ControlImage(picture, picture)
    latents, encode = _counted(
        lambda: bundle.autoencoder.encode(picture, control, torch.Generator())
    )
    _, decode = _counted(lambda: bundle.autoencoder.decode(latents, control))
    embedded, embedding = _counted(lambda: denoiser.embed_control(control))
    text, timestep = bundle.text.encode([""]), torch.tensor(1, device=device)
    scale = ControlScale(1.0)
    batch = WindowBatch(latents, timestep, text, embedded, scale, slice(0, 1))
    counts = {
        "encode": encode,
        "decode": decode,
        "control": embedding,
        "embedded": (0, embedded.numel() * embedded.element_size()),
        "denoiser": _counted(lambda: denoiser(batch))[1],
    }
    if isinstance(denoiser, SplitDenoiser):
        features = denoiser.encode(batch)
        counts["second_half"] = _counted(lambda: denoiser.decode(features, timestep, text))[1]
    return counts


def _counted(run: Callable[[], T]) -> tuple[T, tuple[int, int]]:
    with torch.no_grad(), Counter() as counter:
        result = run()
    return result, (counter.flops, counter.peak)


def _attention_on_cpu(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> int:
    rows = math.prod(query.shape[:-1])
    return 2 * rows * key.shape[-2] * (key.shape[-1] + value.shape[-1])


_FORMULAS: Mapping[Any, Callable[..., int]] = {
    **flop_registry,
    # torch's own table lacks it.
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_on_cpu,
}


_WHOLE = {
    # It exists in Python alone, and raises when it is asked for its parts.
    torch.ops.prim.device.default,
    # They multiply nothing, and torch imports its symbolic shapes to take them apart.
    torch.ops.aten.upsample_nearest2d.default,
    torch.ops.aten.upsample_nearest2d.vec,
}
"""Operations that are not taken apart; those that have no parts are added when they are met."""


class Counter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts FLOPs, and the bytes of tensors made inside that are alive at once.

    What kernels allocate and free within one operation is not seen.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.flops = 0
        self.now = 0
        self.peak = 0
        self._known: dict[int, object] = {}

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Keep torch from importing its compiler only to tell it to stay away."""
        return False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run an operation, in its parts where it has some, and count."""
        named = kwargs or {}
        formula = _FORMULAS.get(func._overloadpacket)
        if formula is None and func not in _WHOLE:
            with self:
                whole = func.decompose(*args, **named)
            if whole is not NotImplemented:
                return whole
            _WHOLE.add(func)
        given = {_address(tensor) for tensor in _tensors((args, tuple(named.values())))}
        result = func(*args, **named)
        if formula is not None:
            self.flops += formula(*args, **named, out_val=result)
        for tensor in _tensors(result):
            if _address(tensor) not in given and _address(tensor) not in self._known:
                self._add(tensor.untyped_storage())
        self.peak = max(self.peak, self.now)
        return result

    def _add(self, storage: Any) -> None:
        address, size = storage._cdata, storage.nbytes()
        self.now += size
        self._known[address] = weakref.finalize(storage, self._remove, address, size)

    def _remove(self, address: int, size: int) -> None:
        self._known.pop(address, None)
        self.now -= size


def _tensors(values: Any) -> Iterator[Tensor]:
    """Yield the tensors in what an operation takes or returns; torch's own walk takes ten times."""
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, tuple | list):
        for value in values:
            yield from _tensors(value)


def _address(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _parabola(pixels: Sequence[int], counts: Sequence[int]) -> Cost:
    powers = np.vander(np.asarray(pixels, np.float64), 3, increasing=True)
    return Cost(*(float(part) for part in np.linalg.solve(powers, np.asarray(counts, np.float64))))


def _line(pixels: Sequence[int], counts: Sequence[int]) -> Cost:
    """Go through the first and the last: peaks may lie elsewhere in between."""
    slope = (counts[-1] - counts[0]) / (pixels[-1] - pixels[0])
    return Cost(counts[0] - slope * pixels[0], slope)
