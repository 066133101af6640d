"""Mirrors: copies that are sampled, bounded and compared, and that nobody waits for."""

import asyncio
import hashlib
from typing import Any

import msgspec
import pytest

from shipworthy.domain.contract import Contract
from shipworthy.domain.plan import Capture, Endpoint, Mirror, Price
from shipworthy.domain.records import MirrorRecord, Outcome
from shipworthy.stores.limits import UsageTable

MARK = "x-shipworthy-mirror"


def changed(it, **changes: Any):
    return msgspec.structs.replace(it, **changes)


def copies(worker) -> list[Any]:
    return [one for one in worker.journal.records if isinstance(one, MirrorRecord)]


async def copied(worker, times: int = 1) -> Any:
    """The newest copy's record, once there are so many."""
    await worker.until(lambda: len(copies(worker)) >= times, 10)
    assert len(copies(worker)) == times
    return copies(worker)[-1]


async def counted(worker, outcome: str) -> float:
    text = (await worker.ask("GET", "/metrics", key=None)).body.decode()
    lines = [line for line in text.splitlines() if line.startswith("shipworthy_gateway_mirror")]
    found = [float(line.rpartition(" ")[2]) for line in lines if f'"{outcome}"' in line]
    return sum(found)


@pytest.fixture
def mirrored(worker, model):
    """Make plans whose stable release is mirrored by the candidate's server."""

    def plan(contract: Contract = model.contract, **changes: Any):
        rules: dict[str, Any] = {"share": 1.0}
        for name in ("share", "concurrency", "budget_per_day"):
            if name in changes:
                rules[name] = changes.pop(name)
        arm = worker.arm(7, worker.candidate_model.url, contract=contract)
        arm = changed(arm, served_model="tried", **changes.pop("arm", {}))
        made = worker.plan(contract=changes.pop("stable", contract), **changes)
        return changed(made, mirror=Mirror(arm=arm, **rules))

    return plan


async def test_a_copy_is_sent_marked_and_compared(worker, model, mirrored):
    worker.candidate_model.behave = model.responding(model.answer_of(3))
    await worker.start(mirrored())
    trace = f"00-{'a' * 32}-{'b' * 16}-01"
    reply = await worker.infer(unit="u", headers={"traceparent": trace})
    assert (reply.status, reply.headers["x-shipworthy-release"]) == (200, "digits@1")
    record = await copied(worker)
    [first], [second] = worker.model.received, worker.candidate_model.received
    assert MARK not in first.headers
    assert second.headers[MARK] == "1"
    assert second.headers["traceparent"] == trace
    assert second.path == "/v2/models/tried/infer"
    assert second.body == first.body
    call = worker.journal.last
    assert (record.inference, record.unit, record.asked_at) == (call.id, call.unit, call_at(call))
    assert (record.plan, record.release, record.compared_with) == (
        "digits", "digits@7", "digits@1",
    )  # fmt: skip
    assert (record.outcome, record.reason, record.status) == (Outcome.SUCCESS, "", 200)
    assert (record.agrees, record.difference) == (True, "")
    assert record.seconds > 0
    assert record.response is None
    assert len(worker.journal.calls) == 1


def call_at(call):
    return pytest.approx(call.at, abs=3)


async def test_a_copy_that_says_something_else_disagrees(worker, model, mirrored):
    capture = Capture(payloads="full", max_bytes=60)
    await worker.start(mirrored(capture=capture))
    await worker.infer()
    record = await copied(worker)
    assert (record.agrees, record.difference) == (False, "outputs.label.data[0]")
    assert record.response.startswith(b'{"model_name":"digits",')
    assert len(record.response) == 60 < record.response_bytes
    assert len(record.response_digest) == 64
    assert await counted(worker, "success") == 1


async def test_a_sample_is_copied(worker, mirrored):
    await worker.start(mirrored(share=0.3))
    for draw in (0.31, 0.29, 0.9, 0.0):
        worker.draw = draw
        await worker.infer()
    await copied(worker, 2)
    assert len(worker.candidate_model.received) == 2


async def test_bodies_of_copies_are_kept_of_a_sample_too(worker, mirrored):
    await worker.start(mirrored(capture=Capture(payloads="sampled", sample=0.2)))
    for draw in (0.1, 0.5):
        worker.draw = draw
        await worker.infer()
        await worker.until(lambda: len(copies(worker)) == len(worker.journal.calls))
    assert [one.response is not None for one in copies(worker)] == [True, False]


