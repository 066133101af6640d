"""`POST /v1/feedback`: what became known about an inference later, taken once it is written."""

from __future__ import annotations

import logging
import math
from itertools import count
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from shipworthy.domain.plan import Key
from shipworthy.domain.records import FeedbackKind, FeedbackRecord
from shipworthy.gateway.http import RETRY, Answer, Refusal, Request
from shipworthy.gateway.parts import Parts

_log = logging.getLogger("shipworthy.gateway")


class _Feedback(msgspec.Struct, forbid_unknown_fields=True):
    inference: Annotated[str, Meta(max_length=100)]
    kind: FeedbackKind
    name: Annotated[str, Meta(min_length=1, max_length=128, pattern=r"^[\w .:/@-]+$")]
    value: Any


_decoder = msgspec.json.Decoder(_Feedback)
_encoder = msgspec.json.Encoder()
_VALUES: dict[FeedbackKind, tuple[tuple[type, ...], str]] = {
    "rating": ((int, float, bool), "a number or a boolean"),
    "reward": ((int, float), "a number"),
    "label": ((str, int, float, bool), "a string, a number or a boolean"),
    "outcome": ((str, int, float, bool), "a string, a number or a boolean"),
    "preference": ((str, int, float, bool), "a string, a number or a boolean"),
    "correction": ((str, int, float, bool, dict, list), "anything but null"),
}


class FeedbackDoor:
    """Takes feedback."""

    def __init__(self, parts: Parts) -> None:
        self._journal = parts.outside.journal
        self._clock = parts.outside.clock
        self._tickets = parts.tickets
        self._metrics = parts.metrics
        self._worker = parts.worker.hex()
        self._numbers = count()

    def take(self, request: Request, key: Key) -> Answer:
        """202 with the feedback's id once it is in the journal; a Refusal else."""
        if request.problem is not None:
            raise request.problem
        feedback = _read(request.body)
        ticket = self._tickets.read(feedback.inference)
        if ticket is None:
            raise Refusal(
                400, "inference: not an id that this gateway gave out; send the header"
                " X-Shipworthy-Inference of the answer",
            )  # fmt: skip
        trusted = key.role != "client"
        if not trusted and not ticket.issued_to(key.id):
            raise Refusal(
                403,
                "this inference was asked for with another key; send feedback with that key,"
                " or with a trusted one",
            )
        now = self._clock()
        record = FeedbackRecord(
            id=f"fb_{int(now * 1000):x}{self._worker}{next(self._numbers):x}",
            at=now,
            inference=feedback.inference,
            key=key.id,
            kind=feedback.kind,
            name=feedback.name,
            value=feedback.value,
            unit=ticket.unit,
            trusted=trusted,
            assigned=ticket.arm,
            asked_at=ticket.at,
        )
        if not self._written(record):
            raise Refusal(503, "the feedback could not be written; send it again", headers=[RETRY])
        self._metrics.feedback.labels(record.kind).inc()
        return Answer(202, _encoder.encode({"feedback": record.id}))

    def _written(self, record: FeedbackRecord) -> bool:
        try:
            written = self._journal.append(record)
            self._metrics.settle_dropped(self._journal.dropped, record.at)
            return written
        except Exception:  # noqa: BLE001  # whatever it is, the client must send it again
            self._metrics.dropped.labels("fault").inc()
            _log.exception("feedback could not be written")
            return False


def _read(body: bytes) -> _Feedback:
    try:
        feedback = _decoder.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        text = str(error).replace("`", "")
        raise Refusal(
            400, f"the feedback is not accepted: {text}; send inference, kind, name and value"
        ) from None
    types, wanted = _VALUES[feedback.kind]
    value = feedback.value
    if (
        not isinstance(value, types)
        or (isinstance(value, bool) and bool not in types)
        or (isinstance(value, float) and not math.isfinite(value))
    ):
        raise Refusal(400, f"value: a {feedback.kind} is {wanted}")
    try:
        msgspec.msgpack.encode(value)  # as the journal will
    except (OverflowError, RecursionError, ValueError):
        raise Refusal(
            400, "value: holds an integer beyond 64 bits, or is nested too deeply"
        ) from None
    return feedback
