"""`tegula run`: a model of the API by its name, with its own inputs, here or on a server."""

from __future__ import annotations

import base64
import itertools
import json as json_format
import mimetypes
import os
import time
import urllib.error
import urllib.request
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any
from urllib.parse import urlsplit

import click

from tegula.cli.console import Console, Interruption
from tegula.cli.models import DEVICE, LIBRARY, MODEL, PRECISION, Runtime, load_upscaler
from tegula.cli.options import JSON, QUIET, Option
from tegula.cli.progress import show_progress, show_waiting
from tegula.cli.targets import refuse_address
from tegula.errors import CancelledError, InputError, OptionError, PathError, ServiceError
from tegula.models import DEFAULT_BUNDLE, BundleSettings

if TYPE_CHECKING:
    from tegula.catalog import Version
    from tegula.catalog.run import Provider
    from tegula.upscaler import Upscaler

_HELP = """Run a model by the name that it has in the API.

\b
  tegula run                                    list the models
  tegula run philz1337x/clarity-upscaler        list the inputs of one
  tegula run tegula/upscale image=@photo.jpg scale=4
  tegula run fewjative/ultimate-sd-upscale image=@photo.jpg denoise=0.4 mode_type=Chess
  tegula run --server http://gpu:5000 tegula/upscale image=@photo.jpg

`@` stands before the name of a file. A version may follow the model after a colon. With `--server`
that server does the work; TEGULA_TOKEN holds the token for it.
"""
_TOKEN = "TEGULA_TOKEN"  # noqa: S105 - the name of a variable
_PATIENCE_S = 60.0
_BETWEEN_LOOKS_S = 0.5


def _run(
    model: str | None,
    inputs: tuple[str, ...],
    output: Path,
    bundle: str | None,
    device: str,
    precision: str,
    server: str | None,
    *,
    json: bool,
    quiet: bool,
) -> None:
    from tegula.catalog import find

    console = Console.open(quiet=quiet, json=json)
    if model is None:
        _list_models(console)
        return
    version = find(model)
    if not inputs:
        _list_inputs(version, console)
        return
    interruption = Interruption()
    if server is not None:
        if bundle is not None:
            raise OptionError(
                "--server and --model exclude each other: a server has its own model."
            )
        remote = _Server.at(server)
        with interruption.installed():
            values = _parse_inputs(version, inputs, takes_addresses=True)
            pictures = _run_on_server(remote, model, values, console, interruption)
            source = _source_name(values.get(version.image))
            _write_pictures(pictures, output, source, version, console)
        return

    def load(loras: Sequence[tuple[str, float]]) -> Upscaler:
        models = BundleSettings(bundle=bundle or DEFAULT_BUNDLE, loras=tuple(loras))
        with interruption.unpolled():
            return load_upscaler(console, models, Runtime(device, precision))

    with interruption.installed():
        _run_version(version, inputs, output, load, console, interruption)


def _run_version(
    version: Version,
    arguments: Sequence[str],
    folder: Path,
    load: Provider,
    console: Console,
    interruption: Interruption,
) -> None:
    """Run a model and write its pictures into a folder, where they replace no others.

    Raises:
        TegulaError: an input is wrong, or as ``Upscaler.load`` and ``Upscaler.upscale``.
    """
    from tegula.catalog import run, validate

    inputs = validate(version, _parse_inputs(version, arguments))
    source = _source_name(getattr(inputs.values, version.image))
    _create_folder(folder)  # before the work, which would be lost without it
    with show_progress(console, source, source) as on_progress, interruption.polled():
        outputs = list(
            run(
                version,
                inputs,
                load,
                on_progress=on_progress,
                on_log=console.message,
                cancelled=interruption.requested,
            )
        )
    sizes = ({"width": one.width, "height": one.height} for one in outputs)
    pictures = ((Path(one.name).suffix, one.data) for one in outputs)
    _write_pictures(pictures, folder, source, version, console, sizes)


