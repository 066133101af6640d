"""Files by the digest of their content, in a local folder.

A blob of digest `sha256:abcd…` is `sha256/ab/abcd…` below the root: written to a temporary file,
synced, made read-only and only then renamed, so that whatever is there under its name is whole.
"""

from __future__ import annotations

import hashlib
import os
import re
import secrets
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from io import BufferedReader, FileIO
from pathlib import Path
from typing import BinaryIO

from shipworthy.domain.manifest import PinnedFile
from shipworthy.errors import IntegrityError, NotFound, Unavailable, UsageError
from shipworthy.ports import Progress
from shipworthy.stores.files import sync_folder

CHUNK = 1024 * 1024
"""Bytes that are read, hashed and written at a time; all that a copy holds in memory."""

_DIGEST = re.compile(r"sha256:([0-9a-f]{2})([0-9a-f]{62})")
_ABANDONED = 24 * 3600.0
"""Seconds without a write after which a temporary file has no owner any more."""


class LocalBlobs:
    """Blobs below `root`, which is made when needed. Safe for threads and processes at once.

    Every method raises Unavailable when the disk refuses, and UsageError for a malformed digest.
    """

    def __init__(self, root: Path) -> None:
        self._root = root
        self._temporary = root / "tmp"
        self._swept = False

    def put(self, source: Path, progress: Progress | None = None) -> PinnedFile:
        """Store a file, reading it once; `path` of the result is the source's name.

        Raises:
            NotFound: There is no such file.
            UsageError: It is a folder or something else that is no plain file.

        """
        if not source.exists():
            raise NotFound(f"there is no file {source}; check the path")
        if not source.is_file():
            raise UsageError(f"{source} is no plain file; name the files in it one by one")
        with _explained(f"{source} can't be stored"), FileIO(source) as reader:
            return self._store(lambda write: _copy(reader, write, progress), source.name)

    def put_bytes(self, content: bytes, path: str) -> PinnedFile:
        """Store content that is in memory; `path` is only noted in the result."""

        def copy(write: Callable[[memoryview], object]) -> tuple[str, int]:
            write(memoryview(content))
            return f"sha256:{hashlib.sha256(content).hexdigest()}", len(content)

        with _explained(f"{path} can't be stored"):
            return self._store(copy, path)

    def has(self, digest: str) -> bool:
        """Whether the blob is there; not whether it is intact."""
        return self._path(digest).is_file()

    def verify(self, file: PinnedFile, progress: Progress | None = None) -> None:
        """Re-read every byte.

        Raises:
            IntegrityError: The content differs.
            NotFound: It is gone.

        """
        with _explained(f"{file.path} can't be read"), self._open(file.digest) as reader:
            self._check(file, *_copy(reader, None, progress))

    def copy_to(self, file: PinnedFile, target: Path, progress: Progress | None = None) -> None:
        """Write the file to `target`, verified on the way; its folder is made when missing.

        The target appears all at once, when verified; until then whatever was there stays.

        Raises:
            IntegrityError: The content differs.
            NotFound: It is gone.

        """
        with _explained(f"{target} can't be written"), self._open(file.digest) as reader:
            target.parent.mkdir(parents=True, exist_ok=True)
            partial = target.with_name(f".{target.name[:200]}.{secrets.token_hex(8)}.partial")
            with _new_file(partial, 0o666) as descriptor:
                self._check(file, *_copy(reader, _writer(descriptor), progress))
                partial.replace(target)

    def open(self, digest: str) -> BinaryIO:
        """The content as it lies there, unverified; NotFound when it is gone."""
        with _explained(f"{digest} can't be read"):
            return BufferedReader(self._open(digest), CHUNK)

    def _path(self, digest: str) -> Path:
        match = _DIGEST.fullmatch(digest)
        if not match:
            raise UsageError(f"{digest!r} is no digest; write sha256: and 64 hexadecimal digits")
        return self._root / "sha256" / match[1] / (match[1] + match[2])

    def _store(
        self, copy: Callable[[Callable[[memoryview], object]], tuple[str, int]], name: str
    ) -> PinnedFile:
        self._temporary.mkdir(parents=True, exist_ok=True, mode=0o750)
        self._sweep()
        temporary = self._temporary / secrets.token_hex(16)
        with _new_file(temporary, 0o600) as descriptor:
            digest, size = copy(_writer(descriptor))
            file = PinnedFile(path=name, digest=digest, size=size)
            path = self._path(digest)
            if not _is_whole(path, digest, size):
                os.fchmod(descriptor, 0o440)
                os.fsync(descriptor)
                path.parent.mkdir(parents=True, exist_ok=True, mode=0o750)
                temporary.replace(path)
                sync_folder(path.parent)
        return file

    def _open(self, digest: str) -> FileIO:
        path = self._path(digest)
        try:
            return FileIO(path)
        except FileNotFoundError as error:
            raise NotFound(
                f"{digest} is not stored here; restore {path} from a backup, or register the"
                " release again from the original file"
            ) from error

    def _check(self, file: PinnedFile, digest: str, size: int) -> None:
        if (digest, size) != (file.digest, file.size):
            raise IntegrityError(
                f"{file.path} should be {file.digest} ({file.size:,} bytes) and is {digest}"
                f" ({size:,} bytes); restore {self._path(file.digest)} from a backup, or register"
                " the release again from the original file"
            )

    def _sweep(self) -> None:
        """Remove, once per process, what killed ones left half-written."""
        if self._swept:
            return
        self._swept = True
        limit = time.time() - _ABANDONED
        for entry in os.scandir(self._temporary):
            with suppress(FileNotFoundError):  # another process sweeps too
                if entry.stat().st_mtime < limit:
                    Path(entry.path).unlink()


def _copy(
    reader: FileIO, write: Callable[[memoryview], object] | None, progress: Progress | None
) -> tuple[str, int]:
    """Read to the end, hashing; give the digest and the number of bytes."""
    digest, size = hashlib.sha256(), 0
    with memoryview(bytearray(CHUNK)) as buffer:
        while count := reader.readinto(buffer):
            chunk = buffer[:count]
            digest.update(chunk)
            if write is not None:
                write(chunk)
            size += count
            if progress is not None:
                progress(count)
    return f"sha256:{digest.hexdigest()}", size


def _writer(descriptor: int) -> Callable[[memoryview], object]:
    def write(content: memoryview) -> None:
        while content:
            content = content[os.write(descriptor, content) :]

    return write


@contextmanager
def _new_file(path: Path, mode: int) -> Generator[int]:
    """Make a file for writing; unless it is renamed on the way it is gone afterwards."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    try:
        yield descriptor
    finally:
        os.close(descriptor)
        path.unlink(missing_ok=True)


def _is_whole(path: Path, digest: str, size: int) -> bool:
    """Whether the blob is stored, every byte of it: storing it again is the cure for a damage."""
    try:
        if path.stat().st_size != size:
            return False
        with FileIO(path) as reader:
            return _copy(reader, None, None)[0] == digest
    except FileNotFoundError:
        return False


@contextmanager
def _explained(what: str) -> Generator[None]:
    try:
        yield
    except OSError as error:
        raise Unavailable(
            f"{what} ({error.strerror}); check the disk's free space and the permissions"
        ) from error
