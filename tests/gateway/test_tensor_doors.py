"""Tensors in every form, from every client to every server: JSON, binary, MLflow's scoring, CSV.

And what happens besides, where a release has several servers: second attempts, and their bounds.
"""

import asyncio
import math
import struct
import time
from typing import Any

import msgspec
import pytest

from shipworthy.domain.contract import Contract, Tensor
from shipworthy.domain.plan import Endpoint, Hedge
from shipworthy.domain.records import Outcome
from shipworthy.protocols import oip_binary
from shipworthy.protocols.oip import EXTENSIONS, TensorValues

OIP = Contract(
    inputs=(Tensor("features", "FP32", (-1, 2)),),
    outputs=(Tensor("score", "FP32", (-1,)),),
    side_effects="none",
)
MLFLOW = Contract(inputs=OIP.inputs, outputs=OIP.outputs, protocol="mlflow", side_effects="none")
ROWS = [[0.5, 1.5], [2.5, 3.5]]
FLAT = [value for row in ROWS for value in row]
SPEAKS = msgspec.json.encode({"name": "x", "version": "1", "extensions": EXTENSIONS})


def changed(it, **changes: Any):
    return msgspec.structs.replace(it, **changes)


def scores(*values: float) -> bytes:
    output = {"name": "score", "datatype": "FP32", "shape": [len(values)], "data": values}
    return msgspec.json.encode({"model_name": "served", "outputs": [output]})


def request(**changes: Any) -> dict[str, Any]:
    tensor = {"name": "features", "datatype": "FP32", "shape": [2, 2], "data": FLAT}
    return {"inputs": [tensor], **changes}


