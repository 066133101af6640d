"""Clients that mean no good, or do not know better."""

import asyncio
import contextlib
import errno
import resource
import socket
import time

import msgspec
import pytest

from shipworthy.domain.records import Outcome
from shipworthy.gateway import GatewayOptions, server
from shipworthy.gateway.connection import Connections
from shipworthy.gateway.server import _with_descriptors


def head(worker, *lines: str, path: str = "/v2/models/digits/infer", method: str = "POST") -> bytes:
    every = (
        f"{method} {path} HTTP/1.1", "host: x",
        f"authorization: Bearer {worker.keys['client']}", *lines,
    )  # fmt: skip
    return "\r\n".join(every).encode() + b"\r\n\r\n"


def status_of(answer: bytes) -> int:
    return int(answer.split(b" ", 2)[1])


def error_of(answer: bytes) -> str:
    return msgspec.json.decode(answer.partition(b"\r\n\r\n")[2])["error"]


# --- bodies -----------------------------------------------------------------------------------


async def test_an_announced_body_that_is_too_large_is_not_read(worker):
    await worker.start(max_body=1000)
    answer = await worker.raw(head(worker, "content-length: 104857600"))
    assert status_of(answer) == 413
    assert error_of(answer) == "the body is larger than 1000 bytes; send smaller batches"
    assert b"connection: close" in answer
    record = worker.journal.last
    assert (record.outcome, record.reason) == (Outcome.CLIENT_FAULT, "too_large")


async def test_a_hundred_megabytes_in_chunks_are_not_read_to_the_end(worker):
    await worker.start(max_body=100_000)

    def pour() -> tuple[int, bytes]:
        chunk = (b"10000\r\n" + b"x" * 0x10000 + b"\r\n") * 16
        sent = 0
        with socket.create_connection(("127.0.0.1", worker.port), timeout=5) as client:
            with contextlib.suppress(ConnectionError):
                client.sendall(head(worker, "transfer-encoding: chunked"))
                while sent < 100 * 1024 * 1024:
                    client.sendall(chunk)
                    sent += len(chunk)
            return sent, client.recv(1000)

    sent, answer = await asyncio.to_thread(pour)
    assert sent < 50 * 1024 * 1024
    assert status_of(answer) == 413
    assert worker.journal.last.reason == "too_large"


async def test_a_polite_client_reads_the_413_while_it_is_still_sending(worker):
    await worker.start(max_body=1000)
    reply = await worker.infer(body=b" " * 1_000_000)
    assert reply.status == 413


async def test_a_client_that_asks_first_sends_no_body_at_all(worker):
    await worker.start(max_body=1000)
    lines = ("content-length: 5000", "expect: 100-continue")
    answer = await worker.raw(head(worker, *lines))
    assert status_of(answer) == 413
    assert b"100 Continue" not in answer


async def test_a_client_that_asks_first_is_told_to_go_on(worker, model):
    await worker.start()
    body = msgspec.json.encode(model.request_of())
    reader, writer = await asyncio.open_connection("127.0.0.1", worker.port)
    lines = (f"content-length: {len(body)}", "expect: 100-continue", "connection: close")
    writer.write(head(worker, *lines))
    assert await reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
    writer.write(body)
    assert status_of(await reader.read()) == 200
    writer.close()


async def test_a_chunked_body_is_fine(worker, model):
    await worker.start()
    body = msgspec.json.encode(model.request_of())
    parts = b"".join(b"%x\r\n%s\r\n" % (len(p), p) for p in (body[:10], body[10:]))
    lines = ("transfer-encoding: chunked", "connection: close")
    assert status_of(await worker.raw(head(worker, *lines) + parts + b"0\r\n\r\n")) == 200


async def test_a_body_that_never_ends_is_given_up(worker):
    await worker.start(body_seconds=0.1)
    answer = await worker.raw(head(worker, "content-length: 100") + b"{")
    assert status_of(answer) == 408
    assert "did not arrive within 0.1 seconds" in error_of(answer)
    assert worker.journal.last.reason == "body_timeout"


