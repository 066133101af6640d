"""Backups: all that a project is, as it was at one point, taken while everything runs.

What is in one, and where it lies in the archive:

    shipworthy.yaml     settings
    ledger.db           every decision; SQLite, whatever the ledger is kept in
    secrets/            what signs inference ids and makes units' pseudonyms, and the admin key
    journals/           records that the keeper or the lake's writer may not have read
    lake/               the files of each table's newest version, its log, and the writer's place
    blobs/              what releases pin

Snapshots, replicas, locks and logs are made anew. Policies are in the ledger; the files that they
came from belong to the user's repository.

**Why it is one point.** While we hold the lake's lock nobody changes the lake or its writer's
place, and nobody deletes a segment of a journal. Under it, in this order:

1. The ledger is copied, in one transaction. The lake's writer takes decisions and tombstones from
   the ledger, so a ledger copied with the lake already at rest knows all that the lake has, and
   never numbers anew what the lake would then take for known.
2. The journals' segments are linked, after the ledger. A record that the copied ledger counted was
   in a segment before, so its cursors point at nothing that is missing here. What it had not
   counted yet is in a segment that is still there, since none is deleted under the lock.
3. Of each segment exactly the bytes that it has then are kept. A record that was acknowledged
   before the backup began is in the lake or within them. What workers write afterwards is left
   out: it would be of another time in each segment. A write under way leaves a torn frame at the
   end, which readers cut: it was not acknowledged.
4. The lake and its writer's place are linked. Both are as a writer that was killed just now would
   have left them, with the segments that it would read: to go on from there is what a writer must
   be able to do anyway.

So a restored project goes on as if all its processes had been killed at that point, from which they
recover with nothing lost and nothing doubled. Blobs are read after the lock is given back: they are
stored before the ledger names them, and never change.

Linking costs no time or space, so the lock is held for as long as it takes to copy the ledger and
list files. What the project then replaces or deletes stays behind its link until it is in the
archive. Where links are refused files are copied, and the lock is held longer.
"""

from __future__ import annotations

import errno
import os
import shutil
import time
from collections import Counter
from collections.abc import Callable, Collection, Generator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path, PurePosixPath

import msgspec

from shipworthy import __version__
from shipworthy.app.session import Session, new_id
from shipworthy.domain.audit import AuditHead
from shipworthy.errors import Conflict, IntegrityError, NotFound, Unavailable
from shipworthy.ports import Progress
from shipworthy.settings import FILE, Project, sqlite_url
from shipworthy.stores.archive import Contents, Source, open_archive, write_archive
from shipworthy.stores.files import locked, workspace
from shipworthy.stores.lake.inventory import current_files
from shipworthy.stores.ledger import copy_ledger
from shipworthy.stores.ledger.schema import REVISIONS

Progressing = Callable[[int], AbstractContextManager[Progress]]
"""Shows the progress of work on that many bytes."""

LEDGER = "ledger.db"
JOURNALS, LAKE, SECRETS, BLOBS = "journals", "lake", "secrets", "blobs"
WRITER = f"{LAKE}/writer.json"

_ALWAYS = {FILE, LEDGER, f"{SECRETS}/signing", f"{SECRETS}/pseudonyms"}
_DEPTHS = {JOURNALS: {1}, SECRETS: {1}, BLOBS: {3}, LAKE: range(2, 9)}
"""How many folders and names may come below each folder."""

_PATIENCE = 300.0
"""Seconds to wait for the lake's writer: it may be rewriting a table."""
_RESERVE = 16 * 1024 * 1024
"""Bytes that are asked for beside the files themselves."""
_NO_LINKS = {errno.EXDEV, errno.EPERM, errno.EACCES, errno.EMLINK, errno.ENOTSUP, errno.ENOSYS}


class Backup(msgspec.Struct, frozen=True, kw_only=True):
    """What was made or checked.

    `files` counts by kind. `paused` is for how many seconds the lake's writer had to wait.
    `damaged` names blobs that no longer are what their names say.
    """

    file: str
    id: str
    at: float
    shipworthy: str
    ledger: str
    audit: AuditHead
    bytes: int
    files: dict[str, int]
    paused: float = 0.0
    damaged: tuple[str, ...] = ()


def create_backup(session: Session, target: Path, progress: Progressing) -> Backup:
    """Write a backup of the whole project to a new file, readable by its owner alone.

    Raises:
        Conflict: The file exists already, or another backup of this project is under way.
        NotFound: The file's folder does not exist.
        IntegrityError: The audit log does not hold.
        Unavailable: A disk refuses or is full, or the lake's writer does not let go of its lock.

    """
    _check_target(target)
    project = session.project
    with workspace(project.state / "backup") as staging:
        id, now = new_id("backup"), session.clock()
        actor = session.actor().id
        with session.ledger.write() as tx:
            # First, so that the backup holds it and everybody can see who has a copy of it all.
            tx.audit.append(at=now, actor=actor, act="backup", subject=id)
        with _at_rest(project) as since:
            audit = copy_ledger(project.ledger_url, sqlite_url(staging / LEDGER))
            sources = _stage(project, staging)
            at, paused = session.clock(), time.monotonic() - since
        sources += _blobs(project)
        size = sum(source.size for source in sources)
        check_space(target.parent, size)
        facts = Contents(
            shipworthy=__version__,
            id=id,
            at=at,
            ledger=REVISIONS[-1],
            audit=audit,
        )
        with progress(size) as advance:
            made = write_archive(target, sources, facts, advance)
    return summary_of(target, made, paused)


