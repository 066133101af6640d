"""Backups' archives: one plain tar whose last member, `manifest.json`, pins all the others.

Plain, since what is large in it (Parquet, models) is compressed already, and since any tar can open
it in ten years. The manifest is last because it is known last: each file is read once, hashed on
its way into the archive. A reader walks the headers first, which touches no content, and uses no
content that it has not compared with the manifest.

An archive is not trusted to be ours: only plain files under plain names, each pinned once, are ever
written, by our own hands and into a folder that is thrown away unless all of it was right. It is
not signed either: whoever can write it can make another one.
"""

from __future__ import annotations

import hashlib
import io
import os
import tarfile
from collections.abc import Generator, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import BinaryIO

import msgspec

from shipworthy.domain.audit import AuditHead
from shipworthy.domain.canonical import digest_of
from shipworthy.errors import IntegrityError, NotFound, Unavailable, UsageError
from shipworthy.ports import Progress
from shipworthy.stores.files import new_file

FORMAT = 1
"""To be raised when older versions can't read an archive any more."""

MANIFEST = "manifest.json"
_CHUNK = 1024 * 1024
_MOST_MANIFEST = 256 * 1024 * 1024
_DAMAGED = "take another backup, or copy this one again from where it was kept"


class Pinned(msgspec.Struct, frozen=True):
    """A file's size in bytes, and `sha256:` with its digest."""

    size: int
    digest: str


class Contents(msgspec.Struct, frozen=True, kw_only=True):
    """What an archive holds.

    `id` names the backup, in the audit log too; `at` is the Unix time that it is of, `ledger` the
    revision of its ledger's schema and `audit` the head of its audit log. `digest` covers all other
    fields.
    """

    format: int = FORMAT
    shipworthy: str
    id: str
    at: float
    ledger: str
    audit: AuditHead
    files: dict[str, Pinned] = {}
    digest: str = ""

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(file.size for file in self.files.values())

    def sealed(self) -> Contents:
        """The same with the digest that it should have."""
        fields = msgspec.to_builtins(self)
        del fields["digest"]
        return msgspec.structs.replace(self, digest=digest_of(fields))


@dataclass(frozen=True, slots=True)
class Source:
    """A file to be archived under `name`: the first `size` bytes of `path`.

    One that is `growing` may be longer by now, or have lost an unfinished end; it is held in memory
    for a moment.
    """

    name: str
    path: Path
    size: int
    growing: bool = False


def write_archive(
    target: Path, sources: Iterable[Source], facts: Contents, progress: Progress
) -> Contents:
    """Write an archive that appears all at once; gives `facts` with its files.

    Raises Unavailable when the disk refuses or a source can't be read; nothing is left of it then.
    """
    files: dict[str, Pinned] = {}
    with (
        _explained(f"{target} can't be written"),
        new_file(target) as handle,
        tarfile.open(fileobj=handle, mode="w") as tar,
    ):
        for source in sources:
            files[source.name] = _add(tar, source, progress)
        contents = msgspec.structs.replace(facts, files=files).sealed()
        encoded = msgspec.json.encode(contents)
        info = _header(MANIFEST, len(encoded), 0o600, facts.at)
        tar.addfile(info, io.BytesIO(encoded))
    return contents


def _add(tar: tarfile.TarFile, source: Source, progress: Progress) -> Pinned:
    with _explained(f"{source.path} can't be read"):
        handle = source.path.open("rb")
    with handle:
        status = os.fstat(handle.fileno())
        reader = _Reader(handle, source.path, progress)
        info = _header(source.name, source.size, status.st_mode, status.st_mtime)
        if source.growing:
            # How long it is has to stand before it, and it must not get shorter in between.
            content = reader.read(source.size)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
        else:
            tar.addfile(info, _Whole(reader))
    return Pinned(info.size, reader.digest)


def _header(name: str, size: int, mode: int, at: float) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.size, info.mode, info.mtime = size, mode & 0o777, int(at)
    return info


class _Reader:
    """A source on its way: hashed and counted, with its own faults told from the archive's."""

    def __init__(self, handle: BinaryIO, path: Path, progress: Progress) -> None:
        self._handle = handle
        self.path = path
        self._progress = progress
        self._digest = hashlib.sha256()

    @property
    def digest(self) -> str:
        return f"sha256:{self._digest.hexdigest()}"

    def read(self, length: int = -1, /) -> bytes:
        with _explained(f"{self.path} can't be read"):
            content = self._handle.read(length)
        self._digest.update(content)
        self._progress(len(content))
        return content


class _Whole:
    """A source that must not end early."""

    def __init__(self, reader: _Reader) -> None:
        self._reader = reader

    def read(self, length: int = -1, /) -> bytes:
        content = self._reader.read(length)
        if len(content) < length:
            message = f"{self._reader.path} got shorter while it was read; try again"
            raise Unavailable(message)
        return content