async def test_a_client_that_leaves_within_its_body_is_censored(worker):
    await worker.start()
    _, writer = await asyncio.open_connection("127.0.0.1", worker.port)
    writer.write(head(worker, "content-length: 100") + b"{")
    await writer.drain()
    await asyncio.sleep(0.05)
    writer.close()
    await worker.until(lambda: bool(worker.journal.calls))
    assert worker.journal.last.outcome is Outcome.CENSORED


async def test_all_bodies_together_are_bounded(worker):
    await worker.start(max_buffered=1000)
    reply = await worker.infer(body=b" " * 2000)
    assert (reply.status, reply.headers["retry-after"]) == (503, "1")
    assert worker.journal.last.reason == "full_gateway"
    assert (await worker.infer()).status == 200  # and what was counted was given back


async def test_a_body_for_a_door_that_takes_none_ends_the_connection(worker):
    await worker.start()
    line = "content-length: 100000000"
    answer = await worker.raw(head(worker, line, path="/nothing"))
    assert (status_of(answer), b"connection: close" in answer) == (404, True)


# --- heads ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "status"),
    [
        (b"GET / HTTP/1.1\r\nhost: x\r\n" + b"a: " + b"b" * 100_000, 431),
        (b"GET / HTTP/1.1\r\nhost: x\r\n" + b"a: " + b"b" * 40_000 + b"\r\n\r\n", 431),
        (b"GET / HTTP/1.1\r\n" + b"a: b\r\n" * 100 + b"\r\n", 431),
        (b"GET / HTTP/1.1\r\n" + b"".join(b"a%d: b\r\n" % n for n in range(5000)), 431),
        (b"GET /" + b"a" * 20_000 + b" HTTP/1.1\r\n\r\n", 414),
        (b"GET /" + b"a" * 200_000, 414),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", 400),
        (b"HELLO\r\n\r\n", 400),
        (b"GET / HTTP/9.9\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nbad header\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\na: b\x00c\r\n\r\n", 400),
        (b"POST / HTTP/1.1\r\ncontent-length: -1\r\n\r\n", 400),
        (b"POST / HTTP/1.1\r\ncontent-length: 5\r\ncontent-length: 6\r\n\r\nhello", 400),
        (
            b"POST / HTTP/1.1\r\ncontent-length: 5\r\ntransfer-encoding: chunked\r\n\r\n", 400,
        ),
        (b"POST / HTTP/1.1\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n", 401),  # by its head
        (b"GET /\xff\xfe HTTP/1.1\r\n\r\n", 400),
        (b"GET http:// HTTP/1.1\r\n\r\n", 400),
        (b"GET %zz HTTP/1.1\r\n\r\n", 400),
    ],
)  # fmt: skip
async def test_what_is_no_decent_request_gets_an_answer_and_the_door(
    worker, caplog, content, status
):
    await worker.start()
    answer = await worker.raw(content)
    assert status_of(answer) == status
    assert b"application/json" in answer
    assert error_of(answer)
    assert "Traceback" not in caplog.text + answer.decode("latin-1")
    assert (await worker.infer()).status == 200


async def test_percent_encoded_nonsense_in_a_path_is_not_found(worker):
    await worker.start()
    answer = await worker.raw(
        head(worker, "connection: close", path="/v2/models/%ff%fe%00", method="GET")
    )
    assert status_of(answer) == 403 or status_of(answer) == 404
    assert b"Traceback" not in answer


async def test_a_slow_head_is_given_up(worker):
    await worker.start(head_seconds=0.15)
    reader, writer = await asyncio.open_connection("127.0.0.1", worker.port)
    began = time.monotonic()

    async def drip() -> None:
        for byte in b"GET /healthz HTTP/1.1\r\na: " + b"b" * 1000:
            writer.write(bytes([byte]))
            await asyncio.sleep(0.01)

    dripping = asyncio.create_task(drip())
    answer = await asyncio.wait_for(reader.read(), 3)
    assert status_of(answer) == 408
    assert time.monotonic() - began < 1
    dripping.cancel()
    writer.close()


