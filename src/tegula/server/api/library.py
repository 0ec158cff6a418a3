"""The models that the server offers, and how a request names one.

On offer are the models of the catalogue, to everybody, and presets that users made of them, to
everybody or to their account alone.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from functools import cached_property, lru_cache
from typing import Any

from tegula.catalog import Catalog, Model, Version, openapi_schema
from tegula.catalog.weights import how_it_could_run, why_it_cannot_run
from tegula.options import PRESETS, Preset
from tegula.server.accounts import UserModels, VersionedModel
from tegula.server.api.errors import ProblemError, bad_version, not_found
from tegula.server.db import SortKey, microseconds
from tegula.server.tables import Deployment, UserModel

LATEST = "latest"
RELEASED = datetime(2026, 11, 22, tzinfo=timezone.utc)
"""The date that clients see for models of the catalogue, which carry none."""

_SHORTEST_ID = 8
"""An id may be shortened to so many digits."""

MOST_SEARCHED = 1000

_LOOK_AGAIN_S = 10
"""How long it may take until a list knows that weights came; looking reads whole folders."""


@lru_cache(maxsize=1000)
def _obstacle(base: Version, pinned: str, _period: int) -> str:
    return why_it_cannot_run(base, json.loads(pinned))


@lru_cache(maxsize=1000)
def _remedy(base: Version, pinned: str, _period: int) -> str:
    return how_it_could_run(base, json.loads(pinned))


@dataclass(frozen=True)
class ServedVersion:
    """A version that can be run.

    model: ``owner/name``.
    base: the catalogue's version that does the work.
    defaults: inputs that a user's version pins; a request may still override them.
    label: of a version of the catalogue; None for that of a user's model.
    presets: those that are offered, where the version takes a preset of the bundle.
    """

    model: str
    id: str
    base: Version = field(repr=False)
    created_at: datetime = RELEASED
    defaults: Mapping[str, Any] = field(default_factory=dict)
    label: str | None = None
    presets: tuple[Preset, ...] = PRESETS

    @property
    def pin(self) -> str:
        """What a deployment stores of it: its label, or the id of a user's version.

        The id of a version of the catalogue would not do: it is a hash that changes with every
        release and all weights.
        """
        return self.label or self.id

    @property
    def schema(self) -> dict[str, Any]:
        """The OpenAPI document, with the pinned inputs as defaults and none of them required."""
        document = openapi_schema(self.base)
        schemas = document["components"]["schemas"]
        inputs = schemas["Input"]
        if schemas.get("preset", {}).get("enum") == list(PRESETS):
            pinned = self.defaults.get("preset")
            schemas["preset"]["enum"] = [n for n in PRESETS if n in self.presets or n == pinned]
        for name, value in self.defaults.items():
            if name in inputs["properties"]:
                inputs["properties"][name] = {**inputs["properties"][name], "default": value}
        required = [name for name in inputs.pop("required", ()) if name not in self.defaults]
        if required:
            inputs["required"] = required
        return document

    @property
    def obstacle(self) -> str:
        """Why it cannot run, as a sentence; empty if it can.

        Looked up again and again: whoever puts a file of weights into its place soon sees it.
        """
        return _obstacle(self.base, self._pinned, int(time.monotonic() / _LOOK_AGAIN_S))

    @property
    def remedy(self) -> str:
        """What its operator can do so that it runs, as a sentence; empty if it can."""
        return _remedy(self.base, self._pinned, int(time.monotonic() / _LOOK_AGAIN_S))

    @property
    def _pinned(self) -> str:
        return json.dumps(dict(self.defaults), sort_keys=True)

    def accepts(self, inputs: Mapping[str, Any]) -> bool:
        """Whether every input is known and none that is required is missing."""
        fields = self.base.fields
        required = {field.name for field in fields if field.required} - set(self.defaults)
        return required <= set(inputs) <= {field.name for field in fields}


@dataclass(frozen=True)
class ServedModel:
    """A model with its versions, the newest first.

    sort_key: sorts the catalogue's models first, then users' models, the newest first.
    row: the user's model; None for a model of the catalogue.
    """

    owner: str
    name: str
    description: str
    readme: str
    created_at: datetime
    versions: tuple[ServedVersion, ...]
    sort_key: SortKey
    row: UserModel | None = None

    @property
    def full_name(self) -> str:
        """``owner/name``."""
        return f"{self.owner}/{self.name}"

    @property
    def latest(self) -> ServedVersion | None:
        """The newest version; a user's model may have none yet."""
        return self.versions[0] if self.versions else None

    @property
    def obstacle(self) -> str:
        """Why its newest version cannot run, as a sentence; empty if it can."""
        return self.latest.obstacle if self.latest else ""

    @property
    def page(self) -> str:
        """Its README, and before that what is in the way of running it."""
        return "\n\n".join(filter(None, [self.obstacle, self.readme]))

    def version(self, reference: str) -> ServedVersion | None:
        """Return the version of an id, of at least eight digits of it, a label, or ``latest``."""
        if reference in ("", LATEST):
            return self.latest
        for version in self.versions:
            shortened = len(reference) >= _SHORTEST_ID and version.id.startswith(reference)
            if shortened or reference == version.label:
                return version
        return None


