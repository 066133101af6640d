"""The snapshot file: what is obeyed, what is refused, and what ends by itself."""

import asyncio
import math
from pathlib import Path

import msgspec
import pytest

from shipworthy.domain.contract import Contract
from shipworthy.domain.plan import Arm, Plan, Snapshot, encode_snapshot
from shipworthy.gateway.snapshot import SnapshotFollower
from shipworthy.stores.snapshots import newest_snapshot

ARM = Arm(
    release="digits@1",
    digest="sha256:1",
    version=1,
    endpoints=(),
    served_model="m",
    contract=Contract(inputs=(), outputs=()),
)


class Following:
    """A follower whose clocks are set by hand."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.path = folder / f"{1:020d}"
        self.wall = 1_000.0
        self.monotonic = 50.0
        self.obeyed: list[Snapshot] = []
        self.refused: list[str] = []
        self.follower = self.restart()

    def restart(self) -> SnapshotFollower:
        self.follower = SnapshotFollower(
            lambda: newest_snapshot(self.folder),
            clock=lambda: self.wall,
            monotonic=lambda: self.monotonic,
            changed=self.obeyed.append,
            refused=self.refused.append,
        )
        return self.follower

    def pass_time(self, seconds: float) -> None:
        self.wall += seconds
        self.monotonic += seconds

    def write(self, *, lease=None, revision=1, fence=1, keeper=1, max_stale=None) -> bool:
        plan = Plan(
            name="digits", model="digits", revision=revision, fence=fence, stable=ARM,
            candidate=ARM, weight=100, lease=lease,
        )  # fmt: skip
        snapshot = Snapshot(
            written=self.wall, plans={"digits": plan}, keys={}, max_stale=max_stale, fence=keeper
        )
        return self.write_bytes(encode_snapshot(snapshot))

    def write_bytes(self, content: bytes) -> bool:
        partial = self.path.with_name("partial")
        partial.write_bytes(content)
        partial.replace(self.path)
        return self.follower.poll()

    @property
    def candidate_lives(self) -> bool:
        assert self.follower.current is not None
        plan = self.follower.current.plans["digits"]
        assert plan.lease is not None
        return self.follower.now_for(plan) < plan.lease


@pytest.fixture
def following(tmp_path):
    return Following(tmp_path)


def test_a_file_is_read_when_it_changes_and_only_then(following):
    assert not following.follower.poll()
    assert following.write()
    assert not following.follower.poll()
    assert following.write(revision=2)
    assert [s.plans["digits"].revision for s in following.obeyed] == [1, 2]


@pytest.mark.parametrize(
    "damage",
    [
        lambda good: b"",
        lambda good: good[: len(good) // 2],
        lambda good: good[:-10] + b"x" + good[-9:],
        lambda good: b"\xff" * 100,
        lambda good: good.replace(b'"format":1', b'"format":2'),
        lambda good: b"0" * 64 + good[64:],
    ],
    ids=["empty", "torn", "altered", "noise", "other_format", "other_checksum"],
)
def test_a_damaged_file_is_refused_once_and_the_old_one_stays(following, damage, caplog):
    following.write()
    good = following.path.read_bytes()
    assert not following.write_bytes(damage(good))
    assert not following.follower.poll()
    assert following.refused == ["unreadable"]
    assert caplog.text.count("is not obeyed") == 1
    assert following.follower.current.plans["digits"].revision == 1
    assert following.write(revision=2)


def test_a_file_that_can_not_be_read_for_now_is_read_once_it_can(following, monkeypatch, caplog):
    following.write()

    def refuse(_: Path) -> bytes:
        raise OSError(24, "Too many open files")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_bytes", refuse)
        assert not following.write(revision=2)
        assert not following.follower.poll()
    assert following.refused == ["unreadable"]
    assert caplog.text.count("is not obeyed") == 1
    assert following.follower.poll()
    assert following.follower.current.plans["digits"].revision == 2


def test_a_file_of_another_shape_with_a_good_checksum_is_refused(following):
    import hashlib

    body = b'{"plans": 3}'
    content = hashlib.sha256(body).hexdigest().encode() + b"\n" + body
    assert not following.write_bytes(content)
    assert following.refused == ["unreadable"]


def test_a_snapshot_that_can_not_be_put_in_force_is_refused(following, caplog):
    following.write()

    def broken(snapshot):
        raise ZeroDivisionError("a bug")

    following.follower._changed = broken
    assert not following.write(revision=2)
    assert following.refused == ["unusable"]
    assert following.follower.current.plans["digits"].revision == 1


def test_a_file_that_vanishes_or_becomes_a_folder_changes_nothing(following, caplog):
    following.write()
    following.path.unlink()
    for _ in range(3):
        assert not following.follower.poll()
    assert caplog.text.count("no snapshot to obey") == 1
    following.path.mkdir()
    assert not following.follower.poll()
    assert following.follower.current is not None


@pytest.mark.parametrize(
    "older",
    [{"keeper": 1}, {"keeper": 2, "fence": 1}, {"keeper": 2, "fence": 2, "revision": 4}],
)
def test_an_older_keeper_or_plan_is_refused(following, older, caplog):
    following.write(keeper=2, fence=2, revision=5)
    assert not following.write(**{"fence": 2, "revision": 5, **older})
    assert following.refused == ["outdated"]
    assert "obeyed" in caplog.text
    assert following.write(keeper=2, fence=2, revision=5)
    assert following.write(keeper=3, fence=3, revision=6)


def test_a_plan_that_was_removed_may_begin_again(following):
    following.write(revision=5)
    following.write_bytes(encode_snapshot(Snapshot(written=0, plans={}, keys={}, fence=1)))
    assert following.write(revision=1)


def test_the_newest_term_is_obeyed_also_by_one_that_starts_just_then(following):
    following.write(keeper=1, revision=5)
    following.path = following.folder / f"{2:020d}"
    assert following.write(keeper=2, revision=6)
    following.path = following.folder / f"{1:020d}"
    assert not following.write(keeper=1, revision=7)
    assert following.refused == []
    following.restart()
    assert following.follower.poll()
    assert following.follower.current.fence == 2


def test_a_damaged_newest_file_gives_no_older_one_its_place(following, caplog):
    following.write(keeper=1)
    following.path = following.folder / f"{2:020d}"
    following.write_bytes(b"torn")
    following.restart()
    assert not following.follower.poll()
    assert following.follower.current is None


def test_a_file_that_goes_while_it_is_read_is_no_fault(following, monkeypatch, caplog):
    following.write(keeper=1)
    monkeypatch.setattr(Path, "read_bytes", lambda path: path.with_name("gone").open("rb").read())
    assert not following.write(keeper=1, revision=2)
    monkeypatch.undo()
    assert following.follower.poll()
    assert following.refused == []


# --- leases -----------------------------------------------------------------------------------


def test_a_lease_ends_when_nobody_renews_it(following):
    following.write(lease=following.wall + 10)
    following.pass_time(9)
    assert following.candidate_lives
    following.write(lease=following.wall + 10, revision=2)
    following.pass_time(9)
    assert following.candidate_lives
    following.pass_time(1)
    assert not following.candidate_lives


def test_a_clock_that_jumps_back_keeps_no_candidate_alive(following):
    following.write(lease=following.wall + 10)
    following.pass_time(5)
    following.wall -= 3_600
    following.pass_time(4)
    assert following.candidate_lives
    following.pass_time(2)
    assert not following.candidate_lives


def test_the_same_lease_read_again_after_a_jump_is_no_renewal(following):
    end = following.wall + 10
    following.write(lease=end)
    following.pass_time(8)
    following.wall -= 3_600
    following.write(lease=end, revision=2)
    following.pass_time(3)
    assert not following.candidate_lives


def test_a_clock_that_jumps_ahead_ends_the_lease_at_once(following):
    following.write(lease=following.wall + 10)
    following.wall += 3_600
    assert not following.candidate_lives
    following.write(lease=following.wall + 10, revision=2)
    assert following.candidate_lives


def test_a_worker_whose_clock_is_late_grants_no_more_than_was_meant(following):
    following.write(lease=following.wall + 10)
    following.wall -= 3_600
    following.restart()
    following.follower.poll()
    following.pass_time(9)
    assert following.candidate_lives
    following.pass_time(2)
    assert not following.candidate_lives


def test_after_a_restart_an_old_lease_is_over(following):
    following.write(lease=following.wall + 10)
    following.pass_time(60)
    following.restart()
    following.follower.poll()
    assert not following.candidate_lives


# --- the age of keys --------------------------------------------------------------------------


def test_keys_are_honoured_for_as_long_as_the_snapshot_says(following):
    assert not following.follower.keys_honoured()
    assert following.follower.age() == math.inf
    following.write(max_stale=60)
    following.pass_time(59)
    assert following.follower.keys_honoured()
    assert following.follower.age() == 59
    following.pass_time(2)
    assert not following.follower.keys_honoured()
    following.write(max_stale=60)
    assert following.follower.keys_honoured()
    following.wall -= 3_600
    following.pass_time(61)
    assert not following.follower.keys_honoured()


def test_without_a_limit_keys_live_on(following):
    following.write()
    following.pass_time(1e9)
    assert following.follower.keys_honoured()


# --- through a worker -------------------------------------------------------------------------


async def test_a_worker_without_a_snapshot_listens_and_says_that_it_is_not_ready(worker):
    await worker.start(publish=False)
    assert (await worker.ask("GET", "/readyz", key=None)).status == 503
    assert (await worker.ask("GET", "/v2/health/ready", key=None)).json == {"ready": False}
    assert (await worker.ask("GET", "/healthz", key=None)).status == 200
    assert (await worker.infer()).status == 503
    worker.publish()
    await asyncio.sleep(0.05)
    assert (await worker.ask("GET", "/readyz", key=None)).status == 200
    assert (await worker.infer()).status == 200


async def test_with_the_keeper_gone_the_worker_goes_back_to_stable_and_serves_on(worker):
    await worker.start(worker.plan(candidate=True, lease=worker.clock() + 30))
    assert (await worker.infer()).headers["x-shipworthy-release"] == "digits@2"
    worker.clock.ahead = 31
    assert (await worker.infer()).headers["x-shipworthy-release"] == "digits@1"
    assert (worker.journal.last.rollout, worker.journal.last.probability) == ("", 1.0)
    await worker.stop()
    await worker.start(publish=False)
    assert (await worker.infer()).headers["x-shipworthy-release"] == "digits@1"
    worker.path.unlink()
    await asyncio.sleep(0.03)
    assert (await worker.infer()).status == 200


async def test_a_torn_file_is_counted_and_the_worker_serves_on(worker):
    await worker.start()
    worker.path.write_bytes(worker.path.read_bytes()[:100])
    await asyncio.sleep(0.05)
    assert (await worker.infer()).status == 200
    assert await worker.metric('shipworthy_gateway_snapshots_refused_total{why="unreadable"}') == 1


async def test_a_plan_that_goes_away_is_not_found(worker):
    await worker.start()
    worker.publish(plans={})
    await asyncio.sleep(0.05)
    assert (await worker.infer()).status == 404


async def test_connections_to_an_endpoint_outlive_a_change_of_plan(worker):
    plan = worker.plan()
    await worker.start(plan)
    await worker.infer()
    worker.publish(msgspec.structs.replace(plan, revision=2))
    await asyncio.sleep(0.03)
    await worker.infer()
    assert worker.journal.last.revision == 2
    assert len(worker.model._tasks) == 1