async def test_a_slow_head_on_a_kept_connection_is_given_up_too(worker):
    await worker.start(head_seconds=0.15)
    reader, writer = await asyncio.open_connection("127.0.0.1", worker.port)
    writer.write(b"GET /healthz HTTP/1.1\r\n\r\n")
    assert status_of(await reader.readuntil(b"}")) == 200
    await asyncio.sleep(0.2)  # idle is no crime
    writer.write(b"GET /hea")
    assert status_of(await asyncio.wait_for(reader.read(), 3)) == 408
    writer.close()


async def test_a_connection_that_says_nothing_is_closed(worker):
    await worker.start(head_seconds=0.1)
    assert await worker.raw(b"") == b""


async def test_an_idle_connection_is_closed(worker):
    await worker.start(keep_alive_seconds=0.1)
    answer = await worker.raw(b"GET /healthz HTTP/1.1\r\n\r\n")
    assert status_of(answer) == 200


async def test_connections_are_bounded(worker):
    await worker.start(max_connections=3)
    held = [await asyncio.open_connection("127.0.0.1", worker.port) for _ in range(3)]
    answer = await worker.raw(b"GET /healthz HTTP/1.1\r\n\r\n")
    assert status_of(answer) == 503
    assert b"retry-after: 1" in answer
    for _, writer in held:
        writer.close()
        await writer.wait_closed()
    await asyncio.sleep(0.05)
    assert (await worker.ask("GET", "/healthz", key=None)).status == 200


async def test_requests_in_one_piece_are_answered_in_order(worker):
    await worker.start()
    asked = b"".join(
        b"GET %s HTTP/1.1\r\n%s\r\n" % (path, extra)
        for path, extra in (
            (b"/healthz", b""),
            (b"/readyz", b""),
            (b"/no", b"connection: close\r\n"),
        )
    )
    answer = (await worker.raw(asked)).decode()
    assert [line.split()[1] for line in answer.splitlines() if "HTTP/1.1" in line] == [
        "200", "200", "401",
    ]  # fmt: skip


async def test_a_pipelining_client_that_leaves_is_noticed(worker, model, caplog):
    worker.model.behave = model.hanging
    await worker.start()
    body = msgspec.json.encode(model.request_of())
    one = head(worker, f"content-length: {len(body)}") + body
    _, writer = await asyncio.open_connection("127.0.0.1", worker.port)
    writer.write(one * 2)
    await worker.until(lambda: worker.model.open == 1)
    writer.close()
    await worker.until(lambda: bool(worker.journal.calls))
    assert worker.journal.last.reason == "client_gone"
    assert "Exception" not in caplog.text


@pytest.mark.parametrize("upgrade", ["websocket", "h2c"])
async def test_an_upgrade_is_not_taken(worker, upgrade):
    await worker.start()
    answer = await worker.raw(
        f"GET /healthz HTTP/1.1\r\nconnection: upgrade\r\nupgrade: {upgrade}\r\n\r\n".encode()
    )
    assert status_of(answer) == 200
    assert b"connection: close" in answer


async def test_an_old_client_gets_its_answer_and_the_door(worker):
    await worker.start()
    answer = await worker.raw(b"GET /healthz HTTP/1.0\r\n\r\n")
    assert status_of(answer) == 200
    assert answer.endswith(b'{"live":true}')


async def test_bad_connections_are_counted(worker):
    await worker.start()
    await worker.raw(b"nonsense\r\n\r\n")
    count = await worker.metric('shipworthy_gateway_bad_connections_total{why="not_http"}')
    assert count == 1


# --- upgrades ---------------------------------------------------------------------------------

H2C = ("upgrade: h2c", "http2-settings: AAMAAABk", "connection: Upgrade, HTTP2-Settings")


