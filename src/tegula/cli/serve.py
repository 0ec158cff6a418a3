"""`tegula serve`: the HTTP API and the engine behind it."""

from __future__ import annotations

import contextlib
import ctypes
import ipaddress
import signal
import sys
import tempfile
import threading
import webbrowser
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tegula.errors import MissingExtraError, NotFoundError, OptionError

if TYPE_CHECKING:
    from fastapi import FastAPI

    from tegula.server.api.service import Background
    from tegula.server.settings import ServerSettings
    from tegula.server.store import Store
    from tegula.server.supervisor import Supervisor


# What `tegula serve` and `tegula tokens` share: where the server's settings come from.

OPTIONS: tuple[Callable[..., Any], ...] = (
    click.option(
        "--config",
        type=click.Path(path_type=Path),
        help="JSON file of settings; the environment goes before it (TEGULA_PUBLIC_URL, ...).",
    ),
    click.option(
        "--folder",
        type=click.Path(path_type=Path),
        help="Where the database and the files lie.",
    ),
)


def server_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options to a command."""
    for option in reversed(OPTIONS):
        command = option(command)
    return command


def read_settings(config: Path | None, folder: Path | None, **others: Any) -> ServerSettings:
    """Return the settings; what is given here goes before file and environment.

    Raises:
        MissingExtraError: the server's packages are not installed.
        PathError, OptionError: a setting is wrong.
    """
    try:
        import alembic  # noqa: F401
        import fastapi  # noqa: F401
        import httpcore  # noqa: F401
        import pydantic_settings  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise MissingExtraError(
            "The server needs packages of its own: pip install 'tegula[server]'."
        ) from error
    from tegula.server.settings import load_settings

    given = {name: value for name, value in {**others, "folder": folder}.items() if value}
    return load_settings(config, **given)


# `tegula tokens`: who may use the server.


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
    from tegula.server.store import Store

    store = Store.open(settings)
    try:
        yield store
    finally:
        store.close()


def _day(moment: datetime | None) -> str:
    return moment.date().isoformat() if moment else "never"


# `tegula serve`: the HTTP API and the engine behind it.

_HELP = """Serve Replicate's HTTP API on this machine.

\b
  tegula serve --demo                    try it: a token is printed, nothing is kept
  tegula tokens create laptop            make a token
  tegula serve                           serve at http://127.0.0.1:8000

Point a Replicate client at the address; docs/server.md has an example for each.
"""
_CLOSE_CONNECTIONS_S = 5
_M_ARENA_MAX = -8
_KEEP_CONNECTIONS_S = 75
"""Longer than proxies keep an idle connection, which would else send into a closed one."""


@dataclass(frozen=True)
class Address:
    """Where to listen.

    cert, key: PEM files for TLS.
    """

    host: str
    port: int
    cert: Path | None
    key: Path | None

    @property
    def url(self) -> str:
        """How this machine itself reaches it."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{'https' if self.cert else 'http'}://{host}:{self.port}"

    @property
    def loopback(self) -> bool:
        """Whether only this machine reaches it."""
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"

    @property
    def wildcard(self) -> bool:
        """Whether it stands for every address of this machine, and so for none to give out."""
        return self.host in ("", "0.0.0.0", "::")  # noqa: S104 - compared, not bound


@dataclass(frozen=True)
class _Graceful:
    """Stops a supervisor with time to finish what runs."""

    supervisor: Supervisor
    seconds: float

    def start(self) -> None:
        self.supervisor.start()

    def stop(self) -> None:
        self.supervisor.stop(self.seconds)


