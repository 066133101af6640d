"""A project under load, and somebody who kills its processes.

A folder with a running `shipworthy up`, people who promote good and bad candidates, clients who
write down what they were promised, and a tormentor.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import re
import signal
import socket
import sys
import time
from collections import Counter
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import aiohttp
import skops.io
from aftermath import Acknowledged, processes
from sklearn.datasets import load_digits
from sklearn.linear_model import RidgeClassifier

from shipworthy.app.access import create_key
from shipworthy.app.founding import apply_policies, make_project
from shipworthy.app.session import Session, open_session
from shipworthy.domain.rollout import RolloutState
from shipworthy.domain.terms import Term
from shipworthy.errors import ShipworthyError
from shipworthy.runtimes.hosts import HOST_FILE

POLICY = """
model: digits
preset: prototype
promotion:
  staging: {checks: [assets.stored]}
  production: {checks: [assets.stored, contract.compatible], approvals: 1}
rollout:
  steps:
    - {weight: 5%, requests: 20, duration: 1s}
    - {weight: 25%, requests: 40, duration: 1s}
    - {weight: 50%, requests: 60, duration: 1s}
  margin: 10%
  lease: 3s
  keep_warm: 20s
  ready_limit: 90s
  step_limit: 60s
rollback: {breaker: {window: 20, failures: 10}}
capture: {payloads: full}
deadlines: {attempt: 3s, total: 10s}
"""

BAD = """\
import numpy


def predict(inputs):
    rows = inputs["input"]
    if rows.max() > 16:  # some clients send another scale
        raise RuntimeError("scale")
    return {"predict": numpy.zeros(rows.shape[0], dtype="int64")}
