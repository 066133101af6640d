"""Rows of `minutes` that count the same things, added up into one.

Every batch adds rows of its own. Under little traffic a batch is a handful of requests, and the
roll-up would become as long as what it sums up.
"""

from __future__ import annotations

from collections.abc import Container, Generator, Sequence
from contextlib import closing, contextmanager
from datetime import date
from tempfile import TemporaryDirectory

import duckdb

from shipworthy.stores.lake.schema import MINUTES

_SUMS = {
    "requests", "seconds", "request_bytes", "response_bytes",
    "input_tokens", "output_tokens", "cost",
}  # fmt: skip
_FROM = "FROM read_parquet($files, union_by_name = true, hive_partitioning = false)"
_MEMORY = "256MB"  # what needs more goes by way of the disk


@contextmanager
def folded(files: Sequence[str], day: date) -> Generator[duckdb.DuckDBPyRelation]:
    """The rows of these files of one day, added up and in order of time, as an Arrow stream.

    Files are named as patterns, see `literal_glob`.

    Raises duckdb.Error, also while they are read.
    """
    with TemporaryDirectory(prefix="shipworthy-") as spill, closing(duckdb.connect()) as database:
        database.execute(f"SET memory_limit = '{_MEMORY}'; SET threads = 1")
        database.execute("SET temp_directory = $spill", {"spill": spill})
        database.execute("SET TimeZone = 'UTC'")
        described = database.execute(f"DESCRIBE {_FROM}", {"files": list(files)}).fetchall()
        columns = _columns({str(row[0]) for row in described}, day)
        sql = f"SELECT {', '.join(columns)} {_FROM} GROUP BY ALL ORDER BY minute"
        yield database.sql(sql, params={"files": list(files)})


def _columns(present: Container[str], day: date) -> Generator[str]:
    """What is selected; files that were all written before a column have nothing to sum up."""
    yield f"DATE '{day.isoformat()}' AS day"
    for column in MINUTES.columns[1:]:
        kind = "BIGINT" if column.type == "long" else "DOUBLE"
        if column.name not in _SUMS:
            yield column.name
        elif column.name in present:
            yield f"sum({column.name})::{kind} AS {column.name}"
        else:
            yield f"NULL::{kind} AS {column.name}"
