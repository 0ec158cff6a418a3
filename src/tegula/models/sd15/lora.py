"""LoRAs, few-step LoRAs and textual inversions."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffusers.loaders import StableDiffusionLoraLoaderMixin, TextualInversionLoaderMixin
from torch import Tensor

from tegula.errors import BrokenWeightsError, MissingWeightsError, OptionError
from tegula.folders import models_folder
from tegula.models.hub import HubRepository, find, find_or_fetch, formats, is_hub_id
from tegula.models.sd15.files import (
    LOADING_FAILURES,
    existing_file,
    is_weights_file,
    read_pickled,
    read_weights,
    safetensors_metadata,
    safetensors_shapes,
)
from tegula.models.sd15.parts import Networks
from tegula.options import PresetValues

# LoRAs and textual inversions: small files that change a model once it is loaded.

_LORA_FILE = "pytorch_lora_weights.safetensors"


class _Loader(StableDiffusionLoraLoaderMixin, TextualInversionLoaderMixin):  # type: ignore[misc]
    """The part of a diffusers pipeline that its adapter loading asks for."""

    hf_device_map = None

    def __init__(self, networks: Networks) -> None:
        self.unet = networks.unet
        self.text_encoder = networks.text_model
        self.tokenizer = networks.tokenizer
        self.components: dict[str, Any] = {}


def fuse_loras(networks: Networks, loras: Sequence[tuple[str, float]]) -> None:
    """Add LoRAs, given as (file or hub id, weight), to the weights of UNet and text encoder.

    Both the kohya and the diffusers format are read.

    Raises:
        MissingWeightsError: a file is not there.
        BrokenWeightsError: a file is damaged, no LoRA, or made for another family.
    """
    for reference, weight in loras:
        path = _lora_file(reference)
        _fuse(networks, path, read_weights(path), weight)


def _lora_file(reference: str) -> Path:
    if is_weights_file(reference) or not is_hub_id(reference):
        return existing_file(reference)
    folder = find_or_fetch(HubRepository(reference, (_LORA_FILE,)))
    return next(path for name in formats(_LORA_FILE) if (path := folder / name).is_file())


def _fuse(networks: Networks, path: Path, state: dict[str, Tensor], weight: float) -> None:
    loader = _Loader(networks)
    try:
        loader.load_lora_weights(state, adapter_name="lora")
        if not _adapted(networks):
            raise ValueError("none of its layers is in this model")
        loader.fuse_lora(lora_scale=weight)
        loader.unload_lora_weights()
    except LOADING_FAILURES as error:
        raise BrokenWeightsError(
            f"{path} is no LoRA for Stable Diffusion 1.5; give one made for that family."
        ) from error


def _adapted(networks: Networks) -> bool:
    names = (name for module in networks.modules for name, _ in module.named_parameters())
    return any(".lora_" in name for name in names)


def add_inversions(networks: Networks, embeddings: Sequence[str]) -> tuple[str, ...]:
    """Teach the text encoder the words of textual inversion files; return the words.

    A file of the diffusers format names its word, any other is used by its file name.

    Raises:
        MissingWeightsError: a file is not there.
        BrokenWeightsError: a file is damaged, no textual inversion, or of another family.
    """
    return tuple(_add_inversion(networks, existing_file(reference)) for reference in embeddings)


def _add_inversion(networks: Networks, path: Path) -> str:
    word, vectors = _inversion(path)
    try:
        _Loader(networks).load_textual_inversion({word: vectors}, token=word)
    except LOADING_FAILURES as error:
        width = networks.text_model.config.hidden_size
        raise BrokenWeightsError(
            f"{path} cannot be used as the word {word}: the word must be new and its vectors "
            f"{width} wide."
        ) from error
    return word


def _inversion(path: Path) -> tuple[str, Tensor]:
    content = _content(path)
    parameters = content.get("string_to_param")
    if isinstance(parameters, Mapping) and isinstance(parameters.get("*"), Tensor):
        return path.stem, parameters["*"].detach()
    tensors = {name: part for name, part in content.items() if isinstance(part, Tensor)}
    if len(tensors) != 1:
        raise BrokenWeightsError(
            f"{path} is no textual inversion for Stable Diffusion 1.5; give one with the vectors "
            f"of one word."
        )
    name, vectors = next(iter(tensors.items()))
    return path.stem if name == "emb_params" else name, vectors


def _content(path: Path) -> Mapping[str, Any]:
    if path.suffix.lower() == ".safetensors":
        safetensors_shapes(path)
        return read_weights(path)
    content = read_pickled(path)
    return content if isinstance(content, Mapping) else {}


# LoRAs that make Stable Diffusion 1.5 need a few steps only, and how each is run.
#
# A distilled LoRA answers right with the scheduler, steps and guidance it was distilled
# for and with no others, so a bundle that has one fused runs all presets with them.

AUTO, NONE = "auto", "none"
"""Take what is on this machine; leave all presets as they are."""

_HYPER = "ByteDance/Hyper-SD"
_PLAIN_FILE = "pytorch_lora_weights.safetensors"
_LONGEST_NAME = 255
_TITLES = ("ss_output_name", "modelspec.title")
_FOLDERS_UP = 3
"""From a file of the hub client's cache to the folder with the name of its repository."""


