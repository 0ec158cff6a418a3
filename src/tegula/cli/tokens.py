"""`tegula tokens`: who may use the server."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

import click

from tegula.cli.server_options import read_settings, server_options
from tegula.errors import NotFoundError

if TYPE_CHECKING:
    from tegula.predictions.store import Store


@click.group(name="tokens", help="Make, list and revoke the tokens that open the server.")
def TOKENS() -> None:  # noqa: N802 - named as the other commands are
    """Group the commands."""


@TOKENS.command(help="Make a token and print it; it is shown this once and kept nowhere.")
@click.argument("name")
@click.option(
    "--account", default="local", show_default=True,
    help="Whose predictions, files and models it opens; made if it is new.",
)  # fmt: skip
@server_options
def create(name: str, account: str, config: Path | None, folder: Path | None) -> None:
    """Make a token."""
    with _store(config, folder) as store:
        _, plain = store.accounts.create_token(store.accounts.ensure(account).id, name)
    click.echo(plain)


@TOKENS.command(name="list", help="List the tokens, without their text.")
@server_options
def list_tokens(config: Path | None, folder: Path | None) -> None:
    """List the tokens."""
    with _store(config, folder) as store:
        for token in store.accounts.tokens():
            account = store.accounts.get(token.account_id).username
            state = "revoked" if token.revoked_at else f"used {_day(token.last_used_at)}"
            click.echo(
                f"{token.name}  {account}  ...{token.hint}  {_day(token.created_at)}  {state}"
            )


@TOKENS.command(help="Revoke a token by its name or id, from its next request on.")
@click.argument("name")
@server_options
def revoke(name: str, config: Path | None, folder: Path | None) -> None:
    """Revoke a token."""
    with _store(config, folder) as store:
        if not store.accounts.revoke(name):
            raise NotFoundError(
                f"No valid token is named {name!r}; `tegula tokens list` lists them."
            )
    click.echo(f"{name} is revoked.", err=True)


@contextmanager
def _store(config: Path | None, folder: Path | None) -> Iterator[Store]:
    settings = read_settings(config, folder)
    from tegula.predictions.store import Store

    store = Store.open(settings)
    try:
        yield store
    finally:
        store.close()


def _day(moment: datetime | None) -> str:
    return moment.date().isoformat() if moment else "never"
