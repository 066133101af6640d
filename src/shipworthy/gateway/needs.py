"""What the gateway needs from the outside: the ports, cut down to what is used of them.

`shipworthy.ports` names what all rooms work with, manifests and policies included. A worker starts
without these; whatever fits a port fits here.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Mapping
from typing import Protocol

from shipworthy.domain.limits import Usage
from shipworthy.domain.records import Record

Clock = Callable[[], float]
"""Unix time in seconds."""


class Journal(Protocol):
    """A worker's journal; opening and closing it is the caller's."""

    @property
    def dropped(self) -> Mapping[str, int]:
        """How many records were dropped so far, by reason."""
        ...

    def append(self, record: Record) -> bool:
        """Whether the record is written (`write(2)` returned); False when it was dropped."""
        ...


class UsageRow(Protocol):
    """What all workers of a host have used on behalf of one key or model."""

    def add(
        self, minute: int, day: int, requests: int, tokens: int, micros: int, running: int
    ) -> None:
        """Count more, in that minute and day of the Unix epoch."""
        ...

    def take_back(
        self, minute: int, day: int, requests: int, tokens: int, micros: int, running: int
    ) -> None:
        """Count less of what was added in that minute and day, as far as it still counts."""
        ...

    def usage(self, minute: int, day: int) -> Usage:
        """What all workers have counted."""
        ...


class UsageTable(Protocol):
    """Rows that all workers of a host share."""

    def rows(self, wanted: Iterable[str]) -> Mapping[str, UsageRow]:
        """The rows of those names; what others had counts no more for this worker."""
        ...

    def fence(self) -> None:
        """Let other workers see what was added before anything that is read from here on."""
        ...


class HttpAnswer(Protocol):
    """An answer; header names are lower case."""

    @property
    def status(self) -> int:
        """The status code."""
        ...

    @property
    def headers(self) -> Mapping[str, str]:
        """By lower-case name."""
        ...

    @property
    def body(self) -> bytes:
        """All of it."""
        ...


class Http(Protocol):
    """A plain HTTP client. Raises Unavailable when nobody answers."""

    def request(
        self,
        method: str,
        url: str,
        *,
        headers: Mapping[str, str] | None = None,
        body: bytes | None = None,
        timeout: float = 10.0,
    ) -> Awaitable[HttpAnswer]:
        """Ask; `timeout` is in seconds."""
        ...
