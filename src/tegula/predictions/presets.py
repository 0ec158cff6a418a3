"""What users make of our models: models and versions of their own, and deployments."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sqlalchemy import ColumnElement, Table, delete, select, update
from sqlalchemy.exc import IntegrityError

from tegula.errors import ConflictError, NotFoundError
from tegula.predictions import tables
from tegula.predictions.clock import Clock
from tegula.predictions.database import Database
from tegula.predictions.mapping import columns_of, record
from tegula.predictions.records import Deployment, UserModel, UserVersion


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

    def all(self, account_id: str | None = None) -> tuple[UserModel, ...]:
        """Return the public models and, with an account, its private ones, newest first."""
        table = tables.user_models
        visible = table.c.visibility == "public"
        if account_id is not None:
            visible = visible | (table.c.account_id == account_id)
        query = select(table).where(visible).order_by(table.c.created_at.desc())
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
