"""The files behind an artifact or data set: found in a fixed order, and none from outside."""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Generator, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

from shipworthy.domain.manifest import PinnedFile
from shipworthy.errors import Conflict, NotFound, UsageError
from shipworthy.ports import Progress

CHUNK = 1024 * 1024
"""Bytes that are read and hashed at a time."""

SKIPPED_FOLDERS = frozenset({"__pycache__", ".git", ".ipynb_checkpoints"})
"""Leftovers of tools, which would give the same model another digest on the next day."""


@dataclass(frozen=True, slots=True)
class SourceFile:
    """A file as it was found: its path inside the artifact (`.` when it is the artifact itself).

    `mark` tells whether the file changed between being found, scanned and stored.
    """

    path: Path
    inside: str
    size: int
    mark: tuple[int, int, int]

    def check_unchanged(self) -> None:
        """Raise Conflict when the file is no longer the one that was found."""
        with explained(self.path):
            if _mark(self.path.stat()) != self.mark:
                raise Conflict(
                    f"{self.path} changed while it was read; wait until nothing writes to it and"
                    " try again"
                )


def artifact_files(folder: Path, relative: str) -> list[SourceFile]:
    """The files of an artifact, by path; `relative` is a file or folder inside `folder`.

    A symbolic link is followed to a file inside `folder` and nowhere else.

    Raises:
        NotFound: There is nothing of that name.
        UsageError: It is empty, leaves the folder, or holds what is no plain file.

    """
    root = folder.resolve()
    target = root / relative
    if not os.path.lexists(target):
        raise NotFound(f"there is no {relative} in {folder}{_nearest(root, relative)}")
    return _files(target, relative, inside_of=root)


def data_files(folder: Path, path: str) -> list[SourceFile]:
    """The files of a data set, by path; `path` is relative to `folder`, or absolute.

    Data often lies on a shared disk behind a link, and only its digest is kept, so links to files
    are followed anywhere. Raises as `artifact_files` does.
    """
    if "://" in path:
        raise UsageError(
            f"{path} is a URL, and only files that can be read here are pinned; download it and"
            " give its path"
        )
    target = folder / Path(path).expanduser()
    if not target.exists():
        raise NotFound(f"there is no {path} (looked for {target}){_nearest(folder, path)}")
    return _files(target.resolve(), path, inside_of=None)


def digest_file(source: SourceFile, progress: Progress | None = None) -> PinnedFile:
    """Hash a file without storing it, in constant memory."""
    digest, size = hashlib.sha256(), 0
    with explained(source.path), source.path.open("rb", buffering=0) as reader:
        buffer = bytearray(CHUNK)
        view = memoryview(buffer)
        while count := reader.readinto(buffer):
            digest.update(view[:count])
            size += count
            if progress is not None:
                progress(count)
    return PinnedFile(path=source.inside, digest=f"sha256:{digest.hexdigest()}", size=size)


def total(files: Iterable[SourceFile]) -> int:
    """Bytes altogether, for a progress bar."""
    return sum(file.size for file in files)


@contextmanager
def explained(path: Path) -> Generator[None]:
    """Turn what the operating system refuses into a sentence with the path."""
    try:
        yield
    except FileNotFoundError as error:
        raise NotFound(f"{path} is gone; nothing may move files while they are read") from error
    except OSError as error:
        raise UsageError(f"{path} can't be read ({error.strerror}); check its rights") from error


def _files(target: Path, shown: str, *, inside_of: Path | None) -> list[SourceFile]:
    with explained(target):
        if not target.resolve().is_dir():
            return [_found(target, ".", shown, inside_of)]
        _check_inside(target, shown, inside_of)
        names = sorted(_walk(target, shown), key=lambda path: path.relative_to(target).as_posix())
        found = [
            _found(path, path.relative_to(target).as_posix(), f"{shown}/{path.name}", inside_of)
            for path in names
        ]
    if not found:
        raise UsageError(f"the folder {shown} holds no file; put something in it or leave it out")
    return found


def _walk(target: Path, shown: str) -> Iterator[Path]:
    def refuse(error: OSError) -> None:
        raise error

    for parent, folders, names in os.walk(target, onerror=refuse):
        for name in folders:
            if Path(parent, name).is_symlink() and name not in SKIPPED_FOLDERS:
                raise UsageError(
                    f"{name} in {shown} is a symbolic link to a folder; put the folder itself there"
                )
        folders[:] = [name for name in folders if name not in SKIPPED_FOLDERS]
        yield from (Path(parent, name) for name in names)


def _found(path: Path, inside: str, shown: str, inside_of: Path | None) -> SourceFile:
    _check_inside(path, shown, inside_of)
    try:
        str(path).encode()
    except UnicodeEncodeError:
        raise UsageError(f"a file name in {shown!a} is not UTF-8; rename the file") from None
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise UsageError(f"{shown} is no plain file; only files and folders can be pinned")
    return SourceFile(path.resolve(), inside, status.st_size, _mark(status))


def _check_inside(path: Path, shown: str, inside_of: Path | None) -> None:
    if inside_of is not None and not path.resolve().is_relative_to(inside_of):
        raise UsageError(
            f"{shown} is a symbolic link that leaves the release's folder; copy the file there"
        )


def _mark(status: os.stat_result) -> tuple[int, int, int]:
    return status.st_size, status.st_mtime_ns, status.st_ino


def _nearest(folder: Path, name: str) -> str:
    try:
        there = sorted(entry.name for entry in os.scandir(folder))
    except OSError:
        there = []
    close = get_close_matches(Path(name).name, there, n=1)
    return f"; did you mean {close[0]!r}?" if close else "; check the path"
