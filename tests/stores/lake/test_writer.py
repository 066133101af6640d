"""The lake's writer: each record once, whatever happens."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from shipworthy.domain.records import FeedbackRecord, InferenceRecord, MirrorRecord, Outcome
from shipworthy.errors import IntegrityError, LedgerUnavailable, Unavailable
from shipworthy.stores.files import locked
from shipworthy.stores.journal import JournalReader, JournalWriter
from shipworthy.stores.lake import writer as module
from shipworthy.stores.lake.state import load_place, save_place
from shipworthy.stores.lake.tables import LakeTable

Inference = Callable[..., InferenceRecord]
Feedback = Callable[..., FeedbackRecord]
Mirror = Callable[..., MirrorRecord]
Lake = Any
"""Of conftest.py."""
NOW = 1_790_000_000.0


class TestMoving:
    def test_records_get_into_their_tables(
        self, lake: Lake, inference: Inference, feedback: Feedback
    ):
        lake.decide("d1", "d2")
        lake.move(inference(1), feedback(1), inference(2, slices={"country": "DE"}))
        found = lake.query("SELECT id, slices, day::text, time::text FROM inferences ORDER BY id")
        assert found == [
            ("i00001", None, "2026-09-21", "2026-09-21 14:13:20.001+00"),
            ("i00002", '{"country":"DE"}', "2026-09-21", "2026-09-21 14:13:20.002+00"),
        ]
        found = lake.query("SELECT id, inference, value, number FROM feedback")
        assert found == [("f00001", "i00001", "4.0", 4.0)]
        assert lake.query("SELECT sequence, id, numbers FROM decisions ORDER BY sequence") == [
            (1, "d1", "{}"),
            (2, "d2", "{}"),
        ]
        counts = lake.query(
            "SELECT slice, sum(requests) FROM minutes GROUP BY slice ORDER BY slice"
        )
        assert counts == [("", 2), ("country=DE", 1)]

    def test_all_that_a_request_of_a_language_model_tells_has_its_column(
        self, lake: Lake, inference: Inference, mirror: Mirror
    ):
        told = {
            "protocol": "openai", "operation": "chat", "stream": True, "input_tokens": 12,
            "output_tokens": 34, "cached_tokens": 5, "tokens_estimated": True, "cost": 0.25,
            "first_content_seconds": 0.1, "gap_seconds": 0.02, "longest_gap_seconds": 0.3,
            "finish": "stop", "request_digest": "aa", "response_digest": "bb", "redacted": 3,
        }  # fmt: skip
        lake.move(inference(1, features={"messages": 2.0, "finish": "stop"}, **told), inference(2))
        found = lake.query(f"SELECT {', '.join(told)}, features FROM inferences ORDER BY id")
        assert found[0] == (*told.values(), '{"messages":2.0,"finish":"stop"}')
        nothing = (None, None, None, False, None, None, None, None, "", None, None, 0, None)
        assert found[1] == ("oip-v2", "infer", False, *nothing)
        same = {
            "release": "chat@4", "compared_with": "chat@3", "reason": "", "status": 200,
            "seconds": 0.5, "agrees": False, "difference": "choices[0].message.content",
            "input_tokens": 12, "output_tokens": 30, "cost": 0.2, "response_bytes": 2,
            "response": b"{}", "response_digest": "cc", "unit": "u1", "redacted": 1,
        }  # fmt: skip
        lake.move(mirror(1, **same), mirror(2, outcome=Outcome.FAILURE, asked_at=NOW))
        found = lake.query(f"SELECT {', '.join(same)} FROM mirrors ORDER BY id")
        assert found[0] == tuple(same.values())
        found = lake.query(
            "SELECT outcome, agrees, inference, day::text, epoch_us(asked) FROM mirrors ORDER BY id"
        )
        assert found == [
            ("success", False, "i00001", "2026-09-21", (NOW - 0.499) * 1e6),
            ("failure", None, "i00002", "2026-09-21", NOW * 1e6),
        ]

    def test_minutes_add_up_tokens_and_cost(self, lake: Lake, inference: Inference):
        used = {"input_tokens": 10, "output_tokens": 3, "cost": 0.5}
        lake.move(inference(1, **used), inference(2, **used, slices={"a": "b"}), inference(3))
        sums = "sum(input_tokens), sum(output_tokens), sum(cost)"
        assert lake.query(f"SELECT {sums} FROM minutes WHERE slice = ''") == [(20, 6, 1.0)]
        assert lake.query(f"SELECT {sums} FROM minutes WHERE slice = 'a=b'") == [(10, 3, 0.5)]

    def test_batches_follow_one_another(
        self, lake: Lake, inference: Inference, feedback: Feedback, mirror: Mirror
    ):
        lake.restart(batch_records=7)
        for number in range(50):
            lake.append(inference(number), feedback(number), mirror(number))
        lake.drain()
        lake.decide("d1")
        lake.move(inference(50))
        lake.decide("d2")
        lake.restart()
        lake.move(inference(51))
        assert lake.ids("inferences") == [f"i{number:05d}" for number in range(52)]
        assert lake.ids("feedback") == [f"f{number:05d}" for number in range(50)]
        assert lake.ids("mirrors") == [f"m{number:05d}" for number in range(50)]
        assert lake.query("SELECT sum(requests) FROM minutes WHERE slice = ''") == [(52,)]
        assert lake.ids("decisions") == ["d1", "d2"]

    def test_a_big_backlog_of_decisions(self, lake: Lake, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setattr(module, "_DECISIONS", 5)
        lake.decide(*(f"d{number:02d}" for number in range(23)))
        lake.drain()
        lake.restart()
        lake.drain()
        assert lake.ids("decisions") == [f"d{number:02d}" for number in range(23)]

    def test_segments_go_once_lake_and_keeper_have_them(self, lake: Lake, inference: Inference):
        lake.move(*map(inference, range(100)))
        before = len(list(lake.journals.iterdir()))
        assert before > 2
        lake.keeper_read_all()
        lake.drain()
        assert len(list(lake.journals.iterdir())) == 1  # the one being written
        lake.move(inference(100))
        assert len(lake.ids("inferences")) == 101

    def test_what_only_the_keeper_has_read_stays(self, lake: Lake, inference: Inference):
        lake.append(*map(inference, range(100)))
        lake.keeper_read_all()
        before = len(list(lake.journals.iterdir()))
        lake.restart(batch_records=1).cycle()
        assert len(list(lake.journals.iterdir())) == before

    def test_what_has_no_place_in_a_column_keeps_nothing_else_out(
        self, lake: Lake, inference: Inference, feedback: Feedback, mirror: Mirror
    ):
        lake.move(
            inference(1),
            inference(2, revision=2**64 - 1),
            inference(3, at=float("nan")),
            inference(4, at=-1.0),
            inference(5, seconds=float("inf")),
            inference(6, sent=1e300),
            feedback(7),
            inference(8),
            inference(9, input_tokens=2**63),
            mirror(1),
            mirror(2, at=1e300),
            mirror(3, output_tokens=2**63),
        )
        assert lake.ids("inferences") == ["i00001", "i00008"]
        assert lake.ids("feedback") == ["f00007"]
        assert lake.ids("mirrors") == ["m00001"]
        assert lake.condition.skipped == {"unfit": 8}

    def test_any_value_of_feedback_has_its_place(self, lake: Lake, feedback: Feedback):
        values = [True, None, "é\0", {"a": [1, None]}, [], float("nan"), 1.5]
        lake.move(*(feedback(number, value=value) for number, value in enumerate(values)))
        found = lake.query("SELECT value, number FROM feedback ORDER BY id")
        assert [json.loads(value) for value, _ in found][:5] == values[:5]
        assert [number for _, number in found][:5] == [1.0, None, None, None, None]

    def test_damaged_journals_cost_only_what_is_damaged(self, lake: Lake, inference: Inference):
        lake.append(*map(inference, range(9)))
        (segment,) = lake.journals.iterdir()
        content = bytearray(segment.read_bytes())
        content[len(content) // 2] ^= 255
        segment.write_bytes(content)
        lake.drain()
        assert len(lake.ids("inferences")) == 8
        assert lake.condition.skipped == {"corrupt": 1}

    def test_the_lake_is_free_for_others_between_batches(self, lake: Lake, inference: Inference):
        lake.restart(batch_records=1)
        lake.append(inference(1), inference(2))
        assert lake.writer.cycle()
        with locked(lake.files.lock, patience=0):
            pass


class TestCondition:
    def test_it_says_how_far_the_lake_is(self, lake: Lake, inference: Inference):
        lake.restart(batch_records=2)
        lake.append(*(inference(number, at=NOW - 100 + number) for number in range(5)))
        lake.writer.cycle()
        lake.writer.cycle()
        assert lake.condition.complete == NOW  # nothing was waiting when it began
        lake.now += 50
        lake.drain()
        found = lake.condition
        assert (found.complete, found.committed, found.records) == (NOW + 50, NOW + 50, 5)
        lake.restart()
        assert lake.writer._complete == NOW + 50

    def test_a_backlog_is_behind_by_its_oldest_record(self, lake: Lake, inference: Inference):
        lake.now = NOW - 1000
        lake.drain()
        lake.now = NOW
        lake.restart(batch_records=2)
        lake.append(*(inference(number, at=NOW - 100 + number) for number in range(6)))
        lake.writer.cycle()
        assert lake.condition.complete == NOW - 100
        lake.writer.cycle()
        assert lake.condition.complete == NOW - 98

    def test_it_names_the_fault(self, lake: Lake):
        lake.drain()
        (lake.folder / "inferences" / "_delta_log" / f"{0:020d}.json").write_text("no JSON")
        lake.restart()
        with pytest.raises(Unavailable, match="inferences can't be used"):
            lake.writer.cycle()
        assert "inferences can't be used" in lake.condition.problem


class TestFaults:
    def test_with_the_ledger_away_records_get_on(
        self, lake: Lake, inference: Inference, monkeypatch: pytest.MonkeyPatch
    ):
        lake.forget("gone", NOW + 1)
        lake.move(inference(1))
        lake.keeper_read_all()
        before = len(list(lake.journals.iterdir()))
        lake.decide("d1")
        there = lake.writer.ledger

        class Away:
            def read(self):
                raise LedgerUnavailable("the ledger is locked; try again")

        monkeypatch.setattr(lake.writer, "ledger", Away())
        lake.move(inference(2), inference(3, unit="gone"))
        assert lake.ids("inferences") == ["i00001", "i00002"]
        assert lake.condition.problem == "decisions wait: the ledger is locked; try again"
        assert len(list(lake.journals.iterdir())) == before
        lake.writer.ledger = there
        lake.drain()
        assert lake.ids("decisions") == ["d1"]
        assert lake.condition.problem == ""

    def test_nothing_is_written_before_it_is_known_what_was_forgotten(
        self, lake: Lake, inference: Inference, monkeypatch: pytest.MonkeyPatch
    ):
        class Away:
            def read(self):
                raise LedgerUnavailable("the ledger is locked; try again")

        monkeypatch.setattr(lake.writer, "ledger", Away())
        lake.append(inference(1))
        with pytest.raises(LedgerUnavailable):
            lake.writer.cycle()
        lake.restart()
        lake.drain()
        assert lake.ids("inferences") == ["i00001"]

    def test_a_damaged_log_makes_records_wait(self, lake: Lake, inference: Inference):
        lake.move(inference(1))
        log = lake.folder / "feedback" / "_delta_log" / f"{0:020d}.json"
        sound = log.read_bytes()
        log.write_bytes(sound[:50])
        lake.restart()
        lake.append(inference(2))
        for _ in range(2):
            with pytest.raises(Unavailable, match=r"feedback can't be used .*; .* from a backup"):
                lake.writer.cycle()
        log.write_bytes(sound)
        lake.drain()
        assert lake.ids("inferences") == ["i00001", "i00002"]

    def test_a_place_that_is_older_than_the_tables_is_refused(
        self, lake: Lake, inference: Inference
    ):
        lake.move(inference(1))
        place = lake.files.place.read_bytes()
        lake.move(inference(2))
        lake.files.place.write_bytes(place)
        lake.restart()
        with pytest.raises(IntegrityError, match="restore both from the same backup"):
            lake.writer.cycle()

    def test_a_lost_place_is_refused(self, lake: Lake, inference: Inference):
        lake.move(inference(1))
        lake.files.place.unlink()
        lake.restart()
        with pytest.raises(IntegrityError, match="is gone, so nobody can tell"):
            lake.writer.cycle()
        shutil.move(lake.folder, lake.folder.with_name("old"))
        lake.drain()
        assert lake.ids("inferences") == ["i00001"]

    @pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"slot": 1}'])
    def test_a_damaged_place_is_refused(self, lake: Lake, content: bytes):
        lake.drain()
        lake.files.place.write_bytes(content)
        lake.restart()
        with pytest.raises(IntegrityError, match="is damaged"):
            lake.writer.cycle()

    def test_decisions_of_another_ledger_wait(self, lake: Lake, inference: Inference):
        lake.decide("d1", "d2", "d3")
        lake.drain()
        table = LakeTable(lake.folder, module.schema.DECISIONS)
        with lake.ledger.read() as tx:
            rows = module.decision_rows(list(tx.decisions.after(0, 1)))
        table.append(rows, module.DECISIONS_WRITER, 9)  # as if the lake came from later on
        lake.restart()
        lake.move(inference(1))
        assert lake.ids("inferences") == ["i00001"]
        assert "restore both from the same backup" in lake.condition.problem

    def test_segments_that_vanished_before_they_were_written_are_counted(
        self, lake: Lake, inference: Inference
    ):
        lake.drain()
        lake.append(inference(1))
        place = load_place(lake.files.place)
        assert place
        _, end = JournalReader(lake.journals).read({}, 10)
        save_place(lake.files.place, msgspec.structs.replace(place, batch=1, end=end))
        for segment in lake.journals.iterdir():
            segment.unlink()
        lake.restart()
        lake.drain()
        assert lake.condition.skipped == {"missing": 1}
        lake.move(inference(2))

    def test_a_second_writer_changes_nothing(
        self, lake: Lake, inference: Inference, feedback: Feedback
    ):
        first, second = lake.restart(), lake.restart()
        for number in range(6):
            lake.append(inference(number), feedback(number))
            for writer in (first, second):
                for _ in range(3):
                    try:
                        writer.cycle()
                    except (Unavailable, IntegrityError):
                        continue
        lake.restart()
        lake.drain()
        assert lake.ids("inferences") == [f"i{number:05d}" for number in range(6)]
        assert lake.query("SELECT sum(requests) FROM minutes") == [(6,)]

    def test_a_writer_that_others_overtook_loses_nothing(self, lake: Lake, inference: Inference):
        lake.move(inference(1))
        overtaken = lake.writer
        lake.restart()
        lake.move(inference(2))
        lake.append(inference(3))
        while overtaken.cycle():
            pass
        lake.restart()
        lake.drain()
        assert lake.ids("inferences") == ["i00001", "i00002", "i00003"]

    @pytest.mark.parametrize("failing", [1, 2, 3, 4])
    def test_a_table_that_refuses_is_written_later(
        self,
        lake: Lake,
        inference: Inference,
        feedback: Feedback,
        mirror: Mirror,
        monkeypatch: pytest.MonkeyPatch,
        failing: int,
    ):
        lake.drain()
        calls, append = [0], LakeTable.append

        def refuse(*arguments):
            calls[0] += 1
            if calls[0] == failing:
                raise Unavailable("no")
            append(*arguments)

        monkeypatch.setattr(LakeTable, "append", refuse)
        lake.append(inference(1), feedback(1), mirror(1))
        with pytest.raises(Unavailable):
            lake.writer.cycle()
        lake.move(inference(2))
        assert lake.ids("mirrors") == ["m00001"]
        assert lake.ids("inferences") == ["i00001", "i00002"]
        assert lake.ids("feedback") == ["f00001"]
        assert lake.query("SELECT sum(requests) FROM minutes") == [(2,)]


def can_mount() -> bool:
    return os.geteuid() == 0 and shutil.which("mount") is not None


@pytest.fixture
def small_disk(tmp_path: Path):
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)]
    if not can_mount() or subprocess.run(command, check=False, capture_output=True).returncode:
        pytest.skip("only root can make a small disk")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def settle_on(disk: Path, lake: Lake) -> None:
    """Begin the lake on that disk."""
    lake.folder = disk / "lake"
    lake.files = module.Files(
        lake=lake.folder,
        place=lake.folder / "writer.json",
        condition=disk / "condition.json",
        lock=lake.files.lock,
    )
    lake.restart()
    lake.drain()


def test_a_backlog_beyond_the_disk_is_moved_as_far_as_there_is_room(
    lake: Lake, inference: Inference, small_disk: Path
):
    settle_on(small_disk, lake)
    draw = random.Random(1)
    lake.worker = JournalWriter(lake.journals, "w1", 10**9)
    lake.append(*(inference(n, request=draw.randbytes(800)) for n in range(4_000)))
    with pytest.raises(Unavailable, match="make room"):
        lake.drain()
    # In one batch with the rest they would never get in, and no journal could be deleted.
    assert 1_000 < len(lake.ids("inferences")) < 4_000


def test_a_full_disk_is_waited_for(
    lake: Lake, inference: Inference, feedback: Feedback, small_disk: Path
):
    settle_on(small_disk, lake)
    draw = random.Random(1)
    ballast = small_disk / "ballast"
    for number, left in enumerate([0, 4_000, 8_000, 20_000, 60_000, 100_000]):
        lake.append(
            *(inference(number * 100 + n, request=draw.randbytes(800)) for n in range(100)),
            feedback(number),
        )
        ballast.touch()
        free = shutil.disk_usage(small_disk).free - left
        with ballast.open("ab") as handle:
            handle.write(bytes(free))
        refusals: list[str] = []
        for _ in range(4):
            try:
                lake.writer.cycle()
            except Unavailable as error:
                refusals.append(str(error))
        assert all("make room" in refusal for refusal in refusals)
        assert refusals or left > 0
        assert shutil.disk_usage(small_disk).free <= left
        ballast.unlink()
        lake.drain()
        assert lake.ids("inferences") == [f"i{n:05d}" for n in range(100 * (number + 1))]
        assert len(lake.ids("feedback")) == number + 1
        assert lake.query("SELECT sum(requests) FROM minutes") == [(100 * (number + 1),)]


DYING = """
import os, sys, time
from pathlib import Path
from shipworthy.stores.journal import JournalReader
from shipworthy.stores.lake import state, tables, writer
from shipworthy.stores.ledger import open_ledger

