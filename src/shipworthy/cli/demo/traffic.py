"""Users: thousands of them, who send images over HTTP and sometimes say which digit it was.

The client runs in a thread with an event loop of its own. Requests begin at a steady rate whether
or not earlier ones were answered, as users do; the rate itself follows what the machine can take.
"""

from __future__ import annotations

import asyncio
import json
import random
import threading
import time
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

import aiohttp
import numpy as np
import numpy.typing as npt
import uvloop

from shipworthy.cli.demo.models import MODEL, Images

USERS: Final = 6_000
TABLETS: Final = 0.08
"""The share of users whose app sends 8-bit pixels, 0 to 255."""
CAMERAS: Final = 0.03
"""The share of users whose app photographs paper, which is never quite white."""
LABELS: Final = 0.1
"""How often somebody says afterwards which digit it was."""

QUIET, BUSY, CALM = 40.0, 400.0, 5.0
"""Requests a second at most: between rollouts, during one, and when the story is told."""
_LEAST_RATE, _BUSY_FROM = 40.0, 250.0
_MOST_UNDER_WAY = 48
_PATIENCE_SECONDS = 30.0
_GOOD_MEDIAN, _BAD_MEDIAN = 0.05, 0.15
_CONTROL_SECONDS = 0.5
_RECENT = 200
_KEPT_PROBLEMS = 5

Floats = npt.NDArray[np.float64]


@dataclass(slots=True)
class Tally:
    """What users saw during one part of the story."""

    requests: int = 0
    errors: int = 0
    shielded: int = 0
    labels: int = 0
    by_release: Counter[str] = field(default_factory=Counter[str])
    seconds: list[float] = field(default_factory=list[float])

    def quantile(self, share: float) -> float:
        """The time in seconds that this share of the requests took at most; 0 without any."""
        return float(np.quantile(self.seconds, share)) if self.seconds else 0.0


@dataclass(frozen=True, slots=True)
class _User:
    name: str
    app: str


