"""Files of weights on this machine, found by name.

They are looked for in the models folder, in folders of other programs that keep models
(AUTOMATIC1111's web UI and its relatives, ComfyUI), and in the hub client's cache. Such folders
are named by ``$TEGULA_LIBRARY``, or found where these programs are usually put. ComfyUI's own
list of further folders counts, too.

No file of weights is opened for it, and torch is not imported.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from tegula.errors import MissingWeightsError, UnknownModelError
from tegula.folders import models_folder
from tegula.models.hub import WEIGHTS_SUFFIXES, cached_snapshots, is_weights_file

LIBRARY_VARIABLE = "TEGULA_LIBRARY"
"""Names folders of other programs, separated as in PATH."""


class FileKind(str, Enum):
    """What a file is for, as its folder says."""

    CHECKPOINT = "checkpoint"
    CONTROLNET = "ControlNet"
    VAE = "autoencoder"
    LORA = "LoRA"
    EMBEDDING = "embedding"
    PRESCALER = "prescaler"
    TEXT_ENCODER = "text encoder"


_FOLDERS: Mapping[FileKind, Sequence[str]] = {
    FileKind.CHECKPOINT: ("checkpoints", "checkpoint", "stable-diffusion"),
    FileKind.CONTROLNET: ("controlnet",),
    FileKind.VAE: ("vae",),
    FileKind.LORA: ("lora", "loras", "lycoris"),
    FileKind.EMBEDDING: ("embeddings", "embedding"),
    FileKind.PRESCALER: (
        "prescalers",
        "upscale_models",
        "esrgan",
        "realesrgan",
        "bsrgan",
        "swinir",
        "dat",
        "hat",
        "compact",
    ),
    FileKind.TEXT_ENCODER: ("text_encoder", "text_encoders", "clip"),
}
"""Folders of each kind, in lower case: tegula's own, those of ComfyUI and of the web UI."""

_INSIDE = (
    ".",
    "models",
    "extensions/sd-webui-controlnet",
    "extensions-builtin/sd_forge_controlnet",
)
"""Where these folders lie in the folder of a program; the web UI calls ControlNet's ``models``."""
_CONTROLNET_EXTENSION = "extensions/sd-webui-controlnet/models"
_PROGRAMS = (
    "stable-diffusion-webui",
    "stable-diffusion-webui-forge",
    "stable-diffusion-webui-reForge",
    "sd-webui",
    "automatic",
    "ComfyUI",
    "Documents/ComfyUI",
    "comfyui",
)
_FURTHER_FOLDERS = "extra_model_paths.yaml"
"""ComfyUI's list of folders elsewhere, in its own folder."""
_PLAIN_NAMES = ("model", "pytorch_model", "diffusion_pytorch_model", "pytorch_lora_weights")
"""What files of a hub are called whose name says nothing."""
_DEEPEST_FOLDER = 4
"""Folders below a kind's own that are searched: links may lead in circles."""


@dataclass(frozen=True)
class LibraryFile:
    """One file of weights. ``kind`` is None where its folder does not tell."""

    name: str
    kind: FileKind | None
    path: Path


def library_folders() -> tuple[Path, ...]:
    """Return the folders that are searched, the models folder first."""
    named = os.environ.get(LIBRARY_VARIABLE, "").split(os.pathsep)
    programs = [base / name for base in (Path.cwd(), *_home()) for name in _PROGRAMS]
    folders = [models_folder(), *(Path(name).expanduser() for name in named if name), *programs]
    there = {os.path.realpath(folder): folder for folder in reversed(folders) if folder.is_dir()}
    return tuple(folder for folder in folders if folder in there.values())


def _home() -> tuple[Path, ...]:
    try:
        return (Path.home(),)
    except RuntimeError:  # a user without an entry, as in some containers
        return ()


def search_also(folders: Sequence[Path]) -> None:
    """Search further folders from now on, in this process and those that it starts."""
    before = os.environ.get(LIBRARY_VARIABLE)
    names = [str(folder) for folder in folders]
    os.environ[LIBRARY_VARIABLE] = os.pathsep.join([*names, *([before] if before else [])])


def list_files(kind: FileKind | None = None) -> tuple[LibraryFile, ...]:
    """Return the files of a kind, or all of them, those of the models folder first."""
    found: dict[Path, LibraryFile] = {}
    for folder in library_folders():
        for each in _files_of(folder):
            found.setdefault(each.path, each)
    for each in _cached_files():
        found.setdefault(each.path, each)
    return tuple(each for each in found.values() if kind is None or each.kind in (kind, None))


def find_file(name: str, kind: FileKind) -> Path | None:
    """Return the file of a kind by its name, None if there is none.

    Args:
        name: with or without the ending and folders above it, in any case.
        kind: what it should be.
    """
    wanted = name.replace("\\", "/").lower()
    stem = without_suffix(wanted)
    files = list_files(kind)
    exact = [
        each.path for each in files if f"{each.name.lower()}{each.path.suffix.lower()}" == wanted
    ]
    whole = [each.path for each in files if each.name.lower() == stem]
    last = [each.path for each in files if each.name.rpartition("/")[2].lower() == stem]
    return next(iter([*exact, *whole, *last]), None)


