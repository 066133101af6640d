"""What really happened, by the gateway's own records, the ledger's decisions and what users saw."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any

import msgspec

from shipworthy.app.session import Session
from shipworthy.cli.demo.models import MODEL, Trained
from shipworthy.cli.demo.traffic import Tally
from shipworthy.domain.lifecycle import Decision
from shipworthy.domain.records import FeedbackRecord, InferenceRecord, Outcome, Record
from shipworthy.domain.statistics.intervals import wilson_interval
from shipworthy.errors import Unavailable
from shipworthy.settings import Project
from shipworthy.stores.lake.query import Lake
from shipworthy.stores.lake.state import load_condition

_MOST_SECONDS_TO_LAKE = 60.0
_INFERENCES = """
SELECT id, epoch_us(time) / 1e6 AS at, plan, model, assigned, outcome, status, release, rollout,
       serving_release, reason, epoch_us(sent) / 1e6 AS sent, response
FROM inferences
"""
_LABELS = "SELECT inference, value FROM feedback WHERE kind = 'label' ORDER BY time"
_LEFT_OUT = {"revision": 0, "key": "", "probability": 1.0}
STATISTICAL = frozenset({"errors"})
"""The rules that roll back on statistical evidence."""
MOST_SECONDS_TO_ROLLBACK = 1.0


@dataclass(slots=True)
class Exposure:
    """What a rollout's candidate was given: requests, its failures, and those users never saw."""

    requests: int = 0
    failures: int = 0
    shielded: int = 0
    reasons: Counter[str] = field(default_factory=Counter[str])
    last_sent: float | None = None

    def add(self, record: InferenceRecord) -> None:
        """Count a request that was assigned to the candidate."""
        self.requests += 1
        if record.sent is not None:
            self.last_sent = max(record.sent, self.last_sent or record.sent)
        if record.outcome is Outcome.FAILURE:
            self.failures += 1
            self.shielded += record.status == 200
            self.reasons[record.reason] += 1


@dataclass(frozen=True, slots=True)
class Journalled:
    """All that the gateway recorded: answers by release, exposures by rollout, and label checks.

    `labelled` and `right` count answers by the release that gave them.
    """

    answers: Counter[str] = field(default_factory=Counter[str])
    exposures: dict[str, Exposure] = field(default_factory=dict[str, Exposure])
    labelled: Counter[str] = field(default_factory=Counter[str])
    right: Counter[str] = field(default_factory=Counter[str])


def read_records(project: Project, until: float) -> Journalled:
    """Read every record from the first on, once all from before that Unix time are in the lake."""
    deadline = time.monotonic() + _MOST_SECONDS_TO_LAKE
    while (
        condition := load_condition(project.lake_condition)
    ) is None or condition.complete < until:
        if time.monotonic() > deadline:
            why = condition.problem if condition else ""
            message = (
                f"the records are not in the lake after {_MOST_SECONDS_TO_LAKE:.0f} s"
                f"{f' ({why})' if why else ''}; see 'shipworthy status'"
            )
            raise Unavailable(message)
        time.sleep(0.1)
    with closing(Lake(project.lake)) as lake:
        return summarise(_records(lake))


def _records(lake: Lake) -> Iterator[Record]:
    with lake.run(_INFERENCES) as found:
        for batch in found.batches:
            for row in batch:
                values = dict(zip(found.columns, row, strict=True))
                yield msgspec.convert(values | _LEFT_OUT, InferenceRecord)
    with lake.run(_LABELS) as found:
        for batch in found.batches:
            for inference, value in batch:
                yield FeedbackRecord(
                    id="",
                    at=0.0,
                    inference=inference,
                    key="",
                    kind="label",
                    name="",
                    value=json.loads(value),
                )


def summarise(records: Iterable[Record]) -> Journalled:
    """Count users' requests to the model in production, and hold answers against labels."""
    found = Journalled()
    given: dict[str, tuple[str, int | None]] = {}
    labels: dict[str, object] = {}
    for record in records:
        if isinstance(record, FeedbackRecord):
            if record.kind == "label":
                labels[record.inference] = record.value
        elif isinstance(record, InferenceRecord) and record.plan == MODEL:
            _count(found, given, record)
    for inference, label in labels.items():
        release, digit = given.get(inference, ("", None))
        if digit is not None:
            found.labelled[release] += 1
            found.right[release] += digit == label
    return found


def _count(
    found: Journalled, given: dict[str, tuple[str, int | None]], record: InferenceRecord
) -> None:
    if record.serving_release is not None:
        found.answers[record.serving_release] += 1
        given[record.id] = (record.serving_release, _digit_of(record.response))
    if record.rollout and record.assigned == "candidate":
        found.exposures.setdefault(record.rollout, Exposure()).add(record)


def _digit_of(response: bytes | None) -> int | None:
    """The digit in a captured answer; None when the capture is missing or was cut."""
    try:
        return int(json.loads(response or b"")["outputs"][0]["data"][0])
    except (ValueError, KeyError, IndexError, TypeError):
        return None