"""

UP_SECONDS = 90.0
_CONTRACT = {
    "inputs": [{"name": "input", "datatype": "FP64", "shape": [-1, 64]}],
    "outputs": [{"name": "predict", "datatype": "INT64", "shape": [-1]}],
    "side_effects": "none",
}


# --- a project and its people ---------------------------------------------------------------------


@dataclass(slots=True)
class Town:
    """A project folder, its `up` and its keys."""

    root: Path
    session: Session
    port: int
    keys: dict[str, str]
    refused_starts: int = 0
    up: asyncio.subprocess.Process | None = None

    @property
    def url(self) -> str:
        """Where clients call."""
        return f"http://127.0.0.1:{self.port}"

    async def start(self) -> None:
        """Start `up`, again if need be: what died just now may still hold the port or the lock."""
        deadline = time.monotonic() + UP_SECONDS
        while time.monotonic() < deadline:
            with (self.root / "up.log").open("ab") as log:
                self.up = await asyncio.create_subprocess_exec(
                    *(sys.executable, "-m", "shipworthy", "up"),
                    cwd=self.root,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,
                )
            if await self._came_up(deadline):
                return
            self.refused_starts += 1
            await asyncio.sleep(0.5)
        raise TimeoutError(f"'shipworthy up' did not come back; see {self.root / 'up.log'}")

    async def _came_up(self, deadline: float) -> bool:
        """Whether its own gateway listens; False when `up` has ended instead."""
        assert self.up is not None
        state = self.root / ".shipworthy"
        while time.monotonic() < deadline:
            if self.up.returncode is not None:
                return False
            with contextlib.suppress(OSError, ValueError):
                told = json.loads((state / "processes.json").read_bytes())
                listens = json.loads((state / "gateway.json").read_bytes())["pid"]
                if told["pid"] == self.up.pid == listens:
                    return True
            await asyncio.sleep(0.05)
        return False

    async def end(self, number: signal.Signals = signal.SIGTERM, patience: float = 90.0) -> int:
        """End `up` with a signal; its exit code."""
        assert self.up is not None
        with contextlib.suppress(ProcessLookupError):
            self.up.send_signal(number)
        return await asyncio.wait_for(self.up.wait(), patience)

    async def sw(self, *words: str, key: str | None = None, patience: float = 120.0) -> int:
        """Run a command as a person would; its exit code, or -1 when it took too long."""
        environment = dict(os.environ) | ({"SHIPWORTHY_KEY": self.keys[key]} if key else {})
        with (self.root / "commands.log").open("ab") as log:
            log.write(f"\n$ shipworthy {' '.join(words)}\n".encode())
            log.flush()
            command = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "shipworthy", *words),
                cwd=self.root,
                env=environment,
                stdout=log,
                stderr=log,
            )
            try:
                code = await asyncio.wait_for(command.wait(), patience)
            except (TimeoutError, asyncio.CancelledError):
                command.kill()
                await command.wait()
                code = -1
                if asyncio.current_task().cancelling():  # pyright: ignore[reportOptionalMemberAccess]
                    raise
            log.write(f"→ {code}\n".encode())
        return code

    def write_release(self, version: int, *, bad: bool) -> str:
        """A candidate's folder with its release.yaml; the model differs by version."""
        folder = self.root / f"candidate-{version}"
        folder.mkdir(exist_ok=True)
        features, labels = load_digits(return_X_y=True)
        content: dict[str, Any] = {
            "model": "digits",
            "version": version,
            "description": "bad" if bad else "good",
            "owner": {"name": "Vision team", "email": "vision@shipworthy.dev"},
            "contract": _CONTRACT,
            "metrics": {"heldout": {"accuracy": {"value": 0.93, "n": 500}}},
            "serving": {"runtime": "process", "replicas": {"min": 2, "max": 2}},
        }
        if bad:
            (folder / "predictor.py").write_text(f"{BAD}\n# {version}\n")
            content["artifacts"] = [{"path": "predictor.py", "format": "python"}]
        else:
            model = RidgeClassifier(alpha=1.0 + version).fit(features, labels)
            skops.io.dump(model, folder / "model.skops")
            content["artifacts"] = [{"path": "model.skops", "format": "skops"}]
        (folder / "release.yaml").write_text(json.dumps(content))
        return str(folder / "release.yaml")

    async def create(self, version: int, *, bad: bool) -> bool:
        """Register a new release; whether that went well."""
        file = await asyncio.to_thread(self.write_release, version, bad=bad)
        return await self._insist("release", "create", "-f", file)

    async def promote(self, version: int) -> bool:
        """Take a registered release to the door of production; whether it got in there."""
        name = f"digits@{version}"
        return (
            await self._insist("promote", name, "--to", "staging")
            and await self._insist("approve", name, key="bob")
            and await self._insist("promote", name, "--to", "production")
        )

    async def _insist(self, *words: str, key: str | None = None) -> bool:
        """Try again, as people do when a keeper or a database was just away."""
        for _ in range(4):
            if await self.sw(*words, key=key) == 0:
                return True
            await asyncio.sleep(1.0)
        return False

    def rollout(self) -> RolloutState | None:
        """The newest one; None while the ledger can't be reached."""
        with contextlib.suppress(ShipworthyError), self.session.ledger.read() as tx:
            return tx.rollouts.latest("digits")
        return None

    def rollouts(self) -> Counter[str]:
        """How many rollouts ended how."""
        with self.session.ledger.read() as tx:
            kinds = {"complete": "completed", "roll back": "rolled_back", "abort": "aborted"}
            return Counter(
                kinds[decision.kind]
                for decision in tx.decisions.list("digits", limit=100_000)
                if decision.rollout and decision.kind in kinds
            )

    def term(self) -> Term | None:
        """Who decides; None while the ledger can't be reached."""
        with contextlib.suppress(ShipworthyError), self.session.ledger.read() as tx:
            return tx.terms.current()
        return None