folder, steps = Path(sys.argv[1]), [0]

def dying(call, number):
    def step():
        steps[0] += 1
        if steps[0] == number:
            os._exit(9)
    def wrapped(*arguments, **options):
        step()
        found = call(*arguments, **options)
        step()
        return found
    return wrapped

def run(number):
    writer.save_place = dying(writer.save_place, number)
    for name in ("append", "compact", "forget", "sweep"):
        setattr(tables.LakeTable, name, dying(getattr(tables.LakeTable, name), number))
    JournalReader._delete = dying(JournalReader._delete, number)
    lake = writer.LakeWriter(
        files=writer.Files(
            lake=folder / "lake", place=folder / "lake" / "writer.json",
            condition=folder / "condition.json", lock=folder / "lock",
        ),
        journal=JournalReader(folder / "journals"),
        ledger=open_ledger(f"sqlite:///{folder / 'ledger.db'}"),
        clock=time.time, new_slot=lambda: os.urandom(8).hex(), keep=1e9, batch_records=9,
    )
    while lake.cycle():
        pass

# Each run is a process of its own, forked before any of them has used the lake.
for line in sys.stdin:
    child = os.fork()
    if not child:
        run(int(line))
        os._exit(0)
    _, status = os.waitpid(child, 0)
    print(os.waitstatus_to_exitcode(status), flush=True)
