"""Spans on their way to a collector: a real one over HTTP, good and bad, and in nobody's way."""

import logging
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from opentelemetry.proto.trace.v1.trace_pb2 import Span as SentSpan
from opentelemetry.proto.trace.v1.trace_pb2 import Status
from tests.collector import FakeCollector, attributes, fake_collector

from shipworthy.domain.records import InferenceRecord, Outcome
from shipworthy.errors import UsageError
from shipworthy.gateway.exporter import SpanExporter, export_spans
from shipworthy.gateway.spans import Attempt, Span
from shipworthy.gateway.traces import Sampler, TraceContext

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
SENT = {b"traceparent": f"00-{TRACE}-{PARENT}-01".encode(), b"tracestate": b"foo=1"}
SAMPLER = Sampler(1.0, uniform=lambda: 0.0, bits=lambda _: 0xABC)
AT = 1_760_000_000.25


def record(**changes) -> InferenceRecord:
    fields: Any = {
        "id": "inf_1",
        "at": AT,
        "plan": "support",
        "model": "support",
        "revision": 4,
        "key": "k_secret",
        "assigned": "candidate",
        "probability": 0.1,
        "outcome": Outcome.SUCCESS,
        "status": 200,
        "release": "support:2",
        "rollout": "ro_1",
        "unit": "a pseudonym",
        "serving": "candidate",
        "serving_release": "support:2",
        "seconds": 0.5,
        "slices": {"country": "DE"},
        "request": b"what was asked",
        "response": b"what was said",
        "protocol": "openai",
        "operation": "chat",
    }
    return InferenceRecord(**fields | changes)


def until(condition: Callable[[], Any], seconds: float = 30.0) -> Any:
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.01)
    return found


@pytest.fixture
def collector() -> Iterator[FakeCollector]:
    with fake_collector() as server:
        yield server


@contextmanager
def exporting(endpoint: str, *, seconds: float = 5.0, **headers: str) -> Generator[SpanExporter]:
    exporter = export_spans(endpoint, headers, sampler=SAMPLER, worker="w1", seconds=seconds)
    try:
        yield exporter
    finally:
        if exporter._thread.is_alive():
            exporter.close(0.5)


def sent(collector: FakeCollector, *calls: tuple[Any, ...]) -> list[SentSpan]:
    """The spans that the collector has once the exporter is closed."""
    exporter = export_spans(collector.url, {}, sampler=SAMPLER, worker="w1")
    for call in calls:
        exporter.emit(*call)
    exporter.close(30.0)
    assert not any(exporter.dropped.values())
    return collector.spans


def context(**headers: bytes) -> TraceContext:
    return SAMPLER.context(SENT)


# --- what is said -------------------------------------------------------------------------------


def test_a_request_is_one_span_below_the_clients(collector) -> None:
    [span] = sent(collector, (record(), context()))
    assert span.trace_id.hex() == TRACE
    assert span.parent_span_id.hex() == PARENT
    assert span.span_id.hex() == "0000000000000abc"
    assert span.trace_state == "foo=1"
    assert span.kind == SentSpan.SPAN_KIND_SERVER
    assert span.name == "chat support"
    assert span.end_time_unix_nano == AT * 1e9
    assert span.start_time_unix_nano == (AT - 0.5) * 1e9
    assert span.status.code == Status.STATUS_CODE_UNSET


def test_a_trace_that_begins_here_has_no_parent(collector) -> None:
    [span] = sent(collector, (record(), SAMPLER.context({})))
    assert span.parent_span_id == b""
    assert span.trace_id.hex() == f"{0xABC:032x}"


