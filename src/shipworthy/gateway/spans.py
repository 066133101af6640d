"""What a finished request looks like to OpenTelemetry: one span, and one for each call upstream.

Names follow the semantic conventions 1.41.1, those for generative AI among them; ours begin with
`shipworthy.`. A body, a unit, a slice or a key is in none of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from operator import attrgetter
from typing import Final, NamedTuple
from urllib.parse import urlsplit

import msgspec

from shipworthy.domain.records import InferenceRecord, Outcome
from shipworthy.gateway.traces import TraceContext

Attributes = dict[str, str | bool | int | float | Sequence[str]]

_OPERATIONS: Final = {"completions": "text_completion"}
"""Where the conventions have another name for an operation than the protocol."""
_PORTS: Final = {"http": 80, "https": 443}


class Attempt(msgspec.Struct, frozen=True, gc=False):
    """One call upstream. `at` is the Unix time at which it began, `endpoint` the URL it went to.

    `reason` says why it failed, and is empty when it did not. `status` is 0 without an answer.
    """

    at: float
    seconds: float
    release: str
    endpoint: str
    reason: str = ""
    status: int = 0


class Span(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """A span, before any library knows of it. Times are Unix seconds.

    `parent` is 0 where the trace begins. `serves` tells answering a client from calling a server.
    """

    name: str
    trace_id: str
    id: int
    parent: int
    serves: bool
    start: float
    end: float
    failed: bool
    attributes: Attributes
    state: bytes = b""


class Told(NamedTuple):
    """What spans take from a record; a body that was captured is not kept for them."""

    id: str
    at: float
    seconds: float
    plan: str
    revision: int
    assigned: str
    release: str
    rollout: str
    serving: str | None
    serving_release: str | None
    outcome: Outcome
    reason: str
    status: int
    protocol: str
    operation: str
    stream: bool
    attempts: int
    attempt_seconds: float | None
    input_tokens: int | None
    output_tokens: int | None
    cached_tokens: int | None
    tokens_estimated: bool
    cost: float | None
    first_content_seconds: float | None
    finish: str


_fields = attrgetter(*Told._fields)


def told(record: InferenceRecord) -> Told:
    """What spans need of a record: on the way of an answer, so it costs next to nothing."""
    return Told._make(_fields(record))


def spans_of(call: Told, context: TraceContext, attempts: Sequence[Attempt]) -> list[Span]:
    """The span of a request whose context has one, and those of its calls upstream."""
    operation = _OPERATIONS.get(call.operation, call.operation)
    failed = _failed(call)
    attributes = _attributes(call)
    if call.protocol == "openai":
        attributes |= _generative(call, operation)
    if failed:
        attributes["error.type"] = call.reason or str(call.status)
    spans = [
        Span(
            name=f"{operation} {call.plan}",
            trace_id=context.trace_id,
            id=context.span_id,
            parent=int(context.parent_id or "0", 16),
            serves=True,
            start=call.at - call.seconds,
            end=call.at,
            failed=failed,
            attributes=attributes,
            state=context.state,
        )
    ]
    for number, attempt in enumerate(attempts, 1):
        spans.append(_attempt_span(attempt, context, number, operation))
    return spans


def _attempt_span(attempt: Attempt, context: TraceContext, number: int, operation: str) -> Span:
    attributes: Attributes = {
        "http.request.method": "POST",
        "shipworthy.attempt": number,
        "shipworthy.release": attempt.release,
        **_address(attempt.endpoint),
    }
    if number > 1:
        attributes["http.request.resend_count"] = number - 1
    if attempt.status:
        attributes["http.response.status_code"] = attempt.status
    if attempt.reason:
        attributes["error.type"] = attempt.reason
    return Span(
        name=f"{operation} {attempt.release}",
        trace_id=context.trace_id,
        id=context.span_of(number),
        parent=context.span_id,
        serves=False,
        start=attempt.at,
        end=attempt.at + attempt.seconds,
        failed=bool(attempt.reason),
        attributes=attributes,
        state=context.state,
    )


def _attributes(call: Told) -> Attributes:
    fallback = call.serving is not None and call.serving != call.assigned
    attributes: Attributes = {
        "http.request.method": "POST",
        "http.response.status_code": call.status,
        "shipworthy.inference": call.id,
        "shipworthy.plan": call.plan,
        "shipworthy.revision": call.revision,
        "shipworthy.assigned": call.assigned,
        "shipworthy.release": call.release,
        "shipworthy.outcome": call.outcome.value,
        "shipworthy.protocol": call.protocol,
        "shipworthy.attempts": call.attempts,
        "shipworthy.fallback": fallback,
    }
    given = {
        "shipworthy.rollout": call.rollout,
        "shipworthy.reason": call.reason,
        "shipworthy.serving": call.serving,
        "shipworthy.serving_release": call.serving_release,
    }
    attributes.update({name: value for name, value in given.items() if value})
    measured = {
        "shipworthy.attempt_seconds": call.attempt_seconds,
        "shipworthy.cost": call.cost,
    }
    attributes.update({name: value for name, value in measured.items() if value is not None})
    return attributes


def _generative(call: Told, operation: str) -> Attributes:
    """By the conventions for generative AI, `openai` names the protocol and not the vendor."""
    attributes: Attributes = {
        "gen_ai.operation.name": operation,
        "gen_ai.provider.name": "openai",
        "gen_ai.request.model": call.plan,
    }
    if call.stream:
        attributes["gen_ai.request.stream"] = True
    if call.serving_release:
        attributes["gen_ai.response.model"] = call.serving_release
    if call.finish:
        attributes["gen_ai.response.finish_reasons"] = call.finish.split(",")
    if call.tokens_estimated:
        attributes["shipworthy.tokens_estimated"] = True
    measured = {
        "gen_ai.usage.input_tokens": call.input_tokens,
        "gen_ai.usage.output_tokens": call.output_tokens,
        "gen_ai.usage.cache_read.input_tokens": call.cached_tokens,
        "gen_ai.response.time_to_first_chunk": call.first_content_seconds,
    }
    attributes.update({name: value for name, value in measured.items() if value is not None})
    return attributes


def _failed(call: Told) -> bool:
    """Whether the client was failed: by our status, or by a stream that broke off after its 200.

    An attempt that failed and was made good by another is no failure of the request.
    """
    if call.status >= 500:
        return True
    only = call.attempts == 1 and call.serving == call.assigned
    return only and call.outcome is Outcome.FAILURE and call.status < 400


def _address(url: str) -> Attributes:
    """Where a server is; a name and password in the URL stay out."""
    parts = urlsplit(url)
    if not parts.hostname:
        return {"server.address": parts.path}
    port = parts.port or _PORTS.get(parts.scheme)
    return {"server.address": parts.hostname, **({"server.port": port} if port else {})}
