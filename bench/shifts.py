"""What changes while `bench/churn.py` asks: plans, keys, and the workers that obey them."""

from __future__ import annotations

import os
import random
import secrets
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
from crowd import Kind
from echoes import CHAT, TENSORS
from upstreams import Unusable

from shipworthy.app.gateway_worker import WorkerOptions, worker_name
from shipworthy.app.processes import HEARTBEAT_VARIABLE
from shipworthy.domain.keys import hash_key, new_key
from shipworthy.domain.plan import (
    Arm,
    Capture,
    Endpoint,
    Key,
    Limits,
    Plan,
    Snapshot,
    encode_snapshot,
)
from shipworthy.stores.snapshots import SnapshotFolder

MODELS: dict[str, tuple[Kind, ...]] = {
    "digits": ("infer",),
    "fraud": ("infer",),
    "assistant": ("chat", "stream"),
}
SERVERS = 12
_EACH = 3  # servers that a release may have
_STEADY = ("shop", "bank")
_REVOKED = ("lent", "leaked")  # in turns
COUNTED = "counted"
_PLENTY = Limits(requests_per_minute=10**9, tokens_per_minute=10**11, concurrency=10**6)
_TERM = 1
_LEASE = 15.0
_READY_SECONDS = 60.0
_DRAIN_SECONDS = 20.0


class Publication(msgspec.Struct, frozen=True):
    """A snapshot, and between which times of the monotonic clock it came into its place."""

    begun: float
    done: float
    plans: dict[str, Plan]
    keys: frozenset[str]


@dataclass(slots=True)
class _Course:
    """One model's way through rollout after rollout."""

    name: str
    ports: list[int]
    rng: random.Random
    stable: int = 1
    candidate: int | None = None
    weight: int = 0
    rest: int = 3
    rollouts: int = 0

    def step(self) -> None:
        """Go on: rest, begin a rollout, let its candidate grow, promote it or give it up."""
        if self.candidate is None:
            self.rest -= 1
            if self.rest < 0:
                self.rollouts += 1
                self.candidate = self.stable + self.rng.randint(1, 2)
                self.weight = self.rng.choice((100, 500, 2_000))
        elif self.weight < 9_500 and self.rng.random() < 0.9:
            self.weight = min(9_500, self.weight + self.rng.randint(0, 1_200))
        else:
            if self.rng.random() < 0.7:
                self.stable = self.candidate
            self.candidate, self.weight, self.rest = None, 0, self.rng.randint(0, 5)

    def plan(self, revision: int) -> Plan:
        """What is to be obeyed now; a release's servers come and go too."""
        candidate = self.candidate
        return Plan(
            name=self.name,
            model=self.name,
            revision=revision,
            fence=_TERM,
            stable=self._arm(self.stable),
            candidate=None if candidate is None else self._arm(candidate),
            weight=self.weight,
            rollout="" if candidate is None else f"{self.name}-rollout-{self.rollouts}",
            lease=None if candidate is None else time.time() + _LEASE,
            capture=Capture(payloads="full" if self.name == "digits" else "none"),
        )

    def _arm(self, version: int) -> Arm:
        places = [(version * _EACH + offset) % len(self.ports) for offset in range(_EACH)]
        used = self.rng.sample(places, self.rng.randint(1, _EACH))
        return Arm(
            release=f"{self.name}@{version}",
            digest=f"sha256:{version:064x}",
            version=version,
            endpoints=tuple(Endpoint(url=f"http://127.0.0.1:{self.ports[at]}") for at in used),
            served_model=f"{self.name}-{version}",
            contract=CHAT if "chat" in MODELS[self.name] else TENSORS,
        )


class Publisher:
    """Writes a snapshot ten times a second in which everything has changed; see `history`.

    One of two keys is revoked each second, and given back a second later.
    """

    def __init__(self, state: Path, ports: list[int], seed: int, counted: Limits) -> None:
        rng = random.Random(seed)
        self.keys = {
            name: new_key(name, secrets.token_bytes(24)) for name in (*_STEADY, *_REVOKED, COUNTED)
        }
        self.history: list[Publication] = []
        self.period = 0.1
        self.revoking = False
        self._hashed = {
            name: Key(
                id=name,
                hash=hash_key(text),
                role="client",
                limits=counted if name == COUNTED else _PLENTY,
            )
            for name, text in self.keys.items()
        }
        self._courses = [_Course(name, ports, random.Random(rng.random())) for name in MODELS]
        (state / "snapshots").mkdir()
        self._folder = SnapshotFolder(state / "snapshots")
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._since = 0.0
        self.publish()

    @property
    def ports(self) -> list[int]:
        """Where servers listen, by their places."""
        return self._courses[0].ports

    def begin(self) -> None:
        """Publish, again and again, until `end`."""
        self._thread.start()

    def revoke(self) -> None:
        """Begin to revoke keys, too."""
        self._since, self.revoking = time.monotonic(), True

    def end(self) -> None:
        """Publish no more."""
        self._end.set()
        if self._thread.is_alive():
            self._thread.join()

    def publish(self) -> None:
        """Change everything once."""
        for course in self._courses:
            course.step()
        plans = {one.name: one.plan(len(self.history) + 1) for one in self._courses}
        gone = self._revoked()
        keys = {name: key for name, key in self._hashed.items() if name != gone}
        content = encode_snapshot(
            Snapshot(written=time.time(), plans=plans, keys=keys, fence=_TERM)
        )
        begun = time.monotonic()
        self._folder.publish(_TERM, content)
        self.history.append(Publication(begun, time.monotonic(), plans, frozenset(keys)))

    def _revoked(self) -> str:
        """One key after the other, each for a second."""
        if not self.revoking:
            return ""
        return _REVOKED[int(time.monotonic() - self._since) % len(_REVOKED)]

    def _run(self) -> None:
        due = time.monotonic()
        while not self._end.wait(max(0.0, due - time.monotonic())):
            self.publish()
            due = max(due + self.period, time.monotonic())


