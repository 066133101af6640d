"""The error guardrail: exact martingale, its error rate, the unit rule and the harm floor."""

from __future__ import annotations

import itertools
import math
from typing import TYPE_CHECKING

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shipworthy.domain.statistics import (
    RATIOS,
    ArmCounts,
    CountedUnit,
    ErrorGuardrail,
    count_unit,
    counted_share,
    detection_limit,
    judge_errors,
)

if TYPE_CHECKING:
    from numpy.random import Generator

weights = st.floats(0.001, 0.95)
shares = st.floats(1e-6, 1 - 1e-6)


@given(shares, st.lists(st.booleans(), max_size=30))
def test_an_error_leaves_the_expected_evidence_unchanged(share: float, past: list[bool]) -> None:
    before = ErrorGuardrail()
    for candidate in past:
        before = before.observe(0.3, candidate)
    expected = share * before.observe(share, True).e_value
    expected += (1 - share) * before.observe(share, False).e_value
    assert expected == pytest.approx(before.e_value, rel=1e-9)


def test_factors_are_those_of_the_source() -> None:
    share = 0.05
    for index, ratio in enumerate(RATIOS):
        theta = share * ratio / (share * ratio + 1 - share)
        up = ErrorGuardrail().observe(share, True).logs[index]
        down = ErrorGuardrail().observe(share, False).logs[index]
        assert up == pytest.approx(math.log(theta / share))
        assert down == pytest.approx(math.log((1 - theta) / (1 - share)))


def test_long_evidence_is_stable_and_finite() -> None:
    state = ErrorGuardrail()
    for _ in range(5_000):
        state = state.observe(0.05, True)
    assert math.isfinite(state.e_value)
    assert state.alarm(1e-100)
    for _ in range(200_000):
        state = state.observe(0.05, False)
    assert state.e_value == 0.0
    assert math.isfinite(state.log_e)
    assert (state.candidate_errors, state.stable_errors) == (5_000, 200_000)


@pytest.mark.parametrize("share", [0.0, 1.0, -0.1, 1.1, math.nan])
def test_a_share_that_is_no_probability_is_refused(share: float) -> None:
    with pytest.raises(ValueError, match="share"):
        ErrorGuardrail().observe(share, True)


@pytest.mark.parametrize("weight", [0.0, 0.951, 1.0, -1.0, math.nan])
def test_a_weight_without_hold_back_is_refused(weight: float) -> None:
    with pytest.raises(ValueError, match="weight"):
        counted_share(weight, None)


def test_the_unit_rule() -> None:
    assert counted_share(0.05, None) == 0.05
    stable = count_unit(0.05, None, candidate=False)
    assert counted_share(0.05, stable) is None
    assert counted_share(0.25, stable) == pytest.approx(0.20 / 0.95)
    candidate = count_unit(0.05, None, candidate=True)
    assert counted_share(0.05, candidate) is None
    assert counted_share(0.25, candidate) is None


def test_the_unit_rule_when_the_rollout_steps_back() -> None:
    stable = count_unit(0.25, None, candidate=False)
    assert counted_share(0.05, stable) is None
    candidate = count_unit(0.25, None, candidate=True)
    assert counted_share(0.05, candidate) == pytest.approx(0.2)
    # What was learnt at 5% and 25% stays known whatever the weights did in between.
    between = count_unit(0.25, count_unit(0.05, None, candidate=False), candidate=True)
    assert between == CountedUnit(0.05, 0.25)
    assert counted_share(0.05, between) is None
    assert counted_share(0.50, between) is None
    assert counted_share(0.15, between) == pytest.approx(0.5)


@given(st.floats(0, 1, exclude_max=True), st.lists(weights, max_size=12))
def test_what_is_known_of_a_unit_is_always_true(place: float, path: list[float]) -> None:
    known: CountedUnit | None = None
    for weight in path:
        share = counted_share(weight, known)
        if share is not None:
            assert 0 < share < 1
            known = count_unit(weight, known, candidate=place < weight)
            assert known.low <= place < known.high
        else:
            # A skip means that the arm is certain already.
            assert known is not None
            assert (place < weight) == (known.high <= weight)


def test_limits_of_the_design() -> None:
    assert math.ceil(detection_limit(0.01, 0.05, 0.01, 0.05)) == 123
    assert round(detection_limit(0.01, 0.02, 0.01, 0.05)) == 1256


@pytest.mark.parametrize("rates", [(0.0, 0.1), (0.1, 0.1), (0.1, 1.0)])
def test_no_limit_where_there_is_nothing_to_tell_apart(rates: tuple[float, float]) -> None:
    with pytest.raises(ValueError, match="no limit"):
        detection_limit(*rates, 0.01, 0.05)


