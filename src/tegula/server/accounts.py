"""Accounts: tokens, usage, private models and deployments."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import ColumnElement, Table, bindparam, delete, func, or_, select, update
from sqlalchemy.exc import IntegrityError

from tegula.errors import ConflictError, NotFoundError
from tegula.server import db as tables
from tegula.server.db import (
    Account,
    Clock,
    Database,
    Deployment,
    Token,
    Usage,
    UserModel,
    UserVersion,
    columns_of,
    new_id,
    new_secret,
    record,
)

# Accounts, and the tokens that open them.

TOKEN_PREFIX = "tgl_"  # noqa: S105 - the public beginning of every token

_REMEMBER_USE_EVERY = timedelta(minutes=1)

_BY_ID = select(tables.accounts).where(tables.accounts.c.id == bindparam("id"))
_BY_HASH = select(tables.tokens).where(
    tables.tokens.c.hash == bindparam("hash"), tables.tokens.c.revoked_at.is_(None)
)


@dataclass(frozen=True)
class Accounts:
    """Who may ask for what."""

    database: Database
    clock: Clock

    def ensure(self, username: str, name: str = "", kind: str = "user") -> Account:
        """Return the account of this name, making it if there is none."""
        with self.database.write() as connection:
            query = select(tables.accounts).where(tables.accounts.c.username == username)
            if found := connection.execute(query).one_or_none():
                return record(Account, found)
            now = self.clock()
            account = Account(new_id(now), username, name or username, kind, now)
            connection.execute(tables.accounts.insert().values(columns_of(account)))
            return account

    def get(self, account_id: str) -> Account:
        """Return an account.

        Raises:
            NotFoundError: there is none with this id.
        """
        with self.database.read() as connection:
            found = connection.execute(_BY_ID, {"id": account_id}).one_or_none()
        if found is None:
            raise NotFoundError("There is no such account.")
        return record(Account, found)

    def by_name(self, username: str) -> Account | None:
        """Return the account of this name, if there is one."""
        with self.database.read() as connection:
            query = select(tables.accounts).where(tables.accounts.c.username == username)
            found = connection.execute(query).one_or_none()
        return record(Account, found) if found else None

    def create_token(self, account_id: str, name: str) -> tuple[Token, str]:
        """Return a new token and its text, which is kept nowhere.

        Raises:
            ConflictError: a valid token has this name already.
        """
        now, plain = self.clock(), TOKEN_PREFIX + new_secret()
        token = Token(new_id(now), account_id, name, plain[-4:], now)
        with self.database.write() as connection:
            taken = select(tables.tokens.c.id).where(
                tables.tokens.c.name == name, tables.tokens.c.revoked_at.is_(None)
            )
            if connection.execute(taken).first():
                raise ConflictError(f"A token is named {name!r} already; revoke it first.")
            values = {**columns_of(token), "hash": _hash(plain)}
            connection.execute(tables.tokens.insert().values(values))
        return token, plain

    def authenticate(self, plain: str) -> tuple[Account, Token] | None:
        """Return whose token this is, or None if it is unknown or revoked."""
        with self.database.read() as connection:
            found = connection.execute(_BY_HASH, {"hash": _hash(plain)}).one_or_none()
            if found is None:
                return None
            token = record(Token, found)
            owner = connection.execute(_BY_ID, {"id": token.account_id}).one()
        self._remember_use(token)
        return record(Account, owner), token

    def tokens(self, account_id: str | None = None) -> tuple[Token, ...]:
        """Return the tokens of one account or of all, oldest first, revoked ones too."""
        query = select(tables.tokens).order_by(tables.tokens.c.id)
        if account_id is not None:
            query = query.where(tables.tokens.c.account_id == account_id)
        with self.database.read() as connection:
            return tuple(record(Token, row) for row in connection.execute(query))

    def revoke(self, token: str) -> bool:
        """Revoke the token of this id or name; False if there is none that is valid."""
        query = (
            update(tables.tokens)
            .where(or_(tables.tokens.c.id == token, tables.tokens.c.name == token))
            .where(tables.tokens.c.revoked_at.is_(None))
            .values(revoked_at=self.clock())
        )
        with self.database.write() as connection:
            return connection.execute(query).rowcount > 0

    def _remember_use(self, token: Token) -> None:
        now = self.clock()
        if token.last_used_at is not None and now - token.last_used_at < _REMEMBER_USE_EVERY:
            return
        query = update(tables.tokens).where(tables.tokens.c.id == token.id)
        with self.database.write() as connection:
            connection.execute(query.values(last_used_at=now))


def _hash(plain: str) -> str:
    # A token is 200 random bits: nothing to guess, so no slow hash is needed.
    return hashlib.sha256(plain.encode()).hexdigest()


# What was used: seconds by model and token, in the place of a bill.


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


# What users make of our models: models and versions of their own, and deployments.


@dataclass(frozen=True)
class UserModels:
    """Models that users created, and their versions."""

    database: Database

    def create(self, model: UserModel) -> UserModel:
        """Add a model.

        Raises:
            ConflictError: there is one with this name.
        """
        _insert(self.database, tables.user_models, model, f"{model.full_name} exists already.")
        return model

    def get(self, owner: str, name: str) -> UserModel | None:
        """Return a model, if there is one with this name."""
        query = select(tables.user_models).where(*_named(tables.user_models, owner, name))
        with self.database.read() as connection:
            row = connection.execute(query).one_or_none()
        return None if row is None else record(UserModel, row)

    def update(self, owner: str, name: str, changes: Mapping[str, Any]) -> UserModel:
        """Change fields of a model.

        Raises:
            NotFoundError: there is none with this name.
        """
        query = update(tables.user_models).where(*_named(tables.user_models, owner, name))
        with self.database.write() as connection:
            if changes:
                connection.execute(query.values(dict(changes)))
        model = self.get(owner, name)
        if model is None:
            raise NotFoundError("There is no such model.")
        return model

    def delete(self, owner: str, name: str) -> None:
        """Remove a model.

        Raises:
            NotFoundError: there is none with this name.
            ConflictError: it still has versions.
        """
        if self.versions(f"{owner}/{name}"):
            raise ConflictError("A model is deleted after all of its versions.")
        _delete(
            self.database, tables.user_models, "model", *_named(tables.user_models, owner, name)
        )

    def all(self, account_id: str | None = None, limit: int | None = None) -> tuple[UserModel, ...]:
        """Return the public models and, with an account, its private ones, newest first."""
        table = tables.user_models
        visible = table.c.visibility == "public"
        if account_id is not None:
            visible = visible | (table.c.account_id == account_id)
        query = select(table).where(visible).order_by(table.c.created_at.desc()).limit(limit)
        with self.database.read() as connection:
            return tuple(record(UserModel, row) for row in connection.execute(query))

    def add_version(self, version: UserVersion) -> UserVersion:
        """Add a version to a model.

        Raises:
            ConflictError: there is one with this id.
        """
        _insert(self.database, tables.user_versions, version, "This version exists already.")
        return version

    def versions(self, model: str) -> tuple[UserVersion, ...]:
        """Return the versions of ``owner/name``, newest first."""
        table = tables.user_versions
        query = select(table).where(table.c.model == model).order_by(table.c.created_at.desc())
        with self.database.read() as connection:
            return tuple(record(UserVersion, row) for row in connection.execute(query))

    def versions_of(self, models: Collection[str]) -> dict[str, list[UserVersion]]:
        """Return the versions of several models by ``owner/name``, newest first."""
        table = tables.user_versions
        query = select(table).where(table.c.model.in_(models)).order_by(table.c.created_at.desc())
        found: dict[str, list[UserVersion]] = {}
        with self.database.read() as connection:
            for row in connection.execute(query) if models else ():
                found.setdefault(row.model, []).append(record(UserVersion, row))
        return found

    def version(self, version_id: str) -> UserVersion | None:
        """Return a version, if there is one with this id."""
        query = select(tables.user_versions).where(tables.user_versions.c.id == version_id)
        with self.database.read() as connection:
            row = connection.execute(query).one_or_none()
        return None if row is None else record(UserVersion, row)

    def delete_version(self, version_id: str) -> None:
        """Remove a version.

        Raises:
            NotFoundError: there is none with this id.
        """
        table = tables.user_versions
        _delete(self.database, table, "version", table.c.id == version_id)


@dataclass(frozen=True)
class Deployments:
    """Named model versions with pinned defaults and a range of concurrency."""

    database: Database
    clock: Clock

    def create(self, deployment: Deployment) -> Deployment:
        """Add a deployment.

        Raises:
            ConflictError: there is one with this name.
        """
        about = f"{deployment.full_name} exists already."
        _insert(self.database, tables.deployments, deployment, about)
        return deployment

    def get(self, owner: str, name: str) -> Deployment | None:
        """Return a deployment, if there is one with this name."""
        query = select(tables.deployments).where(*_named(tables.deployments, owner, name))
        with self.database.read() as connection:
            row = connection.execute(query).one_or_none()
        return None if row is None else record(Deployment, row)

    def update(self, deployment: Deployment) -> Deployment:
        """Make a new release of a deployment: the next number, from now.

        Raises:
            NotFoundError: there is none with this name.
        """
        table = tables.deployments
        named = _named(table, deployment.owner, deployment.name)
        with self.database.write() as connection:
            number = connection.execute(select(table.c.number).where(*named)).scalar()
            if number is None:
                raise NotFoundError("There is no such deployment.")
            after = dataclasses.replace(deployment, number=number + 1, created_at=self.clock())
            connection.execute(update(table).where(*named).values(columns_of(after)))
        return after

    def delete(self, owner: str, name: str) -> None:
        """Remove a deployment; what was asked of it still runs.

        Raises:
            NotFoundError: there is none with this name.
        """
        table = tables.deployments
        _delete(self.database, table, "deployment", *_named(table, owner, name))

    def all(self, account_id: str | None = None) -> tuple[Deployment, ...]:
        """Return the deployments of one account or of all, newest first."""
        table = tables.deployments
        query = select(table).order_by(table.c.created_at.desc())
        if account_id is not None:
            query = query.where(table.c.account_id == account_id)
        with self.database.read() as connection:
            return tuple(record(Deployment, row) for row in connection.execute(query))


def _named(table: Table, owner: str, name: str) -> tuple[ColumnElement[bool], ...]:
    return table.c.owner == owner, table.c.name == name


def _insert(database: Database, table: Table, value: Any, about: str) -> None:
    try:
        with database.write() as connection:
            connection.execute(table.insert().values(columns_of(value)))
    except IntegrityError as error:
        raise ConflictError(about) from error


def _delete(database: Database, table: Table, kind: str, *where: ColumnElement[bool]) -> None:
    with database.write() as connection:
        if not connection.execute(delete(table).where(*where)).rowcount:
            raise NotFoundError(f"There is no such {kind}.")
