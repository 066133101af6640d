"""Whether our gateway drops or misroutes anything while all around it changes, under load.

Our workers share a port and get 80% of the requests that they can answer here: tensors and chats,
streamed and not, by many units and keys, on connections that are kept busy, that rest for seconds,
and that are used once. Meanwhile every plan changes ten times a second: candidates come, grow, are
promoted or given up, and servers come and go. A key is revoked each second, and given back a second
later. Every five seconds a worker is replaced by a new one. Each request is looked at afterwards:
it has to be answered, once, by a server that a plan in force names for its unit, and to be in the
journal once. At the end workers are killed: only what was under way in them may break. Keys of a
real `shipworthy up` are revoked, too, as it is the keeper that publishes that there.

    python bench/churn.py [--seconds 60] [--workers 3] [--load 0.8] [--kills 3]
        [--revocations 10] [--json FILE]

Exit code 1 when anything is off.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
from crowd import Asked, Load, Traffic
from echoes import echoing
from open_loop import percentile
from reckoning import Findings, History, excess, read_journals, reckon
from report import Figure, Report, argument_parser
from shifts import COUNTED, MODELS, SERVERS, Publisher, Workers, running

from shipworthy.domain.plan import Limits
from shipworthy.domain.records import InferenceRecord

COUNTED_LIMITS = Limits(requests_per_minute=60)
_COUNTED_RATE = 10.0
_BETWEEN_KILLS = 3.0
_WARM = 10.0  # seconds after which a worker's memory should grow no more
_MOST_GROWTH = 8.0  # MB beyond that


class Options(msgspec.Struct, frozen=True, kw_only=True):
    """What is run: for so many seconds, then so many kills.

    `load` is a share of the capacity, which is measured for `calibrate` seconds. Workers have to
    obey what is published within `obeyed` seconds.
    """

    seconds: float = 60.0
    workers: int = 3
    load: float = 0.8
    kills: int = 3
    calibrate: float = 6.0
    replace_every: float = 5.0
    obeyed: float = 0.5
    seed: int = 2026


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What came of it; `memory` is the oldest worker's in MB, by its age in seconds.

    `calm` is what was found while workers were replaced, `stormy` while they were killed. `revoked`
    is how long revoked keys of a real `up` were good, in seconds.
    """

    capacity: float
    seconds: float
    asked: list[Asked]
    calm: Findings
    stormy: Findings
    plans_per_second: float
    replaced: int
    codes: list[int]
    admitted: int
    excess: int
    memory: list[tuple[float, float]]
    obeyed: float
    revoked: list[float] = field(default_factory=list[float])

    @property
    def growth(self) -> float:
        """MB that a worker grew by, once it was warm."""
        warm = [size for age, size in self.memory if age >= _WARM]
        return warm[-1] - warm[0] if warm else 0.0

    def problems(self) -> list[str]:
        """All that is wrong, a sentence each."""
        found = [
            f"{count} × {kind}{when}, such as {findings.examples[kind][0]}"
            for findings, when in ((self.calm, ""), (self.stormy, " (workers killed)"))
            for kind, count in findings.wrong.items()
        ]
        if any(self.codes):
            found.append(f"workers that were told to end did so with {self.codes}")
        if self.excess > 0:
            found.append(f"{self.excess} requests too many with a key that has a limit")
        if max(self.revoked, default=0.0) > self.obeyed:
            found.append(f"'shipworthy up' honoured a revoked key for {max(self.revoked):.2f} s")
        if self.growth > _MOST_GROWTH:
            found.append(f"a worker grew by {self.growth:.1f} MB")
        return found


def churn(state: Path, options: Options) -> Outcome:
    """Run it all; `state` is an empty folder, which has the workers' logs and journals then."""
    with ExitStack() as stack:
        ports = stack.enter_context(echoing(SERVERS))
        publisher = Publisher(state, ports, options.seed, COUNTED_LIMITS)
        workers = stack.enter_context(running(state, options.workers))
        traffic = Traffic(
            port=workers.port,
            models=MODELS,
            keys=publisher.keys,
            counted=COUNTED,
            counted_rate=_COUNTED_RATE,
            seed=options.seed,
        )
        load = Load(traffic, state)
        stack.callback(load.close)
        publisher.begin()
        stack.callback(publisher.end)
        capacity = load.capacity(options.calibrate)
        publisher.revoke()
        marks = [time.time()]
        load.begin(options.load * capacity)
        began = time.monotonic()
        _replace(workers, options)
        asked, lasted = load.end(), time.monotonic() - began
        memory = list(workers.places[0].memory)
        marks.append(time.time())
        load.begin(options.load * capacity)
        _kill(workers, options.kills)
        later = load.end()
        publisher.end()
        workers.end()
    history = History(publisher.history, ports, options.obeyed)
    of_phase = _by_phase(read_journals(state / "journals"), marks)
    return Outcome(
        capacity=capacity,
        seconds=lasted,
        asked=asked,
        calm=reckon(asked, of_phase[0], history),
        stormy=reckon(later, of_phase[1], history, workers.killed),
        plans_per_second=history.rate,
        replaced=workers.replaced,
        codes=workers.codes,
        admitted=sum(one.key == COUNTED and one.status == 200 for one in asked + later),
        excess=excess(asked + later, COUNTED_LIMITS),
        memory=memory,
        obeyed=options.obeyed,
    )


def _replace(workers: Workers, options: Options) -> None:
    """Replace a worker now and then, all but the first, whose memory is looked at."""
    end, index = time.monotonic() + options.seconds, 0
    due = time.monotonic() + options.replace_every / 2
    while time.monotonic() < end:
        time.sleep(0.25)
        workers.places[0].weigh()
        if time.monotonic() >= due and len(workers.places) > 1:
            index = index % (len(workers.places) - 1) + 1
            workers.replace(index)
            due = max(due + options.replace_every, time.monotonic())


