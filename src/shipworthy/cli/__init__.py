"""The command line: parse, call, print. An error is one sentence with the cure."""

from __future__ import annotations

import io
import logging
import signal
import sys
from typing import Annotated, cast

import typer

from shipworthy import __version__
from shipworthy.cli import access, backup, gateway, lake, project, promotion, releases
from shipworthy.cli.demo import demo
from shipworthy.cli.doctor import doctor
from shipworthy.cli.output import err
from shipworthy.errors import ShipworthyError

app = typer.Typer(
    name="shipworthy",
    help="Takes a trained model to production and keeps it trustworthy there.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
for command in (project.init, project.try_model, project.up, project.apply, project.status):
    app.command("try" if command is project.try_model else None)(command)
app.command()(demo)
app.command()(doctor)
app.command()(releases.serve)
app.add_typer(releases.release, name="release")
app.command()(promotion.check)
app.command()(promotion.promote)
app.command()(promotion.approve)
app.add_typer(gateway.gateway, name="gateway")
app.add_typer(promotion.rollout, name="rollout")
app.command()(promotion.rollback)
app.add_typer(access.keys, name="keys")
app.add_typer(access.audit, name="audit")
app.command()(lake.query)
app.command()(lake.forget)
app.add_typer(backup.backup, name="backup")


def _print_version(wanted: bool) -> None:  # noqa: FBT001  # typer's way of calling it
    if wanted:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def options(
    *,
    _: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="The version."),
    ] = False,
) -> None:
    """Takes a trained model to production and keeps it trustworthy there.

    Exit codes: 0 pass, 1 fail or refused, 2 usage, 3 inconclusive or error.
    """


def main() -> None:
    """Run a command; what we can explain ends in one sentence and its exit code."""
    # Who is told to end clears up first; what runs for long has an order of its own.
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    # A log file must show what a terminal would, when it would.
    cast("io.TextIOWrapper", sys.stdout).reconfigure(line_buffering=True)
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr, format="%(message)s")
    try:
        app()
    except ShipworthyError as error:
        err.print(f"error: {error}", style="red", markup=False)
        sys.exit(error.exit_code)
    except BrokenPipeError:  # the reader of our output went away, as `head` does
        sys.stderr.close()
        sys.exit(0)
