"""Tensors where they lie in files: found without being read.

So a network takes them one by one in the precision it runs in. safetensors files tell by their
header where each one is; pickled files are taken apart by an unpickler that knows tensors and
plain data and puts an empty stub in the place of everything else, so that none of them runs code.
"""

from __future__ import annotations

import math
import pickle
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError
from torch import Tensor

from tegula.errors import BrokenWeightsError
from tegula.models.headers import check_pickled, read_header

LOADING_FAILURES = (
    OSError,
    ValueError,
    RuntimeError,
    LookupError,
    AttributeError,
    TypeError,
    EOFError,
    SafetensorError,
    pickle.UnpicklingError,
    zipfile.BadZipFile,
)
"""What torch, diffusers and transformers raise on weights that they cannot use."""

_LENGTH_BYTES = 8
DEEPEST_WRAPPER = 3
"""Wrappers inside wrappers that are opened; a pickled one may contain itself."""


@dataclass
class _Storage:
    """Where a run of numbers lies in a file; ``position`` is known once all of it is read."""

    path: Path
    key: str
    dtype: torch.dtype
    position: int = 0


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file, not read yet.

    offset, stride: in elements of the storage, as torch counts them.
    """

    storage: _Storage = field(repr=False)
    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int = 0

    def read(self) -> Tensor:
        """Return the tensor, in memory of its own.

        Raises:
            BrokenWeightsError: the file ends before it.
        """
        path, size = self.storage.path, self.dtype.itemsize
        reach = sum((n - 1) * step for n, step in zip(self.shape, self.stride, strict=True))
        count = 0 if 0 in self.shape else 1 + reach
        start = self.storage.position + self.offset * size
        if min((0, self.offset, *self.shape, *self.stride)) < 0 or (
            start + count * size > path.stat().st_size
        ):
            raise _damaged(path)
        data = torch.empty(count * size, dtype=torch.uint8)
        with path.open("rb") as stream:
            stream.seek(start)
            stream.readinto(data.numpy().data)
        values = data.view(self.dtype) if count else torch.empty(0, dtype=self.dtype)
        return values.as_strided(self.shape, self.stride)


_SAFETENSORS_TYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


def open_safetensors(path: Path) -> tuple[Mapping[str, StoredTensor], Mapping[str, str]]:
    """Return the tensors of a safetensors file and its remarks, from its header.

    Raises:
        BrokenWeightsError: as ``read_header`` says.
    """
    entries, metadata = read_header(path)
    tensors = {}
    for name, entry in entries.items():
        dtype = _SAFETENSORS_TYPES[entry.type]
        storage = _Storage(path, name, dtype, entry.first)
        tensors[name] = StoredTensor(storage, dtype, entry.shape, _dense(entry.shape))
    return tensors, metadata


def _dense(shape: Sequence[int]) -> tuple[int, ...]:
    """Return the strides of a tensor without gaps."""
    return tuple(math.prod(shape[at + 1 :]) for at in range(len(shape)))


# Pickled files: what torch.save writes, taken apart without running any of it.


class _Stub(dict[Any, Any]):
    """Stands in for every object that is neither a tensor nor plain data, and does nothing."""

    def __new__(cls, *_: object, **__: object) -> _Stub:
        return super().__new__(cls)

    def __init__(self, *_: object, **__: object) -> None:
        super().__init__()
        self.state: object = None

    def __call__(self, *_: object, **__: object) -> _Stub:
        return _Stub()

    def __setstate__(self, state: object) -> None:
        self.state = state

    def __hash__(self) -> int:  # type: ignore[override]
        # Dictionaries have no hash, and a file may use the object as a key or put it into a set.
        return id(self)

    def append(self, _: object) -> None:
        """Take an item of a list that is none here."""

    def extend(self, _: object) -> None:
        """Take items of a list that is none here."""

    def add(self, _: object) -> None:
        """Take an item of a set that is none here."""


class _PlainDict(dict[Any, Any]):
    """An ordered dictionary of torch, whose notes on versions are left out."""

    def __setstate__(self, _: object) -> None:
        pass


def _tensor_of(
    storage: _Storage, offset: int, shape: tuple[int, ...], stride: tuple[int, ...], *rest: Any
) -> StoredTensor:
    dtype = next((each for each in rest if isinstance(each, torch.dtype)), storage.dtype)
    return StoredTensor(storage, dtype, tuple(shape), tuple(stride), offset)


def _first(value: Any, *_: object) -> Any:
    return value


_KNOWN = {
    "collections.OrderedDict": _PlainDict,
    "torch._utils._rebuild_tensor": _tensor_of,
    "torch._utils._rebuild_tensor_v2": _tensor_of,
    "torch._utils._rebuild_tensor_v3": _tensor_of,
    "torch._utils._rebuild_parameter": _first,
    "torch._utils._rebuild_parameter_with_state": _first,
    "torch.storage.UntypedStorage": torch.uint8,
    "torch.UntypedStorage": torch.uint8,
    "torch.DoubleStorage": torch.float64,
    "torch.FloatStorage": torch.float32,
    "torch.HalfStorage": torch.float16,
    "torch.BFloat16Storage": torch.bfloat16,
    "torch.LongStorage": torch.int64,
    "torch.IntStorage": torch.int32,
    "torch.ShortStorage": torch.int16,
    "torch.CharStorage": torch.int8,
    "torch.ByteStorage": torch.uint8,
    "torch.BoolStorage": torch.bool,
}


class _Unpickler(pickle.Unpickler):
    """Builds tensors and plain data; every other name in the file stands for a stub."""

    def __init__(self, path: Path, stream: BinaryIO) -> None:
        super().__init__(stream)
        self.path = path
        self.storages: dict[str, _Storage] = {}

    def find_class(self, module: str, name: str) -> Any:
        """Return what a name in the file stands for."""
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        return _KNOWN.get(f"{module}.{name}", _Stub)

    def persistent_load(self, pid: Any) -> _Storage:
        """Return a storage by what torch writes in its place."""
        _kind, dtype, key, *_ = pid
        if not isinstance(dtype, torch.dtype):
            raise pickle.UnpicklingError("a storage of unknown type")
        return self.storages.setdefault(str(key), _Storage(self.path, str(key), dtype))


def open_pickled(path: Path) -> Any:
    """Return what a file of ``torch.save`` holds, tensors as ``StoredTensor``.

    Modules have become their tensors by name, and other objects None.

    Raises:
        BrokenWeightsError: it is damaged, or no such file.
    """
    check_pickled(path)
    try:
        with path.open("rb") as stream:
            is_zip = zipfile.is_zipfile(path)
            content = _open_zip(path, stream) if is_zip else _open_legacy(path, stream)
    except (*LOADING_FAILURES, RecursionError, MemoryError) as error:
        raise _damaged(path) from error
    return _plain(content)


_ZIP_HEADER_BYTES = 30
"""Bytes of a zip entry's header, before its name; it ends with the lengths of name and extra."""


