"""The probes of language models, against a worker in front of servers that do well and do not."""

from typing import Any

import msgspec
import pytest
from tests.gateway.test_probes import Http, strangers

from shipworthy.domain.contract import Contract
from shipworthy.domain.findings import Verdict
from shipworthy.gateway.probes import Door, probe_answers, probe_auth, probe_contract
from shipworthy.protocols.questions import plain_request

CHAT = Contract(protocol="openai", operations=("chat",))
STREAM = (
    b'data: {"choices": [{"index": 0, "delta": {"content": "Hello"}}]}\n\n'
    b'data: {"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]}\n\n'
)
DONE = b"data: [DONE]\n\n"


@pytest.fixture
def http():
    return Http()


@pytest.fixture
async def door(worker, model):
    """A door to a language model; `fake.stream` is what it streams."""
    fake = worker.model
    fake.stream = STREAM + DONE

    async def answer(writer):
        asked = msgspec.json.decode(fake.received[-1].body)
        if asked.get("stream"):
            head = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n"
            writer.write(head + b"content-length: %d\r\n\r\n" % len(fake.stream) + fake.stream)
            return
        message = {"role": "assistant", "content": "Hello"}
        body = {"choices": [{"index": 0, "message": message, "finish_reason": "stop"}]}
        await model.responding(msgspec.json.encode(body))(writer)

    async def opened(contract=CHAT, **changes):
        await worker.start(worker.plan(stable=worker.arm(1, fake.url, contract=contract)))
        fake.behave = answer
        settings: dict[str, Any] = {
            "base_url": worker.url,
            "plan": "digits",
            "key": worker.keys["client"],
            "release": "digits@1",
            "digest": worker.snapshot.plans["digits"].stable.digest,
            "contract": contract,
            "sample": plain_request("chat"),
            **changes,
        }
        return Door(**settings)

    return opened


async def test_all_pass_on_a_server_that_does_well(worker, http, door):
    looked_at = await door()
    auth = await probe_auth(looked_at, http, strangers=strangers(worker), now=0.0)
    contract = await probe_contract(looked_at, http, now=0.0)
    answers = await probe_answers(looked_at, http, now=0.0)
    assert [one.verdict for one in (auth, contract, answers)] == [Verdict.PASS] * 3, contract
    calls = {call["call"]: call["status"] for call in contract.evidence["calls"]}
    assert calls["the sample, streamed"] == 200
    assert calls["embeddings"] == 400, "what the contract does not name is refused"
    assert all(call["error"] for call in contract.evidence["calls"] if call["status"] != 200)


@pytest.mark.parametrize(
    ("stream", "said"),
    [
        (STREAM[:60], "ends|broke|failed"),
        (DONE, "says nothing|failed"),
        (b'data: {"error": {"message": "no memory"}}\n\n' + DONE, "no memory|failed"),
    ],
)
async def test_a_stream_that_is_none_fails(worker, http, door, stream, said):
    looked_at = await door()
    worker.model.stream = stream
    finding = await probe_contract(looked_at, http, now=0.0)
    assert finding.verdict is Verdict.FAIL
    assert "the sample, streamed: " in finding.observed
    assert any(word in finding.observed for word in said.split("|")), finding.observed


async def test_a_contract_that_names_no_operations_promises_all(http, door):
    finding = await probe_contract(await door(Contract(protocol="openai")), http, now=0.0)
    assert finding.verdict is Verdict.FAIL
    assert "plain embeddings: " in finding.observed


async def test_an_answer_that_is_none_fails(worker, http, door, model):
    looked_at = await door()
    worker.model.behave = model.responding(b'{"choices": []}')
    finding = await probe_answers(looked_at, http, now=0.0)
    assert finding.verdict is Verdict.FAIL
    assert "502" in finding.observed


async def test_an_open_door_of_a_language_model_fails(worker, http, door):
    asked = strangers(worker, foreign=worker.keys["trusted"])
    finding = await probe_auth(await door(), http, strangers=asked, now=0.0)
    assert finding.observed == "the key of another model: 200 with the model's outputs"
