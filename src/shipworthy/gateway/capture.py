"""What is written of each call.

A record that can't be written is counted; the client never hears of it.
"""

from __future__ import annotations

import logging

from shipworthy.domain.records import InferenceRecord, Outcome
from shipworthy.gateway.call import Call
from shipworthy.gateway.metrics import Metrics
from shipworthy.gateway.needs import Clock, Journal

_log = logging.getLogger("shipworthy.gateway")


class Capture:
    """Writes a call's record, whole and in the journal, before its answer goes out."""

    def __init__(self, journal: Journal, metrics: Metrics, clock: Clock) -> None:
        self._journal = journal
        self._metrics = metrics
        self._clock = clock
        self._failing = False

    def write(self, call: Call, *, status: int, response: bytes, seconds: float) -> None:
        """Append the record and count the call."""
        record = self._record(call, status, response, seconds)
        try:
            written = self._journal.append(record)
        except Exception:  # noqa: BLE001  # capture never hurts serving
            written = False
            self._metrics.dropped.labels("fault").inc()
            if not self._failing:
                _log.exception("a record could not be written")
        if not written:
            self._metrics.settle_dropped(self._journal.dropped, record.at)
        if written is self._failing:  # said once when it begins, and once when it is over
            self._failing = not written
            _log.warning("records are written again" if written else "records are being dropped")
        plan = call.live.plan
        self._metrics.answered(plan.name, status, seconds, len(call.body), len(response))
        self._metrics.attempted(plan.name, record.release, record.outcome.value, record.reason)

    def _record(self, call: Call, status: int, response: bytes, seconds: float) -> InferenceRecord:
        plan = call.live.plan
        full = plan.capture.payloads == "full"
        limit = plan.capture.max_bytes
        return InferenceRecord(
            id=call.id,
            at=self._clock(),
            plan=plan.name,
            model=plan.model,
            revision=plan.revision,
            key=call.key.id,
            assigned=call.arm.name,
            probability=call.choice.probability,
            outcome=call.outcome or Outcome.CENSORED,
            status=status,
            release=call.arm.arm.release,
            rollout=call.choice.rollout,
            unit=call.unit,
            serving=call.answered_by,
            serving_release=call.serving.arm.release if call.serving else None,
            reason=call.reason.value,
            seconds=seconds,
            attempt_seconds=call.first_seconds,
            sent=call.sent,
            attempts=call.attempts,
            slices=call.slices,
            traceparent=call.traceparent,
            request_bytes=len(call.body),
            response_bytes=len(response),
            request=call.body[:limit] if full else None,
            response=response[:limit] if full else None,
        )
