"""What `tegula serve` and `tegula tokens` share: where the server's settings come from."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tegula.errors import MissingExtraError

if TYPE_CHECKING:
    from tegula.predictions.settings import ServerSettings

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
    import dataclasses

    try:
        import alembic  # noqa: F401
        import fastapi  # noqa: F401
        import httpcore  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise MissingExtraError(
            "The server needs packages of its own: pip install 'tegula[server]'."
        ) from error
    from tegula.predictions.settings import load_settings

    given = {name: value for name, value in {**others, "folder": folder}.items() if value}
    return dataclasses.replace(load_settings(config), **given)
