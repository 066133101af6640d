"""What `bench/churn.py` finds when it holds clients, plans and journals against each other.

Each request is looked at: who answered, whether a plan that was in force says so, whether the
journal has it once, and whether its key was good.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from crowd import Asked
from shifts import COUNTED, Publication

from shipworthy.domain.plan import Arm, Limits
from shipworthy.domain.records import InferenceRecord
from shipworthy.domain.routing import choose
from shipworthy.stores.journal import JournalReader

_EXAMPLES = 3


@dataclass(slots=True)
class Findings:
    """What is wrong, by kind, with examples; and the figures that are no faults."""

    wrong: Counter[str] = field(default_factory=Counter[str])
    examples: dict[str, list[str]] = field(default_factory=dict[str, list[str]])
    statuses: Counter[int] = field(default_factory=Counter[int])
    unavoidable: int = 0
    stale: list[float] = field(default_factory=list[float])
    revoked: list[float] = field(default_factory=list[float])
    restored: list[float] = field(default_factory=list[float])
    counted: int = 0
    to_candidates: int = 0
    records: int = 0

    def note(self, kind: str, what: object) -> None:
        """Count something that is wrong."""
        self.wrong[kind] += 1
        examples = self.examples.setdefault(kind, [])
        if len(examples) < _EXAMPLES:
            examples.append(str(what))


class History:
    """Publications in order; those of a revision can be looked up, and who was in force when.

    `ports` are where servers listen, in the order of their places. `obeyed` is the time in seconds
    within which every worker has to obey what was published.
    """

    def __init__(
        self, publications: Sequence[Publication], ports: Sequence[int], obeyed: float
    ) -> None:
        self.publications = publications
        self.obeyed = obeyed
        self._done = [one.done for one in publications]
        self._urls = [f"http://127.0.0.1:{port}" for port in ports]

    def names(self, arm: Arm, place: int) -> bool:
        """Whether the server at that place is one of the arm's."""
        return any(endpoint.url == self._urls[place] for endpoint in arm.endpoints)

    @property
    def rate(self) -> float:
        """Publications a second."""
        return (len(self._done) - 1) / max(1e-9, self._done[-1] - self._done[0])

    def of_revision(self, revision: int) -> Publication | None:
        """The one that bore it."""
        if 1 <= revision <= len(self.publications):
            return self.publications[revision - 1]
        return None

    def stale(self, revision: int, at: float) -> float:
        """For how long it had been replaced by another one by then; 0 if it had not."""
        following = self.of_revision(revision + 1)
        return max(0.0, at - following.done) if following else 0.0

    def last_done(self, at: float) -> int:
        """The place of the newest publication that was whole by then."""
        return max(0, bisect_right(self._done, at) - 1)

    def differs_since(self, key: str, at: float) -> tuple[bool, float]:
        """Whether the key was there at that time, and for how long that had been so."""
        place = self.last_done(at)
        there = key in self.publications[place].keys
        while place and (key in self.publications[place - 1].keys) == there:
            place -= 1
        return there, at - self.publications[place].done

    def within(self, key: str, began: float, ended: float, *, there: bool) -> bool:
        """Whether it became so while a request was under way."""
        place = self.last_done(began)
        for one in self.publications[place:]:
            if one.begun > ended:
                return False
            if (key in one.keys) == there:
                return True
        return False


def read_journals(folder: Path) -> list[InferenceRecord]:
    """All records of all workers, also of those that are gone. Raises for what can't be read."""
    reader, cursors = JournalReader(folder), dict[str, int]()
    records: list[InferenceRecord] = []
    while True:
        some, cursors = reader.read(cursors, 10_000)
        if not some:
            break
        records += [record for record in some if isinstance(record, InferenceRecord)]
    left = {reason: count for reason, count in reader.skipped.items() if reason != "torn"}
    if left:
        raise ValueError(f"the journals can't be read whole: {left}")
    return records


def reckon(
    asked: Sequence[Asked],
    records: Sequence[InferenceRecord],
    history: History,
    killed: Sequence[tuple[float, float]] = (),
) -> Findings:
    """Look at everything. Workers were killed within the times in `killed`."""
    found = Findings(records=len(records))
    by_id: dict[str, list[InferenceRecord]] = defaultdict(list)
    for record in records:
        by_id[record.id].append(record)
    for one in asked:
        found.statuses[one.status] += 1
        if one.status == 0 and _was_killed(one, killed):
            found.unavoidable += 1
        elif one.status == 200:
            _look_at_answer(one, by_id.pop(one.inference, []), history, found)
        else:
            _look_at_refusal(one, history, found)
            by_id.pop(one.inference, None)
    for left in by_id.values():
        _look_at_unknown(left, killed, found)
    _look_at_units(records, found)
    return found


