"""What a key or a model may still use, and what is told to whom may not.

Requests and tokens are counted by calendar minute. What counts now is the present minute, and of
the one before as much as lies within the last sixty seconds, taking its use as evenly spread. So
within any t seconds no more is admitted than the limit and t/60 of it, as by a bucket that holds
the limit and fills at its rate; there is no doubled burst where two minutes meet. Money is counted
in whole millionths, by day from midnight UTC.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, Final, Literal, NamedTuple

from shipworthy.domain.plan import Limits

MICROS: Final = 1_000_000
"""The unit in which money is counted, per unit of the team's currency."""

MOST: Final = (1 << 40) - 1
"""More tokens, or millionths of money, than this are not told apart."""

_NO_BOUND: Final = 1 << 62
_MINUTE: Final = 60
_RESETS: Final = [b"%ds" % s if s < 60 else b"%dm%ds" % divmod(s, 60) for s in range(121)]
"""Seconds such as `1m12s`, which is how OpenAI's API writes them."""
_DAY: Final = 86_400

What = Literal["requests", "tokens", "concurrency", "budget"]

Usage = tuple[int, int, int, int, int, int]
"""Requests of the minute before and of this one, tokens of both, millionths spent today, and calls
under way. A plain tuple, since one is made for each request."""


class Bounds(NamedTuple):
    """Limits as whole numbers to compare with; what has no limit has one that nothing reaches."""

    requests: int
    tokens: int
    concurrency: int
    micros: int


class Excess(NamedTuple):
    """A limit that a request would exceed, and so for `wait` seconds; None is for ever."""

    what: What
    wait: float | None


def bounds_of(limits: Limits) -> Bounds:
    """The limits as whole numbers."""

    def bound(value: int | None) -> int:
        return _NO_BOUND if value is None else value

    budget = limits.budget_per_day
    return Bounds(
        bound(limits.requests_per_minute),
        bound(limits.tokens_per_minute),
        bound(limits.concurrency),
        _NO_BOUND if budget is None else round(budget * MICROS),
    )


def micros_of(money: float) -> int:
    """Money in millionths, rounded up; nothing for what is no amount of money."""
    if not money > 0:
        return 0
    return math.ceil(money * MICROS) if money * MICROS < MOST else MOST


def carried(now: float) -> float:
    """The part of the minute before that lies within the last sixty seconds."""
    return (_MINUTE - now % _MINUTE) / _MINUTE


def fits(bounds: Bounds, usage: Usage, part: float) -> bool:
    """Whether the usage, a request's own reservation in it, is within its bounds.

    `part` is what is `carried` of the minute before.
    """
    requests_before, requests, tokens_before, tokens, spent, running = usage
    return (
        requests + int(requests_before * part) <= bounds[0]
        and tokens + int(tokens_before * part) <= bounds[1]
        and running <= bounds[2]
        and spent <= bounds[3]
    )


def excess_of(
    bounds: Bounds, usage: Usage, *, tokens: int, micros: int, now: float
) -> Excess | None:
    """The limit that one more request would exceed for the longest, if there is one.

    `usage` is without the request, which needs so many tokens and millionths of money.
    """
    found = [each for each in _excesses(bounds, usage, tokens, micros, now) if each is not None]
    hopeless = next((each for each in found if each.wait is None), None)
    return hopeless or max(found, key=lambda each: each.wait or 0.0, default=None)


def _excesses(
    bounds: Bounds, usage: Usage, tokens: int, micros: int, now: float
) -> Iterable[Excess | None]:
    second = now % _MINUTE
    yield _excess("requests", 1, bounds.requests, usage[0], usage[1], second)
    yield _excess("tokens", tokens, bounds.tokens, usage[2], usage[3], second)
    if usage[5] >= bounds.concurrency:
        yield Excess("concurrency", 0.0 if bounds.concurrency else None)
    if usage[4] + micros > bounds.micros:
        yield Excess("budget", _DAY - now % _DAY if micros <= bounds.micros else None)


def _excess(
    what: What, need: int, bound: int, before: int, used: int, second: float
) -> Excess | None:
    """How long this limit can't be kept, if nobody else uses anything meanwhile."""
    if need > bound:
        return Excess(what, None)
    room = bound - need - used
    if int(before * carried(second)) <= room:
        return None
    if room >= 0:  # as soon as enough of the minute before has gone by
        return Excess(what, _MINUTE * (1 - (room + 1) / before) - second)
    room += used  # once this minute is the one before
    return Excess(what, _MINUTE - second + _MINUTE * max(0.0, 1 - (room + 1) / used))


