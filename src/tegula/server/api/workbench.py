"""What the pages need to know of this server beside the API: its limits, and what models take."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from fastapi import APIRouter
from fastapi.responses import JSONResponse

from tegula.catalog.inputs import ARRAY, EXACT, FILE, Version
from tegula.server.api.library import ServedModel, ServedVersion
from tegula.server.api.service import CallerDep, ServiceDep

router = APIRouter(prefix="/v1/web", include_in_schema=False)

_MOST_OF_USERS = 100
_EXAMPLES = Path(__file__).parents[1] / "web" / "assets"
# Inputs of files that restrict the change, by what white stands for in them.
_KEEPS_WHITE = "White is kept"


@router.get("/workbench")
def describe(service: ServiceDep, caller: CallerDep) -> JSONResponse:
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
