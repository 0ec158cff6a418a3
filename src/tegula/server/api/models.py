"""Models and their versions over HTTP: list, find, read, and presets of the caller's own."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request, Response
from fastapi.responses import JSONResponse, PlainTextResponse

from tegula.catalog import InvalidField, InvalidInputsError, validate
from tegula.errors import ConflictError
from tegula.server.api.answers import (
    SUPER_RESOLUTION,
    CollectionAnswer,
    CollectionWithModelsAnswer,
    FoundCollection,
    FoundMetadata,
    FoundModel,
    ModelAnswer,
    PageAnswer,
    SearchAnswer,
    VersionAnswer,
    model_answer,
    respond,
    version_answer,
)
from tegula.server.api.bodies import ModelBody, ModelChange, TrainingBody, VersionBody
from tegula.server.api.errors import ProblemError, invalid, not_found, problems
from tegula.server.api.gate import Caller
from tegula.server.api.library import (
    MOST_SEARCHED,
    ServedModel,
    ServedVersion,
)
from tegula.server.api.receiving import JsonRoute
from tegula.server.api.service import CallerDep, Cursor, Service, ServiceDep
from tegula.server.db import Page, SortKey, microseconds, paginate
from tegula.server.links import PredictionAnswer
from tegula.server.tables import UserModel, UserVersion

router = APIRouter(prefix="/v1", tags=["models"], route_class=JsonRoute, strict_content_type=False)

PAGE = 25
_MOST_FOUND = 50
LONGEST_QUERY = 1000

Words = Annotated[str | None, Query(description="Words to look for.", max_length=LONGEST_QUERY)]

_QUERY: dict[str, Any] = {
    "requestBody": {
        "content": {
            "text/plain": {
                "schema": {"type": "string", "description": "Words to look for."},
                "example": "upscale faces",
            }
        },
    }
}


@router.get("/models", operation_id="models.list", response_model=PageAnswer[ModelAnswer])
def list_models(
    request: Request,
    service: ServiceDep,
    caller: CallerDep,
    cursor: Cursor = None,
    sort_by: Literal["model_created_at", "latest_version_created_at"] | None = None,
    sort_direction: Literal["asc", "desc"] = "desc",
    query: Words = None,
) -> JSONResponse:
    """List the models; `query` stands in for the QUERY method where a proxy blocks it."""
    if query is not None:
        return _search_page(request, service, caller, query, cursor)

    def key(model: ServedModel) -> SortKey:
        if sort_by is None:
            return model.sort_key
        latest = model.latest if sort_by == "latest_version_created_at" else None
        at = microseconds(latest.created_at if latest else model.created_at)
        return (at if sort_direction == "desc" else -at, *model.sort_key)

    models = list(service.library.models(caller.account.id))
    return _models_page(request, service, paginate(models, key, cursor=cursor, limit=PAGE))


@router.api_route(
    "/models",
    methods=["QUERY"],
    operation_id="models.search",
    response_model=PageAnswer[ModelAnswer],
    openapi_extra=_QUERY,
)
async def query_models(
    request: Request, service: ServiceDep, caller: CallerDep, cursor: Cursor = None
) -> Response:
    """Search the models; the body is plain text, which some clients put in quotes."""
    query = (await request.body())[: 4 * LONGEST_QUERY].decode("utf-8", "replace").strip()
    if len(query) > 1 and query[0] == query[-1] == '"':
        query = query[1:-1]
    query = query[:LONGEST_QUERY]
    return await service.run(_search_page, request, service, caller, query, cursor)


@router.get("/search", operation_id="search", response_model=SearchAnswer)
def search(
    service: ServiceDep,
    caller: CallerDep,  # noqa: ARG001
    query: Words = None,
    limit: Annotated[int, Query(ge=1, le=_MOST_FOUND)] = 20,
) -> JSONResponse:
    """Search public models and collections."""
    if not query:
        raise ProblemError(400, 'Query parameter "query" is required')
    found = service.library.search(query, None)[:limit]
    counts = _run_counts(service, [model for _, model in found])
    shown = [(score, _shown(service, model, counts)) for score, model in found]
    models = [
        FoundModel(
            model=model,
            metadata=FoundMetadata(
                generated_description=model.description, tags=["super-resolution"], score=score
            ),
        )
        for score, model in shown
    ]
    all_here = SUPER_RESOLUTION.as_json()
    text = " ".join(all_here.values()).lower()
    collections = []
    if all(word in text for word in query.lower().split()):
        names = [model.full_name for model in service.library.models(None, MOST_SEARCHED)]
        collections = [FoundCollection(**all_here, models=names)]
    return respond(SearchAnswer(query=query, models=models, collections=collections, pages=[]))


@router.get(
    "/collections", operation_id="collections.list", response_model=PageAnswer[CollectionAnswer]
)
def list_collections(request: Request, service: ServiceDep, caller: CallerDep) -> JSONResponse:  # noqa: ARG001
    """List the collections: there is one, of everything here."""
    page = Page((SUPER_RESOLUTION,))
    return respond(service.page_answer(request, page, lambda collection: collection))


@router.get(
    "/collections/{slug}",
    operation_id="collections.get",
    response_model=CollectionWithModelsAnswer,
    responses=problems(404),
)
def get_collection(service: ServiceDep, caller: CallerDep, slug: str) -> JSONResponse:
    """Get a collection with its models."""
    if slug != SUPER_RESOLUTION.slug:
        raise not_found()
    models = list(service.library.models(caller.account.id))
    counts = _run_counts(service, models)
    return respond(
        CollectionWithModelsAnswer(
            **SUPER_RESOLUTION.as_json(),
            full_description=SUPER_RESOLUTION.description,
            models=[_shown(service, model, counts) for model in models],
        )
    )


@router.post(
    "/models",
    status_code=201,
    operation_id="models.create",
    response_model=ModelAnswer,
    responses=problems(409),
)
def create_model(service: ServiceDep, caller: CallerDep, body: ModelBody) -> JSONResponse:
    """Create a model of your own; its versions are presets over those that are here."""
    if body.owner != caller.account.username:
        expected = f"owner must be {caller.account.username}, the account of the token"
        raise invalid(InvalidField("enum", "owner", expected))
    check_hardware(service, body.hardware)
    full_name = f"{body.owner}/{body.name}"
    if any(full_name == model.reference for model in service.library.catalog.models):
        raise ConflictError(f"{full_name} exists already.")
    row = UserModel(
        account_id=caller.account.id, created_at=service.store.clock(), **body.model_dump()
    )
    service.store.models.create(row)
    return respond(_in_full(service, _model(service, caller, body.owner, body.name)), 201)


@router.get(
    "/models/{owner}/{name}",
    operation_id="models.get",
    response_model=ModelAnswer,
    responses=problems(404),
)
def get_model(service: ServiceDep, caller: CallerDep, owner: str, name: str) -> JSONResponse:
    """Get a model."""
    return respond(_in_full(service, _model(service, caller, owner, name)))


@router.patch(
    "/models/{owner}/{name}",
    operation_id="models.update",
    response_model=ModelAnswer,
    responses=problems(403, 404),
)
def update_model(
    service: ServiceDep, caller: CallerDep, owner: str, name: str, body: ModelChange
) -> JSONResponse:
    """Change the texts of a model of yours."""
    _own_model(service, caller, owner, name)
    changes = body.model_dump(exclude_unset=True)
    service.store.models.update(owner, name, changes)
    return respond(_in_full(service, _model(service, caller, owner, name)))


@router.delete(
    "/models/{owner}/{name}",
    status_code=204,
    operation_id="models.delete",
    responses=problems(403, 404, 409),
)
def delete_model(service: ServiceDep, caller: CallerDep, owner: str, name: str) -> Response:
    """Delete a private model of yours that has no versions."""
    if _own_model(service, caller, owner, name).visibility != "private":
        raise ProblemError(403, "Only private models can be deleted.", "Forbidden")
    service.store.models.delete(owner, name)
    return Response(status_code=204)


@router.get(
    "/models/{owner}/{name}/readme",
    operation_id="models.readme.get",
    response_class=PlainTextResponse,
    responses=problems(404),
)
def get_readme(service: ServiceDep, caller: CallerDep, owner: str, name: str) -> PlainTextResponse:
    """Get the README of a model, in Markdown."""
    readme = _model(service, caller, owner, name).page
    if not readme:
        raise not_found("This model has no README.")
    return PlainTextResponse(readme)


@router.get(
    "/models/{owner}/{name}/examples",
    operation_id="models.examples.list",
    response_model=PageAnswer[PredictionAnswer],
    responses=problems(404),
)
def list_examples(
    request: Request,
    service: ServiceDep,
    caller: CallerDep,
    owner: str,
    name: str,
    cursor: Cursor = None,
) -> JSONResponse:
    """List the predictions of a model that their owners share."""
    model = _model(service, caller, owner, name)
    page = service.store.predictions.shared_page(model.full_name, cursor=cursor)
    return respond(service.page_answer(request, page, service.shared_prediction))


@router.get(
    "/models/{owner}/{name}/versions",
    operation_id="models.versions.list",
    response_model=PageAnswer[VersionAnswer],
    responses=problems(404),
)
def list_versions(
    request: Request,
    service: ServiceDep,
    caller: CallerDep,
    owner: str,
    name: str,
    cursor: Cursor = None,
) -> JSONResponse:
    """List the versions of a model, newest first."""
    versions = _model(service, caller, owner, name).versions

    def key(version: ServedVersion) -> SortKey:
        # Versions of the catalogue have one date; of those the order says which is newer.
        place = 0 if version.label is None else versions.index(version)
        return microseconds(version.created_at), -place, version.id

    page = paginate(versions, key, cursor=cursor, limit=PAGE)
    return respond(service.page_answer(request, page, version_answer))


@router.post(
    "/models/{owner}/{name}/versions",
    status_code=201,
    operation_id="models.versions.create",
    response_model=VersionAnswer,
    responses=problems(403, 404, 409),
)
def create_version(
    service: ServiceDep, caller: CallerDep, owner: str, name: str, body: VersionBody
) -> JSONResponse:
    """Add a version to a model of yours: a version that is here, with other defaults."""
    model = _own_model(service, caller, owner, name)
    base = service.library.resolve(body.base, {}, caller.account.id)
    defaults = {**base.defaults, **body.defaults}
    check_defaults(base, defaults)
    label = base.base.label
    content = json.dumps([model.full_name, base.base.name, label, defaults], sort_keys=True)
    row = UserVersion(
        id=hashlib.sha256(content.encode()).hexdigest(),
        model=model.full_name,
        base_model=base.base.name,
        base_label=label,
        defaults=defaults,
        created_at=service.store.clock(),
    )
    service.store.models.add_version(row)
    version = service.library.version(owner, name, row.id, caller.account.id)
    return respond(version_answer(version), 201)


@router.get(
    "/models/{owner}/{name}/versions/{version_id}",
    operation_id="models.versions.get",
    response_model=VersionAnswer,
    responses=problems(404),
)
def get_version(
    service: ServiceDep, caller: CallerDep, owner: str, name: str, version_id: str
) -> JSONResponse:
    """Get a version by its id, by at least eight digits of it, or `latest`."""
    version = service.library.version(owner, name, version_id, caller.account.id)
    return respond(version_answer(version))


@router.delete(
    "/models/{owner}/{name}/versions/{version_id}",
    status_code=202,
    operation_id="models.versions.delete",
    response_class=Response,
    responses={202: {"description": "Deleted"}, **problems(403, 404)},
)
def delete_version(
    service: ServiceDep, caller: CallerDep, owner: str, name: str, version_id: str
) -> Response:
    """Delete a version of a model of yours."""
    _own_model(service, caller, owner, name)
    version = service.library.version(owner, name, version_id, caller.account.id)
    service.store.models.delete_version(version.id)
    return Response(status_code=202)


@router.post(
    "/models/{owner}/{name}/versions/{version_id}/trainings",
    tags=["trainings"],
    operation_id="trainings.create",
    status_code=422,
    responses=problems(404),
)
def create_training(
    service: ServiceDep,
    caller: CallerDep,
    owner: str,
    name: str,
    version_id: str,
    body: TrainingBody,
) -> JSONResponse:
    """Refuse: no model here can be trained."""
    service.library.version(owner, name, version_id, caller.account.id)
    raise ProblemError(
        422, f"{owner}/{name} does not support training; {body.destination} stays as it is."
    )


def check_hardware(service: Service, sku: str) -> None:
    """Refuse hardware that is not here.

    Raises:
        ProblemError: names what there is.
    """
    known = [device.sku for device in service.hardware]
    if sku not in known:
        listed = ", ".join(f'"{one}"' for one in known)
        expected = f"hardware must be one of the following: {listed}"
        raise invalid(InvalidField("enum", "hardware", expected))


def check_defaults(version: ServedVersion, defaults: Mapping[str, Any]) -> None:
    """Refuse defaults that would make every request invalid.

    Raises:
        ProblemError: lists all of them.
    """
    required = {field.name: "" for field in version.base.fields if field.required}
    try:
        unknown = validate(version.base, {**required, **defaults}).warnings
    except InvalidInputsError as error:
        wrong = [
            InvalidField(one.type, one.field.replace("input", "defaults", 1), one.description)
            for one in error.fields
        ]
        raise invalid(*wrong) from error
    if unknown:
        raise invalid(InvalidField("additional_property_not_allowed", "defaults", unknown[0]))


def _model(service: Service, caller: Caller, owner: str, name: str) -> ServedModel:
    return service.library.model(owner, name, caller.account.id)


def _own_model(service: Service, caller: Caller, owner: str, name: str) -> UserModel:
    row = _model(service, caller, owner, name).row
    if row is None or row.account_id != caller.account.id:
        raise ProblemError(403, f"{owner}/{name} is not yours to change.", "Forbidden")
    return row


def _in_full(service: Service, model: ServedModel) -> ModelAnswer:
    """Return a model with its newest shared prediction as its example."""
    counts = _run_counts(service, [model])
    shared = service.store.predictions.shared_page(model.full_name, limit=1).items
    example = service.shared_prediction(shared[0]) if shared else None
    return _shown(service, model, counts, example)


def _run_counts(service: Service, models: Iterable[ServedModel]) -> Mapping[str, int]:
    return service.store.predictions.run_counts([model.full_name for model in models])


def _shown(
    service: Service,
    model: ServedModel,
    counts: Mapping[str, int],
    example: PredictionAnswer | None = None,
) -> ModelAnswer:
    runs = counts.get(model.full_name, 0)
    return model_answer(model, service.settings.public_url, runs, example)


def _models_page(request: Request, service: Service, page: Page[ServedModel]) -> JSONResponse:
    counts = _run_counts(service, page.items)
    return respond(service.page_answer(request, page, lambda model: _shown(service, model, counts)))


def _search_page(
    request: Request, service: Service, caller: Caller, query: str, cursor: str | None
) -> JSONResponse:
    found = service.library.search(query, caller.account.id)
    page = paginate(found, lambda pair: (pair[0], *pair[1].sort_key), cursor=cursor, limit=PAGE)
    models = tuple(model for _, model in page.items)
    return _models_page(request, service, Page(models, page.next, page.previous))
