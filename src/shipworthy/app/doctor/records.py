"""The records' way: written, read by the keeper, moved into the lake."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path

from shipworthy.app.doctor.results import Case, NeedsLedger, Result, bad, good, told, warn
from shipworthy.app.health import (
    LAG_LIMIT,
    RECENTLY,
    ask_gateway,
    counted,
    dropped_records,
    lake_lag,
    last_drop,
    megabytes,
)
from shipworthy.errors import IntegrityError, ShipworthyError, Unavailable
from shipworthy.stores.journal import JournalReader
from shipworthy.stores.lake.inventory import data_files
from shipworthy.stores.lake.schema import TABLES
from shipworthy.stores.lake.state import load_condition, load_place

_LOOK_SECONDS = 0.5
_BATCH = 2_000
_OLD = 60.0
_NEARLY_FULL = 0.8
_MANY_FILES = 5_000
_CURES = {
    "corrupt": "check the disk (dmesg); what stands around the damaged stretches is read",
    "unknown": "use the version of Shipworthy that wrote them, or a newer one",
    "version": "a newer Shipworthy wrote these segments: upgrade this one",
    "unreadable": "check the modes and the owner of the journals' files",
}


def journals(case: Case) -> Iterator[Result]:
    """How full the journals are, and how far their readers."""
    segments = _segments(case.project.journals)
    total, most = sum(segments.values()), case.project.settings.journal.max_bytes
    share = f"the journals take {megabytes(total)} of {megabytes(most)} (journal.max_bytes)"
    cure = "see 'keeper' and 'lake' here for who does not read; or raise journal.max_bytes"
    if total >= most * 0.98:
        yield bad("journals", f"{share}: records are being dropped", cure)
    elif total > most * _NEARLY_FULL:
        yield warn("journals", share, cure)
    else:
        yield good("journals", share)
    try:
        with case.ledger() as opened, opened.read() as tx:
            keeper = tx.cursors.load()
        yield from _backlog(case, "keeper's backlog", segments, keeper, "keeper.log")
    except NeedsLedger:
        pass  # which the ledger's own examination tells
    place = None
    with suppress(IntegrityError):  # which the lake's examination tells
        place = load_place(case.project.lake_writer)
    if place is not None:
        yield from _backlog(case, "lake's backlog", segments, place.end, "lake writer.log")


def _segments(folder: Path) -> dict[str, int]:
    """Sizes by name, oldest first."""
    found: dict[str, int] = {}
    if not folder.is_dir():  # which the state folder's examination tells
        return found
    for path in sorted(folder.iterdir()):
        if path.suffix == ".journal" and path.name[:20].isdigit() and path.is_file():
            try:
                found[path.name] = path.stat().st_size
            except FileNotFoundError:
                continue
    return found


def _backlog(
    case: Case, name: str, segments: Mapping[str, int], cursors: Mapping[str, int], log: str
) -> Iterator[Result]:
    """What one reader has before it. While nothing runs that is no fault: it is read later."""
    unread = {n: size - cursors.get(n, 0) for n, size in segments.items()}
    unread = {n: size for n, size in unread.items() if size > 0}
    if not unread:
        yield good(name, "all is read")
        return
    first = min(unread)
    touched = (case.project.journals / first).stat().st_mtime if cursors.get(first) else 0.0
    age = max(0.0, case.clock() - max(touched, int(first[:20]) / 1e9))
    seen = f"{megabytes(sum(unread.values()))} are unread, the oldest for {age:.0f} s"
    if case.running and age > _OLD:
        yield warn(name, seen, f"see {case.project.logs / log}")
    else:
        yield good(name, seen)


def readable(case: Case) -> Iterator[Result]:
    """Whether the journals' records can be read: for half a second, or with `deep` all of them."""
    segments = _segments(case.project.journals)
    total = sum(segments.values())
    skipped, done = _read(case, total)
    for reason, count in skipped.items():
        if reason in _CURES:
            seen = f"{count} stretches or segments of the journals can't be read: {reason}"
            yield bad("journal records", seen, _CURES[reason])
    if not any(reason in _CURES for reason in skipped):
        how = "" if done >= total else f", the first {megabytes(done)} (--deep reads all)"
        yield good("journal records", f"they can be read{how}")


