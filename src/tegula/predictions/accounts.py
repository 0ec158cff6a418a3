"""Accounts, and the tokens that open them."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from datetime import timedelta

from sqlalchemy import bindparam, or_, select, update

from tegula.errors import ConflictError, NotFoundError
from tegula.predictions import tables
from tegula.predictions.clock import Clock
from tegula.predictions.database import Database
from tegula.predictions.ids import new_id, new_secret
from tegula.predictions.mapping import columns_of, record
from tegula.predictions.records import Account, Token

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