def verify_backup(file: Path, progress: Progressing) -> Backup:
    """Read every byte of a backup; IntegrityError, or NotFound, when it can't be restored."""
    with open_archive(file) as archive:
        check_names(file, archive.contents.files)
        with progress(archive.contents.size) as advance:
            archive.verify(advance)
        return summary_of(file, archive.contents)


def check_space(folder: Path, size: int) -> None:
    """Unavailable when a folder's disk has no room for so many bytes."""
    free = shutil.disk_usage(folder).free
    if free < size + _RESERVE:
        message = f"{folder} has {free:,} bytes free and {size + _RESERVE:,} are needed; make room"
        raise Unavailable(message)


def _check_target(target: Path) -> None:
    if target.exists() or target.is_symlink():
        message = f"{target} is there already; give another name, or move it away"
        raise Conflict(message)
    if not target.parent.is_dir():
        message = f"there is no folder {target.parent}; make it, or check the path"
        raise NotFound(message)


@contextmanager
def _at_rest(project: Project) -> Generator[float]:
    """Hold the lake's lock; gives the monotonic time since when."""
    with locked(project.lake_lock, _PATIENCE):
        yield time.monotonic()


def _stage(project: Project, staging: Path) -> list[Source]:
    """Link what must be of one point with the ledger that was just copied."""
    stage = _Stage(staging)
    for path in sorted(project.journals.glob("*.journal")):
        size = path.stat().st_size
        if size:
            stage.link(path, f"{JOURNALS}/{path.name}", size)
    for path in current_files(project.lake):
        stage.link(path, f"{LAKE}/{path.relative_to(project.lake).as_posix()}")
    if project.lake_writer.exists():
        stage.link(project.lake_writer, WRITER)
    for path in sorted(project.secrets.glob("[!.]*")):
        stage.link(path, f"{SECRETS}/{path.name}")
    stage.copy(project.root / FILE, FILE)
    return [_source(staging / LEDGER, LEDGER), *stage.sources]


class _Stage:
    """Links in a folder to files that may be replaced, deleted or appended to afterwards."""

    def __init__(self, folder: Path) -> None:
        self.sources: list[Source] = []
        self._folder = folder

    def link(self, path: Path, name: str, size: int | None = None) -> None:
        """Link a file; with a `size` it grows, and that is how much of it counts."""
        target = self._folder / name
        try:
            target.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            os.link(path, target)
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise _unstaged(path, error) from error
            self.copy(path, name, size)
            return
        growing = size is not None
        self.sources.append(
            Source(name, target, size, growing=True) if growing else _source(target, name)
        )

    def copy(self, path: Path, name: str, size: int | None = None) -> None:
        """Copy a file, or its first `size` bytes: one that people edit in place, for example."""
        target = self._folder / name
        try:
            shutil.copy2(path, target)
            if size is not None and target.stat().st_size > size:
                os.truncate(target, size)
        except OSError as error:
            raise _unstaged(path, error) from error
        self.sources.append(_source(target, name))


def _unstaged(path: Path, error: OSError) -> Unavailable:
    message = f"{path} can't be backed up ({error.strerror}); check the disk and the permissions"
    return Unavailable(message)


def _source(path: Path, name: str) -> Source:
    return Source(name, path, path.stat().st_size)


def _blobs(project: Project) -> list[Source]:
    """What is stored by now: the copied ledger names no other."""
    root = project.blobs / "sha256"
    return [
        _source(path, f"{BLOBS}/sha256/{path.parent.name}/{path.name}")
        for path in sorted(root.glob("??/*"))
    ]


def check_names(file: Path, names: Collection[str]) -> None:
    """IntegrityError for an archive that lacks what every project has, or holds what none has."""
    unknown = sorted(name for name in names if not _is_known(name))
    missing = sorted(_ALWAYS.difference(names))
    if unknown or missing:
        what = f"holds {unknown[0]!r}, which is" if unknown else f"lacks {missing[0]}, so it is"
        message = f"{file} {what} no backup of a project; take another one"
        raise IntegrityError(message)


def _is_known(name: str) -> bool:
    first, *others = PurePosixPath(name).parts
    return name in {FILE, LEDGER, WRITER} or len(others) in _DEPTHS.get(first, ())


def summary_of(file: Path, contents: Contents, paused: float = 0.0) -> Backup:
    """Say what an archive holds, and which blobs are not what their names say."""
    kinds = Counter(PurePosixPath(name).parts[0] for name in contents.files)
    damaged = [
        f"sha256:{PurePosixPath(name).name}"
        for name, pinned in contents.files.items()
        if name.startswith(f"{BLOBS}/") and pinned.digest != f"sha256:{PurePosixPath(name).name}"
    ]
    return Backup(
        file=str(file),
        id=contents.id,
        at=contents.at,
        shipworthy=contents.shipworthy,
        ledger=contents.ledger,
        audit=contents.audit,
        bytes=contents.size,
        files=dict(kinds),
        paused=paused,
        damaged=tuple(damaged),
    )
