"""What keeps one failing part from taking the rest along: budgets, breakers and gates.

All of it is local to a worker and none reads a clock: times in seconds come from the caller.
"""

from __future__ import annotations

import asyncio
from collections import deque


class Budget:
    """A token bucket filled by traffic, not by time: extra attempts stay a share of first ones."""

    def __init__(self, ratio: float, burst: int) -> None:
        self._ratio = ratio
        self._burst = float(burst)
        self._tokens = float(burst)

    def earn(self) -> None:
        """Note a first attempt."""
        self._tokens = min(self._burst, self._tokens + self._ratio)

    def spend(self) -> bool:
        """Whether one extra attempt is allowed; it then counts."""
        if self._tokens < 1.0:
            return False
        self._tokens -= 1.0
        return True


class Breaker:
    """Stops calls to a candidate that failed `failures` of its last `window` attempts.

    After `seconds` one call is let through as a trial: if it succeeds all are, else none for as
    long again.
    """

    def __init__(self, window: int, failures: int, seconds: float) -> None:
        self._last: deque[bool] = deque(maxlen=max(window, 1))
        self._failures = failures
        self._seconds = seconds
        self._open_until: float | None = None
        self._trial = False

    @property
    def open(self) -> bool:
        """Whether calls are being held back, trials aside."""
        return self._open_until is not None

    def allows(self, now: float) -> bool:
        """Whether a call may be made; True may make it the trial."""
        if self._open_until is None:
            return True
        if now < self._open_until:
            return False
        self._trial = True
        self._open_until = now + self._seconds  # should this trial never end, there is another
        return True

    def note(self, *, failed: bool, now: float) -> None:
        """Count how a call ended."""
        if self._open_until is not None:
            if not self._trial:
                return  # a call from before it opened
            self._trial = False
            if not failed:
                self._open_until = None
                self._last.clear()
            else:
                self._open_until = now + self._seconds
            return
        self._last.append(failed)
        if failed and sum(self._last) >= self._failures:
            self._open_until = now + self._seconds
            self._last.clear()


class Gate:
    """At most `limit` inside, at most `waiting` in line, in order of arrival."""

    def __init__(self, limit: int, waiting: int) -> None:
        self.inside = 0
        self._limit = limit
        self._waiting = waiting
        self._line: deque[asyncio.Future[None]] = deque()

    def try_enter(self) -> bool:
        """Go in, if nobody waits and there is room."""
        if self.inside < self._limit and not self._line:
            self.inside += 1
            return True
        return False

    async def enter(self, seconds: float) -> bool:
        """Go in, waiting up to `seconds`; False when the line is too long or did not move."""
        if self.try_enter():
            return True
        if len(self._line) >= self._waiting or seconds <= 0:
            return False
        turn = asyncio.get_running_loop().create_future()
        self._line.append(turn)
        try:
            async with asyncio.timeout(seconds):
                await turn
        except TimeoutError:
            return self._left_line(turn)
        except asyncio.CancelledError:
            if self._left_line(turn):
                self.leave()
            raise
        return True

    def _left_line(self, turn: asyncio.Future[None]) -> bool:
        """Stop waiting; True when the turn came in the same moment."""
        if turn.done() and not turn.cancelled():
            return True
        if turn in self._line:
            self._line.remove(turn)
        return False

    def leave(self) -> None:
        """Go out; the next in line takes the place."""
        while self._line:
            turn = self._line.popleft()
            if not turn.done():
                turn.set_result(None)  # `inside` stays: the place is handed over
                return
        self.inside -= 1
