"""Model servers that say who they are, so that `bench/churn.py` sees where a request has been.

An answer names the release that was asked for, the server's own number and the request's, in the
tensors of the Open Inference Protocol or in the words of a chat.
"""

from __future__ import annotations

import asyncio
import multiprocessing
from collections.abc import Generator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from typing import Any

import httptools
import msgspec
import uvloop

from shipworthy.domain.contract import Contract, Tensor

TENSORS = Contract(
    inputs=(Tensor("number", "INT64", (-1,)),),
    outputs=(Tensor("said", "INT64", (-1, 3)),),
    side_effects="none",
)
CHAT = Contract(protocol="openai", operations=("chat",), side_effects="none")

LONG = 150
"""One request in so many is a long one: a worker that ends has to wait for it."""
_PAUSE, _LONG_PAUSE = 0.004, 0.25  # seconds before each piece of an answer
_PIECES = 4


@contextmanager
def echoing(count: int) -> Generator[list[int]]:
    """So many servers in a process of their own; their ports."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=_serve, args=(there, count), daemon=True)
    process.start()
    try:
        yield here.recv()
    finally:
        process.terminate()
        process.join()


def _serve(pipe: Connection, count: int) -> None:
    async def main() -> None:
        loop = asyncio.get_running_loop()
        servers = [
            await loop.create_server(lambda place=place: _Echo(place), "127.0.0.1", 0, backlog=1024)
            for place in range(count)
        ]
        pipe.send([server.sockets[0].getsockname()[1] for server in servers])
        await asyncio.Event().wait()

    uvloop.run(main())


class _Echo(asyncio.Protocol):
    """A connection to one of them."""

    def __init__(self, place: int) -> None:
        self.place = place
        self.url, self.body = b"", b""

    def connection_made(self, transport: Any) -> None:
        self.transport = transport
        self.parser = httptools.HttpRequestParser(self)

    def data_received(self, data: bytes) -> None:
        self.parser.feed_data(data)

    def on_message_begin(self) -> None:
        self.url, self.body = b"", b""

    def on_url(self, url: bytes) -> None:
        self.url += url

    def on_body(self, body: bytes) -> None:
        self.body += body

    def on_message_complete(self) -> None:
        if not self.body:
            self.write(_whole({}))
        elif self.url.endswith(b"/infer"):
            self.infer(self.url.split(b"/")[-2].decode())
        else:
            self.chat(msgspec.json.decode(self.body))

    def infer(self, served: str) -> None:
        number = msgspec.json.decode(self.body)["inputs"][0]["data"][0]
        said = [int(served.rpartition("-")[2]), self.place, number]
        tensor = {"name": "said", "datatype": "INT64", "shape": [1, 3], "data": said}
        answer = _whole({"model_name": served, "model_version": "1", "outputs": [tensor]})
        self.later(_pause(number), answer)

    def chat(self, asked: Any) -> None:
        number, version = int(asked["messages"][-1]["content"]), asked["model"].rpartition("-")[2]
        words = [f"{version} ", f"{self.place} ", f"{number}"]
        shown = {"id": "chatcmpl-1", "created": 1, "model": asked["model"]}
        if asked.get("stream"):
            self.begin(number, shown, words)
            return
        message = {"role": "assistant", "content": "".join(words)}
        choices = [{"index": 0, "message": message, "finish_reason": "stop"}]
        usage = {"prompt_tokens": 5, "completion_tokens": 3, "total_tokens": 8}
        answer = _whole(shown | {"object": "chat.completion", "choices": choices, "usage": usage})
        self.later(_pause(number), answer)

    def begin(self, number: int, shown: dict[str, Any], words: list[str]) -> None:
        """Say it word by word."""
        pause, shown = _pause(number), shown | {"object": "chat.completion.chunk"}
        self.write(
            b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n"
            b"transfer-encoding: chunked\r\n\r\n" + _event(shown, {"role": "assistant"}, None)
        )
        for place, word in enumerate(words, 1):
            self.later(place * pause, _event(shown, {"content": word}, None))
        done = b"data: [DONE]\n\n"
        end = _event(shown, {}, "stop") + b"%x\r\n%s\r\n0\r\n\r\n" % (len(done), done)
        self.later(_PIECES * pause, end)

    def later(self, seconds: float, answer: bytes) -> None:
        asyncio.get_running_loop().call_later(seconds, self.write, answer)

    def write(self, answer: bytes) -> None:
        if not self.transport.is_closing():
            self.transport.write(answer)


def _pause(number: int) -> float:
    return _PAUSE if number % LONG else _LONG_PAUSE


def _whole(document: dict[str, Any]) -> bytes:
    body = msgspec.json.encode(document)
    return b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n%s" % (
        len(body),
        body,
    )


def _event(shown: dict[str, Any], delta: dict[str, str], finish: str | None) -> bytes:
    choices = [{"index": 0, "delta": delta, "finish_reason": finish}]
    data = b"data: %s\n\n" % msgspec.json.encode(shown | {"choices": choices})
    return b"%x\r\n%s\r\n" % (len(data), data)
