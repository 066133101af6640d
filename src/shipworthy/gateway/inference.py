"""The way of a call: read, check, choose an arm, ask it, shield the client, answer."""

from __future__ import annotations

import asyncio
from typing import Final

import msgspec

from shipworthy.domain.plan import Key
from shipworthy.domain.routing import Choice, choose
from shipworthy.gateway.call import (
    Call,
    patience_of,
    slices_of,
    traceparent_of,
    unit_of,
)
from shipworthy.gateway.capture import Capture
from shipworthy.gateway.http import RETRY, Answer, ClientGone, Refusal, Request
from shipworthy.gateway.live import LiveArm, LivePlan
from shipworthy.gateway.parts import Parts
from shipworthy.gateway.upstream import EndpointState, Reply, pick
from shipworthy.protocols.oip import (
    ContractViolation,
    InferenceRequest,
    InvalidMessage,
    MalformedMessage,
    decode_request,
    decode_response,
    error_body,
    rename_response,
)
from shipworthy.protocols.outcomes import Reason

GONE: Final = 499
"""The status that records give to a call whose client went away."""

_RETRIED = frozenset(
    {
        Reason.UNREACHABLE, Reason.CONNECT_TIMEOUT, Reason.TIMEOUT, Reason.BROKEN,
        Reason.SERVER_ERROR, Reason.OVERLOADED,
    }
)  # fmt: skip
_NO_ATTEMPT = frozenset({Reason.CLIENT_DEADLINE, Reason.GATEWAY_FAULT})
"""Says nothing about the release that was to answer."""
_STATUS: Final = {
    Reason.TIMEOUT: 504,
    Reason.CONNECT_TIMEOUT: 504,
    Reason.CLIENT_DEADLINE: 504,
    Reason.FULL: 503,
    Reason.GATEWAY_FAULT: 503,
    Reason.OVERLOADED: 503,
    Reason.EJECTED: 503,
}
_TEXT: Final = {
    Reason.UNREACHABLE: "the model can't be reached",
    Reason.CONNECT_TIMEOUT: "the model can't be reached in time",
    Reason.TIMEOUT: "the model did not answer in time",
    Reason.BROKEN: "the model's answer broke off or is not the protocol's",
    Reason.SERVER_ERROR: "the model failed",
    Reason.REFUSED: "the model refused a request that its contract allows",
    Reason.OVERLOADED: "the model has too much to do; try again in a moment",
    Reason.UNEXPECTED_STATUS: "the model's server did not answer as the protocol says",
    Reason.AGAINST_CONTRACT: "the model's answer breaks its contract",
    Reason.NARROWED_CONTRACT: "this release no longer accepts such a request",
    Reason.EJECTED: "this release keeps failing and is not called for now",
    Reason.FULL: "too many requests are waiting for the model; try again in a moment",
    Reason.CLIENT_DEADLINE: "the deadline that the request set is over",
    Reason.GATEWAY_FAULT: "the gateway can open no more connections; try again in a moment",
}


class _UpstreamError(msgspec.Struct):
    error: str