def found(root: Path, ledger: str | None) -> Town:
    """A project with a second person and a client, not yet running."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    session = make_project(root, preset="prototype", solo=False)
    settings = root / "shipworthy.yaml"
    lines = f"gateway: {{port: {port}}}\n"
    settings.write_text(settings.read_text() + lines + (f"ledger: {ledger}\n" if ledger else ""))
    session = open_session(root, prepare=True)
    (root / "policy.yaml").write_text(POLICY)
    apply_policies(session, root / "policy.yaml", dry_run=False)
    keys = {
        "bob": create_key(session, "bob"),
        "shop": create_key(session, "shop", models=("digits",), kind="service"),
    }
    return Town(session.project.root, session, port, keys)


class Promoter:
    """Sends good and bad candidates on their way, one after the other."""

    def __init__(self, town: Town, rng: random.Random) -> None:
        self._town, self._rng = town, rng
        self._registered = self._promoted = 0

    async def begin(self, ahead: int) -> None:
        """Bring the first release to production, and register some more."""
        if not (await self._register(bad=False) and await self._town.promote(1)):
            raise RuntimeError(f"the first release did not start; see {self._town.root}")
        self._promoted = 1
        for _ in range(ahead):
            await self._register(bad=self._rng.random() < 0.4)

    async def run(self) -> None:
        """Go on until cancelled."""
        while True:
            self._promoted += 1
            if self._promoted > self._registered:
                await self._register(bad=self._rng.random() < 0.4)
            if await self._town.promote(self._promoted):
                await self._follow()
            if self._rng.random() < 0.2:
                await self._town.sw("rollback", "digits", "-m", "practice")
            await asyncio.sleep(self._rng.uniform(0.0, 2.0))

    async def _register(self, *, bad: bool) -> bool:
        self._registered += 1
        return await self._town.create(self._registered, bad=bad)

    async def _follow(self) -> None:
        """Wait for the rollout's end, and meddle now and then."""
        deadline = time.monotonic() + 100.0
        pause = self._rng.random() < 0.25
        while time.monotonic() < deadline:
            state = await asyncio.to_thread(self._town.rollout)
            if state is not None and state.status.ended:
                return
            if state is not None and state.status.exposed and pause:
                pause = False
                await self._town.sw("rollout", "pause", "digits", "-m", "a look")
                await self._town.sw("rollout", "resume", "digits")
            if state is not None and state.status.value == "held":
                await self._town.sw("rollout", "abort", "digits", "-m", "undecided")
            await asyncio.sleep(0.5)
        await self._town.sw("rollout", "abort", "digits", "-m", "too long")


# --- clients --------------------------------------------------------------------------------------


