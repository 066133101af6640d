"""Small files that others read while we write: replaced whole or not at all."""

from __future__ import annotations

import fcntl
import os
import secrets
import time
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from shipworthy.errors import Unavailable


@contextmanager
def locked(path: Path, patience: float = 60.0) -> Generator[None]:
    """Hold the lock of that file; processes that ask meanwhile wait `patience` seconds at most.

    It goes with the process, however that ends. Raises Unavailable when another one keeps it.
    """
    deadline = time.monotonic() + patience
    with _opened(path) as handle:
        while True:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    message = f"another process holds {path}; try again when it is done"
                    raise Unavailable(message) from None
            time.sleep(0.02)
        yield


def _opened(path: Path) -> IO[bytes]:
    try:
        return path.open("ab")
    except OSError as error:
        message = f"can't open {path} ({error.strerror}); check its permissions"
        raise Unavailable(message) from error


def replace_file(path: Path, content: bytes, mode: int = 0o600, *, sync: bool = False) -> None:
    """Replace a file by an atomic rename, readable by `mode` from its first byte on.

    With `sync` it is on the disk when this returns. Raises Unavailable, with the old content in
    place, when the disk refuses.
    """
    fresh = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        descriptor = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
        with os.fdopen(descriptor, "wb") as handle:
            handle.write(content)
            if sync:
                handle.flush()
                os.fsync(handle.fileno())
        fresh.replace(path)
    except OSError as error:
        fresh.unlink(missing_ok=True)
        message = f"can't write {path} ({error.strerror}); make room or check its permissions"
        raise Unavailable(message) from error
