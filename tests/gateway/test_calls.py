"""Calls that go well, calls that may not be made, and what is written of both."""

import math
import re

import msgspec
import pytest

from shipworthy.domain.contract import Contract, Tensor
from shipworthy.domain.keys import hash_key
from shipworthy.domain.plan import Capture, Endpoint, Key
from shipworthy.domain.records import Outcome
from shipworthy.domain.routing import choose


async def test_a_call_is_answered_under_the_clients_name(worker, model):
    await worker.start()
    reply = await worker.infer(body={**model.request_of(), "id": "mine"})
    assert reply.status == 200
    assert reply.json == {
        "model_name": "digits",
        "model_version": "1",
        "outputs": [{"name": "label", "datatype": "INT64", "shape": [1], "data": [3]}],
    }
    assert reply.headers["x-shipworthy-release"] == "digits@1"
    assert reply.headers["x-shipworthy-digest"] == worker.snapshot.plans["digits"].stable.digest
    assert reply.headers["x-shipworthy-inference"].startswith("inf_")
    assert "server" not in reply.headers
    assert "date" in reply.headers
    [got] = worker.model.received
    assert got.path == "/v2/models/served/infer"
    assert msgspec.json.decode(got.body)["id"] == "mine"
    assert "authorization" not in got.headers


async def test_an_answer_that_has_the_right_names_passes_through_byte_by_byte(worker, model):
    body = (
        b'{"model_name": "digits", "model_version":"1", "extra": [1, 2.50],'
        b' "outputs":[{"name":"label","datatype":"INT64","shape":[1],"data":[ 3 ]}]}'
    )
    worker.model.behave = model.responding(body)
    await worker.start()
    assert (await worker.infer()).body == body


async def test_the_record_is_written_before_the_answer(worker):
    await worker.start()
    reply = await worker.infer(
        unit="user-7",
        headers={
            "X-Shipworthy-Slice": "country=DE, plan=pro,bad,=x",
            "traceparent": f"00-{'a' * 32}-{'b' * 16}-01",
        },
    )
    record = worker.journal.last
    assert record.id == reply.headers["x-shipworthy-inference"]
    assert record.outcome is Outcome.SUCCESS
    assert record.reason == ""
    assert (record.plan, record.model, record.revision, record.key) == (
        "digits", "digits", 1, "client",
    )  # fmt: skip
    assert (record.assigned, record.serving, record.probability, record.rollout) == (
        "stable", "stable", 1.0, "",
    )  # fmt: skip
    assert record.release == record.serving_release == "digits@1"
    assert record.slices == {"country": "DE", "plan": "pro"}
    assert record.traceparent == worker.model.received[0].headers["traceparent"]
    assert record.unit
    assert re.fullmatch("[0-9a-f]{16}", record.unit)
    assert "user-7" not in str(record)
    assert record.attempts == 1
    assert record.sent is None
    assert 0 < record.attempt_seconds <= record.seconds < 3
    assert record.request_bytes == len(worker.model.received[0].body)
    assert record.response_bytes == len(reply.body)
    assert record.request is record.response is None


async def test_bodies_are_captured_only_when_asked_for_and_cut(worker):
    await worker.start(worker.plan(capture=Capture(payloads="full", max_bytes=20)))
    reply = await worker.infer()
    record = worker.journal.last
    assert record.request == worker.model.received[0].body[:20]
    assert record.response == reply.body[:20]
    assert record.response_bytes == len(reply.body)


async def test_the_split_is_sticky_and_has_the_planned_shares(worker):
    plan = worker.plan(candidate=True, weight=2_500)
    await worker.start(plan)
    sides = {}
    for number in range(120):
        unit = f"user-{number % 60}"
        reply = await worker.infer(unit=unit)
        release = reply.headers["x-shipworthy-release"]
        assert sides.setdefault(unit, release) == release
        chosen = choose(plan, unit, now=0, uniform=0)
        assert release == {"stable": "digits@1", "candidate": "digits@2"}[chosen.arm]
        record = worker.journal.last
        assert (record.assigned, record.rollout) == (chosen.arm, "r-1")
        assert record.probability == chosen.probability
    assert 0 < sum(side == "digits@2" for side in sides.values()) < 30