def resolve_file(reference: str, kind: FileKind) -> str:
    """Return the path of a file that is named, or the reference itself if it is something else.

    A path that exists is returned as it is, and so is a reference that no file has: it may be
    something else, such as a hub id, which the caller decides.
    """
    if Path(reference).expanduser().exists():
        return reference
    refuse_link(reference)
    found = find_file(reference, kind)
    return reference if found is None else str(found)


def refuse_link(reference: str) -> None:
    """Refuse a link where a file is expected, and tell how to get the file behind it.

    Raises:
        MissingWeightsError: the reference is a link.
    """
    if not reference.lower().startswith(("http://", "https://")):
        return
    parts = reference.split("?", maxsplit=1)[0].rstrip("/").split("/")
    place = f"put it into a folder of {models_folder()}, such as checkpoints or controlnet"
    if "huggingface.co" in parts[2] and len(parts) > 4:
        repo = "/".join(parts[3:5])
        if len(parts) > 7 and parts[5] in ("resolve", "blob"):
            file = "/".join(parts[7:])
            how = f"fetch it with `hf download {repo} {file} --local-dir FOLDER`"
            raise MissingWeightsError(
                f"{reference} is a link and not a file; {how} or a browser, {place}, and give "
                f"its name."
            )
        raise MissingWeightsError(f"{reference} is a link; give the hub id {repo}.")
    raise MissingWeightsError(
        f"{reference} is a link and not a file; download it, {place}, and give its name."
    )


def unknown_file(reference: str, kind: FileKind) -> UnknownModelError:
    """Return the error for a name that no file of this kind has."""
    names = [each.name for each in list_files(kind) if each.kind is not None]
    known = f"known are {', '.join(names[:10])}" if names else "no file of this kind was found"
    return UnknownModelError(
        f"There is no {kind.value} {reference}; {known}, and a path or a hub id works too."
    )


def _files_of(folder: Path) -> Iterator[LibraryFile]:
    for child in _children(folder):
        if _is_weights(child):
            yield LibraryFile(child.stem, None, child)
    extension = folder / _CONTROLNET_EXTENSION
    if extension.is_dir():
        yield from _files_below(extension, FileKind.CONTROLNET)
    kinds = {name: kind for kind, names in _FOLDERS.items() for name in names}
    for base in (folder / inside for inside in _INSIDE):
        for child in _children(base):
            kind = kinds.get(child.name.lower())
            if kind is not None and child.is_dir():
                yield from _files_below(child, kind)
    for name, place in _further_folders(folder / _FURTHER_FOLDERS):
        kind = kinds.get(name.lower())
        if kind is not None:
            yield from _files_below(place, kind)


def _further_folders(file: Path) -> Iterator[tuple[str, Path]]:
    """Yield the folders that a list of ComfyUI names, with ComfyUI's word for what they hold.

    Each of its sections has a ``base_path``, and one or several paths for each kind, one a line.
    What is no such list is left out, as are folders that are not there: other programs read it.
    """
    if not file.is_file():
        return
    import yaml

    try:
        sections = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError, yaml.YAMLError):
        return
    for section in sections.values() if isinstance(sections, dict) else ():
        if not isinstance(section, dict):
            continue
        base = os.path.expandvars(str(section.get("base_path") or ""))
        root = file.parent / Path(base).expanduser()
        for name, lines in section.items():
            if name != "base_path" and isinstance(lines, str):
                inside = (line.strip() for line in lines.split("\n"))
                yield from ((str(name), _normal(root / path)) for path in inside if path)


def _normal(path: Path) -> Path:
    return Path(os.path.normpath(path))


def _files_below(folder: Path, kind: FileKind) -> Iterator[LibraryFile]:
    """Yield the files in a folder and those below, by their path within it."""
    for parent, folders, names in os.walk(folder, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        if len(Path(parent).relative_to(folder).parts) >= _DEEPEST_FOLDER:
            folders.clear()
        for name in sorted(names):
            path = Path(parent) / name
            if _is_weights(path):
                inside = path.relative_to(folder).with_suffix("").as_posix()
                yield LibraryFile(inside, kind, path)


def _cached_files() -> Iterator[LibraryFile]:
    """Yield the single files in the hub client's cache, of the commit that ``main`` names."""
    for _, snapshot in cached_snapshots():
        for child in _children(snapshot):
            is_named = child.stem.partition(".")[0] not in _PLAIN_NAMES
            if is_named and _is_weights(child):
                yield LibraryFile(child.stem, None, child)


def _is_weights(path: Path) -> bool:
    return is_weights_file(path.name) and path.is_file()


def _children(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except OSError:
        return []


def without_suffix(name: str) -> str:
    """Return the name of a file without the ending of weights, both in lower case."""
    end = next((end for end in WEIGHTS_SUFFIXES if name.endswith(end)), "")
    return name.removesuffix(end)
