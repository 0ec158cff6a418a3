"""Note which predictions wait for an input to be fetched.

Nothing is noted of those that are here already. The first device that is free finds out that an
input is missing, and hands the prediction over to those that fetch.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Add the host that the next input is fetched from."""
    op.add_column("predictions", sa.Column("fetch_host", sa.String(255)))
