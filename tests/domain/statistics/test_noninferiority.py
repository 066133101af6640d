"""Going up: exact e-process, its error rate under drift, and how many units it takes."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import msgspec
import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from shipworthy.domain.statistics import ArmLosses, NonInferiority

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

weights = st.floats(0.01, 0.95)
pasts = st.lists(st.tuples(st.sampled_from([0.0, 0.0, 0.0, 0.3, 1.0]), st.booleans()), max_size=60)


def _after(state: NonInferiority, past: Sequence[tuple[float, bool]]) -> NonInferiority:
    for loss, candidate in past:
        state = state.observe(loss, candidate)
    return state


def _expected(state: NonInferiority, candidate_mean: float, stable_mean: float) -> float:
    """Expected evidence after one more outcome, over its arm and a Bernoulli loss."""
    total = 0.0
    for candidate, chance, mean in (
        (True, state.weight, candidate_mean),
        (False, 1 - state.weight, stable_mean),
    ):
        for loss, probability in ((1.0, mean), (0.0, 1 - mean)):
            total += chance * probability * math.exp(state.observe(loss, candidate).log_e)
    return total


@given(weights, st.floats(0.001, 0.3), pasts, st.floats(0, 1))
def test_expected_evidence_is_unchanged_on_the_boundary_of_the_null(
    weight: float, margin: float, past: list[tuple[float, bool]], stable_mean: float
) -> None:
    assume(stable_mean + margin <= 1)
    state = _after(NonInferiority.start(weight, margin, grid=()), past)
    expected = _expected(state, stable_mean + margin, stable_mean)
    assert expected == pytest.approx(math.exp(state.log_e), rel=1e-6)


@given(weights, st.floats(0.001, 0.3), pasts, st.floats(0, 1), st.floats(0, 1))
def test_expected_evidence_never_grows_under_the_null(
    weight: float, margin: float, past: list[tuple[float, bool]], stable_mean: float, worse: float
) -> None:
    candidate_mean = stable_mean + margin + worse
    assume(candidate_mean <= 1)
    state = _after(NonInferiority.start(weight, margin, grid=()), past)
    expected = _expected(state, candidate_mean, stable_mean)
    assert expected <= math.exp(state.log_e) * (1 + 1e-6)


@given(weights, pasts, st.floats(0, 1), st.booleans())
def test_a_loss_between_bets_as_much_as_its_mean(
    weight: float, past: list[tuple[float, bool]], loss: float, candidate: bool
) -> None:
    state = _after(NonInferiority.start(weight, 0.01, grid=()), past)
    sides = [math.exp(state.observe(side, candidate).log_e) for side in (0.0, 1.0)]
    between = math.exp(state.observe(loss, candidate).log_e)
    assert between == pytest.approx((1 - loss) * sides[0] + loss * sides[1], rel=1e-9)


@given(weights, pasts, st.integers(0, 9), st.integers(0, 9))
def test_a_small_clean_batch_equals_its_units_one_by_one(
    weight: float, past: list[tuple[float, bool]], candidate: int, stable: int
) -> None:
    start = NonInferiority.start(weight).observe_clean(500, 500)
    state = _after(start, past)
    assume(state.clean_candidate + state.clean_stable + candidate + stable < 20)
    batch = state.observe_clean(candidate, stable)
    single = _after(state, [(0.0, True)] * candidate + [(0.0, False)] * stable)
    assert batch.log_e == pytest.approx(single.log_e)
    assert (batch.candidate, batch.stable) == (single.candidate, single.stable)


@given(weights, pasts)
def test_states_survive_serialisation(weight: float, past: list[tuple[float, bool]]) -> None:
    state = _after(NonInferiority.start(weight), past)
    assert msgspec.json.decode(msgspec.json.encode(state), type=NonInferiority) == state
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(state), type=NonInferiority) == state


def test_nothing_seen_is_nothing_shown() -> None:
    state = NonInferiority.start(0.05)
    assert state.upper_limit() == 1.0
    assert not state.passed()
    assert state.candidate == ArmLosses()
    assert "not limited yet" in state.explain()
    assert "undecided" in state.explain()


@pytest.mark.parametrize("weight", [0.05, 0.5, 0.9])
def test_without_an_error_about_three_hundred_units_do(weight: float) -> None:
    state = NonInferiority.start(weight)
    stable_per_candidate = round((1 - weight) / weight, 6)
    owed = 0.0
    while not state.passed(0.05):
        owed += stable_per_candidate
        state = state.observe_clean(1, int(owed))
        owed -= int(owed)
    assert math.log(20) / 0.01 <= state.candidate.units + 1
    assert state.candidate.units <= 360
    assert state.upper_limit(0.05) <= 0.01
    assert "not worse" in state.explain(0.05)


def test_stable_alone_never_promotes() -> None:
    assert not NonInferiority.start(0.05).observe_clean(0, 1_000_000).passed()


@pytest.mark.parametrize("weight", [0.0, 0.96, math.nan])
def test_a_weight_without_hold_back_is_refused(weight: float) -> None:
    with pytest.raises(ValueError, match="weight"):
        NonInferiority.start(weight)


@pytest.mark.parametrize("loss", [-0.1, 1.1, math.nan])
def test_a_loss_out_of_range_is_refused(loss: float) -> None:
    with pytest.raises(ValueError, match="loss"):
        NonInferiority.start(0.05).observe(loss, True)


@pytest.mark.parametrize("margin", [0.0, 1.0, -0.01])
def test_a_margin_out_of_range_is_refused(margin: float) -> None:
    with pytest.raises(ValueError, match="margin"):
        NonInferiority.start(0.05, margin)


def _ever_passes(
    state: NonInferiority, candidate: NDArray[np.bool_], failed: NDArray[np.bool_], alpha: float
) -> float:
    """Candidate units until it passes; infinite when it never does."""
    block = 20
    for first in range(0, len(candidate), block):
        arms, fails = candidate[first : first + block], failed[first : first + block]
        clean = int((arms & ~fails).sum())
        state = state.observe_clean(clean, int((~arms & ~fails).sum()))
        for arm in arms[fails]:
            state = state.observe(1.0, bool(arm))
        if state.passed(alpha):
            return state.candidate.units
    return math.inf


@pytest.mark.parametrize("weight", [0.05, 0.5])
@pytest.mark.parametrize("drift", [False, True])
def test_a_candidate_at_the_margin_rarely_goes_up(weight: float, drift: bool) -> None:
    rng = np.random.default_rng(5)
    alpha, rollouts, units = 0.2, 80, int(600 / weight)
    base = 0.03 * (1 + np.sin(np.arange(units) / units * 12)) if drift else np.full(units, 0.01)
    wrong = 0
    for _ in range(rollouts):
        candidate = rng.random(units) < weight
        failed = rng.random(units) < base + 0.01 * candidate
        state = NonInferiority.start(weight, grid=())
        wrong += math.isfinite(_ever_passes(state, candidate, failed, alpha))
    assert wrong <= (alpha + 3 * math.sqrt(alpha * (1 - alpha) / rollouts)) * rollouts


def test_a_healthy_candidate_with_one_percent_errors_goes_up() -> None:
    rng = np.random.default_rng(6)
    weight, rollouts = 0.05, 40
    needed: list[float] = []
    for _ in range(rollouts):
        candidate = rng.random(60_000) < weight
        failed = rng.random(60_000) < 0.01
        state = NonInferiority.start(weight, grid=())
        needed.append(_ever_passes(state, candidate, failed, 0.05))
    assert float(np.median(needed)) <= 1_300
    assert float(np.mean(np.isfinite(needed))) >= 0.9


def test_the_upper_limit_narrows_with_evidence() -> None:
    state = NonInferiority.start(0.5)
    limits = [
        (state := state.observe_clean(units, units)).upper_limit() for units in (10, 100, 3_000)
    ]
    assert limits == sorted(limits, reverse=True)
    assert limits[0] == 1.0
    assert limits[-1] <= 0.002


def test_a_shared_outage_delays_but_does_not_end_the_way_up() -> None:
    rng = np.random.default_rng(8)
    needed: list[float] = []
    for _ in range(15):
        candidate = rng.random(20_000) < 0.25
        rate = np.full(20_000, 0.001)
        rate[800:1_300] = 0.9
        state = NonInferiority.start(0.25, grid=())
        needed.append(_ever_passes(state, candidate, rng.random(20_000) < rate, 0.05))
    assert max(needed) < 2_500
