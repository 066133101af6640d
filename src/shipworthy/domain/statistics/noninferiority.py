"""Going up: is the candidate not worse than stable by more than a margin?

A confidence sequence for p_candidate - p_stable, the difference of mean losses in [0, 1], that can
be looked at after every outcome. For each limit δ on a grid it bets against the null hypothesis
"p_candidate - p_stable >= δ", with a wealth of 1 to begin with. Where the null hypothesis is true
the wealth ever reaches 1/α with a probability of at most α (Ville's inequality); where it does, δ
is rejected.

A unit's first outcome in a step is (arm, loss): the candidate's with probability w. Let c and s be
estimates made *before* the outcome, and (c°, s°) with c° = s°+δ their projection onto the null, the
pair that minimises w·KL(c‖c°) + (1-w)·KL(s‖s°). Wealth is multiplied by

    1 + (x-c°)(c-c°) / (c°(1-c°))   for a candidate's loss x, and likewise by s, s° for stable's,

which for x in {0, 1} is the likelihood ratio. Being linear in x it needs only the *mean* losses to
obey the null; its expectation is 1 on the whole boundary p_candidate = p_stable+δ and below 1
inside the null. So each outcome may come from another baseline: both arms may drift together.
The growth of the wealth reaches the information in the data as the estimates settle.

Sources: Turner and Grünwald, "Exact anytime-valid confidence intervals for contingency tables and
beyond", arXiv 2203.09785 (projection of the alternative on a convex null, here for one randomised
outcome at a time); Waudby-Smith and Ramdas, "Estimating means of bounded random variables by
betting", arXiv 2010.09686 (linear bets on bounded outcomes, predictable estimates, grid).
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Self

import msgspec

from shipworthy.domain.statistics.guardrail import MAX_WEIGHT

GRID = (0.001, 0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.1, 0.2)
"""The limits δ for which evidence is kept, besides the declared margin; absolute, ascending."""

# Before any outcome both arms are taken to lose 1% of the time, with the weight of ten units.
_PRIOR_LOSS, _PRIOR_UNITS = 0.1, 10.0
# Three bettors share the stake at each limit. The first takes both arms for equal, best when they
# are; the second lets each arm's own mean pull away from the common one as its units outgrow
# `_OWN_PULL`; the third takes them for equal and looks only at the last `_MEMORY` units or so, so
# that an outage which hits both arms costs it little, and is forgotten.
_LOG_STAKES = (math.log(0.45), math.log(0.3), math.log(0.25))
_OWN_PULL = 300.0
_MEMORY = 200.0
_LOG_KEPT = math.log1p(-1.0 / _MEMORY)
# Estimates are renewed when what they rest on has grown (or, if recent, faded) by these factors and
# numbers, not at each outcome: in between, outcomes without loss need only be counted.
_UNITS_GROWTH, _UNITS_STEP = 1.1, 10.0
_LOSS_GROWTH, _LOSS_STEP = 1.05, 1.0
_RECENT_GROWTH, _RECENT_STEP = 1.2, 0.9
_RECENT_FADED, _RECENT_LEAST = 0.8, 0.2


class ArmLosses(msgspec.Struct, frozen=True):
    """What one arm did in a step: how many units it served and the sum of their losses."""

    units: int = 0
    loss: float = 0.0

    @property
    def mean(self) -> float | None:
        """Observed mean loss in [0, 1]; `None` without a unit."""
        return self.loss / self.units if self.units else None

    def plus(self, units: int, loss: float = 0.0) -> ArmLosses:
        """Add `units` with a total loss of `loss`."""
        return ArmLosses(self.units + units, self.loss + loss)


class Basis(msgspec.Struct, frozen=True):
    """What bets are estimated from: the step so far, at the time when they were last renewed."""

    candidate: ArmLosses = ArmLosses()
    stable: ArmLosses = ArmLosses()
    recent: float = 0.0

    def outgrown(self, units: int, loss: float, recent: float) -> bool:
        """Whether both arms' units, losses and recent losses differ enough to estimate anew."""
        return (
            units >= _UNITS_GROWTH * (self.candidate.units + self.stable.units) + _UNITS_STEP
            or loss >= _LOSS_GROWTH * (self.candidate.loss + self.stable.loss) + _LOSS_STEP
            or recent >= _RECENT_GROWTH * self.recent + _RECENT_STEP
            or recent < _RECENT_FADED * self.recent - _RECENT_LEAST
        )


