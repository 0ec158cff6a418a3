"""Accounts, and what belongs to them: tokens, usage, their own models, and deployments."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import cache
from typing import Any, TypeVar

from sqlalchemy import (
    ColumnElement,
    Executable,
    Float,
    and_,
    bindparam,
    case,
    delete,
    distinct,
    func,
    or_,
    select,
    update,
)
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.exc import IntegrityError

from tegula.errors import ConflictError, NotFoundError
from tegula.server.db import Clock, Database, Page, new_id, new_secret, read_page
from tegula.server.pubsub import PubSub
from tegula.server.tables import (
    Account,
    Base,
    Deployment,
    ModelTotal,
    RateBucket,
    Token,
    UsageRecord,
    UserModel,
    UserVersion,
)

TOKEN_PREFIX = "tgl_"  # noqa: S105 - the public beginning of every token
_NOTE_USE_EVERY = timedelta(minutes=1)
_FULL_AFTER_S = 120.0
"""When every bucket of requests is full again, also one that owes some."""

R = TypeVar("R", bound=Base)


@dataclass(frozen=True)
class Accounts:
    """Accounts, and the tokens that open them."""

    database: Database
    clock: Clock

    def ensure(self, username: str, name: str = "") -> Account:
        """Return the account of this name, created if there is none."""
        # Alone, so that two who want a new account at once make one.
        with self.database.write(alone=True) as session:
            found = session.scalar(select(Account).where(Account.username == username))
            if found is None:
                now = self.clock()
                found = Account(new_id(now), username, name or username, "user", now)
                session.add(found)
        return found

    def get(self, account_id: str) -> Account:
        """Return an account.

        Raises:
            NotFoundError: there is none with this id.
        """
        with self.database.read() as session:
            found = session.get(Account, account_id)
        if found is None:
            raise NotFoundError("There is no such account.")
        return found

    def create_token(self, account_id: str, name: str) -> tuple[Token, str]:
        """Return a new token and its text, which is kept nowhere.

        Raises:
            ConflictError: a valid token has this name already.
        """
        now, plain = self.clock(), TOKEN_PREFIX + new_secret()
        taken = select(Token.id).where(Token.name == name, Token.revoked_at.is_(None))
        with self.database.write(alone=True) as session:
            if session.scalar(taken) is not None:
                raise ConflictError(f"A token is named {name!r} already; revoke it first.")
            token = Token(new_id(now), account_id, name, _hash(plain), plain[-4:], now)
            session.add(token)
        return token, plain

    def authenticate(self, plain: str) -> tuple[Account, Token] | None:
        """Return whose token this is, or None if it is unknown or revoked."""
        with self.database.read() as session:
            found = session.execute(_BY_TOKEN, {"hash": _hash(plain)}).one_or_none()
        return None if found is None else self._note_use(*found)

    def resume(self, token_id: str) -> tuple[Account, Token] | None:
        """Return whose token has this id, as a browser's session has it; None if it is revoked."""
        query = _TOKENS.where(Token.id == token_id)
        with self.database.read() as session:
            found = session.execute(query).one_or_none()
        return None if found is None else self._note_use(*found)

    def _note_use(self, account: Account, token: Token) -> tuple[Account, Token]:
        now = self.clock()
        if token.last_used_at is None or now - token.last_used_at >= _NOTE_USE_EVERY:
            with self.database.write() as session:
                used = update(Token).where(Token.id == token.id).values(last_used_at=now)
                session.execute(used)
        return account, token

    def tokens(self, account_id: str | None = None) -> tuple[Token, ...]:
        """Return the tokens of one account or of all, oldest first, revoked ones too."""
        query = select(Token).order_by(Token.id)
        if account_id is not None:
            query = query.where(Token.account_id == account_id)
        with self.database.read() as session:
            return tuple(session.scalars(query))

    def revoke(self, token: str) -> bool:
        """Revoke the token of this id or name; False if there is none that is valid."""
        named = or_(Token.id == token, Token.name == token), Token.revoked_at.is_(None)
        with self.database.write() as session:
            found = session.scalars(select(Token).where(*named)).all()
            for each in found:
                each.revoked_at = self.clock()
        return bool(found)


