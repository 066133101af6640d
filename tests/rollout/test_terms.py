"""Who decides: leases, terms and what a keeper that was paused can still do."""

from __future__ import annotations

import shutil
import tempfile
from itertools import count
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.rollout.conftest import Published, World

from shipworthy.domain.audit import verify
from shipworthy.domain.lifecycle import IntentStatus
from shipworthy.errors import LedgerUnavailable, Unavailable
from shipworthy.rollout.keeper import LEASE_SECONDS, Keeper
from shipworthy.stores.ledger import migrate, open_ledger


def terms(world: World) -> list[int]:
    """The numbers of all terms, as they began."""
    with world.ledger.read() as tx:
        return [int(entry.subject) for entry in tx.audit.entries() if entry.act == "begin term"]


def until(world: World) -> float:
    with world.ledger.read() as tx:
        return tx.terms.current().until


def tick(world: World, keeper: Keeper, after: float = 0.1) -> bool:
    """Let time pass and a keeper take a turn; whether it is in office then."""
    world.now += after
    keeper.tick()
    return keeper.in_office


def test_a_standby_waits_for_the_lease_and_then_takes_over(world: World) -> None:
    first, second = world.keeper, world.new_keeper()
    assert tick(world, first)
    for _ in range(100):
        assert tick(world, first)
        assert not tick(world, second)
    taken = world.now
    while not tick(world, second):
        assert world.now - taken < LEASE_SECONDS + 0.5
    assert world.now - taken > LEASE_SECONDS / 2
    assert not tick(world, first), "it finds the later term"
    assert not tick(world, first)
    assert terms(world) == [1, 2]


def test_a_keeper_that_gives_up_is_followed_at_once(world: World) -> None:
    first, second = world.keeper, world.new_keeper()
    assert tick(world, first)
    first.retire()
    assert not first.in_office
    assert tick(world, second)
    assert terms(world) == [1, 2]


def test_a_standby_gives_nothing_up(world: World) -> None:
    first, second = world.keeper, world.new_keeper()
    tick(world, first)
    tick(world, second)
    second.retire()
    assert tick(world, first)
    assert terms(world) == [1]


