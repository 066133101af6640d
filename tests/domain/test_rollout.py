"""The rollout state machine: what moves it, what never may, and that it ends."""

from __future__ import annotations

import random

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from shipworthy.domain import rollout as machine
from shipworthy.domain.policy import Policy
from shipworthy.domain.rollout import Observation, RolloutState, RolloutStatus, UnitHistory
from shipworthy.domain.routing import bucket_of

NOW = 1_000.0


def begin(**rollout: object) -> RolloutState:
    policy = Policy.model_validate({"model": "digits", "rollout": rollout})
    return machine.begin(
        id="rol_1",
        model="digits",
        candidate=("sha256:" + "b" * 64, "digits@2"),
        stable=("sha256:" + "a" * 64, "digits@1"),
        policy=policy,
        now=NOW,
    )


def exposed(**rollout: object) -> RolloutState:
    return machine.expose(begin(**rollout), revision=2, now=NOW).state


def observation(
    unit: str | None, state: RolloutState, *, failed: bool, revision: int | None = None
) -> Observation:
    """What the gateway would have recorded for this unit under the rollout's present weight."""
    bucket = bucket_of(state.id, unit) if unit is not None else 0
    return Observation(
        inference=f"inf_{unit}",
        at=NOW,
        revision=state.step_revision if revision is None else revision,
        candidate=bucket < state.weight,
        failed=failed,
        weight=state.weight / 10_000,
        unit=unit,
    )


class Driver:
    """Feeds a rollout from a population of units, as the keeper would."""

    def __init__(self, state: RolloutState, seed: int) -> None:
        self.state = state
        self.units: dict[str, UnitHistory] = {}
        self.random = random.Random(seed)
        self.now = NOW
        self.requests = 0
        self.kinds: list[str] = []

    def send(self, count: int, stable_rate: float, candidate_rate: float) -> None:
        batch: list[Observation] = []
        for _ in range(count):
            unit = f"{self.random.randrange(100_000):016x}"
            seen = observation(unit, self.state, failed=False)
            rate = candidate_rate if seen.candidate else stable_rate
            batch.append(msgspec.structs.replace(seen, failed=self.random.random() < rate))
        self.now += 1
        self.requests += count
        out = machine.step(
            self.state,
            batch,
            self.units,
            now=self.now,
            next_revision=self.state.step_revision + 1,
        )
        self.units.update(out.units)
        self.kinds += [verdict.kind for verdict in out.decisions]
        self.state = out.state


def run(driver: Driver, stable_rate: float, candidate_rate: float, most: int) -> RolloutState:
    while not driver.state.status.ended and driver.requests < most:
        driver.send(200, stable_rate, candidate_rate)
    return driver.state


def test_a_good_candidate_goes_up_step_by_step_to_all_of_the_traffic() -> None:
    driver = Driver(exposed(), seed=1)
    state = run(driver, 0.001, 0.001, most=200_000)
    assert state.status is RolloutStatus.COMPLETED
    assert driver.kinds == ["go up", "go up", "complete"]


def test_a_bad_candidate_is_rolled_back_at_its_first_step() -> None:
    driver = Driver(exposed(), seed=2)
    state = run(driver, 0.01, 0.2, most=200_000)
    assert state.status is RolloutStatus.ROLLED_BACK
    assert state.step == 0
    assert driver.kinds == ["roll back"]
    assert state.weight == 0


def test_a_rollback_reads_as_a_paragraph_with_its_numbers() -> None:
    state = exposed()
    batch = [
        msgspec.structs.replace(
            observation(f"{unit:016x}", state, failed=True), candidate=True, unit=f"{unit:016x}"
        )
        for unit in range(40)
    ]
    out = machine.step(state, batch, {}, now=NOW + 1, next_revision=3)
    (verdict,) = out.decisions
    assert verdict.text.startswith("digits@2 is rolled back at 5% of digits's traffic, after ")
    assert "digits@1 takes everything" in verdict.text
    assert verdict.numbers["deciding_inference"].startswith("inf_")
    assert verdict.numbers["rule"] in {"breaker", "errors"}


def test_a_shared_outage_rolls_nothing_back() -> None:
    driver = Driver(exposed(), seed=3)
    run(driver, 0.8, 0.8, most=20_000)
    assert driver.state.status is RolloutStatus.PROGRESSING


def test_without_evidence_nothing_moves_and_the_step_is_held() -> None:
    state = exposed(step_limit="1h")
    waiting = machine.step(state, [], {}, now=NOW + 3599, next_revision=3)
    assert waiting.state == state
    held = machine.step(state, [], {}, now=NOW + 3600, next_revision=3)
    assert held.state.status is RolloutStatus.HELD
    assert held.state.weight == state.weight
    assert "0 of at least 100 candidate requests" in held.decisions[0].text


def test_a_held_rollout_waits_for_a_person_and_keeps_its_guardrails() -> None:
    driver = Driver(exposed(step_limit="1s"), seed=4)
    driver.now += 10
    driver.send(10, 0.0, 0.0)
    assert driver.state.status is RolloutStatus.HELD
    for _ in range(100):
        driver.send(500, 0.0, 0.0)
    assert driver.state.status is RolloutStatus.HELD
    run(driver, 0.01, 0.5, most=10**6)
    assert driver.state.status is RolloutStatus.ROLLED_BACK


def test_pause_stops_the_way_up_and_resume_goes_on() -> None:
    driver = Driver(exposed(), seed=5)
    driver.state = machine.pause(driver.state, by="ada", reason="demo day").state
    for _ in range(100):
        driver.send(500, 0.0, 0.0)
    assert driver.state.status is RolloutStatus.PAUSED
    assert driver.state.step == 0
    resumed = machine.resume(driver.state, by="ada", reason="", now=driver.now)
    driver.state = resumed.state
    driver.send(1, 0.0, 0.0)
    assert driver.kinds == ["go up"]


