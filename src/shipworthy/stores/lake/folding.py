"""Rows of `minutes` that count the same things, added up into one.

Every batch adds rows of its own. Under little traffic a batch is a handful of requests, and the
roll-up would become as long as what it sums up.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import closing, contextmanager
from datetime import date
from tempfile import TemporaryDirectory

import duckdb

from shipworthy.stores.lake.schema import MINUTES

_SUMS = {"requests", "seconds", "request_bytes", "response_bytes"}
_MEMORY = "256MB"  # what needs more goes by way of the disk


@contextmanager
def folded(files: Sequence[str], day: date) -> Generator[duckdb.DuckDBPyRelation]:
    """The rows of these files of one day, added up and in order of time, as an Arrow stream.

    Files are named as patterns, see `literal_glob`.

    Raises duckdb.Error, also while they are read.
    """
    columns = ["DATE '" + day.isoformat() + "' AS day"]
    for column in MINUTES.columns[1:]:
        summed = f"sum({column.name})::{'BIGINT' if column.type == 'long' else 'DOUBLE'}"
        columns.append(f"{summed} AS {column.name}" if column.name in _SUMS else column.name)
    sql = f"""
        SELECT {", ".join(columns)}
        FROM read_parquet($files, union_by_name = true, hive_partitioning = false)
        GROUP BY ALL ORDER BY minute
    """  # noqa: S608  # our own column names
    with TemporaryDirectory(prefix="shipworthy-") as spill, closing(duckdb.connect()) as database:
        database.execute(f"SET memory_limit = '{_MEMORY}'; SET threads = 1")
        database.execute("SET temp_directory = $spill", {"spill": spill})
        database.execute("SET TimeZone = 'UTC'")
        yield database.sql(sql, params={"files": list(files)})
