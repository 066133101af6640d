"""What keys and models may use: reserved when a request begins, settled when it has ended.

A worker adds a request's reservation to what it has counted itself, sums what all workers have
counted then, and takes it back when that is too much. So however many do so at once, no more is
admitted than the limits allow; see `domain/limits.py` for what they say.
"""

from __future__ import annotations

from typing import Final, Literal

from shipworthy.domain.limits import (
    MOST,
    Bounds,
    Excess,
    Usage,
    What,
    bounds_of,
    carried,
    excess_of,
    fits,
    micros_of,
    rate_headers,
    rate_lines,
    refusal_text,
    retry_headers,
)
from shipworthy.domain.plan import Key, Limits, Plan, Snapshot
from shipworthy.gateway.needs import Clock, UsageRow, UsageTable

Side = Literal["key", "model"]
"""Whose limit it is."""

_NO_LIMITS: Final = Limits()
_TRIES: Final = 4
"""How often a request is tried that fits but for what others try at the same moment."""

_CODES: Final[dict[What, str]] = {
    "requests": "rate_limit_exceeded",
    "tokens": "rate_limit_exceeded",
    "concurrency": "concurrency_exceeded",
    "budget": "budget_exceeded",
}


class _Meter:
    """The limits of one key or model, and where its use is counted."""

    __slots__ = ("bounds", "fraction", "id", "limits", "pressed", "row", "side")

    def __init__(self, side: Side, id: str, limits: Limits, row: UsageRow) -> None:
        self.side: Side = side
        self.id = id
        self.limits = limits
        self.bounds: Bounds = bounds_of(limits)
        self.row = row
        self.pressed = False  # it refused lately: look before reserving
        self.fraction = 0.0  # of a millionth, that was used and is not counted yet

    def whole(self, cost: float) -> int:
        """Money used, in millionths; what is left over counts with the next."""
        micros = self.fraction
        if cost > 0:
            micros += min(cost * 1e6, MOST)
        whole = int(micros)
        self.fraction = micros - whole
        return whole