"""


@pytest.mark.timeout(400)
def test_a_death_at_any_step_neither_loses_nor_doubles(
    lake: Lake, inference: Inference, feedback: Feedback, mirror: Mirror
):
    command = [sys.executable, "-c", DYING, str(lake.folder.parent)]
    sent = 0
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as dying:
        assert dying.stdin
        assert dying.stdout

        def run(step: int) -> int:
            assert dying.stdin
            assert dying.stdout
            dying.stdin.write(f"{step}\n")
            dying.stdin.flush()
            return int(dying.stdout.readline())

        for step in range(1, 52):
            for _ in range(3):
                lake.append(inference(sent), feedback(sent), mirror(sent))
                sent += 1
            lake.decide(f"d{step:05d}")
            if step % 5 == 0:
                lake.keeper_read_all()
            ended = run(step)
            assert ended in {0, 9}
        assert run(0) == 0
        dying.stdin.close()
    assert lake.ids("inferences") == [f"i{number:05d}" for number in range(sent)]
    assert lake.ids("feedback") == [f"f{number:05d}" for number in range(sent)]
    assert lake.ids("mirrors") == [f"m{number:05d}" for number in range(sent)]
    assert lake.query("SELECT sum(requests) FROM minutes") == [(sent,)]
    assert lake.ids("decisions") == [f"d{step:05d}" for step in range(1, 52)]


KILLED = DYING.split("# Each run", maxsplit=1)[0] + "\nwhile True:\n    run(0)\n"


@pytest.mark.long
@pytest.mark.timeout(600)
def test_random_kills_neither_lose_nor_double(
    lake: Lake, inference: Inference, feedback: Feedback, mirror: Mirror
):
    draw = random.Random(os.environ.get("SEED") or time.time_ns())
    command = [sys.executable, "-c", KILLED, str(lake.folder.parent)]
    lake.worker.close()
    lake.worker = JournalWriter(lake.journals, "w1", 10**9, segment_bytes=20_000)
    sent = 0
    for kill in range(25):
        with subprocess.Popen(command) as writer:
            end = time.monotonic() + (1.0 + draw.random() * 4 if kill else 8.0)
            while time.monotonic() < end:
                lake.append(inference(sent), feedback(sent), mirror(sent))
                sent += 1
                if sent % 50 == 0:
                    lake.keeper_read_all()
                time.sleep(draw.random() * 0.01)
            writer.send_signal(signal.SIGKILL)
    lake.now = time.time()
    lake.restart()
    lake.drain()
    assert lake.ids("inferences") == [f"i{number:05d}" for number in range(sent)]
    assert lake.ids("feedback") == [f"f{number:05d}" for number in range(sent)]
    assert lake.ids("mirrors") == [f"m{number:05d}" for number in range(sent)]
    assert lake.query("SELECT sum(requests) FROM minutes") == [(sent,)]