def _hash(plain: str) -> str:
    # A token is 200 random bits: nothing to guess, so no slow hash is needed.
    return hashlib.sha256(plain.encode()).hexdigest()


# Asked for with every request, so it is put together once.
_TOKENS = (
    select(Account, Token)
    .join(Token, Token.account_id == Account.id)
    .where(Token.revoked_at.is_(None))
)
_BY_TOKEN = _TOKENS.where(Token.hash == bindparam("hash"))


# What callers may still ask for. One statement refills a bucket, takes out what a server let
# through since it last asked, and then the request at hand if one is left.

A_REQUEST = 1 - 1e-5
"""Seconds since 1970 are exact to a quarter of a microsecond, and some of that adds up."""

_SIZE, _OWED, _NOW = (bindparam(name, type_=Float) for name in ("size", "owed", "now"))
_PASSED = case((RateBucket.counted_at < _NOW, _NOW - RateBucket.counted_at), else_=0.0)
_FILLED = RateBucket.remaining + _PASSED * _SIZE / 60
_LEFT = case((_FILLED > _SIZE, _SIZE), else_=_FILLED) - _OWED


@cache
def _spend(insert: Callable[..., Any]) -> Executable:
    """Return the statement; ``insert`` is that of PostgreSQL or of SQLite."""
    new = insert(RateBucket.__table__).values(
        who=bindparam("key"),
        kind=bindparam("requests"),
        remaining=_SIZE - _OWED - 1,
        counted_at=_NOW,
        allowed=True,
    )
    changed = {
        "remaining": case((_LEFT >= A_REQUEST, _LEFT - 1), else_=_LEFT),
        # Clocks differ: with an earlier time the same seconds would fill the bucket twice.
        "counted_at": case((RateBucket.counted_at < _NOW, _NOW), else_=RateBucket.counted_at),
        "allowed": _LEFT >= A_REQUEST,
    }
    columns = RateBucket.allowed, RateBucket.remaining, RateBucket.counted_at
    there = new.on_conflict_do_update(index_elements=["who", "kind"], set_=changed)
    statement: Executable = there.returning(*columns)
    return statement


@dataclass(frozen=True)
class Spent:
    """What a bucket answers: whether the request may go on, and what is left since when."""

    allowed: bool
    remaining: float
    counted_at: float


@dataclass(frozen=True)
class RateBuckets:
    """The buckets of all callers, which all servers on the database share."""

    database: Database

    def spend(self, who: str, kind: str, *, size: int, owed: float, now: float) -> Spent:
        """Take one request out of somebody's bucket, if there is one.

        Args:
            who: whose bucket.
            kind: of requests.
            size: of the bucket, which is also what flows into it in a minute.
            owed: what is to be taken out besides, for requests that were let through before.
            now: seconds since 1970.
        """
        insert = sqlite.insert if self.database.is_sqlite else postgresql.insert
        values = {"key": who, "requests": kind, "size": size, "owed": owed, "now": now}
        row = self.database.write_unflushed(_spend(insert), values)
        return Spent(row.allowed, row.remaining, row.counted_at)

    def delete_full(self, now: float) -> None:
        """Remove those that are full by now, which are as good as none."""
        with self.database.write() as session:
            session.execute(delete(RateBucket).where(RateBucket.counted_at < now - _FULL_AFTER_S))


@dataclass(frozen=True)
class UsageLine:
    """What one token used of one model."""

    account_id: str
    token_id: str | None
    model: str
    predictions: int
    predict_seconds: float


