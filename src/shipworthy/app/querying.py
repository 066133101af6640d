"""SQL over the lake in a process of its own: `python -m shipworthy.app.querying`.

The question comes as a line of JSON on standard input, the answer goes to standard output piece by
piece, and how it ended to standard error. The process bounds itself, and whoever asked ends it at
the limit of time, whatever it does.
"""

from __future__ import annotations

import contextlib
import os
import resource
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Generator, Iterator
from functools import partial
from pathlib import Path
from typing import IO, Any, Literal

import msgspec

from shipworthy.errors import Conflict, NotAllowed, ShipworthyError, Unavailable, UsageError
from shipworthy.stores.lake.formats import Result, cells_of, csv_of, json_of

Format = Literal["cells", "json", "csv", "parquet"]

_THREADS = 2
_OWN_BYTES = 2 * 1024**3  # addresses of the interpreter, the libraries and their threads
_OWN_FILES = 1024**2  # it writes how it ended, and no file of the lake
_CHUNK = 65_536
_CELL_BATCH = 64  # of rows that are shortened, and may hold whole requests before


class Question(msgspec.Struct, frozen=True, kw_only=True):
    """What is asked, and what it may take. Without `limit` all rows come.

    `output` is the file that parquet goes to; other formats go to standard output.
    """

    lake: str
    sql: str
    format: Format
    memory: int
    seconds: float
    limit: int | None = None
    output: str | None = None


class Ending(msgspec.Struct, frozen=True, kw_only=True):
    """How it ended: `more` tells of rows beyond the limit, `code` is an error's exit code."""

    rows: int = 0
    more: bool = False
    error: str = ""
    code: int = 0


def ask_lake(question: Question, sink: Callable[[bytes], object]) -> Ending:
    """Have a process answer, and give `sink` what it writes.

    The time that `sink` takes is not counted. Raises UsageError for what is no query, NotAllowed
    for one that does more than read, Unavailable at a limit.
    """
    from shipworthy.stores.lake.query import too_slow

    try:
        asked = msgspec.json.encode(question) + b"\n"
    except UnicodeEncodeError as error:
        message = "the SQL, or a path that it needs, is not UTF-8; write it so, and ask again"
        raise UsageError(message) from error
    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen(
            [sys.executable, "-m", "shipworthy.app.querying"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=said,
            start_new_session=True,  # a Ctrl-C is for us, and what it starts ends with it
        )
        try:
            in_time = _relay(process, asked, question.seconds, sink)
        finally:
            _end(process)
        if not in_time:
            raise too_slow(question.seconds)
        said.seek(0)
        return _ending(process.returncode, said.read(), question)


def _relay(
    process: subprocess.Popen[bytes],
    asked: bytes,
    seconds: float,
    sink: Callable[[bytes], object],
) -> bool:
    """Pass on what it writes until it has ended; False when that takes too long."""
    source, questions = process.stdout, process.stdin
    assert source is not None  # noqa: S101  # both are pipes, see above
    assert questions is not None  # noqa: S101
    deadline = time.monotonic() + seconds
    with contextlib.suppress(BrokenPipeError):  # then its ending tells why
        questions.write(asked)
        questions.flush()
    while (left := deadline - time.monotonic()) > 0:
        if not select.select([source], [], [], left)[0]:
            break
        piece = os.read(source.fileno(), _CHUNK)
        if not piece:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, deadline - time.monotonic()))
                return True
            break
        before = time.monotonic()
        sink(piece)
        deadline += time.monotonic() - before
    return False


def _end(process: subprocess.Popen[bytes]) -> None:
    """Leave nothing of it behind."""
    if process.returncode is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            with contextlib.suppress(BrokenPipeError):
                pipe.close()


def _ending(code: int, said: bytes, question: Question) -> Ending:
    from shipworthy.stores.lake.query import too_large, too_slow

    try:
        ending = msgspec.json.decode(said.rpartition(b"\n")[2], type=Ending)
    except msgspec.MsgspecError:
        if code == -signal.SIGXCPU:
            raise too_slow(question.seconds) from None
        if code in (-signal.SIGKILL, -signal.SIGABRT, -signal.SIGSEGV):  # allocations that failed
            raise too_large(question.memory) from None
        last = said.decode(errors="replace").strip().rpartition("\n")[2]
        message = f"the query's process ended with {code} ({last}); ask again, and report it"
        raise Unavailable(message) from None
    if ending.error:
        kinds: dict[int, type[ShipworthyError]] = {1: NotAllowed, 2: UsageError}
        raise kinds.get(ending.code, Unavailable)(ending.error)
    return ending


