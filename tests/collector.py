"""An OpenTelemetry collector for tests, over real HTTP, that can misbehave."""

import gzip
import threading
from collections.abc import Generator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span as SentSpan


class FakeCollector(ThreadingHTTPServer):
    """Keeps what it takes. Answers with `status` and `reply`, and not while `hang` is cleared."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.requests: list[ExportTraceServiceRequest] = []
        self.headers: list[dict[str, str]] = []
        self.paths: list[str] = []
        self.status = 200
        self.reply: dict[str, str] = {}
        self.hang = threading.Event()
        self.hang.set()

    @property
    def spans(self) -> list[SentSpan]:
        return [
            span
            for request in list(self.requests)
            for resource in request.resource_spans
            for scope in resource.scope_spans
            for span in scope.spans
        ]

    def handle_error(self, request, client_address) -> None:
        """A client that gave up is what some tests are about."""


class _Handler(BaseHTTPRequestHandler):
    server: FakeCollector  # type: ignore[reportIncompatibleVariableOverride]
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        if self.headers.get("content-encoding") == "gzip":
            body = gzip.decompress(body)
        message = ExportTraceServiceRequest.FromString(body)
        self.server.headers.append({k.lower(): v for k, v in self.headers.items()})
        self.server.paths.append(self.path)
        self.server.hang.wait(60)
        if self.server.status == 200:
            self.server.requests.append(message)
        self.send_response(self.server.status)
        for name, value in self.server.reply.items():
            self.send_header(name, value)
        self.send_header("content-length", "0")
        self.end_headers()

    def log_message(self, format, *args) -> None:  # noqa: A002  # its name there
        """Say nothing."""


@contextmanager
def fake_collector() -> Generator[FakeCollector]:
    server = FakeCollector()
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield server
    finally:
        server.hang.set()
        server.shutdown()
        thread.join()
        server.server_close()


def attributes(span: SentSpan) -> dict[str, Any]:
    found = {}
    for one in span.attributes:
        kind = one.value.WhichOneof("value") or ""
        value = getattr(one.value, kind)
        if kind == "array_value":
            value = [part.string_value for part in value.values]
        found[one.key] = value
    return found
