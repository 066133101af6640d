"""Reading the lake with SQL: one consistent version of it, and nothing else on the machine.

DuckDB reads the files that each table's newest version consists of. What it may do is fenced twice:
its own parser must call the statement one that reads, in every part of it, and its settings,
locked before the first query, open no other file.
"""
# ruff: noqa: S608  # what is put into SQL are our own names, quoted paths, and what was checked

from __future__ import annotations

import json
import re
from collections.abc import Generator, Iterable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from itertools import chain, count
from pathlib import Path
from typing import Any, cast
from urllib.parse import unquote

import duckdb

from shipworthy.errors import NotAllowed, Unavailable, UsageError
from shipworthy.stores.lake.formats import PLAN_COLUMNS, Result
from shipworthy.stores.lake.inventory import literal_glob
from shipworthy.stores.lake.schema import (
    BUCKETS_PER_E,
    FEEDBACK,
    INFERENCES,
    MINUTES,
    MIRRORS,
    TABLES,
    Table,
)

MEBIBYTE = 1024 * 1024
LEAST_MEMORY = 64 * MEBIBYTE
"""With less DuckDB can't read a file of the lake."""
TYPES = {
    "string": "VARCHAR",
    "binary": "BLOB",
    "double": "DOUBLE",
    "long": "BIGINT",
    "boolean": "BOOLEAN",
    "timestamp": "TIMESTAMP WITH TIME ZONE",
    "date": "DATE",
}
"""DuckDB's name of each type of the schema."""
DERIVED = {
    INFERENCES.name: {
        "request_text": "decode(request, 'replace')",
        "response_text": "decode(response, 'replace')",
    },
    MIRRORS.name: {"response_text": "decode(response, 'replace')"},
    MINUTES.name: {"bucket_seconds": f"exp((bucket + 0.5) / {BUCKETS_PER_E})"},
}
"""Columns that the views have beyond the tables', by table."""
KINDS = ("rating", "reward", "label", "correction", "preference", "outcome")
NUMERIC_KINDS = ("rating", "reward")
JOINED = "inferences_with_feedback"

# What may stand in FROM beside names. `query`, which runs any text, must not, nor what reads files.
_TABLE_FUNCTIONS = frozenset(
    {
        "duckdb_columns", "duckdb_functions", "duckdb_types", "duckdb_views", "generate_series",
        "json_each", "json_tree", "range", "regexp_split_to_table", "unnest",
    }
)  # fmt: skip
_READING_NODES = frozenset({"SELECT_NODE", "SET_OPERATION_NODE", "RECURSIVE_CTE_NODE", "CTE_NODE"})
_ZONED, _UNZONED = "TIMESTAMP WITH TIME ZONE", "TIMESTAMP"
_END = re.compile(r";(?:\s|--[^\n]*|/\*(?:[^*]|\*(?!/))*\*/)*$")  # a comment may follow it
_EXPLAIN = re.compile(r"\s*(explain(?:\s+analyze)?)\s(.*)", re.IGNORECASE | re.DOTALL)


class LakeChanged(Unavailable):
    """A file was swept away under a query that read an older version of the lake."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What one query may take. Nothing is spilled to disk: what needs more memory fails."""

    memory: int = 1024 * MEBIBYTE
    seconds: float = 30.0
    threads: int = 2


