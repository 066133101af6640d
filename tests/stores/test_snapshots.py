"""Published snapshots: the highest fence counts, whatever is written when."""

from __future__ import annotations

from pathlib import Path

import pytest

from shipworthy.errors import Unavailable
from shipworthy.stores.snapshots import SnapshotFolder, newest_fence, newest_snapshot


def newest(folder: Path) -> bytes:
    found = newest_snapshot(folder)
    assert found is not None
    return found.read_bytes()


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_the_first_publication_of_a_term_removes_those_before(tmp_path: Path) -> None:
    first, second = SnapshotFolder(tmp_path), SnapshotFolder(tmp_path)
    assert first.newest() == 0
    first.publish(9, b"a")
    first.publish(9, b"b")
    assert newest(tmp_path) == b"b"
    second.publish(10, b"c")
    assert names(tmp_path) == ["00000000000000000010"]
    assert second.newest() == newest_fence(tmp_path) == 10


def test_what_a_paused_keeper_writes_late_is_not_the_newest(tmp_path: Path) -> None:
    paused, other = SnapshotFolder(tmp_path), SnapshotFolder(tmp_path)
    paused.publish(1, b"before")
    other.publish(2, b"after")
    paused.publish(1, b"late")
    assert newest(tmp_path) == b"after"
    other.publish(2, b"again")
    assert newest(tmp_path) == b"again"
    third = SnapshotFolder(tmp_path)
    third.publish(3, b"third")
    assert names(tmp_path) == [f"{3:020d}"]


def test_what_died_half_written_goes_with_the_next_term(tmp_path: Path) -> None:
    (tmp_path / f".{7:020d}.0a1b2c3d").write_bytes(b"half")
    (tmp_path / f".{9:020d}.0a1b2c3d").write_bytes(b"under way")
    (tmp_path / "notes.txt").write_bytes(b"somebody's")
    assert newest_snapshot(tmp_path) is None
    SnapshotFolder(tmp_path).publish(8, b"x")
    assert names(tmp_path) == [f".{9:020d}.0a1b2c3d", f"{8:020d}", "notes.txt"]


def test_only_names_of_terms_count(tmp_path: Path) -> None:
    for name in ("9" * 19, "9" * 21, "٣" * 20, "x" * 20, f"{5:020d}.new"):
        (tmp_path / name).write_bytes(b"no")
    assert newest_fence(tmp_path) == 0
    assert newest_fence(tmp_path / "nowhere") == 0


def test_a_folder_that_can_not_be_used_is_one_clear_sentence(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"")
    with pytest.raises(Unavailable, match="check its permissions"):
        newest_fence(file)
    with pytest.raises(Unavailable, match="can't write"):
        SnapshotFolder(tmp_path / "gone").publish(1, b"x")


def test_what_can_not_be_removed_hinders_no_publication(tmp_path: Path) -> None:
    (tmp_path / f"{1:020d}").mkdir()
    SnapshotFolder(tmp_path).publish(2, b"x")
    assert newest(tmp_path) == b"x"
