"""Journals on disk: bounds, damage, full disks, restarts and killed writers."""

from __future__ import annotations

import fcntl
import os
import resource
import shutil
import struct
import subprocess
import sys
import tempfile
import zlib
from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from postgres import wait_for

from shipworthy.domain.records import FeedbackRecord, InferenceRecord, Outcome, Record
from shipworthy.stores import journal
from shipworthy.stores.journal import MAX_RECORD, JournalReader, JournalWriter

Open = Callable[..., JournalWriter]
Make = Callable[..., InferenceRecord]
HEADER = 44
FRAME = 12


def read_all(reader: JournalReader) -> list[Record]:
    records: list[Record] = []
    cursors: dict[str, int] = {}
    for _ in range(100):
        more, cursors = reader.read(cursors, 50)
        records += more
    return records


def segments(folder: Path) -> list[Path]:
    return sorted(folder.iterdir())


@contextmanager
def file_limit(size: int) -> Generator[None]:
    """A disk that takes no file beyond a size: a write across it is short, the next one fails."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def frames(path: Path) -> list[tuple[int, int]]:
    """Begin and end of each frame of an undamaged segment."""
    content, found, offset = path.read_bytes(), [], HEADER
    while offset < len(content):
        length = struct.unpack_from("<4sII", content, offset)[1]
        found.append((offset, offset + FRAME + length))
        offset = found[-1][1]
    return found


class TestWriter:
    def test_one_write_for_each_record(
        self, open_writer: Open, record: Make, monkeypatch: pytest.MonkeyPatch
    ):
        writer = open_writer()
        writer.append(record(0))
        sizes: list[int] = []
        write = os.write
        monkeypatch.setattr(
            os, "write", lambda fd, data: sizes.append(len(data)) or write(fd, data)
        )
        for number in range(3):
            assert writer.append(record(number, request=b"x" * 10_000))
        assert len(sizes) == 3

    def test_segments_are_their_owners_alone_and_sort_by_time(
        self, open_writer: Open, journal_folder: Path, record: Make, monkeypatch: pytest.MonkeyPatch
    ):
        monkeypatch.setattr(journal.time, "time_ns", lambda: 2_000)
        first = open_writer(segment_bytes=500)
        for number in range(4):
            first.append(record(number))
        monkeypatch.setattr(journal.time, "time_ns", lambda: 1_000)  # the clock steps back
        restarted = open_writer()
        restarted.append(record(4))
        names = [path.name for path in segments(journal_folder)]
        assert len(names) > 2
        assert names[-1] == f"{2_000 + len(names) - 1:020d}-w0.journal"
        assert {path.stat().st_mode & 0o777 for path in segments(journal_folder)} == {0o600}
        assert read_all(JournalReader(journal_folder)) == [record(number) for number in range(5)]

    def test_a_restarted_worker_begins_a_segment(
        self, open_writer: Open, journal_folder: Path, record: Make
    ):
        for number in range(3):
            writer = open_writer()
            writer.append(record(number))
            writer.close()
        assert len(segments(journal_folder)) == 3

    @pytest.mark.parametrize("worker", ["", "a/b", "a b", "x" * 65])
    def test_a_worker_has_a_plain_name(self, tmp_path: Path, worker: str):
        with pytest.raises(ValueError, match="worker name"):
            JournalWriter(tmp_path, worker, 1_000)

    def test_journals_are_bounded_together(
        self, open_writer: Open, journal_folder: Path, record: Make
    ):
        limit, segment = 100_000, 16_000
        writers = [open_writer(f"w{n}", limit, segment_bytes=segment) for n in range(2)]
        written = 0
        for number in range(1_000):
            written += writers[number % 2].append(record(number))
        total = sum(path.stat().st_size for path in segments(journal_folder))
        assert limit * 0.9 < total <= limit + 2 * segment // 16
        assert written + sum(writer.dropped["full"] for writer in writers) == 1_000

    def test_space_that_was_freed_is_used_again(
        self, open_writer: Open, journal_folder: Path, record: Make, monkeypatch: pytest.MonkeyPatch
    ):
        clock = [100.0]
        monkeypatch.setattr(journal.time, "monotonic", lambda: clock[0])
        writer = open_writer(max_bytes=5_000, segment_bytes=1_000)
        while writer.append(record()):
            pass
        reader = JournalReader(journal_folder)
        _, cursors = reader.read({}, 1_000)
        reader.discard(cursors)
        assert not writer.append(record())  # has looked just now
        clock[0] += 1.0
        assert writer.append(record())
        assert writer.dropped == {"full": 2}

    def test_what_can_not_be_written_is_counted(self, open_writer: Open, record: Make):
        writer = open_writer(max_bytes=10**9)
        assert not writer.append(record(request=b"x" * (MAX_RECORD + 1)))
        odd = FeedbackRecord(
            id="f", at=1.0, inference="i", key="k", kind="reward", name="n", value={"n": 2**80}
        )
        assert not writer.append(odd)
        assert not writer.append(record(unit="\ud800"))
        assert writer.append(record())
        assert writer.dropped == {"too large": 1, "invalid": 2}

    def test_the_largest_record(self, open_writer: Open, journal_folder: Path, record: Make):
        writer = open_writer()
        room = MAX_RECORD - len(msgspec.msgpack.encode(record(request=b"x" * 70_000))) + 70_000
        large = record(request=b"x" * room)
        assert [writer.append(each) for each in (record(1), large, record(2))] == [True] * 3
        assert read_all(JournalReader(journal_folder)) == [record(1), large, record(2)]

    def test_a_full_disk_takes_back_half_a_record(
        self, open_writer: Open, journal_folder: Path, record: Make
    ):
        writer = open_writer()
        writer.append(record(0))
        (path,) = segments(journal_folder)
        before = path.read_bytes()
        with file_limit(len(before) + 50):
            assert not writer.append(record(1))
            assert not writer.append(record(2))
            assert path.read_bytes() == before
        assert writer.append(record(3))
        assert writer.dropped == {"disk": 2}
        assert read_all(JournalReader(journal_folder)) == [record(0), record(3)]

    @pytest.mark.skipif(os.geteuid() != 0, reason="only root can make a small disk")
    def test_the_last_of_a_disk_is_left_to_those_who_make_room(self, tmp_path: Path, record: Make):
        command = ["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(tmp_path)]
        if subprocess.run(command, check=False, capture_output=True).returncode:
            pytest.skip("no disk can be mounted here")
        writer = JournalWriter(tmp_path / "journals", "w0", 10**9)
        try:
            kept = 0
            while writer.append(record(request=bytes(50_000))):
                kept += 1
            assert kept > 200
            assert writer.dropped == {"disk": 1}
            assert shutil.disk_usage(tmp_path).free > (2 << 20) - 100_000
            # A segment fits into what is left, so it can be copied before it is deleted.
            assert max(path.stat().st_size for path in segments(tmp_path / "journals")) <= 1 << 20
            segments(tmp_path / "journals")[0].unlink()
            wait_for(lambda: writer.append(record(1)))
        finally:
            writer.close()
            subprocess.run(["umount", str(tmp_path)], check=True)

    def test_nothing_follows_a_torn_frame(
        self, open_writer: Open, journal_folder: Path, record: Make, monkeypatch: pytest.MonkeyPatch
    ):
        writer = open_writer()
        writer.append(record(0))

        def refuse(*_: object) -> None:
            raise OSError

        monkeypatch.setattr(os, "ftruncate", refuse)
        with file_limit(segments(journal_folder)[0].stat().st_size + 50):
            assert not writer.append(record(1))
        assert writer.append(record(2))
        assert len(segments(journal_folder)) == 2
        reader = JournalReader(journal_folder)
        assert read_all(reader) == [record(0), record(2)]
        assert reader.skipped == {"torn": 1}

    def test_a_segment_that_can_not_be_begun(
        self, open_writer: Open, journal_folder: Path, record: Make
    ):
        writer = open_writer(segment_bytes=500)
        with file_limit(10):
            assert not writer.append(record(0))
        assert segments(journal_folder) == []
        assert writer.append(record(1))
        assert writer.append(record(2))
        assert read_all(JournalReader(journal_folder)) == [record(1), record(2)]

    def test_a_folder_that_can_not_be_written(
        self, unprivileged: Callable[[], AbstractContextManager[Path]], record: Make
    ):
        with unprivileged() as folder:
            folder.chmod(0o500)
            writer = JournalWriter(folder / "journals", "w0", 10**6)
            assert not writer.append(record())
            folder.chmod(0)
            reader = JournalReader(folder / "journals")
            assert reader.read({"a": 1}, 5) == ([], {"a": 1})
            assert not writer.append(record())
            assert writer.dropped == {"disk": 2}
            assert reader.skipped == {"unreadable": 1}
            folder.chmod(0o700)
            assert writer.append(record())
            segments(folder / "journals")[0].chmod(0)
            assert reader.read({}, 5) == ([], {})
            writer.close()


class TestReader:
    def test_a_write_under_way_is_waited_for(
        self, open_writer: Open, journal_folder: Path, record: Make
    ):
        writer = open_writer()
        writer.append(record(0))
        reader = JournalReader(journal_folder)
        (path,) = segments(journal_folder)
        _, cursors = reader.read({}, 10)
        before = path.stat().st_size
        writer.append(record(1))
        frame = path.read_bytes()[before:]
        for cut in range(len(frame)):
            os.truncate(path, before)
            with path.open("ab") as handle:
                handle.write(frame[:cut])
            assert reader.read(cursors, 10) == ([], cursors)
        with path.open("ab") as handle:
            handle.write(frame[-1:])
        assert reader.read(cursors, 10)[0] == [record(1)]
        assert reader.skipped == {}

    def test_a_killed_writer_leaves_a_torn_end_that_is_passed_over(
        self, open_writer: Open, journal_folder: Path, record: Make
    ):
        script = (
            "import os, signal, sys; from pathlib import Path\n"
            "from shipworthy.domain.records import FeedbackRecord\n"
            "from shipworthy.stores.journal import JournalWriter\n"
            "writer = JournalWriter(Path(sys.argv[1]), 'w0', 10**9)\n"
            "fields = dict(at=1.0, inference='i', key='k', kind='rating', name='n', value=1.0)\n"
            "for number in range(3): writer.append(FeedbackRecord(id=str(number), **fields))\n"
            "os.write(writer._descriptor, writer._marker + b'\\xff' + bytes(15))\n"
            "os.kill(os.getpid(), signal.SIGKILL)\n"
        )
        subprocess.run([sys.executable, "-c", script, str(journal_folder)], check=False)
        open_writer().append(record(9))
        reader = JournalReader(journal_folder)
        assert [each.id for each in read_all(reader)] == ["0", "1", "2", "inference-9"]
        assert reader.skipped == {"torn": 1}
        _, cursors = reader.read({}, 100)
        reader.discard(cursors)
        assert len(segments(journal_folder)) == 1  # the live one stays

    def test_what_a_killed_worker_acknowledged_is_read_exactly_once(self, journal_folder: Path):
        script = (
            "import os, sys; from pathlib import Path\n"
            "from shipworthy.domain.records import FeedbackRecord\n"
            "from shipworthy.stores.journal import JournalWriter\n"
            "writer = JournalWriter(Path(sys.argv[1]), 'w0', 10**9, segment_bytes=5_000)\n"
            "fields = dict(at=1.0, inference='i', key='k', kind='label', name='n', value=1)\n"
            "for number in range(10**6):\n"
            "    assert writer.append(FeedbackRecord(id=str(number), **fields))\n"
            "    os.write(1, b'.')\n"
        )
        command = [sys.executable, "-c", script, str(journal_folder)]
        reader, cursors, found, acknowledged = JournalReader(journal_folder), {}, [], 0
        with subprocess.Popen(command, stdout=subprocess.PIPE) as worker:
            assert worker.stdout
            while acknowledged < 2_000:
                acknowledged += len(os.read(worker.stdout.fileno(), 65_536))
                records, cursors = reader.read(cursors, 1_000)
                found += records
                reader.discard(cursors)
            worker.kill()
            acknowledged += len(worker.stdout.read())
        while records := (answer := reader.read(cursors, 1_000))[0]:
            found, cursors = found + records, answer[1]
        assert [each.id for each in found] == [str(number) for number in range(len(found))]
        assert acknowledged <= len(found) <= acknowledged + 1

    def test_nobody_can_send_a_frame(self, open_writer: Open, journal_folder: Path, record: Make):
        (forged_in, writer) = (open_writer("w1"), open_writer("w0"))
        forged_in.append(record(666))
        other = segments(journal_folder)[0]
        forged = other.read_bytes()[HEADER:]
        other.unlink()
        writer.append(record(1, request=forged * 20))
        writer.append(record(2))
        (path,) = segments(journal_folder)
        content = bytearray(path.read_bytes())
        content[HEADER + 5] ^= 0xFF  # the length: the reader must search inside the first record
        path.write_bytes(content)
        assert read_all(JournalReader(journal_folder)) == [record(2)]

    def test_records_and_fields_of_the_future(
        self, open_writer: Open, journal_folder: Path, record: Make
    ):
        class Novel(msgspec.Struct, tag="novel"):
            at: float

        writer = open_writer()
        grown = msgspec.to_builtins(record(1)) | {"colour": "blue"}
        future: list[Any] = [Novel(1.0), grown, {"type": "inference", "outcome": "sublime"}]
        for each in [record(0), *future]:
            assert writer.append(each)
        reader = JournalReader(journal_folder)
        assert read_all(reader) == [record(0), record(1)]
        assert reader.skipped == {"unknown": 2}

    def test_a_segment_of_a_newer_version_waits_for_a_newer_reader(
        self, open_writer: Open, journal_folder: Path, record: Make
    ):
        writer = open_writer()
        writer.append(record())
        writer.close()
        (path,) = segments(journal_folder)
        fields = b"SWJOURNL" + struct.pack("<H", 2) + b"mark" + b"seed"
        header = (fields + struct.pack("<I", zlib.crc32(fields))) * 2
        path.write_bytes(header + path.read_bytes()[HEADER:])
        reader = JournalReader(journal_folder)
        assert reader.read({}, 10) == ([], {})
        assert reader.read({}, 10) == ([], {})
        reader.discard({})
        assert path.exists()
        assert reader.skipped == {"version": 1}

    def test_a_lost_header(self, open_writer: Open, journal_folder: Path, record: Make):
        writer = open_writer()
        writer.append(record())
        writer.close()
        (path,) = segments(journal_folder)
        path.write_bytes(b"\0" * HEADER + path.read_bytes()[HEADER:])
        (journal_folder / f"{1:020d}-w1.journal").write_bytes(b"SWJO")  # only just being begun
        reader = JournalReader(journal_folder)
        _, cursors = reader.read({}, 10)
        assert cursors == {path.name: path.stat().st_size}
        reader.discard(cursors)
        assert len(segments(journal_folder)) == 1
        assert reader.skipped == {"corrupt": 1}

    def test_damage_across_windows(
        self,
        open_writer: Open,
        journal_folder: Path,
        record: Make,
        monkeypatch: pytest.MonkeyPatch,
    ):
        monkeypatch.setattr(journal, "_WINDOW", 64)
        writer = open_writer()
        for number in range(20):
            writer.append(record(number))
        (path,) = segments(journal_folder)
        begin, end = frames(path)[3]
        content = path.read_bytes()
        path.write_bytes(content[:begin] + b"\0" * (end - begin) + content[end:])
        reader = JournalReader(journal_folder)
        assert read_all(reader) == [record(number) for number in range(20) if number != 3]
        assert reader.skipped == {"corrupt": 1}

    def test_other_files_are_left_alone(self, journal_folder: Path):
        journal_folder.mkdir()
        (journal_folder / "notes.txt").write_text("hello")
        reader = JournalReader(journal_folder)
        assert reader.read({"gone": 5}, 5) == ([], {})
        reader.discard({"notes.txt": 5})
        assert len(segments(journal_folder)) == 1

    def test_only_what_all_have_read_is_discarded(
        self, open_writer: Open, journal_folder: Path, record: Make
    ):
        writer = open_writer(segment_bytes=1_000)
        for number in range(30):
            writer.append(record(number))
        before = segments(journal_folder)
        reader = JournalReader(journal_folder)
        _, behind = reader.read({}, 10)
        _, ahead = reader.read({}, 30)
        gone = reader.discard(ahead, behind)
        assert 0 < gone < len(before) - 1
        assert segments(journal_folder) == before[gone:]
        assert reader.discard(ahead, {}) == 0
        assert reader.discard(ahead, ahead) == len(before) - gone - 1  # the live one stays

    def test_a_segment_whose_worker_died_at_its_birth_is_discarded_once_it_is_old(
        self, open_writer: Open, journal_folder: Path, record: Make
    ):
        journal_folder.mkdir()
        young, old, live = (journal_folder / f"{n:020d}-w.journal" for n in range(3))
        for path in (young, old, live):
            path.write_bytes(b"SWJO")
        for path in (old, live):
            os.utime(path, (1.0, 1.0))
        reader = JournalReader(journal_folder)
        with live.open("rb") as handle:
            fcntl.flock(handle, fcntl.LOCK_EX)
            assert reader.discard({}) == 1
        assert segments(journal_folder) == [young, live]

    def test_nothing_that_came_after_the_last_read_is_discarded(
        self, open_writer: Open, journal_folder: Path, record: Make
    ):
        writer = open_writer()
        writer.append(record(0))
        reader = JournalReader(journal_folder)
        _, cursors = reader.read({}, 10)
        writer.append(record(1))
        writer.close()
        reader.discard(cursors)
        assert reader.read(cursors, 10)[0] == [record(1)]


class TestAge:
    def test_a_record_that_comes_late_begins_another_segment(
        self, open_writer: Open, journal_folder: Path, record: Make, monkeypatch: pytest.MonkeyPatch
    ):
        clock = [100.0]
        monkeypatch.setattr(journal.time, "monotonic", lambda: clock[0])
        writer = open_writer()
        for number in range(4):
            writer.append(record(number))
            clock[0] += journal.SEGMENT_SECONDS * 0.6
        assert len(segments(journal_folder)) == 2
        assert read_all(JournalReader(journal_folder)) == [record(number) for number in range(4)]

    def test_an_idle_worker_ends_an_old_segment(
        self, open_writer: Open, journal_folder: Path, record: Make, monkeypatch: pytest.MonkeyPatch
    ):
        clock = [100.0]
        monkeypatch.setattr(journal.time, "monotonic", lambda: clock[0])
        writer, reader = open_writer(), JournalReader(journal_folder)
        writer.append(record(1))
        _, cursors = reader.read({}, 10)
        writer.rest()
        assert reader.discard(cursors) == 0
        clock[0] += journal.SEGMENT_SECONDS + 1
        writer.rest()
        assert reader.discard(cursors) == 1
        writer.rest()
        assert segments(journal_folder) == []
        assert writer.append(record(2))
        assert read_all(reader) == [record(2)]


class TestReadingAgain:
    @pytest.mark.parametrize("limit", [1, 13, 1_000])
    def test_the_same_records_come_back(
        self, open_writer: Open, journal_folder: Path, record: Make, limit: int
    ):
        writers = [open_writer(name, segment_bytes=2_000) for name in "abc"]
        reader = JournalReader(journal_folder)
        start: dict[str, int] = {}
        for number in range(60):
            writers[number % 3].append(record(number))
            if number % 20 == 19:
                records, end = reader.read(start, limit)
                writers[0].append(record(100))
                assert sorted(r.id for r in reader.read_between(start, end)) == sorted(
                    r.id for r in records
                )
                start = end

    def test_damage_is_passed_in_the_same_way(
        self, open_writer: Open, journal_folder: Path, record: Make
    ):
        writer = open_writer()
        for number in range(10):
            writer.append(record(number))
        (path,) = segments(journal_folder)
        begin, end = frames(path)[3]
        content = path.read_bytes()
        path.write_bytes(content[: begin + 5] + b"\0" * (end - begin - 5) + content[end:])
        reader = JournalReader(journal_folder)
        start: dict[str, int] = {}
        for _ in range(12):
            records, after = reader.read(start, 1)
            assert reader.read_between(start, after) == records
            start = after
        assert reader.read(start, 10)[0] == []
        assert len(reader.read_between({}, start)) == 9

    def test_what_is_gone_is_counted(self, open_writer: Open, journal_folder: Path, record: Make):
        writer = open_writer()
        writer.append(record(1))
        reader = JournalReader(journal_folder)
        _, end = reader.read({}, 10)
        segments(journal_folder)[0].unlink()
        assert reader.read_between({}, end) == []
        assert reader.skipped == {"missing": 1}


def test_big_records_are_read_a_few_at_a_time(
    open_writer: Open, journal_folder: Path, record: Make
):
    writers = [open_writer(name) for name in "ab"]
    for number in range(20):
        writers[number % 2].append(record(number, request=bytes(2_000_000)))
    reader = JournalReader(journal_folder)
    found: list[str] = []
    cursors: dict[str, int] = {}
    while records := (answer := reader.read(cursors, 1_000, max_bytes=10_000_000))[0]:
        assert len(records) <= 7
        found, cursors = found + [each.id for each in records], answer[1]
    assert sorted(found) == sorted(f"inference-{number}" for number in range(20))


def five_records() -> list[InferenceRecord]:
    return [
        InferenceRecord(
            id=str(number),
            at=1.0,
            plan="p",
            model="m",
            revision=1,
            key="k",
            assigned="stable",
            probability=1.0,
            outcome=Outcome.SUCCESS,
            status=200,
            release="m@1",
            request=bytes(range(number * 40)),
        )
        for number in range(5)
    ]


def sample() -> tuple[bytes, list[tuple[int, int]]]:
    with tempfile.TemporaryDirectory() as folder:
        writer = JournalWriter(Path(folder), "w0", 10**6)
        for each in five_records():
            writer.append(each)
        writer.close()
        (path,) = segments(Path(folder))
        return path.read_bytes(), frames(path)


CONTENT, FRAMES = sample()


def survivors(content: bytes, *, live: bool) -> tuple[list[str], JournalReader]:
    """What a reader makes of a segment's content, and of a sound one after it."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        path = folder / f"{1:020d}-w0.journal"
        path.write_bytes(content)
        (folder / f"{2:020d}-w0.journal").write_bytes(CONTENT)
        with path.open("rb") as handle:
            if live:
                fcntl.flock(handle, fcntl.LOCK_EX)
            reader = JournalReader(folder)
            records = read_all(reader)
        assert records[-5:] == five_records()
        return [each.id for each in records[:-5]], reader


