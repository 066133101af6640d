"""The ledger and what hangs on it: versions, term, snapshot, clocks, stored files, audit log."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from pathlib import Path

from sqlalchemy import Connection, inspect, text

from shipworthy.app.doctor.results import (
    LEDGER_PATIENCE,
    Case,
    NeedsLedger,
    Result,
    bad,
    good,
    told,
    warn,
)
from shipworthy.app.health import LAPSE, STARTING
from shipworthy.app.place import elsewhere
from shipworthy.domain.audit import verify
from shipworthy.domain.lifecycle import manifest_of
from shipworthy.domain.manifest import PinnedFile
from shipworthy.domain.names import ReleaseReference, Stage
from shipworthy.domain.plan import Snapshot, decode_snapshot
from shipworthy.errors import ShipworthyError
from shipworthy.ports import Transaction
from shipworthy.stores.blobs import LocalBlobs
from shipworthy.stores.ledger import open_ledger
from shipworthy.stores.ledger.schema import metadata
from shipworthy.stores.snapshots import newest_snapshot

_AHEAD = 5.0
"""Seconds that a time may lie in the future: two clocks of good manners differ by less."""
_SILENT = 60.0
_FEW_ENTRIES = 5_000
_CHECKED_BYTES = 64 * 1024 * 1024
_LEAST_CONNECTIONS = 30
_UNSYNCHRONISED = 5


def ledger(case: Case) -> Iterator[Result]:
    """Whether the ledger opens, is of this version, whole, and has all its tables."""
    url = case.project.ledger_url
    file = case.project.state / "ledger.db"
    if case.project.settings.ledger is None and not file.exists():
        yield _no_ledger(case)
        return
    try:
        with open_ledger(url, timeout=LEDGER_PATIENCE) as opened, opened.reading() as connection:
            problems = list(_schema_problems(connection))
            if not problems and connection.dialect.name == "sqlite":
                problems = _damage(case, connection)
            yield from _server(case, connection)
    except ShipworthyError as error:
        yield told("ledger", error)
        return
    if problems:
        seen = f"the ledger opens, and {'; '.join(problems[:3])}"
        yield bad("ledger", seen, "stop 'shipworthy up' and restore the ledger from a backup")
    else:
        yield good("ledger", "the ledger opens, is of this version and has all its tables")


def _no_ledger(case: Case) -> Result:
    if _newest_snapshot(case) is None:
        seen = "there is no ledger yet"
        return warn("ledger", seen, "'shipworthy up' makes it; or restore it from a backup")
    seen = f"the ledger {case.project.state / 'ledger.db'} is gone, and with it every decision"
    return bad("ledger", seen, "put it back, or restore it from a backup")


def _schema_problems(connection: Connection) -> Iterator[str]:
    """Which tables and columns are missing; another program may have been at them."""
    found = inspect(connection)
    present = set(found.get_table_names())
    for table in metadata.sorted_tables:
        if table.name not in present:
            yield f"its table {table.name} is missing"
            continue
        columns = {column["name"] for column in found.get_columns(table.name)}
        for column in table.columns:
            if column.name not in columns:
                yield f"column {column.name} of its table {table.name} is missing"


def _damage(case: Case, connection: Connection) -> list[str]:
    """What SQLite finds damaged; in a large file only on request."""
    size = (case.project.state / "ledger.db").stat().st_size if _is_default(case) else 0
    if size > _CHECKED_BYTES and not case.deep:
        return []
    lines = connection.execute(text("PRAGMA quick_check(3)")).scalars().all()
    return [] if lines == ["ok"] else [f"it is damaged: {line}" for line in lines]


def _is_default(case: Case) -> bool:
    return case.project.settings.ledger is None


def _server(case: Case, connection: Connection) -> Iterator[Result]:
    """What only a database server has: a clock of its own, and a limit to connections."""
    if connection.dialect.name != "postgresql":
        return
    before = case.clock()
    theirs = float(
        connection.execute(text("SELECT extract(epoch FROM clock_timestamp())")).scalar_one()
    )
    apart = theirs - (before + case.clock()) / 2
    if abs(apart) > _AHEAD:
        side = "ahead of" if apart > 0 else "behind"
        seen = f"PostgreSQL's clock is {abs(apart):.0f} s {side} this machine's"
        yield bad("clock", seen, "let a time service (chrony) set the clocks of both machines")
    limit = int(connection.execute(text("SELECT current_setting('max_connections')")).scalar_one())
    if limit < _LEAST_CONNECTIONS:
        seen = f"PostgreSQL takes {limit} connections at most"
        yield warn("PostgreSQL", seen, "set max_connections to 100 in postgresql.conf")
    else:
        yield good("PostgreSQL", f"it answers and takes {limit} connections")


def term(case: Case) -> Iterator[Result]:
    """Whether somebody decides while `up` runs."""
    if not case.running:
        return
    now = case.clock()
    with case.ledger() as opened, opened.read() as tx:
        current = tx.terms.current()
    if problem := elsewhere(case.project, current, now):
        seen, _, cure = problem.partition("; ")
        yield bad("keeper", seen, cure)
    elif now - current.until <= LAPSE:
        yield good("keeper", f"{current.holder or 'the keeper'} holds term {current.number}")
    elif case.up_for < STARTING:
        yield good("keeper", "'shipworthy up' is starting")
    else:
        since = f", run out {now - current.until:.0f} s ago" if current.until else ""
        seen = f"nobody decides: no keeper holds the term ({current.number}{since})"
        yield bad("keeper", seen, f"see {case.project.logs / 'keeper.log'}")


def snapshot(case: Case) -> Iterator[Result]:
    """What the gateway obeys: is it there, whole, fresh, and not from the future."""
    file = _newest_snapshot(case)
    if file is None:
        if case.running and case.up_for > STARTING:
            seen = "there is no snapshot, so the gateway knows neither keys nor plans"
            yield bad("snapshot", seen, f"see {case.project.logs / 'keeper.log'}")
        return
    log = case.project.logs / "keeper.log"
    try:
        read = decode_snapshot(file.read_bytes())
    except ValueError as error:  # msgspec's errors are ValueErrors
        cure = "the keeper writes it anew when it begins: restart 'shipworthy up'"
        yield bad("snapshot", f"the gateway does not obey {file}: {error}", cure)
        return
    yield from _snapshot_times(read, case.clock(), running=case.running, log=str(log))


def _newest_snapshot(case: Case) -> Path | None:
    folder = case.project.snapshots
    return newest_snapshot(folder) if folder.is_dir() else None


def _snapshot_times(read: Snapshot, now: float, *, running: bool, log: str) -> Iterator[Result]:
    age = now - read.written
    late = [plan.name for plan in read.plans.values() if plan.lease and plan.lease < now]
    longest = max((plan.lease_seconds for plan in read.plans.values()), default=0.0)
    if age < -_AHEAD:
        seen = f"the snapshot was written {-age:.0f} s from now"
        yield bad("snapshot", seen, "set this machine's clock by a time service (chrony)")
    elif running and late:
        seen = f"the lease of {', '.join(late)} has run out: everybody is sent to stable"
        yield bad("snapshot", seen, f"see {log} for why no keeper renews it")
    elif running and age > max(_SILENT, longest):
        yield bad("snapshot", f"no keeper has written the snapshot for {age:.0f} s", f"see {log}")
    else:
        yield good("snapshot", f"it is whole and {max(0.0, age):.0f} s old")


def clock(case: Case) -> Iterator[Result]:
    """Whether this machine's clock can be believed: nothing may lie in the future."""
    now = case.clock()
    ahead: list[str] = []
    newest = _newest_time(case)
    if newest > now + _AHEAD:
        ahead.append(f"files of the state are {newest - now:.0f} s from now")
    try:
        with case.ledger() as opened, opened.reading() as connection:
            acted = _last_act(connection)
        if acted > now + _AHEAD:
            ahead.append(f"the last act in the audit log is {acted - now:.0f} s from now")
    except NeedsLedger:
        pass  # files tell without it
    if ahead:
        cure = "set the clock by a time service (chrony); until it has caught up, times look wrong"
        yield bad("clock", f"the clock was set back, or ran ahead: {' and '.join(ahead)}", cure)
    elif not _is_default(case) and not _synchronised():
        seen = "no time service keeps this clock, and the ledger's server has another one"
        yield warn("clock", seen, "run one, such as chrony")
    else:
        yield good("clock", "nothing lies in the future")


