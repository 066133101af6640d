"""The absolute breaker: quick on a broken candidate, deaf to outages and to bursts."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import fisher_exact

from shipworthy.domain.statistics import BreakerRule, BreakerWindow, fisher_tail


@given(st.integers(0, 20), st.integers(0, 20), st.integers(0, 40), st.integers(0, 40))
def test_fisher_tail_is_the_exact_test(a: int, b: int, c: int, d: int) -> None:
    expected = fisher_exact(np.array([[a, b], [c, d]]), alternative="greater").pvalue
    assert fisher_tail(a, a + b, c, c + d) == pytest.approx(expected, rel=1e-6, abs=1e-12)


@pytest.mark.parametrize("stable_between", [1, 3, 19])
def test_ten_units_that_fail_are_enough(stable_between: int) -> None:
    window = BreakerWindow()
    candidate_units = 0
    while not window.tripped:
        candidate_units += 1
        window = window.observe(f"c{candidate_units}", True, True)
        for other in range(stable_between):
            window = window.observe(f"s{candidate_units}-{other}", False, False)
    assert candidate_units == 10
    assert "10 of the candidate's last 10 units failed" in window.read().explanation


def test_one_bursty_unit_can_not_trip_it() -> None:
    window = BreakerWindow()
    for _ in range(1_000):
        window = window.observe("burst", True, True).observe(None, False, False)
    assert not window.tripped
    assert len(window.candidate) == 1


def test_a_units_newest_outcome_counts() -> None:
    window = BreakerWindow()
    for failed in (True, False):
        for unit in range(12):
            window = window.observe(str(unit), failed, True).observe(None, False, False)
    assert window.read().candidate_failures == 0


def test_requests_without_a_unit_are_units_of_their_own() -> None:
    window = BreakerWindow()
    for _ in range(12):
        window = window.observe(None, True, True).observe(None, False, False)
    assert window.tripped


@pytest.mark.parametrize("weight", [0.01, 0.05, 0.5, 0.95])
@pytest.mark.parametrize("failing", [0.6, 1.0])
def test_a_shared_outage_can_not_trip_it(weight: float, failing: float) -> None:
    rng = np.random.default_rng(1)
    for _ in range(12):
        window = BreakerWindow()
        outage = int(25 / weight)
        for request in range(3 * outage):
            rate = failing if outage <= request < 2 * outage else 0.01
            candidate = bool(rng.random() < weight)
            window = window.observe(str(request), bool(rng.random() < rate), candidate)
            assert not (candidate and window.tripped)


def test_without_stable_the_comparison_can_be_switched_off() -> None:
    window = BreakerWindow(BreakerRule(chance=1.0))
    for unit in range(9):
        window = window.observe(str(unit), True, True)
    assert not window.tripped
    assert window.observe("10", True, True).tripped


@pytest.mark.parametrize("rule", [{"failures": 21}, {"failures": 0}, {"chance": 0.0}])
def test_a_rule_that_can_not_work_is_refused(rule: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="breaker"):
        msgspec.convert(rule, BreakerRule)


@given(st.lists(st.tuples(st.sampled_from([None, *"abcdefgh"]), st.booleans(), st.booleans())))
def test_the_window_stays_small_and_serialises(
    outcomes: list[tuple[str | None, bool, bool]],
) -> None:
    window = BreakerWindow(BreakerRule(window=5, failures=3))
    for unit, failed, candidate in outcomes:
        window = window.observe(unit, failed, candidate)
    assert len(window.candidate) <= 5
    assert len(window.stable) <= 2 * 6
    named = [outcome.unit for outcome in window.candidate if outcome.unit]
    assert len(named) == len(set(named))
    assert msgspec.json.decode(msgspec.json.encode(window), type=BreakerWindow) == window
