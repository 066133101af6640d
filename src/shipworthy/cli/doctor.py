"""`shipworthy doctor`."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.markup import escape

from shipworthy.app.doctor import Verdict, case_of, examine, exit_code
from shipworthy.app.session import start_here
from shipworthy.cli.output import byte_progress, say, say_json, say_table, styled


def doctor(
    *,
    deep: Annotated[
        bool,
        typer.Option("--deep", help="Also read every stored file, record and audit entry."),
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Find what is wrong with a project and this machine, and name the cure; changes nothing.

    Exit codes: 0 nothing is wrong (there may be warnings), 1 something is, 3 not all could be
    looked at.

    Example: shipworthy doctor --deep
    """
    case = case_of(start_here(), deep=deep, progress=byte_progress)
    results = examine(case)
    if json:
        say_json(results)
    else:
        say_table(
            ("", "what", "seen", "cure"),
            ((styled(r.verdict), escape(r.name), escape(r.seen), escape(r.cure)) for r in results),
            empty="Nothing was looked at.",
        )
        if all(result.verdict is Verdict.PASS for result in results):
            say("All is well.")
    raise typer.Exit(exit_code(results))
