"""One inference call as it goes along: who asked, on which arm, and how it has gone so far."""

from __future__ import annotations

import re
from typing import Final, Literal, Protocol

import msgspec

from shipworthy.domain.contract import Protocol as WireProtocol
from shipworthy.domain.features import Features
from shipworthy.domain.plan import Key
from shipworthy.domain.records import Outcome
from shipworthy.domain.routing import ArmName, Choice
from shipworthy.gateway.http import HeaderList, Refusal, Request
from shipworthy.gateway.limits import Admission
from shipworthy.gateway.live import LiveArm, LivePlan
from shipworthy.gateway.spans import Attempt
from shipworthy.gateway.traces import TraceContext
from shipworthy.gateway.upstream import Outgoing, Reply
from shipworthy.protocols.openai import Seen
from shipworthy.protocols.outcomes import OUTCOMES, Reason

MAX_UNIT: Final = 256
_UNIT_HEADERS: Final = (b"x-shipworthy-unit", b"x-session-id")
_SLICE: Final = re.compile(r"([a-z0-9_.-]{1,32})=([^=,]{1,64})")
_MAX_SLICES: Final = 8
_MAX_DEADLINE: Final = 3600.0


class Usage(msgspec.Struct):
    """What a call used; `estimated` says that the tokens are our count, not the server's."""

    input_tokens: int | None = None
    output_tokens: int | None = None
    cached_tokens: int | None = None
    estimated: bool = False
    finish: str = ""


class Timing(msgspec.Struct):
    """When a stream's content came, in seconds from the request's start; `pieces` of it so far."""

    first: float = 0.0
    last: float = 0.0
    longest: float = 0.0
    pieces: int = 0

    def note(self, seconds: float, pieces: int) -> None:
        """Count pieces of content that came together, so many seconds after the start."""
        if self.pieces == 0:
            self.first = seconds
        elif seconds - self.last > self.longest:
            self.longest = seconds - self.last
        self.last = seconds
        self.pieces += pieces

    @property
    def gap(self) -> float | None:
        """The mean time between two pieces, None when there is only one."""
        return (self.last - self.first) / (self.pieces - 1) if self.pieces > 1 else None


class EventReader(Protocol):
    """Reads along while a stream passes to one client from one arm.

    `pieces` counts the events with content so far; `error` is what an error event said.
    `tells_usage` says whether the client wants the server's count of tokens among the events.
    """

    tells_usage: bool

    @property
    def pieces(self) -> int:
        """Events with content so far."""
        ...

    @property
    def error(self) -> str:
        """What an error event said."""
        ...

    @property
    def broken_off(self) -> bool:
        """Whether the stream would end too early if it ended now."""
        ...

    def see(self, event: bytes) -> Seen:
        """What this event is; it is counted in."""
        ...

    def renamed(self, event: bytes) -> bytes:
        """The event under the name that the client called."""
        ...

    def usage(self) -> Usage:
        """What was used so far."""
        ...

    def error_event(self, text: str) -> bytes:
        """How the protocol tells of an error amid a stream."""
        ...


class Ask(Protocol):
    """A request that was read, and can be sent to any arm that takes it.

    `unit` is whom it says that it is for, if it does. `open_ended` says that no contract describes
    all that a server may refuse: a refusal is the release's fault only when another one answers.
    Tokens are estimates, for limits: of what the model reads, and of what it may write.
    """

    protocol: WireProtocol
    operation: str
    stream: bool
    unit: str | None
    open_ended: bool

    @property
    def input_tokens(self) -> int:
        """About how many tokens the model reads."""
        ...

    @property
    def output_tokens(self) -> int:
        """About how many it may write."""
        ...

    def check(self, arm: LiveArm) -> None:
        """Raise InvalidMessage when the arm's contract does not allow it."""
        ...

    def outgoing(self, arm: LiveArm, call: Call) -> Outgoing:
        """It as the arm's servers understand it. Raises InvalidMessage where that can't be."""
        ...

    def judged(self, reply: Reply, arm: LiveArm, call: Call) -> Reply:
        """An answer with status 200 held against contract and protocol, as the client gets it."""
        ...

    def reader(self, arm: LiveArm, call: Call) -> EventReader:
        """What reads along with its stream. Only for one whose `stream` is true."""
        ...

    def features(self) -> Features:
        """Numbers and words of what was asked, and answered if it was, for drift to be found in."""
        ...

    def kept(self) -> bytes:
        """The request as it may be written: without what says openly whom it is for."""
        ...

    def refusal(self, reply: Reply) -> Reply | None:
        """What the model itself says about an input, for the client; None when it says nothing."""
        ...


