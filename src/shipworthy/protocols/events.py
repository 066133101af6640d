"""Server-sent events: a stream cut into whole events, what one holds, and how one is written.

Events stay bytes as they came: line ends, comments and unknown fields pass through untouched.
"""

from __future__ import annotations

from itertools import takewhile
from typing import Final

import msgspec

from shipworthy.protocols.messages import InvalidMessage

DONE: Final = b"data: [DONE]\n\n"
"""How OpenAI's protocol says that a stream is over."""

_CR = ord("\r")
_UNDECIDED = (b"", b"\r")  # behind an LF: whether the line is blank, or where it ends
_encode = msgspec.json.Encoder().encode


class EventTooLarge(InvalidMessage):
    """An event is longer than we are willing to hold; the rest of its stream can't be read.

    `before` are the events that were over before it began.
    """

    def __init__(self, message: str, before: list[bytes]) -> None:
        super().__init__(message)
        self.before = before


class EventSplitter:
    """Cuts a stream, however it arrives, into events that each end with their blank line.

    Joined, the events and `rest` are what was fed. A line may end with LF, CRLF or CR, as the
    standard has it. After two CRs an event is over at once; an LF that follows counts to the next
    one, where it means nothing.
    """

    __slots__ = ("_buffer", "_max", "_returns", "_scan")

    def __init__(self, max_event: int) -> None:
        self._max = max_event
        self._buffer = bytearray()
        self._scan = 0  # no event ends before this place
        self._returns = False  # whether there has been a CR, which few streams hold

    @property
    def rest(self) -> bytes:
        """What has come of an event that is not over."""
        return bytes(self._buffer)

    def feed(self, data: bytes) -> list[bytes]:
        """The events that these bytes complete; EventTooLarge when one exceeds `max_event`."""
        if not self._buffer and len(data) <= self._max:
            end = _uniform_end(data)
            if end and data.endswith(end):
                if data.find(end) == len(data) - len(end):
                    return [data]
                *events, rest = data.split(end)
                if not rest:
                    return [event + end for event in events]
        self._returns = self._returns or b"\r" in data
        buffer: bytes | bytearray = data
        if self._buffer:
            self._buffer += data
            buffer = self._buffer
        size, start = len(buffer), 0
        events: list[bytes] = []
        ends = _Ends(buffer, self._scan, returns=self._returns)
        while end := ends.next():
            events.append(bytes(buffer[start:end]))
            start = end
        self._scan = ends.scan - start
        self._keep(buffer, start)
        if size > self._max and max(size - start, 0, *map(len, events)) > self._max:
            before = list(takewhile(lambda event: len(event) <= self._max, events))
            raise EventTooLarge(f"stream: an event is longer than {self._max} bytes", before)
        return events

    def _keep(self, buffer: bytes | bytearray, start: int) -> None:
        if buffer is not self._buffer:
            self._buffer += buffer[start:]
        elif start:
            del self._buffer[:start]


def _uniform_end(data: bytes) -> bytes:
    """How events end in data whose lines all end alike, as most do; empty when they don't."""
    if b"\r" not in data:
        return b"\n\n"
    lines = data.count(b"\r\n")
    return b"\r\n\r\n" if data.count(b"\r") == lines == data.count(b"\n") else b""


class _Ends:
    """Looks for the blank lines in a buffer, at each byte no more often than needed.

    A blank line is a line end right after another one. No event ends before `scan`.
    """

    __slots__ = ("_buffer", "_line", "_returns", "_twice", "scan")

    def __init__(self, buffer: bytes | bytearray, scan: int, *, returns: bool) -> None:
        self._buffer = buffer
        self._returns = returns
        self._line = self._twice = -1  # where the next LF, and the next two CRs, are known to be
        self.scan = scan

    def next(self) -> int:
        """Where the next event ends; 0 when that is yet to come."""
        buffer, size = self._buffer, len(self._buffer)
        while True:
            line = self._line = self._known(self._line, b"\n")
            if self._returns:
                self._twice = self._known(self._twice, b"\r\r")
                if self._twice < line:
                    return self._over(self._twice + 2)
            if line == size:
                half = self._returns and size > self.scan and buffer[-1] == _CR  # of two, perhaps
                self.scan = size - half
                return 0
            following = bytes(buffer[line + 1 : line + 3])
            if following[:1] == b"\n":
                return self._over(line + 2)
            if following in _UNDECIDED:
                self.scan = line
                return 0
            if following[:1] == b"\r":
                return self._over(line + (3 if following == b"\r\n" else 2))
            self.scan = line + 1

    def _known(self, place: int, wanted: bytes) -> int:
        """The first place from `scan` on; the buffer's end when there is none."""
        if place >= self.scan:
            return place
        found = self._buffer.find(wanted, self.scan)
        return len(self._buffer) if found < 0 else found

    def _over(self, end: int) -> int:
        self.scan = end
        return end


def parsed(event: bytes) -> tuple[bytes, bytes | None]:
    """An event's name, empty when it has none, and its data as `data_of` gives it."""
    if event.startswith(b"data: ") and event.find(b"\n") == len(event) - 2 and b"\r" not in event:
        return b"", event[6:-2]
    name, lines = b"", list[bytes]()
    for line in event.splitlines():  # of bytes: at the standard's three line ends and no others
        field, _, value = line.partition(b":")
        if field == b"data":
            lines.append(value.removeprefix(b" "))
        elif field == b"event":
            name = value.removeprefix(b" ")
    return name, b"\n".join(lines) if lines else None


def data_of(event: bytes) -> bytes | None:
    """An event's data, its lines joined; None when it has none, as a comment has."""
    return parsed(event)[1]


def event(data: bytes, name: bytes | None = None) -> bytes:
    """An event with this data, one line for each of its own."""
    head = b"" if name is None else b"event: " + name + b"\n"
    if b"\n" not in data and b"\r" not in data:
        return b"%bdata: %b\n\n" % (head, data)
    lines = b"".join(b"data: %b\n" % line for line in _lines(data))
    return b"%b%b\n" % (head, lines)


def _lines(data: bytes) -> list[bytes]:
    return data.replace(b"\r\n", b"\n").replace(b"\r", b"\n").split(b"\n")


def error_event(
    message: str,
    type: str,  # noqa: A002  # the protocol's word
    code: str | None = None,
) -> bytes:
    """How OpenAI's protocol tells of an error in a stream that has begun."""
    error = {"message": message, "type": type, "param": None, "code": code}
    return event(_encode({"error": error}))
