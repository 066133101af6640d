"""Going down: is the candidate worse than stable? Evidence that can be looked at after every error.

Only errors carry evidence. Under the null hypothesis (the candidate errs no more often than stable)
an error falls on the candidate with the probability with which its unit was assigned to it, however
often errors come; so a baseline that drifts, doubles or bursts does no harm. The evidence is a test
martingale: by Ville's inequality the chance that it *ever* reaches 1/α on a healthy candidate is at
most α.

Source: Lindon and Malek, "Anytime-Valid Inference for Multinomial Count Data", arXiv 2011.03567.
"""

from __future__ import annotations

import math
from functools import lru_cache

import msgspec

RATIOS = (1.25, 1.5, 2.0, 3.0, 5.0, 8.0, 15.0)
"""The rate ratios candidate/stable that are bet on, in equal parts."""

MAX_WEIGHT = 0.95
"""The largest weight of a guarded candidate: without a stable hold-back nothing can be compared."""

_LOG_RATIOS = tuple(math.log(ratio) for ratio in RATIOS)
_LARGEST_LOG = 690.0  # e^690 is about 1e299: JSON has no infinity


class CountedUnit(msgspec.Struct, frozen=True):
    """What the counted errors of a unit have revealed about its place in the split.

    A unit has one fixed place in [0, 1); at weight w the places below w belong to the candidate.
    Having been counted, the place is known to lie in [`low`, `high`).
    """

    low: float = 0.0
    high: float = 1.0


def counted_share(weight: float, earlier: CountedUnit | None) -> float | None:
    """Give the probability, under the null hypothesis, that this unit's error is the candidate's.

    A unit that was never counted, or a request without a unit (`earlier=None`), counts with
    `weight`. A unit last counted as stable at w₀ counts with (w-w₀)/(1-w₀): only the growth of the
    candidate's lane can have moved it. Where the earlier counts leave no doubt about the arm there
    is nothing to learn and the error is skipped (`None`): a second error at the same weight, a unit
    of the candidate at a larger weight, a unit of stable at a smaller one. A candidate's unit at a
    smaller weight w < w₁ counts with w/w₁. Because the known interval only ever shrinks, weights
    may go up, down and up again.

    Args:
        weight: The candidate's weight in force, from the record's own plan; in (0, 0.95].
        earlier: What is known of the unit, or `None`.

    Raises:
        ValueError: The weight is outside (0, 0.95].

    """
    _check_weight(weight)
    if earlier is None:
        return weight
    if not earlier.low < weight < earlier.high:
        return None
    return (weight - earlier.low) / (earlier.high - earlier.low)


def count_unit(weight: float, earlier: CountedUnit | None, *, candidate: bool) -> CountedUnit:
    """Give what is known of a unit after its error was counted; skipped ones must not come here.

    Args:
        weight: The candidate's weight in force when the error was counted.
        earlier: What was known before, or `None`.
        candidate: Whether the unit was assigned to the candidate.

    """
    known = earlier or CountedUnit()
    if candidate:
        return CountedUnit(known.low, min(weight, known.high))
    return CountedUnit(max(weight, known.low), known.high)


class ErrorGuardrail(msgspec.Struct, frozen=True):
    """Conditional-on-error mixture e-process for "the candidate errs more often than stable".

    For a rate ratio m, the share w of errors that the null hypothesis gives the candidate becomes
    θ = wm/(wm+1-w). A candidate's error multiplies the wealth by θ/w, one of stable's by
    (1-θ)/(1-w). The evidence is the mean wealth over `RATIOS`. One process serves a whole rollout
    and is never reset.

    Attributes:
        logs: Natural logarithm of the wealth, one for each of `RATIOS`.
        candidate_errors: Counted errors of the candidate.
        stable_errors: Counted errors of stable.

    """

    logs: tuple[float, ...] = (0.0,) * len(RATIOS)
    candidate_errors: int = 0
    stable_errors: int = 0

    def observe(self, share: float, candidate: bool) -> ErrorGuardrail:  # noqa: FBT001
        """Count one error.

        Args:
            share: The probability, known before the error, that it is the candidate's; in (0, 1).
                `counted_share` gives it.
            candidate: Whether the error's unit was assigned to the candidate.

        Raises:
            ValueError: The share is outside (0, 1).

        """
        gains = _log_factors(share)[candidate]
        return ErrorGuardrail(
            tuple([log + gain for log, gain in zip(self.logs, gains, strict=True)]),
            self.candidate_errors + candidate,
            self.stable_errors + (not candidate),
        )

    @property
    def log_e(self) -> float:
        """Natural logarithm of the e-value."""
        top = max(self.logs)
        return top + math.log(math.fsum(math.exp(log - top) for log in self.logs) / len(self.logs))

    @property
    def e_value(self) -> float:
        """The evidence against "no worse than stable"; 1 is none. Never infinite."""
        return math.exp(min(self.log_e, _LARGEST_LOG))

    def alarm(self, alpha: float) -> bool:
        """Whether the evidence has reached 1/`alpha`."""
        return self.log_e >= -math.log(alpha)


