"""What doctor finds: each fault is a real one, on the disk or among processes."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest
from tests.app.conftest import Town, found, wait_for

from shipworthy.app.children import ChildState, Processes, processes_file
from shipworthy.app.doctor import EXAMINATIONS, Case, Result, case_of, examine, exit_code
from shipworthy.app.doctor.installation import compare, compare_lock
from shipworthy.app.doctor.machine import Machine
from shipworthy.app.session import open_session
from shipworthy.app.status import LOCK
from shipworthy.app.supervisor import only_one
from shipworthy.domain.plan import Snapshot, encode_snapshot
from shipworthy.domain.records import FeedbackRecord
from shipworthy.settings import load_project
from shipworthy.stores.files import workspace
from shipworthy.stores.journal import JournalWriter
from shipworthy.stores.lake.state import Condition

pytestmark = [pytest.mark.timeout(300)]

MACHINE = {"disk space", "memory", "open files", "packages"}
"""What may be wrong with the machine that runs the tests."""


def look(root: Path, name: str, **changes: Any) -> list[Result]:
    case = case_of(root)
    for key, value in changes.items():
        setattr(case, key, value)
    return list(EXAMINATIONS[name](case))


def problems(results: list[Result]) -> list[Result]:
    return [result for result in results if result.verdict != "pass"]


def the_problem(results: list[Result]) -> Result:
    wrong = problems(results)
    assert len(wrong) == 1, wrong
    assert wrong[0].cure
    return wrong[0]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return found(tmp_path / "project").root


@contextmanager
def held(root: Path, *, since: float = 3600.0) -> Generator[None]:
    """The project as an `up` that began long ago holds it."""
    with only_one(load_project(root)):
        then = time.time() - since
        os.utime(root / ".shipworthy" / LOCK, (then, then))
        yield


def publish(root: Path, **changes: Any) -> Path:
    folder = root / ".shipworthy" / "snapshots"
    folder.mkdir(exist_ok=True)
    file = folder / f"{1:020d}"
    fields: dict[str, Any] = {"written": time.time(), "plans": {}, "keys": {}, "fence": 1}
    file.write_bytes(encode_snapshot(Snapshot(**(fields | changes))))
    return file


def write_journal(root: Path, count: int = 3, **changes: Any) -> Path:
    folder = root / ".shipworthy" / "journals"
    with closing(JournalWriter(folder, "w", **({"max_bytes": 1 << 30} | changes))) as writer:
        for number in range(count):
            writer.append(
                FeedbackRecord(
                    id=f"fb_{number}",
                    at=time.time(),
                    inference="inf",
                    key="k",
                    kind="rating",
                    name="stars",
                    value=5,
                    unit=None,
                    trusted=False,
                    assigned="stable",
                    asked_at=time.time(),
                )
            )
    return max(folder.glob("*.journal"))


# --- nothing is wrong -----------------------------------------------------------------------------


def test_a_fresh_project_is_well(root: Path) -> None:
    results = examine(case_of(root))
    assert [one for one in problems(results) if one.name not in MACHINE] == []
    assert {"settings", "owner", "ledger", "privacy", "orphans"} <= {one.name for one in results}


def test_a_running_project_is_well(shared: Town) -> None:
    wait_for(lambda: problems(examine_but_machine(shared.root)) == [])
    names = {result.name for result in examine_but_machine(shared.root)}
    assert {"gateway", "keeper", "processes", "snapshot", "replicas", "dropped records"} <= names
    done = shared.run("doctor", "--json")
    assert done.code == 0, done.output
    assert {one["verdict"] for one in json.loads(done.stdout)} <= {"pass", "warn"}


def examine_but_machine(root: Path) -> list[Result]:
    return [result for result in examine(case_of(root)) if result.name not in MACHINE]


def test_it_changes_nothing(root: Path) -> None:
    def everything() -> dict[str, Any]:
        with closing(sqlite3.connect(root / ".shipworthy" / "ledger.db")) as connection:
            rows = list(connection.iterdump())
        files = {str(path): path.is_file() and path.read_bytes() for path in root.rglob("*")}
        kept = {path: content for path, content in files.items() if "ledger.db" not in path}
        return kept | {"rows": rows}

    write_journal(root)
    before = everything()
    examine(case_of(root, deep=True))
    assert everything() == before


def test_all_is_said_to_be_well_in_a_table(town: Town) -> None:
    done = town.run("doctor")
    assert done.code == 0, done.output
    assert "settings" in done.stdout
    assert "pass" in done.stdout


def test_without_a_project_it_says_so(tmp_path: Path) -> None:
    done = Town(tmp_path).run("doctor")
    assert done.code == 2
    assert "no shipworthy.yaml" in done.stderr


# --- files ----------------------------------------------------------------------------------------


def test_unknown_settings_are_told_and_the_others_still_used(root: Path) -> None:
    (root / "shipworthy.yaml").write_text("preset: prototype\ngatway: {}\ngateway: {port: 4711}\n")
    case = case_of(root)
    assert case.project.settings.gateway.port == 4711
    wrong = the_problem(list(EXAMINATIONS["settings"](case)))
    assert "gatway" in wrong.seen
    assert exit_code(examine(case)) == 1


def test_settings_that_everybody_may_change_are_told(root: Path) -> None:
    (root / "shipworthy.yaml").chmod(0o666)
    assert "chmod o-w" in the_problem(look(root, "settings")).cure


def test_a_password_in_the_settings_is_told_without_showing_it(root: Path) -> None:
    (root / "shipworthy.yaml").write_text("ledger: postgresql://me:hunter2@db.invalid/ledger\n")
    wrong = the_problem(look(root, "settings"))
    assert "PGPASSWORD" in wrong.cure
    assert "hunter2" not in str(examine(case_of(root)))


def test_secrets_that_others_can_read_are_told(root: Path) -> None:
    (root / ".shipworthy" / "secrets" / "signing").chmod(0o644)
    wrong = the_problem(look(root, "privacy"))
    assert "secrets/signing" in wrong.seen
    subprocess.run(wrong.cure, shell=True, check=True)
    assert problems(look(root, "privacy")) == []


def test_a_ledger_that_others_can_read_is_told(root: Path) -> None:
    (root / ".shipworthy" / "ledger.db").chmod(0o640)
    assert "ledger.db" in the_problem(look(root, "privacy")).seen


def test_a_missing_or_empty_secret_is_told(root: Path) -> None:
    secrets = root / ".shipworthy" / "secrets"
    (secrets / "signing").unlink()
    (secrets / "pseudonyms").write_bytes(b"")
    wrong = problems(look(root, "state folder"))
    assert ["missing" in wrong[0].seen, "no secret" in wrong[1].seen] == [True, True]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
def test_files_of_two_accounts_are_told(root: Path) -> None:
    os.chown(root / ".shipworthy" / "ledger.db", 65534, 65534)
    wrong = the_problem(look(root, "owner"))
    assert "ledger.db" in wrong.seen
    subprocess.run(wrong.cure.split(",")[0], shell=True, check=True)
    assert problems(look(root, "owner")) == []


@contextmanager
def another_account() -> Generator[None]:
    os.setegid(65534)
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)
        os.setegid(0)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")
def test_another_account_is_told_whose_project_it_is() -> None:
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        root = found(Path(folder) / "project").root
        examine(case_of(root))  # modules that are imported late may not be readable for others
        with another_account():
            results = examine(case_of(root))
        assert exit_code(results) == 1
        assert "run shipworthy as root" in results[0].cure
        assert any("this account may not look at" in one.seen for one in results)
        assert not [one for one in results if "could not be looked at" in one.seen], results
        (root / "shipworthy.yaml").chmod(0o600)
        with another_account():
            results = examine(case_of(root))
        assert "shipworthy.yaml can't be read (Permission denied)" in str(results)
        root.chmod(0o700)
        with another_account():
            done = Town(Path(folder)).run("doctor")
        assert done.code in {2, 3}


def test_a_missing_state_folder_is_told(root: Path) -> None:
    shutil.rmtree(root / ".shipworthy")
    assert "restored by half" in the_problem(look(root, "state folder")).seen
    assert "Traceback" not in str(examine(case_of(root)))


def test_a_folder_that_is_a_file_is_told(root: Path) -> None:
    journals = root / ".shipworthy" / "journals"
    journals.rmdir()
    journals.write_text("hello")
    assert "is no folder" in the_problem(look(root, "state folder")).seen


@contextmanager
def small_disk(folder: Path, size: str) -> Generator[None]:
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size},nr_inodes=2000,mode=700", "tmpfs"]
    if subprocess.run([*mount, str(folder)], check=False, capture_output=True).returncode:
        pytest.skip("this account can't mount a disk")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_full_disk_is_told(root: Path) -> None:
    state = root / ".shipworthy"
    away = root / "away"
    state.rename(away)
    state.mkdir(mode=0o700)
    with small_disk(state, "4m"):
        shutil.copytree(away, state, dirs_exist_ok=True)
        wrong = the_problem(look(root, "disk space"))
        assert "are free" in wrong.seen
        with suppress_full(state / "ballast") as ballast:
            ballast.write(b"x" * 8_000_000)
        wrong = problems(examine(case_of(root)))
        assert "writable" in {one.name for one in wrong}
        assert "No space left" in str(wrong)


@contextmanager
def suppress_full(file: Path) -> Generator[Any]:
    with file.open("wb", buffering=0) as handle:
        yield handle


def test_a_disk_that_the_journals_will_fill_is_told(root: Path) -> None:
    settings = root / "shipworthy.yaml"
    settings.write_text(settings.read_text() + "journal: {max_bytes: 9000000000000000}\n")
    assert "journal.max_bytes" in the_problem(look(root, "disk space")).cure


def test_a_network_file_system_is_told(root: Path, tmp_path: Path) -> None:
    proc = tmp_path / "proc"
    (proc / "self").mkdir(parents=True)
    (proc / "self" / "mounts").write_text(f"/dev/a / ext4 rw 0 0\nserver:/x {root} nfs4 rw 0 0\n")
    wrong = the_problem(look(root, "file system", machine=Machine(proc)))
    assert "nfs4" in wrong.seen
    assert problems(look(root, "file system")) == []


def test_what_killed_processes_left_is_told(root: Path) -> None:
    left = root / ".shipworthy" / ".gateway.json.0a1b2c3d"
    left.write_bytes(b"{")
    assert problems(look(root, "leftovers")) == [], "it may be under way"
    os.utime(left, (1, 1))
    wrong = the_problem(look(root, "leftovers"))
    subprocess.run(wrong.cure, shell=True, check=True)
    assert problems(look(root, "leftovers")) == []


def test_what_a_killed_backup_left_is_told_and_one_under_way_is_not(root: Path) -> None:
    folder = root / ".shipworthy" / "backup"
    with workspace(folder):
        assert problems(look(root, "leftovers")) == []
    folder.mkdir()
    assert str(folder) in the_problem(look(root, "leftovers")).cure


# --- ledger ---------------------------------------------------------------------------------------


def in_ledger(root: Path, *statements: str) -> None:
    with closing(sqlite3.connect(root / ".shipworthy" / "ledger.db")) as connection:
        connection.execute("PRAGMA foreign_keys = OFF")
        for statement in statements:
            connection.execute(statement)
        connection.commit()


def test_a_lost_ledger_is_told(root: Path) -> None:
    publish(root)
    (root / ".shipworthy" / "ledger.db").unlink()
    assert "is gone" in the_problem(look(root, "ledger")).seen
    results = examine(case_of(root))
    assert "audit log" in next(one.seen for one in results if "without the ledger" in one.seen)
    assert exit_code(results) == 1


@pytest.mark.parametrize(
    ("version", "says"), [("0001", "shipworthy up"), ("9999", "upgrade Shipworthy")]
)
def test_a_ledger_of_another_version_is_told(root: Path, version: str, says: str) -> None:
    in_ledger(root, f"UPDATE alembic_version SET version_num = '{version}'")
    assert says in the_problem(look(root, "ledger")).cure


def test_whoever_is_sent_to_doctor_by_the_ledger_is_helped(town: Town) -> None:
    in_ledger(town.root, "DROP TABLE intents")
    sent = town.run("status")
    assert sent.code == 3
    assert "shipworthy doctor" in sent.stderr
    done = town.run("doctor")
    assert done.code == 1
    assert "its table intents is missing" in done.stdout
    assert "restore the ledger from a backup" in done.stdout


def test_a_damaged_ledger_is_told(root: Path) -> None:
    in_ledger(root, "PRAGMA wal_checkpoint(TRUNCATE)")
    file = root / ".shipworthy" / "ledger.db"
    content = bytearray(file.read_bytes())
    for page in range(4, len(content) // 4096):
        content[page * 4096 : page * 4096 + 64] = b"\xff" * 64
    file.write_bytes(content)
    assert "backup" in the_problem(look(root, "ledger")).cure


def test_a_locked_ledger_does_not_hold_it_up(root: Path) -> None:
    with closing(sqlite3.connect(root / ".shipworthy" / "ledger.db")) as connection:
        connection.execute("BEGIN EXCLUSIVE")
        begun = time.monotonic()
        examine(case_of(root))
        assert time.monotonic() - begun < 60


def test_the_driver_of_postgresql_and_a_server_that_is_away_are_told(root: Path) -> None:
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        port = nobody.getsockname()[1]
    (root / "shipworthy.yaml").write_text(f"ledger: postgresql://me@127.0.0.1:{port}/ledger\n")
    assert the_problem(look(root, "ledger")).verdict == "fail"


def test_a_ledger_on_postgresql_is_well(root: Path, databases: Any) -> None:
    (root / "shipworthy.yaml").write_text(f"ledger: {databases.make(migrated=True)}\n")
    results = look(root, "ledger")
    assert problems(results) == []
    assert {one.name for one in results} == {"ledger", "PostgreSQL"}
    ahead = the_problem(look(root, "ledger", clock=lambda: time.time() - 100))
    assert ahead.name == "clock"
    assert "100 s ahead" in ahead.seen


def test_an_altered_audit_log_is_told(root: Path) -> None:
    in_ledger(
        root,
        *(
            f"DROP TRIGGER {name}"
            for (name,) in sqlite3.connect(root / ".shipworthy" / "ledger.db").execute(
                "SELECT name FROM sqlite_master WHERE type = 'trigger'"
            )
        ),
        "UPDATE audit_entries SET subject = 'another' WHERE sequence = 1",
    )
    assert "does not hold" in the_problem(look(root, "audit log")).seen


# --- clocks and terms -----------------------------------------------------------------------------


def test_acts_and_files_from_the_future_are_told(root: Path) -> None:
    session = open_session(root)
    later = time.time() + 1_000
    with session.ledger.write() as tx:
        actor = tx.principals.ensure("somebody").id
        tx.audit.append(at=later, actor=actor, act="look", subject="x")
    assert "last act" in the_problem(look(root, "clock")).seen
    os.utime(root / ".shipworthy" / "ledger.db", (later, later))
    assert "files of the state" in the_problem(look(root, "clock")).seen


def test_a_clock_that_jumps_meanwhile_is_told(root: Path) -> None:
    times = iter([0.0])
    case = case_of(root, clock=lambda: time.time() + 60 * (next(times, None) is None))
    assert any("jumped by +60 s" in one.seen for one in examine(case))


def test_a_term_that_nobody_holds_is_told(root: Path) -> None:
    assert look(root, "keeper") == [], "nothing runs"
    with held(root, since=1.0):
        assert problems(look(root, "keeper")) == [], "it is starting"
    with held(root):
        assert "nobody decides" in the_problem(look(root, "keeper")).seen


def test_a_missing_stale_torn_or_future_snapshot_is_told(root: Path) -> None:
    assert look(root, "snapshot") == []
    with held(root):
        assert "no snapshot" in the_problem(look(root, "snapshot")).seen
        publish(root)
        assert problems(look(root, "snapshot")) == []
        publish(root, written=time.time() - 1_000)
        assert "for 1000 s" in the_problem(look(root, "snapshot")).seen
        publish(root, written=time.time() + 1_000)
        assert "from now" in the_problem(look(root, "snapshot")).seen
        file = publish(root)
        file.write_bytes(file.read_bytes()[:-3])
        assert "does not obey" in the_problem(look(root, "snapshot")).seen
    publish(root, written=time.time() - 1_000)
    assert problems(look(root, "snapshot")) == [], "nobody writes it while nothing runs"


# --- processes ------------------------------------------------------------------------------------


def test_who_has_the_port_is_told(root: Path) -> None:
    listener = (
        "import socket; s = socket.create_server(('127.0.0.1', 0));"
        " print(s.getsockname()[1], flush=True); input()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", listener], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        assert other.stdout
        port = int(other.stdout.readline())
        (root / "shipworthy.yaml").write_text(f"gateway: {{port: {port}}}\n")
        wrong = the_problem(look(root, "port"))
        assert f"process {other.pid}" in wrong.seen
        assert "gateway.port" in wrong.cure
        other.communicate(b"\n")
    assert problems(look(root, "port")) == []


def test_a_host_that_is_not_this_machine_is_told(root: Path) -> None:
    (root / "shipworthy.yaml").write_text("gateway: {host: 192.0.2.1}\n")
    assert "gateway.host" in the_problem(look(root, "port")).cure


def test_a_gateway_that_does_not_listen_is_told(root: Path) -> None:
    with held(root):
        assert "does not listen" in the_problem(look(root, "gateway")).seen
        with socket.socket() as nobody:
            nobody.bind(("127.0.0.1", 0))
            address = {"host": "127.0.0.1", "port": nobody.getsockname()[1], "pid": 2**22 + 1}
        (root / ".shipworthy" / "gateway.json").write_text(json.dumps(address))
        assert "does not answer" in the_problem(look(root, "gateway")).seen


def test_stopped_processes_are_told_and_continued_by_the_cure(town: Town) -> None:
    town.start()
    for pid in wait_for(lambda: len(found := town.workers()) == 2 and found).values():
        os.kill(pid, signal.SIGSTOP)
    wrong = wait_for(lambda: problems(look(town.root, "gateway")))[0]
    assert "is stopped" in wrong.seen
    subprocess.run(wrong.cure, shell=True, check=True)
    wait_for(lambda: problems(look(town.root, "gateway")) == [])


def test_a_child_that_dies_again_and_again_and_another_version_are_told(root: Path) -> None:
    def tell(**changes: Any) -> None:
        child = ChildState(name="keeper", pid=None, since=0.0, log="/logs/keeper.log")
        child = msgspec.structs.replace(child, **changes)
        state = Processes(pid=1, since=0.0, children=(child,))
        if "version" in told:
            state = msgspec.structs.replace(state, version="0.0.9")
        processes_file(load_project(root)).write_bytes(msgspec.json.encode(state))

    told: set[str] = set()
    with held(root):
        tell(restarts=1, problem="it ended", problem_at=time.time())
        assert problems(look(root, "processes")) == []
        tell(restarts=9, problem="it ended", problem_at=time.time() - 3_600)
        assert problems(look(root, "processes")) == []
        tell(restarts=9, problem="keeper ended (exit code 3)", problem_at=time.time())
        wrong = the_problem(look(root, "processes"))
        assert "restarted 9 times" in wrong.seen
        told.add("version")
        tell()
        assert "version 0.0.9" in the_problem(look(root, "processes")).seen


def test_orphans_are_told_and_ended_by_the_cure(root: Path) -> None:
    words = [sys.executable, "-c", "input()", "shipworthy.app.keeping", str(root)]
    with subprocess.Popen(words, stdin=subprocess.PIPE) as orphan:
        wrong = the_problem(look(root, "orphans"))
        assert f"process {orphan.pid}" in wrong.seen
        subprocess.run(wrong.cure, shell=True, check=True)
        assert orphan.wait(30)
    assert problems(look(root, "orphans")) == []


def test_a_stopped_holder_of_the_lakes_lock_is_told(root: Path) -> None:
    lock = load_project(root).lake_lock
    holding = (
        f"import fcntl; f = open({str(lock)!r}, 'ab'); fcntl.flock(f, fcntl.LOCK_EX);"
        " print(flush=True); input()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", holding], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as holder:
        assert holder.stdout
        holder.stdout.readline()
        assert the_problem(look(root, "locks")).verdict == "error", "somebody may be at work"
        holder.send_signal(signal.SIGSTOP)
        wrong = wait_for(lambda: [r for r in look(root, "locks") if "stopped" in r.seen])[0]
        assert wrong.verdict == "fail"
        holder.send_signal(signal.SIGCONT)
        holder.communicate(b"\n")
    assert problems(look(root, "locks")) == []


def test_little_memory_and_few_open_files_are_told(root: Path, tmp_path: Path) -> None:
    proc = tmp_path / "proc"
    (proc / str(os.getpid())).mkdir(parents=True)
    (proc / str(os.getpid()) / "limits").write_text("Max open files  256  512  files\n")
    (proc / "meminfo").write_text("MemTotal: 1000000 kB\nMemAvailable: 9000 kB\n")
    wrong = problems(look(root, "limits", machine=Machine(proc)))
    assert ["256" in wrong[0].seen, "9 MB" in wrong[1].seen] == [True, True]


def test_a_failed_replica_is_told_with_its_reason(town: Town) -> None:
    town.start()
    town.to_production("first", 1)
    wait_for(lambda: town.infer().status == 200)
    for blob in (town.root / ".shipworthy" / "blobs" / "sha256").rglob("*"):
        if blob.is_file() and blob.stat().st_size > 10_000:
            blob.unlink()
    for wrong in problems(look(town.root, "blobs")):
        assert "a file of digits@1 is missing" in wrong.seen
    town.stop()
    town.start()
    failed = wait_for(lambda: problems(look(town.root, "replicas")))[0]
    assert "digits@1 in " in failed.seen
    assert "failed: " in failed.seen


# --- records --------------------------------------------------------------------------------------


def test_journals_that_are_full_or_not_read_are_told(root: Path) -> None:
    assert problems(look(root, "journals")) == []
    file = write_journal(root)
    with held(root):
        assert problems(look(root, "journals")) == [], "just written"
        old = file.with_name(f"{time.time_ns() - 10**12:020d}-w.journal")
        file.rename(old)
        unread = the_problem(look(root, "journals"))
        assert "the oldest for 1000 s" in unread.seen
    settings = root / "shipworthy.yaml"
    settings.write_text(settings.read_text() + "journal: {max_bytes: 1048576}\n")
    with old.open("ab") as handle:
        handle.truncate(1_048_000)
    assert "are being dropped" in the_problem(look(root, "journals")).seen


def test_damaged_and_newer_journals_are_told(root: Path) -> None:
    file = write_journal(root, 50)
    assert problems(look(root, "journal records")) == []
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 0xFF
    file.write_bytes(content)
    assert "corrupt" in the_problem(look(root, "journal records")).seen
    import struct
    import zlib

    header = content[:18]
    header[8:10] = struct.pack("<H", 99)
    header += struct.pack("<I", zlib.crc32(bytes(header)))
    content[:44] = bytes(header) * 2
    file.write_bytes(content)
    wrong = the_problem(look(root, "journal records"))
    assert "upgrade" in wrong.cure


def condition(root: Path, **changes: Any) -> None:
    now = time.time()
    fields: dict[str, Any] = {"at": now, "complete": now}
    state = Condition(**(fields | changes))
    load_project(root).lake_condition.write_bytes(msgspec.json.encode(state))


def test_a_lake_that_lags_or_waits_is_told(root: Path) -> None:
    with held(root):
        condition(root)
        assert problems(look(root, "lake")) == []
        condition(root, complete=time.time() - 100)
        assert "100 s behind" in the_problem(look(root, "lake")).seen
        condition(root, problem="the disk is full; make room")
        assert the_problem(look(root, "lake")).cure == "make room"
    project = load_project(root)
    project.lake_writer.parent.mkdir(exist_ok=True)
    project.lake_writer.write_bytes(b"{")
    assert "damaged" in the_problem(look(root, "lake")).seen


def test_a_table_that_can_not_be_read_or_has_lost_files_is_told(root: Path) -> None:
    import arro3.core
    from deltalake import write_deltalake

    table = load_project(root).lake / "inferences"
    write_deltalake(
        table,
        arro3.core.Table.from_pydict({"id": arro3.core.Array(["a"], arro3.core.DataType.utf8())}),
    )
    assert problems(look(root, "lake tables")) == []
    next(table.glob("*.parquet")).unlink()
    assert "are gone" in the_problem(look(root, "lake tables")).seen
    for log in (table / "_delta_log").glob("*.json"):
        log.write_bytes(b"nonsense")
    assert "can't be read" in the_problem(look(root, "lake tables")).seen


def test_stored_files_are_looked_at_by_size_and_with_deep_byte_by_byte(town: Town) -> None:
    town.start()
    town.to_production("first", 1)
    blobs = [path for path in (town.root / ".shipworthy/blobs/sha256").rglob("*") if path.is_file()]
    largest = max(blobs, key=lambda path: path.stat().st_size)
    largest.chmod(0o600)
    content = bytearray(largest.read_bytes())
    content[100] ^= 1
    largest.write_bytes(content)
    assert problems(look(town.root, "blobs")) == []
    assert "should be" in the_problem(look(town.root, "blobs", deep=True)).seen
    largest.write_bytes(content[:100])
    assert "instead of" in the_problem(look(town.root, "blobs")).seen


# --- installation ---------------------------------------------------------------------------------


def test_packages_that_are_missing_or_old_are_told() -> None:
    installed = {"numpy": "2.10.1", "duckdb": "1.4.0"}.get
    wanted = ["numpy>=2.2", "duckdb>=2.0", "uvloop>=0.21", "onnxruntime>=1.22; extra == 'onnx'"]
    wrong = the_problem(list(compare(wanted, installed)))
    assert "duckdb is 1.4.0" in wrong.seen
    assert "uvloop is missing" in wrong.seen
    assert "numpy" not in wrong.seen
    assert "onnxruntime" not in wrong.seen
    lock = "numpy==2.5.5 ; for another Python \\\n    --hash=x\nnumpy==2.10.1 ; x\nduckdb==2.0.0\n"
    assert "duckdb 1.4.0 (locked: 2.0.0)" in the_problem(list(compare_lock(lock, installed))).seen


# --- whatever is there ----------------------------------------------------------------------------


def empty(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
        path.mkdir()
    else:
        path.write_bytes(b"")


def swap(path: Path) -> None:
    """A folder for a file, a file for a folder."""
    if path.is_dir():
        shutil.rmtree(path)
        path.write_bytes(b"\x00\xff garbage")
    else:
        path.unlink()
        path.mkdir()


def garble(path: Path) -> None:
    if path.is_file():
        path.write_bytes(b"\x93NUMPY\x00{{{" * 300)


def dangle(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()
    path.symlink_to("/nowhere/at/all")


@pytest.mark.parametrize("spoil", [empty, swap, garble, dangle])
@pytest.mark.parametrize("running", [False, True])
def test_every_examination_survives_garbage(
    root: Path, spoil: Callable[[Path], None], running: bool
) -> None:
    state = root / ".shipworthy"
    write_journal(root)
    publish(root)
    condition(root)
    for name in ("gateway.json", "processes.json", "lake.lock"):
        (state / name).write_bytes(b"{}")
    (state / "blobs").mkdir(exist_ok=True)
    (state / "lake" / "inferences").mkdir(parents=True)
    (state / "lake" / "writer.json").write_bytes(b"{}")
    names = sorted(path.name for path in state.iterdir())

    def all_are_looked_at() -> None:
        results = examine(case_of(root))
        assert not [one for one in results if "could not be looked at" in one.seen], results

    for name in names:
        if name == LOCK:
            continue
        copy = root / "copy"
        (shutil.copytree if (state / name).is_dir() else shutil.copy2)(state / name, copy)
        spoil(state / name)
        if running:
            with held(root):
                all_are_looked_at()
        else:
            all_are_looked_at()
        path = state / name
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        copy.rename(path)
    for name in names:
        spoil(state / name)
    results = examine(case_of(root))
    assert problems(results)
    assert exit_code(results) in {0, 1, 3}


def test_an_examination_that_fails_stops_no_other(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def faulty(_case: Case) -> Iterator[Result]:
        yield Result(name="faulty", verdict="pass", seen="so far")  # type: ignore[arg-type]
        raise ZeroDivisionError("oh")

    before = len(examine(case_of(root)))
    monkeypatch.setitem(EXAMINATIONS, "settings", faulty)
    results = examine(case_of(root))
    assert len(results) >= before
    assert any("ZeroDivisionError: oh" in one.seen for one in results)
    assert exit_code([one for one in results if one.name not in MACHINE]) == 3
