"""The first tables.

Constraints take their names from the naming convention in ``tegula.server.tables``.
"""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa
from alembic import op

from tegula.server.tables import UtcTime

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

ID, NAME, WORD, TEXT, JSON = sa.String(64), sa.String(255), sa.String(16), sa.Text(), sa.JSON()
WHOLE, COUNTER = sa.Integer(), sa.BigInteger().with_variant(sa.Integer(), "sqlite")
NULLABLE_JSON = sa.JSON(none_as_null=True)


def upgrade() -> None:
    """Make every table."""
    op.create_table(
        "accounts",
        key("id"),
        needed("username", NAME, unique=True),
        needed("name", NAME),
        needed("kind", WORD),
        needed("created_at", UtcTime()),
    )
    op.create_table(
        "tokens",
        key("id"),
        needed("account_id", ID, sa.ForeignKey("accounts.id")),
        needed("name", NAME),
        needed("hash", ID, unique=True),
        needed("hint", sa.String(8)),
        needed("created_at", UtcTime()),
        sa.Column("last_used_at", UtcTime()),
        sa.Column("revoked_at", UtcTime()),
    )
    op.create_table(
        "secret_keys",
        key("id", COUNTER),
        needed("owner", ID),
        needed("value", sa.String(128)),
        needed("created_at", UtcTime()),
        sa.Column("retired_at", UtcTime()),
    )
    index("secret_keys", "owner")
    op.create_table(
        "predictions",
        key("id"),
        needed("account_id", ID, sa.ForeignKey("accounts.id")),
        sa.Column("token_id", ID),
        needed("model", NAME),
        needed("version", ID),
        sa.Column("deployment", NAME),
        needed("input", JSON),
        sa.Column("output", NULLABLE_JSON),
        needed("logs", TEXT),
        sa.Column("error", TEXT),
        needed("status", WORD),
        needed("source", WORD),
        needed("created_at", UtcTime()),
        sa.Column("started_at", UtcTime()),
        sa.Column("completed_at", UtcTime()),
        sa.Column("deadline", UtcTime()),
        needed("data_removed", sa.Boolean()),
        sa.Column("predict_seconds", sa.Float()),
        needed("progress", sa.Float()),
        sa.Column("webhook", TEXT),
        needed("webhook_events", JSON),
        sa.Column("share_token", ID, unique=True),
        needed("estimated_seconds", sa.Float()),
        needed("attempt", WHOLE),
        needed("losses", WHOLE),
        sa.Column("worker", NAME),
        sa.Column("lease_until", UtcTime()),
    )
    index("predictions", "account_id", "created_at", "id")
    index("predictions", "model", "created_at")
    index("predictions", "status", "created_at")
    index("predictions", "completed_at")
    op.create_table(
        "events",
        key("seq", COUNTER),
        needed("prediction_id", ID, sa.ForeignKey("predictions.id")),
        needed("attempt", WHOLE),
        needed("kind", WORD),
        sa.Column("data", NULLABLE_JSON),
        needed("at", UtcTime()),
        sqlite_autoincrement=True,
    )
    index("events", "prediction_id", "seq")
    op.create_table(
        "idempotency_keys",
        key("account_id"),
        key("key", NAME),
        needed("request_hash", ID),
        needed("prediction_id", ID, sa.ForeignKey("predictions.id")),
        needed("created_at", UtcTime()),
    )
    index("idempotency_keys", "created_at")
    op.create_table(
        "files",
        key("id"),
        needed("account_id", ID, sa.ForeignKey("accounts.id")),
        sa.Column("prediction_id", ID),
        needed("name", NAME),
        needed("content_type", NAME),
        needed("size", sa.BigInteger()),
        needed("sha256", ID),
        needed("md5", sa.String(32)),
        needed("metadata", JSON),
        needed("created_at", UtcTime()),
        sa.Column("expires_at", UtcTime()),
    )
    index("files", "account_id", "created_at", "id")
    index("files", "expires_at")
    index("files", "prediction_id")
    index("files", "sha256")
    op.create_table(
        "webhooks",
        key("id"),
        needed("prediction_id", ID, sa.ForeignKey("predictions.id")),
        needed("account_id", ID),
        needed("url", TEXT),
        needed("receiver", NAME),
        needed("event", WORD),
        sa.Column("body", TEXT),
        needed("state", WORD),
        needed("attempts", WHOLE),
        needed("next_at", UtcTime()),
        needed("created_at", UtcTime()),
        sa.Column("finished_at", UtcTime()),
        sa.Column("last_status", WHOLE),
        sa.Column("last_error", TEXT),
    )
    index("webhooks", "prediction_id", "event", "next_at")
    index("webhooks", "state", "next_at")
    op.create_table(
        "deployments",
        key("owner", NAME),
        key("name", NAME),
        needed("account_id", ID, sa.ForeignKey("accounts.id")),
        needed("number", WHOLE),
        needed("model", NAME),
        needed("version", ID),
        needed("hardware", NAME),
        needed("min_instances", WHOLE),
        needed("max_instances", WHOLE),
        needed("created_at", UtcTime()),
        needed("defaults", JSON),
    )
    op.create_table(
        "user_models",
        key("owner", NAME),
        key("name", NAME),
        needed("account_id", ID, sa.ForeignKey("accounts.id")),
        needed("visibility", WORD),
        needed("hardware", NAME),
        needed("created_at", UtcTime()),
        needed("description", TEXT),
        needed("readme", TEXT),
        sa.Column("github_url", TEXT),
        sa.Column("paper_url", TEXT),
        sa.Column("license_url", TEXT),
        sa.Column("weights_url", TEXT),
        sa.Column("cover_image_url", TEXT),
    )
    op.create_table(
        "user_versions",
        key("id"),
        needed("model", NAME),
        needed("base_model", NAME),
        needed("base_version", ID),
        needed("defaults", JSON),
        needed("created_at", UtcTime()),
    )
    index("user_versions", "model", "created_at")
    op.create_table(
        "usage",
        key("prediction_id"),
        needed("account_id", ID),
        sa.Column("token_id", ID),
        needed("model", NAME),
        needed("predict_seconds", sa.Float()),
        needed("completed_at", UtcTime()),
    )
    index("usage", "account_id", "completed_at")


def key(name: str, kind: Any = ID) -> sa.Column[Any]:
    """Return a column of the primary key."""
    return sa.Column(name, kind, primary_key=True)


def needed(name: str, kind: Any, *others: Any, unique: bool | None = None) -> sa.Column[Any]:
    """Return a column that is never null."""
    return sa.Column(name, kind, *others, unique=unique, nullable=False)


def index(table: str, *columns: str) -> None:
    """Add an index."""
    op.create_index(op.f(f"ix_{table}_{'_'.join(columns)}"), table, list(columns))