class Admission:
    """A request's reservation. It must be settled, whatever becomes of the request."""

    __slots__ = ("_clock", "_meters", "_micros", "_now", "_sides", "_tokens")

    def __init__(  # made for each request
        self,
        meters: tuple[_Meter, ...],
        sides: list[tuple[Bounds, Usage]],
        clock: Clock,
        now: float,
        tokens: int,
        micros: int,
    ) -> None:
        self._meters = meters
        self._sides = sides
        self._clock = clock
        self._now = now
        self._tokens = tokens
        self._micros = micros

    @property
    def lines(self) -> bytes:
        """Headers that tell what was left when it was admitted; the tighter of key and model."""
        return rate_lines(self._sides, self._now) if self._sides else b""

    def settle(self, tokens: int, cost: float) -> None:
        """Count what was used for what was reserved, and free the place; once."""
        meters, self._meters = self._meters, ()
        if not meters:
            return
        minute = int(self._now // 60)
        day = minute // 1440
        more = (0 if tokens < 0 else min(tokens, MOST)) - self._tokens
        for meter in meters:
            row = meter.row
            costlier = meter.whole(cost) - self._micros
            row.take_back(
                minute, day, 0, -more if more < 0 else 0, -costlier if costlier < 0 else 0, 1
            )
            if more > 0 or costlier > 0:
                ends = int(self._clock() // 60)
                row.add(ends, ends // 1440, 0, max(0, more), max(0, costlier), 0)


class Denial:
    """A refusal: what to answer, and which limit of whom it was."""

    __slots__ = ("code", "headers", "limit", "message", "side", "status")

    def __init__(
        self, code: str, message: str, headers: list[tuple[bytes, bytes]], limit: What, side: Side
    ) -> None:
        self.status = 429
        self.code = code
        self.message = message
        self.headers = headers
        self.limit: What = limit
        self.side = side


class LimitBook:
    """Says of each request whether its key and its model may still have it.

    Args:
        table: What all workers of this host have used.
        clock: Unix time.

    """

    def __init__(self, table: UsageTable, clock: Clock) -> None:
        self._table = table
        self._clock = clock
        self._keys: dict[str, _Meter] = {}
        self._plans: dict[str, _Meter] = {}
        self._free = Admission((), [], clock, 0.0, 0, 0)

    def obey(self, snapshot: Snapshot) -> None:
        """Put the limits of a snapshot in force; calls under way are settled where they began."""
        keys = {key.id: key.limits for key in snapshot.keys.values() if key.limits != _NO_LIMITS}
        plans = {
            plan.name: plan.limits for plan in snapshot.plans.values() if plan.limits != _NO_LIMITS
        }
        rows = self._table.rows(
            [*(f"key {id}" for id in keys), *(f"plan {name}" for name in plans)]
        )
        self._keys = {
            id: _meter(self._keys.get(id), "key", id, limits, rows[f"key {id}"])
            for id, limits in keys.items()
        }
        self._plans = {
            name: _meter(self._plans.get(name), "model", name, limits, rows[f"plan {name}"])
            for name, limits in plans.items()
        }

    def admit(self, key: Key, plan: Plan, *, tokens: int, cost: float) -> Admission | Denial:
        """Reserve a request with so many tokens, in and out, and so much money, both estimated."""
        of_key, of_plan = self._keys.get(key.id), self._plans.get(plan.name)
        if of_key is None:
            if of_plan is None:
                return self._free
            meters: tuple[_Meter, ...] = (of_plan,)
        else:
            meters = (of_key,) if of_plan is None else (of_key, of_plan)
        if tokens < 0 or tokens > MOST:
            tokens = 0 if tokens < 0 else MOST
        micros = micros_of(cost)
        now = self._clock()
        pressed = meters[0].pressed or meters[-1].pressed
        for _ in range(_TRIES):
            if not pressed:
                sides = self._reserve(meters, now, tokens, micros)
                if sides:
                    return Admission(meters, sides, self._clock, now, tokens, micros)
            # What others reserve and take back at the same moment is no reason to refuse.
            denial = self._judge(meters, now, tokens, micros, cost)
            if denial is not None:
                return denial
            pressed = False
        return _crowded(meters[0])

    def _reserve(
        self, meters: tuple[_Meter, ...], now: float, tokens: int, micros: int
    ) -> list[tuple[Bounds, Usage]]:
        """What is used with the reservation; empty when it does not fit, and is taken back."""
        minute = int(now // 60)
        day = minute // 1440
        for meter in meters:
            meter.row.add(minute, day, 1, tokens, micros, 1)
        self._table.fence()
        part = carried(now)
        sides: list[tuple[Bounds, Usage]] = []
        for meter in meters:
            bounds, usage = meter.bounds, meter.row.usage(minute, day)
            if not fits(bounds, usage, part):
                for each in meters:
                    each.row.take_back(minute, day, 1, tokens, micros, 1)
                return []
            sides.append((bounds, usage))
        return sides

    def _judge(
        self, meters: tuple[_Meter, ...], now: float, tokens: int, micros: int, cost: float
    ) -> Denial | None:
        """The refusal that lasts longest, if a request may not be had."""
        minute = int(now // 60)
        seen = [(meter, meter.row.usage(minute, minute // 1440)) for meter in meters]
        worst: tuple[_Meter, Excess] | None = None
        for meter, usage in seen:
            excess = excess_of(meter.bounds, usage, tokens=tokens, micros=micros, now=now)
            meter.pressed = excess is not None
            if excess is not None and (worst is None or _longer(excess, worst[1])):
                worst = meter, excess
        if worst is None:
            return None
        meter, excess = worst
        code = "request_too_large" if excess.wait is None else _CODES[excess.what]
        return Denial(
            code,
            refusal_text(
                f"the {meter.side} {meter.id}", meter.limits, excess, tokens=tokens, cost=cost
            ),
            [
                *retry_headers(excess),
                *rate_headers([(meter.bounds, usage) for meter, usage in seen], now),
            ],
            excess.what,
            meter.side,
        )


def _meter(before: _Meter | None, side: Side, id: str, limits: Limits, row: UsageRow) -> _Meter:
    if before is not None and before.limits == limits and before.row is row:
        return before
    return _Meter(side, id, limits, row)


def _crowded(meter: _Meter) -> Denial:
    """Refuse what fits, but for others that keep trying for the last place."""
    excess = Excess("requests", 0.0)
    message = f"the {meter.side} {meter.id} has nearly reached its limits; ask again in a second"
    headers = retry_headers(excess)
    return Denial("rate_limit_exceeded", message, headers, excess.what, meter.side)


def _longer(one: Excess, other: Excess) -> bool:
    if other.wait is None:
        return False
    return one.wait is None or one.wait > other.wait
