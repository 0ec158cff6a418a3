"""The program `tegula`: its commands, and what becomes of errors."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from typing import Any

import click

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

from tegula import __version__
from tegula.cli.batch import BATCH
from tegula.cli.console import Console, Failure, quieten_libraries
from tegula.cli.doctor import DOCTOR
from tegula.cli.models import MODELS
from tegula.cli.options import flag
from tegula.cli.plan import PLAN
from tegula.cli.run import RUN
from tegula.cli.serve import SERVE
from tegula.cli.tokens import TOKENS, WEBHOOKS
from tegula.cli.tune import TUNE
from tegula.cli.upscale import UPSCALE
from tegula.errors import OptionError, PathError
from tegula.folders import CONFIG_VARIABLE, config_file


def read_defaults(commands: Mapping[str, click.Command]) -> Mapping[str, Mapping[str, Any]]:
    """Read the user's defaults for options, by command and the names that click has for them.

    What the file says of `upscale` counts for `plan`, `batch` and `tune`, too.

    Raises:
        PathError: the file cannot be read, or a file was named and is not there.
        OptionError: it is not TOML, or names no command or option of it.
    """
    file = config_file()
    if file is None:
        return {}
    try:
        text = file.read_text("utf-8")
    except FileNotFoundError:
        if CONFIG_VARIABLE not in os.environ:
            return {}
        raise PathError(f"{file}, which {CONFIG_VARIABLE} names, does not exist.") from None
    except UnicodeDecodeError as error:
        raise OptionError(f"{file} is not TOML: it is not UTF-8.") from error
    except OSError as error:
        raise PathError(f"{file} cannot be read: {error.strerror}.") from error
    try:
        sections = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise OptionError(f"{file} is not TOML: {error}.") from error
    found: dict[str, dict[str, Any]] = {}
    for section, values in sections.items():
        command = commands.get(section)
        if not isinstance(values, dict) or command is None or isinstance(command, click.Group):
            raise OptionError(
                f"{file} sets {section}, which is no section of it; options stand below the name "
                "of a command, such as [upscale]."
            )
        found[section] = _by_parameter(values, command, str(file))
    _share_of_upscale(found)
    return found


def _share_of_upscale(found: dict[str, dict[str, Any]]) -> None:
    """Let what is set for `upscale` count for the commands that have the same options."""
    of_upscale = found.get("upscale", {})
    for command in (PLAN, BATCH, TUNE):
        # Nor are files replaced by commands that have others.
        left_out = set() if command is PLAN else {"output", "overwrite"}
        known = {option.name for option in command.params} - left_out
        shared = {key: value for key, value in of_upscale.items() if key in known}
        if name := command.name:
            found[name] = {**shared, **found.get(name, {})}


def _by_parameter(values: Mapping[str, Any], command: click.Command, file: str) -> dict[str, Any]:
    names = {
        spelling.lstrip("-"): str(parameter.name)
        for parameter in command.params
        if isinstance(parameter, click.Option) and parameter.expose_value
        for spelling in parameter.opts
    }
    unknown = [key for key in values if key.replace("_", "-") not in names]
    if unknown:
        raise OptionError(
            f"{file} sets {', '.join(unknown)} of {command.name}, which has no such option."
        )
    return {names[key.replace("_", "-")]: value for key, value in values.items()}


class _Program(click.Group):
    """Turns every error into one sentence and an exit status."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command; with ``--debug``, errors pass with their traceback."""
        debug = bool(ctx.params["debug"])
        if not debug:
            quieten_libraries()
        try:
            ctx.default_map = dict(read_defaults(self.commands))
            return super().invoke(ctx)
        except (click.ClickException, click.exceptions.Exit, BrokenPipeError):
            raise
        except (Exception, KeyboardInterrupt) as error:
            if debug and not isinstance(error, KeyboardInterrupt):
                raise
            failure = Failure.of(error)
            Console.current().error(failure)
            ctx.exit(failure.exit_status)

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002
        """List the commands in the order in which they are declared, not by the alphabet."""
        return list(self.commands)


PROGRAM = _Program(
    name="tegula",
    help="Make pictures larger and better, on your own machine.",
    commands=[UPSCALE, BATCH, TUNE, PLAN, MODELS, DOCTOR, RUN, SERVE, TOKENS, WEBHOOKS],
    params=[flag(["--debug"], "Show the traceback of an error.")],
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
click.version_option(__version__, prog_name="tegula", message="%(prog)s %(version)s")(PROGRAM)