def test_a_language_models_span_follows_the_conventions(collector) -> None:
    told = record(
        stream=True,
        input_tokens=11,
        output_tokens=0,
        cached_tokens=3,
        first_content_seconds=0.25,
        finish="stop,length",
        cost=0.5,
        attempt_seconds=0.4375,
        tokens_estimated=True,
    )
    [span] = sent(collector, (told, context()))
    assert attributes(span) == {
        "http.request.method": "POST",
        "http.response.status_code": 200,
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "openai",
        "gen_ai.request.model": "support",
        "gen_ai.request.stream": True,
        "gen_ai.response.model": "support:2",
        "gen_ai.response.finish_reasons": ["stop", "length"],
        "gen_ai.response.time_to_first_chunk": 0.25,
        "gen_ai.usage.input_tokens": 11,
        "gen_ai.usage.output_tokens": 0,
        "gen_ai.usage.cache_read.input_tokens": 3,
        "shipworthy.inference": "inf_1",
        "shipworthy.plan": "support",
        "shipworthy.revision": 4,
        "shipworthy.assigned": "candidate",
        "shipworthy.release": "support:2",
        "shipworthy.rollout": "ro_1",
        "shipworthy.serving": "candidate",
        "shipworthy.serving_release": "support:2",
        "shipworthy.outcome": "success",
        "shipworthy.protocol": "openai",
        "shipworthy.attempts": 1,
        "shipworthy.attempt_seconds": 0.4375,
        "shipworthy.fallback": False,
        "shipworthy.cost": 0.5,
        "shipworthy.tokens_estimated": True,
    }


@pytest.mark.parametrize(
    ("operation", "named"), [("completions", "text_completion"), ("embeddings", "embeddings")]
)
def test_operations_have_their_names_in_the_conventions(collector, operation, named) -> None:
    [span] = sent(collector, (record(operation=operation), context()))
    assert attributes(span)["gen_ai.operation.name"] == named
    assert span.name == f"{named} support"


def test_a_classical_model_is_not_generative(collector) -> None:
    [span] = sent(collector, (record(protocol="oip-v2", operation="infer"), context()))
    assert span.name == "infer support"
    assert not [name for name in attributes(span) if name.startswith("gen_ai.")]


def test_no_body_no_unit_no_slice_and_no_key_is_sent(collector) -> None:
    sent(collector, (record(), context()))
    said = collector.requests[0].SerializeToString()
    for secret in (b"what was", b"a pseudonym", b"k_secret", b"DE"):
        assert secret not in said


def test_bodies_do_not_wait_in_the_queue() -> None:
    class Deaf:
        def send(self, spans):
            return None

        def close(self): ...

    exporter = SpanExporter(Deaf(), SAMPLER)
    exporter.close()
    whole = record()
    exporter.emit(whole, context())
    import gc

    gc.collect()
    assert not [one for one in exporter._queue if b"what was asked" in one[0]]
    assert sys.getrefcount(whole) == 2


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"status": 502, "outcome": Outcome.FAILURE, "reason": "broken"}, "broken"),
        ({"status": 500, "reason": ""}, "500"),
        ({"outcome": Outcome.FAILURE, "reason": "error_event"}, "error_event"),
        ({"outcome": Outcome.FAILURE, "reason": "timeout", "serving": "stable"}, None),
        ({"outcome": Outcome.FAILURE, "reason": "timeout", "attempts": 2}, None),
        ({"status": 400, "outcome": Outcome.CLIENT_FAULT, "reason": "invalid_json"}, None),
        ({"status": 499, "outcome": Outcome.CENSORED, "reason": "client_gone"}, None),
    ],
)  # fmt: skip
def test_an_error_is_what_the_client_was_failed_with(collector, changes, error) -> None:
    [span] = sent(collector, (record(**changes), context()))
    wrong = span.status.code == Status.STATUS_CODE_ERROR
    assert wrong is (error is not None)
    assert attributes(span).get("error.type") == error
    assert attributes(span)["shipworthy.outcome"] == (changes.get("outcome") or Outcome.SUCCESS)