def _newest_time(case: Case) -> float:
    """The newest change of a file that only we write."""
    project = case.project
    newest = 0.0
    for folder in (project.state, project.journals, project.snapshots):
        if folder.is_dir():
            for path in folder.iterdir():
                try:
                    newest = max(newest, path.lstat().st_mtime)
                except FileNotFoundError:
                    continue
    return newest


def _last_act(connection: Connection) -> float:
    query = text("SELECT at FROM audit_entries ORDER BY sequence DESC LIMIT 1")
    return connection.execute(query).scalar() or 0.0


def _synchronised() -> bool:
    """Whether the kernel says that something keeps its clock; True where it can't be asked."""
    try:
        blank = ctypes.create_string_buffer(512)  # modes 0: only read
        return ctypes.CDLL(None).adjtimex(blank) != _UNSYNCHRONISED
    except (OSError, AttributeError):
        return True


def drift(case: Case, wall: float, monotonic: float) -> Iterator[Result]:
    """Whether the clock jumped while we looked; given what both clocks said at the beginning."""
    jump = (case.clock() - wall) - (case.monotonic() - monotonic)
    if abs(jump) > 1.0:
        seen = f"the clock jumped by {jump:+.0f} s while we looked"
        yield bad("clock", seen, "let a time service (chrony) slew it instead of setting it")