def _open_zip(path: Path, stream: BinaryIO) -> Any:
    with zipfile.ZipFile(stream) as archive:
        entries = {entry.filename: entry for entry in archive.infolist()}
        main = next(name for name in entries if name.rpartition("/")[2] == "data.pkl")
        folder = main.removesuffix("data.pkl") + "data/"
        with archive.open(main) as pickled:
            unpickler = _Unpickler(path, pickled)  # type: ignore[arg-type]
            content = unpickler.load()
    for storage in unpickler.storages.values():
        entry = entries[folder + storage.key]
        if entry.compress_type != zipfile.ZIP_STORED:
            raise ValueError("a compressed storage")
        stream.seek(entry.header_offset)
        header = stream.read(_ZIP_HEADER_BYTES)
        lengths = (int.from_bytes(header[at : at + 2], "little") for at in (26, 28))
        storage.position = entry.header_offset + _ZIP_HEADER_BYTES + sum(lengths)
    return content


_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C


def _open_legacy(path: Path, stream: BinaryIO) -> Any:
    """Open what torch wrote before 1.6: five pickles, then storages, each behind its length."""
    if _Unpickler(path, stream).load() != _LEGACY_MAGIC:
        raise ValueError("no file of torch")
    for _ in ("protocol", "machine"):
        _Unpickler(path, stream).load()
    unpickler = _Unpickler(path, stream)
    content = unpickler.load()
    for key in _Unpickler(path, stream).load():
        count = int.from_bytes(stream.read(_LENGTH_BYTES), "little", signed=True)
        storage = unpickler.storages[str(key)]
        storage.position = stream.tell()
        stream.seek(max(0, count) * storage.dtype.itemsize, 1)
    return content


def _plain(content: Any, depth: int = DEEPEST_WRAPPER) -> Any:
    """Replace modules by their tensors and other objects by nothing, as deep as wrappers go."""
    if isinstance(content, _Stub):
        if not isinstance(content.state, Mapping) or "_parameters" not in content.state:
            return content if content else None
        return dict(_tensors_of_module(content.state))
    if isinstance(content, Mapping) and depth:
        for name, value in list(content.items()):
            content[name] = _plain(value, depth - 1)  # type: ignore[index]
    return content


def _tensors_of_module(state: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for kind in ("_parameters", "_buffers"):
        for name, value in (state.get(kind) or {}).items():
            if isinstance(value, StoredTensor):
                yield prefix + name, value
    for name, module in (state.get("_modules") or {}).items():
        inner = getattr(module, "state", None)
        if isinstance(inner, Mapping):
            yield from _tensors_of_module(inner, f"{prefix}{name}.")


def _damaged(path: Path) -> BrokenWeightsError:
    return BrokenWeightsError(f"{path} is damaged, or no file of weights; get it again.")