@pytest.mark.parametrize("pieces", [1, 7])
@pytest.mark.parametrize("chunked", [False, True])
async def test_an_offer_of_http2_is_ignored_and_the_body_read(worker, model, pieces, chunked):
    """What Java's client sends with its first request on a connection."""
    await worker.start()
    body = msgspec.json.encode(model.request_of())
    if chunked:
        framing, sent = "transfer-encoding: chunked", b"%x\r\n%s\r\n0\r\n\r\n" % (len(body), body)
    else:
        framing, sent = f"content-length: {len(body)}", body
    content = head(worker, *H2C, framing) + sent
    reader, writer = await asyncio.open_connection("127.0.0.1", worker.port)
    size = -(-len(content) // pieces)
    for start in range(0, len(content), size):
        writer.write(content[start : start + size])
        await asyncio.sleep(0.01)
    async with asyncio.timeout(3):
        answer = await reader.read()
    writer.close()
    assert status_of(answer) == 200
    assert b"connection: close" in answer
    assert worker.journal.last.request_bytes == len(body)


async def test_an_upgrade_with_a_broken_body_is_refused(worker):
    await worker.start()
    broken = head(worker, *H2C, "transfer-encoding: chunked") + b"zz\r\n"
    assert status_of(await worker.raw(broken)) == 400


async def test_an_upgrade_without_a_body_is_answered(worker):
    await worker.start()
    answer = await worker.raw(head(worker, *H2C, path="/healthz", method="GET"))
    assert status_of(answer) == 200


# --- descriptors ------------------------------------------------------------------------------


async def test_a_lack_of_descriptors_is_not_the_models_failure(worker, monkeypatch):
    """As it were if clients held all of them."""
    await worker.start()
    loop = asyncio.get_running_loop()
    connect = loop.create_connection

    async def refuse(factory, host, port, **options):
        if worker.model.url.endswith(f":{port}"):
            raise OSError(errno.EMFILE, "Too many open files")
        return await connect(factory, host, port, **options)

    with monkeypatch.context() as patch:
        patch.setattr("shipworthy.gateway.wire.connect", refuse)
        replies = [await worker.infer() for _ in range(6)]
    assert {(reply.status, reply.headers["retry-after"]) for reply in replies} == {(503, "1")}
    assert worker.journal.last.outcome is Outcome.CENSORED
    assert (await worker.infer()).status == 200
    assert await worker.metric("shipworthy_gateway_ejections_total") == 0


def test_a_worker_serves_no_more_connections_than_it_has_descriptors_for(monkeypatch, caplog):
    limits = [(1024, 1024)]
    monkeypatch.setattr(resource, "getrlimit", lambda _: limits[-1])
    monkeypatch.setattr(resource, "setrlimit", lambda _, both: limits.append(both))
    assert _with_descriptors(GatewayOptions(max_connections=1024)).max_connections == 240
    assert "ulimit -n" in caplog.text
    limits.append((1024, 1_000_000))
    assert _with_descriptors(GatewayOptions(max_connections=1024)).max_connections == 1024
    assert limits[-1][0] >= 4096


async def test_trace_headers_that_come_twice_are_taken_together(worker, model):
    """Two parents are none; states in pieces are one."""
    await worker.start()
    body = msgspec.json.encode(model.request_of())
    parent = "traceparent: 00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    lines = (f"content-length: {len(body)}", "connection: close", parent)
    answer = await worker.raw(head(worker, *lines, "tracestate: a=1", "tracestate: b=2") + body)
    assert status_of(answer) == 200
    assert worker.model.received[-1].headers["tracestate"] == "a=1,b=2"
    await worker.raw(head(worker, *lines, parent) + body)
    assert "traceparent" not in worker.model.received[-1].headers


# --- requests sent ahead ----------------------------------------------------------------------


@pytest.fixture
def connections(monkeypatch):
    """What the worker's connections share, in a list once it is started."""
    made = []

    class Seen(Connections):
        def __init__(self, *args):
            super().__init__(*args)
            made.append(self)

    monkeypatch.setattr(server, "Connections", Seen)
    return made


def whole(worker, body: bytes) -> bytes:
    return head(worker, f"content-length: {len(body)}") + body


async def test_nothing_is_left_of_a_request_with_garbage_behind_it(worker, model, connections):
    await worker.start()
    body = msgspec.json.encode(model.request_of())
    answer = await worker.raw(whole(worker, body) + b"\x00garbage\r\n\r\n")
    assert status_of(answer) == 400
    await worker.until(lambda: not connections[0].tasks)
    assert connections[0].memory.held == 0
    assert worker.journal.last.outcome is Outcome.CENSORED


async def test_a_body_is_given_back_once_when_the_next_request_is_cut_short(
    worker, model, connections
):
    worker.model.behave = model.hanging
    await worker.start()
    body = msgspec.json.encode(model.request_of())
    _, writer = await asyncio.open_connection("127.0.0.1", worker.port)
    writer.write(whole(worker, body) + b"POST /v2")
    await worker.until(lambda: bool(worker.model.received))
    assert connections[0].memory.held == len(body)
    writer.close()
    await worker.until(lambda: not connections[0].tasks)
    assert connections[0].memory.held == 0


async def test_a_request_in_line_that_is_refused_by_its_head_is_answered_once(
    worker, model, connections, caplog
):
    async def slow(writer):
        await asyncio.sleep(0.1)
        await model.responding(model.answer_of())(writer)

    worker.model.behave = slow
    await worker.start(max_body=150_000)
    unknown = b"POST /v2/models/digits/infer HTTP/1.1\r\ntransfer-encoding: chunked\r\n\r\n"
    endless = unknown + 4 * (b"10000\r\n" + b"x" * 0x10000 + b"\r\n")
    first = whole(worker, msgspec.json.encode(model.request_of()))
    answers = await worker.raw(first + endless)
    assert [status_of(each) for each in answers.split(b"HTTP/1.1")[1:]] == [200, 401]
    assert connections[0].memory.held == 0
    assert not caplog.records


async def test_what_is_sent_behind_the_last_answer_is_not_done(worker, model, caplog):
    await worker.start()
    refused = b"POST /nothing HTTP/1.1\r\ntransfer-encoding: chunked\r\n\r\n"
    refused += b"19000\r\n" + b"x" * 0x19000 + b"\r\n0\r\n\r\n"
    behind = whole(worker, msgspec.json.encode(model.request_of()))
    answers = await worker.raw(refused + behind)
    assert [status_of(each) for each in answers.split(b"HTTP/1.1")[1:]] == [401]
    assert not worker.model.received
    assert not caplog.records


async def test_a_client_that_reads_nothing_gets_no_more_until_it_does(worker, model, connections):
    worker.model.behave = model.responding(model.chat_answer("x" * 4_000_000))
    await worker.start(worker.plan(contract=model.language))
    body = msgspec.json.encode(model.chat_of())
    lines = f"content-length: {len(body)}"
    asked = head(worker, lines, path="/v1/chat/completions") + body
    reader, writer = await asyncio.open_connection("127.0.0.1", worker.port, limit=1000)
    for _ in range(20):
        writer.write(asked)
        await asyncio.sleep(0.01)
    await worker.until(lambda: any(one.paused for one in connections[0].open))
    before = len(worker.model.received)
    await asyncio.sleep(0.2)
    assert len(worker.model.received) <= before + 1 < 20
    writer.write(head(worker, path="/healthz", method="GET"))
    async with asyncio.timeout(20):
        for _ in range(20):
            answer = await reader.readuntil(b"content-length: ")
            size = int(await reader.readline())
            while await reader.readline() != b"\r\n":
                pass
            await reader.readexactly(size)
            assert status_of(answer) == 200
        assert status_of(await reader.readuntil(b"\r\n")) == 200
    writer.close()


async def test_an_idle_connection_holds_no_body(worker, model, connections):
    await worker.start()
    body = msgspec.json.encode(model.request_of()) + b" " * 500_000
    assert (await worker.infer(body=body)).status == 200
    assert [one._parts for one in connections[0].open] == [[]]
