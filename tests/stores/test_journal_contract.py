"""What a journal promises, over every adapter."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from shipworthy.domain.records import FeedbackRecord, InferenceRecord, Record
from shipworthy.ports import JournalReader, JournalWriter

Open = Callable[..., JournalWriter]
Make = Callable[..., InferenceRecord]


def read_all(reader: JournalReader, limit: int = 1_000) -> list[Record]:
    records: list[Record] = []
    cursors: dict[str, int] = {}
    while True:
        more, cursors = reader.read(cursors, limit)
        if not more:
            return records
        records += more


def test_nothing_written_yet(journal_reader: JournalReader):
    assert journal_reader.read({}, 10) == ([], {})
    journal_reader.discard({})


def test_records_come_back_as_written(
    open_writer: Open, journal_reader: JournalReader, record: Make
):
    feedback = FeedbackRecord(
        id="f", at=2.0, inference="i", key="k", kind="preference", name="n", value={"a": [1, None]}
    )
    written = [record(1), feedback, record(2, request=b"\0" * 5, slices={"é": "ü"}, unit="u")]
    writer = open_writer()
    assert [writer.append(each) for each in written] == [True] * 3
    assert read_all(journal_reader) == written


@pytest.mark.parametrize("limit", [1, 7, 1_000])
def test_each_record_is_read_once_and_in_order(
    open_writer: Open, journal_reader: JournalReader, record: Make, limit: int
):
    writer = open_writer(segment_bytes=1_000)
    for number in range(50):
        writer.append(record(number))
    assert read_all(journal_reader, limit) == [record(number) for number in range(50)]


def test_a_reader_resumes_at_its_cursors(
    open_writer: Open, journal_reader: JournalReader, record: Make
):
    writer = open_writer()
    cursors: dict[str, int] = {}
    for number in range(5):
        writer.append(record(number))
        records, cursors = journal_reader.read(cursors, 10)
        assert records == [record(number)]
    assert journal_reader.read(cursors, 10) == ([], cursors)


def test_workers_share_a_limit(open_writer: Open, journal_reader: JournalReader, record: Make):
    busy, calm = open_writer("a"), open_writer("b")
    for number in range(100):
        busy.append(record(number, key="busy"))
    for number in range(5):
        calm.append(record(number, key="calm"))
    records, _ = journal_reader.read({}, 20)
    keys = [each.key for each in records if isinstance(each, InferenceRecord)]
    assert len(keys) == 20
    assert keys.count("calm") == 5


def test_only_what_is_wholly_read_is_discarded(
    open_writer: Open, journal_reader: JournalReader, record: Make
):
    writer = open_writer(segment_bytes=1_000)
    for number in range(30):
        writer.append(record(number))
    journal_reader.discard({})
    records, cursors = journal_reader.read({}, 11)
    journal_reader.discard(cursors)
    more, cursors = journal_reader.read(cursors, 1_000)
    assert records + more == [record(number) for number in range(30)]
    journal_reader.discard(cursors)
    assert journal_reader.read(cursors, 10)[0] == []
    writer.append(record(99))
    assert journal_reader.read(cursors, 10)[0] == [record(99)]
