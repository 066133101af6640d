"""A mock of an OpenAI server and one of MLflow's scoring server: ours, on real HTTP, no models.

They keep to what vLLM and `mlflow models serve` say on the wire: lists of models with LoRA adapters
under names of their own, streams of chunks with usage at the end when it is asked for, errors in
their shapes. What is answered is told from the request alone, so that a test can tell what came.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

MODELS = {"org/chat-7b": None, "sql-lora": "org/chat-7b"}
USAGE = {"prompt_tokens": 20, "completion_tokens": 4, "total_tokens": 24}
BAD_PROMPT = "You are broken."


@dataclass
class Mock:
    """A running server, and what it was asked."""

    url: str
    received: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])
    headers: list[dict[str, str]] = field(default_factory=list[dict[str, str]])

    def asked(self, **fields: Any) -> list[dict[str, Any]]:
        """The requests that say so."""
        wanted = fields.items()
        return [one for one in list(self.received) if all(one.get(k) == v for k, v in wanted)]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    mock: Mock

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002  # its signature
        """Keep quiet."""

    def say(self, status: int, body: Any, kind: str = "application/json") -> None:
        content = body.encode() if isinstance(body, str) else json.dumps(body).encode()
        self.send_response(status)
        self.send_header("content-type", kind)
        self.send_header("content-length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def read(self) -> dict[str, Any]:
        said = json.loads(self.rfile.read(int(self.headers["content-length"])))
        self.mock.headers.append({name.lower(): value for name, value in self.headers.items()})
        self.mock.received.append(said)
        return said


class _OpenAI(_Handler):
    key = ""
    lists: Any = None

    def allowed(self) -> bool:
        if self.key and self.headers.get("authorization") != f"Bearer {self.key}":
            self.say(401, {"error": {"message": "Unauthorized", "type": "invalid_request_error"}})
            return False
        return True

    def do_GET(self) -> None:
        if not self.allowed():
            return None
        if self.path != "/v1/models":
            return self.say(404, {"detail": "Not Found"})
        if self.lists is not None:
            return self.say(200, self.lists)
        data = [
            {"id": name, "object": "model", "owned_by": "vllm", "root": name, "parent": parent}
            for name, parent in MODELS.items()
        ]
        return self.say(200, {"object": "list", "data": data})

    def do_POST(self) -> None:
        said = self.read()
        if not self.allowed():
            return None
        if said.get("model") not in MODELS:
            return self.refuse(404, f"The model `{said.get('model')}` does not exist.")
        if self.path != "/v1/chat/completions":
            return self.refuse(404, "This model does not do that.")
        texts = [one["content"] for one in said["messages"]]
        if BAD_PROMPT in texts:
            return self.refuse(500, "the template of this prompt fails")
        if said.get("temperature", 0) > 2:
            return self.refuse(400, "temperature must be in [0, 2]")
        words = f"{said['model']} heard: {texts[-1]}".split(" ")
        if said.get("stream"):
            return self.stream(said, words)
        message = {"role": "assistant", "content": " ".join(words)}
        choice = {"index": 0, "message": message, "finish_reason": "stop"}
        return self.say(200, self.chunk(said, "chat.completion", [choice], usage=USAGE))

    def refuse(self, status: int, why: str) -> None:
        self.say(status, {"error": {"message": why, "type": "error", "code": status}})

    def stream(self, said: dict[str, Any], words: list[str]) -> None:
        self.send_response(200)
        self.send_header("content-type", "text/event-stream; charset=utf-8")
        self.send_header("transfer-encoding", "chunked")
        self.end_headers()
        deltas: list[dict[str, Any]] = [{"role": "assistant", "content": ""}]
        deltas += [{"content": f" {word}" if at else word} for at, word in enumerate(words)]
        for delta in deltas:
            self.event(said, [{"index": 0, "delta": delta, "finish_reason": None}])
        self.event(said, [{"index": 0, "delta": {}, "finish_reason": "stop"}])
        if (said.get("stream_options") or {}).get("include_usage"):
            self.event(said, [], usage=USAGE)
        self.piece(b"data: [DONE]\n\n")
        self.wfile.write(b"0\r\n\r\n")

    def event(self, said: dict[str, Any], choices: list[Any], **more: Any) -> None:
        chunk = self.chunk(said, "chat.completion.chunk", choices, **more)
        self.piece(b"data: " + json.dumps(chunk).encode() + b"\n\n")

    def piece(self, content: bytes) -> None:
        self.wfile.write(b"%x\r\n%b\r\n" % (len(content), content))
        self.wfile.flush()

    @staticmethod
    def chunk(said: dict[str, Any], kind: str, choices: list[Any], **more: Any) -> dict[str, Any]:
        head = {"id": "chatcmpl-1", "object": kind, "created": 1, "model": said["model"]}
        return {**head, "choices": choices, **more}


class _MLflow(_Handler):
    """Scores rows of `a` and `b`, by their sum; or says something else."""

    says: Any = None

    def do_GET(self) -> None:
        answers = {"/ping": "\n", "/health": "\n", "/version": "3.1.0"}
        if self.path in answers:
            return self.say(200, answers[self.path], "application/json")
        return self.say(404, "Not Found", "text/html")

    def do_POST(self) -> None:
        said = self.read()
        split = said.get("dataframe_split") or {"columns": [], "data": []}
        table = [dict(zip(split["columns"], row, strict=True)) for row in split["data"]]
        table = said.get("dataframe_records", table)
        if self.path != "/invocations" or any(row.keys() != {"a", "b"} for row in table):
            why = "Failed to enforce schema of data"
            return self.say(400, {"error_code": "BAD_REQUEST", "message": why})
        sums = [float(row["a"]) + float(row["b"]) for row in table]
        rows = [{"sum": total, "big": "yes" if total > 1 else "no"} for total in sums]
        return self.say(200, {"predictions": rows} if self.says is None else self.says)


@contextmanager
def running(handler: type[_Handler], **settings: Any) -> Generator[Mock]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    mock = Mock(f"http://127.0.0.1:{server.server_address[1]}")
    server.RequestHandlerClass = type("Bound", (handler,), {"mock": mock, **settings})
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield mock
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def openai_server(key: str = "", lists: Any = None) -> Any:
    """A context manager that gives the `Mock`; with a key it wants it.

    `lists` is what it says in place of its models.
    """
    return running(_OpenAI, key=key, lists=lists)


def mlflow_server(says: Any = None) -> Any:
    """The same, scoring for MLflow; it may say something else than scores."""
    return running(_MLflow, says=says)
