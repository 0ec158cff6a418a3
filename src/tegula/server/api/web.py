"""What only the pages ask for: what the form needs, the history, and what stands beside a picture.

None of it is in the document of the API: it changes with the pages.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import datetime, timedelta
from importlib.util import find_spec
from pathlib import Path, PurePosixPath
from typing import Any, Literal
from urllib.parse import unquote, urlsplit

from fastapi import APIRouter
from fastapi.responses import FileResponse, JSONResponse

from tegula.catalog.inputs import ARRAY, EXACT, FILE, Version
from tegula.errors import ImageError, NotFoundError
from tegula.server.api.errors import ProblemError
from tegula.server.api.library import ServedModel, ServedVersion
from tegula.server.api.predictions import source_of
from tegula.server.api.service import CallerDep, Cursor, Service, ServiceDep
from tegula.server.links import timestamp
from tegula.server.tables import FileRecord, Prediction, State, file_ids

router = APIRouter(prefix="/v1", include_in_schema=False)

_PER_PAGE = 24
_STATES: Mapping[str, Sequence[State]] = {
    "active": (State.STARTING, State.PROCESSING),
    "succeeded": (State.SUCCEEDED,),
    "failed": (State.FAILED,),
    "canceled": (State.CANCELED, State.ABORTED),
}
_CACHE = {"cache-control": "private, max-age=86400, immutable"}
_MOST_OF_USERS = 100
"""Models of users' own on the pages."""
_EXAMPLES = Path(__file__).parents[1] / "web" / "assets"
_KEEPS_WHITE = "White is kept"
"""Begins the description of a mask whose white stays as it is; in all others white changes."""


@router.get("/web/workbench")
def get_workbench(service: ServiceDep, caller: CallerDep) -> JSONResponse:
    """Describe the server to its pages: what it takes, and the inputs of its models."""
    settings = service.settings
    models = service.library.models(caller.account.id, _MOST_OF_USERS)
    return JSONResponse(
        {
            "limits": {
                "pixels": settings.max_pixels,
                "upload_bytes": settings.max_upload_bytes,
                "retention_seconds": settings.retention_seconds,
            },
            "reads_heic": find_spec("pillow_heif") is not None,
            "has_tokens": not settings.no_auth,
            "public_url": settings.public_url,
            "models": [_model(model, model.latest) for model in models if model.latest],
        }
    )


@router.get("/web/history")
def list_history(
    service: ServiceDep,
    caller: CallerDep,
    *,
    cursor: Cursor = None,
    status: Literal["active", "succeeded", "failed", "canceled"] | None = None,
    model: str | None = None,
    source: Literal["web", "api"] | None = None,
    removed: bool = False,
) -> JSONResponse:
    """List what the account made, newest first; with ``removed`` also what has no data any more."""
    page = service.store.predictions.page(
        caller.account.id,
        cursor=cursor,
        limit=_PER_PAGE,
        source=source,
        model=model or None,
        statuses=_STATES[status] if status else (),
        kept=not removed,
    )
    answer = {
        "results": [_entry(service, one) for one in page.items],
        "next": page.next,
        "retention_seconds": service.settings.retention_seconds,
    }
    return JSONResponse(answer)


@router.get("/web/predictions/{prediction_id}")
def get_facts(service: ServiceDep, caller: CallerDep, prediction_id: str) -> JSONResponse:
    """Get what the page of a prediction shows beside it."""
    found = service.store.predictions.get(prediction_id, caller.account.id)
    return JSONResponse(_facts(service, found))


@router.get("/shared/{share_token}/facts")
def get_shared_facts(service: ServiceDep, share_token: str) -> JSONResponse:
    """Get the same of a shared prediction."""
    return JSONResponse(_facts(service, service.store.predictions.shared(share_token)))


@router.get("/web/predictions/{prediction_id}/tiles/{which}")
def get_tiles(
    service: ServiceDep, caller: CallerDep, prediction_id: str, which: str
) -> JSONResponse:
    """Get the size and the levels of a picture: ``source``, or the number of an output."""
    found = service.store.predictions.get(prediction_id, caller.account.id)
    return _manifest(service, found, which)


@router.get("/shared/{share_token}/tiles/{which}")
def get_shared_tiles(service: ServiceDep, share_token: str, which: str) -> JSONResponse:
    """Get the same of a shared prediction."""
    return _manifest(service, service.store.predictions.shared(share_token), which)


@router.get("/web/predictions/{prediction_id}/tiles/{which}/{level}/{name}")
def get_tile(
    service: ServiceDep,
    caller: CallerDep,
    prediction_id: str,
    which: str,
    level: int,
    name: str,
) -> FileResponse:
    """Get a tile, once ``get_tiles`` has been asked."""
    found = service.store.predictions.get(prediction_id, caller.account.id)
    return _tile(service, found, which, level, name)


@router.get("/shared/{share_token}/tiles/{which}/{level}/{name}")
def get_shared_tile(
    service: ServiceDep, share_token: str, which: str, level: int, name: str
) -> FileResponse:
    """Get a tile of a shared prediction."""
    found = service.store.predictions.shared(share_token)
    return _tile(service, found, which, level, name)


