"""The rows of the store, as frozen records; times are aware and in UTC."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Generic, TypeVar

from tegula.predictions.states import State

T = TypeVar("T")

WEBHOOK_EVENTS = ("start", "output", "logs", "completed")
DEFAULT_WEBHOOK_EVENTS = ("output", "completed")

FILE_KEY = "$file"
"""A kept file inside an input or output is ``{"$file": id, "name": ..., "type": ...}``."""


@dataclass(frozen=True)
class Account:
    """Who owns predictions, files and private models; ``kind`` is user or organization."""

    id: str
    username: str
    name: str
    kind: str
    created_at: datetime


@dataclass(frozen=True)
class Token:
    """A key to an account; only its hash is kept, and ``hint``, its last four characters."""

    id: str
    account_id: str
    name: str
    hint: str
    created_at: datetime
    last_used_at: datetime | None = None
    revoked_at: datetime | None = None


@dataclass(frozen=True)
class Prediction:
    """One accepted piece of work.

    model, version: ``owner/name`` and the 64 hex digits of its version.
    deployment: ``owner/name`` of the deployment it was asked of.
    deadline: when it is given up, started or not.
    estimated_seconds: work it was admitted with.
    attempt: number of the latest claim; only the worker that holds it may write.
    losses: how many workers died or hung over it.
    device, worker, lease_until: who holds it, and until when without a heartbeat.
    share_token: opens its page to everybody; None while it is private.
    predict_seconds: time it ran, without waiting.
    """

    id: str
    account_id: str
    model: str
    version: str
    input: Mapping[str, Any]
    created_at: datetime
    status: State = State.STARTING
    output: Any = None
    logs: str = ""
    error: str | None = None
    source: str = "api"
    token_id: str | None = None
    deployment: str | None = None
    started_at: datetime | None = None
    completed_at: datetime | None = None
    deadline: datetime | None = None
    data_removed: bool = False
    predict_seconds: float | None = None
    progress: float = 0.0
    webhook: str | None = None
    webhook_events: tuple[str, ...] = DEFAULT_WEBHOOK_EVENTS
    share_token: str | None = None
    estimated_seconds: float = 0.0
    attempt: int = 0
    losses: int = 0
    worker: str | None = None
    lease_until: datetime | None = None


@dataclass(frozen=True)
class NewPrediction:
    """What a caller asks for, valid and with its files kept."""

    account_id: str
    model: str
    version: str
    input: Mapping[str, Any]
    source: str = "api"
    token_id: str | None = None
    deployment: str | None = None
    deadline: datetime | None = None
    webhook: str | None = None
    webhook_events: tuple[str, ...] = DEFAULT_WEBHOOK_EVENTS
    estimated_seconds: float = 0.0


@dataclass(frozen=True)
class Created:
    """A prediction as accepted; ``replayed`` if an earlier request with the key made it."""

    prediction: Prediction
    replayed: bool = False


@dataclass(frozen=True)
class Event:
    """One thing that happened to a prediction; ``seq`` grows over all predictions.

    kind and data: ``logs`` and a text of whole lines; ``output`` and one item of it;
    ``restart`` and None, after which earlier output no longer counts; ``done`` and the
    terminal state.
    """

    seq: int
    prediction_id: str
    attempt: int
    kind: str
    data: Any
    at: datetime


@dataclass(frozen=True)
class FileRecord:
    """A kept file; its bytes lie under ``sha256``, shared by all files that are equal.

    prediction_id: the prediction whose input or output it is; None for an upload.
    expires_at: when it is removed; None keeps it as long as its prediction.
    """

    id: str
    account_id: str
    name: str
    content_type: str
    size: int
    sha256: str
    md5: str
    created_at: datetime
    metadata: Mapping[str, Any] = field(default_factory=dict)
    prediction_id: str | None = None
    expires_at: datetime | None = None


@dataclass(frozen=True)
class WebhookDelivery:
    """One message of the outbox; ``id`` stays the same over all attempts.

    receiver: host and port of the URL.
    event: one of ``WEBHOOK_EVENTS``.
    body: the exact text to send; None until an intermediate message is first sent.
    state: pending, delivered or failed.
    """

    id: str
    prediction_id: str
    account_id: str
    url: str
    receiver: str
    event: str
    body: str | None
    state: str
    attempts: int
    next_at: datetime
    created_at: datetime
    finished_at: datetime | None = None
    last_status: int | None = None
    last_error: str | None = None


@dataclass(frozen=True)
class Deployment:
    """A named model version with pinned defaults; ``number`` grows with every change.

    max_instances: how many of its predictions run at once; 0 takes none.
    min_instances: above 0 keeps its model loaded when the queue is empty.
    """

    owner: str
    name: str
    account_id: str
    number: int
    model: str
    version: str
    hardware: str
    min_instances: int
    max_instances: int
    created_at: datetime
    defaults: Mapping[str, Any] = field(default_factory=dict)

    @property
    def full_name(self) -> str:
        """``owner/name``."""
        return f"{self.owner}/{self.name}"


@dataclass(frozen=True)
class UserModel:
    """A model that somebody created: a name and texts; its versions are presets over ours."""

    owner: str
    name: str
    account_id: str
    visibility: str
    hardware: str
    created_at: datetime
    description: str = ""
    readme: str = ""
    github_url: str | None = None
    paper_url: str | None = None
    license_url: str | None = None
    weights_url: str | None = None
    cover_image_url: str | None = None

    @property
    def full_name(self) -> str:
        """``owner/name``."""
        return f"{self.owner}/{self.name}"


@dataclass(frozen=True)
class UserVersion:
    """A version of a user's model: input defaults over one version of a model of ours."""

    id: str
    model: str
    base_model: str
    base_version: str
    defaults: Mapping[str, Any]
    created_at: datetime


@dataclass(frozen=True)
class Usage:
    """What one token used of one model."""

    account_id: str
    token_id: str | None
    model: str
    predictions: int
    predict_seconds: float


@dataclass(frozen=True)
class Page(Generic[T]):
    """One page of a list, newest first; cursors are opaque and None at the ends."""

    items: tuple[T, ...]
    next: str | None = None
    previous: str | None = None
