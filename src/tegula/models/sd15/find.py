"""Finding all parts of a Stable Diffusion 1.5 model before one of them is loaded.

What is missing is known, and downloaded, before the first weight is read.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from tegula.errors import BrokenWeightsError, MissingWeightsError
from tegula.folders import models_folder
from tegula.models import BundleSettings
from tegula.models.files import existing_file, open_tensors, read_json
from tegula.models.headers import refuse_gguf
from tegula.models.hub import (
    HubRepository,
    fetch_all,
    find,
    inner_folder,
    is_hub_id,
    is_weights_file,
    missing_files,
    what_is_there,
)
from tegula.models.identify import AUTOENCODER as AUTOENCODER_FILE
from tegula.models.identify import (
    CHECKPOINT,
    CONTROL_LORA,
    DIFFERENCE,
    identify,
    refuse_other,
)
from tegula.models.identify import CONTROLNET as CONTROLNET_FILE
from tegula.models.library import FileKind, find_file, list_files, resolve_file, unknown_file
from tegula.models.sd15 import facts
from tegula.models.sd15.few_step import FewStep, choose_few_step
from tegula.models.sd15.lora import Loras, open_loras
from tegula.models.sd15.parts import (
    AUTOENCODER,
    CONTROLNET,
    STANDARD_CONFIG,
    TEXT_MODEL,
    UNET,
    Kind,
    Part,
    part_of_folder,
)
from tegula.models.sd15.refusals import (
    refuse_other_autoencoder,
    refuse_other_checkpoint,
    refuse_other_folder,
    refuse_other_pipeline,
)
from tegula.models.stored import StoredTensor

NO_CONTROLNET = "none"
_SCHEDULER_FILE = "scheduler/scheduler_config.json"
_AUTOENCODER_KEYS = "first_stage_model."
_TEXT_KEYS = "cond_stage_model."


@dataclass(frozen=True)
class _Source:
    """Where the parts come from; None lets the model or the defaults decide."""

    model: str
    controlnet: str | None
    vae: str | None
    config: Path


@dataclass(frozen=True)
class FoundParts:
    """Where everything lies; nothing of it is loaded yet."""

    unet: Part
    controlnet: Part | None
    autoencoder: Part
    text_model: Part
    tokenizer: Path
    scheduler: Mapping[str, object]


@dataclass(frozen=True)
class FoundModel:
    """A model with all of its parts found, and nothing loaded.

    model: its file, folder or hub id.
    chosen: the few-step LoRA in use, if any; ``loras`` has it with the others.
    """

    model: str
    parts: FoundParts
    chosen: FewStep
    loras: Loras
    embeddings: tuple[str, ...]


def find_sd15(wanted: BundleSettings, config: str | None = None) -> FoundModel:
    """Find all that ``load_sd15`` would load, downloading what is not on this machine.

    Args:
        wanted: the model and its parts.

            bundle: a diffusers folder, a ``.safetensors`` or ``.ckpt`` checkpoint, or a hub
            id, which is looked for in the models folder and the hub client's cache first.

            controlnet: folder, file or hub id of the tile ControlNet. None takes the
            ``controlnet`` folder in the model's folder or beside its file, or else
            control_v11f1e_sd15_tile; "none" runs without.

            vae: folder, file or hub id of the autoencoder. None takes the model's own, or
            where a checkpoint has none, a ``vae`` folder beside it or sd-vae-ft-mse.

            loras: LoRA files or hub ids with their weights, added in this order.

            few_step: which LoRA for few steps is added to them, as ``choose_few_step`` says;
            with one among them all presets follow its recipe.

            embeddings: textual inversion files.
        config: as ``load_sd15`` takes it.

    Raises:
        UnknownModelError: a part is given by a name that no file has.
        MissingWeightsError, BrokenWeightsError, OptionError: as ``load_sd15`` does.
    """
    model = resolve_file(wanted.bundle, FileKind.CHECKPOINT)
    source = _Source(
        model,
        wanted.controlnet and _named(wanted.controlnet, FileKind.CONTROLNET),
        wanted.vae and _named(wanted.vae, FileKind.VAE),
        Path(config) if config else STANDARD_CONFIG,
    )
    named = [(_named(file, FileKind.LORA), weight) for file, weight in wanted.loras]
    for file, _ in named:
        if is_weights_file(file):
            existing_file(file)
    embeddings = (_named(file, FileKind.EMBEDDING) for file in wanted.embeddings)
    words = tuple(str(existing_file(file)) for file in embeddings)
    chosen = choose_few_step(named, wanted.few_step)
    parts = _find_parts(source)
    changed = (parts.unet, parts.text_model) if chosen.loras else ()
    opened = open_loras(chosen.loras, {each.kind.folder: each.parameters for each in changed})
    return FoundModel(model, parts, chosen, opened, words)


def _named(reference: str, kind: FileKind) -> str:
    """Return the path or hub id of a part that may be given by its name alone.

    Raises:
        UnknownModelError: no file of this kind has that name.
    """
    if reference == NO_CONTROLNET:
        return reference
    found = resolve_file(reference, kind)
    if Path(found).expanduser().exists() or is_weights_file(found) or "/" in found:
        return found
    raise unknown_file(reference, kind)


def _find_parts(source: _Source) -> FoundParts:
    """Find all parts before one is loaded, and download at once what is not on this machine.

    Raises:
        MissingWeightsError: parts are neither here nor on a hub that answers; names all of them.
        BrokenWeightsError: a part is damaged or of another family.
    """
    finder = _Finder(source)
    found = finder.parts_of_file if is_weights_file(source.model) else finder.parts_of_folder
    finder.look()
    if finder.absent:
        try:
            fetch_all(finder.absent)
        except MissingWeightsError as error:
            if all(each.repo != facts.DEFAULT_CONTROLNET for each in finder.absent):
                raise
            raise MissingWeightsError(
                f"{error} For the ControlNet its single file, control_v11f1e_sd15_tile.pth in "
                f"{models_folder() / 'controlnet'}, does too; --controlnet none runs without."
            ) from error
    return found()


class _Finder:
    """Finds the parts of one model.

    ``look`` notes what has to be downloaded, and the other methods open what is there.
    """

    def __init__(self, source: _Source) -> None:
        self.source = source
        self.absent: list[HubRepository] = []
        self.is_file = is_weights_file(source.model)
        self.path = Path(source.model).expanduser()
        if not self.is_file and self.path.is_dir():
            self.path = inner_folder(self.path)

    def look(self) -> None:
        """Find out what is not on this machine."""
        if self.is_file:
            self.path = existing_file(self.source.model)
            refuse_gguf(self.path)
        else:
            self._look_for_folder()
        around = self.path.parent if self.is_file else self.path
        controlnet, vae = self.source.controlnet, self.source.vae
        if controlnet is None and not (around / "controlnet" / "config.json").is_file():
            controlnet = _usual(FileKind.CONTROLNET, facts.DEFAULT_CONTROLNET_FILE)
        self.controlnet = self._place(controlnet, around / "controlnet", facts.DEFAULT_CONTROLNET)
        self.autoencoder: Path | None = None
        if vae is not None or not self._has_own_autoencoder():
            if vae is None and not (around / "vae" / "config.json").is_file():
                vae = _usual(FileKind.VAE, facts.DEFAULT_VAE_FILE)
            self.autoencoder = self._place(vae, around / "vae", facts.DEFAULT_VAE)

    def parts_of_folder(self) -> FoundParts:
        """Open the parts of a diffusers folder."""
        folder = self.path
        refuse_other_folder(folder)
        tokenizer = folder / "tokenizer"
        return FoundParts(
            part_of_folder(UNET, folder / UNET.folder),
            self._controlnet(),
            self._autoencoder(self.autoencoder or folder / AUTOENCODER.folder),
            part_of_folder(TEXT_MODEL, folder / TEXT_MODEL.folder),
            tokenizer if _has_vocabulary(tokenizer) else _vocabulary(folder, self.source.config),
            facts.scheduler_settings(read_json(folder / _SCHEDULER_FILE)),
        )

    def parts_of_file(self) -> FoundParts:
        """Open the parts of a checkpoint."""
        path, config, tensors = self.path, self.source.config, self._tensors
        settings = config / _SCHEDULER_FILE
        own = Part(AUTOENCODER, path, tensors, config / AUTOENCODER.folder)
        return FoundParts(
            Part(UNET, path, tensors, config / UNET.folder),
            self._controlnet(),
            own if self.autoencoder is None else self._autoencoder(self.autoencoder),
            self._text_model(),
            _vocabulary(path.parent, config),
            facts.scheduler_settings(read_json(settings) if settings.is_file() else {}),
        )

    @cached_property
    def _tensors(self) -> Mapping[str, StoredTensor]:
        """The tensors of the checkpoint, which is of the right family."""
        tensors = open_tensors(self.path)
        shapes = {name: each.shape for name, each in tensors.items()}
        # A file of training has the ControlNet beside the model.
        alone = {name: s for name, s in shapes.items() if not name.startswith("control_model.")}
        identity = identify(alone or shapes, self.path)
        width = read_json(self.source.config / "unet" / "config.json")["cross_attention_dim"]
        refuse_other_checkpoint(self.path, identity, width)
        return tensors

    def _has_own_autoencoder(self) -> bool:
        if self.is_file:
            return any(name.startswith(_AUTOENCODER_KEYS) for name in self._tensors)
        return not missing_files(self.path, _folder_files("vae")) or not self.path.is_dir()

    def _look_for_folder(self) -> None:
        if self.path.is_dir():
            refuse_other_pipeline(self.path)
            _refuse_folder_of_files(self.path)
        wanted = [n for n in facts.FOLDER_FILES if self.source.vae is None or n[:4] != "vae/"]
        self.path = self._folder(self.source.model, self.path, tuple(wanted))

    def _place(self, reference: str | None, own: Path, default: str) -> Path | None:
        """Return the file or folder of a part; None for the part that is not wanted."""
        if reference == NO_CONTROLNET:
            return None
        if reference is None:
            reference = str(own) if (own / "config.json").is_file() else default
        if is_weights_file(reference):
            return existing_file(reference)
        folder = inner_folder(Path(reference).expanduser())
        return self._folder(reference, folder, facts.PART_FILES)

    def _folder(self, reference: str, folder: Path, files: tuple[str, ...]) -> Path:
        """Return the folder that a path or hub id names, with these files in it or to come."""
        if folder.is_dir():
            missing = missing_files(folder, files)
            if not missing:
                return folder
            # Of a part the whole model's folder may have been given, which is a model.
            if files == facts.PART_FILES or len(missing) < len(files):
                raise MissingWeightsError(f"{folder} lacks {', '.join(missing)}; put them there.")
        there = what_is_there(folder)
        choice = (
            "give a diffusers folder, a .safetensors file, a name that `tegula models` lists or a "
            f"hub id like {facts.DEFAULT_MODEL}."
        )
        if there is not None:
            raise BrokenWeightsError(f"{reference} is {there}, not a model; {choice}")
        if not is_hub_id(reference):
            raise MissingWeightsError(f"There is no folder {reference}; {choice}")
        repository = HubRepository(reference, files)
        found = find(repository)
        if found is None:
            self.absent.append(repository)
        return found or repository.folder

    def _controlnet(self) -> Part | None:
        kinds = (CONTROLNET_FILE, CONTROL_LORA, DIFFERENCE)
        place = self.controlnet
        return None if place is None else self._part(CONTROLNET, place, "a tile ControlNet", kinds)

    def _autoencoder(self, place: Path) -> Part:
        refuse_other_autoencoder((place if place.is_dir() else place.parent) / "config.json")
        kinds = (AUTOENCODER_FILE, CHECKPOINT)
        return self._part(AUTOENCODER, place, "an autoencoder (VAE)", kinds)

    def _part(self, kind: Kind, place: Path, wanted: str, kinds: Collection[str]) -> Part:
        if place.is_dir():
            return part_of_folder(kind, place)
        refuse_gguf(place)
        part = Part(kind, place, open_tensors(place), self.source.config / kind.folder)
        refuse_other(place, identify(part.shapes, place), wanted, kinds)
        return part

    def _text_model(self) -> Part:
        """Return the checkpoint's text encoder, or else the release's, wherever it lies."""
        config = self.source.config / TEXT_MODEL.folder
        own = Part(TEXT_MODEL, self.path, self._tensors, config)
        if any(name.startswith(_TEXT_KEYS) for name in self._tensors):
            return own
        folders = [self.path.parent / TEXT_MODEL.folder]
        for repo, inside in facts.TEXT_ENCODER_REPOSITORIES:
            files = tuple(f"{inside}/{name}".lstrip("/") for name in facts.TEXT_ENCODER_FILES)
            found = find(HubRepository(repo, files))
            folders += [found / inside] if found is not None else []
        for folder in folders:
            if not missing_files(folder, facts.TEXT_ENCODER_FILES):
                part = part_of_folder(TEXT_MODEL, folder)
                return Part(TEXT_MODEL, folder, part.tensors, config)
        file = find_file("clip_l", FileKind.TEXT_ENCODER)
        if file is not None:
            return Part(TEXT_MODEL, file, open_tensors(file), config)
        raise MissingWeightsError(
            f"{self.path} holds no text encoder, and none is on this machine; put "
            f"clip_l.safetensors into {models_folder() / 'text_encoder'}, or run tegula models "
            f"pull stable-diffusion-1.5."
        )


def _usual(kind: FileKind, pattern: str) -> str | None:
    """Return the file of a kind under the name it was released by, in whatever precision."""
    named = (each for each in list_files(kind) if re.search(pattern, each.path.name.lower()))
    return next((str(each.path) for each in named), None)


def _folder_files(part: str) -> tuple[str, ...]:
    return tuple(name for name in facts.FOLDER_FILES if name.startswith(f"{part}/"))


def _refuse_folder_of_files(folder: Path) -> None:
    """Name the checkpoints in a folder that is not one model but holds some.

    Raises:
        MissingWeightsError: it is such a folder.
    """
    files = sorted(path.name for path in folder.iterdir() if is_weights_file(path.name))
    if files and not (folder / "unet").is_dir():
        names = ", ".join(files[:5]) + (", ..." if len(files) > 5 else "")
        raise MissingWeightsError(
            f"{folder} is a folder of files ({names}), not a diffusers folder; give one of them."
        )


def _has_vocabulary(folder: Path) -> bool:
    return not missing_files(folder, facts.TOKENIZER_FILES) or (folder / "tokenizer.json").is_file()


def _vocabulary(around: Path, config: Path) -> Path:
    """Find CLIP's vocabulary, which single files do not hold; it comes with tegula, too."""
    given = () if config == STANDARD_CONFIG else (config,)
    folders = (each / "tokenizer" for each in (around, *given, models_folder()))
    return next(filter(_has_vocabulary, folders), STANDARD_CONFIG / "tokenizer")
