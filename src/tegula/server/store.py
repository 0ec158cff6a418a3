"""Everything that the server remembers, behind one name."""

from __future__ import annotations

import math
import secrets
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

from sqlalchemy import select, update

from tegula.errors import MissingExtraError, PathError, ServiceError
from tegula.folders import make_private
from tegula.server.accounts import Accounts, Deployments, RateBuckets, Usage, UserModels
from tegula.server.blobs import Blobs, FolderBlobs
from tegula.server.db import Clock, Database, utc_now
from tegula.server.fairness import FairTurns
from tegula.server.files import Files
from tegula.server.lifecycle import Lifecycle
from tegula.server.links import Links, Signer, compact_json, prediction_answer
from tegula.server.predictions import Predictions, Room
from tegula.server.pubsub import PubSub
from tegula.server.queue import Queue
from tegula.server.settings import ServerSettings
from tegula.server.tables import Prediction, Property, SecretKey
from tegula.server.tiles import Tiles
from tegula.server.webhooks import Webhooks

_SIGNING = "signing"
_PRESENT_KEY = (SecretKey.owner == _SIGNING, SecretKey.retired_at.is_(None))
_FILES_PROPERTY = "folder of files"
_OF_ONE_ACCOUNT = 0.8
"""Of the room for work that waits: a single account hardly notices, and others get in."""
_FOLDERS = ("copies", "files", "spool", "tiles")


@dataclass(frozen=True)
class Store:
    """The parts of one store; all may be used from many threads at once.

    Several processes may open the same one. ``pubsub`` tells of the others only while a
    ``ChangeRelay`` runs.
    """

    settings: ServerSettings
    clock: Clock
    database: Database
    links: Links
    blobs: Blobs
    pubsub: PubSub
    accounts: Accounts
    predictions: Predictions
    queue: Queue
    files: Files
    webhooks: Webhooks
    models: UserModels
    deployments: Deployments
    usage: Usage
    rates: RateBuckets
    tiles: Tiles

    @classmethod
    def open(cls, settings: ServerSettings, *, clock: Clock = utc_now) -> Store:
        """Open the store that the settings name, making what is missing.

        Raises:
            OptionError, MissingExtraError, PathError, ServiceError: as ``Database`` does.
        """
        _make_folder_private(settings.folder)
        database = Database(settings.store_url)
        signer = Signer(_signing_key(database, clock))
        links = Links(settings.public_url, signer, settings.url_aliases)

        def body(prediction: Prediction) -> str:
            strict = settings.strict_statuses
            shown = prediction_answer(prediction, links, strict_statuses=strict)
            return compact_json(shown.as_json())

        pubsub = PubSub()
        try:
            blobs = _open_blobs(settings)
            _keep_to_one_place(database, blobs)
        except BaseException:
            database.close()
            raise
        webhooks = Webhooks(database, clock, pubsub, body)
        lifecycle = Lifecycle(webhooks, FairTurns(settings.account_weights))
        lease = timedelta(seconds=settings.lease_seconds)
        room = Room(settings.max_waiting, settings.max_waiting_seconds)
        sizes = settings.max_upload_bytes, settings.max_account_bytes
        account_room = Room(
            settings.max_account_waiting or math.ceil(_OF_ONE_ACCOUNT * room.count),
            settings.max_account_waiting_seconds or _OF_ONE_ACCOUNT * room.seconds,
        )
        return cls(
            settings=settings,
            clock=clock,
            database=database,
            links=links,
            blobs=blobs,
            pubsub=pubsub,
            accounts=Accounts(database, clock),
            predictions=Predictions(database, clock, lifecycle, pubsub, room, account_room),
            queue=Queue(database, clock, lifecycle, pubsub, lease),
            files=Files(database, blobs, links, clock, *sizes),
            webhooks=webhooks,
            models=UserModels(database),
            deployments=Deployments(database, clock, pubsub),
            usage=Usage(database),
            rates=RateBuckets(database),
            tiles=Tiles(settings.folder / "tiles", blobs, settings.max_pixels),
        )

    def rotate_signing_key(self) -> None:
        """Replace the key that signs links; servers that run use the old one until they restart.

        Links to outputs and streams that were given out so far open nothing any more.
        """
        with self.database.write(alone=True) as session:
            now = self.clock()
            retire = update(SecretKey).where(*_PRESENT_KEY).values(retired_at=now)
            session.execute(retire)
            session.add(SecretKey(_SIGNING, secrets.token_hex(32), now))

    def close(self) -> None:
        """Let go of the database, and of the process that cuts tiles."""
        self.tiles.close()
        self.database.close()


def _signing_key(database: Database, clock: Clock) -> bytes:
    """Return the key of our links, made when the store is opened for the first time."""
    present = select(SecretKey.value).where(*_PRESENT_KEY).order_by(SecretKey.id)
    # Alone, so that of several processes that start at once one makes the key.
    with database.write(alone=True) as session:
        value = session.scalar(present.limit(1))
        if value is None:
            value = secrets.token_hex(32)
            session.add(SecretKey(_SIGNING, value, clock()))
    return bytes.fromhex(value)


def _open_blobs(settings: ServerSettings) -> Blobs:
    """Return the blobs of a server: in its folder, or in the bucket that the settings name.

    Raises:
        MissingExtraError: the client of object stores is not installed.
        StorageError: the address of the bucket or the environment is not complete.
    """
    if settings.blobs_url is None:
        return FolderBlobs(settings.folder / "files")
    try:
        from tegula.server.object_blobs import open_bucket
    except ModuleNotFoundError as error:
        raise MissingExtraError(
            "Files in an object store need its client: pip install 'tegula[objects]'."
        ) from error
    copies = settings.folder / "copies"
    return open_bucket(settings.blobs_url, copies, settings.blobs_copies_bytes)


def _keep_to_one_place(database: Database, blobs: Blobs) -> None:
    """Refuse a place other than the one that the files of the database are in.

    Raises:
        ServiceError: it is another one.
        PathError: it cannot be used.
    """
    # Alone, so that of several servers that start at once one gets to name the place.
    with database.write(alone=True) as session:
        known = session.get(Property, _FILES_PROPERTY)
        if known is None:
            session.add(Property(_FILES_PROPERTY, blobs.claim()))
        elif known.value != blobs.identity():
            raise ServiceError(
                f"The files of this database are in another folder or bucket than {blobs.place}: "
                "servers that share a database share their files too. Set folder or blobs_url to "
                "that of the others, or give this server a database of its own."
            )


def _make_folder_private(folder: Path) -> None:
    """Make the folder of the server's data its owner's alone, and mend one of an older release.

    A folder that also holds other things, such as a home, keeps its mode; what is ours in it is
    made private all the same.
    """
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        others = {path.name for path in folder.iterdir() if not path.name.startswith("tegula.")}
    except OSError as error:
        raise PathError(f"The folder {folder} cannot be used: {error.strerror}.") from error
    for name in _FOLDERS:
        make_private(folder / name)
    if not others - {*_FOLDERS, "models"}:
        make_private(folder, inside=False)