@given(cut=st.integers(0, len(CONTENT)), live=st.booleans())
def test_a_cut_loses_only_what_it_cuts(cut: int, live: bool):
    whole = [str(index) for index, (_, end) in enumerate(FRAMES) if end <= cut]
    found, reader = survivors(CONTENT[:cut], live=live)
    assert found == whole
    clean = cut <= HEADER or cut in {end for _, end in FRAMES}
    assert reader.skipped == ({} if clean or live else {"torn": 1})


@given(position=st.integers(0, len(CONTENT) - 1), change=st.integers(1, 255), live=st.booleans())
def test_a_damaged_byte_loses_only_its_own_record(position: int, change: int, live: bool):
    content = bytearray(CONTENT)
    content[position] ^= change
    intact = [str(n) for n, (begin, end) in enumerate(FRAMES) if not begin <= position < end]
    found, reader = survivors(bytes(content), live=live)
    assert found == intact
    last = position >= FRAMES[-1][0]
    assert sum(reader.skipped.values()) == (position >= HEADER and not (last and live))


@given(noise=st.binary(max_size=400), begin=st.integers(0, len(CONTENT)))
def test_noise_never_stops_the_reader(noise: bytes, begin: int):
    found, _ = survivors(CONTENT[:begin] + noise + CONTENT[begin + len(noise) :], live=False)
    if begin >= HEADER:
        touched = range(begin, begin + len(noise))
        intact = [
            str(n)
            for n, (first, end) in enumerate(FRAMES)
            if not touched or end <= touched.start or first >= touched.stop
        ]
        assert set(intact) <= set(found)


def test_a_worker_loads_nothing_heavy():
    script = (
        "import sys, shipworthy.stores.journal\n"
        "sys.exit(bool({'numpy', 'sqlalchemy', 'pydantic'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0
