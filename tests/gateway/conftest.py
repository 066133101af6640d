"""A gateway worker on a real socket, models that can misbehave, and a client."""

import asyncio
import contextlib
import time
from collections import Counter
from collections.abc import AsyncGenerator, Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
import pytest
import uvloop

from shipworthy.domain.contract import Contract, Tensor
from shipworthy.domain.keys import hash_key, new_key
from shipworthy.domain.plan import (
    Arm,
    Deadlines,
    Endpoint,
    Key,
    Plan,
    Shield,
    Snapshot,
    encode_snapshot,
)
from shipworthy.domain.records import FeedbackRecord, InferenceRecord, Record
from shipworthy.gateway import GatewayOptions, Outside, serve


@pytest.hookimpl(optionalhook=True)
def pytest_asyncio_loop_factories(config, item):
    """The loop that workers run on: it treats closed connections in its own way."""
    return {"uvloop": uvloop.new_event_loop}


CONTRACT = Contract(
    inputs=(Tensor("features", "FP64", (-1, 4)),),
    outputs=(Tensor("label", "INT64", (-1,)),),
    side_effects="none",
)
SECRET = bytes(range(32))


def answer_of(label: int = 3, *, shape=(1,), datatype="INT64", name="label", data=None) -> bytes:
    output = {
        "name": name,
        "datatype": datatype,
        "shape": list(shape),
        "data": [label] if data is None else data,
    }
    return msgspec.json.encode({"model_name": "served", "outputs": [output]})


@dataclass
class Received:
    head: str
    body: bytes

    @property
    def headers(self) -> dict[str, str]:
        lines = self.head.split("\r\n")[1:]
        return {k.lower(): v for k, _, v in (line.partition(": ") for line in lines)}

    @property
    def path(self) -> str:
        return self.head.split(" ", 2)[1]


Behaviour = Callable[[asyncio.StreamWriter], Awaitable[None]]


def responding(
    body: bytes, status: str = "200 OK", headers: str = "", *, length: int | None = None
) -> Behaviour:
    async def behave(writer: asyncio.StreamWriter) -> None:
        size = len(body) if length is None else length
        head = f"HTTP/1.1 {status}\r\ncontent-type: application/json\r\n{headers}"
        writer.write(f"{head}content-length: {size}\r\n\r\n".encode() + body)
        await writer.drain()
        if length is not None:
            writer.close()

    return behave


async def hanging(writer: asyncio.StreamWriter) -> None:
    await asyncio.sleep(30)


