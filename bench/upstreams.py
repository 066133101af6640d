"""The model servers that `bench/gateway.py` puts behind every gateway: as fast as it gets.

nginx gives the same chat completion to whoever asks; it costs a gateway nothing to wait for. It
can't pace events, so streams come from a process of ours.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import shutil
import socket
import subprocess
import time
from collections.abc import Generator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import httptools
import msgspec
import uvloop

COMPLETION = msgspec.json.encode(
    {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "created": 1,
        "model": "m",
        "choices": [
            {
                "index": 0,
                "message": {
                    "role": "assistant",
                    "content": "Two years, and you can extend it to five within the first one.",
                },
                "logprobs": None,
                "finish_reason": "stop",
            }
        ],
        "usage": {"prompt_tokens": 20, "completion_tokens": 16, "total_tokens": 36},
    }
)
INFERENCE = msgspec.json.encode(
    {
        "model_name": "digits",
        "model_version": "1",
        "outputs": [{"name": "label", "datatype": "INT64", "shape": [1], "data": [3]}],
    }
)
INFER_PATH = "/v2/models/digits/infer"

HOLD = "hold"
"""The `user` of a request whose stream says one word and then nothing more."""
_PAUSE = 0.005  # seconds between the events of any other stream
_WORDS = ("Two", " years", ",", " kettle", "s", " too", ".")

_NGINX = """\
daemon off;
worker_processes 1;
pid {folder}/nginx.pid;
error_log {folder}/error.log;
events {{ worker_connections 8192; }}
http {{
    access_log off;
    default_type application/json;
    keepalive_timeout 1h;
    keepalive_requests 1000000000;
    client_body_buffer_size 64k;
    client_body_temp_path {folder}/bodies;
    proxy_temp_path {folder}/proxy;
    fastcgi_temp_path {folder}/fastcgi;
    uwsgi_temp_path {folder}/uwsgi;
    scgi_temp_path {folder}/scgi;
    server {{
        listen 127.0.0.1:{port} backlog=1024;
        location / {{ return 200 '{completion}'; }}
        location = {infer_path} {{ return 200 '{inference}'; }}
    }}
}}
"""


class Unusable(Exception):
    """Something can't be measured, or measured with; the text says why and what to do."""


def free_port() -> int:
    """A port that nobody listens on just now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def listening(port: int) -> bool:
    """Whether somebody accepts connections there."""
    with socket.socket() as probe:
        probe.settimeout(1.0)
        return probe.connect_ex(("127.0.0.1", port)) == 0


@contextmanager
def nginx(folder: Path) -> Generator[int]:
    """An nginx with one worker process that answers everything at once; its port."""
    binary = shutil.which("nginx", path="/usr/sbin:/usr/local/sbin:/usr/bin:/usr/local/bin")
    if binary is None:
        raise Unusable("nginx is not installed; install it with 'apt-get install nginx-light'")
    folder.mkdir()
    port = free_port()
    (folder / "nginx.conf").write_text(
        _NGINX.format(
            folder=folder,
            port=port,
            completion=COMPLETION.decode(),
            infer_path=INFER_PATH,
            inference=INFERENCE.decode(),
        )
    )
    with (folder / "log").open("wb") as log:
        server = subprocess.Popen(
            [binary, "-c", str(folder / "nginx.conf"), "-p", str(folder)],
            stdout=log,
            stderr=subprocess.STDOUT,
        )
    try:
        deadline = time.monotonic() + 10.0
        while not listening(port):
            if server.poll() is not None or time.monotonic() > deadline:
                raise Unusable("nginx does not start: " + (folder / "log").read_text())
            time.sleep(0.01)
        yield port
    finally:
        server.terminate()
        server.wait(10.0)


@contextmanager
def streaming() -> Generator[int]:
    """A process that streams chat completions word by word; its port."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    server = context.Process(target=_serve, args=(there,), daemon=True)
    server.start()
    try:
        yield here.recv()
    finally:
        server.terminate()
        server.join()


def _serve(pipe: Connection) -> None:
    async def main() -> None:
        loop = asyncio.get_running_loop()
        server = await loop.create_server(_Streams, "127.0.0.1", 0, backlog=2048)
        pipe.send(server.sockets[0].getsockname()[1])
        await server.serve_forever()

    uvloop.run(main())


def _event(delta: dict[str, str], finish: str | None = None) -> bytes:
    chunk = {
        "id": "chatcmpl-1",
        "object": "chat.completion.chunk",
        "created": 1,
        "model": "m",
        "choices": [{"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}],
    }
    data = b"data: " + msgspec.json.encode(chunk) + b"\n\n"
    return b"%x\r\n%s\r\n" % (len(data), data)


_HEAD = (
    b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream; charset=utf-8\r\n"
    b"Cache-Control: no-cache\r\nTransfer-Encoding: chunked\r\n\r\n"
    + _event({"role": "assistant", "content": ""})
)
_EVENTS = [_event({"content": word}) for word in _WORDS]
_DONE = b"data: [DONE]\n\n"
_END = _event({}, "stop") + b"%x\r\n%s\r\n0\r\n\r\n" % (len(_DONE), _DONE)
_WHOLE = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%s" % (
    len(COMPLETION),
    COMPLETION,
)


class _Streams(asyncio.Protocol):
    """Streams to whoever asks for a stream, and answers anything else as nginx does."""

    def connection_made(self, transport: Any) -> None:
        self.transport = transport
        self.parser = httptools.HttpRequestParser(self)
        self.body: list[bytes] = []

    def data_received(self, data: bytes) -> None:
        self.parser.feed_data(data)

    def on_message_begin(self) -> None:
        self.body.clear()

    def on_body(self, body: bytes) -> None:
        self.body.append(body)

    def on_message_complete(self) -> None:
        asked = msgspec.json.decode(b"".join(self.body)) if self.body else {}
        if not asked.get("stream"):
            self.transport.write(_WHOLE)
            return
        self.transport.write(_HEAD)
        hold = asked.get("user") == HOLD
        asyncio.get_running_loop().call_later(_PAUSE, self._go_on, 0, 1 if hold else len(_EVENTS))

    def _go_on(self, number: int, until: int) -> None:
        """Say a word, and the next one after a pause; having said `until` of all, fall silent."""
        if self.transport.is_closing():
            return
        if number == len(_EVENTS):
            self.transport.write(_END)
            return
        self.transport.write(_EVENTS[number])
        if number + 1 < until or until == len(_EVENTS):
            asyncio.get_running_loop().call_later(_PAUSE, self._go_on, number + 1, until)
