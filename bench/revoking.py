"""How long a key opens the gateway's door after it was revoked, with a real `shipworthy up`.

From the ledger's commit, by way of the keeper and the snapshot, to the last worker that obeys.
"""

from __future__ import annotations

import asyncio
import signal
import time
from pathlib import Path

import aiohttp
from storm import Town, found

from shipworthy.app.access import create_key, revoke_key
from shipworthy.domain.keys import key_id

_ASKERS = 9
_PAUSE = 0.005
_ENOUGH = 20  # refusals in a row, by each asker
_PATIENCE = 60.0


def revocations(folder: Path, workers: int, times: int) -> list[float]:
    """Seconds from each revocation to the last request that was let in, sent after it.

    In the middle of them the workers are replaced.
    """
    town = found(folder / "project", None)
    settings = town.root / "shipworthy.yaml"
    settings.write_text(
        settings.read_text().replace("gateway: {", f"gateway: {{workers: {workers}, ")
    )
    return asyncio.run(_revocations(town, times))


async def _revocations(town: Town, times: int) -> list[float]:
    await town.start()
    try:
        took: list[float] = []
        for number in range(times):
            if number == times // 2 and town.up is not None:
                town.up.send_signal(signal.SIGHUP)
            took.append(await _revocation(town))
        return took
    finally:
        await town.end(signal.SIGTERM)


async def _revocation(town: Town) -> float:
    """Have a key used by many at once, and revoke it."""
    key = await asyncio.to_thread(create_key, town.session, "tenant", kind="service")
    askers = [_Asker(town.url, key, kept=place % 3 > 0) for place in range(_ASKERS)]
    asking = [asyncio.create_task(asker.run()) for asker in askers]
    try:
        async with asyncio.timeout(_PATIENCE):
            for asker in askers:
                await asker.accepted.wait()
            id = key_id(key) or ""
            await asyncio.to_thread(revoke_key, town.session, id, by="tenant")
            revoked = time.monotonic()
            await asyncio.gather(*asking)
    finally:
        for task in asking:
            task.cancel()
    return max(0.0, *(asker.last - revoked for asker in askers))


class _Asker:
    """Asks again and again, on a connection that is kept or on new ones."""

    def __init__(self, url: str, key: str, *, kept: bool) -> None:
        self.accepted = asyncio.Event()
        self.last = 0.0  # when the last request that was let in was sent
        self._url, self._key, self._kept = f"{url}/v2", key, kept

    async def run(self) -> None:
        """Ask until refused often enough, having been let in before."""
        refused = 0
        connector = aiohttp.TCPConnector(force_close=not self._kept)
        headers = {"Authorization": f"Bearer {self._key}"}
        async with aiohttp.ClientSession(connector=connector, headers=headers) as session:
            while not self.accepted.is_set() or refused < _ENOUGH:
                began = time.monotonic()
                async with session.get(self._url) as answer:
                    status = answer.status
                if status == 200:
                    self.accepted.set()
                    self.last, refused = began, 0
                else:
                    refused += 1
                await asyncio.sleep(_PAUSE)
