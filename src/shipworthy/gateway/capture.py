"""What is written of each call.

A record that can't be written is counted; the client never hears of it.
"""

from __future__ import annotations

import hashlib
import logging

from shipworthy.domain.records import InferenceRecord, Outcome
from shipworthy.gateway.access_log import access_line
from shipworthy.gateway.call import Call
from shipworthy.gateway.parts import Parts

_log = logging.getLogger("shipworthy.gateway")
_access = logging.getLogger("shipworthy.gateway.access")


class Capture:
    """Writes a call's record, whole and in the journal, before its answer goes out."""

    def __init__(self, parts: Parts) -> None:
        outside = parts.outside
        self._journal = outside.journal
        self._metrics = parts.metrics
        self._clock = outside.clock
        self._uniform = outside.uniform
        self._export = outside.export
        self._access_log = parts.options.access_log
        self._failing = False

    def write(
        self, call: Call, status: int, response: bytes, seconds: float, *, digest: str | None = None
    ) -> None:
        """Append the record, count the call and settle what it has used.

        `digest` is that of the whole answer where `response` is its beginning only.
        """
        try:
            record = self._record(call, status, response, seconds, digest)
        except Exception:  # noqa: BLE001  # capture never hurts serving
            self._note_fault()
            _settle(call)
            return
        try:
            written = self._journal.append(record)
        except Exception:  # noqa: BLE001  # capture never hurts serving
            written = False
            self._note_fault()
        if not written:
            self._metrics.settle_dropped(self._journal.dropped, record.at)
        if written is self._failing:  # said once when it begins, and once when it is over
            self._failing = not written
            _log.warning("records are written again" if written else "records are being dropped")
        self._count(call, record)
        _settle(call)
        if call.context is not None and self._export is not None:
            self._export(record, call.context, call.tries)
        if self._access_log:
            request = call.request
            _access.info(access_line(record, request.method, request.path, status))

    def _note_fault(self) -> None:
        self._metrics.dropped.labels("fault").inc()
        if not self._failing:
            _log.exception("a record could not be written")

    def _count(self, call: Call, record: InferenceRecord) -> None:
        metrics, plan = self._metrics, record.plan
        metrics.answered(
            plan, record.status, record.seconds, record.request_bytes, record.response_bytes
        )
        metrics.attempted(plan, record.release, record.outcome.value, record.reason)
        usage = call.usage
        if usage is not None:
            metrics.tokens(
                plan, usage.input_tokens or 0, usage.output_tokens or 0, record.cost or 0.0
            )
        if record.redacted:
            metrics.redacted(plan, "any", record.redacted)
        if record.first_content_seconds is not None:
            metrics.stream(plan, record.first_content_seconds, record.gap_seconds)

    def _record(
        self, call: Call, status: int, response: bytes, seconds: float, digest: str | None
    ) -> InferenceRecord:
        plan, ask, usage, timing = call.live.plan, call.ask, call.usage, call.timing
        rules = plan.capture
        keeps = rules.payloads == "full" or (
            rules.payloads == "sampled" and self._uniform() < rules.sample
        )
        request: bytes | None = None
        answer: bytes | None = None
        request_digest: str | None = None
        redacted = 0
        if keeps:
            limit = rules.max_bytes
            body = call.request.body if ask is None else ask.kept()
            redactor = call.live.redactor
            if redactor:
                request, some = redactor.redact(body, limit)
                answer, more = redactor.redact(response, limit)
                redacted = some + more
            else:
                request, answer = body[:limit], response[:limit]
            if len(body) > limit:
                request_digest = hashlib.sha256(body).hexdigest()
            if digest is None and len(response) > limit:
                digest = hashlib.sha256(response).hexdigest()
        serving = call.serving
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
            serving_release=serving.arm.release if serving else None,
            reason=call.reason.value,
            seconds=seconds,
            attempt_seconds=call.first_seconds,
            sent=call.sent,
            attempts=call.attempts,
            slices=call.slices,
            traceparent=call.traceparent,
            request_bytes=len(call.request.body),
            response_bytes=len(response) if call.response_bytes is None else call.response_bytes,
            request=request,
            response=answer,
            protocol=ask.protocol if ask else "oip-v2",
            operation=ask.operation if ask else "infer",
            stream=timing is not None,
            input_tokens=usage.input_tokens if usage else None,
            output_tokens=usage.output_tokens if usage else None,
            cached_tokens=usage.cached_tokens if usage else None,
            tokens_estimated=usage.estimated if usage else False,
            cost=call.cost,
            first_content_seconds=timing.first if timing and timing.pieces else None,
            gap_seconds=timing.gap if timing else None,
            longest_gap_seconds=timing.longest if timing and timing.pieces > 1 else None,
            finish=usage.finish if usage else "",
            request_digest=request_digest,
            response_digest=digest if keeps else None,
            redacted=redacted,
            features=ask.features() if ask is not None and rules.features else {},
        )


def _settle(call: Call) -> None:
    """Count what was used in place of what was reserved."""
    if call.admission is not None:
        usage = call.usage
        tokens = (usage.input_tokens or 0) + (usage.output_tokens or 0) if usage else 0
        call.admission.settle(tokens, call.cost or 0.0)
