"""Spans from the whole system to a collector that the settings name."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from tests.app.conftest import Town, wait_for
from tests.collector import attributes, fake_collector

from shipworthy.app.exporting import OtlpOptions, check_extra, exporting
from shipworthy.errors import UsageError
from shipworthy.settings import load_project

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


@pytest.mark.timeout(300)
def test_a_request_is_found_in_the_collector_under_the_clients_trace(
    town: Town, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTLP_KEY", "Bearer of-the-collector")
    with fake_collector() as collector:
        settings = town.root / "shipworthy.yaml"
        otlp = f"endpoint: '{collector.url}', headers: {{authorization: env:OTLP_KEY}}, sample: 0"
        text = settings.read_text().replace("{port: 0}", f"{{port: 0, otlp: {{{otlp}}}}}")
        settings.write_text(text)
        town.start()
        town.to_production("first", 1)
        wait_for(lambda: town.infer().status == 200)
        answer = town.infer(traceparent=f"00-{TRACE}-{PARENT}-01")
        assert answer.status == 200
        spans = wait_for(lambda: len(collector.spans) == 2 and collector.spans)
        [span] = [one for one in spans if one.parent_span_id.hex() == PARENT]
        [called] = [one for one in spans if one.parent_span_id == span.span_id]
        assert called.trace_id == span.trace_id
        assert span.trace_id.hex() == TRACE
        assert span.parent_span_id.hex() == PARENT
        found = attributes(span)
        assert found["shipworthy.inference"] == answer.headers["x-shipworthy-inference"]
        assert found["shipworthy.release"] == "digits@1"
        assert collector.headers[0]["authorization"] == "Bearer of-the-collector"
        collector.status = 500
        town.infer(traceparent=f"00-{TRACE}-{PARENT}-01")
        dropped = 'shipworthy_gateway_spans_dropped_total{why="not_taken"} 1.0'
        wait_for(lambda: dropped in str(town.call("/metrics", key=None).body))
        assert town.infer().status == 200
        assert town.stop() == 0


def test_a_missing_extra_is_told_before_anything_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    check_extra()
    monkeypatch.setitem(sys.modules, "opentelemetry", None)
    for name in [one for one in sys.modules if one.startswith("opentelemetry.")]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(UsageError, match=r"install shipworthy\[otlp\]"):
        check_extra()


def test_a_header_that_refers_to_nothing_is_left_out_and_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "tenant").write_text("ours\n")
    headers = {"x-tenant": f"file:{tmp_path / 'tenant'}", "authorization": "env:NOT_SET_ANYWHERE"}
    with fake_collector() as collector:
        options = OtlpOptions(endpoint=collector.url, headers=headers, sample=1.0)
        with exporting(options, "worker-0") as exporter:
            assert exporter is not None
            assert exporter.context({}).recorded
            assert not exporter.dropped["fault"]
            told = exporter.context({})
            assert told.trace_id != exporter.context({}).trace_id
    assert "env:NOT_SET_ANYWHERE" in caplog.text


def test_without_a_collector_there_is_no_exporter() -> None:
    with exporting(None, "worker-0") as exporter:
        assert exporter is None


@pytest.mark.parametrize(
    ("otlp", "cure"),
    [
        ("{endpoint: 'http://user:pass@collector:4318'}", "goes into headers"),
        ("{endpoint: 'https://collector/?key=1'}", "goes into headers"),
        ("{endpoint: 'grpc://collector:4317'}", "http:// or https://"),
        ("{endpoint: 'http://c:1', headers: {authorization: 'Bearer x'}}", "never the value"),
        ("{endpoint: 'http://c:1', headers: {'a b': 'env:X'}}", "the name of a header"),
        ("{endpoint: 'http://c:1', sample: 2}", "less than or equal to 1"),
        ("{sample: 1}", "'endpoint' is missing"),
    ],
)
def test_settings_that_can_not_be_meant_are_refused(tmp_path: Path, otlp: str, cure: str) -> None:
    (tmp_path / "shipworthy.yaml").write_text(f"gateway: {{otlp: {otlp}}}\n")
    with pytest.raises(UsageError, match=cure):
        load_project(tmp_path)
