"""From the version that a prediction names to the version of ours that does the work."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Protocol

from tegula.catalog import Catalog, Version
from tegula.catalog.model import ARRAY
from tegula.catalog.schema import FILE
from tegula.predictions.presets import UserModels
from tegula.predictions.records import Prediction


@dataclass(frozen=True)
class Resolved:
    """What is to be known for a run.

    version: id of the version of ours.
    files: names of the inputs that are files.
    many: the output is a list of files, not one.
    """

    version: str
    files: Collection[str]
    many: bool


class Resolver(Protocol):
    """Knows the versions."""

    def __call__(self, prediction: Prediction) -> Resolved:
        """Return what is to be known.

        Raises:
            UnknownModelError: the version is not there any more.
        """


@dataclass(frozen=True)
class CatalogResolver:
    """Knows the versions of the catalogue and those that users made of them."""

    catalog: Catalog
    user_models: UserModels

    def __call__(self, prediction: Prediction) -> Resolved:
        """Return what is to be known.

        Raises:
            UnknownModelError: the version is not there any more.
        """
        own = self.user_models.version(prediction.version)
        version: Version = self.catalog.find(own.base_version if own else prediction.version)
        files = frozenset(field.name for field in version.fields if field.kind == FILE)
        return Resolved(version.id, files, version.output == ARRAY)
