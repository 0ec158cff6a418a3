"""Count what the devices gave each account, so that accounts take turns."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Add the counter; all accounts begin as equals."""
    op.add_column("accounts", sa.Column("turn", sa.Float(), nullable=False, server_default="0"))
