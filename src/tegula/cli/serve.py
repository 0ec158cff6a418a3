"""`tegula serve`: the HTTP API and the engine behind it."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import ipaddress
import math
import os
import signal
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tegula.cli.models import LIBRARY
from tegula.cli.options import Option, SectionedCommand, flag, path_option
from tegula.errors import MissingExtraError, OptionError
from tegula.models import DEFAULT_BUNDLE, PRECISIONS

if TYPE_CHECKING:
    from fastapi import FastAPI

    from tegula.catalog import Catalog
    from tegula.server.api.service import Background, Hardware
    from tegula.server.engine import Device
    from tegula.server.ray_engine import Place
    from tegula.server.settings import ServerSettings
    from tegula.server.store import Store
    from tegula.server.supervisor import Supervisor

_EXTRA_COMMAND = "pip install 'tegula[server]'"
_PACKAGES = (
    "alembic", "fastapi", "httpcore", "pydantic_settings", "pythonjsonlogger", "sqlalchemy",
    "uvicorn",
)  # fmt: skip
_M_ARENA_MAX = -8
_STARTUP_FAILED = 3


def read_settings(config: Path | None, given: Mapping[str, Any]) -> ServerSettings:
    """Return the settings of a file and the environment; what is given here wins.

    Raises:
        MissingExtraError: the server's packages are not installed.
        PathError, OptionError: the file cannot be read, or a setting is wrong.
    """
    # They are looked for and not imported: commands that open the store alone need few of them.
    if not all(map(find_spec, _PACKAGES)):
        raise MissingExtraError(f"The server needs packages of its own: {_EXTRA_COMMAND}.")
    from tegula.server.settings import load_settings

    return load_settings(config, **{name: value for name, value in given.items() if value})


@contextlib.contextmanager
def private_files() -> Iterator[None]:
    """Let nobody but this user read the files that are made within the block."""
    before = os.umask(0o077)
    try:
        yield
    finally:
        os.umask(before)


@dataclass(frozen=True)
class Address:
    """Where to listen.

    cert, key: PEM files for TLS.
    """

    host: str
    port: int
    cert: Path | None = None
    key: Path | None = None

    @property
    def url(self) -> str:
        """How this machine itself reaches it."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        scheme, usual_port = ("https", 443) if self.cert else ("http", 80)
        # Browsers and clients leave the usual port out, and so do the links that they compare.
        port = "" if self.port == usual_port else f":{self.port}"
        return f"{scheme}://{host}{port}"

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine reaches it."""
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"

    @property
    def is_wildcard(self) -> bool:
        """Whether it stands for every address of this machine, and so for none to publish."""
        return self.host in ("", "0.0.0.0", "::")  # noqa: S104 - compared, not bound


def _serve(
    host: str,
    port: int,
    public_url: str | None,
    tls_cert: Path | None,
    tls_key: Path | None,
    bundle: str | None,
    controlnet: str | None,
    vae: str | None,
    loras: tuple[str, ...],
    embeddings: tuple[str, ...],
    precision: str | None,
    devices: tuple[str, ...],
    config: Path | None,
    folder: Path | None,
    grace: float,
    log_level: str,
    *,
    demo: bool,
    no_auth: bool,
    force: bool,
) -> None:
    """Serve until a signal comes."""
    address = Address(host, port, tls_cert, tls_key)
    given = {
        "public_url": public_url,
        "bundle": bundle,
        "controlnet": controlnet,
        "vae": vae,
        "loras": loras,
        "embeddings": embeddings,
        "precision": precision,
        "devices": devices,
        "no_auth": no_auth,
    }
    with ExitStack() as stack:
        stack.enter_context(private_files())
        if demo:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="tegula-demo-")))
        settings = read_settings(config, {**given, "folder": folder})
        settings = check_address(settings, address, force=force)
        serve(settings, address, grace=grace, log_level=log_level, demo=demo)


def check_address(settings: ServerSettings, address: Address, *, force: bool) -> ServerSettings:
    """Return the settings with the public URL that fits the address.

    Raises:
        OptionError: the address is not free, everybody could use the server, or clients
            would be given useless links.
    """
    if settings.no_auth and not address.is_loopback and not force:
        raise OptionError(
            f"Without tokens everybody who reaches {address.host} could use the server; "
            "leave --no-auth out, or add --force."
        )
    if (address.cert is None) != (address.key is None):
        raise OptionError("--tls-cert and --tls-key go together.")
    if settings.public_url == type(settings).model_fields["public_url"].default:
        if address.is_wildcard:
            raise OptionError("Give --public-url: the address at which clients reach the server.")
        settings = settings.model_copy(update={"public_url": address.url})
    _check_free(address)
    return settings


def _check_free(address: Address) -> None:
    """Listen for a moment, to find out before the store is opened and the engine starts."""
    import asyncio
    import socket

    async def listen() -> None:
        loop = asyncio.get_running_loop()
        (await loop.create_server(asyncio.Protocol, address.host, address.port)).close()

    try:
        asyncio.run(listen())
    except OSError as error:
        # asyncio puts a text of its own around the system's, except where a name is unknown.
        known = error.errno is not None and not isinstance(error, socket.gaierror)
        reason = os.strerror(error.errno or 0) if known else error.strerror
        raise OptionError(
            f"The server cannot listen on {address.host or 'all addresses'}, port "
            f"{address.port}: {reason}; choose others with --host and --port."
        ) from error


def serve(
    settings: ServerSettings, address: Address, *, grace: float, log_level: str, demo: bool
) -> None:
    """Open the store, start the engine and answer requests until a signal comes.

    Raises:
        OptionError: the certificate cannot be used.
    """
    from tegula.catalog import Catalog, packaged_fingerprint
    from tegula.server.api.app import create_app
    from tegula.server.engine import check_bundles, device_of, discover_devices
    from tegula.server.log import log_as_json
    from tegula.server.ray_engine import connect
    from tegula.server.store import Store

    log_as_json(log_level.upper())
    share_heaps()
    where: Sequence[str] | Place
    devices: Sequence[Device]
    used: Sequence[str]
    if settings.engine == "ray":
        where, device = connect(settings)
        devices, used = (device,), (device.name,)
    else:
        only_cpu = set(settings.devices) == {"cpu"}
        devices = (device_of("cpu", "CPU"),) if only_cpu else discover_devices()
        where = used = settings.devices or tuple(device.name for device in devices)
    # The ids of versions contain the weights: those of the package by their content.
    is_packaged = settings.models.identity == DEFAULT_BUNDLE
    weights = packaged_fingerprint() if is_packaged else settings.models.identity
    check_bundles([*([] if is_packaged else [settings.models]), *settings.bundles.values()])
    store, catalog = Store.open(settings), Catalog(weights)
    try:
        app = create_app(
            store,
            catalog=catalog,
            hardware=_hardware(used, devices),
            background=_background(store, catalog, where, grace),
        )
        token = _demo_token(store) if demo else None
        _listen(app, address, grace, lambda: _greet(settings, token))
    finally:
        store.close()


def share_heaps() -> None:
    """Keep memory flat: glibc gives every thread a heap, and each becomes full of holes."""
    with contextlib.suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).mallopt(_M_ARENA_MAX, 2)


def spare_what_is_loaded() -> None:
    """Leave modules and routes, which stay for good, out of all later searches for garbage.

    They are about 150,000 objects, and nobody is answered during a full search: 90 ms with them.
    """
    gc.collect()
    gc.freeze()


def _hardware(used: Sequence[str], devices: Sequence[Device]) -> list[Hardware]:
    """Return the devices in use as the API lists them, each kind once."""
    from tegula.server.api.service import Hardware

    known = {device.name: device for device in devices}
    titles = {}
    for name in used:
        device = known.get(name)
        titles[device.sku if device else name] = device.title if device else name
    return [Hardware(sku, title) for sku, title in titles.items()]


@dataclass(frozen=True)
class _Graceful:
    """Stops a supervisor with time to finish what runs."""

    supervisor: Supervisor
    seconds: float

    def start(self) -> None:
        self.supervisor.start()

    def stop(self) -> None:
        self.supervisor.stop(self.seconds)


def _background(
    store: Store, catalog: Catalog, where: Sequence[str] | Place, grace: float
) -> list[Background]:
    from tegula.server.addresses import Policy
    from tegula.server.background import Sweeper, WebhookSender
    from tegula.server.fetch import Fetcher
    from tegula.server.pubsub import ChangeRelay
    from tegula.server.supervisor import open_engines, open_supervisor

    fetcher = Fetcher(Policy.of(store.settings))
    engines = open_engines(store.settings, catalog, where)
    supervisor = open_supervisor(store, catalog, engines, fetcher)
    return [
        ChangeRelay(store.database, store.pubsub),
        WebhookSender(store, fetcher),
        Sweeper(store),
        _Graceful(supervisor, grace),
    ]


def _listen(app: FastAPI, address: Address, grace: float, greet: Callable[[], None]) -> None:
    from tegula.server.api.app import GracefulServer
    from tegula.server.api.connections import serving_config

    config = serving_config(
        app,
        host=address.host,
        port=address.port,
        timeout_graceful_shutdown=math.ceil(grace),
        ssl_certfile=address.cert,
        ssl_keyfile=address.key and str(address.key),
    )
    try:
        config.load()
    except OSError as error:
        raise OptionError(
            f"--tls-cert {address.cert} and --tls-key {address.key} are no PEM files of a "
            f"certificate and its key: {error.strerror or error}."
        ) from error
    # After its own orderly stop uvicorn raises the signal again, which would kill us here.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: None)
    server = GracefulServer(config, app.state.service, on_listening=greet)
    spare_what_is_loaded()
    server.run()
    if not server.started:
        click.get_current_context().exit(_STARTUP_FAILED)


def _demo_token(store: Store) -> str:
    account = store.accounts.ensure("demo", "Demo")
    return store.accounts.create_token(account.id, "demo")[1]


def _greet(settings: ServerSettings, token: str | None) -> None:
    """Print where the server is; in a demo also a token and a page that has it."""
    url = settings.public_url
    click.echo(
        f"The pages are at {url}, the API at {url}/v1, its documentation at {url}/docs.", err=True
    )
    if token is None:
        return
    # Browsers send nowhere what stands behind the #; the page takes it out of the address.
    page = f"{settings.public_url}/#token={token}"
    click.echo(f"Token: {token}", err=True)
    click.echo(f"A page to try it, with the token in it: {page}", err=True)
    click.echo(f"All data is in {settings.folder}, which is deleted at the end.", err=True)
    if sys.stderr.isatty():
        import webbrowser

        threading.Timer(1.5, webbrowser.open, [page]).start()


_HELP = f"""Serve Replicate's HTTP API on this machine.

