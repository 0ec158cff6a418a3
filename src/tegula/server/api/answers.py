"""What the API answers, as pydantic models: each is the answer and its schema in one.

That of a prediction is in ``tegula.server.links``, since webhooks carry it, too; that of a problem
is in ``errors``.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime, timedelta
from typing import Annotated, Any, Generic, Literal, TypeVar

from fastapi.responses import JSONResponse
from pydantic import Field

from tegula.server.api.library import ServedModel, ServedVersion
from tegula.server.links import (
    Address,
    Answer,
    Links,
    PredictionAnswer,
    Timestamp,
    WebhookEvent,
    one_of,
    timestamp,
)
from tegula.server.tables import Account, Deployment, FileRecord, WebhookMessage

T = TypeVar("T")

COG_VERSION = "0.16.0"
"""Clients parse it; the schemas have the form that this version writes."""


def respond(
    answer: Answer, status: int = 200, headers: Mapping[str, str] | None = None
) -> JSONResponse:
    """Return the response that carries an answer."""
    return JSONResponse(answer.as_json(), status, headers)


class PageAnswer(Answer, Generic[T]):
    """Some of many, with the addresses of the pages before and after; null where there is none."""

    next: Address | None
    previous: Address | None
    results: list[T]


# Accounts, and what is theirs.


class AccountAnswer(Answer):
    """An account."""

    type: Annotated[str, one_of(("user", "organization"))]
    username: str
    name: str
    github_url: None
    avatar_url: None


class HardwareAnswer(Answer):
    """A device that predictions run on."""

    sku: str
    name: str


class UsageLine(Answer):
    """What one token used of one model."""

    model: str
    token: str | None = Field(description="The name of the token; null if it is gone.")
    predictions: int
    predict_seconds: float


class UsageAnswer(Answer):
    """What an account used."""

    results: list[UsageLine]


class WebhookSecretAnswer(Answer):
    """The secret that signs webhooks."""

    key: str


class DeliveryAnswer(Answer):
    """A webhook that was sent or is to be sent."""

    id: str
    prediction: str
    event: WebhookEvent
    url: str
    state: Annotated[str, one_of(("pending", "delivered", "failed"))]
    attempts: int
    status: int | None = Field(description="The HTTP status of the receiver's last answer.")
    error: str | None
    created_at: Timestamp
    next_attempt_at: Timestamp | None
    completed_at: Timestamp | None


class ShareAnswer(Answer):
    """The address of the page of a shared prediction; null while it is not shared."""

    url: Address | None


def account_answer(account: Account) -> AccountAnswer:
    """Return an account."""
    return AccountAnswer(
        type=account.kind,
        username=account.username,
        name=account.name or account.username,
        github_url=None,
        avatar_url=None,
    )


def delivery_answer(message: WebhookMessage) -> DeliveryAnswer:
    """Return a webhook as it is listed."""
    return DeliveryAnswer(
        id=message.id,
        prediction=message.prediction_id,
        event=message.event,
        url=message.url,
        state=message.state,
        attempts=message.attempts,
        status=message.last_status,
        error=message.last_error,
        created_at=timestamp(message.created_at),
        next_attempt_at=timestamp(message.next_at if message.state == "pending" else None),
        completed_at=timestamp(message.finished_at),
    )


# Files.


class Checksums(Answer):
    """Checksums of a file, in hexadecimal."""

    sha256: str
    md5: str


class FileUrls(Answer):
    """Where the description of a file is read, and its bytes without a token."""

    get: Address
    download: Address


class FileAnswer(Answer):
    """An upload; ``etag`` is among what the Python client insists on."""

    id: str
    name: str
    content_type: str
    size: int
    etag: str
    checksums: Checksums
    metadata: dict[str, Any]
    created_at: Timestamp
    expires_at: Timestamp | None
    urls: FileUrls


_DOWNLOAD_FOR = timedelta(days=1)


def file_answer(file: FileRecord, links: Links, owner: str, now: datetime) -> FileAnswer:
    """Return an upload.

    Args:
        file: the upload.
        links: makes its addresses.
        owner: the username of its account, which has no token for somebody else's file.
        now: a file that is kept for good is linked for a day.
    """
    until = file.expires_at or now + _DOWNLOAD_FOR
    return FileAnswer(
        id=file.id,
        name=file.name,
        content_type=file.content_type,
        size=file.size,
        etag=file.md5,
        checksums=Checksums(sha256=file.sha256, md5=file.md5),
        metadata=dict(file.user_metadata),
        created_at=timestamp(file.created_at),
        expires_at=timestamp(file.expires_at),
        urls=FileUrls(
            get=links.file(file.id),
            download=links.download(file.id, owner, int(until.timestamp())),
        ),
    )


# Models, their versions, collections of them, and deployments.


class VersionAnswer(Answer):
    """A version of a model, with the schema of its inputs and outputs."""

    id: str
    created_at: Timestamp
    cog_version: str
    openapi_schema: dict[str, Any]


class ModelAnswer(Answer):
    """A model."""

    url: Address
    owner: str
    name: str
    description: str
    visibility: Annotated[str, one_of(("public", "private"))]
    is_official: bool
    github_url: str | None
    paper_url: str | None
    license_url: str | None
    run_count: int = Field(description="How many predictions were created with it.")
    cover_image_url: str | None
    default_example: PredictionAnswer | None
    latest_version: VersionAnswer | None
    created_at: Timestamp


class CollectionAnswer(Answer):
    """A collection of models, as lists show it."""

    name: str
    slug: str
    description: str


class CollectionWithModelsAnswer(CollectionAnswer):
    """A collection with its models."""

    full_description: str
    models: list[ModelAnswer]


class FoundMetadata(Answer):
    """What a search knows of a model that it found; a higher score fits better."""

    generated_description: str
    tags: list[str]
    score: float


class FoundModel(Answer):
    """A model that a search found."""

    model: ModelAnswer
    metadata: FoundMetadata


class FoundCollection(Answer):
    """A collection that a search found, with the names of its models."""

    slug: str
    name: str
    description: str
    models: list[str]


class SearchAnswer(Answer):
    """What a search found."""

    query: str
    models: list[FoundModel]
    collections: list[FoundCollection]
    pages: list[dict[str, Any]] = Field(description="Always empty: there are no pages to find.")


class DeploymentConfiguration(Answer):
    """How a deployment runs."""

    hardware: str
    min_instances: int
    max_instances: int


class Release(Answer):
    """What a deployment runs, since when; ``defaults``, inputs that it pins, are ours."""

    number: int
    model: str
    version: str
    created_at: Timestamp
    created_by: AccountAnswer
    configuration: DeploymentConfiguration
    defaults: dict[str, Any]


class DeploymentAnswer(Answer):
    """A deployment."""

    owner: str
    name: str
    current_release: Release


SUPER_RESOLUTION = CollectionAnswer(
    name="Super resolution",
    slug="super-resolution",
    description="Models that make pictures larger and better.",
)


def version_answer(version: ServedVersion) -> VersionAnswer:
    """Return a version with its OpenAPI schema."""
    return VersionAnswer(
        id=version.id,
        created_at=timestamp(version.created_at),
        cog_version=COG_VERSION,
        openapi_schema=version.schema,
    )


def model_answer(
    model: ServedModel, base: str, run_count: int, example: PredictionAnswer | None = None
) -> ModelAnswer:
    """Return a model; the description also says if it cannot run, since lists show nothing else.

    Args:
        model: the model.
        base: the public URL of the server.
        run_count: how many predictions were created with it.
        example: a shared prediction, if there is one.
    """
    row = model.row
    return ModelAnswer(
        url=f"{base}/{model.full_name}",
        owner=model.owner,
        name=model.name,
        description=" ".join(filter(None, [model.description, model.obstacle])),
        visibility=row.visibility if row else "public",
        is_official=row is None,
        github_url=row.github_url if row else None,
        paper_url=row.paper_url if row else None,
        license_url=row.license_url if row else None,
        run_count=run_count,
        cover_image_url=row.cover_image_url if row else None,
        default_example=example,
        latest_version=version_answer(model.latest) if model.latest else None,
        created_at=timestamp(model.created_at),
    )


def deployment_answer(deployment: Deployment, version: str, creator: Account) -> DeploymentAnswer:
    """Return a deployment; ``version`` is the id that its version has in this release."""
    return DeploymentAnswer(
        owner=deployment.owner,
        name=deployment.name,
        current_release=Release(
            number=deployment.number,
            model=deployment.model,
            version=version,
            created_at=timestamp(deployment.created_at),
            created_by=account_answer(creator),
            configuration=DeploymentConfiguration(
                hardware=deployment.hardware,
                min_instances=deployment.min_instances,
                max_instances=deployment.max_instances,
            ),
            defaults=dict(deployment.defaults),
        ),
    )


# Operations.


class LiveAnswer(Answer):
    """The process lives."""

    status: Literal["ok"]


class ReadyAnswer(LiveAnswer):
    """Work is accepted; so many predictions are not done."""

    waiting: int