@router.get("/web/predictions/{prediction_id}/thumbnail")
def get_thumbnail(service: ServiceDep, caller: CallerDep, prediction_id: str) -> FileResponse:
    """Get a small picture of the result, or of the source where there is no result."""
    found = service.store.predictions.get(prediction_id, caller.account.id)
    which = "0" if found.status is State.SUCCEEDED else "source"
    try:
        path = service.store.tiles.thumbnail(_picture(service, found, which))
    except ImageError as error:
        raise ProblemError(422, str(error)) from error
    return FileResponse(path, media_type="image/jpeg", headers=_CACHE)


def _manifest(service: Service, prediction: Prediction, which: str) -> JSONResponse:
    try:
        manifest = service.store.tiles.manifest(_picture(service, prediction, which))
    except ImageError as error:
        raise ProblemError(422, str(error)) from error
    return JSONResponse(manifest)


def _tile(
    service: Service, prediction: Prediction, which: str, level: int, name: str
) -> FileResponse:
    if PurePosixPath(name).name != name or name.startswith("."):
        raise NotFoundError("There is no such tile.")
    path = service.store.tiles.tile(_picture(service, prediction, which), level, name)
    return FileResponse(path, headers=_CACHE)


def _picture(service: Service, prediction: Prediction, which: str) -> FileRecord:
    """Return the file of a picture: ``source``, or the number of an output.

    Raises:
        NotFoundError: there is none, or none any more.
    """
    if which == "source":
        return source_of(service, prediction)
    outputs = list(file_ids(prediction.output))
    if not which.isdecimal() or int(which) >= len(outputs):
        raise NotFoundError("There is no such picture.")
    return service.store.files.get(outputs[int(which)])


def _facts(service: Service, prediction: Prediction) -> dict[str, Any]:
    outputs = [service.store.files.get(one) for one in file_ids(prediction.output)]
    facts: dict[str, Any] = {
        "name": _source_name(service, prediction),
        "source": None,
        "outputs": [_file(one) for one in outputs],
        "removed_at": timestamp(_removed_at(service, prediction)),
        "place": None,
    }
    with suppress(NotFoundError, ProblemError):
        facts["source"] = _file(source_of(service, prediction))
    if prediction.status is State.STARTING:
        ahead = service.store.predictions.ahead_of(prediction)
        at_once = max(1, len(service.settings.devices))
        own = prediction.estimated_seconds
        facts["place"] = {"ahead": ahead.count, "seconds": ahead.seconds / at_once, "own": own}
    return facts


def _entry(service: Service, prediction: Prediction) -> dict[str, Any]:
    values = prediction.input
    return {
        "id": prediction.id,
        "name": _source_name(service, prediction),
        "model": prediction.model,
        "status": prediction.status.value,
        "source": prediction.source,
        "progress": round(prediction.progress, 4),
        "created_at": timestamp(prediction.created_at),
        "seconds": prediction.predict_seconds,
        "error": prediction.error,
        "chosen": {name: values[name] for name in ("scale", "preset") if name in values},
        "data_removed": prediction.data_removed,
        "removed_at": timestamp(_removed_at(service, prediction)),
        "shared": prediction.share_token is not None,
    }


def _file(file: FileRecord) -> dict[str, Any]:
    return {"name": file.name, "type": file.content_type, "size": file.size}


def _removed_at(service: Service, prediction: Prediction) -> datetime | None:
    """Return when the data goes; None if it stays, or the prediction is not done yet."""
    seconds, done = service.settings.retention_seconds, prediction.completed_at
    if not seconds or done is None or prediction.share_token or prediction.data_removed:
        return None
    return done + timedelta(seconds=seconds)


def _source_name(service: Service, prediction: Prediction) -> str | None:
    """Return what the picture was called, as far as that is known."""
    try:
        file = source_of(service, prediction)
    except (NotFoundError, ProblemError):
        value = prediction.input.get("image")
        path = urlsplit(value).path if isinstance(value, str) else ""
        return unquote(PurePosixPath(path).name) or None
    if url := file.user_metadata.get("url"):
        return unquote(PurePosixPath(urlsplit(str(url)).path).name) or file.name
    return file.name


def _model(model: ServedModel, version: ServedVersion) -> Mapping[str, Any]:
    schema = version.schema["components"]["schemas"]
    example = f"example-{model.owner}-{model.name}.webp"
    return {
        "name": model.full_name,
        "version": version.id,
        "description": model.description,
        "obstacle": version.obstacle,
        "remedy": version.remedy,
        "image": version.base.image,
        "masks": _masks(version.base),
        "many": version.base.output == ARRAY,
        "inputs": schema["Input"],
        "choices": {name: part["enum"] for name, part in schema.items() if "enum" in part},
        "remarks": {
            field.name: {"fidelity": field.fidelity, "remark": field.remark}
            for field in version.base.fields
            if field.fidelity != EXACT
        },
        "example": example if (_EXAMPLES / example).exists() else None,
    }


def _masks(version: Version) -> Mapping[str, bool]:
    """Return whether white is kept, by the name of each input that is a mask."""
    return {
        field.name: field.description.startswith(_KEEPS_WHITE)
        for field in version.fields
        if field.kind == FILE and field.name != version.image
    }
