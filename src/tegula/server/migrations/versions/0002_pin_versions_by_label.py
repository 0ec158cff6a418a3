"""Pin versions of the catalogue by their label in place of their id.

The id of a version is a hash that also covers the release and the weights, so that after an
upgrade no row would find its version any more. The label stays.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None

TWO_VERSIONS = "batouresearch/high-resolution-controlnet-tile"
FIRST_OF_TWO = "68cebf7b0a85a710df3f49fb6fb857a9461afff13c00dcf0865ec160c6fbdafe"
"""The one id that stood for an older version: release 0.1.0 with the packaged weights."""


def upgrade() -> None:
    """Put labels in the place of ids.

    When this was written the catalogue had one version of each model, labelled 1, and of one
    model two. An id of that model that is not known here came of other weights; it becomes
    the newer version, which is what people get who ask for no version.
    """
    with op.batch_alter_table("user_versions") as user_versions:
        user_versions.alter_column("base_version", new_column_name="base_label")
    op.add_column("predictions", sa.Column("label", sa.String(64)))
    of_catalogue = "version NOT IN (SELECT id FROM user_versions)"
    for table, model, version, label, where in (
        ("user_versions", "base_model", "base_label", "base_label", "1 = 1"),
        ("deployments", "model", "version", "version", of_catalogue),
        ("predictions", "model", "version", "label", of_catalogue),
    ):
        newer = f"{model} = '{TWO_VERSIONS}' AND {version} <> '{FIRST_OF_TWO}'"
        op.execute(
            f"UPDATE {table} SET {label} = CASE WHEN {newer} THEN '2' ELSE '1' END "  # noqa: S608
            f"WHERE {where}"
        )
