"""The program `tegula`: its commands, and what becomes of errors."""

from __future__ import annotations

from typing import Any

import click

from tegula import __version__
from tegula.cli.console import Console, Failure, quieten_libraries
from tegula.cli.doctor import DOCTOR
from tegula.cli.models import MODELS
from tegula.cli.options import flag
from tegula.cli.plan import PLAN
from tegula.cli.run import RUN
from tegula.cli.serve import SERVE
from tegula.cli.tokens import TOKENS, WEBHOOKS
from tegula.cli.upscale import UPSCALE


class _Program(click.Group):
    """Turns every error into one sentence and an exit status."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command; with ``--debug``, errors pass with their traceback."""
        debug = bool(ctx.params["debug"])
        if not debug:
            quieten_libraries()
        try:
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
    commands=[UPSCALE, PLAN, MODELS, DOCTOR, RUN, SERVE, TOKENS, WEBHOOKS],
    params=[flag(["--debug"], "Show the traceback of an error.")],
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
click.version_option(__version__, prog_name="tegula", message="%(prog)s %(version)s")(PROGRAM)
