"""Recorded conversations of real clients and servers, through the gateway byte for byte.

`samples/` is written by `record_conversations.py`, which says who speaks. The client's bytes go to
a worker; a model server notes what arrives, and answers with the bytes that the real one sent. What
may differ is told here: the key, the model's name, and what is of the connection alone.
"""

import asyncio
import json
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httptools
import msgspec
import pytest
from tests.gateway.peer_contracts import LANGUAGE, PATIENT, SCORING, TENSORS

SAMPLES = sorted((Path(__file__).parent / "samples").glob("*.json"))
KEY = b"the-clients-key"
CONTRACTS = {"openai": LANGUAGE, "tensors": TENSORS, "scoring": SCORING}

SENT = {"host", "content-type", "content-length", "inference-header-content-length"}
"""All that a server sees of a request's head, besides its first line."""
PASSED = {"x-request-id", "openai-processing-ms", "retry-after"}
"""All that a client sees of an answer's head that the server wrote into it."""
REFUSED = {400, 413, 422}
TOLD = {429: 503}
"""The status that a client gets where the server's own is not passed on and it is not 502."""
TRANSLATED = {"tensors-mlserver:infer_binary_out"}
"""What the server does not understand, so that the gateway puts it into other words."""
UNREADABLE = {"wrong_column", "not_json", "infer_wrong_input"}
"""What the contract says no to, so that no server gets to see it."""
BINARY = re.compile(rb'"binary_data_size"|"binary_data(?:_output)?":true')


@dataclass
class Message:
    """A request or an answer as its parser sees it."""

    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""
    pieces: list[bytes] = field(default_factory=list)
    over: bool = False

    def on_header(self, name: bytes, value: bytes) -> None:
        self.headers[name.decode().lower()] = value.decode("latin-1")

    def on_body(self, body: bytes) -> None:
        self.body += body

    def on_message_complete(self) -> None:
        self.over = True


def answer_in(data: bytes) -> Message:
    message = Message()
    parser: Any = httptools.HttpResponseParser(message)
    parser.feed_data(data)
    message.status = parser.get_status_code()
    return message


@dataclass
class Exchange:
    name: str
    dialect: str
    request: list[bytes]
    answer: list[bytes]

    @property
    def asked(self) -> tuple[bytes, bytes]:
        """The head and the body of the request."""
        head, _, body = b"".join(self.request).partition(b"\r\n\r\n")
        return head, body

    @property
    def path(self) -> str:
        return self.asked[0].split(b" ", 2)[1].decode()

    @property
    def answered(self) -> Message:
        return answer_in(b"".join(self.answer))


def recorded() -> Iterator[Any]:
    """The exchanges that are calls of models; what is read besides is the gateway's own."""
    for path in SAMPLES:
        for said in json.loads(path.read_text())["exchanges"]:
            sides = [
                [one.encode("latin-1") for one in said[side]] for side in ("request", "answer")
            ]
            exchange = Exchange(said["name"], path.stem.partition("-")[0], *sides)
            name = f"{path.stem}:{exchange.name}"
            if exchange.asked[0].startswith(b"POST") and name not in TRANSLATED:
                yield pytest.param(exchange, id=name)


def split(data: bytes, seed: int) -> list[bytes]:
    """The bytes in other pieces, some of them as small as can be."""
    draw = random.Random(seed)
    pieces: list[bytes] = []
    while data:
        size = draw.choice([1, 2, 7, 40, 300, 2000])
        pieces.append(data[:size])
        data = data[size:]
    return pieces


def renamed(body: bytes, dialect: str, new: bytes) -> bytes:
    """The body under another name of the model, all else byte for byte."""
    field = b"model" if dialect == "openai" else b"model_name"
    return re.sub(rb'"%s":( ?)"tiny(?:-2026-01-01)?"' % field, rb'"%s":\1"%s"' % (field, new), body)


def served_as(data: bytes, new: str) -> bytes:
    """What a server sends that knows the model by a name of the same length."""
    return re.sub(rb'("model(?:_name)?": ?)"tiny', rb'\1"' + new.encode(), data)


def sending(pieces: list[bytes]) -> Any:
    async def behave(writer: asyncio.StreamWriter) -> None:
        for piece in pieces:
            writer.write(piece)
            await writer.drain()
            await asyncio.sleep(0)

    return behave