\b
  tegula serve --demo                    try it: prints a token, keeps nothing
  tegula tokens create laptop            create a token
  tegula serve                           serve at http://127.0.0.1:8000

Point a Replicate client at the address; docs/server.md has an example for each. The server
needs packages of its own: {_EXTRA_COMMAND}.
"""
CONFIG = path_option(
    ["--config"], "JSON file of settings; the environment wins over it (TEGULA_PUBLIC_URL, ...)."
)
FOLDER = path_option(["--folder"], "Where the database and the files are kept.", "FOLDER")


class _ServeCommand(SectionedCommand):
    """Describes options that are settings, and all other settings, as ``ServerSettings`` does.

    They are read for the help alone: the class needs packages that other commands do without.
    """

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the options, and then what only the file and the environment set."""
        try:
            from tegula.server.settings import describe_settings
        except ImportError:
            super().format_options(ctx, formatter)
            return
        texts = {
            setting.name: setting.effect
            if setting.default in ("none", "no")
            else f"{setting.effect} [default: {setting.default}]"
            for setting in describe_settings()
        }
        for parameter in self.params:
            if isinstance(parameter, click.Option) and parameter.name in texts:
                parameter.help = texts.pop(parameter.name)
        super().format_options(ctx, formatter)
        with formatter.section(
            "Other settings, in the environment, or in --config in lower case without TEGULA_"
        ):
            formatter.write_dl([(f"TEGULA_{name.upper()}", text) for name, text in texts.items()])


