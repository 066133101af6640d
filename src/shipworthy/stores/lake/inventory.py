"""Which files the lake consists of now.

A table's folder also holds what was replaced by compaction or deletion and not swept away yet, and
what a killed writer never committed. None of that belongs into a copy: it may be of somebody who
was forgotten.
"""
# arro3's lists are untyped:
# pyright: reportUnknownMemberType=false

from __future__ import annotations

import re
from collections.abc import Generator
from pathlib import Path
from typing import cast
from urllib.parse import unquote

from shipworthy.errors import Unavailable

_LOG = "_delta_log"


def current_files(lake: Path) -> Generator[Path]:
    """The files of each table's newest version, and its log; none where there is no lake yet.

    To be used while nothing changes the lake. Raises Unavailable for a table that can't be read.
    """
    try:
        tables = sorted(path.parent for path in lake.glob(f"*/{_LOG}"))
    except OSError as error:
        raise _unreadable(lake, error.strerror) from error
    for table in tables:
        yield from sorted(path for path in (table / _LOG).iterdir() if path.is_file())
        yield from sorted(data_files(table))


def data_files(table: Path) -> list[Path]:
    """The files with rows of a table's newest version. Raises Unavailable when it can't be read."""
    from deltalake import DeltaTable
    from deltalake.exceptions import DeltaError

    try:
        actions = DeltaTable(table).get_add_actions()
        paths = cast("list[str]", actions["path"].to_pylist())
    except (DeltaError, OSError) as error:
        raise _unreadable(table, str(error)) from error
    # The log spells paths as URLs do.
    return [table / unquote(path) for path in paths]


def literal_glob(path: str) -> str:
    """The path as DuckDB is to be given it, which takes paths for patterns."""
    return re.sub(r"([\[*?])", r"[\1]", path)


def _unreadable(place: Path, why: str | None) -> Unavailable:
    return Unavailable(f"{place} can't be read as a part of the lake ({why}); see its files")