class NonInferiority(msgspec.Struct, frozen=True):
    """Evidence, fresh at each step, that the candidate is not worse than stable by a margin.

    Make one with `start`. Feed each unit's *first* outcome in the step, in order of arrival; a
    request without a unit is its own unit. Weights above one half are as good as those below.

    Attributes:
        weight: Share of the units that the step gives the candidate, in (0, 0.95]. When it
            changes, a new step begins.
        margin: Largest difference p_candidate - p_stable that is still "not worse", absolute.
        limits: The limits δ that are bet against, ascending; the margin is one of them.
        logs: Log wealth at the last renewal plus that of losses since; for each limit, each bettor.
        candidate: All that the candidate did in this step.
        stable: All that stable did in this step.
        recent: Sum of both arms' losses, each fading with the units that came after it.
        basis: What the current bets were estimated from.
        clean_candidate: Candidate units without loss since the last renewal.
        clean_stable: Stable units without loss since the last renewal.

    """

    weight: float
    margin: float
    limits: tuple[float, ...]
    logs: tuple[float, ...]
    candidate: ArmLosses = ArmLosses()
    stable: ArmLosses = ArmLosses()
    recent: float = 0.0
    basis: Basis = Basis()
    clean_candidate: int = 0
    clean_stable: int = 0

    @classmethod
    def start(cls, weight: float, margin: float = 0.01, grid: tuple[float, ...] = GRID) -> Self:
        """Begin a step.

        Args:
            weight: The candidate's weight in this step, in (0, 0.95].
            margin: The declared margin, absolute, in (0, 1).
            grid: Other limits to keep evidence for, so that an upper limit can be reported.

        Raises:
            ValueError: An argument is out of its range.

        """
        if not 0.0 < weight <= MAX_WEIGHT:
            msg = f"a compared candidate's weight is in (0, {MAX_WEIGHT}], not {weight!r}"
            raise ValueError(msg)
        limits = tuple(sorted({*grid, margin}))
        if not 0.0 < limits[0] <= limits[-1] < 1.0:
            msg = f"margins and limits are in (0, 1), not {limits}"
            raise ValueError(msg)
        return cls(weight, margin, limits, _LOG_STAKES * len(limits))

    def observe(self, loss: float, candidate: bool) -> NonInferiority:  # noqa: FBT001
        """Add a unit's first outcome.

        Args:
            loss: 1 for a failure, 0 for a success, or anything between.
            candidate: Whether the unit was assigned to the candidate.

        Raises:
            ValueError: The loss is outside [0, 1].

        """
        if loss == 0.0:
            return self.observe_clean(int(candidate), int(not candidate))
        if not 0.0 < loss <= 1.0:
            msg = f"a loss is in [0, 1], not {loss!r}"
            raise ValueError(msg)
        bets = _bets(self.weight, self.limits, self.basis)
        logs = [log + bet.gain(loss, candidate) for log, bet in zip(self.logs, bets, strict=True)]
        grown = NonInferiority(
            self.weight,
            self.margin,
            self.limits,
            tuple(logs),
            self.candidate.plus(1, loss) if candidate else self.candidate,
            self.stable if candidate else self.stable.plus(1, loss),
            self.recent * math.exp(_LOG_KEPT) + loss,
            self.basis,
            self.clean_candidate,
            self.clean_stable,
        )
        return grown._renewed()

    def observe_clean(self, candidate: int, stable: int) -> NonInferiority:
        """Add a batch of units without loss, the usual case: the same as one by one, but faster.

        The bets stay as they are for the whole batch, which is valid for any batch; one of more
        than a tenth of all units so far learns a little later than its units one by one would.

        Args:
            candidate: Units assigned to the candidate.
            stable: Units assigned to stable.

        """
        grown = NonInferiority(
            self.weight,
            self.margin,
            self.limits,
            self.logs,
            self.candidate.plus(candidate) if candidate else self.candidate,
            self.stable.plus(stable) if stable else self.stable,
            self.recent * math.exp(_LOG_KEPT * (candidate + stable)),
            self.basis,
            self.clean_candidate + candidate,
            self.clean_stable + stable,
        )
        return grown._renewed()

    @property
    def log_e(self) -> float:
        """Log evidence that the difference is below the declared margin."""
        return self._log_evidence()[self.limits.index(self.margin)]

    def upper_limit(self, alpha: float = 0.05) -> float:
        """Give the upper confidence limit of p_candidate - p_stable.

        With probability 1-`alpha` the difference stays below every limit ever reported. It is a
        value of `limits`, or 1 as long as none is rejected.
        """
        # A limit counts only when all larger ones are rejected too: then reporting one that is too
        # small means rejecting the largest true one, so the whole grid costs a single alpha.
        upper, enough = 1.0, -math.log(alpha)
        for limit, evidence in zip(
            reversed(self.limits), reversed(self._log_evidence()), strict=True
        ):
            if evidence < enough:
                break
            upper = limit
        return upper

    def passed(self, alpha: float = 0.05) -> bool:
        """Whether the candidate is shown to be worse by less than the margin, if at all."""
        return self.upper_limit(alpha) <= self.margin

    def explain(self, alpha: float = 0.05) -> str:
        """Say in one sentence where the comparison stands."""
        upper = self.upper_limit(alpha)
        known = "not limited yet" if upper >= 1.0 else f"below {upper:.2%}"
        verdict = "not worse" if upper <= self.margin else "undecided"
        return (
            f"The candidate lost {_share(self.candidate)} and stable {_share(self.stable)}; with "
            f"{1.0 - alpha:.0%} confidence at any time the difference is {known} "
            f"(margin {self.margin:.2%}): {verdict}."
        )

    def _renewed(self) -> NonInferiority:
        """Give the same evidence, with new bets from here on when they are due."""
        units = self.candidate.units + self.stable.units
        loss = self.candidate.loss + self.stable.loss
        if not self.basis.outgrown(units, loss, self.recent):
            return self
        return NonInferiority(
            self.weight,
            self.margin,
            self.limits,
            tuple(self._all_logs()),
            self.candidate,
            self.stable,
            self.recent,
            Basis(self.candidate, self.stable, self.recent),
        )

    def _all_logs(self) -> list[float]:
        """Log wealth by limit and bettor, outcomes without loss included."""
        units, others = self.clean_candidate, self.clean_stable
        bets = _bets(self.weight, self.limits, self.basis)
        return [
            log + units * bet.clean_candidate + others * bet.clean_stable
            for log, bet in zip(self.logs, bets, strict=True)
        ]

    def _log_evidence(self) -> list[float]:
        """Log of the bettors' wealth together, by limit."""
        logs, bettors = self._all_logs(), len(_LOG_STAKES)
        evidence: list[float] = []
        for first in range(0, len(logs), bettors):
            part = logs[first : first + bettors]
            top = max(part)
            evidence.append(top + math.log(math.fsum(math.exp(log - top) for log in part)))
        return evidence


