"""Models on offer and the JSON objects that describe them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from typing import Any

from tegula.catalog import Catalog, Model, Version, openapi_schema
from tegula.server.accounts import UserModels
from tegula.server.api.errors import ProblemError, bad_version, not_found
from tegula.server.db import Account, Deployment, FileRecord, UserModel, UserVersion
from tegula.server.links import Links, timestamp

# Every model the API offers: those of the catalogue, and presets that users made of them.

LATEST = "latest"
RELEASED = datetime(2026, 11, 22, tzinfo=timezone.utc)
"""When the models of the catalogue are said to have been made; they carry no date."""

_SHORTEST_PREFIX = 8


@dataclass(frozen=True)
class Edition:
    """A version that can be run.

    base: the catalogue's version that does the work. defaults: inputs that it pins.
    """

    model: str
    id: str
    base: Version = field(repr=False)
    created_at: datetime = RELEASED
    defaults: Mapping[str, Any] = field(default_factory=dict)

    @property
    def schema(self) -> dict[str, Any]:
        """The OpenAPI document, with the pinned inputs as defaults and none of them required."""
        document = openapi_schema(self.base)
        inputs = document["components"]["schemas"]["Input"]
        for name, value in self.defaults.items():
            if name in inputs["properties"]:
                inputs["properties"][name] = {**inputs["properties"][name], "default": value}
        required = [name for name in inputs.get("required", ()) if name not in self.defaults]
        inputs.pop("required", None)
        if required:
            inputs["required"] = required
        return document


@dataclass(frozen=True)
class Entry:
    """A model with all its editions, the newest first.

    user_model: the row behind it; None for a model of the catalogue.
    """

    owner: str
    name: str
    description: str
    readme: str
    created_at: datetime
    editions: tuple[Edition, ...]
    user_model: UserModel | None = None

    @property
    def full_name(self) -> str:
        """``owner/name``."""
        return f"{self.owner}/{self.name}"

    @property
    def latest(self) -> Edition | None:
        """The newest edition; a user's model may have none yet."""
        return self.editions[0] if self.editions else None

    def edition(self, wanted: str) -> Edition | None:
        """Return the edition of an id, of at least eight digits of it, or of ``latest``."""
        if wanted in ("", LATEST):
            return self.latest
        return next((known for known in self.editions if _names(wanted, known.id)), None)