def rate_headers(sides: Iterable[tuple[Bounds, Usage]], now: float) -> list[tuple[bytes, bytes]]:
    """What `rate_lines` says, header by header."""
    pairs = (line.split(b": ", 1) for line in rate_lines(sides, now).splitlines())
    return [(name, value) for name, value in pairs]


def rate_lines(sides: Iterable[tuple[Bounds, Usage]], now: float) -> bytes:
    """What is told of limits with each answer, in the words of OpenAI's API where it has them.

    `sides` are those of key and model with what they have used; of each limit the tighter is told.
    """
    second, part = now % _MINUTE, carried(now)
    requests = tokens = budget = _NO_BOUND
    most_requests = most_tokens = 0
    to_requests = to_tokens = b""
    for bounds, usage in sides:
        before, used, tokens_before, tokens_used, spent, _ = usage
        bound = bounds[0]
        left = bound - used - int(before * part)
        if bound < _NO_BOUND and left < requests:
            requests, most_requests, to_requests = left, bound, _reset(before, used, second)
        bound = bounds[1]
        left = bound - tokens_used - int(tokens_before * part)
        if bound < _NO_BOUND and left < tokens:
            tokens, most_tokens = left, bound
            to_tokens = _reset(tokens_before, tokens_used, second)
        bound = bounds[3]
        if bound < _NO_BOUND and bound - spent < budget:
            budget = bound - spent
    lines = b""
    if to_requests:
        lines = _REQUEST_LINES % (most_requests, max(0, requests), to_requests)
    if to_tokens:
        lines += _TOKEN_LINES % (most_tokens, max(0, tokens), to_tokens)
    if budget < _NO_BOUND:
        lines += _BUDGET_LINE % divmod(max(0, budget), MICROS)
    return lines


_REQUEST_LINES: Final = (
    b"x-ratelimit-limit-requests: %d\r\nx-ratelimit-remaining-requests: %d\r\n"
    b"x-ratelimit-reset-requests: %s\r\n"
)
_TOKEN_LINES: Final = _REQUEST_LINES.replace(b"requests", b"tokens")
_BUDGET_LINE: Final = b"x-shipworthy-budget-remaining: %d.%06d\r\n"


def _reset(before: int, used: int, second: float) -> bytes:
    """After what time nothing counts any more of what was used."""
    whole = 2 * _MINUTE if used else _MINUTE if before else second
    return _RESETS[math.ceil(whole - second)]


def retry_headers(excess: Excess) -> list[tuple[bytes, bytes]]:
    """When to ask again; to clients that know the word, also that it is no use now."""
    if excess.wait is None:
        return [(b"x-should-retry", b"false")]
    seconds = wait_seconds(excess)
    headers = [(b"retry-after", b"%d" % seconds)]
    if excess.what == "budget":
        headers.append((b"x-should-retry", b"false"))
    return headers


def wait_seconds(excess: Excess) -> int:
    """Whole seconds after which to ask again, one at least."""
    return math.floor(excess.wait or 0.0) + 1


def refusal_text(who: str, limits: Limits, excess: Excess, *, tokens: int, cost: float) -> str:
    """Why a request is refused, and what to do; `who` is such as "the key 3f9c1d20ab77"."""
    limit = _limit_text(limits, excess.what)
    if excess.wait is None:
        return _never_text(who, limit, excess.what, tokens, cost)
    if excess.what == "concurrency":
        return f"{who} has its {limit} under way; ask again when one has ended"
    if excess.what == "budget":
        return (
            f"{who} has not enough left of its {limit} for this request;"
            f" it begins anew at midnight UTC, in {_words(wait_seconds(excess))}"
        )
    return f"{who} has used its {limit}; ask again in {wait_seconds(excess)} s"


def _never_text(who: str, limit: str, what: What, tokens: int, cost: float) -> str:
    if what == "tokens":
        return (
            f"this request may take {tokens} tokens, which is more than all of the {limit} that"
            f" {who} has; send a shorter one, or ask for fewer tokens in the answer"
        )
    if what == "budget":
        return (
            f"this request may cost {cost:.6g}, which is more than all of the {limit} that"
            f" {who} has; send a shorter one, or ask for fewer tokens in the answer"
        )
    return f"{who} has a limit of {limit}; ask its owner for another one"


def _limit_text(limits: Limits, what: What) -> str:
    texts: dict[What, Any] = {
        "requests": f"{limits.requests_per_minute} requests per minute",
        "tokens": f"{limits.tokens_per_minute} tokens per minute",
        "concurrency": f"{limits.concurrency} concurrent requests",
        "budget": f"budget of {limits.budget_per_day or 0:.12g} a day",
    }
    return texts[what]


def _words(seconds: int) -> str:
    hours, minutes = divmod(math.ceil(seconds / 60), 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min"
