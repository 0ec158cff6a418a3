"""The JSON objects of the API other than predictions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tegula.api.library import Edition, Entry
from tegula.predictions.links import Links
from tegula.predictions.records import Account, Deployment, FileRecord
from tegula.predictions.wire import timestamp

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
