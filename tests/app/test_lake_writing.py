"""The lake writer's process: it moves what there is, and ends in order."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

import pytest
from deltalake import DeltaTable

from shipworthy.app.session import prepare_state
from shipworthy.domain.records import FeedbackRecord
from shipworthy.settings import Project, load_project
from shipworthy.stores.files import locked
from shipworthy.stores.journal import JournalWriter
from shipworthy.stores.lake.state import load_condition

SECONDS = 60.0


@pytest.fixture
def project(tmp_path: Path) -> Project:
    (tmp_path / "shipworthy.yaml").write_text("lake: {every: 100ms}\n")
    found = load_project(tmp_path)
    prepare_state(found)
    return found


@contextmanager
def running(project: Project) -> Generator[subprocess.Popen[str]]:
    command = [sys.executable, "-m", "shipworthy.app.lake_writing", str(project.root)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as writer:
        yield writer
        writer.kill()


def append(project: Project, *numbers: int) -> None:
    worker = JournalWriter(project.journals, f"w{numbers[0]}", 10**9)
    for number in numbers:
        record = FeedbackRecord(
            id=f"f{number}",
            at=1_790_000_000.0,
            inference="i",
            key="k",
            kind="label",
            name="n",
            value=1,
        )
        assert worker.append(record)
    worker.close()


def count(project: Project) -> int:
    folder = project.lake / "feedback"
    return DeltaTable(folder).count() if DeltaTable.is_deltatable(str(folder)) else 0


def wait_for_count(project: Project, number: int) -> None:
    deadline = time.monotonic() + SECONDS
    while count(project) != number:
        assert time.monotonic() < deadline, f"{count(project)} of {number}"
        time.sleep(0.05)


def test_it_moves_records_until_it_is_told_to_stop(project: Project):
    append(project, 1, 2)
    with running(project) as writer:
        wait_for_count(project, 2)
        with locked(project.lake_lock, SECONDS):  # it lets others in, and waits for them
            append(project, 3)
            writer.send_signal(signal.SIGTERM)
            time.sleep(0.2)
            assert count(project) == 2
        assert writer.wait(SECONDS) == 0
    assert count(project) == 3
    condition = load_condition(project.lake_condition)
    assert condition is not None
    assert (condition.records, condition.problem) == (3, "")


def test_it_ends_with_whoever_started_it(project: Project):
    with running(project) as writer:
        wait_for_count(project, 0)
        assert writer.stdin is not None
        writer.stdin.close()
        assert writer.wait(SECONDS) == 0


def test_what_is_killed_goes_on_where_it_was(project: Project):
    append(project, 1)
    with running(project):
        wait_for_count(project, 1)
    append(project, 2)
    with running(project):
        wait_for_count(project, 2)


def test_without_a_ledger_it_says_what_is_wrong(project: Project):
    (project.state / "ledger.db").unlink()
    with running(project) as writer:
        assert writer.wait(SECONDS) == 3
        assert writer.stderr is not None
        assert "ledger" in writer.stderr.read()
    assert load_condition(project.lake_condition) is None


def test_a_fault_is_said_once_and_waited_for(project: Project):
    project.lake.mkdir()
    project.lake_writer.write_text("{")
    append(project, 1)
    with running(project) as writer:
        deadline = time.monotonic() + SECONDS
        tries: set[float] = set()
        while len(tries) < 3:
            assert time.monotonic() < deadline
            if (found := load_condition(project.lake_condition)) and "is damaged" in found.problem:
                tries.add(found.at)
            time.sleep(0.05)
        project.lake_writer.unlink()
        wait_for_count(project, 1)
        writer.terminate()
        assert writer.wait(SECONDS) == 0
        assert writer.stderr is not None
        assert writer.stderr.read().count("is damaged") == 1