def _was_killed(one: Asked, killed: Sequence[tuple[float, float]]) -> bool:
    """Whether it was under way when a worker was; nobody can answer that."""
    broken = one.fault.startswith(("broken", "closed within"))
    return broken and any(one.began <= over and began <= one.ended for began, over in killed)


def _look_at_answer(
    one: Asked, records: list[InferenceRecord], history: History, found: Findings
) -> None:
    there, since = history.differs_since(one.key, one.began)
    if not there and not history.within(one.key, one.began, one.ended, there=True):
        found.revoked.append(since)
        if since > history.obeyed:
            found.note("accepted long after its key was revoked", one)
    if one.said[2] != one.number:
        found.note("got the answer to another request", one)
    if len(records) != 1:
        found.note("answered, and not once in the journal", f"{len(records)} records of {one}")
        return
    record = records[0]
    for kind in _misrouted(one, record, history, found):
        found.note(kind, f"{one}; {record}")


def _misrouted(
    one: Asked, record: InferenceRecord, history: History, found: Findings
) -> Iterator[str]:
    """What does not fit between an answer, its record and the plan that this names."""
    publication = history.of_revision(record.revision)
    if publication is None or publication.begun > one.ended:
        yield "answered by a plan that was not there yet"
        return
    found.stale.append(history.stale(record.revision, one.began))
    if found.stale[-1] > history.obeyed:
        yield "answered by a plan that had been replaced long ago"
    plan = publication.plans[one.model]
    # In the middle of [0, 1), so that neither end decides where there is no unit.
    choice = choose(plan, one.unit, now=0.0, uniform=0.5)
    if one.unit is not None and record.assigned != choice.arm:
        yield "on another arm than its unit's"
    share = plan.weight / 10_000 if plan.candidate else 0.0
    likely = share if record.assigned == "candidate" else 1.0 - share
    if record.rollout != plan.rollout or abs(record.probability - likely) > 1e-9:
        yield "recorded with another split than the plan's"
    found.to_candidates += record.assigned == "candidate"
    if record.serving != record.assigned:
        yield "served by another arm than the assigned one"
    arm = plan.candidate if record.serving == "candidate" else plan.stable
    version, place, _ = one.said
    if arm is None or not one.release == record.serving_release == arm.release:
        yield "told of another release than the plan's"
    elif version != arm.version:
        yield "answered by another release than the one that was told"
    elif not history.names(arm, place):
        yield "answered by a server that the plan does not name"


def _look_at_refusal(one: Asked, history: History, found: Findings) -> None:
    if one.status == 401:
        there, since = history.differs_since(one.key, one.began)
        if there and not history.within(one.key, one.began, one.ended, there=False):
            found.restored.append(since)
            if since > history.obeyed:
                found.note("refused although its key was good", one)
    elif one.status == 429 and one.key == COUNTED:
        return
    elif one.status == 0:
        found.note("dropped", one)
    else:
        found.note(f"refused with {one.status}", one)


def _look_at_unknown(
    records: list[InferenceRecord], killed: Sequence[tuple[float, float]], found: Findings
) -> None:
    """Records of requests of which no client has heard: their worker was killed, then."""
    if not killed:
        found.note("in the journal, and never answered", records[0])
    elif len(records) > 1:
        found.note("twice in the journal", records[0])


def _look_at_units(records: Sequence[InferenceRecord], found: Findings) -> None:
    """Nobody who saw a candidate sees stable again while its rollout goes on."""
    first: dict[tuple[str, str], int] = {}
    for record in records:
        if record.unit and record.rollout and record.assigned == "candidate":
            place = record.rollout, record.unit
            first[place] = min(first.get(place, record.revision), record.revision)
    for record in records:
        if record.unit and record.rollout and record.assigned == "stable":
            seen = first.get((record.rollout, record.unit))
            if seen is not None and seen <= record.revision:
                found.note("back on stable while its rollout went on", record)


def excess(asked: Sequence[Asked], limits: Limits) -> int:
    """How many requests too many the counted key got, in whatever stretch of time that was most.

    Within t seconds that are its limit and t/60 of it. A request was admitted between its beginning
    and its end, so only those count that lie wholly within a stretch.
    """
    limit = limits.requests_per_minute or 0
    admitted = sorted(
        (one.began, one.ended) for one in asked if one.key == COUNTED and one.status == 200
    )
    worst = 0
    for place, (first, _) in enumerate(admitted):
        ends = sorted(ended for _, ended in admitted[place:])
        for number, last in enumerate(ends, 1):
            worst = max(worst, number - int(limit + limit * (last - first) / 60))
    return worst