def test_whoever_retires_counts_what_is_left_and_takes_over_for_it(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    begin_second(world)
    monkeypatch.setattr("shipworthy.rollout.keeper.BATCH", 20)
    world.keeper.retire()
    world.traffic(50)
    world.keeper = world.new_keeper()
    world.keeper.retire()
    assert assigned(world) == 50
    assert until(world) == 0.0


def test_a_lease_is_renewed_now_and_then_and_not_with_every_turn(world: World) -> None:
    tick(world, world.keeper)
    seen: set[float] = set()
    for _ in range(100):
        tick(world, world.keeper)
        seen.add(until(world))
        assert world.now + LEASE_SECONDS / 2 < until(world)
    assert 8 <= len(seen) <= 11


def test_a_standby_looks_seldom_and_keeps_no_writer_waiting(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    tick(world, world.keeper)
    standby = world.new_keeper()
    looks = 0
    read = world.ledger.read

    def counted():
        nonlocal looks
        looks += 1
        return read()

    monkeypatch.setattr(world.ledger, "read", counted)
    monkeypatch.setattr(world.ledger, "write", None)
    for _ in range(100):
        world.now += 0.01
        standby.tick()
    assert 3 <= looks <= 5


def test_a_turn_that_took_too_long_is_not_kept(world: World) -> None:
    """The other one took over while this one read: it finds that in the writing transaction."""
    begin_second(world)
    slow, other = world.keeper, world.new_keeper()
    world.traffic(200)
    gather = slow.gather

    def stall(records):
        slow.gather = gather
        found = gather(records)
        world.now += LEASE_SECONDS
        other.tick()
        return found

    slow.gather = stall
    published = world.snapshots.count
    slow.tick()
    assert not slow.in_office
    assert other.in_office
    assert world.snapshots.count == published + 1, "the slow one published nothing"
    assert assigned(world) == 200


def test_a_lease_that_ran_out_with_nobody_there_is_still_ours(world: World) -> None:
    tick(world, world.keeper)
    assert tick(world, world.keeper, after=3600)
    assert terms(world) == [1]
    assert until(world) == world.now + LEASE_SECONDS


@pytest.mark.parametrize("jump", [-86_400.0, -10.0, 10.0, 86_400.0])
@pytest.mark.parametrize("first_to_see", [0, 1])
def test_a_clock_that_jumps_costs_one_term_at_most(
    world: World, jump: float, first_to_see: int
) -> None:
    keepers = [world.keeper, world.new_keeper()]
    for _ in range(3):
        for keeper in keepers:
            tick(world, keeper)
    world.now += jump
    for turn in range(80):
        tick(world, keepers[(turn + first_to_see) % 2])
    assert sum(keeper.in_office for keeper in keepers) == 1
    assert len(terms(world)) <= 2
    assert world.now < until(world) <= world.now + LEASE_SECONDS


def test_a_keeper_that_failed_goes_on_from_what_is_committed(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    begin_second(world)
    world.traffic(100)
    with monkeypatch.context() as patch:
        patch.setattr(world.ledger, "write", refuse)
        with pytest.raises(LedgerUnavailable):
            world.tick()
        with pytest.raises(LedgerUnavailable):
            world.tick()
    world.tick()
    assert assigned(world) == 100
    numbers = terms(world)
    assert numbers == sorted(set(numbers))


def refuse():
    raise LedgerUnavailable("away")


def test_an_office_is_not_taken_where_nothing_can_be_published(world: World) -> None:
    """A folder that can't be read may hold a later fence."""

    def unreadable() -> int:
        raise Unavailable("no permission")

    world.snapshots.newest = unreadable
    with pytest.raises(Unavailable):
        world.tick()
    assert terms(world) == []


def test_an_older_ledger_put_back_is_obeyed_all_the_same(world: World) -> None:
    world.apply()
    published = Published()
    published.by_fence[40] = None  # type: ignore[assignment]
    world.snapshots = published
    world.keeper = world.new_keeper()
    world.tick()
    assert terms(world) == [41]
    assert published.newest() == 41


# --- any order of things ----------------------------------------------------------------------


def begin_second(world: World) -> None:
    world.apply()
    assert world.to_production(world.register(1)).status is IntentStatus.DONE
    assert world.to_production(world.register(2)).status is IntentStatus.DONE


def assigned(world: World) -> int:
    with world.ledger.read() as tx:
        return sum(count.assigned for count in tx.traffic.since("digits", 0))


class Pausable:
    """A keeper that can be stopped between its commit and its publication, as by SIGSTOP."""

    def __init__(self, world: World) -> None:
        self._to = world.snapshots
        self._world = world
        self._pausing = False
        self._held: tuple[int, bytes] | None = None
        self.start()

    def start(self) -> None:
        self.keeper = self._world.new_keeper()
        self.keeper.snapshots = self
        self._held = None

    def publish(self, fence: int, content: bytes) -> None:
        if self._pausing:
            self._held = fence, content
        else:
            self._to.publish(fence, content)

    def newest(self) -> int:
        return self._to.newest()

    def tick(self, *, pausing: bool = False) -> None:
        if self._held is None:
            self._pausing = pausing
            self.keeper.tick()

    def retire(self) -> None:
        if self._held is None:
            self._pausing = False
            self.keeper.retire()

    def wake(self) -> None:
        held, self._held = self._held, None
        if held is not None:
            self._to.publish(*held)


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, float]:
    """A ledger in which a rollout has begun, and the time of that."""
    root = tmp_path_factory.mktemp("begun")
    url = f"sqlite:///{root / 'ledger.db'}"
    migrate(url)
    ledger = open_ledger(url)
    world = World(root, ledger)
    begin_second(world)
    world.keeper.retire()
    world.writer.close()
    ledger.close()
    return root / "ledger.db", world.now


ACTIONS = st.one_of(
    st.tuples(st.just("tick"), st.integers(0, 1)),
    st.tuples(st.just("pause"), st.integers(0, 1)),
    st.tuples(st.just("wake"), st.integers(0, 1)),
    st.tuples(st.just("die"), st.integers(0, 1)),
    st.tuples(st.just("retire"), st.integers(0, 1)),
    st.tuples(st.just("pass"), st.sampled_from([0.1, 0.5, 1.0, 3.1, 20.0, -5.0])),
    st.tuples(st.just("ask"), st.integers(1, 120)),
)


@settings(max_examples=40, deadline=None)
@given(actions=st.lists(ACTIONS, max_size=40), bad=st.booleans())
def test_two_keepers_in_any_order_decide_and_count_once(
    begun: tuple[Path, float], actions: list[tuple[str, float]], bad: bool
) -> None:
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        shutil.copy(begun[0], root / "ledger.db")
        with open_ledger(f"sqlite:///{root / 'ledger.db'}") as ledger:
            world = World(root, ledger, now=begun[1], ids=count(1_000_000))
            try:
                live_through(world, actions, bad=bad)
            finally:
                world.writer.close()


def live_through(world: World, actions: list[tuple[str, float]], *, bad: bool) -> None:
    pair = [Pausable(world), Pausable(world)]
    pair[0].tick()
    before, obeyed, asked = len(terms(world)), 0, 0
    for act, value in actions:
        if act == "pass":
            world.now += value
        elif act == "ask":
            world.traffic(int(value), lambda arm, _: bad and arm == "candidate")
            asked += int(value)
        else:
            one = pair[int(value)]
            if act == "tick":
                one.tick()
            elif act == "pause":
                one.tick(pausing=True)
            elif act == "wake":
                one.wake()
            else:
                if act == "retire":
                    one.retire()
                one.start()
        assert world.snapshots.newest() >= obeyed
        obeyed = world.snapshots.newest()
    settle(world, pair)
    assert assigned(world) == asked
    numbers = terms(world)
    assert numbers == list(range(1, len(numbers) + 1))
    assert len(numbers) >= before
    assert world.snapshots.newest() == numbers[-1]
    assert_decided_once(world)


def settle(world: World, pair: list[Pausable]) -> None:
    """Let whoever is there finish."""
    for _ in range(3):
        world.now += LEASE_SECONDS
        for one in pair:
            one.wake()
            one.tick()


def assert_decided_once(world: World) -> None:
    with world.ledger.read() as tx:
        decisions = tx.decisions.list(limit=1_000)
        plan = tx.plans.all()["digits"]
        assert verify(tx.audit.entries()) == []
    causes = [(one.rollout, one.kind, one.text) for one in decisions]
    assert len(causes) == len(set(causes))
    ends = [one.kind for one in decisions if one.kind in {"roll back", "complete"}]
    assert len(ends) <= 1
    assert world.snapshot is not None
    assert world.snapshot.plans["digits"].revision == plan.revision, "the gateway has the newest"