@dataclass(frozen=True)
class FewStepRecipe:
    """A distilled LoRA and how it is run, as the card of its repository says.

    repo, file: where it comes from; the hub page of ``repo`` is the source of the numbers.
    pattern: of the names that its file has, or its folder, or the title in its metadata.
    guidance_scale: at 1 the LoRA has the guidance in it.
    """

    name: str
    repo: str
    file: str
    pattern: str
    scheduler: str
    steps: int
    guidance_scale: float = 1.0
    weight: float = 1.0

    def applied(self, preset: PresetValues) -> PresetValues:
        """Return a preset with the scheduler, steps and guidance of this LoRA."""
        return preset.replaced(
            scheduler=self.scheduler, steps=self.steps, guidance_scale=self.guidance_scale
        )


def _hyper(steps: int, *, guided: bool = False) -> FewStepRecipe:
    """Return one of Hyper-SD: DDIM with trailing steps, or TCD for the single step.

    The guided ones keep what guidance does, at scales of 5 to 8, and take negative prompts.
    """
    plural = "step" if steps == 1 else "steps"
    suffix = "-CFG" if guided else ""
    return FewStepRecipe(
        name=f"hyper-{steps}{suffix.lower()}",
        repo=_HYPER,
        file=f"Hyper-SD15-{steps}{plural}{suffix}-lora.safetensors",
        pattern=rf"hyper.?sd.?1.?5.{steps}.?step{'.*cfg' if guided else '(?!.*cfg)'}",
        scheduler="tcd" if steps == 1 else "ddim-trailing",
        steps=steps,
        guidance_scale=5.0 if guided else 1.0,
    )


RECIPES: tuple[FewStepRecipe, ...] = (
    _hyper(4),
    _hyper(8),
    FewStepRecipe("tcd", "h1t/TCD-SD15-LoRA", _PLAIN_FILE, r"tcd.?sd.?1.?5", "tcd", 4),
    FewStepRecipe(
        "lcm",
        "latent-consistency/lcm-lora-sdv1-5",
        _PLAIN_FILE,
        r"lcm.*sd.{0,2}1.?5",
        "lcm",
        4,
    ),
    _hyper(2),
    _hyper(1),
    _hyper(8, guided=True),
    _hyper(12, guided=True),
)
"""The best first: of several on a machine that one is taken."""


@dataclass(frozen=True)
class FewStep:
    """The LoRAs to fuse, in order, and the recipe that the presets follow, if any."""

    loras: tuple[tuple[str, float], ...]
    recipe: FewStepRecipe | None = None

    @property
    def warnings(self) -> tuple[str, ...]:
        """Say what the presets have become."""
        if self.recipe is None:
            return ()
        known = self.recipe
        return (
            f"The few-step LoRA {known.name} is in use: all presets run {known.steps} steps of "
            f"{known.scheduler} at guidance scale {known.guidance_scale:g}.",
        )

    def presets(self, usual: Mapping[str, PresetValues]) -> Mapping[str, PresetValues]:
        """Return the presets of a bundle with these LoRAs."""
        if self.recipe is None:
            return usual
        return {name: self.recipe.applied(preset) for name, preset in usual.items()}


