"""Attempts at an arm: one at a time, a second one elsewhere when the first is slow."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, Final

from shipworthy.gateway.call import Ask, Call
from shipworthy.gateway.http import Refusal
from shipworthy.gateway.live import LiveArm
from shipworthy.gateway.parts import Parts
from shipworthy.gateway.spans import Attempt
from shipworthy.gateway.streams import Given, Opening, open_stream
from shipworthy.gateway.upstream import EndpointState, Reply, pick
from shipworthy.protocols.messages import InvalidMessage
from shipworthy.protocols.outcomes import Reason

_NO_ATTEMPT = frozenset({Reason.CLIENT_DEADLINE, Reason.GATEWAY_FAULT})
"""Says nothing about the release that was to answer."""
_REFUSE_INPUT = frozenset({400, 413, 422})


class Attempts:
    """Asks arms on behalf of calls, within all their bounds."""

    def __init__(self, parts: Parts) -> None:
        self._options = parts.options
        self._upstream = parts.upstream
        self._metrics = parts.metrics
        self._clock = parts.outside.clock
        self._monotonic = parts.outside.monotonic

    async def attempt(
        self, call: Call, arm: LiveArm, ask: Ask, avoid: EndpointState | None = None
    ) -> Given:
        """One attempt at an arm, or the reason why there was none."""
        live = call.live
        guarded = arm.name == "candidate" and not call.pinned
        if guarded and not live.same_contract:
            try:
                ask.check(arm)
            except InvalidMessage as problem:
                return _none(Reason.NARROWED_CONTRACT, str(problem))
        if not arm.endpoints:
            return _none(Reason.UNREACHABLE)
        if guarded and not live.breaker.allows(self._monotonic()):
            return _none(Reason.EJECTED)
        if not arm.gate.try_enter() and not await self._wait_for(call, arm):
            late = self._monotonic() >= call.deadline == call.patience
            return _none(Reason.CLIENT_DEADLINE if late else Reason.FULL)
        stays = False
        try:
            live.turn += avoid is None
            endpoint = pick(arm.endpoints, live.turn, avoid)
            given = _FULL if endpoint is None else await self._asking(call, arm, endpoint, ask)
            if given.stream is not None:  # it leaves when the stream ends
                given.stream.on_end(lambda reason: self._ended(call, arm, reason, guarded=guarded))
                stays = True
        finally:
            if not stays:
                arm.gate.leave()
        if guarded and given.stream is None and _tells(ask, given.reply):
            live.breaker.note(failed=not given.answered, now=self._monotonic())
        return given

    def blame(self, call: Call) -> None:
        """Count as the candidate's failure what `attempt` could not tell to be one."""
        if call.arm.name == "candidate" and not call.pinned:
            call.live.breaker.note(failed=True, now=self._monotonic())

    async def _wait_for(self, call: Call, arm: LiveArm) -> bool:
        wait = min(self._options.queue_seconds, call.deadline - self._monotonic())
        return await arm.gate.enter(wait)

    def _ended(self, call: Call, arm: LiveArm, reason: Reason, *, guarded: bool) -> None:
        """A stream is over."""
        arm.gate.leave()
        censored = reason in _NO_ATTEMPT or reason in (Reason.CLIENT_GONE, Reason.SHUTDOWN)
        if guarded and not censored:
            call.live.breaker.note(failed=reason is not Reason.ANSWERED, now=self._monotonic())

    def _asking(
        self, call: Call, arm: LiveArm, endpoint: EndpointState, ask: Ask
    ) -> Coroutine[Any, Any, Given]:
        live = call.live
        hedge = live.plan.hedge
        if hedge is None or ask.stream or not arm.repeatable or len(arm.endpoints) < 2:
            return self._ask(call, arm, endpoint, ask)
        live.hedges.earn()
        return self._hedged(call, arm, endpoint, ask, hedge.after)

    async def _hedged(
        self, call: Call, arm: LiveArm, endpoint: EndpointState, ask: Ask, after: float
    ) -> Given:
        """Ask a second endpoint when the first is silent for long; the first answer counts."""
        first = asyncio.ensure_future(self._ask(call, arm, endpoint, ask))
        tasks = {first}
        try:
            await asyncio.wait(tasks, timeout=after)
            second = pick(arm.endpoints, call.live.turn, endpoint)
            if first.done() or second in (None, endpoint) or not call.live.hedges.spend():
                return await first
            assert second is not None  # noqa: S101  # as was just asked
            other = asyncio.ensure_future(self._ask(call, arm, second, ask))
            tasks.add(other)
            done, left = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            if left and not any(task.result().answered for task in done):
                done, left = await asyncio.wait(tasks)
            given = [task.result() for task in (first, other) if task in done]
            best = next((one for one in given if one.answered), given[0])
            self._metrics.hedged(call.live.plan.name, won=best.endpoint is second)
            return best
        finally:
            for task in tasks:
                task.cancel()

    async def _ask(self, call: Call, arm: LiveArm, endpoint: EndpointState, ask: Ask) -> Given:
        if call.context is None or not call.context.recorded:
            return await self._ask_untraced(call, arm, endpoint, ask)
        at, began = self._clock(), self._monotonic()
        call.follow_attempt()
        given = await self._ask_untraced(call, arm, endpoint, ask)
        reply, seconds = given.reply, self._monotonic() - began
        release = arm.arm.release
        call.tries.append(
            Attempt(at, seconds, release, endpoint.url, reply.reason.value, reply.status)
        )
        return given

    async def _ask_untraced(
        self, call: Call, arm: LiveArm, endpoint: EndpointState, ask: Ask
    ) -> Given:
        try:
            outgoing = ask.outgoing(arm, call)
        except InvalidMessage as problem:
            if not arm.speech.open:
                return _unsaid(call, arm, ask, problem)
            if not await self._upstream.learned(endpoint, arm.speech):
                return _none(Reason.UNREACHABLE)
            return await self._ask(call, arm, endpoint, ask)
        if arm.speech.wanted:
            self._upstream.learn(endpoint, arm.speech)
        limits = call.live.plan.deadlines
        left = call.deadline - self._monotonic()
        clients = call.deadline == call.patience and left < limits.attempt
        when_late = Reason.CLIENT_DEADLINE if clients else Reason.TIMEOUT
        seconds = min(limits.attempt, left)
        call.attempts += 1
        if arm.name == "candidate" and call.sent is None:
            call.sent = self._clock()
        if ask.stream:
            opening = Opening(limits.connect, seconds, when_late, self._options.max_event)
            return await open_stream(
                self._upstream, call, arm, endpoint, ask, outgoing, opening, self._monotonic
            )
        reply = await self._upstream.ask(
            endpoint,
            outgoing,
            connect_seconds=limits.connect,
            seconds=seconds,
            when_late=when_late,
        )
        if reply.reason is Reason.ANSWERED:
            reply = ask.judged(reply, arm, call)
        return Given(reply, endpoint)


_FULL: Final = Given(Reply(Reason.FULL, sent=False))


def refuses_input(ask: Ask, reply: Reply) -> bool:
    """Whether the server says no to an input that it may be right to say no to."""
    if not ask.open_ended or reply.reason is not Reason.REFUSED:
        return False
    return reply.status in _REFUSE_INPUT


def _tells(ask: Ask, reply: Reply) -> bool:
    """Whether an attempt's end says anything about the release, as far as one can know by then."""
    return reply.reason not in _NO_ATTEMPT and not refuses_input(ask, reply)


def _unsaid(call: Call, arm: LiveArm, ask: Ask, problem: InvalidMessage) -> Given:
    """A request that an arm can't be told of: the client's fault, unless stable could be told."""
    if arm is not call.live.stable and not call.pinned:
        try:
            ask.outgoing(call.live.stable, call)
        except InvalidMessage:
            could = call.live.stable.speech.open
        else:
            could = True
        if could:
            return _none(Reason.NARROWED_CONTRACT, str(problem))
    raise Refusal(400, str(problem)) from None


def _none(reason: Reason, detail: str = "") -> Given:
    return Given(Reply(reason, sent=False, detail=detail))
