"""`shipworthy query` and `shipworthy forget`: what is in the lake, and what no longer may be."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Annotated, cast, get_args

import msgspec
import typer
from rich.markup import escape

from shipworthy.app.erasing import (
    check_pseudonym,
    forget_unit,
    held_of,
    pseudonym_of,
    wait_until_erased,
)
from shipworthy.app.querying import Format, Question, ask_lake, new_file
from shipworthy.app.session import open_session, start_here
from shipworthy.app.status import is_running
from shipworthy.cli.output import err, say, say_table, waiting
from shipworthy.domain.policy import read_duration
from shipworthy.errors import Unavailable, UsageError
from shipworthy.settings import Project, find_project
from shipworthy.stores.lake.formats import PLAN_COLUMNS

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*(|[KMGT]i?)B?", re.IGNORECASE)
_SHOWN_ROWS = 1000
_COUNT_SECONDS = 120.0
_LONGEST_SECONDS = 30 * 86_400.0
_LARGEST_SIZE = 1024.0**5
_TABLE = "table"
_FORMATS = (_TABLE, *(name for name in get_args(Format) if name != "cells"))


def query(
    sql: Annotated[str, typer.Argument(help="One SELECT; - reads it from standard input.")],
    shape: Annotated[
        str, typer.Option("--format", help="table, json, csv or parquet; parquet needs --output.")
    ] = _TABLE,
    output: Annotated[
        Path | None, typer.Option(help="Write to this new file, all rows of it.")
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option(min=1, help="At most so many rows; without: 1000 on the screen, but for CSV."),
    ] = None,
    timeout: Annotated[str, typer.Option(help="How long it may take.")] = "30s",
    memory: Annotated[str, typer.Option(help="How much memory it may take.")] = "1GiB",
) -> None:
    """Ask the lake with SQL (DuckDB's), which can only read.

    The tables are inferences, feedback, mirrors, decisions and minutes, and the view
    inferences_with_feedback.

    Example: shipworthy query "SELECT release, outcome, count(*) FROM inferences GROUP BY ALL"
    """
    if shape not in _FORMATS:
        message = f"no format {shape!r}; formats are {', '.join(_FORMATS)}"
        raise UsageError(message)
    if output is None and shape == "parquet":
        message = "parquet goes to a file; name it with --output"
        raise UsageError(message)
    if output is not None and shape == _TABLE:
        message = "a table is for the screen; take --format csv, json or parquet with --output"
        raise UsageError(message)
    if limit is None and output is None and shape in (_TABLE, "json"):
        limit = _SHOWN_ROWS
    question = Question(
        lake=str(find_project(start_here()).lake),  # the ledger may be away
        sql=_read_sql() if sql == "-" else sql,
        format="cells" if shape == _TABLE else cast("Format", shape),
        memory=read_size(memory),
        seconds=_read_limit(timeout),
        limit=limit,
    )
    if output is not None:
        _to_file(question, output)
    elif shape == _TABLE:
        _to_table(question)
    else:
        _to_screen(question)


def _read_sql() -> str:
    try:
        return sys.stdin.read()
    except UnicodeDecodeError as error:
        message = "the SQL on standard input is not UTF-8; save it so, and ask again"
        raise UsageError(message) from error


def _read_limit(text: str) -> float:
    seconds = read_duration(text)
    if seconds > _LONGEST_SECONDS:
        message = f"{text!r} is no limit; a query may take 30d at most"
        raise UsageError(message)
    return seconds


def read_size(text: str) -> int:
    """Bytes, from text such as `512MiB`, `2G` or `1073741824`; all units are powers of 1024."""
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        message = f"{text!r} is no size; write for example 512MiB or 2GiB"
        raise UsageError(message)
    size = float(match[1]) * 1024 ** " kmgt".index((match[2][:1] or " ").lower())
    if size > _LARGEST_SIZE:
        message = f"{text!r} is more than any machine has; write for example 512MiB or 2GiB"
        raise UsageError(message)
    return int(size)


def _to_file(question: Question, output: Path) -> None:
    with new_file(output) as fresh, waiting("asking the lake"):
        if question.format == "parquet":
            named = msgspec.structs.replace(question, output=str(fresh.absolute()))
            ending = ask_lake(named, lambda _: None)
        else:
            with fresh.open("wb") as handle:
                ending = ask_lake(question, handle.write)
    say(f"Written to {output}: {_many(ending.rows, 'row')}.")


def _to_screen(question: Question) -> None:
    sys.stdout.flush()
    ending = ask_lake(question, sys.stdout.buffer.write)
    sys.stdout.buffer.flush()
    _say_more(question, more=ending.more)


def _to_table(question: Question) -> None:
    pieces: list[bytes] = []
    with waiting("asking the lake"):
        ending = ask_lake(question, pieces.append)
    lines = [msgspec.json.decode(line, type=list[str]) for line in b"".join(pieces).splitlines()]
    head, rows = lines[0], lines[1:]
    if head == PLAN_COLUMNS:  # a drawing, which a table would break
        for row in rows:
            say(row[1])
        return
    cells = ([escape(cell) for cell in row] for row in rows)
    say_table([escape(name) for name in head], cells, empty="No rows.")
    _say_more(question, more=ending.more)


def _say_more(question: Question, *, more: bool) -> None:
    if more:
        err.print(
            f"There are more than these {question.limit:,} rows; --limit shows more of them,"
            " --output writes all.",
            markup=False,
        )


def _many(count: int, what: str) -> str:
    return f"1 {what}" if count == 1 else f"{count:,} {what}s"


def forget(
    unit: Annotated[str, typer.Argument(help="The unit, as clients send it.")],
    wait: Annotated[
        str, typer.Option(help="How long to wait for the lake's writer; 0s not at all.")
    ] = "60s",
    *,
    pseudonym: Annotated[
        bool, typer.Option("--pseudonym", help="UNIT is a pseudonym, as the lake shows them.")
    ] = False,
    show: Annotated[
        bool, typer.Option("--show", help="Only say the unit's pseudonym and what there is of it.")
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Don't ask.")] = False,
) -> None:
    """Delete what was recorded of a unit until now: its inferences, feedback and mirrored answers.

    What of it is still on its way there is left out when it arrives. It can't be undone.

    Example: shipworthy forget user-17
    """
    session = open_session()
    project, patience = session.project, read_duration(wait)
    actor = session.actor()
    name = check_pseudonym(unit) if pseudonym else pseudonym_of(project, unit)
    if show:
        say(f"It is called {name} in the lake, which holds {_held(project, name)} of it.")
        return
    try:
        say(f"The lake holds {_held(project, name)} of this unit.")
    except Unavailable as error:  # it can be forgotten all the same
        say(f"What the lake holds of this unit can't be told now: {error}.")
    if not yes and not _agreed():
        say("Nothing is forgotten.")
        raise typer.Exit(1)
    sequence = forget_unit(session, name, actor=actor)
    say(f"It is to be forgotten (tombstone {sequence}).")
    if not is_running(session):
        say("Nothing is running here: the lake's writer deletes it once 'shipworthy up' runs.")
        return
    with waiting("the lake's writer deletes it"):
        done = wait_until_erased(project, sequence, patience)
    if done:
        say("It is deleted from the lake; the files that it was in go some minutes later.")
    else:
        say("The lake's writer has yet to delete it, and will; 'shipworthy status' tells its lag.")


def _held(project: Project, name: str) -> str:
    with waiting("looking what there is of it"):
        held = held_of(project, name, _COUNT_SECONDS)
    mirrored = f", and {_many(held.mirrors, 'mirrored answer')}" if held.mirrors else ""
    return f"{_many(held.inferences, 'inference')} and {held.feedback:,} feedback{mirrored}"


def _agreed() -> bool:
    if not sys.stdin.isatty():
        message = "nobody is here to agree to a deletion that can't be undone; add --yes"
        raise UsageError(message)
    return typer.confirm("Delete all of it?")