class Lake:
    """One version of the lake. Each query has a connection of its own, so threads may share it."""

    def __init__(
        self, folder: Path, limits: Limits | None = None, *, output: Path | None = None
    ) -> None:
        """Open the newest version; `output` is the one file that `write_parquet` may write."""
        self._limits = limits or Limits()
        if self._limits.memory < LEAST_MEMORY:
            message = f"{self._limits.memory:,} bytes are too little memory; give at least 64MiB"
            raise UsageError(message)
        self._database = duckdb.connect(
            config={
                "memory_limit": f"{self._limits.memory}B",
                "threads": self._limits.threads,
                "temp_directory": "",
                "autoinstall_known_extensions": False,
                "autoload_known_extensions": False,
                "python_enable_replacements": False,
            }
        )
        try:
            self._prepare(folder, output)
        except BaseException:
            self.close()
            raise

    def _prepare(self, folder: Path, output: Path | None) -> None:
        self._database.execute("SET GLOBAL TimeZone = 'UTC'")
        self._database.execute("SET GLOBAL parquet_metadata_cache = true")
        files = {table.name: _files(folder / table.name) for table in TABLES}
        with _explained(self._limits):
            for table in TABLES:
                _create_view(self._database, table, files[table.name])
            self._database.execute(f"CREATE VIEW {JOINED} AS {_joined()}")
            allowed = [file for some in files.values() for file in some]
            allowed = list(dict.fromkeys([*allowed, *map(literal_glob, allowed)]))
            allowed += [str(output)] if output else []
            # The clock begins only now: opening a large lake is none of the query's time.
            milliseconds = max(1, round(self._limits.seconds * 1000))
            self._database.execute(f"SET GLOBAL max_execution_time = {milliseconds}")
            self._database.execute(f"SET GLOBAL allowed_paths = {_list(allowed)}")
            self._database.execute("SET GLOBAL enable_external_access = false")
            self._database.execute("SET GLOBAL lock_configuration = true")

    @contextmanager
    def run(self, sql: str, *, batch: int = 2048) -> Generator[Result]:
        """Answer one statement that reads; its rows in batches of that many at most.

        Raises UsageError for what is no such statement or names what isn't there, NotAllowed for
        what reaches beyond the lake, Unavailable at a limit, LakeChanged when files are gone.
        """
        with _explained(self._limits), closing(self._database.cursor()) as cursor:
            text = checked(cursor, sql)
            columns, types = _shape(cursor, text)
            cursor.execute(_without_zones(text, types))

            def batches() -> Iterator[list[tuple[Any, ...]]]:
                while rows := _fetched(cursor, batch, self._limits):
                    yield rows

            first = cursor.fetchmany(batch)  # most faults show here, before anything is printed
            yield Result(columns, types, _chained(first, batches()))

    def rows(self, sql: str) -> list[dict[str, Any]]:
        """All rows of a small answer, by column."""
        with self.run(sql) as result:
            return [
                dict(zip(result.columns, row, strict=True))
                for batch in result.batches
                for row in batch
            ]

    def write_parquet(self, sql: str, path: Path, limit: int | None = None) -> int:
        """Write an answer to the file that this was opened for; its number of rows."""
        with _explained(self._limits), closing(self._database.cursor()) as cursor:
            text = checked(cursor, sql)
            if _EXPLAIN.fullmatch(text):
                message = "a plan has no place in a parquet file; take --format table"
                raise UsageError(message)
            options = "FORMAT parquet, COMPRESSION zstd, USE_TMP_FILE false"
            most = "" if limit is None else f" LIMIT {limit:d}"
            copy = f"COPY (FROM (\n{text}\n){most}) TO {_quoted(str(path))} ({options})"
            try:
                written = cursor.execute(copy).fetchone()
            except duckdb.IOException as error:
                if str(path) not in str(error):
                    raise
                message = f"can't write the file ({_sentence(error)}); make room on its disk"
                raise Unavailable(message) from error
            return int(written[0]) if written else 0

    def close(self) -> None:
        """Let go of its memory and files."""
        self._database.close()


def checked(cursor: duckdb.DuckDBPyConnection, sql: str) -> str:
    """The text of the one statement, which reads and does nothing else, in every part of it.

    The parser's word for a statement is not enough: one that it calls SELECT may write a file in a
    common table expression, or run other text through a function. So its whole tree is looked at,
    and only what is known to read may be in it.
    """
    statements = cursor.extract_statements(sql)
    if len(statements) != 1:
        message = f"this holds {len(statements)} statements; give exactly one SELECT"
        raise UsageError(message)
    text, prefix = statements[0].query.strip(), ""
    if statements[0].type is duckdb.StatementType.EXPLAIN:
        # What is explained is judged by itself, and the prefix, being ours, holds nothing else.
        found = _EXPLAIN.fullmatch(text)
        if found is None:
            message = "write EXPLAIN or EXPLAIN ANALYZE, without options or comments before it"
            raise UsageError(message)
        prefix, text = f"{' '.join(found[1].split())} ", found[2]
    _check_tree(_tree(cursor, text))
    # And in parentheses, as it will be wrapped: nothing in it may reach out of them.
    try:
        _check_tree(_tree(cursor, f"FROM (\n{text}\n)"))
    except duckdb.ParserException:
        text = _END.sub("", text)
        _check_tree(_tree(cursor, f"FROM (\n{text}\n)"))
    return prefix + text


