"""The JSON objects of the API, but that of a prediction: webhooks carry it, too (``links.py``)."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime, timedelta
from typing import Any

from tegula.server.api.library import ServedModel, ServedVersion
from tegula.server.links import Links, timestamp
from tegula.server.tables import Account, Deployment, FileRecord

COG_VERSION = "0.16.0"
"""Clients parse it; the schemas have the form that this version writes."""

SUPER_RESOLUTION = {
    "slug": "super-resolution",
    "name": "Super resolution",
    "description": "Models that make pictures larger and better.",
}


def account_json(account: Account) -> dict[str, Any]:
    """Return an account."""
    return {
        "type": account.kind,
        "username": account.username,
        "name": account.name or account.username,
        "github_url": None,
        "avatar_url": None,
    }


def version_json(version: ServedVersion) -> dict[str, Any]:
    """Return a version with its OpenAPI schema."""
    return {
        "id": version.id,
        "created_at": timestamp(version.created_at),
        "cog_version": COG_VERSION,
        "openapi_schema": version.schema,
    }


def model_json(
    model: ServedModel, base: str, run_count: int, example: Any = None
) -> dict[str, Any]:
    """Return a model; the description also says if it cannot run, since lists show nothing else.

    Args:
        model: the model.
        base: the public URL of the server.
        run_count: how many predictions were created with it.
        example: the object of a shared prediction, if there is one.
    """
    row = model.row
    return {
        "url": f"{base}/{model.full_name}",
        "owner": model.owner,
        "name": model.name,
        "description": " ".join(filter(None, [model.description, model.obstacle])),
        "visibility": row.visibility if row else "public",
        "is_official": row is None,
        "github_url": row.github_url if row else None,
        "paper_url": row.paper_url if row else None,
        "license_url": row.license_url if row else None,
        "run_count": run_count,
        "cover_image_url": row.cover_image_url if row else None,
        "default_example": example,
        "latest_version": version_json(model.latest) if model.latest else None,
        "created_at": timestamp(model.created_at),
    }


_DOWNLOAD_FOR = timedelta(days=1)


def file_json(file: FileRecord, links: Links, owner: str, now: datetime) -> dict[str, Any]:
    """Return an upload; ``etag`` is among what the Python client insists on.

    Args:
        file: the upload.
        links: makes its addresses.
        owner: the username of its account, which has no token for somebody else's file.
        now: a file that is kept for good is linked for a day.
    """
    until = file.expires_at or now + _DOWNLOAD_FOR
    return {
        "id": file.id,
        "name": file.name,
        "content_type": file.content_type,
        "size": file.size,
        "etag": file.md5,
        "checksums": {"sha256": file.sha256, "md5": file.md5},
        "metadata": dict(file.user_metadata),
        "created_at": timestamp(file.created_at),
        "expires_at": timestamp(file.expires_at),
        "urls": {
            "get": links.file(file.id),
            "download": links.download(file.id, owner, int(until.timestamp())),
        },
    }


def deployment_json(deployment: Deployment, version: str, creator: Account) -> dict[str, Any]:
    """Return a deployment; ``defaults`` is ours."""
    return {
        "owner": deployment.owner,
        "name": deployment.name,
        "current_release": {
            "number": deployment.number,
            "model": deployment.model,
            "version": version,
            "created_at": timestamp(deployment.created_at),
            "created_by": account_json(creator),
            "configuration": {
                "hardware": deployment.hardware,
                "min_instances": deployment.min_instances,
                "max_instances": deployment.max_instances,
            },
            "defaults": dict(deployment.defaults),
        },
    }


def collection_json(collection: Mapping[str, str]) -> dict[str, Any]:
    """Return a collection as lists show it."""
    return {key: collection[key] for key in ("name", "slug", "description")}
