"""The project's files: settings, modes and owners, whether they can be written, and room for more.

Nothing is changed: what is written to find out whether it can be is gone afterwards.
"""

from __future__ import annotations

import fcntl
import os
import pwd
import re
import stat
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from shipworthy.app.doctor.results import Case, Result, bad, good, told, warn
from shipworthy.app.health import megabytes
from shipworthy.errors import UsageError
from shipworthy.settings import FILE, MEBIBYTE, Project

_PROBE = ".doctor."
_LEAST_INODES = 1_000
_LEAST_FREE = 64 * MEBIBYTE
"""What the ledger's write-ahead log may take, even when nothing else grows."""
_FAR = re.compile(r"nfs\d*|cifs|smb\d*|smbfs|9p|afs|ceph|glusterfs|lustre|fuse\.\S+|vboxsf|drvfs")
_LEFT = re.compile(r"\.(?!doctor\.).+\.[0-9a-f]{8}|\..+\.[0-9a-f]{16}\.partial|\.doctor\..+")
_ABANDONED = 60.0
_BLOB_ABANDONED = 86_400.0


def settings(case: Case) -> Iterator[Result]:
    """`shipworthy.yaml`: can it be read and understood, and who may change it."""
    file = case.project.root / FILE
    if case.settings_problem is not None:
        yield told("settings", case.settings_problem)
        return
    status = file.stat()
    if status.st_mode & stat.S_IWOTH:
        seen = f"everybody may change {FILE}, and with it where the ledger is"
        yield warn("settings", seen, f"chmod o-w {file}")
        return
    url = case.project.settings.ledger or ""
    if re.match(r"[^/]+://[^/@]*:[^/@]+@", url):
        seen = f"a password stands in {FILE} (ledger)"
        cure = "leave the password out there; put it into ~/.pgpass or PGPASSWORD, and change it"
        yield warn("settings", seen, cure)
        return
    if status.st_uid not in {0, int(_stat(case.project.state, "st_uid", status.st_uid))}:
        seen = f"{FILE} is {_name(status.st_uid)}'s, and the state below it is not"
        yield warn("settings", seen, f"chown it to whoever runs shipworthy: {file}")
        return
    yield good("settings", f"{FILE} is understood")


def owners(case: Case) -> Iterator[Result]:
    """Whose files these are: one account's, and this one's."""
    state = case.project.state
    if not state.exists():
        return
    if not state.is_dir():
        cure = f"move {state} away, and put the project's state back from a backup"
        yield bad("state folder", f"{state} is no folder", cure)
        return
    owner, me = state.stat().st_uid, os.geteuid()
    if me not in {0, owner}:
        seen = f"the project is {_name(owner)}'s and you are {_name(me)}"
        yield bad("owner", seen, f"run shipworthy as {_name(owner)}: sudo -u {_name(owner)} …")
        return
    strangers = [path for path in _known(case.project) if _stat(path, "st_uid", owner) != owner]
    if strangers:
        names = ", ".join(str(path.relative_to(state)) for path in strangers[:3])
        seen = f"{len(strangers)} of the state's files are not {_name(owner)}'s: {names}"
        cure = f"chown -R {_name(owner)} {state}, and run shipworthy as {_name(owner)} alone"
        yield bad("owner", seen, cure)
    else:
        yield good("owner", f"all of the state is {_name(owner)}'s")


def modes(case: Case) -> Iterator[Result]:
    """Whether others can read what is secret."""
    project = case.project
    if not project.state.is_dir():
        return
    ledger = project.state / "ledger.db"
    private = [ledger.with_name(ledger.name + tail) for tail in ("", "-wal", "-shm")]
    private += [project.state, project.secrets, *_entries(project.secrets)]
    open_ = [path for path in private if int(_stat(path, "st_mode", 0)) & 0o077]
    if not open_:
        yield good("privacy", "secrets and ledger can be read by their owner alone")
        return
    names = ", ".join(str(path.relative_to(project.root)) for path in open_[:3])
    cure = f"chmod -R go= {project.state}"
    yield bad("privacy", f"other accounts may read {names}", cure)


def state_folders(case: Case) -> Iterator[Result]:
    """Whether everything that must be there is, and is what it should be."""
    project = case.project
    if not project.state.exists():
        seen = f"there is no {project.state}; the project has not run yet, or was restored by half"
        yield warn("state folder", seen, "'shipworthy up' makes it, or restore it from a backup")
        return
    folders = (
        project.secrets,
        project.journals,
        project.snapshots,
        project.logs,
        project.blobs,
        project.replicas,
    )
    wrong = [path for path in folders if os.path.lexists(path) and not path.is_dir()]
    for path in wrong:
        cure = f"move {path} away; 'shipworthy up' makes the folder anew, a backup has its files"
        yield bad("state folder", f"{path} is no folder", cure)
    secrets = [project.secrets / name for name in ("signing", "pseudonyms")]
    for path in () if project.secrets in wrong else secrets:
        yield from _secret(path)
    if not wrong:
        yield good("state folder", f"{project.state} has its folders")


