"""`tegula tokens`: who may use the server; `tegula webhooks`: what it sent and has to send."""

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
    short_help="Manage the tokens that give access to the server.",
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


def _list_webhooks(
    prediction: str | None, state: str | None, limit: int, config: Path | None, folder: Path | None
) -> None:
    with _open_store(config, folder) as store:
        page = store.webhooks.page(None, limit=limit, prediction_id=prediction, state=state)
    for message in page.items:
        last = message.last_error or (message.last_status and f"answered {message.last_status}")
        words = [
            message.id,
            message.created_at.isoformat(timespec="seconds"),
            message.prediction_id,
            message.event,
            f"{message.state} after {message.attempts} attempts",
            message.url,
            str(last or ""),
        ]
        click.echo("  ".join(words).rstrip())


def _replay_webhooks(names: tuple[str, ...], config: Path | None, folder: Path | None) -> None:
    with _open_store(config, folder) as store:
        for name in names:
            store.webhooks.replay(name)
    click.echo("The server sends again what was named, now or when it runs.", err=True)


WEBHOOKS = click.Group(
    "webhooks",
    help="List the webhooks that the server sent or has to send, and send some again.",
    short_help="List webhooks of the server, and send some again.",
    commands=[
        click.Command(
            "list",
            callback=_list_webhooks,
            help="List the webhooks of the last week, newest first, with how the receiver "
            "answered last.",
            short_help="List webhooks, newest first.",
            params=[
                Option(["--prediction"], "Only those about this prediction.", metavar="ID"),
                Option(
                    ["--state"],
                    "Only those in this state.",
                    type=click.Choice(["pending", "delivered", "failed"]),
                ),
                Option(
                    ["--limit"],
                    "At most this many.",
                    type=click.IntRange(1),
                    default=100,
                    metavar="INTEGER",
                ),
                CONFIG,
                FOLDER,
            ],
        ),
        click.Command(
            "replay",
            callback=_replay_webhooks,
            help="Send webhooks again, named by the ids that `tegula webhooks list` prints: at "
            "once, and if need be as often as new ones. Their ids stay the same, so that a "
            "receiver can tell.",
            short_help="Send webhooks again.",
            params=[
                click.Argument(["names"], nargs=-1, required=True, metavar="ID..."),
                CONFIG,
                FOLDER,
            ],
        ),
    ],
)