async def test_without_a_unit_each_request_is_drawn(worker):
    await worker.start(worker.plan(candidate=True, weight=2_500))
    worker.draw = 0.24
    assert (await worker.infer()).headers["x-shipworthy-release"] == "digits@2"
    assert worker.journal.last.unit is None
    assert worker.journal.last.sent == pytest.approx(worker.clock(), abs=2)
    worker.draw = 0.26
    assert (await worker.infer()).headers["x-shipworthy-release"] == "digits@1"


async def test_the_session_header_stands_in_for_a_unit(worker):
    await worker.start()
    await worker.infer(headers={"X-Session-Id": "s-1"})
    by_session = worker.journal.last.unit
    await worker.infer(unit="s-1")
    assert worker.journal.last.unit == by_session is not None
    await worker.infer(unit="")
    assert worker.journal.last.unit is None


async def test_units_that_are_no_utf8_still_stick(worker):
    await worker.start()
    raw = b"X-Shipworthy-Unit: jos\xe9"
    body = msgspec.json.encode({"inputs": []})
    for _ in range(2):
        await worker.raw(
            b"POST /v2/models/digits/infer HTTP/1.1\r\nhost: x\r\nconnection: close\r\n"
            b"authorization: Bearer %s\r\n%s\r\ncontent-length: %d\r\n\r\n%s"
            % (worker.keys["client"].encode(), raw, len(body), body)
        )
    first, second = worker.journal.calls
    assert first.unit == second.unit is not None


async def test_a_unit_that_is_too_long_is_the_clients_fault(worker):
    await worker.start()
    reply = await worker.infer(unit="u" * 300)
    assert reply.status == 400
    assert "x-shipworthy-unit is longer than 256 bytes" in reply.error
    assert worker.journal.last.outcome is Outcome.CLIENT_FAULT


@pytest.mark.parametrize(
    ("body", "says", "reason"),
    [
        (b"", "the body is empty", "invalid_json"),
        (b'{"inputs": [', "the body is not JSON", "invalid_json"),
        (b'{"inputs": "\xff"}', "not valid UTF-8 (byte 12)", "invalid_json"),
        (b'{"inputs": [NaN]}', "it holds NaN (byte 12)", "invalid_json"),
        (b'{"inputs": [{"name": ' + b"[" * 100_000, "inputs[0].name: expected str", "invalid_json"),
        (b'{"x": ' + b"[" * 100_000, "nested too deeply", "invalid_json"),
        (b"[]", "body: expected object", "invalid_json"),
        (b"{}", "missing required field inputs", "invalid_json"),
        ({"inputs": []}, 'inputs: "features" is missing', "invalid_input"),
        ({"shape": [1, 3]}, "inputs[0].shape: expected [-1, 4], got [1, 3]", "invalid_input"),
        ({"data": [1, 2, 3]}, "inputs[0].data: expected 4 values", "invalid_input"),
        ({"data": [1, 2, None, 4]}, "inputs[0].data[2]: expected a number", "invalid_input"),
    ],
)
async def test_invalid_calls_name_the_field_and_go_nowhere(worker, model, body, says, reason):
    await worker.start()
    if isinstance(body, dict) and "inputs" not in body:
        body = model.request_of(**body) if body else body
    reply = await worker.infer(body=body)
    assert reply.status == 400
    assert says in reply.error
    assert not worker.model.received
    record = worker.journal.last
    assert (record.outcome, record.reason) == (Outcome.CLIENT_FAULT, reason)
    assert record.attempts == 0
    assert record.serving is None


@pytest.mark.parametrize(
    ("headers", "status", "says"),
    [
        ({"Content-Encoding": "gzip"}, 415, "compressed"),
        ({"X-Shipworthy-Deadline": "soon"}, 400, "X-Shipworthy-Deadline"),
        ({"X-Shipworthy-Deadline": "-1"}, 400, "X-Shipworthy-Deadline"),
        ({"X-Shipworthy-Deadline": "nan"}, 400, "X-Shipworthy-Deadline"),
    ],
)
async def test_what_is_not_supported_is_said(worker, headers, status, says):
    await worker.start()
    reply = await worker.infer(headers=headers)
    assert (reply.status, says in reply.error) == (status, True)
    assert worker.journal.last.outcome is Outcome.CLIENT_FAULT