@dataclass(frozen=True)
class Library:
    """Finds models and versions for an account, which sees its own private models only.

    default_model: ``owner/name`` that a bare ``latest`` means where the inputs fit several.
    presets: that the bundles of the server can tell apart.
    """

    catalog: Catalog
    user_models: UserModels
    default_model: str | None = None
    presets: tuple[Preset, ...] = PRESETS

    def models(self, account_id: str | None, limit: int | None = None) -> Iterator[ServedModel]:
        """Yield the catalogue's models, then users' models that the account sees.

        The database is read only once the caller gets beyond the catalogue.

        Args:
            account_id: who asks; None sees public models only.
            limit: the most users' models, the newest.
        """
        yield from self._catalog_models
        yield from map(self._user_model, self.user_models.all(account_id, limit))

    def model(self, owner: str, name: str, account_id: str | None) -> ServedModel:
        """Return one model.

        Raises:
            ProblemError: there is none, or it is private to another account.
        """
        for model in self._catalog_models:
            if (model.owner, model.name) == (owner, name):
                return model
        found = self.user_models.named(owner, name, account_id)
        if found is None:
            raise not_found()
        return self._user_model(found)

    def version(
        self, owner: str, name: str, reference: str, account_id: str | None
    ) -> ServedVersion:
        """Return one version of one model.

        Raises:
            ProblemError: there is none.
        """
        found = self.model(owner, name, account_id).version(reference)
        if found is None:
            raise not_found("The specified version does not exist.")
        return found

    def deployed(self, deployment: Deployment, account_id: str) -> ServedVersion:
        """Return the version that a deployment pins.

        Raises:
            ProblemError: it is gone.
        """
        owner, _, name = deployment.model.partition("/")
        return self.version(owner, name, deployment.version, account_id)

    def resolve(
        self, reference: str, inputs: Mapping[str, Any], account_id: str | None
    ) -> ServedVersion:
        """Return what the ``version`` of a request stands for.

        It is an id, ``owner/name``, both with a colon between, or ``latest`` alone, which
        is all that the clients send of ``owner/name:latest``.

        Raises:
            ProblemError: it stands for nothing, or for several models alike.
        """
        full_name, _, version_id = reference.partition(":")
        if "/" in full_name:
            return self._named(full_name, version_id, account_id)
        if reference in ("", LATEST):
            return self._guess(inputs, account_id)
        for model in self._with_version(reference, account_id):
            if found := model.version(reference):
                return found
        raise bad_version()

    def search(self, query: str, account_id: str | None) -> list[tuple[float, ServedModel]]:
        """Return (score, model) of the models in which every word of a query occurs, best first.

        Of users' models the newest 1000 are searched. A word in the name counts three times
        one in the owner, and that twice one in the description.
        """
        words = query.lower().split()
        scored = ((_score(model, words), model) for model in self.models(account_id, MOST_SEARCHED))
        return sorted((pair for pair in scored if pair[0] > 0), key=lambda pair: -pair[0])

    def _with_version(self, reference: str, account_id: str | None) -> Iterator[ServedModel]:
        """Yield the models that may have a version of this id; those of users come last."""
        if len(reference) >= _SHORTEST_ID:
            yield from self._catalog_models
            yield from map(self._user_model, self.user_models.of_version(reference, account_id))

    def _named(self, full_name: str, reference: str, account_id: str | None) -> ServedVersion:
        owner, _, name = full_name.partition("/")
        try:
            return self.version(owner, name, reference, account_id)
        except ProblemError as error:
            raise bad_version() from error

    def _guess(self, inputs: Mapping[str, Any], account_id: str | None) -> ServedVersion:
        """Return the version that a bare ``latest`` means, judged by the inputs.

        The catalogue's models go before users' models, which accept the same inputs. Of the
        model's versions the one with the fewest inputs beside those given is taken: who writes
        ``latest`` wrote it against the version that was the latest then, and a later one may
        answer in another form.
        """
        runnable = [model for model in self.models(account_id) if model.latest]
        fitting = [m for m in runnable if any(each.accepts(inputs) for each in m.versions)]
        candidates = [model for model in fitting if model.row is None] or fitting
        if len(runnable) == 1:
            candidates = runnable
        if len(candidates) == 1:
            versions = candidates[0].versions
            accepting = [each for each in versions if each.accepts(inputs)] or versions
            return min(accepting, key=lambda each: len(each.base.fields))
        if self.default_model is not None:
            return self._named(self.default_model, LATEST, account_id)
        names = ", ".join(model.full_name for model in candidates or runnable)
        raise bad_version(
            f'"latest" alone does not tell which model is meant; it could be {names}. '
            "Use owner/name without :latest, or a version id."
        )

    @cached_property
    def _catalog_models(self) -> tuple[ServedModel, ...]:
        return tuple(
            ServedModel(
                owner=model.owner,
                name=model.name,
                description=model.description,
                readme=readme_of(model),
                created_at=RELEASED,
                versions=tuple(
                    ServedVersion(
                        model.reference, base.id, base, label=base.label, presets=self.presets
                    )
                    for base in model.versions
                ),
                sort_key=(1, -place, model.reference),
            )
            for place, model in enumerate(self.catalog.models)
        )

    @cached_property
    def _bases(self) -> Mapping[tuple[str, str], Version]:
        """The catalogue's versions by model and label, which outlive releases; ids do not."""
        return {
            (model.reference, base.label): base
            for model in self.catalog.models
            for base in model.versions
        }

    def _user_model(self, own: VersionedModel) -> ServedModel:
        """Return a user's model with those of its versions whose base is still in the catalogue."""
        row, versions = own
        return ServedModel(
            owner=row.owner,
            name=row.name,
            description=row.description,
            readme=row.readme,
            created_at=row.created_at,
            versions=tuple(
                ServedVersion(
                    each.model,
                    each.id,
                    base,
                    each.created_at,
                    each.defaults,
                    presets=self.presets,
                )
                for each in versions
                if (base := self._bases.get((each.base_model, each.base_label)))
            ),
            sort_key=(0, microseconds(row.created_at), row.full_name),
            row=row,
        )


def _score(model: ServedModel, words: Sequence[str]) -> float:
    texts = ((model.name, 6.0), (model.owner, 2.0), (model.description, 1.0), (model.readme, 0.2))
    scores = [sum(weight for text, weight in texts if word in text.lower()) for word in words]
    return 0.0 if 0.0 in scores else sum(scores) or 1.0


def readme_of(model: Model) -> str:
    """Return a page on a model of the catalogue: its inputs, and where tegula does otherwise."""
    lines = [f"# {model.reference}", "", model.description, ""]
    if model.remark:
        lines += [model.remark, ""]
    for version in model.versions:
        lines += [f"## Version {version.label}", "", f"`{version.id}`", ""]
        lines += ["| input | default | what it does |", "|---|---|---|"]
        for entry in version.fields:
            default = "required" if entry.required else entry.default
            remark = f" ({entry.fidelity}: {entry.remark})" if entry.remark else ""
            lines.append(f"| `{entry.name}` | {default} | {entry.description}{remark} |")
        lines.append("")
    return "\n".join(lines)
