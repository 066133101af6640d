"""How the command line speaks: paragraphs, tables, verdicts with a colour and a word, or JSON."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import contextmanager
from typing import Any

import msgspec
from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    TextColumn,
)
from rich.progress import TimeRemainingColumn as Remaining
from rich.table import Table

_PIPE_WIDTH = 160

# Through a pipe nothing has a width; Rich would take 80 and break names in two.
_width = None if sys.stdout.isatty() else _PIPE_WIDTH
out = Console(highlight=False, soft_wrap=True, width=_width)
err = Console(stderr=True, highlight=False, soft_wrap=True, width=_width)

STYLES = {
    "pass": "green",
    "fail": "bold red",
    "error": "bold yellow",
    "inconclusive": "yellow",
    "hold": "yellow",
    "stale": "yellow",
    "waived": "cyan",
    "attested": "cyan",
    "ready": "green",
    "failed": "bold red",
    "progressing": "green",
    "completed": "green",
    "held": "bold yellow",
    "paused": "yellow",
    "rolled_back": "bold red",
}


def styled(word: str) -> str:
    """A verdict or state in its colour; the word itself always stands there."""
    style = STYLES.get(word)
    shown = escape(word.replace("_", " "))
    return f"[{style}]{shown}[/]" if style else shown


def say(text: str) -> None:
    """A paragraph; nothing in it is markup."""
    out.print(escape(text))


def say_json(value: Any) -> None:
    """Plain JSON on standard output, for machines."""
    content = msgspec.to_builtins(value, builtin_types=(float,))
    sys.stdout.write(json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def say_table(columns: Sequence[str], rows: Iterable[Sequence[str]], *, empty: str) -> None:
    """A table whose cells may hold markup, or a sentence where there are no rows."""
    filled = list(rows)
    if not filled:
        say(empty)
        return
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in filled:
        table.add_row(*row)
    out.print(table)


def ago(then: float | None) -> str:
    """How long ago a Unix time was."""
    if then is None:
        return "-"
    seconds = max(0, int(time.time() - then))
    for size, unit in ((86_400, "d"), (3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds // size} {unit} ago"
    return f"{seconds} s ago"


def short(digest: str) -> str:
    """The beginning of a digest, enough to name it by."""
    return digest[:19]


def _progress(*columns: ProgressColumn) -> Progress:
    """On a terminal alone: a log needs no spinner, and would keep its blank lines."""
    return Progress(*columns, console=err, transient=True, disable=not err.is_terminal)


@contextmanager
def byte_progress(what: str, total: int) -> Generator[Callable[[int], None]]:
    """A bar for reading and writing `total` bytes; gives a function that takes those just done."""
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), Remaining())
    with _progress(*columns) as progress:
        task = progress.add_task(escape(what), total=total)
        yield lambda done: progress.advance(task, done)


@contextmanager
def waiting(what: str) -> Generator[Callable[[str], None]]:
    """A spinner for work of unknown length; gives a function that changes the text."""
    columns = (SpinnerColumn(), TextColumn("{task.description}"))
    with _progress(*columns) as progress:
        task = progress.add_task(escape(what), total=None)
        yield lambda text: progress.update(task, description=escape(text))