@dataclass(frozen=True)
class Usage:
    """Seconds that predictions ran; they stay when the data of a prediction is removed."""

    database: Database

    def lines(
        self, account_id: str | None = None, since: datetime | None = None
    ) -> tuple[UsageLine, ...]:
        """Return the use of one account or of all, by token and model."""
        keys = UsageRecord.account_id, UsageRecord.token_id, UsageRecord.model
        query = select(*keys, func.count(), func.sum(UsageRecord.predict_seconds))
        if account_id is not None:
            query = query.where(UsageRecord.account_id == account_id)
        if since is not None:
            query = query.where(UsageRecord.completed_at >= since)
        with self.database.read() as session:
            rows = session.execute(query.group_by(*keys).order_by(*keys)).all()
        return tuple(UsageLine(*row) for row in rows)

    def mean_seconds(self) -> Mapping[str, float]:
        """Return how long a prediction of each model ran, on average."""
        ran = func.sum(ModelTotal.ran)
        query = select(ModelTotal.model, func.sum(ModelTotal.seconds) / ran)
        with self.database.read() as session:
            return dict(session.execute(query.group_by(ModelTotal.model).having(ran > 0)).all())

    def totals(self) -> tuple[int, float]:
        """Return how many predictions ran, and for how many seconds together."""
        query = select(func.sum(ModelTotal.ran), func.sum(ModelTotal.seconds))
        with self.database.read() as session:
            count, total = session.execute(query).one()
        return int(count or 0), float(total or 0.0)

    def add_up(self) -> None:
        """Make one row of all the totals of each model, if there are more."""
        rows, models = func.count(), func.count(distinct(ModelTotal.model))
        with self.database.read() as session:
            many = session.execute(select(rows > models).select_from(ModelTotal)).scalar()
        if not many:
            return
        with self.database.write(alone=True) as session:
            sums: dict[str, ModelTotal] = {}
            columns = ModelTotal.model, ModelTotal.created, ModelTotal.ran, ModelTotal.seconds
            # What others add meanwhile is not seen here, and stays.
            for model, created, ran, seconds in session.execute(
                delete(ModelTotal).returning(*columns)
            ):
                total = sums.setdefault(model, ModelTotal(model, created=0, ran=0, seconds=0.0))
                total.created += created
                total.ran += ran
                total.seconds += seconds
            session.add_all(sums.values())


VersionedModel = tuple[UserModel, tuple[UserVersion, ...]]
"""A user's model with its versions, newest first."""

_MODEL_NAME = UserModel.owner + "/" + UserModel.name


@dataclass(frozen=True)
class UserModels:
    """Models that users created, and their versions."""

    database: Database

    def create(self, model: UserModel) -> UserModel:
        """Add a model.

        Raises:
            ConflictError: there is one with this name.
        """
        return _insert(self.database, model, f"{model.full_name} exists already.")

    def get(self, owner: str, name: str) -> UserModel | None:
        """Return a model, if there is one with this name."""
        with self.database.read() as session:
            return session.get(UserModel, (owner, name))

    def update(self, owner: str, name: str, changes: Mapping[str, Any]) -> UserModel:
        """Change fields of a model.

        Raises:
            NotFoundError: there is none with this name.
        """
        with self.database.write() as session:
            model = session.get(UserModel, (owner, name), with_for_update=True)
            if model is None:
                raise NotFoundError("There is no such model.")
            for field, value in changes.items():
                setattr(model, field, value)
        return model

    def delete(self, owner: str, name: str) -> None:
        """Remove a model.

        Raises:
            NotFoundError: there is none with this name.
            ConflictError: it still has versions.
        """
        has_versions = select(UserVersion.id).where(UserVersion.model == f"{owner}/{name}").limit(1)
        with self.database.write() as session:
            if session.scalar(has_versions) is not None:
                raise ConflictError("The model still has versions; delete those first.")
            model = session.get(UserModel, (owner, name))
            if model is None:
                raise NotFoundError("There is no such model.")
            session.delete(model)

    def all(
        self, account_id: str | None = None, limit: int | None = None
    ) -> tuple[VersionedModel, ...]:
        """Return the public models and, with an account, its private ones, newest first."""
        return self._with_versions(_visible_to(account_id), limit)

    def named(self, owner: str, name: str, account_id: str | None) -> VersionedModel | None:
        """Return one model, if there is one that the account may see."""
        this_one = and_(UserModel.owner == owner, UserModel.name == name, _visible_to(account_id))
        return next(iter(self._with_versions(this_one)), None)

    def of_version(self, version_id: str, account_id: str | None) -> tuple[VersionedModel, ...]:
        """Return the models with a version whose id is this or begins so, newest first."""
        names = select(UserVersion.model).where(
            UserVersion.id.startswith(version_id, autoescape=True)
        )
        return self._with_versions(and_(_MODEL_NAME.in_(names), _visible_to(account_id)), 10)

    def version(self, version_id: str) -> UserVersion | None:
        """Return a version, if there is one with this id."""
        with self.database.read() as session:
            return session.get(UserVersion, version_id)

    def add_version(self, version: UserVersion) -> UserVersion:
        """Add a version to a model.

        Raises:
            ConflictError: there is one with this id.
        """
        return _insert(self.database, version, "This version exists already.")

    def delete_version(self, version_id: str) -> None:
        """Remove a version.

        Raises:
            NotFoundError: there is none with this id.
        """
        with self.database.write() as session:
            version = session.get(UserVersion, version_id)
            if version is None:
                raise NotFoundError("There is no such version.")
            session.delete(version)

    def _with_versions(
        self, where: ColumnElement[bool], limit: int | None = None
    ) -> tuple[VersionedModel, ...]:
        """Read models and all of their versions in two statements, however many there are."""
        models = (
            select(UserModel).where(where).order_by(UserModel.created_at.desc(), UserModel.name)
        )
        names = select(_MODEL_NAME).where(where)
        versions = select(UserVersion).order_by(UserVersion.created_at.desc())
        with self.database.read() as session:
            found = session.scalars(models.limit(limit)).all()
            if limit is not None:
                names = names.where(_MODEL_NAME.in_([model.full_name for model in found]))
            of: dict[str, list[UserVersion]] = {model.full_name: [] for model in found}
            if found:
                for version in session.scalars(versions.where(UserVersion.model.in_(names))):
                    of.get(version.model, []).append(version)
        return tuple((model, tuple(of[model.full_name])) for model in found)


