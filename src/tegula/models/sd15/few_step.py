"""LoRAs that make Stable Diffusion 1.5 need a few steps only.

A distilled LoRA works with the scheduler, steps and guidance it was distilled for and with
no others, so a bundle that has one merged runs all presets with them.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tegula.errors import BrokenWeightsError, MissingWeightsError, OptionError
from tegula.models.files import read_metadata
from tegula.models.hub import HubRepository, find, formats
from tegula.models.identify import identify_file
from tegula.models.library import FileKind, list_files, resolve_file
from tegula.models.sd15.lora import LORA_FILE
from tegula.options import PresetValues

AUTO, NONE = "auto", "none"
"""Take the best on this machine; leave all presets as they are."""

_LONGEST_NAME = 255
_TITLES = ("ss_output_name", "modelspec.title")
"""Where trainers leave the name of a LoRA in its metadata."""
_FOLDERS_UP = 3
"""Folders from a file of the hub client's cache up to that with the name of its repository."""


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
    FewStepRecipe("tcd", "h1t/TCD-SD15-LoRA", LORA_FILE, r"tcd.?sd.?1.?5", "tcd", 4),
    FewStepRecipe(
        "lcm",
        "latent-consistency/lcm-lora-sdv1-5",
        LORA_FILE,
        r"^(?!.*(animate|xl|ssd)).*(lcm.?lora|lora.?lcm|^lcm.?sd.{0,2}1.?5$)",
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
    """The LoRAs to merge, in order, and the recipe that the presets follow, if any."""

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
        loras: what is merged anyway; a few-step LoRA among it is recognised.
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
    if path.stem == Path(LORA_FILE).stem:
        yield from (folder.name for folder in list(path.absolute().parents)[:_FOLDERS_UP])


def _find_by_reference(reference: str) -> tuple[str | Path, FewStepRecipe]:
    """Return the file and recipe of the name of a recipe, or of a file that one fits."""
    named = next((recipe for recipe in RECIPES if recipe.name == reference), None)
    if named is None:
        file = resolve_file(reference, FileKind.LORA)
        recipe = recipe_of(file)
        if recipe is None:
            raise OptionError(
                f"tegula knows no few-step LoRA {reference}: give "
                f"{', '.join(recipe.name for recipe in RECIPES)} or a file of one of them; run "
                f"others as a LoRA with their own scheduler, steps and guidance scale."
            )
        return file, recipe
    installed = next((path for path, recipe in _installed() if recipe == named), None)
    if installed is None:
        raise MissingWeightsError(
            f"The few-step LoRA {named.name} is not on this machine; put {named.file} of "
            f"{named.repo} into {named.repository.folder}."
        )
    return installed, named


def _installed() -> Iterator[tuple[Path, FewStepRecipe]]:
    """Yield the few-step LoRAs on this machine, the best first."""
    recipes: dict[Path, FewStepRecipe] = {}
    for each in list_files(FileKind.LORA):
        with contextlib.suppress(BrokenWeightsError):  # a download that is under way, say
            recipe = recipe_of(str(each.path))
            # The names of some do not tell that they are made for SDXL.
            if recipe is not None and identify_file(each.path).may_be_sd15:
                recipes[each.path] = recipe
    for recipe in RECIPES:
        yield from ((path, recipe) for path, own in recipes.items() if own == recipe)
        found = find(recipe.repository)
        if found is not None:
            names = formats(recipe.file)
            yield next(path for name in names if (path := found / name).is_file()), recipe
