"""What was used: seconds by model and token, in the place of a bill."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime

from sqlalchemy import func, select

from tegula.predictions import tables
from tegula.predictions.database import Database
from tegula.predictions.records import Usage


@dataclass(frozen=True)
class Ledger:
    """Lines that stay when the data of a prediction is removed."""

    database: Database

    def lines(
        self, account_id: str | None = None, since: datetime | None = None
    ) -> tuple[Usage, ...]:
        """Return the use of one account or of all, by token and model."""
        table = tables.usage
        keys = (table.c.account_id, table.c.token_id, table.c.model)
        query = select(*keys, func.count(), func.sum(table.c.predict_seconds))
        if account_id is not None:
            query = query.where(table.c.account_id == account_id)
        if since is not None:
            query = query.where(table.c.completed_at >= since)
        with self.database.read() as connection:
            rows = connection.execute(query.group_by(*keys).order_by(*keys)).all()
        return tuple(Usage(*row) for row in rows)