def _read(case: Case, total: int) -> tuple[Counter[str], int]:
    """What was skipped, and the bytes looked at."""
    reader, cursors, done = JournalReader(case.project.journals), dict[str, int](), 0
    begun = case.monotonic()
    with case.progress("reading journals", total if case.deep else 0) as advance:
        while case.deep or case.monotonic() - begun < _LOOK_SECONDS:
            _, after = reader.read(cursors, _BATCH)
            behind = sum(after.values())
            if after == cursors:
                return reader.skipped, total
            advance(behind - done)
            cursors, done = after, behind
    return reader.skipped, done


def drops(case: Case) -> Iterator[Result]:
    """Whether the gateway that runs had to drop records."""
    if not case.running:
        return
    try:
        _, metrics = ask_gateway(case.project, "/metrics")
    except Unavailable:
        return  # the gateway's own examination says so
    counts = dropped_records(metrics)
    if counts:
        seen = f"the gateway has dropped {counted(counts)} since it began"
        reasons = " and ".join(_drop_cure(why) for why in counts)
        recent = case.clock() - last_drop(metrics) < RECENTLY
        yield (bad if recent else warn)("dropped records", seen, reasons)
    else:
        yield good("dropped records", "none since the gateway began")


def _drop_cure(why: str) -> str:
    return {
        "full": "see who does not read ('keeper', 'lake'), or raise journal.max_bytes",
        "disk": "make room on the disk and check its modes",
        "too large": "lower capture.max_bytes in the model's policy",
    }.get(why, "see logs/gateway.log")


def lake(case: Case) -> Iterator[Result]:
    """Whether the lake's writer keeps up, and its tables can be read."""
    condition = load_condition(case.project.lake_condition)
    if case.project.lake_condition.exists() and condition is None:
        cure = f"remove {case.project.lake_condition}: the writer makes it anew"
        yield bad("lake", "the writer's condition can't be read", cure)
    log = case.project.logs / "lake writer.log"
    lag = lake_lag(case.project, case.clock())
    if condition is not None and case.running and condition.problem:
        seen, _, cure = condition.problem.rpartition("; ")
        yield bad("lake", f"its writer waits: {seen or cure}", cure if seen else f"see {log}")
    elif lag is not None and case.running and lag > LAG_LIMIT:
        yield bad("lake", f"the lake is {lag:.0f} s behind", f"see {log}")
    elif lag is not None and case.running:
        yield good("lake", f"the lake is {max(0.0, lag):.0f} s behind")
    if condition is not None and condition.skipped:
        seen = f"the lake's writer skipped {counted(condition.skipped)}"
        yield warn("lake", seen, "see 'journal records' here")
    try:
        load_place(case.project.lake_writer)
    except IntegrityError as error:
        yield told("lake", error)


def tables(case: Case) -> Iterator[Result]:
    """Whether the lake's tables open, and how many files they have."""
    folder = case.project.lake
    present = [table.name for table in TABLES if (folder / table.name).exists()]
    if not present:
        return
    trouble = False
    for name in present:
        restore = f"stop 'shipworthy up' and restore {folder / name} from a backup"
        try:
            files = data_files(folder / name)
            lost = [path for path in files if not path.is_file()]
        except ShipworthyError as error:
            trouble = True
            seen, _, _ = str(error).rpartition("; ")
            yield bad("lake tables", f"the table {name}: {seen}", restore)
            continue
        if lost:
            trouble = True
            seen = f"{len(lost)} files of the table {name} are gone, such as {lost[0].name}"
            yield bad("lake tables", seen, restore)
        if len(files) > _MANY_FILES:
            trouble = True
            seen = f"the table {name} has {len(files):,} files, which makes queries slow"
            cure = f"let the lake's writer compact it: see {case.project.logs / 'lake writer.log'}"
            yield warn("lake tables", seen, cure)
    if not trouble:
        yield good("lake tables", f"{', '.join(present)} can be read")