def test_each_call_upstream_is_a_span_below_ours(collector) -> None:
    attempts = [
        Attempt(AT - 0.5, 0.25, "support:2", "http://user:pass@10.0.0.1:8001/", "timeout"),
        Attempt(AT - 0.25, 0.125, "support:1", "https://models.example.org/x", status=200),
    ]
    headers = context().outgoing(2)
    told = record(serving="stable", serving_release="support:1", reason="timeout", attempts=2)
    request, first, second = sent(collector, (told, context(), attempts))
    assert attributes(request)["shipworthy.fallback"] is True
    assert {first.parent_span_id, second.parent_span_id} == {request.span_id}
    assert dict(headers)[b"traceparent"].decode().split("-")[2] == second.span_id.hex()
    assert first.kind == SentSpan.SPAN_KIND_CLIENT
    assert first.end_time_unix_nano == (AT - 0.25) * 1e9
    assert attributes(first) == {
        "http.request.method": "POST",
        "server.address": "10.0.0.1",
        "server.port": 8001,
        "error.type": "timeout",
        "shipworthy.attempt": 1,
        "shipworthy.release": "support:2",
    }
    assert first.status.code == Status.STATUS_CODE_ERROR
    assert attributes(second) == {
        "http.request.method": "POST",
        "http.request.resend_count": 1,
        "http.response.status_code": 200,
        "server.address": "models.example.org",
        "server.port": 443,
        "shipworthy.attempt": 2,
        "shipworthy.release": "support:1",
    }


def test_the_collector_learns_who_speaks(collector) -> None:
    sent(collector, (record(), context()))
    [resource] = collector.requests[0].resource_spans
    said = {one.key: one.value.string_value for one in resource.resource.attributes}
    assert said["service.name"] == "shipworthy-gateway"
    assert said["service.instance.id"] == "w1"
    [scope] = resource.scope_spans
    assert scope.schema_url == "https://opentelemetry.io/schemas/1.41.1"


@pytest.mark.parametrize("path", ["", "/", "/v1/traces", "/v1/traces/"])
def test_the_address_is_the_base_or_the_whole(collector, path) -> None:
    with exporting(collector.url + path) as exporter:
        exporter.emit(record(), context())
        until(lambda: collector.requests)
    assert collector.paths == ["/v1/traces"]


def test_headers_go_with_each_request_and_netrc_does_not(collector, tmp_path, monkeypatch) -> None:
    netrc = tmp_path / "netrc"
    netrc.write_text("machine 127.0.0.1 login somebody password else\n")
    monkeypatch.setenv("NETRC", str(netrc))
    with exporting(collector.url, authorization="Bearer right", tenant="ours") as exporter:
        exporter.emit(record(), context())
        until(lambda: collector.requests)
    assert collector.headers[0]["authorization"] == "Bearer right"
    assert collector.headers[0]["tenant"] == "ours"


def test_a_request_that_nobody_samples_has_no_span(collector) -> None:
    quiet = SAMPLER.context({b"traceparent": SENT[b"traceparent"][:-1] + b"0"})
    assert sent(collector, (record(), quiet)) == []


def test_many_requests_are_many_spans_in_few_messages(collector) -> None:
    spans = sent(collector, *[(record(id=f"inf_{i}"), context()) for i in range(1_000)])
    assert [attributes(span)["shipworthy.inference"] for span in spans] == [
        f"inf_{i}" for i in range(1_000)
    ]
    assert len(collector.requests) < 50


# --- bad collectors -------------------------------------------------------------------------------


def closed_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]


def test_without_a_collector_spans_are_counted_and_said_once(caplog) -> None:
    caplog.set_level(logging.DEBUG)
    with exporting(f"http://127.0.0.1:{closed_port()}", seconds=0.1) as exporter:
        for wanted in (1, 2, 3):
            exporter.emit(record(), context())
            until(lambda wanted=wanted: exporter.dropped["not_taken"] == wanted)
    [line] = [entry for entry in caplog.records if entry.levelno >= logging.WARNING]
    assert line.name == "shipworthy.gateway"
    assert "the collector takes no spans" in line.getMessage()
    assert "onnection" in line.getMessage(), "the reason"


