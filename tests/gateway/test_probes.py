"""The probes, against a worker that does well and ones that do not."""

from typing import Any

import aiohttp
import msgspec
import pytest

from shipworthy.domain.contract import Contract, Tensor
from shipworthy.domain.findings import Verdict
from shipworthy.domain.keys import new_key
from shipworthy.errors import Unavailable
from shipworthy.gateway.probes import Door, Strangers, probe_answers, probe_auth, probe_contract
from shipworthy.ports import HttpResponse


class Http:
    """The HTTP port; `tamper` may change what comes back."""

    def __init__(self) -> None:
        self.tamper = lambda asked, answer: answer

    async def request(self, method, url, *, headers=None, body=None, timeout=10.0):  # noqa: ASYNC109
        try:
            async with (
                aiohttp.ClientSession() as session,
                session.request(method, url, headers=headers, data=body) as response,
            ):
                named = {name.lower(): value for name, value in response.headers.items()}
                answer = HttpResponse(
                    status=response.status, headers=named, body=await response.read()
                )
        except aiohttp.ClientError as error:
            raise Unavailable(str(error)) from error
        return self.tamper(headers, answer)


@pytest.fixture
def http():
    return Http()


@pytest.fixture
def door(worker, model):
    async def answer(writer):
        # as many rows as the request that is being answered
        asked = msgspec.json.decode(worker.model.received[-1].body)
        rows = asked["inputs"][0]["shape"][0]
        body = model.answer_of(shape=(rows,), data=[3] * rows)
        await model.responding(body)(writer)

    worker.model.behave = answer

    def made(**changes):
        settings: dict[str, Any] = {
            "base_url": worker.url + "/",
            "plan": "digits",
            "key": worker.keys["client"],
            "release": "digits@1",
            "digest": worker.snapshot.plans["digits"].stable.digest,
            "contract": model.contract,
            "sample": msgspec.json.encode(model.request_of(rows=3)),
            **changes,
        }
        return Door(**settings)

    return made


def strangers(worker, **changes):
    keys = {
        "wrong": new_key("nobody", bytes(32)),
        "revoked": new_key("gone", bytes(32)),
        "foreign": worker.keys["other"],
    }
    return Strangers(**{**keys, **changes})


async def test_all_pass_on_a_worker_that_does_well(worker, http, door):
    await worker.start()
    found = [
        await probe_auth(door(), http, strangers=strangers(worker), now=10.0),
        await probe_contract(door(), http, now=10.0),
        await probe_answers(door(), http, now=10.0),
    ]
    assert [finding.verdict for finding in found] == [Verdict.PASS] * 3, found
    assert [finding.check for finding in found] == [
        "auth.required", "contract.enforced", "answers.returned",
    ]  # fmt: skip
    assert all(finding.at == 10.0 < (finding.expires or 0) for finding in found)
    auth, contract, answers = found
    assert [call["status"] for call in auth.evidence["calls"]] == [200, 401, 401, 401, 401, 403]
    assert len(contract.evidence["calls"]) > 20
    assert contract.observed == f"all {len(contract.evidence['calls'])} calls ended as they should"
    assert answers.evidence["inferences"][0] in {record.id for record in worker.journal.calls}
    assert answers.evidence["digest"] == door().digest
    assert worker.keys["client"] not in str(found)


async def test_an_open_door_fails(worker, http, door):
    await worker.start()
    asked = strangers(worker, foreign=worker.keys["trusted"])
    finding = await probe_auth(door(), http, strangers=asked, now=0.0)
    assert finding.verdict is Verdict.FAIL
    assert finding.observed == "the key of another model: 200 with the model's outputs"


async def test_where_no_key_works_nothing_is_proven(worker, http, door):
    await worker.start()
    shut = door(key=new_key("unknown", bytes(32)))
    finding = await probe_auth(shut, http, strangers=strangers(worker), now=0.0)
    assert finding.verdict is Verdict.INCONCLUSIVE
    assert finding.observed == "a good key: 401 instead of 200"


