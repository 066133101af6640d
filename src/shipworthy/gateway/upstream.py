"""Calls to the servers of a release: one attempt at one endpoint, and which endpoint that is."""

from __future__ import annotations

import asyncio
import errno
import logging
from collections.abc import Callable, Mapping
from functools import lru_cache
from types import TracebackType
from typing import Self
from urllib.parse import quote

import aiohttp
import msgspec
from yarl import URL

from shipworthy.gateway.credentials import bearer
from shipworthy.gateway.options import GatewayOptions
from shipworthy.protocols.outcomes import Reason, reason_of_status

_log = logging.getLogger("shipworthy.gateway")

# Shorter than any common server's, so that a request never meets a connection being closed: such a
# reset would look like the release's failure, more often on the arm with less traffic.
_KEEP_ALIVE = 1.5

_SOUND = frozenset({Reason.ANSWERED, Reason.REFUSED})
"""The endpoint did its work, whatever it said."""
_NEUTRAL = frozenset({Reason.OVERLOADED, Reason.CLIENT_DEADLINE, Reason.GATEWAY_FAULT})
"""Says nothing about whether it can: a busy server is not made faster by being left alone."""
_OWN_LACKS = frozenset(
    {errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS, errno.EADDRNOTAVAIL}
)
"""Why this worker itself can't open a connection: no release has anything to do with it."""


@lru_cache(maxsize=64)
def _connecting_within(seconds: float) -> aiohttp.ClientTimeout:
    return aiohttp.ClientTimeout(total=None, sock_connect=seconds)


class Reply(msgspec.Struct, frozen=True):
    """How one attempt ended. `body` is the answer's if there was one, of whatever status.

    `sent` says whether the endpoint may have seen the request; `detail` what was wrong with it.
    """

    reason: Reason
    status: int = 0
    body: bytes = b""
    sent: bool = True
    detail: str = ""


class EndpointState:
    """One server as this worker knows it: calls under way, failures in a row, whether set aside."""

    def __init__(self, url: str, credential: str | None, options: GatewayOptions) -> None:
        self.url = url.rstrip("/")
        self.credential = credential
        self.outstanding = 0
        self.ejected = False
        self._urls: dict[str, URL] = {}
        self._failures = 0
        self._ejections = 0
        self._eject_after = options.eject_after
        self._eject_seconds = options.eject_seconds
        self._max_eject_seconds = options.max_eject_seconds

    def infer_url(self, served_model: str) -> URL:
        """Where the model of that name is asked."""
        url = self._urls.get(served_model)
        if url is None:
            path = f"/v2/models/{quote(served_model, safe='')}/infer"
            url = self._urls[served_model] = URL(self.url + path, encoded=True)
        return url

    def note(self, reason: Reason) -> float | None:
        """Count an attempt's end; seconds to stay away from now on, or None."""
        if reason in _NEUTRAL:
            return None
        if reason in _SOUND:
            self._failures = self._ejections = 0
            return None
        self._failures += 1
        if self.ejected or self._failures < self._eject_after:
            return None
        self.ejected = True
        pause = min(self._eject_seconds * 2**self._ejections, self._max_eject_seconds)
        self._ejections = min(self._ejections + 1, 30)
        return pause

    def readmit(self) -> None:
        """Take it back, on trial: the next failure sets it aside again, for longer."""
        self.ejected = False
        self._failures = self._eject_after - 1


def pick(
    endpoints: tuple[EndpointState, ...], turn: int, avoid: EndpointState | None = None
) -> EndpointState:
    """The endpoint with the fewest calls under way, of those not set aside; ties go round by turn.

    When all are set aside they are all tried: an answer from a doubtful server beats none.
    """
    if len(endpoints) == 1:
        return endpoints[0]
    able = [one for one in endpoints if not one.ejected] or list(endpoints)
    if avoid is not None and len(able) > 1:
        able = [one for one in able if one is not avoid]
    least = min(one.outstanding for one in able)
    free = [one for one in able if one.outstanding == least]
    return free[turn % len(free)]