@pytest.mark.parametrize(
    ("status", "reply"),
    [(500, {}), (400, {}), (503, {"retry-after": "3600"}), (302, {"location": "/"})],
)
def test_what_the_collector_refuses_is_counted(collector, status, reply, caplog) -> None:
    collector.status, collector.reply = status, reply
    with exporting(collector.url, seconds=0.5) as exporter:
        exporter.emit(record(), context())
        until(lambda: exporter.dropped["not_taken"] == 1)
    assert f"takes no spans, so they are dropped: it answers {status}" in caplog.text


def test_a_collector_that_is_back_gets_the_next_spans(collector, caplog) -> None:
    collector.status = 500
    with exporting(collector.url) as exporter:
        exporter._monotonic = lambda: 0.0
        exporter.emit(record(), context())
        until(lambda: exporter.dropped["not_taken"] == 1)
        collector.status = 200
        exporter.emit(record(), context())
        until(lambda: collector.requests)
        assert "again" not in caplog.text, "one good answer is not yet the end of it"
        exporter._monotonic = lambda: 60.0
        exporter.emit(record(), context())
        until(lambda: "takes spans again" in caplog.text)
    assert sum(exporter.dropped.values()) == 1


def test_behind_a_collector_that_hangs_the_queue_is_bounded(collector) -> None:
    collector.hang.clear()
    with exporting(collector.url, seconds=30.0) as exporter:
        exporter._max_queued = 100
        exporter.emit(record(), context())
        until(lambda: collector.headers)
        for _ in range(1_000):
            exporter.emit(record(), context())
        assert len(exporter._queue) == 100
        assert exporter.dropped["queue_full"] == 900
        exporter.close(0.1)
        assert exporter.dropped["shutdown"] == 100
        assert not exporter._queue
        collector.hang.set()
        until(lambda: not exporter._thread.is_alive())


def test_a_collector_that_hangs_is_given_up(collector) -> None:
    collector.hang.clear()
    with exporting(collector.url, seconds=0.3) as exporter:
        exporter.emit(record(), context())
        until(lambda: exporter.dropped["not_taken"] == 1)


def test_closing_does_not_wait_for_a_repetition(collector) -> None:
    collector.status = 503
    exporter = export_spans(collector.url, {}, sampler=SAMPLER, worker="w1", seconds=60.0)
    exporter.emit(record(), context())
    until(lambda: collector.headers)
    exporter.close(0.1)
    until(lambda: not exporter._thread.is_alive())
    assert exporter.dropped["not_taken"] == 1


def test_a_record_that_can_not_be_told_is_counted_and_the_next_one_goes(collector, caplog) -> None:
    with exporting(collector.url) as exporter:
        broken = [Attempt(AT, 0.1, "support:2", "http://host:port/")]
        exporter.emit(record(), context(), broken)
        until(lambda: exporter.dropped["fault"] == 1)
        exporter.emit(record(), context())
        until(lambda: collector.requests)
    assert "spans can't be made" in caplog.text


# --- the extra ------------------------------------------------------------------------------


def test_a_missing_extra_is_named(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)
    monkeypatch.delitem(sys.modules, "shipworthy.gateway.otlp", raising=False)
    with pytest.raises(UsageError, match=r"install shipworthy\[otlp\]"):
        export_spans("http://127.0.0.1:4318", {}, sampler=SAMPLER, worker="w1")


def test_without_a_collector_nothing_of_it_is_loaded() -> None:
    program = (
        "import sys, shipworthy.gateway.exporter, shipworthy.app.gateway_worker;"
        "print(*{'opentelemetry', 'google.protobuf', 'requests', 'urllib3'} & sys.modules.keys())"
    )
    loaded = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, env=os.environ
    )
    assert loaded.stdout.split() == []


def test_a_span_is_no_more_than_it_says() -> None:
    assert set(Span.__struct_fields__) == {
        "name", "trace_id", "id", "parent", "serves", "start", "end", "failed", "attributes",
        "state",
    }  # fmt: skip