async def test_what_may_do_something_in_the_world_gets_no_copies(worker, model, mirrored):
    acting = Contract(inputs=model.contract.inputs, outputs=model.contract.outputs)
    await worker.start(mirrored(acting, stable=model.contract))
    await worker.infer()
    await worker.infer()
    assert worker.candidate_model.received == []
    assert copies(worker) == []


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("resetting", "broken"),
        ("garbage", "broken"),
        ("hanging", "timeout"),
        ("hanging_midway", "timeout"),
        ("refuses", "unreachable"),
        ("error", "status_5xx"),
        ("html", "broken"),
        ("other", "against_contract"),
    ],
)
async def test_a_mirror_that_fails_hurts_nobody(worker, model, mirrored, name, reason):
    others = {
        "error": model.responding(b"", "500 No"),
        "html": model.responding(b"<html>"),
        "other": model.responding(model.answer_of(name="other")),
    }
    deadlines = model.Deadlines(connect=5.0, attempt=0.5, total=5.0)
    await worker.start(mirrored(deadlines=deadlines))
    if name == "refuses":
        await worker.candidate_model.stop()
    else:
        worker.candidate_model.behave = others.get(name) or getattr(model, name)
    reply = await worker.infer()
    assert reply.status == 200
    assert worker.journal.last.outcome is Outcome.SUCCESS
    record = await copied(worker)
    assert (record.outcome, record.reason) == (Outcome.FAILURE, reason)
    assert (record.agrees, record.response) == (None, None)
    assert await worker.metric("shipworthy_gateway_errors_total") == 0


async def test_answers_do_not_wait_for_copies_and_copies_are_bounded(worker, model, mirrored):
    worker.candidate_model.behave = model.hanging
    deadlines = model.Deadlines(attempt=60.0, total=60.0)
    await worker.start(mirrored(concurrency=2, deadlines=deadlines))
    async with asyncio.timeout(20):
        for _ in range(5):
            assert (await worker.infer()).status == 200
    await worker.until(lambda: worker.candidate_model.open == 2)
    assert len(worker.candidate_model.received) == 2
    assert await counted(worker, "no_room") == 3
    assert copies(worker) == []


async def test_a_worker_that_ends_gives_its_copies_up(worker, model, mirrored):
    worker.candidate_model.behave = model.hanging
    await worker.start(mirrored(deadlines=model.Deadlines(attempt=60.0, total=60.0)))
    await worker.infer()
    await worker.until(lambda: worker.candidate_model.open == 1)
    async with asyncio.timeout(20):
        await worker.stop()
    await worker.until(lambda: worker.candidate_model.open == 0)
    assert copies(worker) == []


async def test_copies_have_a_budget_of_their_own(worker, model, mirrored, tmp_path):
    worker.outside["limits"] = UsageTable(tmp_path / "limits", worker.clock)
    price = Price(per_call=0.4)
    await worker.start(mirrored(budget_per_day=1.0, arm={"price": price}))
    for times in (1, 2):
        await worker.infer()
        assert (await copied(worker, times)).cost == 0.4
    reply = await worker.infer()
    assert reply.status == 200
    assert "x-shipworthy-budget-remaining" not in reply.headers
    await worker.until(lambda: len(worker.journal.calls) == 3)
    async with asyncio.timeout(10):
        while await counted(worker, "no_budget") != 1:  # noqa: ASYNC110  # it sets no event
            await asyncio.sleep(0.01)
    assert len(worker.candidate_model.received) == 2


async def test_a_copy_that_never_reached_its_server_costs_nothing(
    worker, model, mirrored, tmp_path
):
    worker.outside["limits"] = UsageTable(tmp_path / "limits", worker.clock)
    await worker.candidate_model.stop()
    await worker.start(mirrored(budget_per_day=1.0, arm={"price": Price(per_call=0.6)}))
    for times in (1, 2, 3):
        await worker.infer()
        record = await copied(worker, times)
        assert (record.reason, record.cost) == ("unreachable", None)


async def test_what_a_mirror_may_not_be_asked_is_not_sent(worker, model, mirrored):
    less = Contract(protocol="openai", side_effects="none", operations=("embeddings",))
    worker.model.behave = model.responding(model.chat_answer())
    await worker.start(mirrored(less, stable=model.language))
    assert (await worker.chat()).status == 200
    record = await copied(worker)
    assert (record.outcome, record.reason) == (Outcome.FAILURE, "narrowed_contract")
    assert record.difference.startswith("model: does not do chat")
    assert worker.candidate_model.received == []


async def test_refused_requests_of_clients_get_no_copy(worker, mirrored):
    await worker.start(mirrored())
    assert (await worker.infer(body=b"{")).status == 400
    assert (await worker.infer(body={"inputs": []})).status == 400
    assert (await worker.infer()).status == 200
    await copied(worker)
    assert len(worker.candidate_model.received) == 1


async def test_what_the_server_refused_a_mirror_may_refuse_too(worker, model, mirrored):
    refusing = model.responding(b'{"error": {"message": "no"}}', "400 Bad Request")
    worker.model.behave = worker.candidate_model.behave = refusing
    await worker.start(mirrored(model.language))
    assert (await worker.chat()).status == 400
    record = await copied(worker)
    assert (record.outcome, record.reason) == (Outcome.CLIENT_FAULT, "refused_input")
    worker.model.behave = model.responding(model.chat_answer())
    await worker.chat()
    record = await copied(worker, 2)
    assert (record.outcome, record.reason) == (Outcome.FAILURE, "status_4xx")


# --- language models --------------------------------------------------------------------------