def audit(case: Case) -> Iterator[Result]:
    """Whether the log of acts holds; a long one only on request."""
    with case.ledger() as opened, opened.read() as tx:
        head = tx.audit.head()
        if head.sequence > _FEW_ENTRIES and not case.deep:
            yield good("audit log", f"{head.sequence:,} entries, not verified (--deep does)")
            return
        problems = verify(tx.audit.entries(), head=head)
    if problems:
        cure = "compare with an exported head ('shipworthy audit verify --head'), and a backup"
        yield bad("audit log", f"it does not hold: {'; '.join(problems[:3])}", cure)
    else:
        yield good("audit log", f"all {head.sequence:,} entries hold")


def blobs(case: Case) -> Iterator[Result]:
    """Whether what releases pin is stored: by size, or with `deep` every byte of it."""
    with case.ledger() as opened, opened.read() as tx:
        files = _pinned(tx, everything=case.deep)
    store = LocalBlobs(case.project.blobs)
    problems = list(_verify(case, store, files) if case.deep else _missing(case, files))
    yield from problems[:5]
    if len(problems) > 5:
        seen = f"{len(problems) - 5} more stored files are missing or altered"
        yield bad("blobs", seen, "restore the folder of blobs from a backup")
    if not problems:
        how = "verified" if case.deep else "there (--deep reads every byte)"
        yield good("blobs", f"{len(files):,} files of releases are {how}")


def _pinned(tx: Transaction, *, everything: bool) -> dict[str, tuple[PinnedFile, str]]:
    """Files by digest, each with a release that needs it: of all, or of those that serve."""
    releases = {release.digest: release for release in tx.releases.list()} if everything else {}
    for model in () if everything else tx.stages.models():
        for stage in Stage:
            for entry in tx.stages.history(model, stage)[:2]:  # and the one before: for a rollback
                found = tx.releases.find(ReleaseReference(model, digest=entry.release))
                if found is not None:
                    releases[found.digest] = found
    return {
        file.digest: (file, release.name)
        for release in releases.values()
        for file in manifest_of(release).stored_files()
    }


def _missing(case: Case, files: dict[str, tuple[PinnedFile, str]]) -> Iterator[Result]:
    for file, release in files.values():
        path = case.project.blobs / "sha256" / file.digest[7:9] / file.digest[7:]
        size = path.stat().st_size if path.is_file() else None
        if size != file.size:
            what = "is missing" if size is None else f"has {size:,} bytes instead of {file.size:,}"
            cure = f"restore {path} from a backup, or register the release from its files again"
            yield bad("blobs", f"a file of {release} {what}: {file.digest[:19]}…", cure)


def _verify(
    case: Case, store: LocalBlobs, files: dict[str, tuple[PinnedFile, str]]
) -> Iterator[Result]:
    total = sum(file.size for file, _ in files.values())
    with case.progress("verifying blobs", total) as advance:
        for file, release in files.values():
            try:
                store.verify(file, advance)
            except ShipworthyError as error:
                verdict = told(f"blobs ({release})", error)
                yield verdict
