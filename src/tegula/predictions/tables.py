"""The tables of the store; the migrations bring a database to what stands here."""

from __future__ import annotations

from datetime import datetime, timezone
from typing import Any

from sqlalchemy import (
    JSON,
    BigInteger,
    Boolean,
    Column,
    DateTime,
    Float,
    ForeignKey,
    Index,
    Integer,
    MetaData,
    String,
    Table,
    Text,
)
from sqlalchemy.engine import Dialect
from sqlalchemy.types import TypeDecorator


class UtcTime(TypeDecorator[datetime]):
    """Aware times in UTC, also in SQLite, which keeps no time zone."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:  # noqa: ARG002
        """Return the time as the database is to keep it."""
        return None if value is None else value.astimezone(timezone.utc)

    def process_result_value(self, value: Any, dialect: Dialect) -> datetime | None:  # noqa: ARG002
        """Return the time as records have it."""
        if value is None:
            return None
        aware: datetime = value if value.tzinfo else value.replace(tzinfo=timezone.utc)
        return aware.astimezone(timezone.utc)


metadata = MetaData(
    naming_convention={
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "fk": "fk_%(table_name)s_%(column_0_N_name)s",
        "pk": "pk_%(table_name)s",
    }
)

_Id = String(64)
_Name = String(255)
_Counter = BigInteger().with_variant(Integer, "sqlite")

accounts = Table(
    "accounts",
    metadata,
    Column("id", _Id, primary_key=True),
    Column("username", _Name, nullable=False, unique=True),
    Column("name", _Name, nullable=False),
    Column("kind", String(16), nullable=False),
    Column("created_at", UtcTime, nullable=False),
)

tokens = Table(
    "tokens",
    metadata,
    Column("id", _Id, primary_key=True),
    Column("account_id", _Id, ForeignKey("accounts.id"), nullable=False),
    Column("name", _Name, nullable=False),
    Column("hash", _Id, nullable=False, unique=True),
    Column("hint", String(8), nullable=False),
    Column("created_at", UtcTime, nullable=False),
    Column("last_used_at", UtcTime),
    Column("revoked_at", UtcTime),
)

secret_keys = Table(
    "secret_keys",
    metadata,
    Column("id", _Counter, primary_key=True, autoincrement=True),
    Column("owner", _Id, nullable=False),
    Column("value", String(128), nullable=False),
    Column("created_at", UtcTime, nullable=False),
    Column("retired_at", UtcTime),
    Index(None, "owner"),
)

predictions = Table(
    "predictions",
    metadata,
    Column("id", _Id, primary_key=True),
    Column("account_id", _Id, ForeignKey("accounts.id"), nullable=False),
    Column("token_id", _Id),
    Column("model", _Name, nullable=False),
    Column("version", _Id, nullable=False),
    Column("deployment", _Name),
    Column("input", JSON, nullable=False),
    Column("output", JSON(none_as_null=True)),
    Column("logs", Text, nullable=False),
    Column("error", Text),
    Column("status", String(16), nullable=False),
    Column("source", String(16), nullable=False),
    Column("created_at", UtcTime, nullable=False),
    Column("started_at", UtcTime),
    Column("completed_at", UtcTime),
    Column("deadline", UtcTime),
    Column("data_removed", Boolean, nullable=False),
    Column("predict_seconds", Float),
    Column("progress", Float, nullable=False),
    Column("webhook", Text),
    Column("webhook_events", JSON, nullable=False),
    Column("share_token", _Id, unique=True),
    Column("estimated_seconds", Float, nullable=False),
    Column("attempt", Integer, nullable=False),
    Column("losses", Integer, nullable=False),
    Column("worker", _Name),
    Column("lease_until", UtcTime),
    Index(None, "account_id", "created_at", "id"),
    Index(None, "model", "created_at"),
    Index(None, "status", "created_at"),
    Index(None, "completed_at"),
)

events = Table(
    "events",
    metadata,
    Column("seq", _Counter, primary_key=True, autoincrement=True),
    Column("prediction_id", _Id, ForeignKey("predictions.id"), nullable=False),
    Column("attempt", Integer, nullable=False),
    Column("kind", String(16), nullable=False),
    Column("data", JSON(none_as_null=True)),
    Column("at", UtcTime, nullable=False),
    Index(None, "prediction_id", "seq"),
    sqlite_autoincrement=True,
)

idempotency_keys = Table(
    "idempotency_keys",
    metadata,
    Column("account_id", _Id, primary_key=True),
    Column("key", _Name, primary_key=True),
    Column("request_hash", _Id, nullable=False),
    Column("prediction_id", _Id, ForeignKey("predictions.id"), nullable=False),
    Column("created_at", UtcTime, nullable=False),
    Index(None, "created_at"),
)

files = Table(
    "files",
    metadata,
    Column("id", _Id, primary_key=True),
    Column("account_id", _Id, ForeignKey("accounts.id"), nullable=False),
    Column("prediction_id", _Id),
    Column("name", _Name, nullable=False),
    Column("content_type", _Name, nullable=False),
    Column("size", BigInteger, nullable=False),
    Column("sha256", _Id, nullable=False),
    Column("md5", String(32), nullable=False),
    Column("metadata", JSON, nullable=False),
    Column("created_at", UtcTime, nullable=False),
    Column("expires_at", UtcTime),
    Index(None, "account_id", "created_at", "id"),
    Index(None, "sha256"),
    Index(None, "prediction_id"),
    Index(None, "expires_at"),
)

webhooks = Table(
    "webhooks",
    metadata,
    Column("id", _Id, primary_key=True),
    Column("prediction_id", _Id, ForeignKey("predictions.id"), nullable=False),
    Column("account_id", _Id, nullable=False),
    Column("url", Text, nullable=False),
    Column("receiver", _Name, nullable=False),
    Column("event", String(16), nullable=False),
    Column("body", Text),
    Column("state", String(16), nullable=False),
    Column("attempts", Integer, nullable=False),
    Column("next_at", UtcTime, nullable=False),
    Column("created_at", UtcTime, nullable=False),
    Column("finished_at", UtcTime),
    Column("last_status", Integer),
    Column("last_error", Text),
    Index(None, "state", "next_at"),
    Index(None, "prediction_id", "event", "next_at"),
)

deployments = Table(
    "deployments",
    metadata,
    Column("owner", _Name, primary_key=True),
    Column("name", _Name, primary_key=True),
    Column("account_id", _Id, ForeignKey("accounts.id"), nullable=False),
    Column("number", Integer, nullable=False),
    Column("model", _Name, nullable=False),
    Column("version", _Id, nullable=False),
    Column("hardware", _Name, nullable=False),
    Column("min_instances", Integer, nullable=False),
    Column("max_instances", Integer, nullable=False),
    Column("created_at", UtcTime, nullable=False),
    Column("defaults", JSON, nullable=False),
)

user_models = Table(
    "user_models",
    metadata,
    Column("owner", _Name, primary_key=True),
    Column("name", _Name, primary_key=True),
    Column("account_id", _Id, ForeignKey("accounts.id"), nullable=False),
    Column("visibility", String(16), nullable=False),
    Column("hardware", _Name, nullable=False),
    Column("created_at", UtcTime, nullable=False),
    Column("description", Text, nullable=False),
    Column("readme", Text, nullable=False),
    Column("github_url", Text),
    Column("paper_url", Text),
    Column("license_url", Text),
    Column("weights_url", Text),
    Column("cover_image_url", Text),
)

user_versions = Table(
    "user_versions",
    metadata,
    Column("id", _Id, primary_key=True),
    Column("model", _Name, nullable=False),
    Column("base_model", _Name, nullable=False),
    Column("base_version", _Id, nullable=False),
    Column("defaults", JSON, nullable=False),
    Column("created_at", UtcTime, nullable=False),
    Index(None, "model", "created_at"),
)

usage = Table(
    "usage",
    metadata,
    Column("prediction_id", _Id, primary_key=True),
    Column("account_id", _Id, nullable=False),
    Column("token_id", _Id),
    Column("model", _Name, nullable=False),
    Column("predict_seconds", Float, nullable=False),
    Column("completed_at", UtcTime, nullable=False),
    Index(None, "account_id", "completed_at"),
)
