"""LoRAs: added to the weights of a model, and those that make it need a few steps only."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffusers.loaders import StableDiffusionLoraLoaderMixin

from tegula.errors import BrokenWeightsError, MissingWeightsError, OptionError
from tegula.folders import models_folder
from tegula.models.files import existing_file, read_metadata, read_tensors
from tegula.models.hub import (
    HubRepository,
    find,
    find_or_fetch,
    formats,
    is_hub_id,
    is_weights_file,
)
from tegula.models.sd15.networks import Networks
from tegula.models.stored import LOADING_FAILURES
from tegula.options import PresetValues

_LORA_FILE = "pytorch_lora_weights.safetensors"
"""What diffusers calls the file of a LoRA."""


class _LoraLoader(StableDiffusionLoraLoaderMixin):  # type: ignore[misc]
    """The part of a diffusers pipeline that its loading of LoRAs asks for."""

    hf_device_map = None

    def __init__(self, networks: Networks) -> None:
        self.unet = networks.unet
        self.text_encoder = networks.text_model
        self.components: dict[str, Any] = {}


def fuse_loras(networks: Networks, loras: Sequence[tuple[str, float]]) -> None:
    """Add LoRAs, given as (file or hub id, weight), to the weights of UNet and text encoder.

    Both the kohya and the diffusers format are read.

    Raises:
        MissingWeightsError: a file is not there.
        BrokenWeightsError: a file is damaged, no LoRA, or for another family.
    """
    loader = _LoraLoader(networks)
    for reference, weight in loras:
        path = _lora_file(reference)
        tensors = read_tensors(path)
        try:
            loader.load_lora_weights(tensors, adapter_name="lora")
            names = (name for module in networks.modules for name, _ in module.named_parameters())
            if not any(".lora_" in name for name in names):
                raise ValueError("none of its layers is in this model")
            loader.fuse_lora(lora_scale=weight)
            loader.unload_lora_weights()
        except LOADING_FAILURES as error:
            raise BrokenWeightsError(
                f"{path} is no LoRA for Stable Diffusion 1.5; give one made for that family."
            ) from error


def _lora_file(reference: str) -> Path:
    if is_weights_file(reference) or not is_hub_id(reference):
        return existing_file(reference)
    folder = find_or_fetch(HubRepository(reference, (_LORA_FILE,)))
    return next(path for name in formats(_LORA_FILE) if (path := folder / name).is_file())


# LoRAs that make Stable Diffusion 1.5 need a few steps only.
#
# A distilled LoRA works with the scheduler, steps and guidance it was distilled for and with
# no others, so a bundle that has one fused runs all presets with them.

AUTO, NONE = "auto", "none"
"""Take the best on this machine; leave all presets as they are."""

_LONGEST_NAME = 255
_TITLES = ("ss_output_name", "modelspec.title")
"""Where trainers leave the name of a LoRA in its metadata."""
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

    @property
    def repository(self) -> HubRepository:
        """Return its repository, with the one file that is needed of it."""
        return HubRepository(self.repo, (self.file,))

    def matches(self, name: str) -> bool:
        """Tell whether a file, folder or title of this name stands for this LoRA."""
        # A title comes from the file and may be of any length; patterns take its square.
        return re.search(self.pattern, name[:_LONGEST_NAME], re.IGNORECASE) is not None

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
        repo="ByteDance/Hyper-SD",
        file=f"Hyper-SD15-{steps}{plural}{suffix}-lora.safetensors",
        pattern=rf"hyper.?sd.?1.?5.{steps}.?step{'.*cfg' if guided else '(?!.*cfg)'}",
        scheduler="tcd" if steps == 1 else "ddim-trailing",
        steps=steps,
        guidance_scale=5.0 if guided else 1.0,
    )


RECIPES: tuple[FewStepRecipe, ...] = (
    _hyper(4),
    _hyper(8),
    FewStepRecipe("tcd", "h1t/TCD-SD15-LoRA", _LORA_FILE, r"tcd.?sd.?1.?5", "tcd", 4),
    FewStepRecipe(
        "lcm",
        "latent-consistency/lcm-lora-sdv1-5",
        _LORA_FILE,
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
        recipe = self.recipe
        if recipe is None:
            return ()
        return (
            f"The few-step LoRA {recipe.name} is in use: all presets run {recipe.steps} steps of "
            f"{recipe.scheduler} at guidance scale {recipe.guidance_scale:g}.",
        )

    def presets(self, own: Mapping[str, PresetValues]) -> Mapping[str, PresetValues]:
        """Return the presets of a bundle with these LoRAs, from its own."""
        if self.recipe is None:
            return own
        return {name: self.recipe.applied(preset) for name, preset in own.items()}


def choose_few_step(loras: Sequence[tuple[str, float]], few_step: str | None) -> FewStep:
    """Decide which few-step LoRA is in use.

    Args:
        loras: what is fused anyway; a few-step LoRA among it is recognised.
        few_step: None adds no other. "auto" adds the best on this machine, if none is
            given. "none" leaves the presets alone even if one is given. Otherwise the name of
            a recipe, or the file of a LoRA that one of them fits.

    Raises:
        OptionError: ``few_step`` is no such name or file.
        MissingWeightsError: the LoRA of that name is not on this machine.
    """
    given = tuple(loras)
    if few_step == NONE:
        return FewStep(given)
    if few_step not in (None, AUTO):
        return _with_recipe(given, *_find_by_reference(few_step))
    recognised = next(filter(None, (recipe_of(reference) for reference, _ in given)), None)
    if recognised is not None or few_step is None:
        return FewStep(given, recognised)
    best = next(_installed(), None)
    return FewStep(given) if best is None else _with_recipe(given, *best)


def _with_recipe(
    loras: tuple[tuple[str, float], ...], file: str | Path, recipe: FewStepRecipe
) -> FewStep:
    return FewStep((*loras, (str(file), recipe.weight)), recipe)


def recipe_of(reference: str) -> FewStepRecipe | None:
    """Return the recipe of a LoRA, a file or hub id, by its names and title; None if unknown."""
    path = Path(reference)
    names = _names(path) if path.is_file() else [reference]
    return next((recipe for name in names for recipe in RECIPES if recipe.matches(name)), None)


def _names(path: Path) -> Iterator[str]:
    """Yield what a file is called: by itself, by its maker, and by the folders it is in."""
    yield path.stem
    metadata = read_metadata(path)
    yield from (metadata[key] for key in _TITLES if key in metadata)
    if path.stem == Path(_LORA_FILE).stem:
        yield from (folder.name for folder in list(path.absolute().parents)[:_FOLDERS_UP])


def _find_by_reference(reference: str) -> tuple[str | Path, FewStepRecipe]:
    """Return the file and recipe of the name of a recipe, or of a file that one fits."""
    named = next((recipe for recipe in RECIPES if recipe.name == reference), None)
    if named is None:
        recipe = recipe_of(reference)
        if recipe is None:
            raise OptionError(
                f"tegula knows no few-step LoRA {reference}: give "
                f"{', '.join(recipe.name for recipe in RECIPES)} or a file of one of them; run "
                f"others as a LoRA with their own scheduler, steps and guidance scale."
            )
        return reference, recipe
    file = next((path for path, recipe in _installed() if recipe == named), None)
    if file is None:
        raise MissingWeightsError(
            f"The few-step LoRA {named.name} is not on this machine; put {named.file} of "
            f"{named.repo} into {named.repository.folder}."
        )
    return file, named


def _installed() -> Iterator[tuple[Path, FewStepRecipe]]:
    """Yield the few-step LoRAs on this machine, the best first."""
    folder = models_folder()
    loose = sorted([*folder.glob("*.safetensors"), *folder.glob("lora*/*.safetensors")])
    recipes: dict[Path, FewStepRecipe | None] = {}
    for path in loose:
        with contextlib.suppress(BrokenWeightsError):  # a download that is under way, say
            recipes[path] = recipe_of(str(path))
    for recipe in RECIPES:
        yield from ((path, recipe) for path, own in recipes.items() if own == recipe)
        found = find(recipe.repository)
        if found is not None:
            names = formats(recipe.file)
            yield next(path for name in names if (path := found / name).is_file()), recipe