def packed(*values: float, wants: bool = False) -> tuple[bytes, dict[str, str]]:
    """A request in binary, and its headers."""
    tensor = TensorValues("features", "FP32", (len(values) // 2, 2), list(values))
    body, length = oip_binary.encode_request([tensor], binary_output=wants)
    return body, {
        "Inference-Header-Content-Length": str(length),
        "Content-Type": "application/octet-stream",
    }


def packed_scores(model, *values: float):
    """Answer in binary."""
    body, length = oip_binary.encode_response(
        [TensorValues("score", "FP32", (len(values),), list(values))],
        model_name="served",
        binary=frozenset({"score"}),
    )
    return model.responding(body, headers=f"Inference-Header-Content-Length: {length}\r\n")


def unpacked(reply) -> tuple[Any, list[float]]:
    """An answer in binary: its JSON, and the numbers behind it."""
    assert reply.headers["content-type"] == "application/octet-stream"
    length = int(reply.headers["inference-header-content-length"])
    data = reply.body[length:]
    return msgspec.json.decode(reply.body[:length]), list(
        struct.unpack(f"<{len(data) // 4}f", data)
    )


async def score(worker, body: Any, content_type: str = "application/json", **asked: Any):
    headers = {"Content-Type": content_type}
    return await worker.ask(
        "POST", "/models/digits/invocations", body=body, headers=headers, **asked
    )


# --- scoring ----------------------------------------------------------------------------------


async def test_scoring_reaches_a_server_of_tensors(worker, model):
    worker.model.behave = model.responding(scores(1.0, 2.0))
    await worker.start(worker.plan(contract=OIP))
    reply = await score(worker, {"inputs": ROWS})
    assert (reply.status, reply.json) == (200, {"predictions": [1.0, 2.0]})
    assert reply.headers["x-shipworthy-release"] == "digits@1"
    [got] = worker.model.received
    assert got.path == "/v2/models/served/infer"
    [tensor] = msgspec.json.decode(got.body)["inputs"]
    assert (tensor["name"], tensor["shape"], tensor["data"]) == ("features", [2, 2], ROWS)
    record = worker.journal.last
    assert (record.protocol, record.operation, record.outcome) == (
        "mlflow", "infer", Outcome.SUCCESS,
    )  # fmt: skip
    assert record.features


async def test_tensors_reach_a_server_of_scoring(worker, model):
    worker.model.behave = model.responding(b'{"predictions": [1.0, 2.0], "x": 1}')
    await worker.start(worker.plan(contract=MLFLOW))
    reply = await worker.infer(body=request(id="mine"))
    assert reply.json == {
        "model_name": "digits",
        "model_version": "1",
        "id": "mine",
        "outputs": [{"name": "score", "datatype": "FP32", "shape": [2], "data": [1.0, 2.0]}],
    }
    [got] = worker.model.received
    assert got.path == "/invocations"
    assert msgspec.json.decode(got.body) == {"inputs": ROWS}
    assert worker.journal.last.protocol == "oip-v2"


async def test_scoring_passes_to_a_server_of_scoring_as_it_is(worker, model):
    answer = b'{ "predictions":[1.0,2],\n "x_own": {"a": 1.50} }'
    worker.model.behave = model.responding(answer)
    await worker.start(worker.plan(contract=MLFLOW))
    body = b'{"dataframe_split": {"columns": ["a", "b"],\n "data": [[0.5, 1.50], [2.5, 3.5]]}}'
    reply = await score(worker, body, "application/json; charset=utf-8")
    assert reply.body == answer
    [got] = worker.model.received
    assert (got.path, got.body) == ("/invocations", body)
    assert got.headers["content-type"] == "application/json; charset=utf-8"


@pytest.mark.parametrize("contract", [OIP, MLFLOW], ids=["oip", "mlflow"])
async def test_csv(worker, model, contract):
    whole = scores(1.0, 2.0) if contract is OIP else b'{"predictions": [1.0, 2.0]}'
    worker.model.behave = model.responding(whole)
    await worker.start(worker.plan(contract=contract))
    text = b"a,b\n0.5,1.5\n2.5,3.5\n"
    reply = await score(worker, text, "text/csv")
    assert reply.json == {"predictions": [1.0, 2.0]}
    [got] = worker.model.received
    if contract is MLFLOW:
        assert (got.body, got.headers["content-type"]) == (text, "text/csv")
    else:
        assert msgspec.json.decode(got.body)["inputs"][0]["data"] == ROWS


@pytest.mark.parametrize(
    ("body", "kind", "status", "says"),
    [
        (b"{", "application/json", 400, "JSON"),
        ({"inputs": [[1.0]]}, "application/json", 400, "inputs"),
        ({"instances": ROWS, "inputs": ROWS}, "application/json", 400, "exactly one of"),
        ({"inputs": ROWS, "params": {"a": 1}}, "application/json", 400, "params: this model"),
        (b"a,b\n1,x\n", "text/csv", 400, "x"),
        (b"<a/>", "application/xml", 415, '"application/xml" is not accepted'),
        (b" " * 5000, "application/json", 413, "larger than 4000 bytes"),
    ],
)
async def test_scoring_errors_have_mlflows_shape(worker, body, kind, status, says):
    await worker.start(worker.plan(contract=OIP), max_body=4000)
    reply = await score(worker, body, kind)
    assert reply.status == status
    assert list(reply.json) == ["error_code", "message"]
    assert says in reply.json["message"]
    assert worker.model.received == []
    assert worker.journal.last.outcome is Outcome.CLIENT_FAULT


async def test_who_may_and_what_is_there_is_told_in_mlflows_shape_too(worker):
    await worker.start(worker.plan(contract=OIP))
    for key, status, code in ((None, 401, "UNAUTHENTICATED"), ("other", 403, "PERMISSION_DENIED")):
        reply = await score(worker, {"inputs": ROWS}, key=key)
        assert (reply.status, reply.json["error_code"]) == (status, code)
    reply = await worker.ask("POST", "/models/none/invocations", key="admin")
    assert (reply.status, reply.json["error_code"]) == (404, "RESOURCE_DOES_NOT_EXIST")
    reply = await worker.ask("GET", "/models/digits/invocations")
    assert (reply.status, reply.json["error_code"]) == (405, "BAD_REQUEST")


FAILING = [
    ("oip", b'{"error": "no such feature"}', "400 Bad", "no such feature"),
    ("mlflow", b'{"error_code": "BAD_REQUEST", "message": "no such feature"}', "400 Bad",
     "no such feature"),
    ("oip", b"", "500 Oh", "the model failed"),
    ("mlflow", b"", "500 Oh", "the model failed"),
    ("oip", b"<html>", "200 OK", "the model's answer broke off or is not the protocol's"),
    ("mlflow", b'{"prediction": []}', "200 OK", "the model's answer broke off"),
    ("oip", scores(1.0), "200 OK", "the model's answer breaks its contract"),
    ("mlflow", b'{"predictions": [1.0]}', "200 OK", "the model's answer breaks its contract"),
    ("mlflow", b'{"predictions": ["x", "y"]}', "200 OK", "the model's answer breaks its contract"),
]  # fmt: skip


@pytest.mark.parametrize("door", ["oip", "mlflow"])
@pytest.mark.parametrize(("kind", "body", "status", "says"), FAILING)
async def test_failures_are_told_in_the_clients_protocol(
    worker, model, door, kind, body, status, says
):
    worker.model.behave = model.responding(body, status)
    contract = {"oip": OIP, "mlflow": MLFLOW}[kind]
    plan = worker.plan(contract=contract, shield=model.Shield(retry_burst=0))
    await worker.start(plan)
    if door == "oip":
        reply = await worker.infer(body=request())
        assert list(reply.json) == ["error"]
        told = reply.error
    else:
        reply = await score(worker, {"inputs": ROWS})
        assert list(reply.json) == ["error_code", "message"]
        told = reply.json["message"]
    assert reply.status == (400 if status.startswith("400") else 502)
    assert told.startswith(says)
    assert worker.journal.last.outcome is Outcome.FAILURE  # the contract says what is allowed


@pytest.mark.parametrize("door", ["oip", "mlflow"])
async def test_stable_may_speak_another_protocol_than_the_candidate(worker, model, door):
    plan = worker.plan(contract=OIP, candidate=True)
    assert plan.candidate is not None
    worker.model.behave = model.responding(scores(1.0, 2.0))
    worker.candidate_model.behave = model.responding(b'{"predictions": [3.0, 4.0]}')
    plan = changed(plan, candidate=changed(plan.candidate, contract=MLFLOW))
    await worker.start(plan)

    async def told() -> list[float]:
        if door == "oip":
            return (await worker.infer(body=request(), unit="u")).json["outputs"][0]["data"]
        return (await score(worker, {"inputs": ROWS})).json["predictions"]

    assert await told() == [3.0, 4.0]
    worker.candidate_model.behave = model.responding(b"", "500 No")
    assert await told() == [1.0, 2.0]
    assert worker.candidate_model.received[0].path == "/invocations"
    assert worker.model.received[0].path == "/v2/models/served/infer"
    assert worker.journal.last.reason == "status_5xx"


# --- binary -----------------------------------------------------------------------------------


async def learnt(worker) -> None:
    """Until the worker has asked what the server speaks."""
    await worker.until(lambda: worker.model.health > 0)


async def test_binary_becomes_json_for_a_server_that_does_not_speak_it(worker, model):
    worker.model.behave = model.responding(scores(1.0, 2.0))
    await worker.start(worker.plan(contract=OIP))
    body, headers = packed(*FLAT, wants=True)
    for _ in range(3):
        reply = await worker.infer(body=body, headers=headers)
        assert reply.status == 200
        described, values = unpacked(reply)
        assert values == [1.0, 2.0]
        assert described["model_name"] == "digits"
        await learnt(worker)
    for got in worker.model.received:
        assert "inference-header-content-length" not in got.headers
        sent = msgspec.json.decode(got.body)
        assert sent["inputs"][0]["data"] == FLAT
        assert "parameters" not in sent
    assert worker.model.health == 1  # asked once


async def test_binary_passes_once_the_server_is_known_to_speak_it(worker, model):
    worker.model.documents["/v2"] = SPEAKS
    await worker.start(worker.plan(contract=OIP))
    body, headers = packed(*FLAT, wants=True)
    worker.model.behave = model.responding(scores(1.0, 2.0))
    assert unpacked(await worker.infer(body=body, headers=headers))[1] == [1.0, 2.0]
    await learnt(worker)
    worker.model.behave = packed_scores(model, 1.0, 2.0)
    async with asyncio.timeout(10):
        while True:
            reply = await worker.infer(body=body, headers=headers)
            described, values = unpacked(reply)
            assert values == [1.0, 2.0]
            assert (described["model_name"], described["model_version"]) == ("digits", "1")
            if worker.model.received[-1].body == body:
                break
    got = worker.model.received[-1]
    assert (
        got.headers["inference-header-content-length"] == headers["Inference-Header-Content-Length"]
    )
    assert got.headers["content-type"] == "application/octet-stream"
    assert worker.journal.last.features


async def test_who_does_not_ask_for_binary_gets_json(worker, model):
    worker.model.behave = packed_scores(model, 1.0, 2.0)
    await worker.start(worker.plan(contract=OIP))
    body, headers = packed(*FLAT)
    for asked in ({"body": body, "headers": headers}, {"body": request()}):
        reply = await worker.infer(**asked)
        assert reply.headers["content-type"] == "application/json"
        assert reply.json["outputs"][0]["data"] == [1.0, 2.0]
        assert "inference-header-content-length" not in reply.headers


async def test_json_may_ask_for_an_answer_in_binary(worker, model):
    worker.model.behave = model.responding(scores(1.0, 2.0))
    await worker.start(worker.plan(contract=OIP))
    wishes = (
        {"parameters": {"binary_data_output": True}},
        {"outputs": [{"name": "score", "parameters": {"binary_data": True}}]},
    )
    for wish in wishes:
        reply = await worker.infer(body=request(**wish))
        assert unpacked(reply)[1] == [1.0, 2.0]
    reply = await worker.infer(body=request(parameters={"binary_data_output": "yes"}))
    assert (reply.status, reply.error) == (400, "parameters.binary_data_output: send true or false")


async def test_scoring_reaches_a_server_that_answers_in_binary(worker, model):
    worker.model.behave = packed_scores(model, 1.0, 2.0)
    await worker.start(worker.plan(contract=OIP))
    assert (await score(worker, {"inputs": ROWS})).json == {"predictions": [1.0, 2.0]}


async def test_binary_reaches_a_server_of_scoring(worker, model):
    worker.model.behave = model.responding(b'{"predictions": [1.0, 2.0]}')
    await worker.start(worker.plan(contract=MLFLOW))
    body, headers = packed(*FLAT, wants=True)
    assert unpacked(await worker.infer(body=body, headers=headers))[1] == [1.0, 2.0]
    assert msgspec.json.decode(worker.model.received[0].body) == {"inputs": ROWS}
    assert worker.model.health == 0


@pytest.mark.parametrize("alone", [True, False])
async def test_nan_passes_to_a_server_that_speaks_binary(worker, model, alone):
    worker.model.documents["/v2"] = SPEAKS
    worker.model.behave = packed_scores(model, math.nan, 2.0)
    await worker.start(worker.plan(contract=OIP))
    body, headers = packed(math.nan, math.inf, 1.0, 2.0, wants=True)
    replies = await asyncio.gather(
        *[worker.infer(body=body, headers=headers) for _ in range(1 if alone else 5)]
    )
    for reply in replies:
        assert reply.status == 200
        first, second = unpacked(reply)[1]
        assert math.isnan(first)
        assert second == 2.0
    assert {got.body for got in worker.model.received} == {body}
    assert worker.model.health == 1


@pytest.mark.parametrize("contract", [OIP, MLFLOW], ids=["oip", "mlflow"])
async def test_nan_is_refused_where_it_would_have_to_become_json(worker, contract):
    await worker.start(worker.plan(contract=contract, candidate=True))
    body, headers = packed(math.nan, 1.0)
    for _ in range(2):
        reply = await worker.infer(body=body, headers=headers, unit="u")
        assert reply.status == 400
        assert "which JSON can't carry" in reply.error
    record = worker.journal.last
    assert (record.outcome, record.reason) == (Outcome.CLIENT_FAULT, "invalid_input")
    assert worker.model.received == worker.candidate_model.received == []


async def test_a_candidate_that_can_not_be_told_nan_is_narrower_than_stable(worker, model):
    worker.model.documents["/v2"] = SPEAKS
    worker.model.behave = packed_scores(model, 1.0)
    await worker.start(worker.plan(contract=OIP, candidate=True))
    body, headers = packed(math.nan, 1.0)
    for _ in range(2):
        reply = await worker.infer(body=body, headers=headers, unit="u")
        assert (reply.status, reply.headers["x-shipworthy-release"]) == (200, "digits@1")
        record = worker.journal.last
        assert (record.outcome, record.reason) == (Outcome.FAILURE, "narrowed_contract")


async def test_nan_for_a_server_that_is_not_there_is_not_the_clients_fault(worker):
    await worker.model.stop()
    await worker.start(worker.plan(contract=OIP))
    body, headers = packed(math.nan, 1.0)
    reply = await worker.infer(body=body, headers=headers)
    assert reply.status == 502
    record = worker.journal.last
    assert (record.outcome, record.reason) == (Outcome.FAILURE, "unreachable")


async def test_an_answer_with_nan_needs_a_client_that_takes_binary(worker, model):
    worker.model.behave = packed_scores(model, math.nan, 2.0)
    plan = worker.plan(contract=OIP, shield=model.Shield(retry_burst=0))
    await worker.start(plan)
    reply = await worker.infer(body=request())
    assert reply.status == 502
    assert "which JSON can't carry" in reply.error
    assert (await score(worker, {"inputs": ROWS})).status == 502
    assert worker.journal.last.reason == "against_contract"
    reply = await worker.infer(body=request(parameters={"binary_data_output": True}))
    assert math.isnan(unpacked(reply)[1][0])


@pytest.mark.parametrize(
    ("length", "says"),
    [
        ("x", "send the length of the body's JSON part"),
        ("0", "a body without JSON is not accepted"),
        ("9999", "9999 bytes of JSON are announced"),
        ("20", "JSON"),
    ],
)
async def test_lengths_that_lie_are_refused(worker, length, says):
    await worker.start(worker.plan(contract=OIP))
    body, headers = packed(*FLAT)
    headers["Inference-Header-Content-Length"] = length
    reply = await worker.infer(body=body, headers=headers)
    assert reply.status == 400
    assert says in reply.error
    assert worker.journal.last.outcome is Outcome.CLIENT_FAULT


@pytest.mark.parametrize("length", ["x", "0", "9999", "20"])
async def test_servers_whose_lengths_lie_are_charged(worker, model, length):
    body, _ = oip_binary.encode_response(
        [TensorValues("score", "FP32", (2,), [1.0, 2.0])],
        model_name="served",
        binary=frozenset({"score"}),
    )
    said = f"Inference-Header-Content-Length: {length}\r\n"
    worker.model.behave = model.responding(body, headers=said)
    await worker.start(worker.plan(contract=OIP, shield=model.Shield(retry_burst=0)))
    assert (await worker.infer(body=request())).status == 502
    assert worker.journal.last.reason == "broken"


# --- second attempts --------------------------------------------------------------------------


@pytest.fixture
def hedged(worker, model):
    """Make plans of a release with two servers: the candidate's is the second of them."""
    worker.model.behave = model.responding(model.answer_of(1))
    worker.candidate_model.behave = model.responding(model.answer_of(2))

    def plan(*, ratio: float = 1.0, after: float = 0.1, **changes: Any):
        made = worker.plan(hedge=Hedge(after=after, ratio=ratio), **changes)
        urls = (worker.model.url, worker.candidate_model.url)
        both = tuple(Endpoint(url=url) for url in urls)
        slow = model.Deadlines(connect=5.0, attempt=20.0, total=30.0)
        return changed(made, stable=changed(made.stable, endpoints=both), deadlines=slow)

    return plan


def one_slow(worker, model, *, seconds: float = 60.0) -> Any:
    """Whichever server is asked first is slow."""
    asked: list[str] = []

    def behaving(name: str, label: int) -> Any:
        async def behave(writer: asyncio.StreamWriter) -> None:
            asked.append(name)
            if len(asked) == 1:
                await asyncio.sleep(seconds)
            await model.responding(model.answer_of(label))(writer)

        return behave

    worker.model.behave = behaving("first", 1)
    worker.candidate_model.behave = behaving("second", 2)
    return asked


def label(reply) -> int:
    return reply.json["outputs"][0]["data"][0]


def hung_up(worker) -> int:
    return worker.model.hung_up + worker.candidate_model.hung_up


async def test_a_second_server_is_asked_when_the_first_is_slow(worker, model, hedged):
    asked = one_slow(worker, model)
    await worker.start(hedged())
    begun = time.monotonic()
    reply = await worker.infer()
    assert time.monotonic() - begun >= 0.1
    assert reply.status == 200
    assert len(set(asked)) == 2
    assert label(reply) == {"first": 1, "second": 2}[asked[1]]
    await worker.until(lambda: hung_up(worker) == 1)  # the loser was cancelled
    record = worker.journal.last
    assert (record.outcome, record.attempts) == (Outcome.SUCCESS, 2)
    assert len(worker.journal.calls) == 1


async def test_the_first_one_may_still_win(worker, model, hedged):
    asked = one_slow(worker, model, seconds=0.4)
    late = worker.candidate_model.behave, worker.model.behave

    def slower(behave):
        async def wait(writer: asyncio.StreamWriter) -> None:
            if asked:
                asked.append("late")
                await asyncio.sleep(60)
            await behave(writer)

        return wait

    worker.candidate_model.behave, worker.model.behave = slower(late[0]), slower(late[1])
    await worker.start(hedged())
    reply = await worker.infer()
    assert label(reply) == {"first": 1, "second": 2}[asked[0]]
    await worker.until(lambda: hung_up(worker) == 1)


async def test_an_answer_beats_a_failure(worker, model, hedged):
    asked = one_slow(worker, model, seconds=0.5)
    late = worker.candidate_model.behave, worker.model.behave

    def failing(behave):
        async def fail(writer: asyncio.StreamWriter) -> None:
            await (model.resetting(writer) if asked else behave(writer))

        return fail

    worker.candidate_model.behave, worker.model.behave = failing(late[0]), failing(late[1])
    await worker.start(hedged())
    reply = await worker.infer()
    assert (reply.status, worker.journal.last.outcome) == (200, Outcome.SUCCESS)


async def test_a_quick_answer_needs_no_second_attempt(worker, hedged):
    await worker.start(hedged(after=10.0))
    for _ in range(4):
        assert (await worker.infer()).status == 200
    assert len(worker.model.received) == len(worker.candidate_model.received) == 2


async def test_a_quick_failure_is_no_reason_for_one(worker, model, hedged):
    worker.model.behave = worker.candidate_model.behave = model.responding(b"", "500 No")
    await worker.start(hedged(after=10.0, shield=model.Shield(retry_burst=0)))
    assert (await worker.infer()).status == 502
    assert worker.journal.last.attempts == 1


async def test_second_attempts_are_a_share_of_first_ones(worker, model, hedged):
    worker.model.behave = worker.candidate_model.behave = model.streaming(0.2, chunked=False)

    async def slow(writer: asyncio.StreamWriter) -> None:
        await asyncio.sleep(0.2)
        await model.responding(model.answer_of(1))(writer)

    worker.model.behave = worker.candidate_model.behave = slow
    await worker.start(hedged(ratio=0.0, after=0.02))
    replies = await asyncio.gather(*[worker.infer() for _ in range(16)])
    assert {reply.status for reply in replies} == {200}
    attempts = sum(call.attempts for call in worker.journal.calls)
    assert attempts == 16 + 10  # the burst, and nothing more


@pytest.mark.parametrize("why", ["side_effects", "alone", "off"])
async def test_where_asking_twice_may_do_harm_or_is_not_wanted_there_is_one(
    worker, model, hedged, why
):
    async def slow(writer: asyncio.StreamWriter) -> None:
        await asyncio.sleep(0.3)
        await model.responding(model.answer_of(1))(writer)

    worker.model.behave = worker.candidate_model.behave = slow
    plan = hedged(after=0.05)
    if why == "side_effects":
        inputs, outputs = model.contract.inputs, model.contract.outputs
        plan = changed(plan, stable=changed(plan.stable, contract=Contract(inputs, outputs)))
    elif why == "alone":
        plan = changed(plan, stable=changed(plan.stable, endpoints=plan.stable.endpoints[:1]))
    else:
        plan = changed(plan, hedge=None)
    await worker.start(plan)
    assert (await worker.infer()).status == 200
    assert worker.journal.last.attempts == 1
    assert len(worker.model.received) + len(worker.candidate_model.received) == 1


async def test_a_client_that_hangs_up_cancels_both(worker, model, hedged):
    worker.model.behave = worker.candidate_model.behave = model.hanging
    await worker.start(hedged())
    asking = asyncio.create_task(worker.infer())
    await worker.until(lambda: worker.model.open + worker.candidate_model.open == 2)
    asking.cancel()
    await asyncio.gather(asking, return_exceptions=True)
    await worker.until(lambda: hung_up(worker) == 2)
    await worker.until(lambda: bool(worker.journal.calls))
    assert worker.journal.last.reason == "client_gone"


# --- bounds of servers ------------------------------------------------------------------------


@pytest.mark.parametrize(("index", "share"), [(0, 2), (1, 2), (2, 1)])
async def test_a_servers_concurrency_is_shared_out_to_the_workers(worker, model, index, share):
    worker.model.behave = model.hanging
    plan = worker.plan(deadlines=model.Deadlines(attempt=60.0, total=60.0))
    endpoint = Endpoint(url=worker.model.url, concurrency=5)
    plan = changed(plan, stable=changed(plan.stable, endpoints=(endpoint,)))
    await worker.start(plan, workers=3, worker_index=index, queue_seconds=0.1)
    asking = [asyncio.create_task(worker.infer()) for _ in range(share)]
    await worker.until(lambda: worker.model.open == share)
    refused = await worker.infer()
    assert (refused.status, worker.journal.last.reason) == (503, "full")
    assert len(worker.model.received) == share
    for task in asking:
        task.cancel()
    await asyncio.gather(*asking, return_exceptions=True)
    await worker.until(lambda: worker.model.open == 0)
    worker.model.behave = model.responding(model.answer_of(1))
    assert (await worker.infer()).status == 200


async def test_who_comes_when_a_server_is_full_waits_for_a_place(worker, model):
    going = asyncio.Event()

    async def held(writer: asyncio.StreamWriter) -> None:
        await going.wait()
        await model.responding(model.answer_of(1))(writer)

    worker.model.behave = held
    plan = worker.plan(deadlines=model.Deadlines(attempt=60.0, total=60.0))
    endpoint = Endpoint(url=worker.model.url, concurrency=1)
    plan = changed(plan, stable=changed(plan.stable, endpoints=(endpoint,)))
    await worker.start(plan, queue_seconds=30.0)
    asking = [asyncio.create_task(worker.infer()) for _ in range(3)]
    await worker.until(lambda: worker.model.open == 1)
    going.set()
    replies = await asyncio.gather(*asking)
    assert [reply.status for reply in replies] == [200, 200, 200]