class _Serve(click.Command):
    """Describes the settings in ``--help`` with the words of ``ServerSettings``.

    They are read only then: the class needs packages that other commands do without.
    """

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the options, and then what only the file and the environment set."""
        try:
            from tegula.server.settings import describe_settings
        except ImportError:
            super().format_options(ctx, formatter)
            return
        settings = {setting.name: setting for setting in describe_settings()}
        for parameter in self.params:
            setting = settings.pop(_SETTING_OF_OPTION.get(parameter.name or "", ""), None)
            if setting and isinstance(parameter, click.Option):
                parameter.help = setting.effect
        super().format_options(ctx, formatter)
        rows = [
            (f"TEGULA_{name.upper()}", f"{setting.effect}  [default: {setting.default}]")
            for name, setting in settings.items()
        ]
        with formatter.section("Other settings (environment, or in lower case in --config)"):
            formatter.write_dl(rows)


_SETTING_OF_OPTION = {
    "public_url": "public_url",
    "bundle": "bundle",
    "device": "devices",
    "folder": "folder",
    "no_auth": "no_auth",
}


@click.command(name="serve", help=_HELP, cls=_Serve)
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option("--port", default=8000, show_default=True, type=click.IntRange(1, 65535))
@click.option("--public-url", help="How clients reach the server, without /v1.")
@click.option("--tls-cert", type=click.Path(path_type=Path), help="PEM file of the certificate.")
@click.option("--tls-key", type=click.Path(path_type=Path), help="PEM file of its key.")
@click.option("--bundle", help="Weights to run; see `tegula models`.")
@click.option("--device", multiple=True, help="Where to run, such as cpu or cuda:1; repeatable.")
@click.option("--no-auth", is_flag=True, help="Ask for no token; only on this machine.")
@click.option("--force", is_flag=True, help="Allow --no-auth on an address others reach.")
@click.option("--demo", is_flag=True, help="Try it out of a temporary folder, token included.")
@click.option(
    "--grace", default=30.0, show_default=True, type=click.FloatRange(0),
    help="Seconds for what runs to finish when the server stops; the rest is run again later.",
)  # fmt: skip
@click.option(
    "--log-level", default="info", show_default=True,
    type=click.Choice(["debug", "info", "warning", "error"]),
)  # fmt: skip
@server_options
def SERVE(  # noqa: N802 - named as the other commands are
    host: str,
    port: int,
    public_url: str | None,
    tls_cert: Path | None,
    tls_key: Path | None,
    bundle: str | None,
    device: tuple[str, ...],
    config: Path | None,
    folder: Path | None,
    grace: float,
    log_level: str,
    *,
    no_auth: bool,
    force: bool,
    demo: bool,
) -> None:
    """Serve until a signal comes."""
    address = Address(host, port, tls_cert, tls_key)
    given = {"public_url": public_url, "bundle": bundle, "devices": device, "no_auth": no_auth}
    with ExitStack() as stack:
        if demo:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="tegula-demo-")))
        settings = read_settings(config, folder, **given)
        settings = check_address(settings, address, force=force)
        serve(settings, address, grace=grace, log_level=log_level, demo=demo)


def check_address(settings: ServerSettings, address: Address, *, force: bool) -> ServerSettings:
    """Return the settings with the public URL that fits the address.

    Raises:
        OptionError: strangers could come in, or clients would be given useless links.
    """
    if settings.no_auth and not address.loopback and not force:
        raise OptionError(
            f"Without tokens everybody who reaches {address.host} could use the server; "
            "leave --no-auth out, or add --force."
        )
    if (address.cert is None) != (address.key is None):
        raise OptionError("--tls-cert and --tls-key go together.")
    if settings.public_url != _default_public_url():
        return settings
    if address.wildcard:
        raise OptionError("Say with --public-url how clients reach the server.")
    return settings.model_copy(update={"public_url": address.url})


def _default_public_url() -> str:
    from tegula.server.settings import ServerSettings

    return str(ServerSettings.model_fields["public_url"].default)


def serve(
    settings: ServerSettings, address: Address, *, grace: float, log_level: str, demo: bool
) -> None:
    """Open the store, start the engine and answer requests until a signal comes."""
    from tegula.catalog import Catalog
    from tegula.server.api.app import create_app
    from tegula.server.engine import device_of, discover_devices
    from tegula.server.settings import log_as_json
    from tegula.server.store import Store

    log_as_json(log_level.upper())
    share_heaps()
    only_cpu = set(settings.devices) == {"cpu"}
    devices = (device_of("cpu", "CPU"),) if only_cpu else discover_devices()
    store, catalog = Store.open(settings), Catalog(_weights(settings.bundle))
    used = settings.devices or tuple(device.name for device in devices)
    app = create_app(
        store,
        catalog=catalog,
        hardware=_hardware(used, devices),
        background=_background(store, catalog, used, grace),
    )
    _greet(settings, _demo_token(store) if demo else None)
    try:
        _listen(app, address)
    finally:
        store.close()


def share_heaps() -> None:
    """Keep memory flat: glibc gives every thread a heap, and each becomes full of holes."""
    with contextlib.suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).mallopt(_M_ARENA_MAX, 2)


def _listen(app: FastAPI, address: Address) -> None:
    import uvicorn

    tls: dict[str, Any] = {}
    if address.cert:
        tls = {"ssl_certfile": str(address.cert), "ssl_keyfile": str(address.key)}
    # After its own orderly stop uvicorn raises the signal again, which would kill us here.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: None)
    uvicorn.run(
        app,
        host=address.host,
        port=address.port,
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_keep_alive=_KEEP_CONNECTIONS_S,
        timeout_graceful_shutdown=_CLOSE_CONNECTIONS_S,
        **tls,
    )


def _background(
    store: Store, catalog: Any, devices: tuple[str, ...], grace: float
) -> list[Background]:
    from tegula.server.background import Deliverer, Sweeper
    from tegula.server.fetch import Fetcher, Policy
    from tegula.server.supervisor import local_engines, open_supervisor

    fetcher = Fetcher(Policy.of(store.settings))
    engines = local_engines(store.settings, catalog, devices)
    supervisor = open_supervisor(store, catalog, engines, fetcher)
    return [Deliverer(store, fetcher), Sweeper(store), _Graceful(supervisor, grace)]


def _hardware(used: tuple[str, ...], devices: Any) -> list[Any]:
    from tegula.server.api.service import Hardware

    known = {device.name: device for device in devices}
    told = {
        known[name].sku if name in known else name: known[name].title if name in known else name
        for name in used
    }
    return [Hardware(sku, title) for sku, title in told.items()]


def _weights(bundle: str) -> str:
    """Return what of the weights goes into the ids of versions."""
    from tegula.catalog.inputs import packaged_fingerprint

    return packaged_fingerprint() if bundle == "mini" else bundle


def _demo_token(store: Store) -> str:
    account = store.accounts.ensure("demo", "Demo")
    return store.accounts.create_token(account.id, "demo")[1]


def _greet(settings: ServerSettings, token: str | None) -> None:
    say = click.echo
    say(f"tegula serves {settings.public_url}/v1; its documentation is at /docs.", err=True)
    if token is None:
        return
    # Browsers send nowhere what stands behind the #; the page takes it out of the address.
    page = f"{settings.public_url}/#token={token}"
    say(f"Token: {token}", err=True)
    say(f"A page to try it, with the token in it: {page}", err=True)
    say(f"Everything lies in {settings.folder} and goes with it at the end.", err=True)
    if sys.stderr.isatty():
        threading.Timer(1.5, webbrowser.open, [page]).start()
