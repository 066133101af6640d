"""One inference call as it goes along: who asked, on which arm, and how it has gone so far."""

from __future__ import annotations

import re
from typing import Final, Literal

from shipworthy.domain.plan import Key
from shipworthy.domain.records import Outcome
from shipworthy.domain.routing import ArmName, Choice
from shipworthy.gateway.http import Refusal, Request
from shipworthy.gateway.live import LiveArm, LivePlan
from shipworthy.protocols.outcomes import OIP, Reason

MAX_UNIT: Final = 256
_UNIT_HEADERS: Final = (b"x-shipworthy-unit", b"x-session-id")
_TRACEPARENT: Final = re.compile(r"[0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}")
_SLICE: Final = re.compile(r"([a-z0-9_.-]{1,32})=([^=,]{1,64})")
_MAX_SLICES: Final = 8
_MAX_DEADLINE: Final = 3600.0


class Call:
    """What the record is made of. Times are monotonic seconds unless they say Unix."""

    __slots__ = (
        "answered_by", "arm", "attempts", "body", "choice", "deadline", "first_seconds", "id",
        "key", "live", "outcome", "patience", "pinned", "reason", "sent", "serving", "slices",
        "started", "traceparent", "unit",
    )  # fmt: skip

    def __init__(
        self, live: LivePlan, arm: LiveArm, choice: Choice, key: Key, *, pinned: bool
    ) -> None:
        self.live = live
        self.arm = arm
        self.choice = choice
        self.key = key
        self.pinned = pinned
        self.id = ""
        self.unit: str | None = None
        self.slices: dict[str, str] = {}
        self.traceparent: str | None = None
        self.body = b""
        self.started = 0.0
        self.deadline = 0.0
        self.patience = _MAX_DEADLINE
        self.attempts = 0
        self.outcome: Outcome | None = None
        self.reason = Reason.ANSWERED
        self.first_seconds: float | None = None
        self.sent: float | None = None
        self.serving: LiveArm | None = None
        self.answered_by: ArmName | Literal["fallback_message"] | None = None

    def judge(self, reason: Reason) -> None:
        """Settle the outcome, unless the first attempt has: it alone is evidence."""
        if self.outcome is None:
            self.reason = reason
            self.outcome = OIP[reason]


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


def traceparent_of(request: Request) -> str | None:
    """The W3C trace context, if there is a valid one."""
    raw = request.headers.get(b"traceparent")
    if raw is None:
        return None
    text = raw[:64].decode("latin-1")
    return text if _TRACEPARENT.fullmatch(text) else None


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
