"""Models and deployments over HTTP."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request, Response
from fastapi.responses import JSONResponse, PlainTextResponse

from tegula.catalog import InvalidInputsError, validate
from tegula.errors import ConflictError
from tegula.server.api.bodies import (
    DeploymentBody,
    DeploymentChange,
    ModelBody,
    ModelChange,
    TrainingBody,
    VersionBody,
)
from tegula.server.api.errors import InvalidField, ProblemError, bad_version, invalid, not_found
from tegula.server.api.gate import Caller
from tegula.server.api.library import (
    Edition,
    Entry,
    deployment_object,
    model_object,
    search,
    version_object,
)
from tegula.server.api.service import Asking, Cursor, Service, Serving, page_of
from tegula.server.db import Deployment, UserModel, UserVersion

# Checks that models and deployments share.


def check_hardware(service: Service, sku: str) -> None:
    """Refuse hardware that is not here.

    Raises:
        ProblemError: names what there is.
    """
    known = [device.sku for device in service.hardware]
    if sku not in known:
        listed = ", ".join(f'"{one}"' for one in known)
        wrong = f"hardware must be one of the following: {listed}"
        raise invalid(InvalidField("enum", "hardware", wrong))


def check_defaults(base: Edition, defaults: Mapping[str, Any]) -> None:
    """Refuse defaults that no request could be valid with.

    Raises:
        ProblemError: names every one of them.
    """
    needed = {known.name: "" for known in base.base.fields if known.required}
    try:
        unknown = validate(base.base, {**needed, **defaults}).warnings
    except InvalidInputsError as error:
        wrong = [
            InvalidField(one.type, one.field.replace("input", "defaults", 1), one.description)
            for one in error.fields
        ]
        raise invalid(*wrong) from error
    if unknown:
        raise invalid(InvalidField("additional_property_not_allowed", "defaults", unknown[0]))


# Models and their versions: list, find, read, and presets of one's own.

router = APIRouter(prefix="/v1", tags=["models"])

_PAGE = 25
_LONGEST_QUERY = 1000


@router.get("/models")
def list_models(
    request: Request,
    service: Serving,
    caller: Asking,
    cursor: Cursor = None,
    sort_by: Literal["model_created_at", "latest_version_created_at"] | None = None,
    sort_direction: Literal["asc", "desc"] = "desc",
    query: Annotated[str | None, Query(description="Only models that this finds.")] = None,
) -> JSONResponse:
    """List the models; `query` stands in for the QUERY method where a proxy blocks it."""
    if query is not None:
        return _found(request, service, caller, query, cursor)
    entries = list(service.library.entries(caller.account.id))
    if sort_by is not None:
        latest = sort_by == "latest_version_created_at"
        entries.sort(
            key=lambda entry: entry.latest.created_at if latest and entry.latest
            else entry.created_at,
            reverse=sort_direction == "desc",
        )  # fmt: skip
    return _page(request, service, entries, cursor)


@router.api_route("/models", methods=["QUERY"], include_in_schema=False)
async def query_models(
    request: Request, service: Serving, caller: Asking, cursor: Cursor = None
) -> Response:
    """Search the models; the body is plain text, which some clients put in quotes."""
    words = (await request.body())[: 4 * _LONGEST_QUERY].decode("utf-8", "replace").strip()
    if len(words) > 1 and words[0] == words[-1] == '"':
        words = words[1:-1]
    return await service.run(_found, request, service, caller, words, cursor)


@router.post("/models", status_code=201)
def create_model(service: Serving, caller: Asking, body: ModelBody) -> JSONResponse:
    """Create a model of your own; its versions are presets over those that are here."""
    _check_owner(caller, body.owner)
    check_hardware(service, body.hardware)
    if any((body.owner, body.name) == (m.owner, m.name) for m in service.library.catalog.models):
        raise ConflictError(f"{body.owner}/{body.name} exists already.")
    made = UserModel(
        account_id=caller.account.id, created_at=service.store.clock(), **body.model_dump()
    )
    service.store.models.create(made)
    return JSONResponse(_told(service, _entry(service, caller, body.owner, body.name)), 201)


@router.get("/models/{owner}/{name}")
def get_model(service: Serving, caller: Asking, owner: str, name: str) -> JSONResponse:
    """Get a model."""
    return JSONResponse(_told(service, _entry(service, caller, owner, name)))


@router.patch("/models/{owner}/{name}")
def update_model(
    service: Serving, caller: Asking, owner: str, name: str, body: ModelChange
) -> JSONResponse:
    """Change the texts of a model of yours."""
    _own(service, caller, owner, name)
    changes = body.model_dump(exclude_unset=True)
    texts = {key: value or "" for key, value in changes.items() if key in _TEXTS}
    service.store.models.update(owner, name, {**changes, **texts})
    return JSONResponse(_told(service, _entry(service, caller, owner, name)))


@router.delete("/models/{owner}/{name}", status_code=204)
def delete_model(service: Serving, caller: Asking, owner: str, name: str) -> Response:
    """Delete a private model of yours that has no versions."""
    if _own(service, caller, owner, name).visibility != "private":
        raise ProblemError(403, "Only private models can be deleted.", "Forbidden")
    service.store.models.delete(owner, name)
    return Response(status_code=204)


@router.get("/models/{owner}/{name}/readme")
def get_readme(service: Serving, caller: Asking, owner: str, name: str) -> PlainTextResponse:
    """Get what a model says of itself, in Markdown."""
    readme = _entry(service, caller, owner, name).readme
    if not readme:
        raise not_found("This model has no README.")
    return PlainTextResponse(readme)


@router.get("/models/{owner}/{name}/examples")
def list_examples(
    request: Request,
    service: Serving,
    caller: Asking,
    owner: str,
    name: str,
    cursor: Cursor = None,
) -> JSONResponse:
    """List the predictions of a model that their owners share."""
    entry = _entry(service, caller, owner, name)
    page = service.store.predictions.shared_page(entry.full_name, cursor=cursor)
    told = [service.told_to_all(item) for item in page.items]
    return JSONResponse(service.page(request, page, told))


@router.get("/models/{owner}/{name}/versions")
def list_versions(
    request: Request,
    service: Serving,
    caller: Asking,
    owner: str,
    name: str,
    cursor: Cursor = None,
) -> JSONResponse:
    """List the versions of a model, newest first."""
    editions = _entry(service, caller, owner, name).editions
    page = page_of(editions, lambda edition: edition.id, cursor, _PAGE)
    return JSONResponse(service.page(request, page, [*map(version_object, page.items)]))


@router.post("/models/{owner}/{name}/versions", status_code=201)
def create_version(
    service: Serving, caller: Asking, owner: str, name: str, body: VersionBody
) -> JSONResponse:
    """Add a version to a model of yours: a version that is here, with other defaults."""
    model = _own(service, caller, owner, name)
    base = service.library.resolve(body.base, {}, caller.account.id)
    defaults = {**base.defaults, **body.defaults}
    check_defaults(base, defaults)
    content = json.dumps([model.full_name, base.base.id, defaults], sort_keys=True)
    version = UserVersion(
        id=hashlib.sha256(content.encode()).hexdigest(),
        model=model.full_name,
        base_model=base.base.name,
        base_version=base.base.id,
        defaults=defaults,
        created_at=service.store.clock(),
    )
    service.store.models.add_version(version)
    edition = service.library.edition(owner, name, version.id, caller.account.id)
    return JSONResponse(version_object(edition), 201)


@router.get("/models/{owner}/{name}/versions/{version_id}")
def get_version(
    service: Serving, caller: Asking, owner: str, name: str, version_id: str
) -> JSONResponse:
    """Get a version by its id, by at least eight digits of it, or `latest`."""
    edition = service.library.edition(owner, name, version_id, caller.account.id)
    return JSONResponse(version_object(edition))


@router.delete("/models/{owner}/{name}/versions/{version_id}", status_code=202)
def delete_version(
    service: Serving, caller: Asking, owner: str, name: str, version_id: str
) -> Response:
    """Delete a version of a model of yours."""
    _own(service, caller, owner, name)
    edition = service.library.edition(owner, name, version_id, caller.account.id)
    service.store.models.delete_version(edition.id)
    return Response(status_code=202)


@router.post("/models/{owner}/{name}/versions/{version_id}/trainings", tags=["trainings"])
def create_training(
    service: Serving, caller: Asking, owner: str, name: str, version_id: str, body: TrainingBody
) -> JSONResponse:
    """Refuse: no model here can be trained."""
    service.library.edition(owner, name, version_id, caller.account.id)
    raise ProblemError(
        422, f"{owner}/{name} does not support training; {body.destination} stays as it is."
    )


_TEXTS = ("description", "readme")


def _entry(service: Service, caller: Caller, owner: str, name: str) -> Entry:
    return service.library.entry(owner, name, caller.account.id)


def _own(service: Service, caller: Caller, owner: str, name: str) -> UserModel:
    model = _entry(service, caller, owner, name).user_model
    if model is None or model.account_id != caller.account.id:
        raise ProblemError(403, f"{owner}/{name} is not yours to change.", "Forbidden")
    return model


def _check_owner(caller: Caller, owner: str) -> None:
    if owner != caller.account.username:
        wrong = f"owner must be {caller.account.username}, the account of the token"
        raise invalid(InvalidField("enum", "owner", wrong))


def _told(service: Service, entry: Entry) -> dict[str, Any]:
    count = service.store.predictions.run_counts().get(entry.full_name, 0)
    example = service.store.predictions.shared_page(entry.full_name, limit=1).items
    shown = service.told_to_all(example[0]) if example else None
    return model_object(entry, service.settings.public_url, count, shown)


def _page(
    request: Request, service: Service, entries: list[Entry], cursor: str | None
) -> JSONResponse:
    page = page_of(entries, lambda entry: entry.full_name, cursor, _PAGE)
    counts, base = service.store.predictions.run_counts(), service.settings.public_url
    told = [model_object(item, base, counts.get(item.full_name, 0)) for item in page.items]
    return JSONResponse(service.page(request, page, told))


def _found(
    request: Request, service: Service, caller: Caller, query: str, cursor: str | None
) -> JSONResponse:
    found = search(service.library.entries(caller.account.id), query)
    return _page(request, service, [entry for _, entry in found], cursor)


# Deployments: a model version under a name of its own, with pinned inputs.

deployments_router = APIRouter(prefix="/v1/deployments", tags=["deployments"])


@deployments_router.get("")
def list_deployments(
    request: Request, service: Serving, caller: Asking, cursor: Cursor = None
) -> JSONResponse:
    """List your deployments, newest first."""
    every = service.store.deployments.all(caller.account.id)
    page = page_of(every, lambda deployment: deployment.full_name, cursor, _PAGE)
    told = [deployment_object(item, caller.account) for item in page.items]
    return JSONResponse(service.page(request, page, told))


@deployments_router.post("")
def create_deployment(service: Serving, caller: Asking, body: DeploymentBody) -> JSONResponse:
    """Pin a version, and how many of its predictions run at once."""
    edition = _edition(service, body.model, body.version, caller.account.id)
    _check(service, edition, body.model_dump())
    made = Deployment(
        owner=caller.account.username,
        account_id=caller.account.id,
        number=1,
        created_at=service.store.clock(),
        **{**body.model_dump(), "version": edition.id},
    )
    return JSONResponse(deployment_object(service.store.deployments.create(made), caller.account))


@deployments_router.get("/{owner}/{name}")
def get_deployment(service: Serving, caller: Asking, owner: str, name: str) -> JSONResponse:
    """Get a deployment."""
    found = service.deployment(owner, name, caller.account.id)
    return JSONResponse(deployment_object(found, caller.account))


@deployments_router.patch("/{owner}/{name}")
def update_deployment(
    service: Serving, caller: Asking, owner: str, name: str, body: DeploymentChange
) -> JSONResponse:
    """Make a new release with what is given changed."""
    before = service.deployment(owner, name, caller.account.id)
    given = {key: value for key, value in body.model_dump().items() if value is not None}
    after = dataclasses.replace(before, **given)
    edition = _edition(service, after.model, after.version, caller.account.id)
    after = dataclasses.replace(after, version=edition.id)
    _check(service, edition, vars(after))
    updated = service.store.deployments.update(after)
    return JSONResponse(deployment_object(updated, caller.account))


@deployments_router.delete("/{owner}/{name}", status_code=204)
def delete_deployment(service: Serving, caller: Asking, owner: str, name: str) -> Response:
    """Delete a deployment; what was asked of it still runs."""
    service.deployment(owner, name, caller.account.id)
    service.store.deployments.delete(owner, name)
    return Response(status_code=204)


def _edition(service: Service, model: str, version: str, account_id: str) -> Edition:
    """Return the edition of a model that a version names, however it names it."""
    wanted = version.rpartition(":")[2] if "/" in version else version
    if version == model:
        wanted = ""
    owner, _, name = model.partition("/")
    found = service.library.entry(owner, name, account_id).edition(wanted)
    if found is None:
        raise bad_version()
    return found


def _check(service: Service, edition: Edition, asked: Mapping[str, Any]) -> None:
    check_hardware(service, asked["hardware"])
    check_defaults(edition, {**edition.defaults, **asked["defaults"]})
    if asked["min_instances"] > asked["max_instances"] > 0:
        wrong = "Must be at least min_instances"
        raise invalid(InvalidField("number_gte", "max_instances", wrong))