class InferenceDoor:
    """Answers inference calls, and leaves a record of each."""

    def __init__(self, parts: Parts) -> None:
        self._options = parts.options
        self._follower = parts.follower
        self._upstream = parts.upstream
        self._metrics = parts.metrics
        self._tickets = parts.tickets
        self._pseudonyms = parts.pseudonyms
        self._memory = parts.memory
        self._clock = parts.outside.clock
        self._monotonic = parts.outside.monotonic
        self._uniform = parts.outside.uniform
        self._capture = Capture(parts.outside.journal, parts.metrics, self._clock)

    async def infer(
        self, request: Request, key: Key, live: LivePlan, pinned: LiveArm | None
    ) -> Answer:
        """The answer, whose record is in the journal by now."""
        unit, patience, problem = _asked(request)
        call = self._assign(request, key, live, pinned, unit)
        call.started = self._monotonic()
        call.patience = call.started + patience
        try:
            answer = problem.answer() if problem else await self._answered(request, call)
            if problem:
                call.judge(problem.reason)
        except Refusal as refusal:
            call.judge(refusal.reason)
            answer = refusal.answer()
        except (ClientGone, asyncio.CancelledError) as end:
            gone = isinstance(end, ClientGone) or request.gone()
            if call.outcome is None and call.attempts:  # how long it was waited for, at least
                call.first_seconds = self._monotonic() - call.started
            call.judge(Reason.CLIENT_GONE if gone else Reason.SHUTDOWN)
            self._write(call, Answer(GONE if gone else 503, b""))
            raise
        except Exception:
            call.judge(Reason.GATEWAY_FAULT)
            self._write(call, Answer(500, b""))
            raise
        finally:
            self._memory.give_back(len(call.body))
        headers = [(b"x-shipworthy-inference", call.id.encode()), *answer.headers]
        answer = Answer(answer.status, answer.body, headers)
        self._write(call, answer)
        return answer

    def _assign(
        self, request: Request, key: Key, live: LivePlan, pinned: LiveArm | None, unit: str | None
    ) -> Call:
        """Choose by the raw unit; from here on only its pseudonym is known."""
        if pinned is not None:
            choice = Choice(pinned.name, 1.0, "")
        else:
            now = self._follower.now_for(live.plan)
            choice = choose(live.plan, unit, now=now, uniform=self._uniform())
        call = Call(live, live.arm(choice.arm), choice, key, pinned=pinned is not None)
        call.unit = None if unit is None else self._pseudonyms.of(unit)
        call.slices = slices_of(request)
        call.traceparent = traceparent_of(request)
        call.id = self._tickets.issue(at=self._clock(), key=key.id, arm=choice.arm, unit=call.unit)
        return call

    def _write(self, call: Call, answer: Answer) -> None:
        seconds = self._monotonic() - call.started
        self._capture.write(call, status=answer.status, response=answer.body, seconds=seconds)

    async def _answered(self, request: Request, call: Call) -> Answer:
        options = self._options
        call.body = await request.body(options.max_body, options.body_seconds, self._memory)
        call.started = self._monotonic()
        call.deadline = min(call.started + call.live.plan.deadlines.total, call.patience)
        if b"inference-header-content-length" in request.headers:
            raise Refusal(
                400,
                "binary tensor data is not accepted; send it as JSON",
                reason=Reason.UNSUPPORTED,
            )
        # While a release is being rolled out, what clients may send is what stable takes.
        public = call.arm if call.pinned else call.live.stable
        try:
            message = decode_request(call.body)
            public.checker.check_request(message)
        except MalformedMessage as problem:
            raise Refusal(400, str(problem), reason=Reason.INVALID_JSON) from None
        except InvalidMessage as problem:
            raise Refusal(400, str(problem)) from None
        return await self._shielded(request, call, message)

    async def _shielded(self, request: Request, call: Call, message: InferenceRequest) -> Answer:
        """Ask the assigned arm; if it fails, whoever may answer in its place."""
        live, arm = call.live, call.arm
        if arm.name == "candidate":
            live.fallbacks.earn()
        live.retries.earn()
        headers = _passed_on(request, call)
        reply, endpoint = await self._attempt(call, arm, message, headers)
        call.judge(reply.reason)
        if call.attempts:
            call.first_seconds = self._monotonic() - call.started
        if reply.reason is Reason.ANSWERED:
            return self._served(call, arm, reply)
        if arm is not live.stable and not call.pinned and self._may_fall_back(call, reply):
            arm = live.stable
            reply, endpoint = await self._attempt(call, arm, message, headers)
        if self._may_retry(call, arm, reply):
            reply, endpoint = await self._attempt(call, arm, message, headers, avoid=endpoint)
        if reply.reason is Reason.ANSWERED:
            return self._served(call, arm, reply)
        return self._nothing(call, reply)

    def _may_fall_back(self, call: Call, reply: Reply) -> bool:
        return (
            reply.reason is not Reason.CLIENT_DEADLINE
            and self._monotonic() < call.deadline
            and call.live.fallbacks.spend()
        )

    def _may_retry(self, call: Call, arm: LiveArm, reply: Reply) -> bool:
        """One that was never sent can go elsewhere; one that was, only if it changes nothing."""
        if reply.reason not in _RETRIED or self._monotonic() >= call.deadline:
            return False
        if not call.pinned and arm is not call.live.stable:
            return False
        if (reply.sent and not arm.repeatable) or not call.live.retries.spend():
            return False
        self._metrics.retries.labels(call.live.plan.name).inc()
        return True

    async def _attempt(
        self,
        call: Call,
        arm: LiveArm,
        message: InferenceRequest,
        headers: dict[str, str],
        avoid: EndpointState | None = None,
    ) -> tuple[Reply, EndpointState | None]:
        """One attempt at an arm, or the reason why there was none."""
        live = call.live
        guarded = arm.name == "candidate" and not call.pinned
        if guarded and not live.same_contract:
            try:
                arm.checker.check_request(message)
            except InvalidMessage as problem:
                return Reply(Reason.NARROWED_CONTRACT, sent=False, detail=str(problem)), None
        if not arm.endpoints:
            return Reply(Reason.UNREACHABLE, sent=False), None
        if guarded and not live.breaker.allows(self._monotonic()):
            return Reply(Reason.EJECTED, sent=False), None
        wait = min(self._options.queue_seconds, call.deadline - self._monotonic())
        if not await arm.gate.enter(wait):
            late = self._monotonic() >= call.deadline == call.patience
            return Reply(Reason.CLIENT_DEADLINE if late else Reason.FULL, sent=False), None
        try:
            live.turn += avoid is None
            endpoint = pick(arm.endpoints, live.turn, avoid)
            reply = await self._ask(call, arm, endpoint, headers)
        finally:
            arm.gate.leave()
        if reply.reason is Reason.ANSWERED:
            reply = _judged(call, arm, reply, message)
        if guarded and reply.reason not in _NO_ATTEMPT:
            live.breaker.note(failed=reply.reason is not Reason.ANSWERED, now=self._monotonic())
        return reply, endpoint

    async def _ask(
        self, call: Call, arm: LiveArm, endpoint: EndpointState, headers: dict[str, str]
    ) -> Reply:
        limits = call.live.plan.deadlines
        left = call.deadline - self._monotonic()
        clients = call.deadline == call.patience and left < limits.attempt
        call.attempts += 1
        if arm.name == "candidate" and call.sent is None:
            call.sent = self._clock()
        return await self._upstream.infer(
            endpoint,
            arm.arm.served_model,
            call.body,
            headers=headers,
            connect_seconds=limits.connect,
            seconds=min(limits.attempt, left),
            when_late=Reason.CLIENT_DEADLINE if clients else Reason.TIMEOUT,
        )

    def _served(self, call: Call, arm: LiveArm, reply: Reply) -> Answer:
        call.serving = arm
        call.answered_by = arm.name
        if arm is call.arm:
            return Answer(200, reply.body, arm.headers)
        self._metrics.fallbacks.labels(call.live.plan.name, "stable").inc()
        return Answer(200, reply.body, [*arm.headers, (b"x-shipworthy-fallback", b"stable")])

    def _nothing(self, call: Call, reply: Reply) -> Answer:
        """Nobody could answer: the policy's message, marked as such, or what went wrong."""
        plan = call.live.plan
        passed = _refusal_text(reply)
        if passed:
            return Answer(reply.status, error_body(passed))
        if plan.fallback_message is not None and reply.reason is not Reason.CLIENT_DEADLINE:
            call.answered_by = "fallback_message"
            self._metrics.fallbacks.labels(plan.name, "message").inc()
            marked = [(b"x-shipworthy-fallback", b"message"), RETRY]
            return Answer(503, error_body(plan.fallback_message), marked)
        text = _TEXT[reply.reason] + (f": {reply.detail}" if reply.detail else "")
        status = _STATUS.get(reply.reason, 502)
        return Answer(status, error_body(text), [RETRY] if status == 503 else [])


