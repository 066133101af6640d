"""Segments that earlier versions wrote are read for ever: samples of each, which never change."""

from __future__ import annotations

import shutil
from pathlib import Path

import msgspec
import pytest

from shipworthy.domain.records import Record
from shipworthy.stores import journal

SAMPLES = Path(__file__).with_name("samples")
VERSIONS = sorted(int(path.stem.partition("-")[2]) for path in SAMPLES.glob("journal-*.journal"))


def test_each_version_has_a_sample():
    assert list(range(1, journal.VERSION + 1)) == VERSIONS


@pytest.mark.parametrize("version", VERSIONS)
def test_a_segment_of_that_version(version: int, tmp_path: Path):
    shutil.copyfile(SAMPLES / f"journal-{version}.journal", tmp_path / f"{version:020d}-w.journal")
    expected = msgspec.json.decode(
        (SAMPLES / f"journal-{version}.json").read_bytes(), type=list[Record]
    )
    reader = journal.JournalReader(tmp_path)
    records, _ = reader.read({}, 1_000)
    assert records == expected
    assert len(expected) > 10
    assert not reader.skipped
