"""The access log's lines: JSON, one each, whatever a client puts into its path."""

import json
from datetime import datetime
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shipworthy.domain.records import InferenceRecord, Outcome
from shipworthy.gateway.access_log import access_line, plain_line

TRACE = "0af7651916cd43dd8448eb211c80319c"


def record(**changes) -> InferenceRecord:
    fields: Any = {
        "id": "inf_1",
        "at": 1_760_000_000.25,
        "plan": "tumours",
        "model": "tumours",
        "revision": 4,
        "key": "k_1",
        "assigned": "candidate",
        "probability": 0.1,
        "outcome": Outcome.SUCCESS,
        "status": 200,
        "release": "tumours:2",
        "unit": "pseudonym",
        "request": b"a body",
        "response": b"an answer",
        "traceparent": f"00-{TRACE}-b7ad6b7169203331-01",
        "seconds": 0.0123456789,
    }
    return InferenceRecord(**fields | changes)


def test_a_line_tells_what_became_of_a_call() -> None:
    line = json.loads(access_line(record(), "POST", "/v2/models/tumours/infer", 200))
    assert line == {
        "time": "2025-10-09T08:53:20.250000Z",
        "level": "info",
        "method": "POST",
        "path": "/v2/models/tumours/infer",
        "status": 200,
        "seconds": 0.012346,
        "plan": "tumours",
        "release": "tumours:2",
        "serving": None,
        "outcome": "success",
        "reason": "",
        "input_tokens": None,
        "output_tokens": None,
        "inference": "inf_1",
        "trace": TRACE,
    }
    assert datetime.fromisoformat(line["time"]).timestamp() == 1_760_000_000.25


def test_a_line_names_no_body_no_unit_and_no_key() -> None:
    line = access_line(record(), "POST", "/v2/models/tumours/infer", 200)
    for secret in ("a body", "an answer", "pseudonym", "k_1"):
        assert secret not in line


def test_a_call_without_a_trace_has_a_line_too() -> None:
    assert json.loads(access_line(record(traceparent=None), "POST", "/", 200))["trace"] is None


@pytest.mark.parametrize(("status", "level"), [(200, "info"), (404, "info"), (502, "error")])
def test_what_we_failed_at_is_an_error(status: int, level: str) -> None:
    assert json.loads(access_line(record(), "POST", "/", status))["level"] == level
    assert json.loads(plain_line(0.0, 0.0, "GET", "/", status))["level"] == level


def test_a_query_string_stays_out() -> None:
    assert "sw_" not in plain_line(0.0, 0.0, "GET", "/v2?api_key=sw_secret", 404)
    assert "sw_" not in access_line(record(), "POST", "/v2?api_key=sw_secret", 200)


@given(method=st.text(), path=st.text(st.characters(exclude_categories=()), max_size=400))
def test_whatever_a_client_sends_is_one_bounded_line_of_printable_json(method, path) -> None:
    for line in (
        plain_line(1.0, 0.5, method, path, 404),
        access_line(record(), "POST", path, 200),
    ):
        assert line.isascii()
        assert line.isprintable()
        assert len(json.loads(line)["path"]) <= 200
        assert len(line) < 1_000


def test_a_path_can_not_forge_a_line_or_move_the_terminal() -> None:
    line = plain_line(1.0, 0.5, "GET", '/x\n{"status":200}\x1b[2J\x9b1m\u202e', 404)
    assert "\n" not in line
    assert json.loads(line)["path"] == '/x\\n{"status":200}\\x1b[2J\\x9b1m\\u202e'
