"""Backups of a project: taken at one point while it runs, and restored all or not at all."""

from __future__ import annotations

import hashlib
import io
import json
import os
import resource
import signal
import subprocess
import sys
import tarfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import duckdb
import msgspec
import pytest
from deltalake import DeltaTable
from postgres import Databases
from tests.app.conftest import Town, wait_for

from shipworthy.app import backing_up
from shipworthy.app.backing_up import Backup, create_backup, verify_backup
from shipworthy.app.founding import make_project
from shipworthy.app.lake_writing import make_writer
from shipworthy.app.restoring import restore_backup
from shipworthy.app.session import Session, open_session
from shipworthy.domain.audit import verify
from shipworthy.domain.records import FeedbackRecord, InferenceRecord
from shipworthy.errors import Conflict, IntegrityError, LedgerUnavailable, Unavailable, UsageError
from shipworthy.settings import load_project
from shipworthy.stores.archive import MANIFEST, Contents, Pinned
from shipworthy.stores.files import locked, replace_file, workspace
from shipworthy.stores.journal import JournalWriter
from shipworthy.stores.lake.tables import LakeTable
from shipworthy.stores.ledger import SqlLedger, copy_ledger, ledger, migrate, open_ledger


@contextmanager
def silent(_: int) -> Generator[Callable[[int], None]]:
    yield lambda _: None


def inference(number: int) -> InferenceRecord:
    return msgspec.convert(
        {
            "type": "inference",
            "id": f"i{number}",
            "at": time.time(),
            "plan": "digits",
            "model": "digits",
            "revision": 1,
            "key": "k",
            "assigned": "stable",
            "probability": 1.0,
            "outcome": "success",
            "status": 200,
            "release": "digits@1",
        },
        InferenceRecord,
    )


def feedback(number: int) -> FeedbackRecord:
    return FeedbackRecord(
        id=f"f{number}",
        at=time.time(),
        inference=f"i{number}",
        key="k",
        kind="rating",
        name="stars",
        value=4,
    )


def catch_up(root: Path) -> None:
    """Let the lake's writer move all that the journals have."""
    writer = make_writer(open_session(root))
    while writer.cycle():
        pass


def in_lake(root: Path, table: str = "inferences") -> Counter[str]:
    """How often each id is there."""
    files = DeltaTable(load_project(root).lake / table).file_uris()
    if not files:
        return Counter()
    with duckdb.connect() as database:
        found = database.execute("SELECT id FROM read_parquet(?)", [files]).fetchall()
    return Counter(row[0] for row in found)


@contextmanager
def over_and_over(act: Callable[[], None]) -> Generator[None]:
    """Do something in a thread until the block ends; what goes wrong there fails the test."""
    stop = threading.Event()

    def run() -> None:
        while not stop.is_set():
            act()

    with ThreadPoolExecutor(1) as threads:
        running = threads.submit(run)
        try:
            yield
        finally:
            stop.set()
        running.result()


class Machine:
    """A project that is not running, with a worker that writes to its journal."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.session: Session = make_project(root, preset="prototype", solo=True)
        self.worker = self.new_worker()
        self.blob = self.session.blobs.put_bytes(b"model" * 1_000, "model.skops")

    def new_worker(self) -> JournalWriter:
        return JournalWriter(self.session.project.journals, "w0", 10**9, segment_bytes=4_000)

    def ask(self, *numbers: int) -> None:
        for number in numbers:
            assert self.worker.append(inference(number))
            assert self.worker.append(feedback(number))

    def back_up(self, name: str = "backup.tar") -> Path:
        create_backup(self.session, self.root.parent / name, silent)
        return self.root.parent / name

    def close(self) -> None:
        """Leave no connection open; servers' are warned of."""
        assert isinstance(self.session.ledger, SqlLedger)
        self.session.ledger.close()

    def configure(self, text: str) -> None:
        self.close()
        with (self.root / "shipworthy.yaml").open("a") as file:
            file.write(text)
        self.session = open_session(self.root)


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path / "old")