def test_the_harm_floor_withholds_a_certain_but_tiny_harm() -> None:
    state = ErrorGuardrail()
    for _ in range(60):
        state = state.observe(0.5, True)
    tiny = judge_errors(state, ArmCounts(20_000_000, 60), ArmCounts(20_000_000, 0))
    assert state.alarm(0.01)
    assert not tiny.fired
    assert "harm floor" in tiny.explanation
    real = judge_errors(state, ArmCounts(2_000, 60), ArmCounts(2_000, 0))
    assert real.fired
    assert (real.candidate_rate, real.stable_rate, real.limit) == (0.03, 0.0, 100.0)
    assert "60 of 2,000" in real.explanation


def test_harm_without_evidence_does_not_fire() -> None:
    reading = judge_errors(ErrorGuardrail().observe(0.05, True), ArmCounts(3, 1), ArmCounts(40, 0))
    assert not reading.fired
    assert "not enough evidence" in reading.explanation


def test_no_requests_is_no_rate() -> None:
    reading = judge_errors(ErrorGuardrail(), ArmCounts(), ArmCounts())
    assert (reading.candidate_rate, reading.stable_rate, reading.fired) == (None, None, False)


@given(st.lists(st.tuples(shares, st.booleans()), max_size=20))
def test_states_survive_serialisation(errors: list[tuple[float, bool]]) -> None:
    state = ErrorGuardrail()
    for share, candidate in errors:
        state = state.observe(share, candidate)
    assert msgspec.json.decode(msgspec.json.encode(state), type=ErrorGuardrail) == state
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(state), type=ErrorGuardrail) == state
    reading = judge_errors(state, ArmCounts(10, 1), ArmCounts(10, 1))
    assert msgspec.json.decode(msgspec.json.encode(reading), type=type(reading)) == reading


def _ever_alarms(state: ErrorGuardrail, draws: list[bool], share: float, alpha: float) -> bool:
    for candidate in draws:
        state = state.observe(share, candidate)
        if state.alarm(alpha):
            return True
    return False


@pytest.mark.parametrize("weight", [0.05, 0.5])
def test_false_alarms_keep_to_alpha_however_long_one_looks(weight: float) -> None:
    rng = np.random.default_rng(7)
    alpha, rollouts = 0.05, 600
    alarms = sum(
        _ever_alarms(ErrorGuardrail(), (rng.random(600) < weight).tolist(), weight, alpha)
        for _ in range(rollouts)
    )
    # Ville's bound plus three standard errors; the test spends most of it, so it is not vacuous.
    assert 0.01 * rollouts < alarms < (alpha + 3 * math.sqrt(alpha / rollouts)) * rollouts


def test_a_regression_is_found_near_the_physical_limit() -> None:
    rng = np.random.default_rng(11)
    weight, p0, p1 = 0.05, 0.01, 0.05
    share = weight * p1 / (weight * p1 + (1 - weight) * p0)
    errors_per_candidate_request = (weight * p1 + (1 - weight) * p0) / weight
    needed: list[int] = []
    for _ in range(300):
        state = ErrorGuardrail()
        for count in itertools.count(1):
            state = state.observe(weight, bool(rng.random() < share))
            if state.alarm(0.01):
                needed.append(count)
                break
    mean_requests = float(np.mean(needed)) / errors_per_candidate_request
    assert mean_requests < 1.5 * detection_limit(p0, p1, 0.01, weight)


def _bursty_errors(rng: Generator, units: int, bursts: int) -> list[int]:
    """Order of the units' errors: few units send most requests, and their errors come in runs."""
    activity = rng.pareto(1.2, units) + 0.1
    owners = rng.choice(units, size=bursts, p=activity / activity.sum())
    lengths = rng.geometric(0.1, bursts)
    return np.repeat(owners, lengths).tolist()


def _false_alarm_over_steps(rng: Generator, *, by_unit: bool) -> bool:
    state, known = ErrorGuardrail(), dict[int, CountedUnit]()
    places = rng.random(2_000)
    for weight in (0.05, 0.25, 0.1, 0.25, 0.5):  # with a step back on the way
        for unit in _bursty_errors(rng, 2_000, 40):
            earlier = known.get(unit) if by_unit else None
            share = counted_share(weight, earlier)
            if share is None:
                continue
            candidate = bool(places[unit] < weight)
            state = state.observe(share, candidate)
            known[unit] = count_unit(weight, earlier, candidate=candidate)
            if state.alarm(0.05):
                return True
    return False


def test_bursty_sticky_units_over_many_weights_do_not_alarm_too_often() -> None:
    rng = np.random.default_rng(3)
    rollouts = 300
    alarms = sum(_false_alarm_over_steps(rng, by_unit=True) for _ in range(rollouts))
    assert alarms <= (0.05 + 3 * math.sqrt(0.05 / rollouts)) * rollouts
    # Counted by request the same traffic does: the rule is what keeps it honest.
    by_request = sum(_false_alarm_over_steps(rng, by_unit=False) for _ in range(100))
    assert by_request > 20