class Archive:
    """An archive whose headers are sound and fit its manifest; its contents are not read yet."""

    def __init__(self, path: Path, handle: BinaryIO) -> None:
        self._path = path
        self._handle = handle
        self._members = dict(_members(path, handle))
        manifest = self._members.pop(MANIFEST, None)
        if manifest is None or manifest.offset < max(
            (member.offset for member in self._members.values()), default=0
        ):
            message = f"{path} is no whole backup: {MANIFEST} is not at its end; {_DAMAGED}"
            raise IntegrityError(message)
        if manifest.size > _MOST_MANIFEST:
            message = f"the manifest of {path} is larger than any of ours; {_DAMAGED}"
            raise IntegrityError(message)
        self.contents = _decode(path, b"".join(self._stream(manifest)))
        self._compare()

    def _compare(self) -> None:
        """Refuse what is in the archive or its manifest alone, or of another size."""
        found = {name: member.size for name, member in self._members.items()}
        pinned = {name: file.size for name, file in self.contents.files.items()}
        wrong = sorted(dict(found.items() ^ pinned.items()))
        if wrong:
            message = f"{self._path} and its manifest disagree about {wrong[0]!r}; {_DAMAGED}"
            raise IntegrityError(message)

    def read(self, name: str) -> bytes:
        """A small file; IntegrityError when it is not what was archived, or not there."""
        if name not in self._members:
            message = f"{self._path} has no {name}; {_DAMAGED}"
            raise IntegrityError(message)
        return b"".join(self._verified(name))

    def verify(self, progress: Progress) -> None:
        """Read every byte; IntegrityError for the first file that is not what was archived."""
        for name in self._members:
            for chunk in self._verified(name):
                progress(len(chunk))

    def extract(self, folder: Path, progress: Progress) -> None:
        """Write all files below a new, private folder, each byte compared on its way.

        Raises:
            IntegrityError: A file is not what was archived. The folder must not be used then.
            Unavailable: The disk refuses.

        """
        with _explained(f"{folder} can't be written"):
            folder.mkdir(mode=0o700)
        for name, member in self._members.items():
            target = folder / name
            with _explained(f"{target} can't be written"):
                target.parent.mkdir(parents=True, exist_ok=True)
                flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
                with os.fdopen(os.open(target, flags, 0o600), "wb") as writer:
                    for chunk in self._verified(name):
                        writer.write(chunk)
                        progress(len(chunk))
                    # Readable by its owner, and to be written by nobody else.
                    os.fchmod(writer.fileno(), member.mode & 0o755 | 0o400)

    def _verified(self, name: str) -> Iterator[bytes]:
        digest = hashlib.sha256()
        for chunk in self._stream(self._members[name]):
            digest.update(chunk)
            yield chunk
        if f"sha256:{digest.hexdigest()}" != self.contents.files[name].digest:
            message = f"{name} in {self._path} is not what was backed up; {_DAMAGED}"
            raise IntegrityError(message)

    def _stream(self, member: tarfile.TarInfo) -> Iterator[bytes]:
        left = member.size
        with _explained(f"{self._path} can't be read"):
            self._handle.seek(member.offset_data)
        while left:
            with _explained(f"{self._path} can't be read"):
                chunk = self._handle.read(min(left, _CHUNK))
            if not chunk:
                message = f"{self._path} is cut off within {member.name}; {_DAMAGED}"
                raise IntegrityError(message)
            left -= len(chunk)
            yield chunk


@contextmanager
def open_archive(path: Path) -> Generator[Archive]:
    """Open an archive and compare its headers with its manifest.

    Raises:
        NotFound: There is no such file.
        UsageError: It is no file, or a newer version made it.
        IntegrityError: It is no backup, or damaged.
        Unavailable: It can't be read.

    """
    if not path.exists():
        message = f"there is no file {path}; check the path"
        raise NotFound(message)
    if not path.is_file():
        message = f"{path} is no plain file; name the archive that 'backup create' made"
        raise UsageError(message)
    with _explained(f"{path} can't be read"):
        handle = path.open("rb")
    with handle:
        yield Archive(path, handle)


def _members(path: Path, handle: BinaryIO) -> Iterator[tuple[str, tarfile.TarInfo]]:
    """Walk the headers; IntegrityError for anything that `write_archive` would not have written."""
    known: set[str] = set()
    behind = 0
    try:
        with tarfile.open(fileobj=handle, mode="r:", errorlevel=2) as tar:
            for member in tar:
                # A header may be made to lead backwards, round and round.
                onwards = member.offset >= behind and member.size >= 0
                plain = member.type == tarfile.REGTYPE and not member.issparse()
                if not (onwards and plain and _is_plain(member.name)) or member.name in known:
                    message = (
                        f"{path} holds {member.name!r}, which no backup would hold: it was made by"
                        " something else or tampered with; take another one"
                    )
                    raise IntegrityError(message)
                known.add(member.name)
                behind = member.offset_data + member.size
                yield member.name, member
    except (tarfile.TarError, EOFError, ValueError) as error:
        message = f"{path} is no backup, or a damaged one ({error}); {_DAMAGED}"
        raise IntegrityError(message) from error
    except OSError as error:
        message = f"{path} can't be read ({error.strerror or error}); check its disk"
        raise Unavailable(message) from error


def _is_plain(name: str) -> bool:
    """Whether a name leads to one place below a folder, spelt in the one way."""
    path = PurePosixPath(name)
    return (
        name == str(path)
        and name.isprintable()
        and not path.is_absolute()
        and path.parts != ()
        and ".." not in path.parts
    )


def _decode(path: Path, encoded: bytes) -> Contents:
    try:
        stated = msgspec.json.decode(encoded, type=_Format).format
        if stated > FORMAT:
            message = (
                f"{path} is of format {stated}, which a newer Shipworthy made (this one reads up to"
                f" {FORMAT}); upgrade Shipworthy"
            )
            raise UsageError(message)
        contents = msgspec.json.decode(encoded, type=Contents)
    except (msgspec.MsgspecError, ValueError) as error:
        message = f"the manifest of {path} can't be read ({error}); {_DAMAGED}"
        raise IntegrityError(message) from error
    if contents.sealed() != contents:
        message = f"the manifest of {path} was changed; {_DAMAGED}"
        raise IntegrityError(message)
    return contents


class _Format(msgspec.Struct):
    """All that every version can read of a manifest."""

    format: int


@contextmanager
def _explained(what: str) -> Generator[None]:
    try:
        yield
    except OSError as error:
        message = f"{what} ({error.strerror or error}); check the disk's space and the permissions"
        raise Unavailable(message) from error