async def test_documents_and_health(worker):
    await worker.start(worker.plan(candidate=True), worker.plan(name="digits@staging"))
    assert (await worker.ask("GET", "/v2")).json["name"] == "shipworthy"
    document = (await worker.ask("GET", "/v2/models/digits")).json
    assert document["versions"] == ["1"]
    assert document["inputs"] == [{"name": "features", "datatype": "FP64", "shape": [-1, 4]}]
    seen = (await worker.ask("GET", "/v2/models/digits", key="admin")).json
    assert seen["versions"] == ["1", "2"]
    pinned = (await worker.ask("GET", "/v2/models/digits/versions/2", key="admin")).json
    assert pinned["versions"] == ["2"]
    assert (await worker.ask("GET", "/v2/models/digits/ready")).json == {
        "name": "digits", "ready": True,
    }  # fmt: skip
    for path in ("/healthz", "/readyz", "/v2/health/live", "/v2/health/ready", "/metrics"):
        assert (await worker.ask("GET", path, key=None)).status == 200
        head = await worker.ask("HEAD", path, key=None)
        assert (head.status, head.body) == (200, b"")
    staged = await worker.ask("GET", "/v2/models/digits%40staging", key="admin")
    assert staged.json["name"] == "digits@staging"


async def test_wrong_methods_and_addresses(worker):
    await worker.start()
    reply = await worker.ask("GET", "/v2/models/digits/infer")
    assert (reply.status, reply.headers["allow"]) == (405, "POST")
    assert (await worker.ask("POST", "/metrics", key=None)).status == 405
    assert (await worker.ask("GET", "/nothing")).status == 404
    assert (await worker.ask("GET", "/v2/models/a/b/c")).status == 404
    assert (await worker.ask("GET", "/nothing", key=None)).status == 401


# --- keys -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "key",
    [None, "", "nonsense", "sw_client_", "sw_nobody_" + "0" * 64, "sw_client_" + "1" * 64,
     "sw_client_é", "x" * 5000],
)  # fmt: skip
async def test_a_key_that_opens_nothing_gets_401_in_the_same_words(worker, key):
    await worker.start()
    reply = await worker.infer(key=key)
    assert reply.status == 401
    assert reply.headers["www-authenticate"] == "Bearer"
    assert reply.error.startswith("no valid key; send `Authorization: Bearer sw_")
    assert not worker.journal.records
    assert await worker.metric('shipworthy_gateway_denied_total{why="unauthenticated"}') == 1


async def test_an_expired_key_and_a_revoked_one_get_the_same_401(worker):
    text = worker.keys["client"]
    keys = dict(worker.snapshot.keys)
    keys["client"] = Key(id="client", hash=hash_key(text), role="client", expires=1000.0)
    await worker.start()
    assert (await worker.infer()).status == 200
    worker.publish(keys=keys)
    await worker.until(lambda: worker.snapshot.keys["client"].expires == 1000.0)
    expired = await wait_for_status(worker, 401)
    del keys["client"]
    worker.publish(keys=keys)
    revoked = await wait_for_status(worker, 401)
    assert expired.error == revoked.error


async def wait_for_status(worker, status):
    reply = await worker.infer()
    for _ in range(200):
        if reply.status == status:
            break
        reply = await worker.infer()
    assert reply.status == status
    return reply


async def test_a_revocation_reaches_the_worker_in_half_a_second(worker):
    await worker.start(snapshot_seconds=0.1)
    assert (await worker.infer()).status == 200
    began = worker.clock()
    worker.publish(keys={})
    while (await worker.infer()).status != 401:
        assert worker.clock() - began < 0.5


async def test_the_key_of_another_model_gets_403_and_the_cure(worker):
    await worker.start(worker.plan(), worker.plan(name="digits@staging"))
    for name in ("digits", "digits@staging", "unknown"):
        reply = await worker.infer(name=name, key="other")
        assert reply.status == 403
        assert "ask its owner for a key that names this model" in reply.error
    assert (await worker.infer(name="digits@staging")).status == 403
    assert (await worker.infer(name="digits@staging", key="admin")).status == 200
    assert (await worker.infer(name="unknown")).status == 404
    assert {record.plan for record in worker.journal.calls} == {"digits@staging"}