def test_only_what_was_assigned_under_the_step_counts_for_going_up() -> None:
    state = exposed()
    old = [observation(f"{unit:016x}", state, failed=False, revision=1) for unit in range(20_000)]
    out = machine.step(state, old, {}, now=NOW + 1, next_revision=3)
    assert out.state.step == 0
    assert out.state.going_up.candidate.units == 0


def test_each_unit_counts_once_in_a_step() -> None:
    state = exposed()
    unit = next(u for u in (f"{i:016x}" for i in range(1000)) if bucket_of(state.id, u) < 500)
    many = [observation(unit, state, failed=True) for _ in range(5_000)]
    out = machine.step(state, many, {}, now=NOW + 1, next_revision=3)
    assert out.state.status is RolloutStatus.PROGRESSING
    assert out.state.guardrail.candidate_errors == 1
    assert out.state.going_up.candidate.units == 1


def test_a_candidate_that_never_answers_exposes_nobody() -> None:
    out = machine.give_up_waiting(begin(), "ImportError", now=NOW + 700)
    assert out.state.status is RolloutStatus.ABORTED
    assert "never took traffic" in out.decisions[0].text


def test_beyond_the_most_units_a_fixed_half_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "MAX_UNITS", 100)
    driver = Driver(exposed(), seed=6)
    for _ in range(4):
        driver.send(200, 0.0, 0.0)
        thin = driver.state.thinning
        driver.units = {u: h for u, h in driver.units.items() if machine.counted(u, thin)}
    assert driver.state.thinning > 0
    assert driver.state.exposed_requests > driver.state.step_candidate.requests


def test_the_state_survives_a_restart_byte_for_byte() -> None:
    driver = Driver(exposed(), seed=7)
    driver.send(2_000, 0.05, 0.05)
    packed = msgspec.msgpack.encode(driver.state)
    assert msgspec.msgpack.decode(packed, type=RolloutState) == driver.state


@given(st.lists(st.tuples(st.integers(0, 300), st.booleans()), max_size=60), st.integers(0, 60))
@settings(max_examples=50)
def test_batches_decide_as_one_by_one(events: list[tuple[int, bool]], cut: int) -> None:
    state = exposed()
    batch = [observation(f"{unit:016x}", state, failed=failed) for unit, failed in events]
    whole = machine.step(state, batch, {}, now=NOW + 1, next_revision=3).state
    first = machine.step(state, batch[:cut], {}, now=NOW + 1, next_revision=3)
    second = machine.step(first.state, batch[cut:], first.units, now=NOW + 1, next_revision=3)
    assert second.state.guardrail == whole.guardrail
    assert second.state.status == whole.status
    assert second.state.exposed_requests == whole.exposed_requests


class AnyOrder(RuleBasedStateMachine):
    """Whatever people and traffic do, in whatever order, some things never happen."""

    def __init__(self) -> None:
        super().__init__()
        self.state = begin(step_limit="30s")
        self.units: dict[str, UnitHistory] = {}
        self.now = NOW
        self.steps_seen = {0}

    def take(self, out: machine.Stepped) -> None:
        before, self.state = self.state, out.state
        assert not (before.status.ended and out.state != before), "an ended rollout moved"
        if out.state != before and before.status is not RolloutStatus.PREPARING:
            assert before.step <= out.state.step <= before.step + 1
        self.units.update(out.units)

    @rule()
    def ready(self) -> None:
        self.take(machine.expose(self.state, revision=2, now=self.now))

    @rule(count=st.integers(0, 3_000), bad=st.sampled_from([0.0, 0.01, 0.6]), seed=st.integers())
    def traffic(self, count: int, bad: float, seed: int) -> None:
        driver = Driver(self.state, seed)
        batch = []
        for _ in range(count):
            seen = observation(f"{driver.random.randrange(3_000):016x}", self.state, failed=False)
            rate = bad if seen.candidate else 0.01
            batch.append(msgspec.structs.replace(seen, failed=driver.random.random() < rate))
        self.now += 1
        self.take(
            machine.step(
                self.state,
                batch,
                self.units,
                now=self.now,
                next_revision=self.state.step_revision + 1,
            )
        )

    @rule(seconds=st.floats(-100, 100))
    def clock_jumps(self, seconds: float) -> None:
        self.now += seconds

    @rule()
    def pause(self) -> None:
        self.take(machine.pause(self.state, by="ada", reason=""))

    @rule()
    def resume(self) -> None:
        self.take(machine.resume(self.state, by="ada", reason="", now=self.now))

    @precondition(lambda self: not self.state.status.ended)
    @rule(kind=st.sampled_from(["abort", "roll back"]))
    def person_ends_it(self, kind: str) -> None:
        self.take(machine.abort(self.state, by="ada", reason="", now=self.now, kind=kind))
        assert self.state.status.ended

    @invariant()
    def weights_are_legal(self) -> None:
        assert 0 <= self.state.weight <= 9_500
        if not self.state.status.exposed:
            assert self.state.weight == 0

    @invariant()
    def completion_needs_proof(self) -> None:
        if self.state.status is RolloutStatus.COMPLETED:
            assert self.state.going_up.passed(self.state.rules.alpha_up)
            assert self.state.step == len(self.state.rules.steps) - 1


TestAnyOrder = AnyOrder.TestCase
TestAnyOrder.settings = settings(max_examples=40, stateful_step_count=25, deadline=None)
