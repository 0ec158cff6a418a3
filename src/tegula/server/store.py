"""Everything that the server remembers, behind one name."""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from datetime import timedelta

from sqlalchemy import select

from tegula.server import db as tables
from tegula.server.accounts import Accounts, Deployments, Ledger, UserModels
from tegula.server.db import Clock, Database, Prediction, utc_now
from tegula.server.files import Blobs, Files
from tegula.server.links import Links, Signer, compact_json, prediction_object
from tegula.server.queue import Changes, Lifecycle, Predictions, Queue
from tegula.server.settings import ServerSettings
from tegula.server.webhooks import Outbox, Webhooks

_SIGNING = "signing"


@dataclass(frozen=True)
class Store:
    """The parts of one store; all may be used from many threads at once.

    Several processes may open the same one. ``changes`` tells only of this process.
    """

    settings: ServerSettings
    clock: Clock
    database: Database
    links: Links
    blobs: Blobs
    changes: Changes
    accounts: Accounts
    predictions: Predictions
    queue: Queue
    files: Files
    webhooks: Webhooks
    models: UserModels
    deployments: Deployments
    usage: Ledger

    @classmethod
    def open(cls, settings: ServerSettings, *, clock: Clock = utc_now) -> Store:
        """Open the store that the settings name, making what is missing.

        Raises:
            OptionError, MissingExtraError, PathError, ServiceError: as ``Database`` does.
        """
        database = Database(settings.store_url)
        signer = Signer(_signing_key(database, clock))
        links = Links(settings.public_url, signer, settings.url_aliases)
        blobs, changes = Blobs(settings.folder / "files"), Changes()

        def body(prediction: Prediction) -> str:
            strict = settings.strict_statuses
            return compact_json(prediction_object(prediction, links, strict_statuses=strict))

        outbox = Outbox(body)
        lifecycle = Lifecycle(outbox)
        lease = timedelta(seconds=settings.lease_seconds)
        return cls(
            settings=settings,
            clock=clock,
            database=database,
            links=links,
            blobs=blobs,
            changes=changes,
            accounts=Accounts(database, clock),
            predictions=Predictions(
                database,
                clock,
                lifecycle,
                changes,
                settings.max_waiting,
                settings.max_waiting_seconds,
            ),
            queue=Queue(database, clock, lifecycle, changes, lease),
            files=Files(database, blobs, links, clock, settings.max_upload_bytes),
            webhooks=Webhooks(database, clock, outbox),
            models=UserModels(database),
            deployments=Deployments(database, clock),
            usage=Ledger(database),
        )

    def close(self) -> None:
        """Let go of the database."""
        self.database.close()


def _signing_key(database: Database, clock: Clock) -> bytes:
    """Return the key of our links, made once; of two made at the same time the first counts."""
    table = tables.secret_keys
    first = select(table.c.value).where(table.c.owner == _SIGNING).order_by(table.c.id).limit(1)
    with database.write() as connection:
        value = connection.execute(first).scalar()
    if value is None:
        row = {"owner": _SIGNING, "value": secrets.token_hex(32), "created_at": clock()}
        with database.write() as connection:
            connection.execute(table.insert().values(row))
        with database.read() as connection:
            value = connection.execute(first).scalar()
    return bytes.fromhex(value or "")