def _secret(path: Path) -> Iterator[Result]:
    cure = (
        f"restore {path} from a backup; else 'shipworthy up' makes a new one, and feedback on old"
        " inferences is refused or units get new pseudonyms"
    )
    if not path.exists():
        yield bad("secrets", f"{path} is missing", cure)
    elif not path.is_file() or path.stat().st_size < 32:
        yield bad("secrets", f"{path} is no secret: empty, cut off or no file", cure)


def writable(case: Case) -> Iterator[Result]:
    """Whether files can be made, locked and linked where they must be: by trying."""
    project = case.project
    folders = [
        project.state,
        project.secrets,
        project.journals,
        project.snapshots,
        project.logs,
        project.blobs,
    ]
    with suppress(UsageError):  # a wrong lake.url, which the lake's examination tells
        folders.append(project.lake)
    trouble = False
    for folder in folders:
        if not folder.is_dir():
            continue
        try:
            _try_to_write(folder)
        except OSError as error:
            trouble = True
            cure = f"make room or check the permissions of {folder}"
            yield bad("writable", f"nothing can be written in {folder} ({error.strerror})", cure)
    if not trouble and project.state.is_dir():
        yield good("writable", "all folders of the state can be written")


def _try_to_write(folder: Path) -> None:
    """Write, lock and link a file; nothing of it stays. Raises OSError."""
    with tempfile.TemporaryDirectory(dir=folder, prefix=_PROBE) as name:
        file = Path(name) / "a"
        with file.open("wb") as handle:
            handle.write(b"\0" * 4096)
            handle.flush()
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.link(file, file.with_name("b"))


def file_system(case: Case) -> Iterator[Result]:
    """Whether the disk is in this machine: locks and renames must hold."""
    place = case.project.state if case.project.state.exists() else case.project.root
    kind = case.machine.file_system(place)
    if kind is None:
        return
    if _FAR.fullmatch(kind):
        seen = f"the state lies on {kind}, where locks and SQLite can't be relied on"
        yield warn("file system", seen, "move the project to a disk of this machine")
    else:
        yield good("file system", f"the state lies on {kind}")


def room(case: Case) -> Iterator[Result]:
    """Free space and inodes, against what may still come."""
    project = case.project
    place = project.state if project.state.is_dir() else project.root
    disk = os.statvfs(place)
    free = disk.f_bavail * disk.f_frsize
    used = sum(_stat(path, "st_size", 0) for path in _entries(project.journals))
    coming = max(0, project.settings.journal.max_bytes - used)
    if disk.f_files and disk.f_favail < _LEAST_INODES:
        seen = f"only {disk.f_favail:,} more files fit on the disk of {place}"
        yield bad("disk space", seen, f"remove small files on that disk: df -i {place}")
    elif free < _LEAST_FREE:
        seen = f"{megabytes(free)} are free on the disk of {place}; records are dropped when full"
        yield bad("disk space", seen, f"make room: du -xh --max-depth 2 {project.state}")
    elif free < coming + _LEAST_FREE:
        seen = f"{megabytes(free)} are free, and the journals may grow by {megabytes(coming)}"
        yield warn("disk space", seen, "make room, or lower journal.max_bytes in shipworthy.yaml")
    else:
        yield good("disk space", f"{megabytes(free)} are free")


def leftovers(case: Case) -> Iterator[Result]:
    """What killed processes left half-written."""
    project, now = case.project, case.clock()
    found = [
        path
        for folder in (project.state, project.secrets, project.snapshots)
        for path in _entries(folder)
        if _LEFT.fullmatch(path.name)
    ]
    old = [path for path in found if now - _stat(path, "st_mtime", now) > _ABANDONED]
    blobs = _entries(project.blobs / "tmp")
    old += [path for path in blobs if now - _stat(path, "st_mtime", now) > _BLOB_ABANDONED]
    backup = project.state / "backup"
    if backup.is_dir() and _is_free(backup):
        old.append(backup)  # it keeps links to files that are deleted elsewhere
    if old:
        size = sum(_stat(path, "st_size", 0) for path in old)
        names = " ".join(str(path) for path in old[:5])
        more = f" and {len(old) - 5} more" if len(old) > 5 else ""
        seen = f"killed processes left {len(old)} files ({megabytes(size)}) that nobody needs"
        yield warn("leftovers", seen, f"rm -r {names}{more}")
    else:
        yield good("leftovers", "nothing is left half-written")


def _is_free(folder: Path) -> bool:
    """Whether nobody holds the lock of a folder that is worked in."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    finally:
        os.close(descriptor)
    return True


def _known(project: Project) -> Iterator[Path]:
    """What two accounts would trip over."""
    yield from _entries(project.state)
    for folder in (project.secrets, project.journals, project.logs, project.replicas):
        yield from _entries(folder)


def _entries(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return []


def _stat(path: Path, field: str, gone: float) -> float:
    """A field of the file's status; `gone` where there is none, as files come and go."""
    try:
        return getattr(path.lstat(), field)
    except FileNotFoundError:
        return gone


def _name(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return f"uid {uid}"