async def test_only_trusted_keys_choose_a_version(worker):
    await worker.start(worker.plan(candidate=True, weight=1))
    pinned = "digits/versions/2"
    assert (await worker.infer(name=pinned)).status == 403
    reply = await worker.infer(name=pinned, key="trusted", unit="u")
    assert reply.headers["x-shipworthy-release"] == "digits@2"
    record = worker.journal.last
    assert (record.assigned, record.rollout, record.probability) == ("candidate", "", 1.0)
    missing = await worker.infer(name="digits/versions/7", key="admin")
    assert (missing.status, "does not run version" in missing.error) == (404, True)


async def test_keys_age_when_nobody_refreshes_them(worker):
    worker.snapshot = msgspec.structs.replace(worker.snapshot, max_stale=60.0)
    await worker.start()
    assert (await worker.infer()).status == 200
    worker.clock.ahead = 61
    stale = await worker.infer()
    assert (stale.status, stale.headers["retry-after"]) == (503, "1")
    assert (await worker.ask("GET", "/readyz", key=None)).status == 503
    worker.publish(written=worker.clock())
    await worker.until(lambda: True)
    assert (await wait_for_status(worker, 200)).status == 200


# --- upstream ---------------------------------------------------------------------------------


async def test_credentials_are_resolved_and_never_journalled(worker, monkeypatch, tmp_path, caplog):
    monkeypatch.setenv("UPSTREAM_KEY", "s3cret-token")
    (tmp_path / "credential").write_text("file-token\n")
    stable = worker.arm(1)
    for reference, sent in (
        ("env:UPSTREAM_KEY", "s3cret-token"),
        (f"file:{tmp_path / 'credential'}", "file-token"),
    ):
        endpoint = Endpoint(url=worker.model.url + "/", credential=reference)
        plan = worker.plan(stable=msgspec.structs.replace(stable, endpoints=(endpoint,)))
        await worker.start(plan)
        assert (await worker.infer()).status == 200
        got = worker.model.received[-1]
        assert got.headers["authorization"] == f"Bearer {sent}"
        assert got.path == "/v2/models/served/infer"
        await worker.stop()
    assert "-token" not in str(worker.journal.records) + caplog.text


async def test_a_missing_credential_is_logged_and_the_endpoint_called_without(worker, caplog):
    endpoint = Endpoint(url=worker.model.url, credential="env:NOT_SET_ANYWHERE")
    await worker.start(
        worker.plan(stable=msgspec.structs.replace(worker.arm(1), endpoints=(endpoint,)))
    )
    assert (await worker.infer()).status == 200
    assert "authorization" not in worker.model.received[-1].headers
    assert "env:NOT_SET_ANYWHERE holds nothing" in caplog.text


async def test_while_a_release_is_rolled_out_the_contract_is_stables(worker, model):
    wider = Contract(
        inputs=(*model.contract.inputs, Tensor("more", "INT8", (-1,), optional=True)),
        outputs=model.contract.outputs,
    )
    candidate = worker.arm(2, worker.candidate_model.url, contract=wider)
    plan = msgspec.structs.replace(worker.plan(candidate=True), candidate=candidate)
    await worker.start(plan)
    body = model.request_of()
    body["inputs"].append({"name": "more", "datatype": "INT8", "shape": [1], "data": [1]})
    reply = await worker.infer(body=body)
    assert (reply.status, 'no input "more"' in reply.error) == (400, True)


async def test_a_candidate_that_takes_less_than_stable_fails_and_stable_answers(worker):
    narrower = Contract(
        inputs=(Tensor("features", "FP64", (1, 4)),),
        outputs=(Tensor("label", "INT64", (-1,)),),
        side_effects="none",
    )
    plan = worker.plan(candidate=True)
    candidate = worker.arm(2, worker.candidate_model.url, contract=narrower)
    await worker.start(msgspec.structs.replace(plan, candidate=candidate))
    assert (await worker.infer()).headers["x-shipworthy-release"] == "digits@2"
    body = {"inputs": [{"name": "features", "datatype": "FP64", "shape": [2, 4], "data": [1] * 8}]}
    worker.model.behave = worker_two_rows
    reply = await worker.infer(body=body)
    assert reply.headers["x-shipworthy-release"] == "digits@1"
    record = worker.journal.last
    assert (record.outcome, record.reason) == (Outcome.FAILURE, "narrowed_contract")
    assert len(worker.candidate_model.received) == 1