def _tree(cursor: duckdb.DuckDBPyConnection, text: str) -> dict[str, Any]:
    row = cursor.execute("SELECT json_serialize_sql(?::VARCHAR)", [text]).fetchone()
    try:
        tree = cast("dict[str, Any]", json.loads(row[0] if row else "null"))
    except RecursionError:
        message = "the query is nested too deeply; write it with WITH, part by part"
        raise UsageError(message) from None
    if tree["error"] and tree["error_type"] == "parser":
        cursor.extract_statements(text)  # the parser itself says it with the line
    if tree["error"] or len(tree["statements"]) != 1:
        message = "only a statement that reads may be asked: SELECT, WITH, FROM, VALUES, DESCRIBE"
        raise NotAllowed(message)
    return tree["statements"][0]


def _check_tree(tree: Any) -> None:
    pending = [tree]
    while pending:
        part = pending.pop()
        if isinstance(part, list):
            pending += cast("list[Any]", part)
        elif isinstance(part, dict):
            fields = cast("dict[str, Any]", part)
            _check_part(fields)
            pending += fields.values()


def _check_part(fields: dict[str, Any]) -> None:
    kind = fields.get("type")
    is_query = "cte_map" in fields or (isinstance(kind, str) and kind.endswith("_NODE"))
    if is_query and kind not in _READING_NODES:
        what = str(kind).partition("_")[0]
        message = f"a query only reads, and this one holds a part that does {what}; leave it out"
        raise NotAllowed(message)
    if kind == "TABLE_FUNCTION":
        name = str(fields["function"].get("function_name")).lower()
        if name not in _TABLE_FUNCTIONS:
            message = f"{name}(…) may not stand in FROM; the lake's tables may, see SHOW TABLES"
            raise NotAllowed(message)


def _shape(cursor: duckdb.DuckDBPyConnection, text: str) -> tuple[list[str], list[str]]:
    """Names and types of the columns, without running it."""
    if _EXPLAIN.fullmatch(text):  # it has no columns before it runs
        return PLAN_COLUMNS, ["VARCHAR", "VARCHAR"]
    relation = cursor.sql(text)
    return _unlike(map(str, relation.columns)), list(map(str, relation.types))


def _unlike(names: Iterable[str]) -> list[str]:
    """Names of which no two are equal, as JSON needs them: `a`, `a_1`."""
    taken: list[str] = []
    for name in names:
        others = (f"{name}_{number}" for number in count(1))
        taken.append(next(one for one in chain([name], others) if one not in taken))
    return taken


def _without_zones(text: str, types: list[str]) -> str:
    """Have times come without a zone, which they don't need: all are in UTC."""
    if not any(_ZONED in one for one in types):
        return text
    columns = ", ".join(
        f"#{number}::{one.replace(_ZONED, _UNZONED)}" if _ZONED in one else f"#{number}"
        for number, one in enumerate(types, start=1)
    )
    return f"SELECT {columns} FROM (\n{text}\n)"


def _fetched(
    cursor: duckdb.DuckDBPyConnection, count: int, limits: Limits
) -> list[tuple[Any, ...]]:
    with _explained(limits):
        return cursor.fetchmany(count)


def _chained(
    first: list[tuple[Any, ...]], rest: Iterator[list[tuple[Any, ...]]]
) -> Iterator[list[tuple[Any, ...]]]:
    if first:
        yield first
        yield from rest


# --- views --------------------------------------------------------------------------------------


def _files(table: Path) -> list[str]:
    """The files of a table's newest version; none before it has one."""
    from deltalake import DeltaTable
    from deltalake.exceptions import DeltaError, TableNotFoundError

    if not (table / "_delta_log").is_dir():
        return []
    try:
        actions = DeltaTable(table).get_add_actions()
    except TableNotFoundError:  # its first commit is under way
        return []
    except (DeltaError, OSError) as error:
        message = f"{table} can't be read as a table of the lake ({error}); see its files"
        raise Unavailable(message) from error
    # The log spells paths as URLs do. The newest day comes first: a question for the newest rows
    # then finds them before it has looked at the old ones, and passes those over.
    paths = cast("list[str]", cast("Any", actions["path"]).to_pylist())
    return sorted((str(table.absolute() / unquote(path)) for path in paths), reverse=True)


