"""What a file of weights is by its first bytes, looked at before torch is imported to read it.

Importing torch and diffusers takes seconds of a processor, so what can be refused is refused
first: every file that is named is looked at here, whatever names it.
"""

from __future__ import annotations

import json
import math
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tegula.errors import BrokenWeightsError, MissingWeightsError
from tegula.models import DEFAULT_BUNDLE, BundleSettings
from tegula.models.hub import is_weights_file, what_is_there
from tegula.models.library import FileKind, resolve_file

_LENGTH_BYTES = 8
_LARGEST_HEADER = 100_000_000
_START_BYTES = 64
_PICKLE = b"\x80"
"""Begins what Python pickles since protocol 2, and so what torch wrote before version 1.6."""

ELEMENT_BYTES = {
    "F64": 8,
    "F32": 4,
    "F16": 2,
    "BF16": 2,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "I64": 8,
    "I32": 4,
    "I16": 2,
    "I8": 1,
    "U8": 1,
    "BOOL": 1,
}
"""Types of tensors in safetensors files, by the bytes of a number."""


@dataclass(frozen=True)
class HeaderEntry:
    """Where a tensor lies in a safetensors file; ``first`` counts from the file's start."""

    type: str
    shape: tuple[int, ...]
    first: int


def read_header(path: Path) -> tuple[Mapping[str, HeaderEntry], Mapping[str, str]]:
    """Read the header of a safetensors file, JSON behind its length in 8 bytes.

    The tensors follow it without gaps, so the last offset tells how long the file must be.

    Returns:
        The tensors by name, and the remarks.

    Raises:
        BrokenWeightsError: it is no safetensors file, or not all of one.
    """
    _refuse_other_content(path)
    try:
        with path.open("rb") as stream:
            length = int.from_bytes(stream.read(_LENGTH_BYTES), "little")
            if length > _LARGEST_HEADER:
                raise ValueError("header length")
            header: dict[str, Any] = json.loads(stream.read(length))
        metadata = {str(name): str(v) for name, v in header.pop("__metadata__", {}).items()}
        begin = end = _LENGTH_BYTES + length
        entries = {}
        for name, entry in header.items():
            shape = tuple(entry["shape"])
            first, last = entry["data_offsets"]
            if last - first != math.prod(shape) * ELEMENT_BYTES[entry["dtype"]]:
                raise ValueError("a tensor's size")
            entries[name] = HeaderEntry(entry["dtype"], shape, begin + first)
            end = max(end, begin + last)
        size = path.stat().st_size
    except (OSError, ValueError, LookupError, AttributeError, TypeError, RecursionError) as error:
        raise BrokenWeightsError(f"{path} is not a safetensors file; get it again.") from error
    if size != end:
        raise BrokenWeightsError(
            f"{path} has {size:,} bytes where its header promises {end:,}; get it again."
        )
    return entries, metadata


def check_pickled(path: Path) -> None:
    """Make sure that a file looks like one of ``torch.save``, without opening what is in it.

    Raises:
        BrokenWeightsError: it does not.
    """
    _refuse_other_content(path)
    try:
        with path.open("rb") as stream:
            start = stream.read(2)
        is_zip = start == b"PK"
        if not is_zip and start[:1] != _PICKLE:
            raise ValueError("no pickle")
        if is_zip:
            with zipfile.ZipFile(path) as archive:
                names = archive.namelist()
    except (OSError, ValueError, NotImplementedError, zipfile.BadZipFile) as error:
        raise BrokenWeightsError(
            f"{path} is damaged, or no file of weights; get it again."
        ) from error
    if is_zip and not any(name.rpartition("/")[2] == "data.pkl" for name in names):
        raise BrokenWeightsError(f"{path} is a zip archive without weights; give the file in it.")