@dataclass(frozen=True, slots=True)
class Figures:
    """The whole story in numbers."""

    trained: Sequence[Trained]
    tallies: Mapping[str, Tally]
    journalled: Journalled
    decisions: Sequence[Decision]
    seconds: float

    @property
    def completed(self) -> list[Decision]:
        """Rollouts that ended with all traffic on the candidate."""
        return [one for one in self.decisions if one.kind == "complete"]

    @property
    def rolled_back(self) -> Decision | None:
        """The decision to roll back, if there was one."""
        return next((one for one in self.decisions if one.kind == "roll back"), None)

    @property
    def user_errors(self) -> int:
        """Requests that were not answered as they should, as users saw it."""
        return sum(tally.errors for tally in self.tallies.values())

    def exposure(self, decision: Decision | None) -> Exposure:
        """What the candidate of that decision's rollout was given."""
        rollout = decision.rollout if decision else None
        return self.journalled.exposures.get(rollout or "", Exposure())

    @property
    def seconds_to_rollback(self) -> float | None:
        """From the deciding answer to the last request sent to the candidate."""
        decision = self.rolled_back
        last_sent = self.exposure(decision).last_sent
        if decision is None or last_sent is None or "deciding_at" not in decision.numbers:
            return None
        return max(0.0, last_sent - float(decision.numbers["deciding_at"]))

    def live_accuracy(self, release: str) -> dict[str, Any] | None:
        """The share of labelled answers of a release that were right."""
        n = self.journalled.labelled[release]
        if not n:
            return None
        value = self.journalled.right[release] / n
        interval = wilson_interval(value, n)
        return {"value": value, "n": n, "low": interval.low, "high": interval.high}

    def broken_promises(self) -> list[str]:
        """What did not come true, a sentence each; empty when all did."""
        first, second, third = (one.name for one in self.trained)
        broken: list[str] = []
        if not self.journalled.answers[first]:
            broken.append(f"{first} never answered in production")
        if not any(second in decision.text for decision in self.completed):
            broken.append(f"{second} did not get to 100% by canary")
        broken += self._rollback_problems(third)
        if self.user_errors:
            broken.append(f"users saw {self.user_errors} errors")
        return broken

    def _rollback_problems(self, third: str) -> list[str]:
        decision, seconds = self.rolled_back, self.seconds_to_rollback
        if decision is None or third not in decision.text:
            return [f"{third} was not rolled back"]
        if decision.numbers.get("rule") not in STATISTICAL:
            return [f"{third} was rolled back by {decision.numbers.get('rule')}, not on statistics"]
        if seconds is None:
            return [f"when {third} got its last request is not known"]
        if seconds > MOST_SECONDS_TO_ROLLBACK:
            return [f"{third} was sent requests for {seconds:.2f} s after the deciding answer"]
        return []

    def report(self) -> dict[str, Any]:
        """The figures for machines."""
        decision = self.rolled_back
        exposure, seconds = self.exposure(decision), self.seconds_to_rollback
        promises = self.broken_promises()
        first, second, third = (one.name for one in self.trained)
        completed = any(second in one.text for one in self.completed)
        return {
            "passed": not promises,
            "broken_promises": promises,
            "models": [self._model(one) for one in self.trained],
            "requests": sum(tally.requests for tally in self.tallies.values()),
            "user_errors": self.user_errors,
            "promoted": [first] * bool(self.journalled.answers[first]) + [second] * completed,
            "rolled_back": [third] if decision is not None and third in decision.text else [],
            "exposed_requests": exposure.requests,
            "failures": dict(exposure.reasons),
            "failures_shielded": exposure.shielded,
            "seconds_to_rollback": None if seconds is None else round(seconds, 3),
            "reason": decision.text if decision else "",
            "rule": decision.numbers.get("rule") if decision else None,
            "e_value": decision.numbers.get("e_value") if decision else None,
            "phases": {name: _phase(tally) for name, tally in self.tallies.items()},
            "seconds": round(self.seconds, 1),
        }

    def _model(self, one: Trained) -> dict[str, Any]:
        n = len(one.correct)
        interval = wilson_interval(one.accuracy, n)
        return {
            "name": one.name,
            "accuracy": one.accuracy,
            "n": n,
            "low": interval.low,
            "high": interval.high,
            "live": self.live_accuracy(one.name),
            "answers": self.journalled.answers[one.name],
        }


def _phase(tally: Tally) -> dict[str, Any]:
    return {
        "requests": tally.requests,
        "user_errors": tally.errors,
        "labels": tally.labels,
        "median_seconds": round(tally.quantile(0.5), 4),
        "p99_seconds": round(tally.quantile(0.99), 4),
    }


def decisions_of(session: Session) -> list[Decision]:
    """All decisions on the model, oldest first."""
    with session.ledger.read() as tx:
        return list(reversed(tx.decisions.list(MODEL, limit=50)))