@dataclass(slots=True)
class Worker:
    """A gateway worker's process. `memory` is what it had resident in MB, by its age in seconds."""

    index: int
    process: subprocess.Popen[bytes]
    pulse: int
    since: float = field(default_factory=time.monotonic)
    memory: list[tuple[float, float]] = field(default_factory=list[tuple[float, float]])

    def ready(self) -> None:
        """Wait until it serves."""
        os.set_blocking(self.pulse, False)
        deadline = time.monotonic() + _READY_SECONDS
        while time.monotonic() < deadline and self.process.poll() is None:
            try:
                if os.read(self.pulse, 1):
                    return
            except BlockingIOError:
                time.sleep(0.005)
        raise Unusable(f"worker {self.index} does not start; see its log")

    def weigh(self) -> None:
        """Note its memory."""
        try:
            pages = int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1])
        except (OSError, IndexError):
            return
        megabytes = pages * os.sysconf("SC_PAGE_SIZE") / 2**20
        self.memory.append((time.monotonic() - self.since, megabytes))

    def end(self, number: int = signal.SIGTERM) -> int:
        """End it; its exit code."""
        self.process.send_signal(number)
        try:
            return self.process.wait(_DRAIN_SECONDS + 20.0)
        except subprocess.TimeoutExpired:
            self.process.kill()
            return self.process.wait()
        finally:
            os.close(self.pulse)
            if self.process.stdin is not None:
                self.process.stdin.close()


class Workers:
    """Gateway workers on one socket that stays open, replaced as `up` replaces them.

    `codes` are the exit codes of those that were told to end, `killed` when others were killed and
    when that was over.
    """

    def __init__(self, state: Path, count: int) -> None:
        self.socket = socket.create_server(("127.0.0.1", 0), backlog=2048)
        self.socket.settimeout(0)
        self.relay = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.codes: list[int] = []
        self.killed: list[tuple[float, float]] = []
        self.replaced = 0
        self._state = state
        self._count = count
        self.places: list[Worker] = []
        for folder in ("secrets", "metrics"):
            (state / folder).mkdir()
        for name in ("signing", "pseudonyms"):
            (state / "secrets" / name).write_bytes(secrets.token_bytes(32))

    @property
    def port(self) -> int:
        """Where clients connect."""
        return self.socket.getsockname()[1]

    def begin(self) -> None:
        """Start them all."""
        self.places = [self._start(index) for index in range(self._count)]
        for worker in self.places:
            worker.ready()

    def replace(self, index: int) -> None:
        """Start a new one, and end the old one when that serves."""
        new = self._start(index)
        new.ready()
        old, self.places[index] = self.places[index], new
        self.codes.append(old.end())
        self.replaced += 1

    def kill(self, index: int) -> None:
        """End one by force, and start another one."""
        began = time.monotonic()
        self.places[index].end(signal.SIGKILL)
        self.killed.append((began, time.monotonic()))
        self.places[index] = self._start(index)
        self.places[index].ready()

    def end(self) -> None:
        """End all that run."""
        for worker in self.places:
            if worker.process.returncode is None:
                self.codes.append(worker.end())
        self.places = []
        for one in (self.socket, *self.relay):
            one.close()

    def _start(self, index: int) -> Worker:
        relay = self.relay[0].fileno(), self.relay[1].fileno()
        options = WorkerOptions(
            index=index,
            workers=self._count,
            sockets=(self.socket.fileno(),),
            relay=relay,
            certificate=None,
            key=None,
            max_body=2**20,
            access_log=False,
            drain_seconds=_DRAIN_SECONDS,
            journal_bytes=2**34,
            metrics=str(self._state / "metrics"),
        )
        told = msgspec.json.encode(options).decode()
        pulse, beat = os.pipe()
        with (self._state / f"{worker_name(index)}.log").open("ab") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "shipworthy.app.gateway_worker", str(self._state), told],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                pass_fds=(self.socket.fileno(), *relay, beat),
                env=os.environ | {HEARTBEAT_VARIABLE: str(beat)},
                start_new_session=True,
            )
        os.close(beat)
        return Worker(index, process, pulse)


@contextmanager
def running(state: Path, count: int) -> Generator[Workers]:
    """So many workers, ended with the context, however that is left."""
    workers = Workers(state, count)
    try:
        workers.begin()
        yield workers
    finally:
        workers.end()
