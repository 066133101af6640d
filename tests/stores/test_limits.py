"""The table of what was used: shared by processes, kept over restarts, proof against garbage."""

from __future__ import annotations

import fcntl
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Generator
from pathlib import Path

import pytest

from shipworthy.stores import limits
from shipworthy.stores.limits import UsageTable

NOW = 1_900_000_830.0
MINUTE, DAY = int(NOW // 60), int(NOW // 86_400)


class Clock:
    def __init__(self) -> None:
        self.now = NOW

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def open_table(tmp_path: Path, clock: Clock) -> Generator[Callable[[], UsageTable]]:
    opened: list[UsageTable] = []

    def open_one() -> UsageTable:
        opened.append(UsageTable(tmp_path / "limits", clock, patience=0.05))
        return opened[-1]

    yield open_one
    for table in opened:
        table.close()


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


_HOLDER = """
import sys, time
from pathlib import Path
from shipworthy.stores.limits import UsageTable
table = UsageTable(Path(sys.argv[1]), lambda: float(sys.argv[2]))
row = table.rows(["key k"])["key k"]
minute = int(float(sys.argv[2]) // 60)
row.add(minute, minute // 1440, 1, 10, 100, 5)
print("ready", flush=True)
time.sleep(600)
"""


@pytest.fixture
def holder(tmp_path: Path) -> Generator[subprocess.Popen[bytes]]:
    """A process that has counted a request and has five calls under way."""
    command = [sys.executable, "-c", _HOLDER, str(tmp_path / "limits"), str(NOW)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"ready\n"
    yield process
    process.kill()
    process.wait(30)
    process.stdout.close()


def test_each_sees_what_all_count(open_table: Callable[[], UsageTable]):
    tables = [open_table() for _ in range(5)]
    rows = [table.rows(["key k", "plan m"])["key k"] for table in tables]
    for number, row in enumerate(rows):
        row.add(MINUTE - 1, DAY, 1, 10, 0, 0)
        row.add(MINUTE, DAY, 1, number, 100, 1)
    for row in rows:
        assert row.usage(MINUTE, DAY) == (5, 5, 50, 10, 500, 5)
        assert row.usage(MINUTE + 1, DAY) == (5, 0, 10, 0, 500, 5)
        assert row.usage(MINUTE + 2, DAY + 1) == (0, 0, 0, 0, 0, 5)
    assert tables[0].rows(["key k", "plan m"])["plan m"].usage(MINUTE, DAY) == (0,) * 6


def test_what_is_taken_back_no_longer_counts(open_table: Callable[[], UsageTable]):
    row = open_table().rows(["key k"])["key k"]
    row.add(MINUTE, DAY, 1, 10, 100, 1)
    row.add(MINUTE, DAY, 1, 20, 200, 1)
    row.take_back(MINUTE, DAY, 0, 5, 50, 1)
    assert row.usage(MINUTE, DAY) == (0, 2, 0, 25, 250, 1)
    row.add(MINUTE + 2, DAY, 1, 7, 0, 0)
    row.take_back(MINUTE, DAY, 2, 25, 250, 1)  # of its minute nothing counts any more
    assert row.usage(MINUTE + 2, DAY) == (0, 1, 0, 7, 0, 0)
    row.take_back(MINUTE + 2, DAY, 9, 99, 999, 9)
    assert row.usage(MINUTE + 2, DAY) == (0,) * 6


def test_amounts_beyond_all_measure_only_fill_up(open_table: Callable[[], UsageTable]):
    row = open_table().rows(["key k"])["key k"]
    for _ in range(1_000):
        row.add(MINUTE, DAY, 1, (1 << 40) - 1, (1 << 40) - 1, 1)
    _, requests, _, tokens, spent, running = row.usage(MINUTE, DAY)
    assert (requests, running) == (1_000, 1_000)
    assert tokens == 1_000 * ((1 << 40) - 1)
    assert spent == (1 << 48) - 1


def test_a_clock_that_was_set_back_begins_anew(open_table: Callable[[], UsageTable]):
    one, other = (open_table().rows(["key k"])["key k"] for _ in range(2))
    one.add(MINUTE + 10, DAY + 1, 1, 10, 100, 0)
    assert other.usage(MINUTE, DAY) == (0,) * 6
    one.add(MINUTE, DAY, 1, 5, 50, 0)
    assert other.usage(MINUTE, DAY) == (0, 1, 0, 5, 50, 0)
    assert other.usage(MINUTE, DAY + 1)[4] == 100  # which is another day's


def test_what_was_used_outlives_all_workers_but_calls_under_way(
    open_table: Callable[[], UsageTable],
):
    for number in range(3):
        table = open_table()
        row = table.rows(["key k"])["key k"]
        assert row.usage(MINUTE, DAY) == (0, number, 0, 10 * number, 100 * number, 0)
        row.add(MINUTE, DAY, 1, 10, 100, 3)
        table.close()


def test_what_a_killed_process_had_under_way_is_free_again(
    open_table: Callable[[], UsageTable], holder: subprocess.Popen[bytes]
):
    table = open_table()
    row = table.rows(["key k"])["key k"]
    table.tidy()
    assert row.usage(MINUTE, DAY) == (0, 1, 0, 10, 100, 5)
    holder.kill()
    holder.wait(30)
    table.tidy()
    assert row.usage(MINUTE, DAY) == (0, 1, 0, 10, 100, 0)
    another = open_table()
    assert another.rows(["key k"])["key k"].usage(MINUTE, DAY) == (0, 1, 0, 10, 100, 0)


def test_who_takes_a_dead_ones_place_frees_what_it_had_under_way(
    open_table: Callable[[], UsageTable], holder: subprocess.Popen[bytes]
):
    holder.kill()
    holder.wait(30)
    row = open_table().rows(["key k"])["key k"]
    assert row.usage(MINUTE, DAY) == (0, 1, 0, 10, 100, 0)


def test_a_stopped_process_stands_in_nobodys_way(
    open_table: Callable[[], UsageTable], holder: subprocess.Popen[bytes]
):
    holder.send_signal(signal.SIGSTOP)
    table = open_table()
    row = table.rows(["key k"])["key k"]
    row.add(MINUTE, DAY, 1, 1, 1, 1)
    table.tidy()
    assert row.usage(MINUTE, DAY) == (0, 2, 0, 11, 101, 6)  # it may go on, so its places are taken
    assert set(table.rows(["key k", "key new"])) == {"key k", "key new"}


def test_a_process_stopped_with_the_lock_in_hand_stands_in_nobodys_way(
    open_table: Callable[[], UsageTable], tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    one, other = open_table(), open_table()
    for table in (one, other):
        table.rows(["key k"])
    with (tmp_path / "limits" / "lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        rows = [table.rows(["key k", "key new"])["key new"] for table in (one, other)]
        for row in rows:
            row.add(MINUTE, DAY, 1, 10, 100, 1)
            assert row.usage(MINUTE, DAY) == (0, 1, 0, 10, 100, 1)  # each by itself
        alone = open_table().rows(["key k"])["key k"]
        one.tidy()
    assert "limits hold for each worker by itself" in caplog.text
    alone.add(MINUTE, DAY, 1, 0, 0, 0)
    for table in (one, other):
        table.tidy()
    for row in rows:  # what was counted meanwhile counts for all
        assert row.usage(MINUTE, DAY) == (0, 2, 0, 20, 200, 2)
    assert "hold across the workers of this host again" in caplog.text


def test_many_restarts_need_no_more_slots(open_table: Callable[[], UsageTable]):
    stays = open_table()
    row = stays.rows(["key k"])["key k"]
    for _ in range(2 * limits.SLOTS):
        table = open_table()
        table.rows(["key k"])["key k"].add(MINUTE, DAY, 1, 1, 1, 1)
        table.close()
        stays.tidy()
    assert row.usage(MINUTE, DAY) == (0, 128, 0, 128, 128, 0)
    assert stays._table is not None
    assert stays._table.words[limits._WIDTH] == 1


def test_more_workers_than_slots_count_alone(
    open_table: Callable[[], UsageTable], caplog: pytest.LogCaptureFixture
):
    tables = [open_table() for _ in range(limits.SLOTS + 1)]
    assert "64 workers use it already" in caplog.text
    tables[-1].rows(["key k"])["key k"].add(MINUTE, DAY, 1, 10, 100, 2)
    assert tables[0].rows(["key k"])["key k"].usage(MINUTE, DAY) == (0,) * 6
    tables[3].close()
    tables[-1].tidy()
    assert tables[0].rows(["key k"])["key k"].usage(MINUTE, DAY) == (0, 1, 0, 10, 100, 2)


def test_rows_of_revoked_keys_are_given_away_once_nothing_of_them_counts(
    open_table: Callable[[], UsageTable], clock: Clock, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(limits, "ROWS", 2)
    table = open_table()
    rows = table.rows(["key a", "key b"])
    rows["key a"].add(MINUTE, DAY, 1, 1, 1, 0)
    rows["key b"].add(MINUTE, DAY, 1, 1, 1, 1)
    running = rows["key b"]

    def shared(name: str) -> bool:
        return table.rows([name])[name]._words is running._words

    assert not shared("key c")
    clock.now += 3_600
    assert not shared("key d")  # today's money of one still counts, the other has a call under way
    clock.now += 86_400
    assert shared("key e")
    assert not shared("key f")
    running.take_back(MINUTE, DAY, 0, 0, 0, 1)
    clock.now += 3_600
    assert shared("key g")
    day = int(clock.now // 86_400)
    assert table.rows(["key g"])["key g"].usage(int(clock.now // 60), day) == (0,) * 6


def test_a_key_that_is_back_goes_on_where_it_was(open_table: Callable[[], UsageTable]):
    table = open_table()
    table.rows(["key a"])["key a"].add(MINUTE, DAY, 1, 10, 100, 0)
    table.rows([])
    assert table.rows(["key a"])["key a"].usage(MINUTE, DAY) == (0, 1, 0, 10, 100, 0)


def damage_by_cutting(file: Path) -> None:
    os.truncate(file, 5_000)


def damage_by_emptying(file: Path) -> None:
    os.truncate(file, 0)


def damage_by_another_version(file: Path) -> None:
    content = file.read_bytes()
    file.write_bytes(content[:8] + b"\x09" + content[9:])


def damage_by_noise(file: Path) -> None:
    file.write_bytes(random.Random(1).randbytes(file.stat().st_size // 64))
    os.truncate(file, limits._SIZE)


def damage_by_sizes(file: Path) -> None:
    with file.open("r+b") as handle:
        handle.seek(8 * limits._WIDTH)
        handle.write(b"\xff" * 16)


@pytest.mark.parametrize(
    "damage",
    [
        damage_by_cutting,
        damage_by_emptying,
        damage_by_another_version,
        damage_by_noise,
        damage_by_sizes,
    ],
)
def test_a_file_that_makes_no_sense_is_replaced_and_that_is_said(
    damage: Callable[[Path], None],
    open_table: Callable[[], UsageTable],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
):
    table = open_table()
    table.rows(["key k"])["key k"].add(MINUTE, DAY, 1, 10, 100, 1)
    table.close()
    damage(tmp_path / "limits" / "usage")
    row = open_table().rows(["key k"])["key k"]
    assert "it is replaced, and what was used counts anew" in caplog.text
    assert row.usage(MINUTE, DAY) == (0,) * 6
    row.add(MINUTE, DAY, 1, 10, 100, 1)
    assert open_table().rows(["key k"])["key k"].usage(MINUTE, DAY) == (0, 1, 0, 10, 100, 1)


def test_noise_behind_a_good_header_ends_nobody(
    open_table: Callable[[], UsageTable], tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    names = [f"key {number}" for number in range(20)]
    table = open_table()
    table.rows(names)
    table.close()
    noise = random.Random(2)
    with (tmp_path / "limits" / "usage").open("r+b") as handle:
        handle.seek(8 * limits._TAKEN)
        handle.write(noise.randbytes(limits._FIRST_ROW + 20 * 4096 - handle.tell()))
    for _ in range(2):
        rows = open_table().rows(names)
        for row in rows.values():
            row.add(MINUTE, DAY, 1, 10, 100, 1)
            row.take_back(MINUTE, DAY, 1, 10, 100, 1)
            assert row.usage(MINUTE, DAY) == (0,) * 6
    assert "a row of" in caplog.text


def test_a_file_that_is_removed_or_replaced_is_noticed_and_nothing_is_lost(
    open_table: Callable[[], UsageTable], tmp_path: Path
):
    one, other = open_table(), open_table()
    rows = [table.rows(["key k"])["key k"] for table in (one, other)]
    for row in rows:
        row.add(MINUTE, DAY, 1, 10, 100, 1)
    (tmp_path / "limits" / "usage").unlink()
    one.tidy()
    rows[0].add(MINUTE, DAY, 1, 10, 100, 1)
    other.tidy()
    for row in rows:
        assert row.usage(MINUTE, DAY) == (0, 3, 0, 30, 300, 3)


def test_a_folder_that_can_t_be_written_leaves_each_to_itself(
    tmp_path: Path, clock: Clock, caplog: pytest.LogCaptureFixture
):
    (tmp_path / "limits").write_text("in the way")
    table = UsageTable(tmp_path / "limits", clock)
    row = table.rows(["key k"])["key k"]
    row.add(MINUTE, DAY, 1, 10, 100, 1)
    table.tidy()
    assert row.usage(MINUTE, DAY) == (0, 1, 0, 10, 100, 1)
    assert caplog.text.count("can't be used") == 1
    (tmp_path / "limits").unlink()
    table.tidy()
    other = UsageTable(tmp_path / "limits", clock)
    assert other.rows(["key k"])["key k"].usage(MINUTE, DAY) == (0, 1, 0, 10, 100, 1)
    table.close()
    other.close()


def test_a_full_disk_leaves_new_keys_to_each_and_old_ones_shared(
    open_table: Callable[[], UsageTable],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
):
    table = open_table()
    table.rows(["key k"])

    def full(descriptor: int, content: bytes, offset: int) -> int:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as disk:
        disk.setattr(os, "pwrite", full)
        rows = table.rows(["key k", "key new"])
        rows["key new"].add(MINUTE, DAY, 1, 10, 100, 1)
    assert "No space left on device" in caplog.text
    assert rows["key new"].usage(MINUTE, DAY) == (0, 1, 0, 10, 100, 1)
    table.tidy()
    other = open_table().rows(["key k", "key new"])
    assert other["key new"].usage(MINUTE, DAY) == (0, 1, 0, 10, 100, 1)


def test_nobody_else_may_read_it(open_table: Callable[[], UsageTable], tmp_path: Path):
    open_table().rows(["key k"])
    assert (tmp_path / "limits").stat().st_mode & 0o077 == 0
    assert (tmp_path / "limits" / "usage").stat().st_mode & 0o077 == 0
