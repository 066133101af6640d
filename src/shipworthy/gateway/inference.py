"""The way of a call: read, admit, choose an arm, ask it, shield the client, answer."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from msgspec import structs

from shipworthy.domain.plan import Key
from shipworthy.domain.routing import Choice, choose
from shipworthy.gateway.attempts import Attempts, refuses_input
from shipworthy.gateway.call import Ask, Call, patience_of, slices_of, unit_of
from shipworthy.gateway.capture import Capture
from shipworthy.gateway.failures import GONE, RETRIED, STATUS, TEXT
from shipworthy.gateway.http import RETRY, Answer, ClientGone, HeaderList, Refusal, Request
from shipworthy.gateway.limits import Denial, LimitBook
from shipworthy.gateway.live import LiveArm, LivePlan
from shipworthy.gateway.mirrors import Mirrors
from shipworthy.gateway.parts import Parts
from shipworthy.gateway.streams import Given, Streams
from shipworthy.gateway.upstream import Reply
from shipworthy.protocols.messages import InvalidMessage, MalformedMessage
from shipworthy.protocols.outcomes import Reason

Read = Callable[[Request], Ask]
"""Reads a request's body; raises InvalidMessage or Refusal."""


class InferenceDoor:
    """Answers inference calls, and leaves a record of each."""

    def __init__(self, parts: Parts) -> None:
        self._follower = parts.follower
        self._metrics = parts.metrics
        self._limits = parts.limits
        self._tickets = parts.tickets
        self._pseudonyms = parts.pseudonyms
        self._context = parts.outside.context
        self._clock = parts.outside.clock
        self._monotonic = parts.outside.monotonic
        self._uniform = parts.outside.uniform
        self._capture = Capture(parts)
        self._mirrors = Mirrors(parts)
        self._attempts = Attempts(parts)
        self._streams = Streams(parts, self._capture)

    def close(self) -> None:
        """Give up what nobody waits for."""
        self._mirrors.close()

    async def infer(
        self, request: Request, key: Key, live: LivePlan, pinned: LiveArm | None, read: Read
    ) -> Answer | None:
        """The answer, whose record is in the journal by now; None when it has been streamed."""
        started = self._monotonic()
        ask, problem = _read(request, read)
        unit, patience, problem = _asked(request, problem)
        if unit is None and ask is not None:
            unit = ask.unit
        call = self._assign(request, key, live, pinned, unit)
        call.ask = ask
        call.started = started
        call.patience = started + patience
        call.deadline = min(started + live.plan.deadlines.total, call.patience)
        try:
            answer = await self._answered(request, call, ask, problem)
        except Refusal as refusal:
            call.judge(refusal.reason)
            answer = refusal.answer(request.shape)
        except (ClientGone, asyncio.CancelledError) as end:
            gone = isinstance(end, ClientGone) or request.gone()
            if call.outcome is None and call.attempts:  # how long it was waited for, at least
                call.first_seconds = self._monotonic() - call.started
            call.judge(Reason.CLIENT_GONE if gone else Reason.SHUTDOWN)
            self._write(call, GONE if gone else 503, b"")
            raise
        except Exception:
            call.judge(Reason.GATEWAY_FAULT)
            self._write(call, 500, b"")
            raise
        if answer is None:
            self._mirrors.consider(call, call.streamed)
            return None
        if not answer.lines:
            answer = structs.replace(answer, lines=_told(call))
        self._write(call, answer.status, answer.body)
        if call.attempts:
            self._mirrors.consider(call, answer.body)
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
        call = Call(request, live, live.arm(choice.arm), choice, key, pinned=pinned is not None)
        call.unit = None if unit is None else self._pseudonyms.of(unit)
        headers = request.headers
        if b"x-shipworthy-slice" in headers:
            call.slices = slices_of(request)
        call.trace(self._context(headers))
        call.asked_at = self._clock()
        call.id = self._tickets.issue(at=call.asked_at, key=key.id, arm=choice.arm, unit=call.unit)
        return call

    def _write(self, call: Call, status: int, response: bytes) -> None:
        self._capture.write(call, status, response, self._monotonic() - call.started)

    async def _answered(
        self, request: Request, call: Call, ask: Ask | None, problem: Refusal | ClientGone | None
    ) -> Answer | None:
        if ask is None or problem is not None:
            raise problem or ClientGone
        if self._limits is not None:
            self._admit(self._limits, call, ask)
        # While a release is being rolled out, what clients may send is what stable takes.
        public = call.arm if call.pinned else call.live.stable
        try:
            ask.check(public)
        except InvalidMessage as violation:
            raise Refusal(400, str(violation)) from None
        return await self._shielded(request, call, ask)

    def _admit(self, limits: LimitBook, call: Call, ask: Ask) -> None:
        """Reserve what the call may use; 429 when its key or model has none of it left."""
        price, plan = call.arm.arm.price, call.live.plan
        read, written = ask.input_tokens, ask.output_tokens
        cost = price.of(read, written) if price else 0.0
        admitted = limits.admit(call.key, plan, tokens=read + written, cost=cost)
        if isinstance(admitted, Denial):
            self._metrics.limited(plan.name, admitted.limit)
            raise Refusal(
                admitted.status,
                admitted.message,
                reason=Reason.OVER_LIMIT,
                headers=admitted.headers,
                code=admitted.code,
            )
        call.admission = admitted

    async def _shielded(self, request: Request, call: Call, ask: Ask) -> Answer | None:
        """Ask the assigned arm; if it fails, whoever may answer in its place."""
        live, arm = call.live, call.arm
        if arm.name == "candidate":
            live.fallbacks.earn()
        live.retries.earn()
        first = given = await self._attempts.attempt(call, arm, ask)
        refused = refuses_input(ask, given.reply)
        if call.attempts:
            call.first_seconds = self._monotonic() - call.started
        if given.stream is None and not refused:
            call.judge(given.reply.reason)
        if not given.answered:
            arm, given = await self._elsewhere(call, ask, given)
        if refused:
            given = self._refused(call, ask, first, given)
        if given.answered:
            return await self._served(request, call, arm, given)
        return self._nothing(request, call, ask, given.reply)

    async def _elsewhere(self, call: Call, ask: Ask, given: Given) -> tuple[LiveArm, Given]:
        """What whoever may answer in the place of the one that failed gives, and who that was."""
        live, arm = call.live, call.arm
        if arm is not live.stable and not call.pinned and self._may_fall_back(call, given.reply):
            arm = live.stable
            given = await self._attempts.attempt(call, arm, ask)
        if self._may_retry(call, arm, given.reply):
            given = await self._attempts.attempt(call, arm, ask, avoid=given.endpoint)
        return arm, given

    def _refused(self, call: Call, ask: Ask, first: Given, last: Given) -> Given:
        """Judge a refusal by what became of it: what one refuses and another answers was sound."""
        if last.answered:
            self._attempts.blame(call)
            call.judge(Reason.REFUSED)
            return last
        call.judge(Reason.REFUSED_INPUT)
        return last if refuses_input(ask, last.reply) else first

    def _may_fall_back(self, call: Call, reply: Reply) -> bool:
        return (
            reply.reason is not Reason.CLIENT_DEADLINE
            and self._monotonic() < call.deadline
            and call.live.fallbacks.spend()
        )

    def _may_retry(self, call: Call, arm: LiveArm, reply: Reply) -> bool:
        """One that was never sent can go elsewhere; one that was, only if it changes nothing."""
        if reply.reason not in RETRIED or self._monotonic() >= call.deadline:
            return False
        if not call.pinned and arm is not call.live.stable:
            return False
        if (reply.sent and not arm.repeatable) or not call.live.retries.spend():
            return False
        self._metrics.retries.labels(call.live.plan.name).inc()
        return True

    async def _served(
        self, request: Request, call: Call, arm: LiveArm, given: Given
    ) -> Answer | None:
        call.serving = arm
        call.answered_by = arm.name
        reply, lines = given.reply, arm.lines + _told(call)
        if arm is not call.arm:
            self._metrics.fallbacks.labels(call.live.plan.name, "stable").inc()
            lines += b"x-shipworthy-fallback: stable\r\n"
        if reply.extra:
            lines += b"".join([b"%s: %s\r\n" % header for header in reply.extra])
        if given.stream is not None:
            await self._streams.pump(request, call, given.stream, lines, reply.content_type)
            return None
        return Answer(200, reply.body, [], reply.content_type, lines)

    def _nothing(self, request: Request, call: Call, ask: Ask, reply: Reply) -> Answer:
        """Nobody could answer: the policy's message, marked as such, or what went wrong."""
        plan = call.live.plan
        passed = ask.refusal(reply)
        if passed is not None:
            return Answer(passed.status, passed.body, [*passed.extra], passed.content_type)
        if plan.fallback_message is not None and reply.reason is not Reason.CLIENT_DEADLINE:
            call.answered_by = "fallback_message"
            self._metrics.fallbacks.labels(plan.name, "message").inc()
            body = request.shape(503, plan.fallback_message, "")
            return Answer(503, body, [(b"x-shipworthy-fallback", b"message"), RETRY])
        text = TEXT[reply.reason] + (f": {reply.detail}" if reply.detail else "")
        status = STATUS.get(reply.reason, 502)
        headers = _wait(reply) if status == 503 else []
        return Answer(status, request.shape(status, text, ""), headers)