async def worker_two_rows(writer):
    body = (
        b'{"model_name":"m","outputs":[{"name":"label","datatype":"INT64","shape":[2],'
        b'"data":[1,2]}]}'
    )
    writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n%s" % (len(body), body))


# --- capture ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("trouble", "why"), [("full", "full"), ("broken", "fault")])
async def test_capture_never_hurts_serving(worker, trouble, why, caplog):
    await worker.start()
    setattr(worker.journal, trouble, True)
    for _ in range(2):
        assert (await worker.infer()).status == 200
    line = f'shipworthy_gateway_records_dropped_total{{why="{why}"}}'
    assert await worker.metric(line) == 2
    assert caplog.text.count("records are being dropped") == 1
    setattr(worker.journal, trouble, False)
    assert (await worker.infer()).status == 200
    assert "records are written again" in caplog.text


async def test_metrics_hold_plans_and_releases_but_no_units(worker):
    await worker.start()
    await worker.infer(unit="somebody")
    await worker.infer(body=b"{")
    text = (await worker.ask("GET", "/metrics", key=None)).body.decode()
    assert 'shipworthy_gateway_requests_total{plan="digits",status="200"} 1.0' in text
    assert 'shipworthy_gateway_requests_total{plan="digits",status="400"} 1.0' in text
    assert 'shipworthy_gateway_request_seconds_count{plan="digits"} 2.0' in text
    assert "somebody" not in text
    age = await worker.metric("shipworthy_gateway_snapshot_age_seconds")
    assert math.isfinite(age)
    assert await worker.metric("shipworthy_gateway_connections") >= 1


async def test_a_fault_of_ours_is_a_500_logged_once_and_counted(worker, monkeypatch, caplog):
    await worker.start()

    def broken(*args, **kwargs):
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr("shipworthy.gateway.attempts.pick", broken)
    for _ in range(3):
        reply = await worker.infer()
        assert reply.status == 500
        assert reply.json == {"error": "the gateway has a fault; it is in its log"}
    assert caplog.text.count("ZeroDivisionError: a bug") == 1
    assert await worker.metric("shipworthy_gateway_unhandled_errors_total") == 3
    assert worker.journal.last.outcome is Outcome.CENSORED
    assert worker.journal.last.reason == "gateway_fault"


async def test_the_access_log_is_json_without_secrets(worker, caplog):
    caplog.set_level("INFO", logger="shipworthy.gateway.access")
    await worker.start(access_log=True)
    await worker.infer(unit="somebody")
    [line] = [r.message for r in caplog.records if r.name == "shipworthy.gateway.access"]
    entry = msgspec.json.decode(line)
    assert entry["status"] == 200
    assert entry["path"] == "/v2/models/digits/infer"
    assert entry["inference"] == worker.journal.last.id
    assert "somebody" not in line
    assert worker.keys["client"] not in line


async def test_the_access_log_has_a_line_for_each_request(worker, model, caplog):
    caplog.set_level("INFO", logger="shipworthy.gateway.access")
    await worker.start(access_log=True)
    asked = [
        await worker.chat(model="nobody"),
        await worker.chat(messages=[]),
        await worker.chat(body=b"{"),
        await worker.ask("POST", "/v1/feedback", body={}),
        await worker.ask("GET", "/nothing"),
        await worker.infer(),
    ]
    lines = [r.message for r in caplog.records if r.name == "shipworthy.gateway.access"]
    told = [msgspec.json.decode(line)["status"] for line in lines]
    assert told == [reply.status for reply in asked] == [404, 400, 400, 400, 404, 200]


async def test_a_fault_in_making_a_record_costs_nobody_an_answer(worker, monkeypatch, caplog):
    await worker.start()

    def broken(*args, **kwargs):
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr("shipworthy.gateway.dialects.tensors.features_of_tensors", broken)
    assert (await worker.infer()).status == 200
    assert not worker.journal.calls
    assert "ZeroDivisionError: a bug" in caplog.text
    assert await worker.metric('shipworthy_gateway_records_dropped_total{why="fault"}') == 1
