"""Files and folders that appear whole or not at all, whoever reads or dies meanwhile."""

from __future__ import annotations

import fcntl
import glob
import os
import secrets
import shutil
import time
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from shipworthy.errors import Conflict, Unavailable


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


@contextmanager
def new_file(target: Path) -> Generator[IO[bytes]]:
    """Write a file of any size that gets its name when the context ends well, on the disk for good.

    Otherwise it is gone, and what was there stays; what killed processes left is swept away. An
    OSError goes through.
    """
    name = f".{target.name[:200]}."
    for left in target.parent.glob(f"{glob.escape(name)}????????.partial"):
        with left.open("rb") as handle, suppress(BlockingIOError):
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            left.unlink(missing_ok=True)
    fresh = target.with_name(f"{name}{secrets.token_hex(4)}.partial")
    descriptor = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(descriptor, "wb") as handle:
            fcntl.flock(handle, fcntl.LOCK_EX)
            yield handle
            handle.flush()
            os.fsync(handle.fileno())
            fresh.replace(target)
        sync_folder(target.parent)
    finally:
        fresh.unlink(missing_ok=True)


@contextmanager
def workspace(folder: Path) -> Generator[Path]:
    """Have a private folder for work in progress: empty at first, gone unless it was renamed.

    What a killed process left in it is removed. Raises Conflict while another process works there,
    and Unavailable when the disk refuses.
    """
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        message = f"can't make {folder} ({error.strerror}); check its permissions"
        raise Unavailable(message) from error
    try:
        if not _take(descriptor, folder):
            message = f"another process works in {folder}; try again when it is done"
            raise Conflict(message)
        try:
            _empty(folder)
            yield folder
        finally:
            if _is_same(descriptor, folder):
                shutil.rmtree(folder)
    finally:
        os.close(descriptor)


def _take(descriptor: int, folder: Path) -> bool:
    """Lock a folder, unless another process has it or took it away."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return _is_same(descriptor, folder)


def _is_same(descriptor: int, folder: Path) -> bool:
    try:
        return os.path.samestat(folder.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _empty(folder: Path) -> None:
    try:
        for left in folder.iterdir():
            if left.is_dir() and not left.is_symlink():
                shutil.rmtree(left)
            else:
                left.unlink()
    except OSError as error:
        message = f"can't clear {folder} ({error.strerror}); remove it"
        raise Unavailable(message) from error


def sync_folder(folder: Path) -> None:
    """Make the names in a folder last, not only the content of its files."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
