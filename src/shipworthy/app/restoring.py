"""Restoring a backup to a folder where there is no project's state yet: all of it or nothing.

Everything is first written to a workspace in that folder, each byte compared with the archive's
manifest, and the ledger brought to this version. Only then is it put in place: first what lies
outside the state's folder, then the settings, and the state at last, by one rename. A folder
without state can be restored to again.

The settings may name places elsewhere, a database or a lake on another disk: those of the machine
that was backed up, perhaps in use. So nothing is ever written to a place that is not empty, and to
a ledger outside the project's folder only when the caller names it.
"""

from __future__ import annotations

import json
import re
import shutil
import time
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path
from urllib.parse import unquote

from shipworthy.app.backing_up import (
    JOURNALS,
    LAKE,
    LEDGER,
    SECRETS,
    Backup,
    Progressing,
    check_names,
    check_space,
    summary_of,
)
from shipworthy.app.founding import ignore_state
from shipworthy.app.session import Session
from shipworthy.errors import Conflict, LedgerUnavailable, Unavailable, UsageError
from shipworthy.protocols.documents import read_document
from shipworthy.settings import FILE, STATE, Project, Settings, sqlite_url
from shipworthy.stores.archive import Archive, open_archive
from shipworthy.stores.blobs import LocalBlobs
from shipworthy.stores.files import replace_file, workspace
from shipworthy.stores.ledger import copy_ledger, migrate, open_ledger
from shipworthy.stores.ledger.ledger import database_at
from shipworthy.stores.ledger.schema import REVISIONS

_WORK = ".shipworthy.restoring"
_LEDGER_LINE = re.compile(r"^ledger[ \t]*:.*$", re.MULTILINE)


def restore_backup(
    file: Path, folder: Path, progress: Progressing, *, ledger: str | None = None
) -> Backup:
    """Put a backup's project into a folder that is absent, empty or a project without state.

    A `shipworthy.yaml` that is there stays and counts; otherwise the backup's is put there.
    `ledger` is the URL of an empty database to keep the ledger in, and is written into it.

    Raises:
        IntegrityError: It is no backup, or damaged.
        Conflict: The folder, or a place that the settings name, holds something already.
        UsageError: The ledger's place must be said, or a newer version made the backup.
        LedgerUnavailable: A newer version made the ledger, or its database does not answer.
        Unavailable: A disk refuses or is full.

    """
    with open_archive(file) as archive, _fresh(folder):
        contents = archive.contents
        check_names(file, contents.files)
        _check_version(file, contents.ledger, contents.shipworthy)
        settings = _settings(archive, folder, ledger)
        project = Project(
            folder.resolve(), read_document(settings.encode(), str(folder / FILE), Settings)
        )
        if ledger is not None and project.settings.ledger != ledger:
            message = (
                f"{folder / FILE} has no line for the ledger that we could change; write"
                " 'ledger: URL' there on a line of its own, and restore again"
            )
            raise UsageError(message)
        _check_places(project, named=ledger is not None)
        check_space(folder, contents.size)
        with workspace(folder / _WORK) as work:
            state = work / STATE
            with progress(contents.size) as advance:
                archive.extract(state, advance)
            _bring_up_to_date(project, state, contents.id)
            _put_in_place(project, state, settings)
        return summary_of(file, contents)


def _check_version(file: Path, revision: str, version: str) -> None:
    if revision not in REVISIONS:
        message = (
            f"the ledger in {file} has schema {revision}, which Shipworthy {version} made and this"
            f" one does not know (it knows {REVISIONS[-1]}); upgrade Shipworthy"
        )
        raise LedgerUnavailable(message)


@contextmanager
def _fresh(folder: Path) -> Generator[None]:
    """Make the folder if need be; one that was made is gone again when the restore fails.

    Raises Conflict when something is in it that is no project without state.
    """
    made = not folder.exists()
    if not made:
        _check_folder(folder)
    else:
        with _explained(f"{folder} can't be made"):
            folder.mkdir(parents=True)
    try:
        yield
    except BaseException:
        if made:
            with suppress(OSError):
                folder.rmdir()
        raise


def _check_folder(folder: Path) -> None:
    with _explained(f"{folder} can't be read"):
        names = {path.name for path in folder.iterdir()} - {_WORK}
        filled = STATE in names and any((folder / STATE).iterdir())
    if filled:
        message = (
            f"{folder} has a project's state already; give another folder, or stop that project and"
            f" move {folder / STATE} away"
        )
        raise Conflict(message)
    if names and FILE not in names:
        message = f"{folder} is neither empty nor a project; give another folder"
        raise Conflict(message)