async def test_a_model_that_fails_at_an_edge_fails_the_contract(worker, http, door, model):
    await worker.start()
    looked_at, answers = door(), worker.model.behave

    async def answer(writer):
        asked = msgspec.json.decode(worker.model.received[-1].body)
        if asked["inputs"][0]["shape"][0] == 6:
            await model.responding(b"", "500 No")(writer)
        else:
            await answers(writer)

    worker.model.behave = answer
    finding = await probe_contract(looked_at, http, now=0.0)
    assert finding.verdict is Verdict.FAIL
    assert finding.observed == "6 rows: 502: the model failed"


async def test_a_server_that_takes_nonsense_or_fails_on_it_fails(worker, http, door):
    await worker.start()
    looked_at = door()

    def tamper(asked, answer):
        if answer.status == 400:
            status = 200 if b"empty" in answer.body else 500
            return HttpResponse(status=status, headers=answer.headers, body=b"oops")
        return answer

    http.tamper = tamper
    finding = await probe_contract(looked_at, http, now=0.0)
    assert finding.verdict is Verdict.FAIL
    assert "an empty body: 200 instead of a 4xx" in finding.observed
    assert "half a body: 500 instead of a 4xx" in finding.observed
    assert "more" in finding.observed


async def test_a_refusal_without_a_word_fails(worker, http, door):
    await worker.start()
    http.tamper = lambda asked, answer: (
        answer if answer.status == 200 else HttpResponse(status=answer.status, headers={}, body=b"")
    )
    finding = await probe_contract(door(), http, now=0.0)
    assert "400 without a word why" in finding.observed


async def test_another_releases_answer_does_not_count(worker, http, door):
    await worker.start()
    finding = await probe_answers(door(release="digits@2"), http, now=0.0)
    assert finding.verdict is Verdict.FAIL
    assert "request 1: answered by digits@1, not digits@2" in finding.observed
    other = await probe_answers(door(digest="sha256:" + "f" * 64), http, now=0.0)
    assert other.verdict is Verdict.FAIL


async def test_a_sample_that_the_contract_forbids_measures_nothing(worker, http, door):
    await worker.start()
    finding = await probe_contract(door(sample=b'{"inputs": []}'), http, now=0.0)
    assert finding.verdict is Verdict.ERROR
    assert 'inputs: "features" is missing' in finding.observed


async def test_a_gateway_that_does_not_answer_is_no_finding_about_a_release(worker, http, door):
    looked_at = door(base_url="http://127.0.0.1:1")
    for finding in (
        await probe_auth(looked_at, http, strangers=strangers(worker), now=0.0),
        await probe_contract(looked_at, http, now=0.0),
        await probe_answers(looked_at, http, now=0.0),
    ):
        assert finding.verdict is Verdict.ERROR
        assert "the gateway does not answer" in finding.observed


async def test_strings_optional_inputs_and_nested_samples_are_probed_too(worker, http, door):
    contract = Contract(
        inputs=(
            Tensor("text", "BYTES", (-1, 1)),
            Tensor("weight", "INT8", (-1,), optional=True),
        ),
        outputs=(Tensor("label", "INT64", (-1,)), Tensor("score", "FP32", (-1,))),
    )
    sample = msgspec.json.encode(
        {
            "inputs": [
                {"name": "text", "datatype": "BYTES", "shape": [2, 1], "data": [["a"], ["b"]]},
                {"name": "weight", "datatype": "INT8", "shape": [2], "data": [1, 2]},
            ]
        }
    )

    async def answer(writer):
        asked = msgspec.json.decode(worker.model.received[-1].body)
        rows = asked["inputs"][0]["shape"][0]
        names = [output["name"] for output in asked.get("outputs", [])] or ["label", "score"]
        types = {"label": "INT64", "score": "FP32"}
        outputs = [
            {"name": name, "datatype": types[name], "shape": [rows], "data": [1] * rows}
            for name in names
        ]
        body = msgspec.json.encode({"model_name": "served", "outputs": outputs})
        head = f"HTTP/1.1 200 OK\r\ncontent-length: {len(body)}\r\n\r\n".encode()
        writer.write(head + body)

    await worker.start(worker.plan(stable=worker.arm(1, worker.model.url, contract=contract)))
    looked_at = door(contract=contract, sample=sample)
    worker.model.behave = answer
    finding = await probe_contract(looked_at, http, now=0.0)
    assert finding.verdict is Verdict.PASS, finding.observed
