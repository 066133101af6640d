"""The absolute breaker: half of the candidate's recent units fail, and not because everything does.

It needs no error rate and no history, so it works from the first requests on. It looks at distinct
units, for one client that retries is one witness; and it compares with what stable answered *in
between*, for an outage that both arms share is no reason to go back. Above a weight of about 80%
too little of stable is seen in between to tell the two apart; the error guardrail then decides.
"""

from __future__ import annotations

import math

import msgspec

_STABLE_PER_GAP = 2  # stable units remembered between two of the candidate's


class BreakerRule(msgspec.Struct, frozen=True):
    """When the breaker trips.

    Attributes:
        window: How many of the candidate's newest distinct units are looked at.
        failures: At least so many of them must have failed.
        chance: Largest probability that arms which fail alike would show such a difference
            (Fisher's exact test, one-sided). At 1 the comparison is off: for a candidate that
            has no stable arm beside it.

    Raises:
        ValueError: The rule could never trip, or always would.

    """

    window: int = 20
    failures: int = 10
    chance: float = 1e-5

    def __post_init__(self) -> None:
        if not (1 <= self.failures <= self.window and 0.0 < self.chance <= 1.0):
            msg = f"a breaker needs 1 <= failures <= window and a chance in (0, 1], not {self}"
            raise ValueError(msg)


class UnitOutcome(msgspec.Struct, frozen=True):
    """A unit's newest outcome: `unit` is `None` for a request without one, `turn` orders them."""

    unit: str | None
    failed: bool
    turn: int


class BreakerReading(msgspec.Struct, frozen=True):
    """What the breaker says now; `explanation` is one sentence for people."""

    candidate_units: int
    candidate_failures: int
    stable_units: int
    stable_failures: int
    chance: float
    tripped: bool
    explanation: str


class BreakerWindow(msgspec.Struct, frozen=True):
    """The newest outcomes of distinct units of the candidate, and of stable in the same time.

    Between two candidate units at most two of stable are kept, so that both arms are looked at
    over the same stretch of time whatever their weights are.

    Attributes:
        candidate: Newest last; one entry for each unit, a unit's newest outcome replaces its older.
        stable: The same for stable.
        turn: How many outcomes of the candidate have been seen.
        rule: When to trip.

    """

    rule: BreakerRule = BreakerRule()
    candidate: tuple[UnitOutcome, ...] = ()
    stable: tuple[UnitOutcome, ...] = ()
    turn: int = 0

    def observe(self, unit: str | None, failed: bool, candidate: bool) -> BreakerWindow:  # noqa: FBT001
        """Add the outcome of one request.

        Args:
            unit: Whom the split is sticky to, or `None`: the request is then a unit of its own.
            failed: Whether the release failed (outcome class *failure*).
            candidate: Whether the request was assigned to the candidate.

        """
        if candidate:
            return self._with_candidate(unit, failed=failed)
        return self._with_stable(unit, failed=failed)

    def read(self) -> BreakerReading:
        """Judge the window."""
        bad = sum(outcome.failed for outcome in self.candidate)
        stable_bad = sum(outcome.failed for outcome in self.stable)
        units, others = len(self.candidate), len(self.stable)
        chance = 1.0
        if bad >= self.rule.failures:
            chance = fisher_tail(bad, units, stable_bad, others)
        tripped = bad >= self.rule.failures and chance <= self.rule.chance
        explanation = (
            f"{bad} of the candidate's last {units} units failed and {stable_bad} of {others} of "
            f"stable's in the same time: {'broken' if tripped else 'not broken'}."
        )
        return BreakerReading(units, bad, others, stable_bad, chance, tripped, explanation)

    @property
    def tripped(self) -> bool:
        """Whether the candidate must be rolled back at once."""
        return self.read().tripped

    def _with_candidate(self, unit: str | None, *, failed: bool) -> BreakerWindow:
        turn = self.turn + 1
        kept = (*_without(self.candidate, unit), UnitOutcome(unit, failed, turn))
        kept = kept[-self.rule.window :]
        # Stable's outcomes from before the window say nothing about the time of the window.
        since = kept[0].turn - 1
        stable = tuple(outcome for outcome in self.stable if outcome.turn >= since)
        return BreakerWindow(self.rule, kept, stable, turn)

    def _with_stable(self, unit: str | None, *, failed: bool) -> BreakerWindow:
        kept = _without(self.stable, unit)
        gap = len(kept)  # where this gap's outcomes begin: they are the newest
        while gap and kept[gap - 1].turn == self.turn:
            gap -= 1
        if len(kept) - gap >= _STABLE_PER_GAP:
            kept = kept[:gap] + kept[gap + 1 :]
        stable = (*kept, UnitOutcome(unit, failed, self.turn))
        return BreakerWindow(self.rule, self.candidate, stable, self.turn)


def fisher_tail(hits: int, n: int, other_hits: int, other_n: int) -> float:
    """Give the one-sided p-value of Fisher's exact test that the first group is hit more often.

    The probability of at least `hits` of all the hits in the first `n`, all groupings alike.
    """
    total, all_hits = n + other_n, hits + other_hits
    ways = sum(
        math.comb(n, k) * math.comb(other_n, all_hits - k)
        for k in range(hits, min(n, all_hits) + 1)
    )
    return ways / math.comb(total, all_hits)


def _without(outcomes: tuple[UnitOutcome, ...], unit: str | None) -> tuple[UnitOutcome, ...]:
    if unit is None:
        return outcomes
    return tuple([outcome for outcome in outcomes if outcome.unit != unit])