class Upstream:
    """The worker's HTTP client. Use it as a context manager.

    `ejected` is called with the endpoint's URL when it is set aside.
    """

    def __init__(self, options: GatewayOptions, ejected: Callable[[str], None]) -> None:
        self._options = options
        self._ejected = ejected
        self._session: aiohttp.ClientSession | None = None
        self._probes: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Self:
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(
                limit=0, keepalive_timeout=_KEEP_ALIVE, ttl_dns_cache=10
            ),
            cookie_jar=aiohttp.DummyCookieJar(),
            auto_decompress=False,
            timeout=aiohttp.ClientTimeout(total=None),
            skip_auto_headers=("User-Agent", "Accept", "Accept-Encoding"),
        )
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for probe in self._probes:
            probe.cancel()
        if self._session is not None:
            await self._session.close()

    async def infer(
        self,
        endpoint: EndpointState,
        served_model: str,
        body: bytes,
        *,
        headers: Mapping[str, str],
        connect_seconds: float,
        seconds: float,
        when_late: Reason = Reason.TIMEOUT,
    ) -> Reply:
        """One attempt, over after `seconds`; every way in which it can end is a Reply.

        `when_late` is the reason if the time runs out: it may have been the client's to set.
        """
        endpoint.outstanding += 1
        try:
            async with asyncio.timeout(seconds):
                reply = await self._post(endpoint, served_model, body, headers, connect_seconds)
        except aiohttp.ConnectionTimeoutError:
            reply = Reply(Reason.CONNECT_TIMEOUT, sent=False)
        except TimeoutError:
            reply = Reply(when_late)
        except aiohttp.ClientConnectorError as error:
            ours = error.os_error.errno in _OWN_LACKS
            reply = Reply(Reason.GATEWAY_FAULT if ours else Reason.UNREACHABLE, sent=False)
        except aiohttp.InvalidURL:
            reply = Reply(Reason.UNREACHABLE, sent=False)
        except (aiohttp.ClientError, OSError, ValueError):
            reply = Reply(Reason.BROKEN)
        finally:
            endpoint.outstanding -= 1
        pause = endpoint.note(reply.reason)
        if pause is not None:
            self._set_aside(endpoint, pause)
        return reply

    async def _post(
        self,
        endpoint: EndpointState,
        served_model: str,
        body: bytes,
        headers: Mapping[str, str],
        connect_seconds: float,
    ) -> Reply:
        assert self._session is not None  # noqa: S101  # the context manager was entered
        async with self._session.post(
            endpoint.infer_url(served_model),
            data=body,
            headers={"Content-Type": "application/json", **headers, **bearer(endpoint.credential)},
            timeout=_connecting_within(connect_seconds),
            allow_redirects=False,
        ) as response:
            content = await self._read(response)
            if content is None:
                return Reply(Reason.BROKEN, response.status)
            return Reply(reason_of_status(response.status), response.status, content)

    async def _read(self, response: aiohttp.ClientResponse) -> bytes | None:
        """The answer's body; None when it is compressed or too large."""
        limit = self._options.max_response
        if response.headers.get("Content-Encoding", "identity") != "identity":
            return None
        if response.content_length is not None:
            return await response.read() if response.content_length <= limit else None
        parts: list[bytes] = []
        size = 0
        async for part in response.content.iter_any():
            size += len(part)
            if size > limit:
                return None
            parts.append(part)
        return b"".join(parts)

    def _set_aside(self, endpoint: EndpointState, pause: float) -> None:
        _log.warning("endpoint %s keeps failing and is set aside for %g s", endpoint.url, pause)
        self._ejected(endpoint.url)
        probe = asyncio.get_running_loop().create_task(self._readmit(endpoint, pause))
        self._probes.add(probe)
        probe.add_done_callback(self._probes.discard)

    async def _readmit(self, endpoint: EndpointState, pause: float) -> None:
        """Ask for its health until it has some, then take it back."""
        await asyncio.sleep(pause)
        while not await self._healthy(endpoint):
            pause = min(2 * pause, self._options.max_eject_seconds)
            await asyncio.sleep(pause)
        endpoint.readmit()

    async def _healthy(self, endpoint: EndpointState) -> bool:
        """Whether it answers at all; a server without a health route is well if it says so."""
        assert self._session is not None  # noqa: S101  # see _post
        try:
            async with (
                asyncio.timeout(2.0),
                self._session.get(
                    f"{endpoint.url}/v2/health/ready",
                    headers=bearer(endpoint.credential),
                    allow_redirects=False,
                ) as response,
            ):
                return response.status < 500
        except (aiohttp.ClientError, OSError, ValueError):
            return False