@dataclass(frozen=True)
class Library:
    """Finds models and versions for an account; private ones only for their owner.

    default_model: what a bare ``latest`` means when the inputs do not tell.
    """

    catalog: Catalog
    user_models: UserModels
    default_model: str | None = None

    def entries(self, account_id: str | None) -> tuple[Entry, ...]:
        """Return every model that an account may see, the catalogue's first."""
        own = map(self._user_entry, self.user_models.all(account_id))
        return (*map(_catalog_entry, self.catalog.models), *own)

    def entry(self, owner: str, name: str, account_id: str | None) -> Entry:
        """Return one model.

        Raises:
            ProblemError: there is none, or it is somebody else's secret.
        """
        for model in self.catalog.models:
            if (model.owner, model.name) == (owner, name):
                return _catalog_entry(model)
        model_row = self.user_models.get(owner, name)
        entry = self._user_entry(model_row) if model_row else None
        if entry is None or not _visible(entry, account_id):
            raise not_found()
        return entry

    def edition(self, owner: str, name: str, wanted: str, account_id: str | None) -> Edition:
        """Return one version of one model.

        Raises:
            ProblemError: there is none.
        """
        found = self.entry(owner, name, account_id).edition(wanted)
        if found is None:
            raise not_found("The specified version does not exist.")
        return found

    def resolve(self, reference: str, inputs: Mapping[str, Any], account_id: str | None) -> Edition:
        """Return what the ``version`` of a request stands for.

        It is an id, ``owner/name``, both with a colon between, or ``latest`` alone, which
        is all that the clients send of ``owner/name:latest``.

        Raises:
            ProblemError: it stands for nothing, or for several models alike.
        """
        name, _, wanted = reference.partition(":")
        if "/" in name:
            owner, _, model = name.partition("/")
            return self._named(owner, model, wanted, account_id)
        if reference in ("", LATEST):
            return self._guessed(inputs, account_id)
        for entry in self.entries(account_id):
            if len(reference) >= _SHORTEST_PREFIX and (found := entry.edition(reference)):
                return found
        raise bad_version()

    def _named(self, owner: str, name: str, wanted: str, account_id: str | None) -> Edition:
        known = (entry for entry in self.entries(account_id))
        for entry in known:
            if (entry.owner, entry.name) == (owner, name) and (found := entry.edition(wanted)):
                return found
        raise bad_version()

    def _guessed(self, inputs: Mapping[str, Any], account_id: str | None) -> Edition:
        """Tell by the inputs which model was meant.

        Of its versions the one with the fewest inputs beside those given is taken: who
        writes ``latest`` wrote it against the version that was the latest then, and a
        later one may answer in another form.
        """
        runnable = [entry for entry in self.entries(account_id) if entry.latest]
        fitting = _own_first([entry for entry in runnable if _fits(entry, inputs)])
        chosen = runnable if len(runnable) == 1 else fitting
        if len(chosen) == 1:
            fits = [known for known in chosen[0].editions if _takes(known, inputs)]
            return min(fits or chosen[0].editions, key=lambda known: len(known.base.fields))
        if self.default_model is not None:
            owner, _, name = self.default_model.partition("/")
            return self._named(owner, name, LATEST, account_id)
        raise _ambiguous(fitting or runnable)

    def _user_entry(self, model: UserModel) -> Entry:
        editions = (
            self._user_edition(version) for version in self.user_models.versions(model.full_name)
        )
        return Entry(
            owner=model.owner,
            name=model.name,
            description=model.description,
            readme=model.readme,
            created_at=model.created_at,
            editions=tuple(edition for edition in editions if edition),
            user_model=model,
        )

    def _user_edition(self, version: UserVersion) -> Edition | None:
        """Return the edition, unless the version below it is no longer in the catalogue."""
        for model in self.catalog.models:
            for base in model.versions:
                if model.reference == version.base_model and base.id == version.base_version:
                    return Edition(
                        version.model, version.id, base, version.created_at, version.defaults
                    )
        return None


def search(entries: Sequence[Entry], query: str) -> list[tuple[float, Entry]]:
    """Return the models that all words of a query are found in, the best first.

    A word in the name counts three times one in the owner, and that twice one in the
    description.
    """
    words = query.lower().split()
    scored = [(_score(entry, words), entry) for entry in entries]
    found = [(score, entry) for score, entry in scored if score > 0]
    return sorted(found, key=lambda pair: -pair[0])


def _score(entry: Entry, words: Sequence[str]) -> float:
    fields = ((entry.name, 6.0), (entry.owner, 2.0), (entry.description, 1.0), (entry.readme, 0.2))
    scores = [sum(weight for text, weight in fields if word in text.lower()) for word in words]
    return 0.0 if 0.0 in scores else sum(scores) or 1.0


def _catalog_entry(model: Model) -> Entry:
    editions = tuple(Edition(model.reference, base.id, base) for base in model.versions)
    return Entry(
        owner=model.owner,
        name=model.name,
        description=model.description,
        readme=readme_of(model),
        created_at=RELEASED,
        editions=editions,
    )


def readme_of(model: Model) -> str:
    """Return a page on a model of the catalogue: its inputs, and what is done otherwise."""
    lines = [f"# {model.reference}", "", model.description, ""]
    if model.remark:
        lines += [model.remark, ""]
    for version in model.versions:
        lines += [f"## Version {version.label}", "", f"`{version.id}`", ""]
        lines += ["| input | default | what it does |", "|---|---|---|"]
        for known in version.fields:
            default = "required" if known.required else known.default
            remark = f" ({known.fidelity}: {known.remark})" if known.remark else ""
            lines.append(f"| `{known.name}` | {default} | {known.description}{remark} |")
        lines.append("")
    return "\n".join(lines)


def _names(wanted: str, version_id: str) -> bool:
    return len(wanted) >= _SHORTEST_PREFIX and version_id.startswith(wanted)