class Traffic:
    """Start it once; `phase` says to which tally a request goes from now on."""

    def __init__(self, url: str, key: str, images: Images, *, seed: int) -> None:
        self.tallies: dict[str, Tally] = {}
        self.problems: list[str] = []
        self.rate = QUIET
        self._most_rate = QUIET
        self._phase = ""
        self._url = url
        self._key = key
        self._random = random.Random(seed)  # noqa: S311  # made-up users, nothing to hide
        self._users = _users(self._random)
        self._bodies = _bodies(images, np.random.default_rng(seed))
        self._digits = [int(digit) for digit in images.digits]
        self._recent: deque[float] = deque(maxlen=_RECENT)
        self._stop = threading.Event()
        self._under_way = 0
        self._thread = threading.Thread(target=self._run, name="traffic", daemon=True)

    def start(self, phase: str) -> None:
        """Let users come."""
        self.enter(phase)
        self._thread.start()

    def enter(self, phase: str) -> None:
        """Count the requests that begin from now on for this part of the story."""
        self.tallies.setdefault(phase, Tally())
        self._phase = phase

    def limit(self, most: float) -> None:
        """Let so many come a second, at most, from now on."""
        self._most_rate = most
        self.rate = min(most, _BUSY_FROM)

    def stop(self) -> None:
        """Let nobody come any more, and wait for what is under way."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join(_PATIENCE_SECONDS)

    @property
    def alive(self) -> bool:
        """Whether users are coming; False also when the client itself broke."""
        return self._thread.is_alive()

    @property
    def requests(self) -> int:
        """All answered so far."""
        return sum(tally.requests for tally in list(self.tallies.values()))

    @property
    def errors(self) -> int:
        """All that were not answered as they should, as users saw it."""
        return sum(tally.errors for tally in list(self.tallies.values()))

    def median(self) -> float:
        """The time in seconds that a typical request of the last few took."""
        recent = sorted(self._recent)
        return recent[len(recent) // 2] if recent else 0.0

    # --- the thread ---------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
                runner.run(self._come())
        except Exception as error:  # noqa: BLE001  # told in the main thread, which ends the demo
            self._note(f"the traffic client broke: {error!r}")

    async def _come(self) -> None:
        timeout = aiohttp.ClientTimeout(total=_PATIENCE_SECONDS)
        async with (
            aiohttp.ClientSession(
                timeout=timeout,
                connector=aiohttp.TCPConnector(limit=_MOST_UNDER_WAY),
                headers={"Authorization": f"Bearer {self._key}"},
            ) as session,
            asyncio.TaskGroup() as group,
        ):
            due = control_at = time.monotonic()
            while not self._stop.is_set():
                now = time.monotonic()
                if now >= control_at:
                    self._follow_the_machine()
                    control_at = now + _CONTROL_SECONDS
                if now < due:
                    await asyncio.sleep(due - now)
                elif self._under_way >= _MOST_UNDER_WAY:
                    await asyncio.sleep(0.005)
                else:
                    due = max(due, now - 0.1) + self._random.expovariate(self.rate)
                    group.create_task(self._visit(session))

    def _follow_the_machine(self) -> None:
        """Send more while answers are quick, less when they are not."""
        median = self.median()
        if median > _BAD_MEDIAN:
            self.rate = min(self._most_rate, max(_LEAST_RATE, self.rate * 0.8))
        elif median and median < _GOOD_MEDIAN:
            self.rate = min(self._most_rate, self.rate * 1.1)

    async def _visit(self, session: aiohttp.ClientSession) -> None:
        """One user sends one image, and perhaps says later what it was."""
        tally = self.tallies[self._phase]
        user = self._random.choice(self._users)
        image = self._random.randrange(len(self._digits))
        self._under_way += 1
        began = time.monotonic()
        try:
            async with session.post(
                f"{self._url}/v2/models/{MODEL}/infer",
                data=self._bodies[user.app][image],
                headers={
                    "X-Shipworthy-Unit": user.name,
                    "X-Shipworthy-Slice": f"app={user.app}",
                    "Content-Type": "application/json",
                },
            ) as answer:
                content = await answer.read()
                if answer.status != 200:
                    self._note(f"{answer.status}: {content[:200].decode(errors='replace')}")
                    tally.errors += 1
                else:
                    tally.by_release[answer.headers.get("X-Shipworthy-Release", "")] += 1
                    tally.shielded += answer.headers.get("X-Shipworthy-Fallback") == "stable"
                inference = answer.headers.get("X-Shipworthy-Inference", "")
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            self._note(repr(error))
            tally.errors += 1
            inference = ""
        finally:
            self._under_way -= 1
        took = time.monotonic() - began
        tally.requests += 1
        tally.seconds.append(took)
        self._recent.append(took)
        if inference and self._random.random() < LABELS:
            await self._label(session, tally, inference, self._digits[image])

    async def _label(
        self, session: aiohttp.ClientSession, tally: Tally, inference: str, digit: int
    ) -> None:
        feedback = {"inference": inference, "kind": "label", "name": "digit", "value": digit}
        try:
            async with session.post(f"{self._url}/v1/feedback", json=feedback) as answer:
                await answer.read()
                tally.labels += answer.status == 202
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            self._note(f"feedback: {error!r}")

    def _note(self, problem: str) -> None:
        if len(self.problems) < _KEPT_PROBLEMS:
            self.problems.append(problem)


def _users(rng: random.Random) -> list[_User]:
    apps = ("tablet", "camera", "web")
    weights = (TABLETS, CAMERAS, 1.0 - TABLETS - CAMERAS)
    drawn = rng.choices(apps, weights, k=USERS)
    return [_User(f"user-{number}", app) for number, app in enumerate(drawn)]


def _bodies(images: Images, rng: np.random.Generator) -> dict[str, list[bytes]]:
    """Each image as each app would send it."""
    count = len(images.digits)
    grey = rng.uniform(1.5, 3.5, (count, 1)) + rng.normal(0.0, 0.4, images.pixels.shape)
    return {
        "web": _encoded(images.pixels),
        "tablet": _encoded(np.round(images.pixels * (255.0 / 16.0))),
        "camera": _encoded(np.round(np.clip(images.pixels + grey, 0.0, 16.0), 2)),
    }


def _encoded(pixels: Floats) -> list[bytes]:
    rows: Sequence[Sequence[float]] = pixels.tolist()
    return [encode_request(row) for row in rows]


def encode_request(pixels: Sequence[float]) -> bytes:
    """One image as a request of the Open Inference Protocol."""
    tensor = {"name": "input", "datatype": "FP64", "shape": [1, 64], "data": pixels}
    return json.dumps({"inputs": [tensor]}).encode()