async def said_to(port: int, pieces: list[bytes]) -> Message:
    """What comes back for these bytes."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    message = Message()
    parser: Any = httptools.HttpResponseParser(message)
    for piece in pieces:
        writer.write(piece)
        await writer.drain()
        await asyncio.sleep(0)
    async with asyncio.timeout(60):
        while not message.over and (data := await reader.read(65536)):
            parser.feed_data(data)
    assert message.over
    message.status = parser.get_status_code()
    writer.close()
    return message


@pytest.mark.parametrize("pieces", ["as recorded", "in other pieces"])
@pytest.mark.parametrize("served", ["tiny", "deep"])  # of one length: chunks keep theirs
@pytest.mark.parametrize("exchange", [*recorded()])
async def test_a_recorded_exchange_passes_unchanged(worker, exchange, served, pieces):
    dialect, (_, body) = exchange.dialect, exchange.asked
    answer = [served_as(piece, served) for piece in exchange.answer]
    worker.model.documents["/v2"] = b'{"extensions":["binary_tensor_data"]}'
    worker.model.behave = sending(answer)
    arm = msgspec.structs.replace(
        worker.arm(1, worker.model.url, contract=CONTRACTS[dialect]), served_model=served
    )
    await worker.start(worker.plan(name="tiny", model="tiny", stable=arm, deadlines=PATIENT))
    address = b"/models/tiny/invocations" if dialect == "scoring" else exchange.path.encode()
    request = b"".join(exchange.request).replace(KEY, worker.keys["client"].encode())
    request = request.replace(exchange.path.encode(), address, 1)
    if BINARY.search(body) and exchange.name not in UNREADABLE:  # what it speaks is asked once
        await said_to(worker.port, [request])
        await worker.until(lambda: worker.model.health > 0)
        worker.model.received.clear()
    asking = [request]
    if pieces == "in other pieces":
        seed = len(exchange.name)
        worker.model.behave = sending(split(b"".join(answer), seed))
        asking = split(request, seed + 1)

    got = await said_to(worker.port, asking)

    if exchange.name in UNREADABLE:
        assert got.status == 400
        assert not worker.model.received
        return
    assert worker.model.received
    for seen in worker.model.received:
        assert_seen_is(seen, exchange, served)
    assert_told_is(got, exchange, served)


def assert_seen_is(seen: Any, exchange: Exchange, served: str) -> None:
    """The server sees the client's bytes, under its own name of the model."""
    head, body = exchange.asked
    assert seen.body == renamed(body, exchange.dialect, served.encode())
    assert set(seen.headers) <= SENT
    assert KEY.decode() not in seen.head
    assert "sw_" not in seen.head
    kind = re.search(rb"(?i)\r\ncontent-type: ([^\r]+)", head)
    binary = b"inference-header" in head.lower()
    default = "application/octet-stream" if binary else "application/json"
    assert seen.headers["content-type"] == (kind[1].decode() if kind else default)
    path = exchange.path.replace("/models/tiny/", f"/models/{served}/")
    assert seen.head.startswith(f"POST {path} HTTP/1.1")


def assert_told_is(got: Message, exchange: Exchange, served: str) -> None:
    """The client gets the server's bytes, under the name that it called."""
    wanted = exchange.answered
    own = {name for name in got.headers if name.startswith("x-shipworthy-")}
    assert "x-shipworthy-inference" in own
    framing = {"date", "content-type", "content-length", "transfer-encoding", "connection"}
    assert set(got.headers) <= own | framing | PASSED | {"inference-header-content-length"}
    if wanted.status != 200 and wanted.status not in REFUSED:
        assert got.status == TOLD.get(wanted.status, 502)
        assert json.loads(got.body)["error"]["message"]
        assert got.headers.get("retry-after") == wanted.headers.get("retry-after")
        return
    assert got.status == wanted.status
    assert got.headers["content-type"] == wanted.headers["content-type"]
    for name in PASSED & set(wanted.headers):
        assert got.headers[name] == wanted.headers[name]
    if served == "tiny":
        assert got.body == wanted.body
    else:
        assert got.body == renamed(wanted.body, exchange.dialect, b"tiny")


def test_each_kind_of_conversation_is_there():
    names = {each.id for each in recorded()}
    assert len(names) > 60
    for kind in ("openai-llama.cpp:chat_stream", "tensors-mlserver:infer_json"):
        assert kind in names
    for kind in ("tensors-mock:infer_binary", "scoring-mlflow:split", "openai-mock:fail_429"):
        assert kind in names


async def test_a_stream_is_known_however_its_type_is_written(worker, model):
    kind = "Text/Event-Stream; Charset=UTF-8"
    worker.model.behave = model.streaming(
        model.chunk("hi"), model.LAST, model.DONE, headers=f"Content-Type: {kind}\r\n"
    )
    await worker.start(worker.plan(contract=LANGUAGE, deadlines=PATIENT))
    got = await worker.chat(stream=True)
    assert got.status == 200
    assert got.headers["content-type"] == kind
    assert got.events[-1] == model.DONE
    assert worker.journal.last.output_tokens


async def test_headers_of_a_client_that_are_not_for_servers_stay_here(worker, model):
    worker.model.behave = model.responding(model.chat_answer())
    await worker.start(worker.plan(contract=LANGUAGE, deadlines=PATIENT))
    asked = {
        "OpenAI-Organization": "org",
        "openai-project": "project",
        "Cookie": "a=b",
        "api-key": "secret",
        "X-Forwarded-For": "10.0.0.1",
        "ACCEPT": "text/event-stream",
    }
    assert (await worker.chat(headers=asked)).status == 200
    (seen,) = worker.model.received
    assert set(seen.headers) <= SENT