def _source_name(image: object) -> str:
    return image.stem if isinstance(image, Path) else "out"


def _create_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise PathError(f"{folder} cannot be created: {error.strerror}.") from error


def _write_pictures(
    pictures: Iterable[tuple[str, bytes]],
    folder: Path,
    source: str,
    version: Version,
    console: Console,
    facts: Iterable[Mapping[str, Any]] = (),
) -> None:
    """Write pictures, each with its suffix, into a folder; ``facts`` go into the records."""
    from tegula.folders import write_atomically

    _create_folder(folder)
    stem, numbers = f"{source}-{version.name.split('/')[1]}", itertools.count()
    fact: Mapping[str, Any]
    for (suffix, data), fact in itertools.zip_longest(pictures, facts, fillvalue={}):
        names = (f"{stem}-{number}{suffix}" for number in numbers)
        path = next(folder / name for name in names if not (folder / name).exists())
        write_atomically(path, data)
        console.message(str(path))
        console.record({"output": str(path), **fact})


@dataclass(frozen=True)
class _Server:
    """A server of tegula. Its ``address`` ends without a slash and without ``/v1``."""

    address: str
    token: str | None

    @classmethod
    def at(cls, address: str) -> _Server:
        if urlsplit(address).scheme not in {"http", "https"}:
            raise OptionError(f"--server takes an address such as http://gpu:5000, not {address}.")
        return cls(address.rstrip("/").removesuffix("/v1"), os.environ.get(_TOKEN))

    def call(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> Any:
        """Return the JSON of an answer; a busy server is asked again after the time it names.

        Raises:
            InputError: the server refuses what was sent.
            ServiceError: it does not answer, or does not know the token.
        """
        headers = {"content-type": "application/json"}
        if self.token:
            headers["authorization"] = f"Bearer {self.token}"
        data = None if body is None else json_format.dumps(body).encode()
        request = urllib.request.Request(  # noqa: S310 - begins with http
            f"{self.address}/v1{path}", data, headers, method=method
        )
        while True:
            try:
                with self._opened(request) as answer:
                    return json_format.load(answer)
            except urllib.error.HTTPError as error:  # noqa: PERF203 - it waits much longer
                if error.code not in {429, 503}:
                    raise self._refusal(error) from error
                after = error.headers.get("retry-after", "")
                time.sleep(float(after) if after.isdecimal() else 1.0)

    def fetch(self, address: str) -> bytes:
        """Return a picture of the server, or one within the address itself."""
        try:
            with self._opened(address) as answer:
                return answer.read()
        except urllib.error.HTTPError as error:
            raise self._refusal(error) from error

    @contextmanager
    def _opened(self, request: urllib.request.Request | str) -> Iterator[IO[bytes]]:
        try:
            with urllib.request.urlopen(request, timeout=_PATIENCE_S) as answer:  # noqa: S310
                yield answer
        except urllib.error.HTTPError:
            raise
        except (OSError, HTTPException, ValueError) as error:
            reason = getattr(error, "reason", error)
            raise ServiceError(f"{self.address} does not answer as a server: {reason}.") from error

    def _refusal(self, error: urllib.error.HTTPError) -> InputError | ServiceError:
        if error.code == 401:
            return ServiceError(
                f"{self.address} does not know the token: set {_TOKEN} to one that "
                "`tegula tokens create NAME` made on its machine."
            )
        try:
            detail = str(json_format.load(error)["detail"])
        except (ValueError, KeyError, TypeError):
            detail = f"{self.address} answered {error.code}."
        words = "; ".join(line.removeprefix("- ") for line in detail.splitlines() if line)
        return InputError(words) if error.code < 500 else ServiceError(words)


def _run_on_server(
    server: _Server,
    model: str,
    inputs: Mapping[str, Any],
    console: Console,
    interruption: Interruption,
) -> Iterator[tuple[str, bytes]]:
    """Yield the pictures that a model on a server made, each with the suffix of its name.

    Raises:
        CancelledError: a signal came; the prediction is cancelled.
        InputError, ServiceError: as ``_Server.call``, or the prediction failed.
    """
    sent = {
        name: _data_address(one) if isinstance(one, Path) else one for name, one in inputs.items()
    }
    with show_waiting(console, f"waiting for {server.address}"), interruption.polled():
        prediction = server.call("POST", "/predictions", {"version": model, "input": sent})
        path = f"/predictions/{prediction['id']}"
        while prediction["status"] in {"starting", "processing"}:
            time.sleep(_BETWEEN_LOOKS_S)
            if interruption.requested():
                server.call("POST", f"{path}/cancel")
                raise CancelledError
            prediction = server.call("GET", path)
    if prediction["status"] != "succeeded":
        raise ServiceError(prediction["error"] or f"The prediction is {prediction['status']}.")
    output = prediction["output"]
    for address in [output] if isinstance(output, str) else output:
        data = address.startswith("data:")
        kind = mimetypes.guess_extension(address[5:].partition(";")[0]) if data else None
        yield kind or Path(urlsplit(address).path).suffix, server.fetch(address)


def _data_address(path: Path) -> str:
    return "data:application/octet-stream;base64," + base64.b64encode(path.read_bytes()).decode()


def _parse_inputs(
    version: Version, arguments: Sequence[str], *, takes_addresses: bool = False
) -> dict[str, Any]:
    """Read ``name=value`` and ``name=@file``.

    Raises:
        OptionError: an argument has no equals sign, or a name comes twice.
        InputError: an address stands where a file is taken.
    """
    from tegula.catalog import from_text
    from tegula.catalog.inputs import FILE

    texts: dict[str, str] = {}
    for argument in arguments:
        name, equals, value = argument.partition("=")
        if not equals or not name:
            raise OptionError(f"Inputs are name=value or name=@file, which {argument!r} is not.")
        if name in texts:
            raise OptionError(f"The input {name} is given twice.")
        texts[name] = value
    for field in version.fields:
        if field.kind == FILE and not takes_addresses:
            refuse_address(texts.get(field.name, "").removeprefix("@"))
    files = {name: Path(value[1:]) for name, value in texts.items() if value.startswith("@")}
    return {**from_text(version, texts), **files}


def _list_models(console: Console) -> None:
    from tegula.catalog import models

    for model in models():
        for version in model.versions:
            console.record({"model": model.reference, "version": version.id})
        console.text(f"{model.reference:48} {model.description}")


def _list_inputs(version: Version, console: Console) -> None:
    from tegula.catalog import openapi_schema
    from tegula.catalog.inputs import BOOLEAN

    console.record(openapi_schema(version))
    console.text(f"{version.name}:{version.id}\n")
    for field in version.fields:
        if field.required:
            default = "required"
        elif field.default in (None, ""):
            default = "optional"
        else:
            # As it is written on the command line, where booleans are true and false.
            shown = str(field.default).lower() if field.kind == BOOLEAN else field.default
            default = f"default: {shown}"
        console.text(f"  {field.name:24} {field.description} [{default}]")


RUN = click.Command(
    "run",
    callback=_run,
    help=_HELP,
    short_help="Run a model by its name in the API.",
    params=[
        click.Argument(["model"], required=False, metavar="[OWNER/NAME[:VERSION]]"),
        click.Argument(["inputs"], nargs=-1, metavar="[NAME=VALUE]..."),
        Option(
            ["-o", "--output"],
            "Folder for the results, which are numbered and replace no other file.",
            "default: the current folder",
            type=click.Path(path_type=Path),
            default=Path(),
            metavar="FOLDER",
        ),
        MODEL,
        LIBRARY,
        DEVICE,
        PRECISION,
        Option(
            ["--server"],
            "Server that does the work; TEGULA_TOKEN holds the token for it.",
            "default: this machine",
            metavar="ADDRESS",
        ),
        JSON,
        QUIET,
    ],
)