@pytest.fixture
def new(tmp_path: Path) -> Path:
    return tmp_path / "new"


def restore(file: Path, folder: Path, **options: Any) -> Backup:
    return restore_backup(file, folder, silent, **options)


def tree(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


# --- what is moved -----------------------------------------------------------------------------


def test_a_whole_project_is_moved(machine: Machine, new: Path) -> None:
    machine.ask(*range(40))
    catch_up(machine.root)
    machine.ask(*range(40, 60))
    restored = restore(machine.back_up(), new)

    old_state, state = machine.root / ".shipworthy", new / ".shipworthy"
    assert tree(state / "secrets") == tree(old_state / "secrets")
    assert tree(state / "blobs") == tree(old_state / "blobs")
    assert (new / "shipworthy.yaml").read_bytes() == (machine.root / "shipworthy.yaml").read_bytes()
    assert ".shipworthy/" in (new / ".gitignore").read_text()
    assert state.stat().st_mode & 0o777 == 0o700
    assert (state / "secrets" / "signing").stat().st_mode & 0o777 == 0o600
    assert (state / "ledger.db").stat().st_mode & 0o777 == 0o600
    assert not {p.name for p in state.iterdir()} & {"backup", "snapshots", "lake.lock", "logs"}
    assert sorted(p.name for p in new.iterdir()) == [".gitignore", ".shipworthy", "shipworthy.yaml"]

    catch_up(new)
    everything = Counter(f"i{number}" for number in range(60))
    assert in_lake(new) == everything
    assert in_lake(new, "feedback").total() == 60
    with open_session(new).ledger.read() as tx:
        entries = list(tx.audit.entries())
        assert not verify(entries, head=tx.audit.head(), exported=restored.audit)
    assert [entry.act for entry in entries[-2:]] == ["backup", "restore"]
    assert {entry.subject for entry in entries[-2:]} == {restored.id}


def test_the_first_backup_of_a_new_project_can_be_restored(machine: Machine, new: Path) -> None:
    restore(machine.back_up(), new)
    catch_up(new)
    assert in_lake(new).total() == 0


def test_a_writer_killed_between_two_tables_is_moved_with_its_batch(
    machine: Machine, new: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine.ask(*range(30))
    written = []
    append = LakeTable.append

    def die_at_the_second(self: LakeTable, *args: Any) -> None:
        written.append(self)
        if len(written) == 2:
            message = "killed"
            raise KeyboardInterrupt(message)
        append(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(LakeTable, "append", die_at_the_second)
        with pytest.raises(KeyboardInterrupt):
            catch_up(machine.root)
    machine.ask(*range(30, 40))
    restore(machine.back_up(), new)
    for root in (new, machine.root):
        catch_up(root)
        assert in_lake(root) == Counter(f"i{number}" for number in range(40))
        assert in_lake(root, "feedback") == Counter(f"f{number}" for number in range(40))


def test_backups_under_load_hold_what_was_acknowledged_before_they_began_once(
    machine: Machine, new: Path
) -> None:
    """A worker writes and the lake's writer moves and deletes, all the time."""
    acknowledged, taken = [0], []
    writer = make_writer(open_session(machine.root))

    def work() -> None:
        machine.ask(acknowledged[0])
        acknowledged[0] += 1
        time.sleep(0.001)

    def move() -> None:
        writer.cycle()
        time.sleep(0.05)

    with over_and_over(work), over_and_over(move):
        for number in range(4):
            wait_for(lambda least=60 * (number + 1): acknowledged[0] > least)
            before = acknowledged[0]
            taken.append((before, machine.back_up(f"{number}.tar")))
    for before, file in taken:
        root = new / file.stem
        restore(file, root)
        catch_up(root)
        found = in_lake(root)
        assert set(found.values()) == {1}
        # What came while it was taken may be in, from the front and without a hole.
        assert set(found) == {f"i{number}" for number in range(len(found))}
        assert before <= len(found) <= acknowledged[0]
        assert 0 <= len(found) - in_lake(root, "feedback").total() <= 1


def test_what_the_lake_no_longer_holds_is_left_out(machine: Machine, new: Path) -> None:
    machine.ask(*range(10))
    catch_up(machine.root)
    orphan = machine.root / ".shipworthy" / "lake" / "inferences" / "orphan.parquet"
    orphan.write_bytes(b"never committed")
    restore(machine.back_up(), new)
    assert not list(new.rglob("orphan.parquet"))
    assert not list(new.rglob("lake-writer-condition*"))


def test_where_files_cannot_be_linked_they_are_copied(
    machine: Machine, new: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine.ask(*range(30))
    catch_up(machine.root)
    machine.ask(*range(30, 50))

    def refuse(*_: object) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    restore(machine.back_up(), new)
    catch_up(new)
    assert in_lake(new) == Counter(f"i{number}" for number in range(50))


def test_the_ledger_of_an_earlier_version_is_upgraded(
    machine: Machine, new: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = machine.back_up()
    earlier = new.parent / "earlier.db"
    with monkeypatch.context() as patch:
        patch.setattr(ledger, "REVISIONS", ("0001",))
        migrate(f"sqlite:///{earlier}")
    assert replaced(file, "ledger.db", earlier.read_bytes(), ledger="0001")
    restore(file, new)
    with open_session(new).ledger.read() as tx:
        assert [entry.act for entry in tx.audit.entries()] == ["restore"]


def replaced(file: Path, name: str, content: bytes, **facts: Any) -> bool:
    """Put other content into an archive, with a manifest that fits."""
    with tarfile.open(file) as tar:
        found = {each.name: (each, (tar.extractfile(each) or io.BytesIO()).read()) for each in tar}
    contents = msgspec.json.decode(found[MANIFEST][1], type=Contents)
    pinned = Pinned(len(content), f"sha256:{hashlib.sha256(content).hexdigest()}")
    new = msgspec.structs.replace(contents, files=contents.files | {name: pinned}, **facts)
    manifest = found.pop(MANIFEST)[0]
    info = found[name][0] if name in found else tarfile.TarInfo(name)
    found[name] = (info, content)
    found[MANIFEST] = (manifest, msgspec.json.encode(new.sealed()))
    with tarfile.open(file, "w") as tar:
        for each, data in found.values():
            each.size = len(data)
            tar.addfile(each, io.BytesIO(data))
    return True


# --- what is refused ---------------------------------------------------------------------------


def test_a_newer_ledger_or_unknown_member_is_refused(machine: Machine, new: Path) -> None:
    file = machine.back_up()
    content = file.read_bytes()
    replaced(file, "shipworthy.yaml", b"{}\n", ledger="9999")
    with pytest.raises(LedgerUnavailable, match="upgrade Shipworthy"):
        restore(file, new)
    for name in ("up.lock", "replicas/x", "secrets/a/b", "blobs/model", "lake/loose", "journals"):
        file.write_bytes(content)
        replaced(file, name, b"x")
        with pytest.raises(IntegrityError, match="no backup of a project"):
            restore(file, new)
        with pytest.raises(IntegrityError, match="no backup of a project"):
            verify_backup(file, silent)
    assert not new.exists()


def test_a_damaged_backup_leaves_nothing_where_it_was_to_be_restored(
    machine: Machine, new: Path
) -> None:
    machine.ask(1)
    file = machine.back_up()
    whole = file.read_bytes()
    at = whole.index(b"model" * 100) + 7
    file.write_bytes(whole[:at] + b"X" + whole[at + 1 :])
    with pytest.raises(IntegrityError, match="is not what was backed up"):
        verify_backup(file, silent)
    with pytest.raises(IntegrityError, match="is not what was backed up"):
        restore(file, new)
    assert not new.exists()
    new.mkdir()
    with pytest.raises(IntegrityError):
        restore(file, new)
    assert not list(new.iterdir())
    file.write_bytes(whole)
    restore(file, new)


def test_a_folder_with_something_in_it_is_not_touched(machine: Machine, new: Path) -> None:
    file = machine.back_up()
    before = tree(machine.root)
    with pytest.raises(Conflict, match="has a project's state already"):
        restore(file, machine.root)
    assert tree(machine.root) == before
    new.mkdir()
    (new / "letters").write_text("mine")
    with pytest.raises(Conflict, match="neither empty nor a project"):
        restore(file, new)
    assert tree(new) == {"letters": b"mine"}
    with pytest.raises(Unavailable, match="can't be read"):
        restore(file, new / "letters")


def test_a_project_of_the_repository_gets_its_state_and_keeps_its_settings(
    machine: Machine, new: Path
) -> None:
    new.mkdir()
    (new / "shipworthy.yaml").write_text("preset: critical\n")
    (new / "policy.yaml").write_text("mine\n")
    restore(machine.back_up(), new)
    assert (new / "shipworthy.yaml").read_text() == "preset: critical\n"
    assert (new / "policy.yaml").read_text() == "mine\n"
    assert open_session(new).blobs.has(machine.blob.digest)


def test_there_is_no_second_backup_at_a_time_and_no_file_is_overwritten(machine: Machine) -> None:
    file = machine.back_up()
    before = file.read_bytes()
    with pytest.raises(Conflict, match="is there already"):
        machine.back_up()
    assert file.read_bytes() == before
    with (
        workspace(machine.session.project.state / "backup"),
        pytest.raises(Conflict, match="another process works"),
    ):
        machine.back_up("second.tar")
    with pytest.raises(UsageError, match="there is no folder"):
        machine.back_up("nowhere/backup.tar")
    machine.back_up("second.tar")


def test_a_lake_writer_that_hangs_is_told_of(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backing_up, "_PATIENCE", 0.1)
    with (
        locked(machine.session.project.lake_lock),
        pytest.raises(Unavailable, match=r"another process holds .*lake\.lock"),
    ):
        machine.back_up()
    assert not (machine.root / ".shipworthy" / "backup").exists()
    machine.back_up()


# --- places elsewhere --------------------------------------------------------------------------


def test_a_ledger_elsewhere_is_only_written_to_when_it_is_named(
    machine: Machine, new: Path, tmp_path: Path
) -> None:
    copy_ledger(machine.session.project.ledger_url, f"sqlite:///{tmp_path / 'live.db'}")
    machine.configure(f"ledger: sqlite:///{tmp_path / 'live.db'} # ours\n")
    file = machine.back_up()
    live = tree(tmp_path)["live.db"]
    with pytest.raises(UsageError, match="say with --ledger"):
        restore(file, new)
    with pytest.raises(Conflict, match="is there already"):
        restore(file, new, ledger=f"sqlite:///{tmp_path / 'live.db'}")
    assert not new.exists()
    restore(file, new, ledger="sqlite:///.shipworthy/ledger.db")
    assert tree(tmp_path)["live.db"] == live
    assert 'ledger: "sqlite:///.shipworthy/ledger.db"\n' in (new / "shipworthy.yaml").read_text()
    assert (new / ".shipworthy" / "ledger.db").exists()
    other = tmp_path / "other"
    restore(file, other, ledger=f"sqlite:///{tmp_path / 'second.db'}")
    assert not (other / ".shipworthy" / "ledger.db").exists()
    assert load_project(other).ledger_url == f"sqlite:///{tmp_path / 'second.db'}"
    with open_session(other).ledger.read() as tx:
        assert list(tx.audit.entries())[-1].act == "restore"


def test_a_relative_ledger_within_the_project_needs_no_name(machine: Machine, new: Path) -> None:
    copy_ledger(
        machine.session.project.ledger_url, f"sqlite:///{machine.root / 'db' / 'ledger.db'}"
    )
    machine.configure("ledger: sqlite:///db/ledger.db\n")
    restore(machine.back_up(), new)
    assert (new / "db" / "ledger.db").exists()
    assert not list((new / ".shipworthy").glob("ledger*"))
    open_session(new)


def test_settings_that_cannot_be_changed_by_line_are_refused_before_anything_is_done(
    machine: Machine, new: Path
) -> None:
    (machine.root / "shipworthy.yaml").write_text("{preset: prototype}\n")
    file = machine.back_up()
    with pytest.raises(UsageError):
        restore(file, new, ledger="sqlite:///db.db")
    assert not new.exists()


@pytest.mark.parametrize("inside", [True, False])
def test_a_lake_elsewhere_is_restored_there_only_when_that_is_empty(
    machine: Machine, new: Path, tmp_path: Path, inside: bool
) -> None:
    lake = machine.root / "data" / "lake" if inside else tmp_path / "lake"
    machine.configure(f"lake: {{url: '{'data/lake' if inside else lake}'}}\n")
    machine.ask(*range(20))
    catch_up(machine.root)
    file = machine.back_up()
    there = tree(lake)
    assert there
    if not inside:
        with pytest.raises(Conflict, match="is not empty"):
            restore(file, new)
        assert not new.exists()
        assert tree(lake) == there
        lake.rename(tmp_path / "away")
    restore(file, new)
    catch_up(new)
    assert in_lake(new) == Counter(f"i{number}" for number in range(20))
    assert not (new / ".shipworthy" / "lake").exists()
    if not inside:
        assert lake.stat().st_mode & 0o777 == 0o700


def test_a_postgresql_ledger_moves_to_another_database_or_to_a_file(
    machine: Machine, new: Path, tmp_path: Path, databases: Databases
) -> None:
    live, empty = databases.make(), databases.make()
    copy_ledger(machine.session.project.ledger_url, live)
    machine.configure(f"ledger: {json.dumps(live)}\n")
    file = machine.back_up()
    with pytest.raises(UsageError, match="say with --ledger") as told:
        restore(file, new)
    assert "password" not in str(told.value)
    with pytest.raises(Conflict, match="holds rows already"):
        restore(file, new, ledger=live)
    assert not new.exists()
    restore(file, new, ledger=empty)
    assert not list((new / ".shipworthy").glob("ledger*"))
    restore(file, tmp_path / "local", ledger="sqlite:///.shipworthy/ledger.db")
    machine.close()
    for root in (new, tmp_path / "local"):
        with open_ledger(load_project(root).ledger_url) as restored, restored.read() as tx:
            entries = list(tx.audit.entries())
        assert [entry.act for entry in entries[-2:]] == ["backup", "restore"]


# --- faults ------------------------------------------------------------------------------------


def command(root: Path, *arguments: str, **options: Any) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "shipworthy", *arguments],
        cwd=root,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


def sparse_blob(machine: Machine, size: int) -> None:
    """Something large under the name of a blob, which takes no disk."""
    folder = machine.session.project.blobs / "sha256" / "00"
    folder.mkdir(parents=True)
    with (folder / ("0" * 64)).open("wb") as file:
        file.truncate(size)


def nothing_is_left(machine: Machine) -> bool:
    state = machine.session.project.state
    return not (state / "backup").exists() and not list(machine.root.parent.glob(".*.partial"))


def limited_file_size() -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (2_000_000, 2_000_000))


def test_a_disk_that_takes_no_more_is_told_of_and_nothing_is_left(machine: Machine) -> None:
    sparse_blob(machine, 8_000_000)
    running = command(machine.root, "backup", "create", "../full.tar", preexec_fn=limited_file_size)
    said, complained = running.communicate(timeout=100)
    assert running.returncode == 3, complained
    assert "can't be written" in complained
    assert "Traceback" not in complained + said
    assert nothing_is_left(machine)
    assert not (machine.root.parent / "full.tar").exists()
    with locked(machine.session.project.lake_lock, 0.0):
        pass


def test_a_restore_that_runs_out_of_disk_leaves_nothing(machine: Machine, new: Path) -> None:
    machine.session.blobs.put_bytes(os.urandom(4_000_000), "large")
    file = machine.back_up()
    for folder in (new, machine.root.parent):
        folder.mkdir(exist_ok=True)
    running = command(
        new.parent, "backup", "restore", str(file), str(new), preexec_fn=limited_file_size
    )
    _, complained = running.communicate(timeout=100)
    assert running.returncode == 3, complained
    assert "can't be written" in complained
    assert not list(new.iterdir())


def test_too_little_space_is_told_before_anything_is_written(
    machine: Machine, new: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = machine.back_up()
    monkeypatch.setattr(backing_up, "_RESERVE", 10**18)
    with pytest.raises(Unavailable, match="make room"):
        restore(file, new)
    with pytest.raises(Unavailable, match="make room"):
        machine.back_up("second.tar")
    assert not new.exists()
    assert nothing_is_left(machine)


def test_after_a_backup_that_was_killed_the_next_one_clears_up(machine: Machine) -> None:
    sparse_blob(machine, 40_000_000_000)
    target = machine.root.parent / "killed.tar"
    (machine.session.project.blobs / "sha256" / "00" / ("0" * 64)).unlink()
    pipe = machine.session.project.blobs / "sha256" / "00" / ("1" * 64)
    os.mkfifo(pipe)  # it waits there for ever
    running = command(machine.root, "backup", "create", str(target))
    wait_for(lambda: list(target.parent.glob(".killed.tar.*.partial")) or running.poll())
    running.send_signal(signal.SIGKILL)
    running.communicate(timeout=60)
    assert not nothing_is_left(machine)
    assert not target.exists()
    pipe.unlink()
    with locked(machine.session.project.lake_lock, 0.0):
        pass
    create_backup(machine.session, target, silent)
    assert nothing_is_left(machine)
    verify_backup(target, silent)


def test_a_restore_that_was_killed_can_be_done_again(machine: Machine, new: Path) -> None:
    file = machine.back_up()
    left = new / ".shipworthy.restoring" / ".shipworthy" / "blobs"
    left.mkdir(parents=True)
    (left / "half").write_bytes(b"half")
    restore(file, new)
    assert not list(new.rglob("half"))
    assert sorted(p.name for p in new.iterdir()) == [".gitignore", ".shipworthy", "shipworthy.yaml"]


def test_a_damaged_blob_is_backed_up_and_complained_of(machine: Machine, new: Path) -> None:
    [blob] = (machine.session.project.blobs / "sha256").glob("??/*")
    blob.chmod(0o640)
    blob.write_bytes(b"another")
    file = machine.root.parent / "backup.tar"
    for arguments in (
        ("create", str(file)),
        ("verify", str(file), "--json"),
        ("restore", str(file), str(new)),
    ):
        running = command(machine.root, "backup", *arguments)
        said, complained = running.communicate(timeout=100)
        assert running.returncode == 1, complained
        assert "1 blob" in complained
        assert machine.blob.digest in complained
        assert said
    assert (new / ".shipworthy").is_dir()


@pytest.mark.long
@pytest.mark.timeout(600)
def test_large_files_stream_in_flat_memory(machine: Machine, new: Path) -> None:
    sparse_blob(machine, 1024**3)
    file = machine.root.parent / "backup.tar"
    code = (
        "import resource, sys; from shipworthy.cli import main\n"
        "try: main()\n"
        "finally: print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, file=sys.stderr)"
    )
    for arguments in (
        ("create", str(file)),
        ("verify", str(file)),
        ("restore", str(file), str(new)),
    ):
        ended = subprocess.run(
            [sys.executable, "-c", code, "backup", *arguments],
            cwd=machine.root,
            capture_output=True,
            text=True,
            check=False,
        )
        assert ended.returncode == 1  # the blob is not what its name says
        assert int(ended.stderr.split()[-1]) < 400_000, "kilobytes"
    assert (new / ".shipworthy/blobs/sha256/00" / ("0" * 64)).stat().st_size == 1024**3


# --- the whole system --------------------------------------------------------------------------


class Client:
    """Asks and rates, and remembers what was acknowledged, and when."""

    def __init__(self, town: Town) -> None:
        self.inferences: list[tuple[float, str]] = []
        self.feedback: list[tuple[float, str]] = []
        self._town = town

    def call(self) -> None:
        number = len(self.inferences)
        answer = self._town.infer(unit=f"user-{number}")
        if answer.status != 200:
            return
        id = answer.headers["x-shipworthy-inference"]
        self.inferences.append((time.time(), id))
        said = {"inference": id, "kind": "rating", "name": "stars", "value": number % 6}
        rated = self._town.call("/v1/feedback", json.dumps(said).encode())
        if rated.status in {200, 202}:
            self.feedback.append((time.time(), json.loads(rated.body)["feedback"]))


@pytest.mark.timeout(600)
def test_a_machine_that_runs_is_moved_and_goes_on_with_its_rollout(
    town: Town, tmp_path: Path
) -> None:
    policy = (town.root / "policy.yaml").read_text()
    patient = policy.replace("requests: 20}, {weight: 50%, requests: 20}", "requests: 100000}")
    (town.root / "policy.yaml").write_text(patient)
    town.sw("apply")
    town.start()
    town.to_production("first", 1)
    wait_for(lambda: town.infer().status == 200)
    taken: list[tuple[float, Path]] = []
    client = Client(town)
    with over_and_over(client.call):
        town.to_production("second", 2)
        wait_for(lambda: "progressing" in town.sw("rollout", "status", "digits"), 120)
        for number in range(3):
            have = len(client.feedback)
            wait_for(lambda least=have + 30: len(client.feedback) > least)
            file = tmp_path / f"{number}.tar"
            taken.append((time.time(), file))
            told = json.loads(town.sw("backup", "create", str(file), "--json"))
            assert told["files"]["lake"] > 0 or told["files"]["journals"] > 0
    town.stop()

    for began, file in taken:
        root = tmp_path / file.stem
        town.sw("backup", "restore", str(file), str(root))
        moved = Town(root, keys=town.keys)
        before = counts(root)
        try:
            if file == taken[-1][1]:
                goes_on(moved, file, before, tmp_path)
        finally:
            moved.end()
        catch_up(root)
        for table, acknowledged in (
            ("inferences", client.inferences),
            ("feedback", client.feedback),
        ):
            found = in_lake(root, table)
            assert set(found.values()) == {1}
            missing = [id for at, id in acknowledged if at < began and id not in found]
            assert not missing


def counts(root: Path) -> dict[str, Any]:
    """The rollout under way, as the ledger has it."""
    with open_session(root).ledger.read() as tx:
        [state] = tx.rollouts.active()
    return msgspec.to_builtins(state)


def goes_on(moved: Town, file: Path, before: dict[str, Any], folder: Path) -> None:
    moved.start()
    releases = set()

    def both() -> bool:
        for unit in range(40):
            answer = moved.infer(unit=f"new-{unit}")
            if answer.status == 200:
                releases.add(answer.headers["x-shipworthy-release"])
        return releases == {"digits@1", "digits@2"}

    wait_for(both, 120)
    after = counts(moved.root)
    assert after["id"] == before["id"]
    assert after["step_revision"] == before["step_revision"]
    assert after["exposed_requests"] > before["exposed_requests"] > 0
    for release in ("digits@1", "digits@2"):
        moved.sw("release", "verify", release)
    head = folder / "head.json"
    contents = verify_backup(file, silent)
    replace_file(head, msgspec.json.encode(contents.audit))
    assert "entries hold" in moved.sw("audit", "verify", "--head", str(head))
    moved.stop()