class Load:
    """Clients that keep connections open, and write down what they were promised."""

    def __init__(self, town: Town, rng: random.Random, *, rate: float, clients: int = 16) -> None:
        self.acknowledged = Acknowledged()
        self.seen: Counter[str] = Counter()
        self._town, self._rng = town, rng
        self._rate, self._clients = rate / clients, clients
        self._recent: list[str] = []
        features, _ = load_digits(return_X_y=True)
        self._bodies = [
            json.dumps(
                {
                    "inputs": [
                        {
                            "name": "input",
                            "shape": [1, 64],
                            "datatype": "FP64",
                            "data": (row * scale).tolist(),
                        }
                    ]
                }
            ).encode()
            for row in features[:50]
            for scale in (1, 16)
        ]

    @property
    def user_errors(self) -> int:
        """Requests that got no good answer for a reason of ours; `refused` is among them."""
        kinds = ("refused", "broken", "late", "5xx", "feedback refused", "feedback broken")
        return sum(self.seen[kind] for kind in kinds)

    async def run(self) -> None:
        """Go on until cancelled."""
        headers = {"Authorization": f"Bearer {self._town.keys['shop']}"}
        timeout = aiohttp.ClientTimeout(total=30.0)
        async with (
            aiohttp.ClientSession(headers=headers, timeout=timeout) as http,
            asyncio.TaskGroup() as group,
        ):
            for _ in range(self._clients):
                group.create_task(self._client(http))

    async def _client(self, http: aiohttp.ClientSession) -> None:
        rng = self._rng
        while True:
            await asyncio.sleep(rng.expovariate(self._rate))
            if self._recent and rng.random() < 0.2:
                await self._say(http)
            elif rng.random() < 0.01:
                with contextlib.suppress(TimeoutError):  # somebody who has no time
                    await asyncio.wait_for(self._ask(http), 0.003)
                    self.seen["impatient"] += 1
            else:
                await self._ask(http)

    async def _ask(self, http: aiohttp.ClientSession) -> None:
        rng = self._rng
        headers: dict[str, str] = {}
        if rng.random() < 0.9:
            headers["X-Shipworthy-Unit"] = f"user-{rng.randrange(20_000)}"
        if rng.random() < 0.3:
            headers["X-Shipworthy-Slice"] = rng.choice(("country=DE", "country=FR,plan=pro"))
        body = rng.choice(self._bodies)
        nonsense = rng.random() < 0.02
        async with self._watched(""):
            async with http.post(
                f"{self._town.url}/v2/models/digits/infer",
                data=body[:-9] if nonsense else body,
                headers=headers,
            ) as answer:
                await answer.read()
            inference = answer.headers.get("X-Shipworthy-Inference")
            if inference:
                self.acknowledged.inferences.add(inference)
                self._recent.append(inference)
                del self._recent[:-500]
            self._count(answer.status, "answered" if answer.status == 200 else "")

    async def _say(self, http: aiohttp.ClientSession) -> None:
        content = {
            "inference": self._rng.choice(self._recent),
            "kind": "rating",
            "name": "stars",
            "value": self._rng.randrange(1, 6),
        }
        async with self._watched("feedback "):
            async with http.post(f"{self._town.url}/v1/feedback", json=content) as answer:
                said = await answer.read()
            if answer.status == 202:
                self.acknowledged.feedback.add(json.loads(said)["feedback"])
            self._count(answer.status, "feedback" if answer.status == 202 else "")

    def _count(self, status: int, good: str) -> None:
        if good:
            self.seen[good] += 1
        elif status >= 500:
            self.seen["5xx"] += 1
            self.seen[f"status {status}"] += 1
        elif status == 400:
            self.seen["nonsense"] += 1
        else:
            self.seen[f"status {status}"] += 1

    @contextlib.asynccontextmanager
    async def _watched(self, what: str) -> AsyncGenerator[None]:
        try:
            yield
        except aiohttp.ClientConnectorError:
            self.seen[f"{what}refused"] += 1
            await asyncio.sleep(self._rng.uniform(0.1, 0.4))
        except TimeoutError:
            self.seen["late"] += 1
        except aiohttp.ClientError:
            self.seen[f"{what}broken"] += 1
            await asyncio.sleep(self._rng.uniform(0.0, 0.2))


# --- the tormentor --------------------------------------------------------------------------------


class Database(Protocol):
    """A PostgreSQL server of the storm's own."""

    def crash(self, seconds: float) -> None:
        """Stop it at once, as a crash would, and start it again so much later."""
        ...

    def cut_off(self) -> None:
        """End all connections to it."""
        ...


@dataclass(frozen=True, slots=True)
class Blow:
    """What was done to whom; `at` in seconds since the storm began."""

    at: float
    target: str
    what: str
    pid: int | None = None


_MODULES = {
    "gateway": "shipworthy.app.gateway_worker",
    "keeper": "shipworthy.app.keeping",
    "standby": "shipworthy.app.keeping",
    "lake writer": "shipworthy.app.lake_writing",
    "model server": "shipworthy.runtimes.model_server",
    "model host": str(HOST_FILE),
}
_KEEPERS = ("keeper", "standby")
_WEIGHTS = {
    "gateway": 5,
    "keeper": 5,
    "standby": 2,
    "lake writer": 5,
    "model server": 3,
    "model host": 3,
    "up": 1,
    "database": 3,
}


