"""Confidence intervals against scipy's and their own limits."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest, norm

from shipworthy.domain.statistics import normal_interval, wilson_interval

confidences = st.floats(1e-6, 1 - 1e-9)


@given(st.integers(1, 5_000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_is_scipys(hits_of: tuple[int, int]) -> None:
    hits, n = hits_of
    expected = binomtest(hits, n).proportion_ci(0.95, "wilson")
    interval = wilson_interval(hits / n, n)
    assert interval.low == pytest.approx(expected.low, abs=1e-9)
    assert interval.high == pytest.approx(expected.high, abs=1e-9)


@given(st.floats(0, 1), st.floats(1, 1e9), confidences)
def test_wilson_holds_its_value_and_stays_within_bounds(
    value: float, n: float, confidence: float
) -> None:
    interval = wilson_interval(value, n, confidence)
    assert 0 <= interval.low <= value <= interval.high <= 1


@given(confidences)
def test_normal_is_scipys(confidence: float) -> None:
    interval = normal_interval(3.0, 2.0, confidence)
    assert interval.high - 3.0 == pytest.approx(2.0 * norm.isf((1 - confidence) / 2), abs=1e-8)
    assert 3.0 - interval.low == pytest.approx(interval.high - 3.0)


def test_no_error_is_no_width() -> None:
    assert normal_interval(0.5, 0.0).low == normal_interval(0.5, 0.0).high == 0.5


@pytest.mark.parametrize(
    ("value", "n", "confidence"),
    [(1.1, 10, 0.95), (-0.1, 10, 0.95), (math.nan, 10, 0.95), (0.5, 0, 0.95), (0.5, 10, 1.0)],
)
def test_wilson_refuses_what_is_no_proportion(value: float, n: float, confidence: float) -> None:
    with pytest.raises(ValueError, match=r".+"):
        wilson_interval(value, n, confidence)


@pytest.mark.parametrize(("error", "confidence"), [(-1.0, 0.95), (math.nan, 0.95), (1.0, 0.0)])
def test_normal_refuses_what_is_no_error(error: float, confidence: float) -> None:
    with pytest.raises(ValueError, match=r".+"):
        normal_interval(0.0, error, confidence)