def _visible_to(account_id: str | None) -> ColumnElement[bool]:
    public = UserModel.visibility == "public"
    return public if account_id is None else or_(public, UserModel.account_id == account_id)


@dataclass(frozen=True)
class Deployments:
    """Named model versions with pinned defaults and a range of concurrency."""

    database: Database
    clock: Clock
    pubsub: PubSub

    def create(self, deployment: Deployment) -> Deployment:
        """Add a deployment.

        Raises:
            ConflictError: there is one with this name.
        """
        new = _insert(self.database, deployment, f"{deployment.full_name} exists already.")
        self.pubsub.publish(new.full_name)
        return new

    def get(self, owner: str, name: str) -> Deployment | None:
        """Return a deployment, if there is one with this name."""
        with self.database.read() as session:
            return session.get(Deployment, (owner, name))

    def update(self, deployment: Deployment) -> Deployment:
        """Make a new release of a deployment: the next number, from now.

        Raises:
            NotFoundError: there is none with this name.
        """
        key = deployment.owner, deployment.name
        with self.database.write() as session:
            before = session.get(Deployment, key, with_for_update=True)
            if before is None:
                raise NotFoundError("There is no such deployment.")
            after = session.merge(
                dataclasses.replace(deployment, number=before.number + 1, created_at=self.clock())
            )
        self.pubsub.publish(after.full_name)
        return after

    def delete(self, owner: str, name: str) -> None:
        """Remove a deployment; what was asked of it still runs.

        Raises:
            NotFoundError: there is none with this name.
        """
        with self.database.write() as session:
            found = session.get(Deployment, (owner, name))
            if found is None:
                raise NotFoundError("There is no such deployment.")
            session.delete(found)
        self.pubsub.publish(found.full_name)

    def page(
        self, account_id: str, *, cursor: str | None = None, limit: int = 100
    ) -> Page[Deployment]:
        """Return deployments of an account, the latest release first.

        Raises:
            OptionError: the cursor is not from a page.
        """
        query = select(Deployment).where(Deployment.account_id == account_id)
        columns = Deployment.created_at, Deployment.name
        with self.database.read() as session:
            return read_page(session, query, columns, cursor=cursor, limit=limit)

    def stay_loaded(self) -> int:
        """Return how many engines all deployments together keep loaded."""
        with self.database.read() as session:
            return session.scalar(select(func.sum(Deployment.min_instances))) or 0


def _insert(database: Database, row: R, taken: str) -> R:
    # A copy is added: the caller's may be stored already, and adding it again would do nothing.
    new = dataclasses.replace(row)
    try:
        with database.write() as session:
            session.add(new)
    except IntegrityError as error:
        raise ConflictError(taken) from error
    return new
