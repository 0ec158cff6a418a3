"""The program `tegula`: its commands, and what becomes of errors."""

from __future__ import annotations

from typing import Any

import click

from tegula import __version__
from tegula.cli.console import asks_for_json, failure_of, quieten_libraries, tell_failure
from tegula.cli.doctor import DOCTOR
from tegula.cli.models import MODELS
from tegula.cli.plan import PLAN
from tegula.cli.run import RUN
from tegula.cli.serve import SERVE, TOKENS
from tegula.cli.upscale import UPSCALE


class _Program(click.Group):
    """Tells every error in one sentence; ``--debug`` shows where it came from."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command and turn what it raises into a sentence and an exit status."""
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
            failure = failure_of(error)
            tell_failure(failure, as_json=asks_for_json(ctx))
            ctx.exit(failure.exit_status)


PROGRAM = _Program(
    name="tegula",
    help="Makes pictures larger and better, on your own machine.",
    commands=[UPSCALE, PLAN, RUN, MODELS, DOCTOR, SERVE, TOKENS],
    params=[
        click.Option(["--debug"], is_flag=True, help="Show where an error came from."),
    ],
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
click.version_option(__version__, prog_name="tegula", message="%(prog)s %(version)s")(PROGRAM)