class ArmCounts(msgspec.Struct, frozen=True):
    """What one arm has been seen to do: units (or requests without one), and failures of them.

    Count both arms over the same time at one weight, that is since the step began. Counts pooled
    over weights would compare stable's mornings with the candidate's evenings.
    """

    requests: int = 0
    failures: int = 0

    @property
    def rate(self) -> float | None:
        """Observed failure rate in [0, 1]; `None` without a request."""
        return self.failures / self.requests if self.requests else None


class GuardrailReading(msgspec.Struct, frozen=True):
    """What a guardrail says now, with the numbers that it rests on.

    Attributes:
        e_value: The evidence that the candidate errs more often than stable.
        limit: The evidence at which it alarms, 1/α.
        candidate_rate: Observed failure rate of the candidate, `None` without requests.
        stable_rate: Observed failure rate of stable, `None` without requests.
        fired: Whether evidence *and* observed harm are large enough to roll back.
        explanation: One sentence for people.

    """

    e_value: float
    limit: float
    candidate_rate: float | None
    stable_rate: float | None
    fired: bool
    explanation: str


def judge_errors(
    guardrail: ErrorGuardrail,
    candidate: ArmCounts,
    stable: ArmCounts,
    alpha: float = 0.01,
    harm_floor: float = 0.001,
) -> GuardrailReading:
    """Judge whether the candidate must be rolled back for its errors.

    Evidence alone does not fire: with enough traffic "3 instead of 1 in a million" is certain and
    harmless, so the observed failure rates must also differ by more than `harm_floor`. The floor
    can only withhold an alarm, so the error rate α stays valid.

    Args:
        guardrail: The evidence so far.
        candidate: What the candidate did since the step began.
        stable: What stable did in the same time.
        alpha: Chance of a false alarm in the whole rollout that this guardrail may spend.
        harm_floor: Smallest difference of failure rates that matters, absolute.

    """
    fails, base = candidate.rate, stable.rate
    excess = (fails or 0.0) - (base or 0.0)
    alarm, harm = guardrail.alarm(alpha), excess > harm_floor
    if alarm and harm:
        verdict = "the candidate fails more often than stable"
    elif alarm:
        verdict = f"the difference is not above the harm floor of {harm_floor:.3%}"
    else:
        verdict = "that is not enough evidence that the candidate is worse"
    limit = 1.0 / alpha
    explanation = (
        f"The candidate failed {candidate.failures:,} of {candidate.requests:,} and stable "
        f"{stable.failures:,} of {stable.requests:,}; over {guardrail.candidate_errors:,} and "
        f"{guardrail.stable_errors:,} counted errors the e-value is {guardrail.e_value:.3g} "
        f"(alarm at {limit:g}): {verdict}."
    )
    return GuardrailReading(
        e_value=guardrail.e_value,
        limit=limit,
        candidate_rate=fails,
        stable_rate=base,
        fired=alarm and harm,
        explanation=explanation,
    )


def detection_limit(p0: float, p1: float, alpha: float, weight: float) -> float:
    """Give the fewest candidate requests, on average, in which any valid test can see a regression.

    ln(1/α) / min over q of KL(p1‖q) + r·KL(p0‖q), where r = (1-w)/w is the number of stable
    requests per candidate request. No test that alarms falsely with probability at most α, at any
    time, does better (Wald's identity with the data-processing inequality).

    Args:
        p0: Failure rate of stable, in (0, 1).
        p1: Failure rate of the candidate, in (0, 1) and not p0.
        alpha: Chance of a false alarm.
        weight: The candidate's share of the traffic, in (0, 1).

    Raises:
        ValueError: An argument is out of its range, or the rates are equal.

    """
    if p0 == p1 or not all(0.0 < value < 1.0 for value in (p0, p1, alpha, weight)):
        msg = f"no limit for rates {p0!r} and {p1!r}, alpha {alpha!r}, weight {weight!r}"
        raise ValueError(msg)
    stable_per_candidate = (1.0 - weight) / weight
    # The sum of divergences is least at the pooled rate.
    pooled = weight * p1 + (1.0 - weight) * p0
    information = bernoulli_kl(p1, pooled) + stable_per_candidate * bernoulli_kl(p0, pooled)
    return -math.log(alpha) / information


def bernoulli_kl(p: float, q: float) -> float:
    """Kullback-Leibler divergence KL(p‖q) of two Bernoulli distributions, in nats; q in (0, 1)."""
    hit = p * math.log(p / q) if p > 0.0 else 0.0
    miss = (1.0 - p) * math.log((1.0 - p) / (1.0 - q)) if p < 1.0 else 0.0
    return hit + miss


def _check_weight(weight: float) -> None:
    if not 0.0 < weight <= MAX_WEIGHT:
        msg = f"a guarded candidate's weight is in (0, {MAX_WEIGHT}], not {weight!r}"
        raise ValueError(msg)


@lru_cache(maxsize=4096)
def _log_factors(share: float) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Log wealth factors by ratio of a stable error and of a candidate error.

    With D = 1+w(m-1), θ/w is m/D and (1-θ)/(1-w) is 1/D.
    """
    if not 0.0 < share < 1.0:
        msg = f"the share of errors due to the candidate is in (0, 1), not {share!r}"
        raise ValueError(msg)
    stable = tuple(-math.log1p(share * (ratio - 1.0)) for ratio in RATIOS)
    candidate = tuple(log + base for log, base in zip(_LOG_RATIOS, stable, strict=True))
    return stable, candidate
