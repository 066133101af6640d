"""Going up: is the candidate not worse than stable by more than a margin?

A confidence sequence for p_candidate - p_stable, the difference of mean losses in [0, 1], that can
be looked at after every outcome. For each limit δ on a grid it bets against the null hypothesis
"p_candidate - p_stable >= δ" with a test martingale; what has lost 1/α times its stake is rejected.

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
# Two bettors a limit share the stake. The first takes both arms for equal, which is best when they
# are; the second lets each arm's own mean pull away from the common one as its units outgrow this
# number, which is better when the candidate really differs.
_PULLS = (math.inf, 300.0)
# Estimates are renewed when units or losses have grown by this factor and this number, not at each
# outcome: they hardly move, and in between outcomes without loss need only be counted.
_UNITS_GROWTH, _UNITS_STEP = 1.1, 10.0
_LOSS_GROWTH, _LOSS_STEP = 1.05, 1.0


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
        candidate_basis: The candidate's part of what the current bets were estimated from.
        stable_basis: Stable's part of it.
        clean_candidate: Candidate units without loss since the last renewal.
        clean_stable: Stable units without loss since the last renewal.

    """

    weight: float
    margin: float
    limits: tuple[float, ...]
    logs: tuple[float, ...]
    candidate: ArmLosses = ArmLosses()
    stable: ArmLosses = ArmLosses()
    candidate_basis: ArmLosses = ArmLosses()
    stable_basis: ArmLosses = ArmLosses()
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
        return cls(weight, margin, limits, (0.0,) * (len(limits) * len(_PULLS)))

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
        bets = self._bets()
        logs = [log + bet.gain(loss, candidate) for log, bet in zip(self.logs, bets, strict=True)]
        return self._grown(
            tuple(logs),
            self.candidate.plus(1, loss) if candidate else self.candidate,
            self.stable if candidate else self.stable.plus(1, loss),
            self.clean_candidate,
            self.clean_stable,
        )

    def observe_clean(self, candidate: int, stable: int) -> NonInferiority:
        """Add a batch of units without loss, the usual case: the same as one by one, but faster.

        The bets stay as they are for the whole batch, which is valid for any batch; one of more
        than a tenth of all units so far learns a little later than its units one by one would.

        Args:
            candidate: Units assigned to the candidate.
            stable: Units assigned to stable.

        """
        return self._grown(
            self.logs,
            self.candidate.plus(candidate),
            self.stable.plus(stable),
            self.clean_candidate + candidate,
            self.clean_stable + stable,
        )

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
        known = "no limit yet" if upper >= 1.0 else f"below {upper:.2%}"
        verdict = "not worse" if upper <= self.margin else "undecided"
        return (
            f"The candidate lost {_share(self.candidate)} and stable {_share(self.stable)}; with "
            f"{1.0 - alpha:.0%} confidence at any time the difference is {known} "
            f"(margin {self.margin:.2%}): {verdict}."
        )

    def _grown(
        self,
        logs: tuple[float, ...],
        candidate: ArmLosses,
        stable: ArmLosses,
        clean_candidate: int,
        clean_stable: int,
    ) -> NonInferiority:
        """Give the state with these totals, its bets renewed when that is due."""
        grown = NonInferiority(
            self.weight,
            self.margin,
            self.limits,
            logs,
            candidate,
            stable,
            self.candidate_basis,
            self.stable_basis,
            clean_candidate,
            clean_stable,
        )
        units = self.candidate_basis.units + self.stable_basis.units
        loss = self.candidate_basis.loss + self.stable_basis.loss
        if (
            candidate.units + stable.units < _UNITS_GROWTH * units + _UNITS_STEP
            and candidate.loss + stable.loss < _LOSS_GROWTH * loss + _LOSS_STEP
        ):
            return grown
        return NonInferiority(
            self.weight,
            self.margin,
            self.limits,
            tuple(grown._all_logs()),
            candidate,
            stable,
            candidate_basis=candidate,
            stable_basis=stable,
        )

    def _bets(self) -> tuple[_Bet, ...]:
        return _bets(self.weight, self.limits, self.candidate_basis, self.stable_basis)

    def _all_logs(self) -> list[float]:
        """Log wealth by limit and bettor, outcomes without loss included."""
        units, others = self.clean_candidate, self.clean_stable
        return [
            log + units * bet.clean_candidate + others * bet.clean_stable
            for log, bet in zip(self.logs, self._bets(), strict=True)
        ]

    def _log_evidence(self) -> list[float]:
        """Log of the mean wealth of the bettors, by limit."""
        logs, bettors = self._all_logs(), len(_PULLS)
        evidence: list[float] = []
        for first in range(0, len(logs), bettors):
            part = logs[first : first + bettors]
            top = max(part)
            mean = math.fsum(math.exp(log - top) for log in part) / bettors
            evidence.append(top + math.log(mean))
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
def _bets(
    weight: float, limits: tuple[float, ...], candidate: ArmLosses, stable: ArmLosses
) -> tuple[_Bet, ...]:
    """Give the bets for each limit and bettor, estimated from what each arm has done so far."""
    loss = _PRIOR_LOSS + candidate.loss + stable.loss
    pooled = loss / (_PRIOR_UNITS + candidate.units + stable.units)
    estimates = [
        (_shrunk(candidate, pooled, pull), _shrunk(stable, pooled, pull)) for pull in _PULLS
    ]
    return tuple(_bet(c, s, limit, weight) for limit in limits for c, s in estimates)


def _shrunk(arm: ArmLosses, pooled: float, pull: float) -> float:
    if math.isinf(pull):
        return pooled
    return (pull * pooled + arm.loss) / (pull + arm.units)


def _bet(candidate: float, stable: float, limit: float, weight: float) -> _Bet:
    """Bet that the means are `candidate` and `stable`, against "they differ by at least `limit`".

    An estimate within the null hypothesis stakes nothing.
    """
    if candidate >= stable + limit:
        return _Bet(0.5, 0.0, 0.5, 0.0, 0.0, 0.0)
    # The projection (s+limit, s) is where the derivative of the weighted divergence, written
    # without its denominators, changes sign. It lies between the two estimates.
    low, high = max(candidate - limit, 0.0), min(stable, 1.0 - limit)
    for _ in range(60):
        s = (low + high) / 2.0
        c = s + limit
        pull_up = (1.0 - weight) * (stable - s) * c * (1.0 - c)
        if weight * (c - candidate) * s * (1.0 - s) < pull_up:
            low = s
        else:
            high = s
    s = (low + high) / 2.0
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


def _share(arm: ArmLosses) -> str:
    mean = arm.mean
    return "nothing on 0 units" if mean is None else f"{mean:.3%} on {arm.units:,} units"