def choose(loras: Sequence[tuple[str, float]], few_step: str | None) -> FewStep:
    """Settle which few-step LoRA is in use.

    Args:
        loras: what is fused anyway; a few-step LoRA among it is recognised.
        few_step: None takes no other. "auto" takes the best on this machine, if none is
            given. "none" lets even those given change no preset. Otherwise the name of a
            recipe, or the file of a LoRA that one of them fits.

    Raises:
        OptionError: ``few_step`` is no such name or file.
        MissingWeightsError: the LoRA of that name is not on this machine.
    """
    given = tuple(loras)
    if few_step == NONE:
        return FewStep(given)
    if few_step not in (None, AUTO):
        file, recipe = _named(few_step)
        return FewStep((*given, (file, recipe.weight)), recipe)
    recognised = next(filter(None, (recipe_of(reference) for reference, _ in given)), None)
    if recognised is not None or few_step is None:
        return FewStep(given, recognised)
    for path, recipe in _installed():
        return FewStep((*given, (str(path), recipe.weight)), recipe)
    return FewStep(given)


def recipe_of(reference: str) -> FewStepRecipe | None:
    """Return the recipe of a LoRA, a file or hub id, by its names and title; None if unknown."""
    names = [reference] if not Path(reference).is_file() else _names(Path(reference))
    return next(filter(None, map(_by_name, names)), None)


def _by_name(name: str) -> FewStepRecipe | None:
    # A title comes from the file and may be of any length; the patterns take its square.
    name = name[:_LONGEST_NAME]
    return next((r for r in RECIPES if re.search(r.pattern, name, re.IGNORECASE)), None)


def _names(path: Path) -> Iterator[str]:
    """Yield what a file is called: by itself, by its maker, and by the folders it is in."""
    yield path.stem
    metadata = safetensors_metadata(path)
    yield from (metadata[key] for key in _TITLES if key in metadata)
    if path.stem == Path(_PLAIN_FILE).stem:
        yield from (folder.name for folder in list(path.absolute().parents)[:_FOLDERS_UP])


def _named(reference: str) -> tuple[str, FewStepRecipe]:
    by_name = {recipe.name: recipe for recipe in RECIPES}
    if reference in by_name:
        recipe = by_name[reference]
        return str(_found(recipe)), recipe
    found = recipe_of(reference)
    if found is None:
        raise OptionError(
            f"{reference} is no few-step LoRA that is known: give {', '.join(by_name)} or a "
            f"file of one of them; run others as a LoRA with their own scheduler, steps and "
            f"guidance scale."
        )
    return reference, found


def _installed() -> Iterator[tuple[Path, FewStepRecipe]]:
    """Yield what is on this machine, the best first."""
    folder = models_folder()
    loose = [*folder.glob("*.safetensors"), *folder.glob("lora*/*.safetensors")]
    recognised = {path: recipe_of(str(path)) for path in sorted(loose)}
    for recipe in RECIPES:
        yield from ((path, recipe) for path, known in recognised.items() if known == recipe)
        found = find(_repository(recipe))
        if found is not None:
            yield _file(found, recipe), recipe


def _found(recipe: FewStepRecipe) -> Path:
    found = next((path for path, known in _installed() if known == recipe), None)
    if found is None:
        raise MissingWeightsError(
            f"The few-step LoRA {recipe.name} is not on this machine; put {recipe.file} of "
            f"{recipe.repo} into {_repository(recipe).folder}."
        )
    return found


def _repository(recipe: FewStepRecipe) -> HubRepository:
    return HubRepository(recipe.repo, (recipe.file,))


def _file(folder: Path, recipe: FewStepRecipe) -> Path:
    return next(path for name in formats(recipe.file) if (path := folder / name).is_file())