@dataclass(slots=True)
class Tormentor:
    """Strikes again and again, by a seeded random generator."""

    town: Town
    rng: random.Random
    database: Database | None = None
    blows: list[Blow] = field(default_factory=list[Blow])
    takeovers: list[float] = field(default_factory=list[float])
    _began: float = 0.0
    _upset: bool = False
    _behind: set[asyncio.Task[None]] = field(default_factory=set[asyncio.Task[None]])
    _stopped: set[int] = field(default_factory=set[int])

    async def run(self, kills: int, told: Callable[[Blow], object] = lambda _: None) -> None:
        """Strike so many times, and let everybody go on at the end."""
        self._began = time.monotonic()
        try:
            while len(self.blows) < kills:
                await asyncio.sleep(self.rng.uniform(0.2, 3.0))
                blow = await self._strike(self._choose())
                self.blows.append(blow)
                told(blow)
        finally:
            for pid in list(self._stopped):
                self._go_on(pid)
            await asyncio.gather(*self._behind, return_exceptions=True)

    def _choose(self) -> str:
        weights = dict(_WEIGHTS)
        if self.database is None:
            del weights["database"]
        return self.rng.choices(list(weights), list(weights.values()))[0]

    async def _strike(self, target: str) -> Blow:
        if target == "up":
            return await self._strike_up()
        if target == "database":
            return await self._strike_database()
        halt = self.rng.random() < 0.35
        seconds = self.rng.uniform(0.1, 8.0)
        turn = self.rng.random()
        pid, term = await self._wait_for(target, turn)
        with contextlib.suppress(ProcessLookupError):  # it was quicker
            os.kill(pid, signal.SIGSTOP if halt else signal.SIGKILL)
        if halt:
            self._stopped.add(pid)
            self._later(self._resume(pid, seconds))
        elif term is not None and target == "keeper":
            self._later(self._watch_takeover(term.number))
        return self._blow(target, f"SIGSTOP for {seconds:.1f} s" if halt else "SIGKILL", pid)

    async def _wait_for(self, target: str, turn: float) -> tuple[int, Term | None]:
        """A process of that kind, once there is one; what never comes back is a fault."""
        deadline = time.monotonic() + UP_SECONDS
        while time.monotonic() < deadline:
            term = await asyncio.to_thread(self.town.term) if target in _KEEPERS else None
            pid = self._find(target, turn, term)
            if pid is not None:
                return pid, term
            await asyncio.sleep(0.1)
        raise TimeoutError(f"no {target} came back within {UP_SECONDS:.0f} s")

    async def _strike_up(self) -> Blow:
        number = self.rng.choice((signal.SIGTERM, signal.SIGKILL))
        pause = self.rng.uniform(0.0, 1.0)
        pid = self.town.up.pid if self.town.up else None
        blow = self._blow("up", number.name, pid)
        self._upset = True
        await self.town.end(number)
        await asyncio.sleep(pause)
        await self.town.start()
        self._upset = False
        return blow

    async def _strike_database(self) -> Blow:
        assert self.database is not None
        crash, seconds = self.rng.random() < 0.6, self.rng.uniform(0.0, 3.0)
        if not crash:
            await asyncio.to_thread(self.database.cut_off)
            return self._blow("database", "connections cut off")
        blow = self._blow("database", "immediate shutdown")
        await asyncio.to_thread(self.database.crash, seconds)
        return blow

    def _find(self, target: str, turn: float, term: Term | None) -> int | None:
        """One of the project's own processes of that kind."""
        module = _MODULES[target]
        pids = sorted(pid for pid, words in processes(self.town.root) if module in words)
        if target in _KEEPERS:  # both run the same; whoever is in office bears its process's id
            named = re.search(r"(\d+)-\w+$", term.holder) if term and term.until else None
            if named is None:
                return None
            pids = [pid for pid in pids if (str(pid) == named[1]) == (target == "keeper")]
        return pids[int(turn * len(pids))] if pids else None

    def _blow(self, target: str, what: str, pid: int | None = None) -> Blow:
        return Blow(time.monotonic() - self._began, target, what, pid)

    def _later(self, work: Any) -> None:
        task = asyncio.create_task(work)
        self._behind.add(task)
        task.add_done_callback(self._behind.discard)

    async def _resume(self, pid: int, seconds: float) -> None:
        await asyncio.sleep(seconds)
        self._go_on(pid)

    def _go_on(self, pid: int) -> None:
        self._stopped.discard(pid)
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)

    async def _watch_takeover(self, term: int) -> None:
        """Time how long nobody decides, unless `up` and so the standby is struck meanwhile."""
        began, up = time.monotonic(), self.town.up
        while time.monotonic() < began + 30.0 and self.town.up is up and not self._upset:
            now = await asyncio.to_thread(self.town.term)
            if now is not None and now.number > term:
                self.takeovers.append(time.monotonic() - began)
                return
            await asyncio.sleep(0.05)