class Call:
    """What the record is made of. Times are monotonic seconds unless they say Unix."""

    __slots__ = (
        "admission", "answered_by", "arm", "ask", "asked_at", "attempts", "choice", "context",
        "deadline", "first_seconds", "id", "key", "live", "outcome", "passed_on", "patience",
        "pinned", "reason", "request", "response_bytes", "sent", "serving", "slices", "started",
        "streamed", "timing", "traceparent", "tries", "unit", "usage",
    )  # fmt: skip

    def __init__(
        self,
        request: Request,
        live: LivePlan,
        arm: LiveArm,
        choice: Choice,
        key: Key,
        *,
        pinned: bool,
    ) -> None:
        self.request = request
        self.live = live
        self.arm = arm
        self.choice = choice
        self.key = key
        self.pinned = pinned
        self.id = ""
        self.admission: Admission | None = None
        self.ask: Ask | None = None
        self.unit: str | None = None
        self.slices: dict[str, str] = {}
        self.context: TraceContext | None = None
        self.traceparent: str | None = None
        self.passed_on = b""  # header lines for whoever answers
        self.asked_at = 0.0  # Unix
        self.started = 0.0
        self.deadline = 0.0
        self.patience = _MAX_DEADLINE
        self.attempts = 0
        self.tries: list[Attempt] = []  # of a request whose span is recorded
        self.outcome: Outcome | None = None
        self.reason = Reason.ANSWERED
        self.first_seconds: float | None = None
        self.sent: float | None = None
        self.serving: LiveArm | None = None
        self.answered_by: ArmName | Literal["fallback_message"] | None = None
        self.usage: Usage | None = None
        self.timing: Timing | None = None
        self.response_bytes: int | None = None  # of a stream, which is not kept as a whole
        self.streamed: bytes | None = None  # one that is, to compare a mirror's answer with

    @property
    def cost(self) -> float | None:
        """What the answer cost, None where that can't be said."""
        price = self.serving.arm.price if self.serving else None
        if price is None:
            return None
        usage = self.usage
        if usage is None:
            return price.of(0, 0)
        return price.of(usage.input_tokens or 0, usage.output_tokens or 0)

    def counts_tokens(self, arm: LiveArm) -> bool:
        """Whether it matters how many tokens the arm uses: then its server is asked to count."""
        limits, plan = self.key.limits, self.live.plan.limits
        return (
            arm.arm.price is not None
            or limits.tokens_per_minute is not None
            or plan.tokens_per_minute is not None
        )

    def trace(self, context: TraceContext | None) -> None:
        """Take over where the request stands in its trace."""
        if context is not None:
            self.context = context
            self.traceparent = context.traceparent
            self._pass_on(context.outgoing())

    def follow_attempt(self) -> None:
        """Let what happens upstream belong to the span of the attempt that comes next."""
        if self.context is not None:
            self._pass_on(self.context.outgoing(self.attempts + 1))

    def _pass_on(self, headers: HeaderList) -> None:
        self.passed_on = b"".join(b"%s: %s\r\n" % header for header in headers)

    def judge(self, reason: Reason) -> None:
        """Settle the outcome, unless the first attempt has: it alone is evidence."""
        if self.outcome is None:
            self.reason = reason
            self.outcome = OUTCOMES[reason]


def unit_of(request: Request) -> str | None:
    """Whom the split is sticky to, as the client names it; 400 when the name is too long."""
    for name in _UNIT_HEADERS:
        unit = request.text(name, at_most=MAX_UNIT)
        if unit is not None:
            return unit
    return None


def slices_of(request: Request) -> dict[str, str]:
    """`country=DE,plan=pro` as a mapping.

    What is malformed or too much is left out: a label must not cost anybody an answer.
    """
    raw = request.headers.get(b"x-shipworthy-slice")
    if not raw:
        return {}
    slices: dict[str, str] = {}
    for part in raw[:2048].decode(errors="replace").split(","):
        found = _SLICE.fullmatch(part.strip())
        if found and len(slices) < _MAX_SLICES:
            slices[found[1]] = found[2]
    return slices


def patience_of(request: Request) -> float:
    """Seconds that the client is willing to wait, from `X-Shipworthy-Deadline`."""
    text = request.text(b"x-shipworthy-deadline", at_most=16)
    if text is None:
        return _MAX_DEADLINE
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0.0 < seconds <= _MAX_DEADLINE:
        raise Refusal(
            400, f"X-Shipworthy-Deadline: expected seconds from now, up to 3600, got {text!r}"
        )
    return seconds
