"""Copies of requests for a release that is being tried out, whose answers nobody gets.

A copy begins when the client has its answer, in its own time and within its own bounds. Where there
is no room or no money left for it, there is none, and that is counted.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
from itertools import count
from typing import Final

from shipworthy.domain.agreement import agreement
from shipworthy.domain.plan import Capture as CaptureRules
from shipworthy.domain.plan import Key
from shipworthy.domain.records import MirrorRecord
from shipworthy.domain.routing import Choice
from shipworthy.gateway.attempts import refuses_input
from shipworthy.gateway.call import Ask, Call
from shipworthy.gateway.limits import Denial
from shipworthy.gateway.live import LiveArm, LivePlan
from shipworthy.gateway.parts import Parts, mirror_plan
from shipworthy.gateway.streams import Opening, OpenStream, open_stream
from shipworthy.gateway.upstream import Reply, pick
from shipworthy.protocols.messages import InvalidMessage
from shipworthy.protocols.outcomes import OUTCOMES, Reason

_log = logging.getLogger("shipworthy.gateway")

MARK: Final = b"x-shipworthy-mirror: 1\r\n"
"""Tells the server that nobody waits for its answer."""
_MAX_COMPARED: Final = 1024 * 1024  # others wait meanwhile
_NOBODY: Final = Key(id=" mirror", hash="", role="client")


class Mirrors:
    """Sends copies."""

    def __init__(self, parts: Parts) -> None:
        outside = parts.outside
        self._journal = outside.journal
        self._clock = outside.clock
        self._monotonic = outside.monotonic
        self._uniform = outside.uniform
        self._upstream = parts.upstream
        self._metrics = parts.metrics
        self._limits = parts.limits
        self._max_event = parts.options.max_event
        self._prefix = f"mi_{parts.worker.hex()}"
        self._numbers = count()
        self._tasks: dict[asyncio.Task[None], str] = {}

    def consider(self, call: Call, answer: bytes | None) -> None:
        """Copy this request, if it is one of those that are; `answer` is what the client got.

        None where that is not there as a whole.
        """
        live, ask = call.live, call.ask
        mirror, arm = live.plan.mirror, live.mirror
        if mirror is None or arm is None or ask is None or not arm.repeatable:
            return
        if self._uniform() >= mirror.share:
            return
        name = live.plan.name
        if sum(each == name for each in self._tasks.values()) >= mirror.concurrency:
            self._metrics.mirrored(name, arm.arm.release, "no_room", agrees=None)
            return
        task = asyncio.get_running_loop().create_task(self._copy(call, ask, arm, answer))
        self._tasks[task] = name
        task.add_done_callback(self._done)

    def _done(self, task: asyncio.Task[None]) -> None:
        del self._tasks[task]
        if not task.cancelled() and task.exception() is not None:
            self._metrics.errors.inc()
            _log.error("a copy of a request failed on a fault of ours", exc_info=task.exception())

    def close(self) -> None:
        """Give up the copies that are under way."""
        for task in self._tasks:
            task.cancel()

    async def _copy(self, first: Call, ask: Ask, arm: LiveArm, answer: bytes | None) -> None:
        live = first.live
        copy = Call(first.request, live, arm, Choice("candidate", 1.0, ""), _NOBODY, pinned=True)
        copy.ask, copy.serving = ask, arm
        copy.passed_on = first.passed_on + MARK
        copy.started = self._monotonic()
        if not self._affordable(copy, ask, arm, live):
            self._metrics.mirrored(live.plan.name, arm.arm.release, "no_budget", agrees=None)
            return
        reply = Reply(Reason.SHUTDOWN)
        try:
            reply = await self._ask(copy, ask, arm)
        finally:
            if copy.admission is not None:
                usage = copy.usage
                tokens = (usage.input_tokens or 0) + (usage.output_tokens or 0) if usage else 0
                copy.admission.settle(tokens, (copy.cost or 0.0) if reply.sent else 0.0)
        self._write(first, copy, ask, reply, answer)

    def _affordable(self, copy: Call, ask: Ask, arm: LiveArm, live: LivePlan) -> bool:
        if self._limits is None or live.plan.mirror is None:
            return True
        price = arm.arm.price
        cost = price.of(ask.input_tokens, ask.output_tokens) if price else 0.0
        admitted = self._limits.admit(_NOBODY, mirror_plan(live.plan), tokens=0, cost=cost)
        if isinstance(admitted, Denial):
            return False
        copy.admission = admitted
        return True

    async def _ask(self, copy: Call, ask: Ask, arm: LiveArm) -> Reply:
        limits = copy.live.plan.deadlines
        endpoint = pick(arm.endpoints, next(self._numbers)) if arm.endpoints else None
        if endpoint is None:
            return Reply(Reason.FULL if arm.endpoints else Reason.UNREACHABLE, sent=False)
        try:
            ask.check(arm)
            outgoing = ask.outgoing(arm, copy)
        except InvalidMessage as problem:
            return Reply(Reason.NARROWED_CONTRACT, sent=False, detail=str(problem))
        if arm.speech.wanted:
            self._upstream.learn(endpoint, arm.speech)
        if ask.stream:
            opening = Opening(limits.connect, limits.attempt, Reason.TIMEOUT, self._max_event)
            given = await open_stream(
                self._upstream, copy, arm, endpoint, ask, outgoing, opening, self._monotonic
            )
            return given.reply if given.stream is None else await self._read(copy, given.stream)
        reply = await self._upstream.ask(
            endpoint, outgoing, connect_seconds=limits.connect, seconds=limits.attempt
        )
        return ask.judged(reply, arm, copy) if reply.reason is Reason.ANSWERED else reply

    async def _read(self, copy: Call, stream: OpenStream) -> Reply:
        """A stream to its end, as an answer."""
        limits = copy.live.plan.deadlines
        end = asyncio.get_running_loop().time() + limits.stream
        parts, stream.held = stream.held, []
        size = sum(map(len, parts))
        try:
            while stream.reason is None:
                more = await stream.within(limits.idle, end)
                parts += more
                size += sum(map(len, more))
                if size > self._upstream.max_response:
                    stream.reason = Reason.BROKEN
        finally:
            reason = Reason.SHUTDOWN if stream.reason is None else stream.reason
            stream.end(reason)
        copy.usage = stream.reader.usage()
        body = b"".join([*parts, stream.last])
        return Reply(reason, 200, body, detail=stream.reader.error)

    def _keeps(self, rules: CaptureRules) -> bool:
        if rules.payloads == "sampled":
            return self._uniform() < rules.sample
        return rules.payloads == "full"

    def _write(self, first: Call, copy: Call, ask: Ask, reply: Reply, answer: bytes | None) -> None:
        plan, arm = first.live.plan, copy.arm
        answered = reply.reason is Reason.ANSWERED
        agrees, difference = _compared(first, ask, reply, answer)
        body: bytes | None = None
        redacted = 0
        digest: str | None = None
        if answered and self._keeps(plan.capture):
            body, redacted = first.live.redactor.redact(reply.body, plan.capture.max_bytes)
            if len(reply.body) > plan.capture.max_bytes:
                digest = hashlib.sha256(reply.body).hexdigest()
        usage, now = copy.usage, self._clock()
        # Where the client's own request was refused too, that says nothing about the release.
        alike = first.reason is Reason.REFUSED_INPUT and refuses_input(ask, reply)
        reason = Reason.REFUSED_INPUT if alike else reply.reason
        record = MirrorRecord(
            id=f"{self._prefix}{int(now * 1000):x}{next(self._numbers):x}",
            at=now,
            inference=first.id,
            asked_at=first.asked_at,
            plan=plan.name,
            model=plan.model,
            release=arm.arm.release,
            compared_with=first.serving.arm.release if first.serving else None,
            outcome=OUTCOMES[reason],
            reason=reason.value,
            status=reply.status,
            seconds=self._monotonic() - copy.started,
            agrees=agrees,
            difference=difference[:200],
            input_tokens=usage.input_tokens if usage else None,
            output_tokens=usage.output_tokens if usage else None,
            cost=copy.cost if answered else None,
            response_bytes=len(reply.body),
            response=body,
            response_digest=digest,
            unit=first.unit,
            redacted=redacted,
        )
        if not self._journal.append(record):
            self._metrics.settle_dropped(self._journal.dropped, now)
        self._metrics.mirrored(plan.name, record.release, record.outcome.value, agrees)


def _compared(first: Call, ask: Ask, reply: Reply, answer: bytes | None) -> tuple[bool | None, str]:
    """Whether it says the same as what the client got, and where not, or what is wrong with it."""
    if reply.reason is not Reason.ANSWERED or answer is None or first.serving is None:
        return None, reply.detail
    if len(reply.body) > _MAX_COMPARED or len(answer) > _MAX_COMPARED:
        return None, ""
    return agreement(ask.protocol, answer, reply.body)
