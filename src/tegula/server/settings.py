"""The server's log: one JSON object a line, with the prediction it is about."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import types
import typing
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from tegula.errors import OptionError, PathError

# Everything an operator can set, read once from file and environment.

PREFIX = "TEGULA_"

MIB = 1 << 20


def _default_folder() -> Path:
    base = os.environ.get("XDG_DATA_HOME") or str(Path.home() / ".local" / "share")
    return Path(base) / "tegula"


@dataclass(frozen=True, kw_only=True)
class ServerSettings:
    """Settings of the server; each is read from ``TEGULA_`` and its name in capitals.

    public_url: how clients reach this server, without ``/v1``.
    url_aliases: other addresses of this server; links with them count as our own.
    folder: where files and, unless ``database_url`` says otherwise, the database lie.
    database_url: an SQLAlchemy URL for SQLite or PostgreSQL.
    no_auth: take every request as the account ``local``.
    retention_seconds: how long a finished prediction keeps its data; 0 keeps it for good.
    upload_seconds: how long an uploaded file is kept; 0 keeps it for good.
    max_body_bytes, max_upload_bytes: caps on a JSON request and on an upload.
    max_fetch_bytes, fetch_seconds: caps on fetching one input.
    fetch_http, fetch_private: whether inputs may be fetched, and webhooks sent, over
        plain HTTP, and to addresses in private networks.
    fetch_ports: the only ports fetched from.
    creates_per_minute, requests_per_minute: limits of a token.
    max_waiting, max_waiting_seconds: predictions, and estimated seconds of work, that may
        wait before new ones are refused.
    run_seconds: a prediction that runs for longer is given up.
    lease_seconds: how long a silent worker keeps what it claimed.
    hang_seconds: a child process that gives no sign of life for so long is replaced.
    load_seconds: the same while it loads a model.
    idle_unload_seconds: unload a model that long after its last use; 0 keeps it.
    cancel_seconds: a process that does not end a cancelled prediction in time is replaced.
    devices: where children run, such as ``cpu`` or ``cuda:0``; empty takes what is there.
    bundle: the weights that every model runs with.
    backend: what runs them: ``torch``, or ``openvino`` on processors.
    compile: compile the networks by torch while loading.
    max_pixels: pictures with more pixels are neither taken nor made.
    max_output_bytes: cap on one output file.
    inline_output_bytes: outputs up to this size are given as data URIs while the public
        URL is plain HTTP; 0 always gives links.
    strict_statuses: report ``aborted`` as such, which several clients cannot read.
    safety_checker: look at outputs before they are given out, and fail those held unsafe.
    safety_threshold: probability from which an output is unsafe, 0..1.
    safety_optional: honour the input ``disable_safety_checker``.
    default_model: ``owner/name`` that a bare ``latest`` means when the inputs do not tell.
    cors_origins: origins whose pages may call the API; ``*`` allows all.
    webhook_seconds: time-out of one webhook delivery.
    webhooks_per_receiver: deliveries to one host at the same time.
    """

    public_url: str = "http://127.0.0.1:8000"
    url_aliases: tuple[str, ...] = ()
    folder: Path = dataclasses.field(default_factory=_default_folder)
    database_url: str | None = None
    no_auth: bool = False
    retention_seconds: int = 3600
    upload_seconds: int = 86_400
    max_body_bytes: int = 64 * MIB
    max_upload_bytes: int = 100 * MIB
    max_fetch_bytes: int = 100 * MIB
    fetch_seconds: float = 60.0
    fetch_http: bool = True
    fetch_private: bool = False
    fetch_ports: tuple[int, ...] = (80, 443)
    creates_per_minute: int = 600
    requests_per_minute: int = 3000
    max_waiting: int = 1000
    max_waiting_seconds: float = 7200.0
    run_seconds: float = 1800.0
    lease_seconds: float = 15.0
    hang_seconds: float = 300.0
    load_seconds: float = 900.0
    idle_unload_seconds: float = 900.0
    cancel_seconds: float = 15.0
    devices: tuple[str, ...] = ()
    bundle: str = "mini"
    backend: str = "torch"
    compile: bool = False
    max_pixels: int = 134_217_728
    max_output_bytes: int = 1024 * MIB
    inline_output_bytes: int = 16 * MIB
    strict_statuses: bool = False
    safety_checker: bool = False
    safety_threshold: float = 0.8
    safety_optional: bool = True
    default_model: str | None = None
    cors_origins: tuple[str, ...] = ()
    webhook_seconds: float = 20.0
    webhooks_per_receiver: int = 4

    def __post_init__(self) -> None:
        if not self.public_url.startswith(("http://", "https://")):
            raise OptionError(
                f"public_url starts with http:// or https://, unlike {self.public_url!r}."
            )
        for name, value in vars(self).items():
            if isinstance(value, int | float) and not isinstance(value, bool) and value < 0:
                raise OptionError(f"{name} is at least 0, not {value}.")
        object.__setattr__(self, "public_url", self.public_url.rstrip("/"))

    @property
    def store_url(self) -> str:
        """The SQLAlchemy URL in use."""
        return self.database_url or f"sqlite:///{self.folder / 'tegula.sqlite3'}"

    @property
    def secure(self) -> bool:
        """Whether clients reach us over TLS."""
        return self.public_url.startswith("https://")


def load_settings(
    file: Path | None = None, environment: Mapping[str, str] | None = None
) -> ServerSettings:
    """Return the settings of a JSON file, overlaid with those of the environment.

    Lists are separated by commas in the environment.

    Raises:
        PathError: the file cannot be read.
        OptionError: a name is unknown or a value has the wrong form.
    """
    environment = os.environ if environment is None else environment
    values = _from_file(file) if file is not None else {}
    for name in _KINDS:
        if (text := environment.get(PREFIX + name.upper())) is not None:
            values[name] = text
    return ServerSettings(**{name: _value(name, value) for name, value in values.items()})


def _from_file(file: Path) -> dict[str, Any]:
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise PathError(f"The settings file {file} is no readable JSON: {error}.") from error
    if not isinstance(values, dict):
        raise OptionError(f"The settings file {file} holds one JSON object.")
    if unknown := sorted(set(values) - set(_KINDS)):
        raise OptionError(f"The settings file {file} has unknown names: {', '.join(unknown)}.")
    return values


_KINDS: Mapping[str, Any] = typing.get_type_hints(ServerSettings)
_TRUTHS = {"1": True, "true": True, "yes": True, "0": False, "false": False, "no": False}


def _value(name: str, value: Any) -> Any:
    kind = _KINDS[name]
    if typing.get_origin(kind) is types.UnionType:
        kind = typing.get_args(kind)[0]
    if typing.get_origin(kind) is tuple:
        parts = [part.strip() for part in value.split(",")] if isinstance(value, str) else value
        return tuple(_scalar(name, typing.get_args(kind)[0], part) for part in parts if part != "")
    return _scalar(name, kind, value)


def _scalar(name: str, kind: Any, value: Any) -> Any:
    try:
        if kind is bool:
            return value if isinstance(value, bool) else _TRUTHS[str(value).lower()]
        return kind(value)
    except (KeyError, TypeError, ValueError) as error:
        raise OptionError(f"{name} takes {_SPOKEN[kind]}, not {value!r}.") from error


_SPOKEN: Mapping[Any, str] = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "a text",
    Path: "a path",
}


# The server's log: one JSON object a line, with the prediction it is about.

_FIELDS = ("prediction", "account", "seconds")
_ABOUT: ContextVar[Mapping[str, Any]] = ContextVar("about")


@contextmanager
def about(**fields: Any) -> Iterator[None]:
    """Give fields to every line that is logged within the block, by whatever part it is.

    What is called in a thread pool of the event loop is within the block too.
    """
    before = _ABOUT.set({**_ABOUT.get({}), **fields})
    try:
        yield
    finally:
        _ABOUT.reset(before)


class JsonLines(logging.Formatter):
    """Formats records for machines; what was given as ``extra`` becomes a field."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line."""
        moment = datetime.fromtimestamp(record.created, timezone.utc)
        line = {
            "time": moment.isoformat(timespec="milliseconds").replace("+00:00", "Z"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        extra = {name: getattr(record, name) for name in _FIELDS if hasattr(record, name)}
        fields = {**_ABOUT.get({}), **extra}
        line |= {name: value for name, value in fields.items() if value is not None}
        if record.exc_info:
            line["trace"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False, default=str)


def log_as_json(level: str | int) -> None:
    """Send everything that is logged, and Python's warnings, to standard error as JSON lines."""
    handler = logging.StreamHandler()
    handler.setFormatter(JsonLines())
    logging.basicConfig(level=level, handlers=[handler], force=True)
    logging.captureWarnings(capture=True)
    logging.getLogger("alembic").setLevel(logging.WARNING)
