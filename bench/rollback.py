"""How fast a bad candidate comes back, and how often a good one is sent back or held.

Every simulated rollout runs the classes that the keeper runs. "Detection" counts the candidate's
requests until the rollback fires and divides by the physical limit, the fewest that any test with
the same rate of false alarms needs. "False rollbacks" are healthy rollouts of 100,000 requests.
"Promoted" are healthy rollouts that the going-up test lets through 5, 25 and 50%. The threshold
rows are the usual canary rule: five windows in which the candidate's error rate exceeds a limit.
"""

from __future__ import annotations

import math
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from report import Report, argument_parser
from rich.progress import Progress

from shipworthy.domain.statistics import (
    ArmCounts,
    BreakerWindow,
    CountedUnit,
    ErrorGuardrail,
    NonInferiority,
    count_unit,
    counted_share,
    detection_limit,
    judge_errors,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.random import Generator
    from numpy.typing import NDArray

    Bools = NDArray[np.bool_]
    Case = Callable[[Generator], tuple[float, ...]]

WEIGHT = 0.05
STEPS = (0.05, 0.25, 0.50)
ALPHA = 0.01
GUARDRAILS = 5  # errors and four others that share the alpha
HEALTHY_REQUESTS = 100_000
MOST_UNITS = 10_000  # candidate units after which an undecided step holds
UNITS = 5_000
BREAKER_SAMPLE = 100  # one in so many rollouts also runs the breaker, request by request


# --- Detection -----------------------------------------------------------------------------------


def detect(rng: Generator, *, p0: float, p1: float, alpha: float) -> tuple[float, ...]:
    """Candidate requests until the rollback; only errors need to be looked at one by one."""
    fails = WEIGHT * p1 + (1 - WEIGHT) * p0
    state = ErrorGuardrail()
    requests, of_candidate, candidate_errors, stable_errors = 0, 0, 0, 0
    while True:
        clean = rng.geometric(fails, 500) - 1
        clean_candidate = rng.binomial(clean, WEIGHT * (1 - p1) / (1 - fails))
        is_candidate = rng.random(500) < WEIGHT * p1 / fails
        for total, others, candidate in zip(
            clean.tolist(), clean_candidate.tolist(), is_candidate.tolist(), strict=True
        ):
            requests += total + 1
            of_candidate += others + candidate
            candidate_errors += candidate
            stable_errors += not candidate
            state = state.observe(WEIGHT, candidate)
            if state.alarm(alpha) and _fires(
                state,
                alpha,
                ArmCounts(of_candidate, candidate_errors),
                ArmCounts(requests - of_candidate, stable_errors),
            ):
                return (float(of_candidate),)


def _fires(state: ErrorGuardrail, alpha: float, candidate: ArmCounts, stable: ArmCounts) -> bool:
    return judge_errors(state, candidate, stable, alpha).fired


# --- False rollbacks -----------------------------------------------------------------------------


class Traffic(NamedTuple):
    """Healthy requests in order: who sent each (-1 without a unit), whether it failed, its arm."""

    unit: NDArray[np.int64]
    failed: Bools
    candidate: Bools
    weight: NDArray[np.float64]


def doubling_day(rng: Generator) -> Traffic:
    """Requests without units; the error rate doubles by day, from 1 to 2%, over two days."""
    hours = np.arange(HEALTHY_REQUESTS) / HEALTHY_REQUESTS * 48
    rate = np.where(hours % 24 >= 12, 0.02, 0.01)
    return Traffic(
        unit=np.full(HEALTHY_REQUESTS, -1),
        failed=rng.random(HEALTHY_REQUESTS) < rate,
        candidate=rng.random(HEALTHY_REQUESTS) < WEIGHT,
        weight=np.full(HEALTHY_REQUESTS, WEIGHT),
    )


def bursty_sticky(rng: Generator, *, weights: tuple[float, ...]) -> Traffic:
    """Few units send most requests; most errors come in runs of about fifteen of one unit."""
    activity = rng.pareto(1.1, UNITS) + 0.05
    unit = np.repeat(np.arange(UNITS), rng.multinomial(HEALTHY_REQUESTS, activity / activity.sum()))
    rng.shuffle(unit)
    by_unit = np.argsort(unit.astype(np.int16), kind="stable")
    owner = unit[by_unit]
    starts = np.flatnonzero(rng.random(HEALTHY_REQUESTS) < 0.0005)
    ends = np.minimum(starts + rng.geometric(1 / 15, len(starts)), HEALTHY_REQUESTS)
    # A run ends with the unit's own last request.
    ends = np.minimum(ends, np.searchsorted(owner, owner[starts], side="right"))
    edges = np.zeros(HEALTHY_REQUESTS + 1, dtype=np.int64)
    np.add.at(edges, starts, 1)
    np.add.at(edges, ends, -1)
    failed = rng.random(HEALTHY_REQUESTS) < 0.002
    failed[by_unit] |= np.cumsum(edges[:-1]) > 0
    weight = np.repeat(weights, math.ceil(HEALTHY_REQUESTS / len(weights)))[:HEALTHY_REQUESTS]
    return Traffic(unit, failed, rng.random(UNITS)[unit] < weight, weight)


def watch(
    rng: Generator, *, traffic: Callable[[Generator], Traffic], by_unit: bool = True
) -> tuple[float, ...]:
    """Whether a healthy rollout alarms, fires (alarm and harm) and, on a sample, trips."""
    seen = traffic(rng)
    alarmed, fired = _guard(seen, by_unit=by_unit)
    sampled = by_unit and rng.integers(BREAKER_SAMPLE) == 0
    return (alarmed, fired, _trips(seen) if sampled else math.nan)


def _guard(seen: Traffic, *, by_unit: bool) -> tuple[bool, bool]:
    state = ErrorGuardrail()
    known: dict[int, CountedUnit] = {}
    alarmed = False
    errors = np.flatnonzero(seen.failed)
    for at, unit, candidate, weight in zip(
        errors.tolist(),
        seen.unit[errors].tolist(),
        seen.candidate[errors].tolist(),
        seen.weight[errors].tolist(),
        strict=True,
    ):
        earlier = known.get(unit)
        share = counted_share(weight, earlier)
        if share is None:
            continue
        state = state.observe(share, candidate)
        if by_unit and unit >= 0:
            known[unit] = count_unit(weight, earlier, candidate=candidate)
        if state.alarm(ALPHA):
            alarmed = True
            if _fires(state, ALPHA, *_counts(seen, at)):
                return True, True
    return alarmed, False


def _counts(seen: Traffic, at: int) -> tuple[ArmCounts, ArmCounts]:
    """What both arms have done since the step that `at` belongs to began."""
    begun = int(np.argmax(seen.weight == seen.weight[at]))
    candidate, failed = seen.candidate[begun : at + 1], seen.failed[begun : at + 1]
    return (
        ArmCounts(int(candidate.sum()), int((candidate & failed).sum())),
        ArmCounts(int((~candidate).sum()), int((~candidate & failed).sum())),
    )


def _trips(seen: Traffic) -> bool:
    window = BreakerWindow()
    for unit, failed, candidate in zip(
        seen.unit.tolist(), seen.failed.tolist(), seen.candidate.tolist(), strict=True
    ):
        window = window.observe(str(unit) if unit >= 0 else None, failed, candidate)
        if candidate and failed and window.tripped:
            return True
    return False


# --- Going up ------------------------------------------------------------------------------------


def go_up(
    rng: Generator, *, p0: float, p1: float, steps: tuple[float, ...] = STEPS, guarded: bool = True
) -> tuple[float, ...]:
    """Candidate units that each step took: infinite when it held, NaN when rolled back before."""
    needed = [math.nan] * len(steps)
    guard = ErrorGuardrail() if guarded else None
    for index, weight in enumerate(steps):
        needed[index], guard = _step(rng, weight, p0, p1, guard)
        if not math.isfinite(needed[index]):
            break
    return tuple(needed)


def _step(
    rng: Generator, weight: float, p0: float, p1: float, guard: ErrorGuardrail | None
) -> tuple[float, ErrorGuardrail | None]:
    """Feed one step in order of arrival."""
    # The limits of the reporting grid cost time and only the margin decides.
    test = NonInferiority.start(weight, grid=())
    size = int(500 / weight)
    while test.candidate.units < MOST_UNITS:
        candidate = rng.random(size) < weight
        failed = rng.random(size) < np.where(candidate, p1, p0)
        seen = np.concatenate(([0], np.cumsum(candidate))).tolist()
        at = 0
        for stop in _stops(failed, batch=int(10 / weight)):
            units = seen[stop] - seen[at]
            test = test.observe_clean(units, stop - at - units)
            at = stop
            if test.passed():
                return float(test.candidate.units), guard
            if stop == size or not failed[stop]:
                continue
            arm = bool(candidate[stop])
            test = test.observe(1.0, arm)
            guard = guard and guard.observe(weight, arm)
            at = stop + 1
            if guard and _sent_back(guard, test):
                return math.nan, guard
    return math.inf, guard


def _stops(failed: Bools, batch: int) -> list[int]:
    """Where to look: at each failure, every `batch` requests, and at the end."""
    regular = np.append(np.arange(batch, len(failed), batch), len(failed))
    return np.union1d(np.flatnonzero(failed), regular).tolist()


def _sent_back(guard: ErrorGuardrail, test: NonInferiority) -> bool:
    if not guard.alarm(ALPHA):
        return False
    candidate = ArmCounts(test.candidate.units, round(test.candidate.loss))
    return _fires(guard, ALPHA, candidate, ArmCounts(test.stable.units, round(test.stable.loss)))


# --- The usual rule, for comparison --------------------------------------------------------------


def threshold_rule(
    rng: Generator, rollouts: int, window: int, limit: float, p1: float
) -> NDArray[np.float64]:
    """Candidate requests until five windows have exceeded `limit`, in steps of whole windows."""
    windows = 100_000 // window
    needed = np.full(rollouts, math.inf)
    for rollout in range(rollouts):
        over = rng.binomial(window, p1, windows) > limit * window
        failures = np.flatnonzero(over)
        if len(failures) >= 5:
            needed[rollout] = (failures[4] + 1) * window
    return needed


# --- Running and reporting -----------------------------------------------------------------------


def simulate(case: Case, seeds: list[np.random.SeedSequence]) -> list[tuple[float, ...]]:
    """Run one rollout for each seed."""
    return [case(np.random.default_rng(seed)) for seed in seeds]


class Runner:
    """Spreads the rollouts of a case over processes; the result depends on the seed alone."""

    def __init__(self, pool: ProcessPoolExecutor, progress: Progress, seed: int) -> None:
        self._pool, self._progress = pool, progress
        self._root = np.random.SeedSequence(seed)

    def __call__(self, name: str, case: Case, rollouts: int) -> NDArray[np.float64]:
        """Give one row of results for each rollout."""
        seeds = self._root.spawn(rollouts)
        chunks = [seeds[first : first + 50] for first in range(0, rollouts, 50)]
        results: list[tuple[float, ...]] = []
        task = self._progress.add_task(name, total=rollouts)
        for result in self._pool.map(partial(simulate, case), chunks):
            results += result
            self._progress.advance(task, len(result))
        return np.array(results)


def report_detection(report: Report, run: Runner, rollouts: int) -> None:
    for name, p1 in (("1_5", 0.05), ("1_2", 0.02)):
        limit = detection_limit(0.01, p1, ALPHA, WEIGHT)
        for suffix, alpha in (("", ALPHA), ("_full_set", ALPHA / GUARDRAILS)):
            label = f"detection 1 → {p1:.0%}, α = {alpha:.1%}"
            needed = run(label, partial(detect, p0=0.01, p1=p1, alpha=alpha), rollouts)[:, 0]
            mean, ratio = float(needed.mean()), float(needed.mean()) / limit
            report.figure(f"requests_{name}{suffix}", mean)
            report.figure(f"ratio_{name}{suffix}", ratio)
            own = detection_limit(0.01, p1, alpha, WEIGHT)
            report.row(
                label,
                f"{rollouts:,}",
                f"{ratio:.2f} × limit",
                f"mean {mean:,.0f}, median {np.median(needed):,.0f} candidate requests; "
                f"limit {limit:,.0f} at 1%, {own:,.0f} at this α",
            )
    report.section()


def report_false_rollbacks(report: Report, run: Runner, rollouts: int) -> None:
    sticky = partial(bursty_sticky, weights=(WEIGHT,))
    growing = partial(bursty_sticky, weights=STEPS)
    for name, label, traffic in (
        ("doubling_day", "healthy, error rate doubles by day", doubling_day),
        ("bursty_sticky", "healthy, bursty sticky units", sticky),
        ("weights_5_25_50", "healthy, the same over 5 → 25 → 50%", growing),
    ):
        results = run(label, partial(watch, traffic=traffic), rollouts)
        alarmed, fired = int(results[:, 0].sum()), int(results[:, 1].sum())
        looked = results[~np.isnan(results[:, 2]), 2]
        report.figure(f"false_{name}", alarmed / rollouts)
        report.figure(f"false_{name}_with_floor", fired / rollouts)
        report.figure(f"false_{name}_breaker", int(looked.sum()))
        report.row(
            label,
            f"{rollouts:,}",
            f"{alarmed / rollouts:.2%} alarm ({alarmed:,})",
            f"{fired / rollouts:.2%} with harm floor; breaker {looked.sum():.0f} of {len(looked)}",
        )
    few = max(rollouts // 10, 50)
    label = "the same, counted by request"
    results = run(label, partial(watch, traffic=growing, by_unit=False), few)
    share = float(results[:, 0].mean())
    report.figure("false_weights_5_25_50_by_request", share)
    report.row(label, f"{few:,}", f"{share:.1%} alarm", "what the unit rule is for")
    report.section()


def report_going_up(report: Report, run: Runner, rollouts: int) -> None:
    for name, rate in (("0", 0.0), ("0_1", 0.001), ("1", 0.01)):
        label = f"going up, both arms fail {rate:.1%}"
        needed = run(label, partial(go_up, p0=rate, p1=rate), rollouts)
        promoted = float(np.isfinite(needed[:, -1]).mean())
        held = float(np.isinf(needed).any(axis=1).mean())
        quick = float((needed <= MOST_UNITS / 2).all(axis=1).mean())
        report.figure(f"promoted_{name}", promoted)
        report.figure(f"promoted_{name}_within_half_the_limit", quick)
        report.figure(f"held_{name}", held)
        medians: list[str] = []
        for index, weight in enumerate(STEPS):
            reached = needed[~np.isnan(needed[:, index]), index]
            median = float(np.median(reached))
            suffix = "" if index == 0 else f"_step_{weight * 100:.0f}"
            report.figure(f"requests_p50_{name}{suffix}", median)
            medians.append(f"{median:,.0f}")
        report.row(
            label,
            f"{rollouts:,}",
            f"{promoted:.2%} promoted, {held:.2%} held",
            f"median candidate units by step {', '.join(medians)}; "
            f"{quick:.2%} within {MOST_UNITS // 2:,} each",
        )
    for name, p0, weight in (("0", 0.0, 0.05), ("1", 0.01, 0.25)):
        label = f"at the margin, {p0:.0%} → {p0 + 0.01:.0%}"
        case = partial(go_up, p0=p0, p1=p0 + 0.01, steps=(weight,), guarded=False)
        results = run(label, case, rollouts)[:, 0]
        wrong = float(np.isfinite(results).mean())
        report.figure(f"wrongly_up_at_margin_{name}", wrong)
        report.row(
            label,
            f"{rollouts:,}",
            f"{wrong:.2%} wrongly up at {weight:.0%}",
            "allowed 5%; guardrail off",
        )
    report.section()


def report_threshold(report: Report, rollouts: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    for window, limit in ((30, 0.01), (30, 0.05), (200, 0.015), (200, 0.03)):
        healthy = threshold_rule(rng, rollouts, window, limit, 0.01)
        false = float((healthy <= HEALTHY_REQUESTS * WEIGHT).mean())
        bad, worse = (
            threshold_rule(rng, rollouts, window, limit, rate).mean() for rate in (0.02, 0.05)
        )
        name = f"threshold_{window}_{limit:g}".replace(".", "_")
        report.figure(f"{name}_false", false)
        report.figure(f"{name}_requests_1_5", float(worse))
        report.row(
            f"threshold {limit:.1%} over {window} candidate requests",
            f"{rollouts:,}",
            f"{false:.1%} false rollbacks",
            f"1 → 5% takes {worse:,.0f}, 1 → 2% {_count(float(bad))} candidate requests",
        )


def _count(value: float) -> str:
    return f"{value:,.0f}" if math.isfinite(value) else "more than 100,000"


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--rollouts", type=int, default=10_000, help="simulated rollouts a case")
    parser.add_argument("--jobs", type=int, default=2, help="processes")
    options = parser.parse_args()
    columns = ("case", "rollouts", "result", "beside it")
    report = Report("Rollback and promotion, simulated", columns, "numpy", "msgspec")
    rollouts: int = options.rollouts
    with (
        ProcessPoolExecutor(options.jobs) as pool,
        Progress(console=report.console, transient=True) as progress,
    ):
        run = Runner(pool, progress, options.seed)
        report_detection(report, run, rollouts)
        report_false_rollbacks(report, run, rollouts)
        report_going_up(report, run, rollouts)
    report_threshold(report, rollouts, options.seed)
    report.figure("rollouts", rollouts)
    report.figure("seed", int(options.seed))
    report.note(
        f"Candidate weight {WEIGHT:.0%} unless said; false rollbacks and thresholds over "
        f"{HEALTHY_REQUESTS:,} requests, steps limited to {MOST_UNITS:,} candidate units."
    )
    report.finish(options.json)


if __name__ == "__main__":
    main()