def refuse_gguf(path: Path) -> None:
    """Make sure that a file is not of the GGUF format, which is for quantised transformers.

    Raises:
        BrokenWeightsError: it is.
    """
    if _start(path).startswith(b"GGUF") or path.suffix.lower() == ".gguf":
        raise BrokenWeightsError(
            f"{path} is a GGUF file, a format that tegula does not read; give the .safetensors "
            f"file of the same model."
        )


def _start(path: Path) -> bytes:
    try:
        with path.open("rb") as stream:
            return stream.read(_START_BYTES)
    except OSError:
        return b""


def _refuse_other_content(path: Path) -> None:
    """Name what people have in place of weights.

    Raises:
        BrokenWeightsError: the file is such a thing.
    """
    start, is_safetensors = _start(path), path.suffix.lower() == ".safetensors"
    text = start.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    what = None
    if not start:
        what = "an empty file"
    elif text.startswith((b"<!doctype", b"<html", b"<?xml", b"<head")):
        what = "a web page"
    elif text.startswith(b"version https://git-lfs"):
        what = "a pointer of Git LFS to the file"
    elif start.startswith((b"\x89PNG", b"\xff\xd8\xff", b"GIF8")):
        what = "a picture"
    elif start.startswith(b"PK") and is_safetensors:
        what = "a zip archive"
    if what is not None:
        noun = "a safetensors file" if is_safetensors else "a file of weights"
        raise BrokenWeightsError(f"{path} is {what}, not {noun}; get it again.")


# What is named when a model is loaded.

_NOUNS: Mapping[FileKind, str] = {
    FileKind.CHECKPOINT: "model",
    FileKind.CONTROLNET: "ControlNet",
    FileKind.VAE: "autoencoder",
    FileKind.LORA: "LoRA",
    FileKind.EMBEDDING: "embedding",
    FileKind.PRESCALER: "prescaler",
}
_SINGLE_FILES = (FileKind.LORA, FileKind.EMBEDDING)
"""Kinds that are never a folder."""


def check_files(wanted: BundleSettings) -> None:
    """Look at the files that a bundle and its parts are given by.

    What is no file on this machine is left alone: a hub id, the name of a bundle, or a path, whose
    absence is reported by what looks it up.

    Raises:
        BrokenWeightsError: a file holds no weights.
        MissingWeightsError: a folder stands where a file is wanted.
    """
    # No file is looked for under the name of the packaged bundle.
    bundle = None if wanted.bundle == DEFAULT_BUNDLE else wanted.bundle
    for reference, kind in (
        (bundle, FileKind.CHECKPOINT),
        (wanted.controlnet, FileKind.CONTROLNET),
        (wanted.vae, FileKind.VAE),
        (None if wanted.few_step in ("auto", "none") else wanted.few_step, FileKind.LORA),
        *((lora, FileKind.LORA) for lora, _ in wanted.loras),
        *((embedding, FileKind.EMBEDDING) for embedding in wanted.embeddings),
    ):
        if reference is not None:
            check_file(reference, kind)


def check_file(reference: str, kind: FileKind) -> None:
    """Look at a file that is given by its path or its name.

    Raises:
        BrokenWeightsError: it holds no weights.
        MissingWeightsError: it is a folder, and this kind is a file.
    """
    path = Path(reference).expanduser()
    if not path.exists():
        path = Path(resolve_file(reference, kind))
    noun = _NOUNS[kind]
    if path.is_dir() and kind in _SINGLE_FILES:
        raise MissingWeightsError(f"{path} is a folder, not a {noun} file; give the file in it.")
    if not path.is_file() or (kind == FileKind.PRESCALER and not is_weights_file(reference)):
        return
    if not is_weights_file(str(path)):
        raise BrokenWeightsError(
            f"{path} is {what_is_there(path)}, not {'an' if noun[0] in 'ae' else 'a'} {noun}; give "
            f"a .safetensors file, or a name that `tegula models` lists."
        )
    refuse_gguf(path)
    if path.suffix.lower() == ".safetensors":
        read_header(path)
    else:
        check_pickled(path)