def _create_view(database: duckdb.DuckDBPyConnection, table: Table, files: list[str]) -> None:
    """A view with the schema's columns; those that no file has yet, or no more, have no value."""
    source, present = "(SELECT 1 WHERE false)", set[str]()
    if files:
        source = (
            f"read_parquet({_list(map(literal_glob, files))}, union_by_name = true,"
            f" hive_partitioning = {table.by_day}"
            f"{', hive_types = {day: DATE}' if table.by_day else ''})"
        )
        described = database.execute(f"DESCRIBE FROM {source}").fetchall()
        present = {str(row[0]) for row in described}
    columns = [
        (_name(column.name) if column.name in present else f"NULL::{TYPES[column.type]}")
        + f" AS {_name(column.name)}"
        for column in table.columns
    ]
    derived = [f"{text} AS {name}" for name, text in DERIVED.get(table.name, {}).items()]
    database.execute(
        f"CREATE VIEW {table.name} AS SELECT {', '.join(['*', *derived])}"
        f" FROM (SELECT {', '.join(columns)} FROM {source})"
    )


def _joined() -> str:
    """Each inference with the newest feedback of each kind."""
    newest = ",\n".join(
        f"max_by({'number' if kind in NUMERIC_KINDS else 'value'}, (time, id))"
        f" FILTER (kind = '{kind}') AS feedback_{kind}"
        for kind in KINDS
    )
    return f"""\
SELECT i.*, f.* EXCLUDE (inference)
FROM {INFERENCES.name} i LEFT JOIN (
  SELECT inference, {newest}, max(time) AS feedback_time
  FROM {FEEDBACK.name} GROUP BY inference
) f ON f.inference = i.id"""


def _name(text: str) -> str:
    return f'"{text}"'


def _quoted(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"


def _list(texts: Iterable[str]) -> str:
    return "[" + ", ".join(_quoted(text) for text in texts) + "]"


# --- errors -------------------------------------------------------------------------------------


@contextmanager
def _explained(limits: Limits) -> Generator[None]:
    """Map DuckDB's errors to ours, each in one sentence."""
    try:
        yield
    except duckdb.InterruptException as error:
        raise too_slow(limits.seconds) from error
    except (duckdb.OutOfMemoryException, MemoryError) as error:
        raise too_large(limits.memory) from error
    except (duckdb.PermissionException, duckdb.IOException) as error:
        text = _sentence(error)
        # A file that is gone is looked for as a folder, which isn't allowed.
        if any(sign in text for sign in ("No such file", "No files found", ".parquet/**")):
            message = f"the lake changed under the query; ask it again ({text})"
            raise LakeChanged(message) from error
        if isinstance(error, duckdb.PermissionException):
            message = f"a query reads the lake's tables and no files ({text})"
            raise NotAllowed(message) from error
        message = f"the lake's files can't be read ({text}); see 'shipworthy doctor'"
        raise Unavailable(message) from error
    except duckdb.Error as error:
        raise UsageError(_sentence(error)) from error


def too_slow(seconds: float) -> Unavailable:
    """That a query met its limit of time."""
    return Unavailable(
        f"the query took longer than {seconds:g} s; narrow it, for example by day,"
        " or give it more with --timeout"
    )


def too_large(memory: int) -> Unavailable:
    """That a query met its limit of memory."""
    return Unavailable(
        f"the query needs more memory than {memory / MEBIBYTE:,.0f} MiB; narrow it, or give it"
        " more with --memory"
    )


def _sentence(error: Exception) -> str:
    """DuckDB's message in one sentence, with its suggestion and the line where it is."""
    text, _, where = str(error).partition("\n\nLINE ")
    _, _, said = text.partition("Error: ")
    parts = [part.strip().rstrip("!.") for part in (said or text).splitlines() if part.strip()]
    line = where.partition(":")[0]
    return "; ".join(parts[:2]) + (f" (line {line})" if line else "")