def _asked(request: Request) -> tuple[str | None, float, Refusal | None]:
    """The raw unit, the client's patience in seconds, and what is wrong with either."""
    try:
        return unit_of(request), patience_of(request), None
    except Refusal as refusal:
        return None, 0.0, refusal


def _passed_on(request: Request, call: Call) -> dict[str, str]:
    headers: dict[str, str] = {}
    if call.traceparent:
        headers["traceparent"] = call.traceparent
        state = request.headers.get(b"tracestate", b"")
        if state and len(state) <= 512 and state.isascii():
            headers["tracestate"] = state.decode()
    return headers


def _judged(call: Call, arm: LiveArm, reply: Reply, message: InferenceRequest) -> Reply:
    """The answer held against the contract, under the name that the client called."""
    try:
        response = decode_response(reply.body)
        arm.checker.check_response(response, message)
    except ContractViolation as problem:
        return Reply(Reason.AGAINST_CONTRACT, reply.status, detail=str(problem))
    except MalformedMessage as problem:
        return Reply(Reason.BROKEN, reply.status, detail=str(problem))
    name, version = call.live.plan.name, str(arm.arm.version)
    if response.model_name == name and response.model_version == version:
        return reply
    return msgspec.structs.replace(
        reply, body=rename_response(reply.body, model_name=name, model_version=version)
    )


def _refusal_text(reply: Reply) -> str:
    """What the model itself says about an input that no contract can describe; else empty."""
    if reply.reason is not Reason.REFUSED or reply.status not in (400, 422):
        return ""
    try:
        return msgspec.json.decode(reply.body, type=_UpstreamError).error[:500]
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return ""
