"""The plain HTTP client behind `ports.HttpClient`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Self

import aiohttp

from shipworthy.errors import Unavailable
from shipworthy.ports import HttpResponse

MOST_BYTES = 16 * 1024 * 1024
"""Longest answer that is read."""


class AiohttpClient:
    """Use as an async context manager, for any number of requests.

    Args:
        pin: The SHA-256 of the one certificate that must be shown at a URL; None where it must be
            vouched for by an authority that this machine knows.

    """

    def __init__(self, pin: Callable[[str], bytes | None] = lambda _: None) -> None:
        self._pin = pin
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> Self:
        self._session = aiohttp.ClientSession(auto_decompress=False)
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._session is not None:
            await self._session.close()

    async def request(
        self,
        method: str,
        url: str,
        *,
        headers: Mapping[str, str] | None = None,
        body: bytes | None = None,
        timeout: float = 10.0,  # noqa: ASYNC109  # the port's word for it
    ) -> HttpResponse:
        """Send a request and read its answer; redirects are not followed.

        Raises Unavailable when nobody answers in time, or at greater length than is sensible.
        """
        if self._session is None:
            message = "the HTTP client is not open"
            raise Unavailable(message)
        pinned = self._pin(url)
        try:
            async with self._session.request(
                method,
                url,
                headers=headers,
                data=body,
                allow_redirects=False,
                ssl=True if pinned is None else aiohttp.Fingerprint(pinned),
                timeout=aiohttp.ClientTimeout(total=timeout),
            ) as answer:
                content = await answer.content.read(MOST_BYTES + 1)
                while len(content) <= MOST_BYTES and not answer.content.at_eof():
                    content += await answer.content.read(MOST_BYTES + 1 - len(content))
        except (aiohttp.ClientError, TimeoutError, ValueError, OSError) as error:
            detail = str(error) or type(error).__name__
            message = f"{url} does not answer ({detail}); check the address and that it runs"
            raise Unavailable(message) from error
        if len(content) > MOST_BYTES:
            message = f"{url} answers with more than {MOST_BYTES:,} bytes"
            raise Unavailable(message)
        lower = {name.lower(): value for name, value in answer.headers.items()}
        return HttpResponse(status=answer.status, headers=lower, body=content)
