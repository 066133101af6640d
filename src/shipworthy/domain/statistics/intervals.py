"""Confidence intervals for numbers that come with their sample size or standard error.

Metric rules compare these bounds, not the bare value, with a threshold. They are for one look at
finished results; for evidence that grows while it is watched use a confidence sequence.
"""

from __future__ import annotations

import math

import msgspec


class Interval(msgspec.Struct, frozen=True):
    """A two-sided confidence interval; `low <= high`."""

    low: float
    high: float


def wilson_interval(value: float, n: float, confidence: float = 0.95) -> Interval:
    """Give Wilson's score interval of a proportion.

    It keeps close to its confidence for small samples and for proportions near 0 and 1, where the
    normal interval has no width at all.

    Args:
        value: The observed proportion, in [0, 1].
        n: How many independent outcomes it is the mean of; positive.
        confidence: Two-sided confidence, in (0, 1).

    Raises:
        ValueError: An argument is out of its range.

    Source: Wilson, "Probable Inference, the Law of Succession, and Statistical Inference", 1927.

    """
    if not 0.0 <= value <= 1.0:
        msg = f"a proportion is in [0, 1], not {value!r}"
        raise ValueError(msg)
    if not n > 0.0:
        msg = f"a proportion's interval needs at least one outcome, not n={n!r}"
        raise ValueError(msg)
    z = _two_sided_z(confidence)
    shrink = 1.0 + z * z / n
    centre = (value + z * z / (2.0 * n)) / shrink
    half = z * math.sqrt(value * (1.0 - value) / n + z * z / (4.0 * n * n)) / shrink
    # Rounding must not put an observed 0 or 1 outside its own interval.
    return Interval(max(0.0, min(value, centre - half)), min(1.0, max(value, centre + half)))


def normal_interval(value: float, standard_error: float, confidence: float = 0.95) -> Interval:
    """Give the normal interval of an estimate with a known standard error.

    Args:
        value: The estimate, in any unit.
        standard_error: Its standard error, in the same unit; not negative.
        confidence: Two-sided confidence, in (0, 1).

    Raises:
        ValueError: The standard error is negative or not a number, or the confidence out of range.

    """
    if not standard_error >= 0.0:
        msg = f"a standard error is not negative, not {standard_error!r}"
        raise ValueError(msg)
    half = _two_sided_z(confidence) * standard_error
    return Interval(value - half, value + half)


def _two_sided_z(confidence: float) -> float:
    """Give z with P(|Z| <= z) = `confidence` for a standard normal Z."""
    if not 0.0 < confidence < 1.0:
        msg = f"a confidence is in (0, 1), not {confidence!r}"
        raise ValueError(msg)
    tail = 1.0 - confidence
    # The standard library's inverse normal lives in a module that is slow to import. Newton's
    # method on ln P(|Z| > z), which is concave and falls, converges from any start.
    z = 0.0
    for _ in range(100):
        survival = math.erfc(z / math.sqrt(2.0))
        hazard = math.sqrt(2.0 / math.pi) * math.exp(-z * z / 2.0) / survival
        step = (math.log(survival) - math.log(tail)) / hazard
        z += step
        if abs(step) <= 1e-14 * max(1.0, z):
            break
    return z
