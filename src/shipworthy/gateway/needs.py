"""What the gateway needs from the outside: the ports, cut down to what is used of them.

`shipworthy.ports` names what all rooms work with, manifests and policies included. A worker starts
without these; whatever fits a port fits here.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from typing import Protocol

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