async def test_answers_of_language_models_are_compared(worker, model, mirrored):
    worker.model.behave = model.responding(model.chat_answer("a b"))
    worker.candidate_model.behave = model.responding(model.chat_answer("a  b\n", id="other"))
    price = Price(per_1k_input=1.0, per_1k_output=1.0)
    await worker.start(mirrored(model.language, arm={"price": price}))
    await worker.chat()
    record = await copied(worker)
    assert (record.agrees, record.outcome) == (True, Outcome.SUCCESS)
    assert (record.input_tokens, record.output_tokens) == (9, 2)
    assert record.cost == pytest.approx(0.011)
    assert worker.journal.last.cost is None


async def test_streams_are_copied_as_streams_and_compared(worker, model, mirrored):
    worker.model.behave = model.telling("the ", "same")
    worker.candidate_model.behave = model.telling("the same")
    await worker.start(mirrored(model.language, capture=Capture(payloads="full")))
    reply = await worker.chat(stream=True)
    assert reply.events[-1] == model.DONE
    record = await copied(worker)
    assert (record.outcome, record.agrees) == (Outcome.SUCCESS, True)
    assert msgspec.json.decode(worker.candidate_model.received[0].body)["stream"] is True
    assert record.output_tokens == 2
    assert record.response.endswith(model.DONE)
    assert b'"model":"digits"' in record.response
    worker.candidate_model.behave = model.telling("another")
    await worker.chat(stream=True)
    record = await copied(worker, 2)
    assert (record.agrees, record.difference) == (False, "choices[0].message.content")


async def test_streams_are_compared_whatever_is_captured_of_them(worker, model, mirrored):
    worker.model.behave = worker.candidate_model.behave = model.telling("x" * 5000)
    await worker.start(mirrored(model.language, capture=Capture(payloads="full", max_bytes=100)))
    reply = await worker.chat(stream=True)
    record = await copied(worker)
    assert record.agrees is True
    assert len(record.response) == 100
    assert len(worker.journal.last.response) == 100
    assert worker.journal.last.response_digest == hashlib.sha256(reply.body).hexdigest()


async def test_a_stream_may_go_on_for_longer_than_an_attempt(worker, model, mirrored):
    worker.model.behave = model.telling("abc")
    worker.candidate_model.behave = model.streaming(
        model.chunk("a"), 0.4, model.chunk("b"), 0.4, model.chunk("c"), model.LAST, model.DONE
    )
    deadlines = model.Deadlines(attempt=0.5, total=5.0, idle=5.0)
    await worker.start(mirrored(model.language, deadlines=deadlines))
    await worker.chat(stream=True)
    record = await copied(worker)
    assert (record.outcome, record.agrees) == (Outcome.SUCCESS, True)
    assert record.seconds > 0.7


@pytest.mark.parametrize(
    ("name", "reason"),
    [("closing", "broken"), ("hanging", "idle"), ("error", "error_event"), ("none", "broken")],
)
async def test_streams_that_fail_hurt_nobody(worker, model, mirrored, name, reason):
    worker.model.behave = model.telling("abc")
    error = model.event_of({"error": {"message": "boom"}})
    behaviours = {
        "error": model.streaming(model.chunk("a"), error),
        "none": model.streaming(model.chunk()),
    }
    failing = behaviours.get(name) or model.streaming(
        model.chunk("a"), then=getattr(model, name, None)
    )
    worker.candidate_model.behave = failing
    await worker.start(mirrored(model.language, deadlines=model.Deadlines(idle=0.4)))
    assert (await worker.chat(stream=True)).events[-1] == model.DONE
    record = await copied(worker)
    assert (record.outcome, record.reason, record.agrees) == (Outcome.FAILURE, reason, None)
    await worker.until(lambda: worker.candidate_model.open == 0)


async def test_a_stream_that_the_client_left_is_copied_but_not_compared(worker, model, mirrored):
    worker.model.behave = model.streaming(model.chunk("a"), then=model.hanging)
    worker.candidate_model.behave = model.telling("abc")
    await worker.start(mirrored(model.language))
    async with worker.watching() as response:
        await response.content.readuntil(b"\n\n")
        response.close()
    record = await copied(worker)
    assert worker.journal.last.reason == "client_gone"
    assert (record.outcome, record.agrees) == (Outcome.SUCCESS, None)


async def test_a_mirrors_endpoint_has_its_own_bound(worker, model, mirrored):
    plan = mirrored(deadlines=model.Deadlines(attempt=60.0, total=60.0))
    endpoint = Endpoint(url=worker.candidate_model.url, concurrency=1)
    assert plan.mirror is not None
    arm = changed(plan.mirror.arm, endpoints=(endpoint,))
    worker.candidate_model.behave = model.hanging
    await worker.start(changed(plan, mirror=changed(plan.mirror, arm=arm)))
    await worker.infer()
    await worker.until(lambda: worker.candidate_model.open == 1)
    await worker.infer()
    record = await copied(worker)
    assert (record.reason, record.status) == ("full", 0)
