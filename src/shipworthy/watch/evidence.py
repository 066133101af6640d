"""What a batch of journal records says: observations for rollouts, and traffic by minute."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from shipworthy.domain.lifecycle import TrafficCount
from shipworthy.domain.records import InferenceRecord, Outcome, Record
from shipworthy.domain.rollout import Observation

_EVIDENCE = {Outcome.SUCCESS, Outcome.FAILURE}


@dataclass(frozen=True, slots=True)
class Gathered:
    """Observations by rollout id in order of arrival, and what to add to the traffic counts."""

    observations: dict[str, list[Observation]]
    traffic: list[TrafficCount]


def gather(records: Iterable[Record]) -> Gathered:
    """Read a batch of records.

    Client faults and requests that the client gave up on say nothing about a release, in neither
    arm. Everything else counts for the arm that it was assigned to, whoever answered in the end.
    """
    observations: dict[str, list[Observation]] = {}
    counts: dict[tuple[str, str, int], list[int]] = {}
    for record in records:
        if not isinstance(record, InferenceRecord):
            continue
        minute = int(record.at // 60)
        if record.outcome in _EVIDENCE:
            failed = record.outcome is Outcome.FAILURE
            cell = counts.setdefault((record.plan, record.release, minute), [0, 0, 0])
            cell[0] += 1
            cell[1] += failed
            if record.rollout:
                observations.setdefault(record.rollout, []).append(_observation(record, failed))
        if record.serving_release:
            counts.setdefault((record.plan, record.serving_release, minute), [0, 0, 0])[2] += 1
    return Gathered(
        observations,
        [
            TrafficCount(plan=plan, release=release, minute=minute, assigned=a, failed=f, served=s)
            for (plan, release, minute), (a, f, s) in counts.items()
        ],
    )


def _observation(record: InferenceRecord, failed: bool) -> Observation:  # noqa: FBT001
    candidate = record.assigned == "candidate"
    return Observation(
        inference=record.id,
        at=record.at,
        revision=record.revision,
        candidate=candidate,
        failed=failed,
        weight=record.probability if candidate else 1.0 - record.probability,
        unit=record.unit,
    )
