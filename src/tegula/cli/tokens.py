"""`tegula tokens`: who may use the server."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

import click

from tegula.cli.options import Option
from tegula.cli.serve import CONFIG, FOLDER, private_files, read_settings
from tegula.errors import NotFoundError

if TYPE_CHECKING:
    from tegula.server.store import Store


@contextmanager
def _open_store(config: Path | None, folder: Path | None) -> Iterator[Store]:
    settings = read_settings(config, {"folder": folder})
    from tegula.server.store import Store

    with private_files():
        store = Store.open(settings)
        try:
            yield store
        finally:
            store.close()


def _create_token(name: str, account: str, config: Path | None, folder: Path | None) -> None:
    with _open_store(config, folder) as store:
        _, plain = store.accounts.create_token(store.accounts.ensure(account).id, name)
    click.echo(plain)


def _list_tokens(config: Path | None, folder: Path | None) -> None:
    def day(moment: datetime | None) -> str:
        return moment.date().isoformat() if moment else "never"

    with _open_store(config, folder) as store:
        for token in store.accounts.tokens():
            account = store.accounts.get(token.account_id).username
            state = "revoked" if token.revoked_at else f"last used {day(token.last_used_at)}"
            created = f"created {day(token.created_at)}"
            click.echo(f"{token.name}  {account}  ...{token.hint}  {created}  {state}")


def _revoke_token(name: str, config: Path | None, folder: Path | None) -> None:
    with _open_store(config, folder) as store:
        if not store.accounts.revoke(name):
            raise NotFoundError(
                f"No valid token is named {name!r}; `tegula tokens list` lists them."
            )
    click.echo(f"{name} is revoked.", err=True)


def _rotate_key(config: Path | None, folder: Path | None) -> None:
    with _open_store(config, folder) as store:
        store.rotate_signing_key()
    click.echo(
        "The key is new. Restart the server now: until then it accepts the links of the old key.",
        err=True,
    )


TOKENS = click.Group(
    "tokens",
    help="Create, list and revoke the tokens that give access to the server; replace its key.",
    commands=[
        click.Command(
            "create",
            callback=_create_token,
            help="Create a token and print it: this once, since only its hash is kept.",
            short_help="Create a token and print it.",
            params=[
                click.Argument(["name"]),
                Option(
                    ["--account"],
                    "The account whose predictions, files and models it gives access to; "
                    "created if it is new.",
                    default="local",
                    metavar="NAME",
                ),
                CONFIG,
                FOLDER,
            ],
        ),
        click.Command(
            "list",
            callback=_list_tokens,
            help="List the tokens, without their text.",
            params=[CONFIG, FOLDER],
        ),
        click.Command(
            "revoke",
            callback=_revoke_token,
            help="Revoke a token by its name or id, from its next request on.",
            short_help="Revoke a token.",
            params=[click.Argument(["name"]), CONFIG, FOLDER],
        ),
        click.Command(
            "rotate-key",
            callback=_rotate_key,
            help="Replace the key that signs links, for instance when the database was read by "
            "somebody. Links to outputs and streams that were given out so far stop working when "
            "the server restarts; tokens stay valid, and predictions have new links.",
            short_help="Replace the key that signs links.",
            params=[CONFIG, FOLDER],
        ),
    ],
)