def _kill(workers: Workers, times: int) -> None:
    """Kill one after the other."""
    for number in range(times):
        time.sleep(_BETWEEN_KILLS / 2)
        workers.kill(number % len(workers.places))
        time.sleep(_BETWEEN_KILLS / 2)


def _by_phase(
    records: Sequence[InferenceRecord], marks: Sequence[float]
) -> tuple[list[InferenceRecord], list[InferenceRecord]]:
    """The records of each; no request is under way when a phase begins."""
    first, second = marks
    return (
        [record for record in records if first <= record.at < second],
        [record for record in records if second <= record.at],
    )


# --- reporting ------------------------------------------------------------------------------------


def report_on(outcome: Outcome, options: Options, report: Report) -> None:
    """Fill in rows and figures."""
    calm, stormy, asked = outcome.calm, outcome.stormy, outcome.asked
    took = sorted(one.ended - one.due for one in asked if one.status == 200)
    misrouted = sum(
        count for kind, count in (calm.wrong + stormy.wrong).items() if kind not in _NOT_ROUTING
    )
    worst_stale = max(calm.stale, default=0.0)
    figures: list[tuple[str, Figure, str]] = [
        ("capacity_rps", outcome.capacity, "in a closed loop, plans changing"),
        ("rate_rps", len(asked) / outcome.seconds, f"{options.load:.0%} of that was asked for"),
        ("requests", len(asked), f"in {outcome.seconds:.0f} s"),
        ("answered", calm.statuses[200], "with 200"),
        ("to_candidates", calm.to_candidates, "of them assigned to a candidate"),
        ("unauthenticated", calm.statuses[401], "with a key that was revoked just then"),
        ("dropped", calm.wrong["dropped"], "refused, reset, cut short or late"),
        ("misrouted", misrouted, "against the plan, or not once in the journal"),
        ("plans_per_second", outcome.plans_per_second, "all plans, in one snapshot"),
        ("workers_replaced", outcome.replaced, "new one first, then SIGTERM"),
        ("plan_stale_ms", 1e3 * worst_stale, "oldest plan that was still obeyed"),
        ("revocations_ms", 1e3 * max(calm.revoked, default=0.0), "until the last worker obeyed"),
        ("restored_ms", 1e3 * max(calm.restored, default=0.0), "until a key was good again"),
        ("limit_admitted", outcome.admitted, "of a key with 60 requests a minute"),
        ("limit_excess", max(0, outcome.excess), "beyond what any stretch of time allows"),
        ("rss_mb", outcome.memory[-1][1] if outcome.memory else None, "of the oldest worker"),
        ("rss_growth_mb", outcome.growth, f"since it was {_WARM:.0f} s old"),
        ("p50_ms", 1e3 * percentile(took, 0.5), "since a request was due, client and all"),
        ("p99_ms", 1e3 * percentile(took, 0.99), ""),
        ("kills", options.kills, "SIGKILL, the rest of the load going on"),
        ("kill_requests", sum(stormy.statuses.values()), "asked meanwhile"),
        ("kill_broken", stormy.unavoidable, "under way in a worker that was killed"),
        ("kill_dropped", stormy.wrong["dropped"], "any other"),
        ("up_revocations", len(outcome.revoked), "with a real `shipworthy up`"),
        ("up_revocation_ms", 1e3 * max(outcome.revoked, default=0.0), "from the ledger's commit"),
    ]
    for name, value, what in figures:
        report.figure(name, value)
        report.row(name, f"{report.figures[name]:,}" if value is not None else "-", what)
    report.note(f"machine's load: {os.getloadavg()[0]:.1f}, with what this ran itself")
    for problem in outcome.problems():
        report.note(problem)
    if not outcome.problems():
        report.note("Nothing was dropped, misrouted or out of line.")


_NOT_ROUTING = frozenset({"dropped", "accepted long after its key was revoked"})


def main() -> int:
    parser = argument_parser(__doc__)
    parser.add_argument("--seconds", type=float, default=60.0, help="how long it goes on")
    parser.add_argument("--workers", type=int, default=3, help="that share the port; at least 2")
    parser.add_argument("--load", type=float, default=0.8, help="share of the measured capacity")
    parser.add_argument("--kills", type=int, default=3, help="workers to kill at the end")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="keep journals and logs here")
    parser.add_argument("--revocations", type=int, default=10, help="of keys of a real 'up'")
    given = parser.parse_args()
    if given.workers < 2:
        parser.error("--workers must be at least 2, so that one serves while another is replaced")
    options = Options(
        seconds=given.seconds,
        workers=given.workers,
        load=given.load,
        kills=given.kills,
        seed=given.seed,
    )
    report = Report(
        f"{options.workers} workers, all changing for {options.seconds:.0f} s",
        ("what", "figure", "which is"),
        *("httptools", "uvloop"),
    )
    state = given.keep or Path(tempfile.mkdtemp(prefix="churn-"))
    state.mkdir(exist_ok=True)
    outcome = churn(state, options)
    if given.revocations:
        from revoking import revocations  # a project needs much that the crowd's process does not

        outcome.revoked.extend(revocations(state, options.workers, given.revocations))
    report_on(outcome, options, report)
    report.finish(given.json)
    if outcome.problems():
        print(f"what is left of it: {state}")
        return 1
    if given.keep is None:
        shutil.rmtree(state)
    return 0


if __name__ == "__main__":
    sys.exit(main())