@contextlib.contextmanager
def new_file(path: Path) -> Generator[Path]:
    """A file beside `path` to write to, which gets its name on a clean exit.

    Raises Conflict where there is a file already, and leaves nothing of its own behind.
    """
    taken = Conflict(f"{path} exists already; remove it, or give another name with --output")
    if path.exists():
        raise taken
    try:
        descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    except OSError as error:
        message = f"can't write {path} ({error.strerror}); check its folder"
        raise Unavailable(message) from error
    os.close(descriptor)
    fresh = Path(name)
    try:
        yield fresh
        os.link(fresh, path)  # unlike a rename it replaces nothing
    except FileExistsError:
        raise taken from None
    except OSError as error:
        message = f"can't write {path} ({error.strerror}); make room or check its folder"
        raise Unavailable(message) from error
    finally:
        fresh.unlink(missing_ok=True)


# --- in the process -----------------------------------------------------------------------------


def main() -> int:
    """Answer the one question."""
    question = msgspec.json.decode(sys.stdin.buffer.readline(), type=Question)
    _fence(question)
    try:
        ending = _answer(question, sys.stdout.buffer)
        sys.stdout.buffer.flush()
    except ShipworthyError as error:
        ending = Ending(error=str(error), code=error.exit_code)
    except MemoryError:
        from shipworthy.stores.lake.query import too_large

        ending = Ending(error=str(too_large(question.memory)), code=3)
    sys.stderr.buffer.write(b"\n" + msgspec.json.encode(ending))
    sys.stderr.flush()
    return ending.code


def _fence(question: Question) -> None:
    """Bound the process itself, should the database not keep to its limits."""
    from shipworthy.app.processes import follow_parent

    follow_parent(partial(os._exit, 1))
    processor = int(question.seconds * _THREADS) + 5
    limits = [
        (resource.RLIMIT_AS, question.memory + _OWN_BYTES),
        (resource.RLIMIT_CPU, processor),
        (resource.RLIMIT_CORE, 0),
    ]
    if question.output is None:
        limits.append((resource.RLIMIT_FSIZE, _OWN_FILES))
    for which, most in limits:
        _, hard = resource.getrlimit(which)
        allowed = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(which, (allowed, allowed))


def _answer(question: Question, out: IO[bytes]) -> Ending:
    """Answer; once more on the new version when files vanish before anything was written."""
    from shipworthy.stores.lake.query import LakeChanged

    start = _Written(out)
    try:
        return _answer_once(question, start)
    except LakeChanged:
        if start.any:
            raise
        return _answer_once(question, start)


def _answer_once(question: Question, out: _Written) -> Ending:
    from shipworthy.stores.lake.query import Lake, Limits

    limits = Limits(question.memory, question.seconds, _THREADS)
    output = Path(question.output) if question.output else None
    with contextlib.closing(Lake(Path(question.lake), limits, output=output)) as lake:
        if question.format == "parquet":
            if output is None:
                message = "parquet goes to a file; name it with --output"
                raise UsageError(message)
            return Ending(rows=lake.write_parquet(question.sql, output, question.limit))
        batch = _CELL_BATCH if question.format == "cells" else 2048
        with lake.run(question.sql, batch=batch) as result:
            counted = _Counted(result.batches, question.limit)
            writers = {"cells": cells_of, "json": json_of, "csv": csv_of}
            shown = Result(result.columns, result.types, counted.batches())
            for piece in writers[question.format](shown):
                out.write(piece)
            return Ending(rows=counted.rows, more=counted.more)


class _Written:
    """A stream that remembers whether anything was written to it."""

    def __init__(self, out: IO[bytes]) -> None:
        self.any = False
        self._out = out

    def write(self, piece: bytes) -> None:
        self.any = True
        self._out.write(piece)


class _Counted:
    """Batches of rows up to a limit, and whether there would have been more."""

    def __init__(self, source: Iterator[list[tuple[Any, ...]]], limit: int | None) -> None:
        self.rows = 0
        self.more = False
        self._source, self._limit = source, limit

    def batches(self) -> Iterator[list[tuple[Any, ...]]]:
        for batch in self._source:
            room = len(batch) if self._limit is None else self._limit - self.rows
            self.more = len(batch) > room
            kept = batch[:room]
            self.rows += len(kept)
            if kept:
                yield kept
            if self.more:
                return


if __name__ == "__main__":
    sys.exit(main())
