"""Find what is looked for among hundreds of thousands of past predictions.

Totals are kept in rows of their own, and indexes hold the rows that statements look for.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None

COUNTER = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
NOT_REMOVED = sa.column("data_removed", sa.Boolean).is_(False)


def upgrade() -> None:
    """Add up what there is, and make the indexes.

    Files that a worker stored after the data of their prediction was removed, which sweeps used
    to look for, become due now: from here on such files are due from their start.
    """
    op.create_table(
        "model_totals",
        sa.Column("id", COUNTER, autoincrement=True, nullable=False),
        sa.Column("model", sa.String(255), nullable=False),
        sa.Column("created", sa.BigInteger(), nullable=False),
        sa.Column("ran", sa.BigInteger(), nullable=False),
        sa.Column("seconds", sa.Float(), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_model_totals"),
    )
    for what, source in (
        ("count(*), 0, 0.0", "predictions"),
        ("0, count(*), sum(predict_seconds)", "usage"),
    ):
        op.execute(
            "INSERT INTO model_totals (model, created, ran, seconds) "  # noqa: S608
            f"SELECT model, {what} FROM {source} GROUP BY model"
        )
    op.execute(
        "UPDATE files SET expires_at = created_at WHERE prediction_id IN "
        "(SELECT id FROM predictions WHERE data_removed)"
    )
    op.drop_index("ix_predictions_model_created_at", "predictions")
    op.drop_index("ix_files_account_id_created_at_id", "files")
    place = ["account_id", "created_at", "id"]
    of_some("predictions", "kept_completed_at", ["completed_at"], NOT_REMOVED)
    of_some("predictions", "kept_account_id", place, NOT_REMOVED)
    of_some(
        "predictions", "shared_model", ["model", *place[1:]], sa.column("share_token").is_not(None)
    )
    of_some(
        "predictions", "claimed_deployment", ["deployment"], sa.column("lease_until").is_not(None)
    )
    of_some("files", "uploaded_account_id", place, sa.column("prediction_id").is_(None))
    op.create_index("ix_idempotency_keys_prediction_id", "idempotency_keys", ["prediction_id"])
    op.create_index("ix_webhooks_account_id_created_at_id", "webhooks", place)
    op.create_index("ix_webhooks_finished_at", "webhooks", ["finished_at"])


def of_some(table: str, name: str, columns: list[str], where: sa.ColumnElement[bool]) -> None:
    """Make an index of those rows alone that a statement with the same condition looks for."""
    op.create_index(
        f"ix_{table}_{name}", table, columns, sqlite_where=where, postgresql_where=where
    )