SERVE = _ServeCommand(
    "serve",
    _serve,
    [],
    {
        "Address": [
            Option(["--host"], "Address to listen on.", default="127.0.0.1"),
            Option(
                ["--port"],
                "Port to listen on.",
                type=click.IntRange(1, 65535),
                default=8000,
                metavar="INTEGER",
            ),
            Option(["--public-url"], "How clients reach the server.", metavar="URL"),
            path_option(["--tls-cert"], "PEM file of the certificate."),
            path_option(["--tls-key"], "PEM file of its key."),
        ],
        "Access": [
            flag(["--demo"], "Try it out in a temporary folder, token included."),
            flag(["--no-auth"], "Ask for no token."),
            flag(["--force"], "Allow --no-auth on an address that other machines reach."),
        ],
        "Models": [
            Option(["--model", "--bundle", "bundle"], "What to run.", metavar="NAME|PATH"),
            Option(["--controlnet"], "Another tile ControlNet.", metavar="NAME|PATH"),
            Option(["--vae"], "Another autoencoder.", metavar="NAME|PATH"),
            Option(
                ["--lora", "loras"],
                "A LoRA and its weight.",
                multiple=True,
                metavar="NAME[:WEIGHT]",
            ),
            Option(
                ["--embedding", "embeddings"],
                "A textual inversion.",
                multiple=True,
                metavar="NAME|FILE",
            ),
            Option(
                ["--precision"], "What to compute in.", type=click.Choice(PRECISIONS), default=None
            ),
            LIBRARY,
            Option(["--device", "devices"], "Where to run.", multiple=True, metavar="DEVICE"),
        ],
        "Running": [
            CONFIG,
            FOLDER,
            Option(
                ["--grace"],
                "Seconds for running predictions to finish when the server stops, during which "
                "it still answers; the others are run again later.",
                type=click.FloatRange(0),
                default=30.0,
                metavar="SECONDS",
            ),
            Option(
                ["--log-level"],
                "Log messages of this level and above.",
                type=click.Choice(["debug", "info", "warning", "error"]),
                default="info",
            ),
        ],
    },
    help_text=_HELP,
    short_help="Serve Replicate's HTTP API on this machine.",
)