async def hanging_midway(writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\n{")
    await writer.drain()
    await asyncio.sleep(30)


async def resetting(writer: asyncio.StreamWriter) -> None:
    writer.transport.abort()


async def garbage(writer: asyncio.StreamWriter) -> None:
    writer.write(b"\x00\x01 this is not HTTP\r\n\r\n")
    await writer.drain()


async def closing(writer: asyncio.StreamWriter) -> None:
    writer.close()


# --- language models --------------------------------------------------------------------------


LANGUAGE = Contract(protocol="openai", side_effects="none")


def chat_answer(text: str = "hello", **changes: Any) -> bytes:
    message = {"role": "assistant", "content": text}
    answer = {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "created": 1,
        "model": "served",
        "choices": [{"index": 0, "message": message, "finish_reason": "stop"}],
        "usage": {"prompt_tokens": 9, "completion_tokens": 2, "total_tokens": 11},
    }
    return msgspec.json.encode({**answer, **changes})


def event_of(content: Any) -> bytes:
    return b"data: " + msgspec.json.encode(content) + b"\n\n"


def chunk(text: str | None = None, *, finish: str | None = None, **changes: Any) -> bytes:
    """An event of a chat's stream with this text."""
    delta = {"role": "assistant"} if text is None else {"content": text}
    choice = {"index": 0, "delta": delta, "finish_reason": finish}
    event = {
        "id": "chatcmpl-1",
        "object": "chat.completion.chunk",
        "created": 1,
        "model": "served",
        "choices": [choice],
    }
    return event_of({**event, **changes})


DONE = b"data: [DONE]\n\n"
LAST = chunk("", finish="stop")
USAGE = chunk(choices=[], usage={"prompt_tokens": 9, "completion_tokens": 2, "total_tokens": 11})


def streaming(
    *pieces: bytes | float, then: Behaviour | None = None, headers: str = "", chunked: bool = True
) -> Behaviour:
    """Send these pieces, with pauses of so many seconds, and end well unless `then` says how."""

    async def behave(writer: asyncio.StreamWriter) -> None:
        coding = "transfer-encoding: chunked\r\n" if chunked else ""
        head = f"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n{headers}{coding}\r\n"
        writer.write(head.encode())
        for piece in pieces:
            if isinstance(piece, bytes):
                writer.write(b"%x\r\n%s\r\n" % (len(piece), piece) if chunked else piece)
                await writer.drain()
            else:
                await asyncio.sleep(piece)
        if then is not None:
            await then(writer)
        elif chunked:
            writer.write(b"0\r\n\r\n")

    return behave


def telling(*texts: str) -> Behaviour:
    """A whole stream with these pieces of content."""
    return streaming(chunk(), *map(chunk, texts), LAST, DONE)


class FakeModel:
    """A model server that records what it gets and does as it is told."""

    def __init__(self, label: int) -> None:
        self.received: list[Received] = []
        self.health = 0
        self.behave: Behaviour = responding(answer_of(label))
        self.healthy = True
        self.url = ""
        self.open = 0
        self.hung_up = 0
        self.connections = self.clients = 0  # so far, and now
        self.documents: dict[str, bytes] = {}
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    async def start(self, port: int = 0) -> None:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", port)
        self.url = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    async def stop(self) -> None:
        if self._server is not None:
            self._server.close()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        self.connections += 1
        self.clients += 1
        begun = b""
        try:
            while True:
                begun = await self._one(reader, writer, begun)
        except (asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError):
            pass
        finally:
            self.clients -= 1
            self._tasks.discard(task)
            writer.transport.abort()

    async def _one(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, begun: bytes
    ) -> bytes:
        """Answer a request; what has come of the next one by then."""
        head = (begun + await reader.readuntil(b"\r\n\r\n")).decode()
        got = Received(head.rstrip("\r\n"), b"")
        got.body = await reader.readexactly(int(got.headers.get("content-length", "0")))
        if got.head.startswith("GET"):
            self.health += 1
            status = "200 OK" if self.healthy else "503 Service Unavailable"
            await responding(self.documents.get(got.path, b"{}"), status)(writer)
            return b""
        self.received.append(got)
        self.open += 1
        behaving = asyncio.ensure_future(self.behave(writer))
        leaving = asyncio.ensure_future(reader.read(1))
        try:
            await asyncio.wait({behaving, leaving}, return_when=asyncio.FIRST_COMPLETED)
            if leaving.done() and not leaving.result():
                self.hung_up += not behaving.done()
                raise ConnectionResetError
            await behaving
            return leaving.result() if leaving.done() else b""
        finally:
            self.open -= 1
            behaving.cancel()
            leaving.cancel()
            await asyncio.gather(behaving, leaving, return_exceptions=True)


class FakeJournal:
    def __init__(self) -> None:
        self.records: list[Record] = []
        self.full = False
        self.broken = False
        self.dropped: Counter[str] = Counter()

    def append(self, record: Record) -> bool:
        if self.broken:
            raise OSError("disk on fire")
        if self.full:
            self.dropped["full"] += 1
        else:
            self.records.append(record)
        return not self.full

    def close(self) -> None:
        pass

    @property
    def calls(self) -> list[InferenceRecord]:
        return [record for record in self.records if isinstance(record, InferenceRecord)]

    @property
    def feedback(self) -> list[FeedbackRecord]:
        return [record for record in self.records if isinstance(record, FeedbackRecord)]

    @property
    def last(self) -> InferenceRecord:
        return self.calls[-1]


@dataclass
class Reply:
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return msgspec.json.decode(self.body)

    @property
    def error(self) -> str:
        return self.json["error"]

    @property
    def events(self) -> list[bytes]:
        """What a stream said, event by event."""
        *events, rest = self.body.split(b"\n\n")
        assert not rest
        return [event + b"\n\n" for event in events]


@dataclass
class Clock:
    """The wall clock, which jumps when told."""

    ahead: float = 0.0

    def __call__(self) -> float:
        return time.time() + self.ahead


@dataclass
class Worker:
    """A worker under test. Keys: `client`, `other` (of another model), `trusted`, `admin`."""

    folder: Path
    model: FakeModel
    candidate_model: FakeModel
    journal: FakeJournal = field(default_factory=FakeJournal)
    clock: Clock = field(default_factory=Clock)
    draw: float = 0.5
    outside: dict[str, Any] = field(default_factory=dict)
    port: int = 0
    keys: dict[str, str] = field(default_factory=dict)
    snapshot: Snapshot = None  # type: ignore[assignment]
    client: aiohttp.ClientSession = None  # type: ignore[assignment]
    _stop: asyncio.Event = field(default_factory=asyncio.Event)
    _task: asyncio.Task[None] | None = None

    def __post_init__(self) -> None:
        for name in ("client", "other", "trusted", "admin"):
            self.keys[name] = new_key(name, SECRET)
        keys = {
            "client": Key(id="client", hash=hash_key(self.keys["client"]), role="client"),
            "other": Key(
                id="other", hash=hash_key(self.keys["other"]), role="client", models=("words",)
            ),
            "trusted": Key(id="trusted", hash=hash_key(self.keys["trusted"]), role="trusted"),
            "admin": Key(id="admin", hash=hash_key(self.keys["admin"]), role="admin"),
        }
        self.snapshot = Snapshot(
            written=time.time(), plans={"digits": self.plan()}, keys=keys, fence=1
        )

    @property
    def path(self) -> Path:
        return self.folder / "snapshot"

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def arm(self, version: int, *urls: str, contract: Contract = CONTRACT) -> Arm:
        return Arm(
            release=f"digits@{version}",
            digest=f"sha256:{version:064x}",
            version=version,
            endpoints=tuple(Endpoint(url=url) for url in urls),
            served_model="served",
            contract=contract,
        )

    def plan(
        self, *, candidate: bool = False, contract: Contract = CONTRACT, **changes: Any
    ) -> Plan:
        plan = Plan(
            name="digits",
            model="digits",
            revision=1,
            fence=1,
            stable=self.arm(1, self.model.url, contract=contract),
            deadlines=Deadlines(connect=0.5, attempt=1.0, total=3.0),
        )
        if candidate:
            plan = msgspec.structs.replace(
                plan,
                candidate=self.arm(2, self.candidate_model.url, contract=contract),
                weight=10_000,
                rollout="r-1",
            )
        return msgspec.structs.replace(plan, **changes)

    def publish(self, *plans: Plan, **changes: Any) -> None:
        """Write a snapshot as the keeper does."""
        if plans:
            changes["plans"] = {plan.name: plan for plan in plans}
        self.snapshot = msgspec.structs.replace(self.snapshot, **changes)
        partial = self.folder / "partial"
        partial.write_bytes(encode_snapshot(self.snapshot))
        partial.replace(self.path)

    async def start(self, *plans: Plan, publish: bool = True, **options: Any) -> None:
        if publish:
            self.publish(*plans)
        listening: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self._stop = asyncio.Event()
        settings: dict[str, Any] = {
            "port": 0,
            "snapshot_seconds": 0.01,
            "drain_seconds": 2.0,
            **options,
        }
        self._task = asyncio.create_task(
            serve(
                GatewayOptions(**settings),
                Outside(
                    journal=self.journal,
                    newest_snapshot=lambda: self.path,
                    signing_secret=SECRET,
                    pseudonym_secret=SECRET,
                    clock=self.clock,
                    uniform=lambda: self.draw,
                    **self.outside,
                ),
                ready=lambda _, port: listening.set_result(port),
                stop=self._stop,
            )
        )
        await asyncio.wait([self._task, listening], return_when=asyncio.FIRST_COMPLETED)
        if self._task.done():
            task, self._task = self._task, None
            await task
        self.port = await listening
        self.client = aiohttp.ClientSession()

    async def stop(self) -> None:
        if self.client is not None and not self.client.closed:
            await self.client.close()
        if self._task is not None:
            self._stop.set()
            await self._task
            self._task = None

    def begin_stop(self) -> None:
        self._stop.set()

    async def ask(
        self,
        method: str,
        path: str,
        *,
        key: str | None = "client",
        body: Any = None,
        headers: dict[str, str] | None = None,
    ) -> Reply:
        sending = dict(headers or {})
        if key is not None:
            sending["Authorization"] = f"Bearer {self.keys.get(key, key)}"
        data = body if body is None or isinstance(body, bytes) else msgspec.json.encode(body)
        async with self.client.request(
            method, self.url + path, data=data, headers=sending
        ) as response:
            named = {name.lower(): value for name, value in response.headers.items()}
            return Reply(response.status, named, await response.read())

    async def infer(self, *, name: str = "digits", unit: str | None = None, **asked: Any) -> Reply:
        headers = {**asked.pop("headers", {})}
        if unit is not None:
            headers["X-Shipworthy-Unit"] = unit
        asked.setdefault("body", request_of())
        return await self.ask("POST", f"/v2/models/{name}/infer", headers=headers, **asked)

    async def chat(self, *, unit: str | None = None, **asked: Any) -> Reply:
        """Ask a language model; other words than those of `ask` are fields of the request."""
        headers = {**asked.pop("headers", {})}
        if unit is not None:
            headers["X-Shipworthy-Unit"] = unit
        key = asked.pop("key", "client")
        body = asked.pop("body", None) or chat_of(**asked)
        return await self.ask("POST", "/v1/chat/completions", key=key, body=body, headers=headers)

    @contextlib.asynccontextmanager
    async def watching(self, **asked: Any) -> AsyncGenerator[aiohttp.ClientResponse]:
        """A chat's stream, to be read piece by piece."""
        key = self.keys[asked.pop("key", "client")]
        async with self.client.post(
            self.url + "/v1/chat/completions",
            data=msgspec.json.encode(chat_of(stream=True, **asked)),
            headers={"Authorization": f"Bearer {key}"},
        ) as response:
            yield response

    async def until(self, holds: Callable[[], bool], seconds: float = 3.0) -> None:
        async with asyncio.timeout(seconds):
            while not holds():  # noqa: ASYNC110  # what is waited for sets no event
                await asyncio.sleep(0.005)

    async def metric(self, line: str) -> float:
        text = (await self.ask("GET", "/metrics", key=None)).body.decode()
        for each in text.splitlines():
            if each.startswith(line + " "):
                return float(each.rpartition(" ")[2])
        return 0.0

    async def raw(self, content: bytes, seconds: float = 3.0) -> bytes:
        """What comes back for these bytes until the gateway closes the connection."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        try:
            writer.write(content)
            async with asyncio.timeout(seconds):
                return await reader.read()
        finally:
            writer.close()
            with contextlib.suppress(ConnectionError):
                await writer.wait_closed()


def request_of(rows: int = 1, **changes: Any) -> dict[str, Any]:
    tensor = {
        "name": "features",
        "datatype": "FP64",
        "shape": [rows, 4],
        "data": [0.5] * (4 * rows),
        **changes,
    }
    return {"inputs": [tensor]}


def chat_of(**changes: Any) -> dict[str, Any]:
    return {"model": "digits", "messages": [{"role": "user", "content": "hi"}], **changes}


@pytest.fixture
async def worker(tmp_path: Path) -> AsyncGenerator[Worker]:
    """A worker that is yet to be started, with a stable and a candidate model that work."""
    stable, candidate = FakeModel(3), FakeModel(8)
    await stable.start()
    await candidate.start()
    made = Worker(tmp_path, stable, candidate)
    yield made
    await stable.stop()
    await candidate.stop()
    await made.stop()


class Misbehaviour:
    """Ways for a model to fail, and to answer."""

    answer_of = staticmethod(answer_of)
    responding = staticmethod(responding)
    hanging = staticmethod(hanging)
    hanging_midway = staticmethod(hanging_midway)
    resetting = staticmethod(resetting)
    garbage = staticmethod(garbage)
    request_of = staticmethod(request_of)
    Shield = Shield
    Deadlines = Deadlines
    closing = staticmethod(closing)
    contract = CONTRACT
    language = LANGUAGE
    chat_answer = staticmethod(chat_answer)
    chat_of = staticmethod(chat_of)
    event_of = staticmethod(event_of)
    chunk = staticmethod(chunk)
    streaming = staticmethod(streaming)
    telling = staticmethod(telling)
    DONE = DONE
    LAST = LAST
    USAGE = USAGE


@pytest.fixture
def model() -> type[Misbehaviour]:
    return Misbehaviour