def _visible(entry: Entry, account_id: str | None) -> bool:
    row = entry.user_model
    return row is None or row.visibility == "public" or row.account_id == account_id


def _fits(entry: Entry, inputs: Mapping[str, Any]) -> bool:
    return any(_takes(edition, inputs) for edition in entry.editions)


def _takes(edition: Edition, inputs: Mapping[str, Any]) -> bool:
    """Whether an edition knows every input that is given, and is given all it needs."""
    fields = edition.base.fields
    names = {known.name for known in fields}
    needed = {known.name for known in fields if known.required} - set(edition.defaults)
    return set(inputs) <= names and needed <= set(inputs)


def _own_first(fitting: Sequence[Entry]) -> list[Entry]:
    """Return the models of the catalogue, or where there is none, those made from them."""
    own = [entry for entry in fitting if entry.user_model is None]
    return own or list(fitting)


def _ambiguous(candidates: Sequence[Entry]) -> ProblemError:
    names = ", ".join(entry.full_name for entry in candidates)
    return bad_version(
        f'"latest" alone does not tell which model is meant; it could be {names}. '
        "Use owner/name without :latest, or a version id."
    )


# The JSON objects of the API other than predictions.

COG_VERSION = "0.16.0"
"""Clients parse it; the schemas have the form that this version writes."""

SUPER_RESOLUTION = {
    "slug": "super-resolution",
    "name": "Super resolution",
    "description": "Models that make pictures larger and better.",
}


def account_object(account: Account) -> dict[str, Any]:
    """Return an account."""
    return {
        "type": account.kind,
        "username": account.username,
        "name": account.name or account.username,
        "github_url": None,
        "avatar_url": None,
    }


def version_object(edition: Edition) -> dict[str, Any]:
    """Return a version with its OpenAPI schema."""
    return {
        "id": edition.id,
        "created_at": timestamp(edition.created_at),
        "cog_version": COG_VERSION,
        "openapi_schema": edition.schema,
    }


def model_object(entry: Entry, base: str, run_count: int, example: Any = None) -> dict[str, Any]:
    """Return a model.

    Args:
        entry: the model.
        base: the public URL of the server.
        run_count: predictions that were asked of it.
        example: the object of a shared prediction, if there is one.
    """
    row = entry.user_model
    return {
        "url": f"{base}/{entry.full_name}",
        "owner": entry.owner,
        "name": entry.name,
        "description": entry.description,
        "visibility": row.visibility if row else "public",
        "is_official": row is None,
        "github_url": row.github_url if row else None,
        "paper_url": row.paper_url if row else None,
        "license_url": row.license_url if row else None,
        "run_count": run_count,
        "cover_image_url": row.cover_image_url if row else None,
        "default_example": example,
        "latest_version": version_object(entry.latest) if entry.latest else None,
        "created_at": timestamp(entry.created_at),
    }


def file_object(file: FileRecord, links: Links) -> dict[str, Any]:
    """Return an upload; ``etag`` is among what the Python client insists on."""
    return {
        "id": file.id,
        "name": file.name,
        "content_type": file.content_type,
        "size": file.size,
        "etag": file.md5,
        "checksums": {"sha256": file.sha256, "md5": file.md5},
        "metadata": dict(file.metadata),
        "created_at": timestamp(file.created_at),
        "expires_at": timestamp(file.expires_at),
        "urls": {"get": links.file(file.id)},
    }


def deployment_object(deployment: Deployment, creator: Account) -> dict[str, Any]:
    """Return a deployment; ``defaults`` is ours."""
    return {
        "owner": deployment.owner,
        "name": deployment.name,
        "current_release": {
            "number": deployment.number,
            "model": deployment.model,
            "version": deployment.version,
            "created_at": timestamp(deployment.created_at),
            "created_by": account_object(creator),
            "configuration": {
                "hardware": deployment.hardware,
                "min_instances": deployment.min_instances,
                "max_instances": deployment.max_instances,
            },
            "defaults": dict(deployment.defaults),
        },
    }


def collection_object(collection: Mapping[str, str]) -> dict[str, Any]:
    """Return a collection as lists show it."""
    return {key: collection[key] for key in ("name", "slug", "description")}
