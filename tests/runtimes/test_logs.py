"""What a process prints, on disks with room and without."""

from pathlib import Path

from shipworthy.runtimes.logs import BoundedLog


def test_a_full_log_is_begun_anew_beside_the_one_before(tmp_path: Path) -> None:
    log = BoundedLog(tmp_path / "logs" / "a.log", limit=10)
    for line in (b"first\n", b"second\n", b"third\n"):
        log.write(line)
    assert log.last_lines(2) == ["second", "third"]
    assert sorted(path.name for path in (tmp_path / "logs").iterdir()) == ["a.log", "a.log.1"]
    log.close()


def test_it_is_for_its_owner_alone(tmp_path: Path) -> None:
    log = BoundedLog(tmp_path / "logs" / "a.log")
    log.write(b"x")
    assert (tmp_path / "logs").stat().st_mode & 0o777 == 0o700
    assert (tmp_path / "logs" / "a.log").stat().st_mode & 0o777 == 0o600
    log.close()


def test_it_goes_on_from_what_an_earlier_life_left(tmp_path: Path) -> None:
    (tmp_path / "a.log").write_bytes(b"12345678\n")
    log = BoundedLog(tmp_path / "a.log", limit=10)
    log.write(b"again\n")
    assert (tmp_path / "a.log.1").read_bytes() == b"12345678\n"
    log.close()


def test_a_disk_that_takes_nothing_stops_nobody(tmp_path: Path) -> None:
    (tmp_path / "a.log").symlink_to("/dev/full")
    log = BoundedLog(tmp_path / "a.log")
    log.write(b"lost\n")
    (tmp_path / "a.log").unlink()
    log.close()


def test_a_folder_that_can_not_be_made_stops_nobody_and_is_tried_again(tmp_path: Path) -> None:
    (tmp_path / "logs").write_bytes(b"in the way")
    log = BoundedLog(tmp_path / "logs" / "a.log")
    log.write(b"lost\n")
    assert log.last_lines(5) == []
    (tmp_path / "logs").unlink()
    log.write(b"kept\n")
    assert log.last_lines(5) == ["kept"]
    log.close()
    log.write(b"too late\n")
    assert log.last_lines(5) == ["kept"]