class _Bet(msgspec.Struct, frozen=True):
    """What one bettor stakes at one limit: an outcome multiplies wealth by 1 + slope*(loss-centre).

    `clean_candidate` and `clean_stable` are the log factors of outcomes without loss.
    """

    candidate_centre: float
    candidate_slope: float
    stable_centre: float
    stable_slope: float
    clean_candidate: float
    clean_stable: float

    def gain(self, loss: float, candidate: bool) -> float:  # noqa: FBT001
        """Log wealth factor of one outcome."""
        if candidate:
            return math.log1p(self.candidate_slope * (loss - self.candidate_centre))
        return math.log1p(self.stable_slope * (loss - self.stable_centre))


@lru_cache(maxsize=512)
def _bets(weight: float, limits: tuple[float, ...], basis: Basis) -> tuple[_Bet, ...]:
    """Give the bets for each limit and bettor."""
    candidate, stable = basis.candidate, basis.stable
    units = candidate.units + stable.units
    pooled = (_PRIOR_LOSS + candidate.loss + stable.loss) / (_PRIOR_UNITS + units)
    remembered = _MEMORY * -math.expm1(_LOG_KEPT * units)
    recent = (_PRIOR_LOSS + basis.recent) / (_PRIOR_UNITS + remembered)
    estimates = (
        (pooled, pooled),
        tuple(
            (_OWN_PULL * pooled + arm.loss) / (_OWN_PULL + arm.units) for arm in (candidate, stable)
        ),
        (recent, recent),
    )
    return tuple(_bet(c, s, limit, weight) for limit in limits for c, s in estimates)


def _bet(candidate: float, stable: float, limit: float, weight: float) -> _Bet:
    """Bet that the means are `candidate` and `stable`, against "they differ by at least `limit`".

    An estimate within the null hypothesis stakes nothing.
    """
    if candidate >= stable + limit:
        return _Bet(0.5, 0.0, 0.5, 0.0, 0.0, 0.0)
    s = _projection(candidate, stable, limit, weight)
    c = s + limit
    candidate_slope = (candidate - c) / (c * (1.0 - c))
    stable_slope = (stable - s) / (s * (1.0 - s))
    return _Bet(
        candidate_centre=c,
        candidate_slope=candidate_slope,
        stable_centre=s,
        stable_slope=stable_slope,
        clean_candidate=math.log1p(-candidate_slope * c),
        clean_stable=math.log1p(-stable_slope * s),
    )


def _projection(candidate: float, stable: float, limit: float, weight: float) -> float:
    """Give stable's part s of the pair (s+limit, s) nearest to the estimates in divergence.

    There the derivative of the weighted divergence changes sign, here without its denominators. It
    does so between the two estimates; Newton's method, kept within the bracket, finds it.
    """
    low, high = max(candidate - limit, 0.0), min(stable, 1.0 - limit)
    s = (low + high) / 2.0
    for _ in range(60):
        c = s + limit
        rise, fall = weight * (c - candidate), (1.0 - weight) * (s - stable)
        c_variance, s_variance = c * (1.0 - c), s * (1.0 - s)
        value = rise * s_variance + fall * c_variance
        if value < 0.0:
            low = s
        else:
            high = s
        slope = weight * s_variance + rise * (1.0 - 2.0 * s)
        slope += (1.0 - weight) * c_variance + fall * (1.0 - 2.0 * c)
        step = s - value / slope if slope > 0.0 else low
        new = step if low < step < high else (low + high) / 2.0
        if abs(new - s) <= 1e-9 * min(s, 1.0 - c):  # the error is about the square of that
            return new
        s = new
    return s


def _share(arm: ArmLosses) -> str:
    mean = arm.mean
    return "nothing on 0 units" if mean is None else f"{mean:.3%} on {arm.units:,} units"