def _settings(archive: Archive, folder: Path, ledger: str | None) -> str:
    """The text of the settings as they will be."""
    file = folder / FILE
    with _explained(f"{file} can't be read"):
        content = file.read_bytes() if file.exists() else archive.read(FILE)
    text = content.decode(errors="replace")
    if ledger is None:
        return text
    line = f"ledger: {json.dumps(ledger)}"
    if _LEDGER_LINE.search(text):
        return _LEDGER_LINE.sub(lambda _: line, text, count=1)
    return f"{text.rstrip()}\n{line}\n"


def _check_places(project: Project, *, named: bool) -> None:
    """Refuse places that are in use, and a ledger elsewhere that nobody named."""
    if project.settings.ledger is not None:
        database = database_at(project.ledger_url)
        file = _sqlite_file(project)
        if not named and (file is None or not file.is_relative_to(project.root)):
            message = (
                f"the settings keep the ledger at {database.name}, which the machine that was"
                " backed up may be using; say with --ledger where this one's shall be, the URL of"
                " an empty database such as sqlite:///.shipworthy/ledger.db"
            )
            raise UsageError(message)
        if file is not None and file.exists():
            message = f"{file} is there already; name another place for the ledger with --ledger"
            raise Conflict(message)
    lake = project.lake.resolve()
    with _explained(f"{lake} can't be read"):
        if lake.exists() and not (lake.is_dir() and not any(lake.iterdir())):
            message = (
                f"the settings keep the lake at {lake}, which is not empty; put a {FILE} with"
                f" another lake.url into {project.root}, and restore again"
            )
            raise Conflict(message)


def _sqlite_file(project: Project) -> Path | None:
    scheme, _, path = project.ledger_url.partition(":///")
    return Path(unquote(path)).resolve() if scheme.startswith("sqlite") else None


def _bring_up_to_date(project: Project, state: Path, backup: str) -> None:
    """Upgrade the ledger, and let its log tell of this."""
    url = sqlite_url(state / LEDGER)
    migrate(url)
    with open_ledger(url) as ledger:
        session = Session(project, ledger, LocalBlobs(project.blobs), time.time)
        actor = session.actor().id
        with ledger.write() as tx:
            tx.audit.append(at=session.clock(), actor=actor, act="restore", subject=backup)


def _put_in_place(project: Project, state: Path, settings: str) -> None:
    """Give everything its name; the state's folder last, which makes it a project."""
    for private in (state / JOURNALS, state / SECRETS):
        private.mkdir(exist_ok=True)
        private.chmod(0o700)
    with _explained(f"{project.root} can't be written"):
        _place_ledger(project, state)
        _place_lake(project, state)
        _place_settings(project.root / FILE, state / FILE, settings)
        ignore_state(project.root)
        state.rename(project.state)


def _place_ledger(project: Project, state: Path) -> None:
    if project.settings.ledger is None:
        return
    file, url = _sqlite_file(project), project.ledger_url
    if file is not None and file.is_relative_to(project.state):
        if file == project.state / LEDGER:
            return
        url = sqlite_url(state / file.relative_to(project.state))
    copy_ledger(sqlite_url(state / LEDGER), url)
    for path in state.glob(f"{LEDGER}*"):  # with what SQLite keeps beside it
        path.unlink()


def _place_lake(project: Project, state: Path) -> None:
    lake, here = project.lake.resolve(), state / LAKE
    if lake == project.state / LAKE or not here.exists():
        return
    if lake.is_relative_to(project.state):
        there = state / lake.relative_to(project.state)
        there.parent.mkdir(parents=True, exist_ok=True)
        here.rename(there)
        return
    check_space(_existing(lake), sum(path.stat().st_size for path in here.rglob("*")))
    with workspace(lake.with_name(f".{lake.name}.restoring")) as beside:
        copied = beside / LAKE
        shutil.copytree(here, copied)
        # Outside of the project's folder nothing else keeps others out.
        copied.chmod(lake.stat().st_mode & 0o777 if lake.exists() else 0o700)
        copied.rename(lake)
    shutil.rmtree(here)


def _place_settings(file: Path, backed_up: Path, settings: str) -> None:
    present = file if file.exists() else backed_up
    if present != file or settings.encode() != file.read_bytes():
        replace_file(file, settings.encode(), present.stat().st_mode & 0o777)
    backed_up.unlink()


def _existing(path: Path) -> Path:
    return next(folder for folder in path.parents if folder.exists())


@contextmanager
def _explained(what: str) -> Generator[None]:
    try:
        yield
    except OSError as error:
        message = f"{what} ({error.strerror or error}); check the path and the permissions"
        raise Unavailable(message) from error
