"""Finding a version by what people write: ``owner/name``, with a label or an id behind a colon."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from functools import cached_property

from tegula.catalog.inputs import Model, Version
from tegula.catalog.models import MODELS
from tegula.errors import UnknownModelError
from tegula.models.mini import CONFIG_FILE, WEIGHTS

LATEST = "latest"
DEFAULT_MODEL = "tegula/upscale"
_SHORTEST_PREFIX = 8


def packaged_fingerprint() -> str:
    """Return the hash over the packaged weights; empty where they are missing."""
    try:
        return str(json.loads((WEIGHTS / CONFIG_FILE).read_text(encoding="utf-8"))["sha256"])
    except (OSError, ValueError, KeyError):
        return ""


@dataclass(frozen=True)
class Catalog:
    """All models over one set of weights, whose fingerprint is part of every version's id."""

    weights: str

    @cached_property
    def models(self) -> tuple[Model, ...]:
        """Every model, the default first."""
        return tuple(
            dataclasses.replace(
                model,
                versions=tuple(
                    dataclasses.replace(version, weights=self.weights) for version in model.versions
                ),
            )
            for model in MODELS
        )

    def find(self, reference: str = DEFAULT_MODEL) -> Version:
        """Return the version that a reference names.

        Args:
            reference: ``owner/name`` or ``owner/name:latest`` for the newest version;
                ``owner/name:LABEL``, which ``Version.reference`` gives and which finds the
                same version after every release and over all weights; ``owner/name:ID`` or
                ``ID``, of which the first eight digits do, for this very release.

        Raises:
            UnknownModelError: there is none.
        """
        name, _, wanted = reference.partition(":")
        if "/" not in name:
            name, wanted = "", name
        known = [model for model in self.models if name in ("", model.reference)]
        if not known:
            names = ", ".join(model.reference for model in self.models)
            raise UnknownModelError(f"There is no model {name}; choose one of {names}.")
        if name and wanted in ("", LATEST):
            return known[0].latest
        for version in (version for model in known for version in model.versions):
            if len(wanted) >= _SHORTEST_PREFIX and version.id.startswith(wanted):
                return version
            if name and wanted == version.label:
                return version
        labels = ", ".join(version.label for version in known[0].versions)
        raise UnknownModelError(
            f"{name} has no version {wanted}; it has {labels}."
            if name
            else f"No model has a version {wanted}."
        )


_PACKAGED = Catalog(packaged_fingerprint())


def models() -> tuple[Model, ...]:
    """Return every model over the packaged weights, the default first."""
    return _PACKAGED.models


def find(reference: str = DEFAULT_MODEL) -> Version:
    """Return a version over the packaged weights; see ``Catalog.find``."""
    return _PACKAGED.find(reference)