def _read(request: Request, read: Read) -> tuple[Ask | None, Refusal | ClientGone | None]:
    """The request as its dialect reads it, or what is wrong with it."""
    if request.problem is not None:
        return None, request.problem
    try:
        return read(request), None
    except Refusal as refusal:
        return None, refusal
    except MalformedMessage as problem:
        return None, Refusal(400, str(problem), reason=Reason.INVALID_JSON)
    except InvalidMessage as problem:
        return None, Refusal(400, str(problem))


def _asked(
    request: Request, problem: Refusal | ClientGone | None
) -> tuple[str | None, float, Refusal | ClientGone | None]:
    """The raw unit, the client's patience in seconds, and what is wrong with either."""
    try:
        return unit_of(request), patience_of(request), problem
    except Refusal as refusal:
        return None, 0.0, problem or refusal


def _told(call: Call) -> bytes:
    """What every answer says: the inference's id, and what is left of limits."""
    left = b"" if call.admission is None else call.admission.lines
    return b"x-shipworthy-inference: %s\r\n%s" % (call.id.encode(), left)


def _wait(reply: Reply) -> HeaderList:
    """How long to wait: as the server says, if it says so in a way that can be passed on."""
    said = reply.headers.get(b"retry-after", b"")
    return [(b"retry-after", said)] if said.isdigit() and len(said) < 6 else [RETRY]
