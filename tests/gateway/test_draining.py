"""A worker that ends while clients keep their connections to it."""

import asyncio
import os
import socket
import ssl
from pathlib import Path

import pytest

from shipworthy.gateway.options import Tls

CERTIFICATES = Path(__file__).parents[1] / "app" / "certificates"


class Client:
    """A client that keeps its connection, and never sends a request twice."""

    def __init__(self, worker, reader, writer):
        self.worker, self.reader, self.writer = worker, reader, writer

    @classmethod
    async def connect(cls, worker, **secure):
        reader, writer = await asyncio.open_connection("127.0.0.1", worker.port, **secure)
        return cls(worker, reader, writer)

    def send(self, body=b"", path="/v2/models/no"):
        head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n"
        key = self.worker.keys["client"]
        self.writer.write(f"{head}Authorization: Bearer {key}\r\n\r\n".encode() + body)

    async def ask(self):
        """Give the status, and whether the connection ends."""
        self.send()
        return await self.answer()

    async def answer(self):
        head = (await asyncio.wait_for(self.reader.readuntil(b"\r\n\r\n"), 10)).lower()
        length = int(head.partition(b"content-length: ")[2].split()[0])
        await self.reader.readexactly(length)
        return int(head.split()[1]), b"connection: close" in head


@pytest.fixture
async def connect(worker):
    clients = []

    async def one(to=worker, **secure):
        clients.append(await Client.connect(to, **secure))
        return clients[-1]

    yield one
    for client in clients:
        client.writer.close()


@pytest.fixture
async def pair(worker, tmp_path):
    """Two workers that share a port; the first one ends before the second one begins to accept."""
    ends = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    other = type(worker)(tmp_path / "other", worker.model, worker.candidate_model)
    other.folder.mkdir()
    other.keys, other.snapshot = worker.keys, worker.snapshot

    async def start(one):
        await one.start(relay=tuple(os.dup(end.fileno()) for end in ends), drain_seconds=20.0)

    yield worker, other, start
    await other.stop()
    for end in ends:
        end.close()


async def test_a_kept_connection_outlives_its_worker(pair, connect):
    one, other, start = pair
    await start(one)
    clients = [await connect() for _ in range(300)]
    for client in clients[::2]:
        assert await client.ask() == (404, False)
    await start(other)
    await one.stop()
    for client in clients:
        assert await client.ask() == (404, False)
    assert await other.metric("shipworthy_gateway_connections") >= len(clients)


async def test_what_is_on_its_way_goes_along(pair, connect):
    """It was sent when the worker had given the connection away, and nobody had taken it yet."""
    one, other, start = pair
    await start(one)
    client = await connect()
    assert await client.ask() == (404, False)
    await one.stop()
    client.send()
    await start(other)
    assert await client.answer() == (404, False)


async def test_half_a_request_is_waited_for_and_not_given_away(pair, connect):
    one, other, start = pair
    await start(one)
    client = await connect()
    client.writer.write(b"GET /healthz HT")
    await start(other)
    ending = asyncio.create_task(one.stop())
    await asyncio.sleep(1.3)  # more than the time that idle connections have
    assert not ending.done()
    client.writer.write(b"TP/1.1\r\nHost: x\r\n\r\n")
    assert await client.answer() == (200, True)
    await ending


async def test_without_another_worker_idle_connections_are_closed_in_the_end(worker, connect):
    await worker.start(drain_seconds=20.0)
    client = await connect()
    assert await client.ask() == (404, False)
    worker.begin_stop()
    assert await asyncio.wait_for(client.reader.read(), 10) == b""


async def test_a_stream_that_ends_while_its_worker_drains_leaves_the_connection(
    worker, connect, model
):
    """Its head did not say that the connection would end, so the client asks again on it."""
    worker.model.behave = model.streaming(
        model.chunk(), model.chunk("hello"), 0.5, model.LAST, model.DONE
    )
    await worker.start(worker.plan(contract=model.language), drain_seconds=20.0)
    client = await connect()
    asked = b'{"model":"digits","stream":true,"messages":[{"role":"user","content":"hi"}]}'
    client.send(asked, "/v1/chat/completions")
    head = await asyncio.wait_for(client.reader.readuntil(b"hello"), 10)
    assert b"connection: close" not in head
    worker.begin_stop()
    await asyncio.wait_for(client.reader.readuntil(b"[DONE]\n\n\r\n0\r\n\r\n"), 10)
    assert await client.ask() == (404, True)


async def test_connections_that_are_never_secured_are_bounded(worker):
    files = Tls(certificate=CERTIFICATES / "first.pem", key=CERTIFICATES / "first.key")
    await worker.start(tls=files, max_connections=3)
    opened = [await asyncio.open_connection("127.0.0.1", worker.port) for _ in range(6)]
    ends = [asyncio.ensure_future(reader.read()) for reader, _ in opened]
    done, _ = await asyncio.wait(ends, timeout=1.0)
    assert len(done) == 2  # one beyond the limit is let in, to be told so
    for (_, writer), end in zip(opened, ends, strict=True):
        writer.close()
        end.cancel()
    await asyncio.gather(*ends, return_exceptions=True)


async def test_a_connection_that_is_being_secured_is_waited_for(worker, connect):
    files = Tls(certificate=CERTIFICATES / "first.pem", key=CERTIFICATES / "first.key")
    await worker.start(tls=files, drain_seconds=20.0)
    client = await connect()
    await asyncio.sleep(0.1)  # it is accepted
    worker.begin_stop()
    await asyncio.sleep(0.1)
    context = ssl.create_default_context(cafile=CERTIFICATES / "first.pem")
    await client.writer.start_tls(context, server_hostname="localhost")
    assert await client.ask() == (404, True)


async def test_a_key_that_is_revoked_while_a_worker_drains_opens_nothing_more(worker, connect):
    """Its clients have kept connections, which they may use once more."""
    await worker.start(drain_seconds=20.0)
    clients = [await connect() for _ in range(15)]
    assert {await one.ask() for one in clients} == {(404, False)}
    fresh = iter(clients)
    worker.begin_stop()
    assert (await next(fresh).ask())[0] == 404
    worker.publish(keys={})
    while await next(fresh).ask() != (401, True):  # noqa: ASYNC110  # the file is looked at
        await asyncio.sleep(0.05)
