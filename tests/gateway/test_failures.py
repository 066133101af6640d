"""Models that fail in every way: who answers, who is to blame, and for how long."""

import asyncio
import io
import socket
import time

import msgspec
import pytest

from shipworthy.domain.contract import Contract
from shipworthy.domain.plan import Endpoint
from shipworthy.domain.records import Outcome


def failures(model):
    return {
        "reset": (model.resetting, "broken"),
        "hang": (model.hanging, "timeout"),
        "hang_midway": (model.hanging_midway, "timeout"),
        "garbage": (model.garbage, "broken"),
        "status_500": (model.responding(b"oh no", "500 Oh No"), "status_5xx"),
        "status_503": (model.responding(b"", "503 Unavailable"), "status_5xx"),
        "status_429": (model.responding(b"{}", "429 Too Many"), "status_429"),
        "status_400": (model.responding(b"{}", "400 Bad Request"), "status_4xx"),
        "status_404": (model.responding(b"{}", "404 Not Found"), "status_4xx"),
        "redirect": (
            model.responding(b"", "302 Found", "location: http://example.org/\r\n"),
            "status_other",
        ),
        "no_content": (model.responding(b"", "202 Accepted"), "status_other"),
        "not_json": (model.responding(b"<html>"), "broken"),
        "nan": (
            model.responding(model.answer_of().replace(b"[3]", b"[NaN]")),
            "broken",
        ),
        "lying_length": (model.responding(model.answer_of(), length=5_000), "broken"),
        "compressed": (
            model.responding(model.answer_of(), headers="content-encoding: gzip\r\n"),
            "broken",
        ),
        "too_large": (model.responding(b" " * 20_000), "broken"),
        "wrong_name": (model.responding(model.answer_of(name="other")), "against_contract"),
        "wrong_type": (model.responding(model.answer_of(datatype="FP32")), "against_contract"),
        "wrong_rows": (
            model.responding(model.answer_of(shape=(2,), data=[1, 2])),
            "against_contract",
        ),
        "wrong_count": (model.responding(model.answer_of(data=[1, 2])), "against_contract"),
        "null_value": (model.responding(model.answer_of(data=[None])), "against_contract"),
        "no_output": (
            model.responding(b'{"model_name":"served","outputs":[]}'),
            "against_contract",
        ),
    }


NAMES = [
    "reset", "hang", "hang_midway", "garbage", "status_500", "status_503", "status_429",
    "status_400", "status_404", "redirect", "no_content", "not_json", "nan", "lying_length",
    "compressed", "too_large", "wrong_name", "wrong_type", "wrong_rows", "wrong_count",
    "null_value", "no_output",
]  # fmt: skip
STATUS = {"timeout": 504, "status_429": 503}


@pytest.fixture
def quick(model):
    """Deadlines that make a hang short."""
    return {"deadlines": model.Deadlines(connect=0.3, attempt=0.15, total=1.0)}


@pytest.mark.parametrize("name", NAMES)
async def test_stable_answers_when_the_candidate_fails(worker, model, quick, name):
    behave, reason = failures(model)[name]
    worker.candidate_model.behave = behave
    await worker.start(worker.plan(candidate=True, **quick), max_response=10_000)
    reply = await worker.infer(unit="u")
    assert reply.status == 200
    assert reply.json["outputs"][0]["data"] == [3]
    assert reply.headers["x-shipworthy-release"] == "digits@1"
    assert reply.headers["x-shipworthy-fallback"] == "stable"
    record = worker.journal.last
    assert (record.outcome, record.reason) == (Outcome.FAILURE, reason)
    assert (record.assigned, record.release) == ("candidate", "digits@2")
    assert (record.serving, record.serving_release) == ("stable", "digits@1")
    assert (record.status, record.attempts) == (200, 2)
    assert record.sent == pytest.approx(time.time(), abs=3)
    assert record.attempt_seconds <= record.seconds
    assert await worker.metric('shipworthy_gateway_fallbacks_total{plan="digits",to="stable"}') == 1


@pytest.mark.parametrize("name", NAMES)
async def test_with_nobody_else_the_client_gets_a_clear_error(worker, model, quick, name):
    behave, reason = failures(model)[name]
    worker.model.behave = behave
    await worker.start(
        worker.plan(shield=model.Shield(retry_burst=0), **quick), max_response=10_000
    )
    reply = await worker.infer()
    assert reply.status == STATUS.get(reason, 502)
    assert reply.error
    assert list(reply.json) == ["error"]
    assert "x-shipworthy-release" not in reply.headers
    record = worker.journal.last
    assert (record.outcome, record.reason) == (Outcome.FAILURE, reason)
    assert (record.status, record.serving, record.attempts) == (reply.status, None, 1)


async def test_a_refused_connection_is_a_failure(worker, model):
    plan = worker.plan(candidate=True)
    await worker.candidate_model.stop()
    await worker.start(plan)
    assert (await worker.infer()).headers["x-shipworthy-release"] == "digits@1"
    assert worker.journal.last.reason == "unreachable"
    await worker.model.stop()
    reply = await worker.infer()
    assert (reply.status, reply.error) == (502, "the model can't be reached")
    assert worker.journal.last.serving is None


async def test_an_address_that_swallows_connections_times_out(worker, model):
    dead = worker.arm(1, "http://192.0.2.1:9")
    await worker.start(
        worker.plan(stable=dead, deadlines=model.Deadlines(connect=0.1, attempt=1, total=1))
    )
    reply = await worker.infer()
    assert reply.status in {502, 504}
    assert worker.journal.last.reason in {"connect_timeout", "unreachable"}


async def test_the_error_says_how_the_answer_broke_the_contract(worker, model):
    worker.model.behave = model.responding(model.answer_of(shape=(2,), data=[1, 2]))
    await worker.start()
    reply = await worker.infer()
    assert reply.error == (
        "the model's answer breaks its contract:"
        " outputs[0].shape: the request has 1 rows, the answer 2"
    )


async def test_what_the_model_says_of_a_value_reaches_the_client(worker, model):
    worker.model.behave = model.responding(b'{"error":"features must sum to 1"}', "422 No")
    await worker.start(worker.plan(fallback_message="later"))
    reply = await worker.infer()
    assert (reply.status, reply.error) == (422, "features must sum to 1")
    assert worker.journal.last.outcome is Outcome.FAILURE


async def test_the_fallback_message_answers_when_nothing_else_can(worker, model):
    worker.candidate_model.behave = model.resetting
    worker.model.behave = model.responding(b"", "500 No")
    await worker.start(worker.plan(candidate=True, fallback_message="We are back soon."))
    reply = await worker.infer()
    assert (reply.status, reply.json) == (503, {"error": "We are back soon."})
    assert reply.headers["x-shipworthy-fallback"] == "message"
    assert reply.headers["retry-after"] == "1"
    record = worker.journal.last
    assert (record.serving, record.reason) == ("fallback_message", "broken")


# --- budgets, breaker, ejection ---------------------------------------------------------------


async def test_fallbacks_have_a_budget_of_their_own(worker, model):
    worker.candidate_model.behave = model.responding(b"", "500 No")
    shield = model.Shield(fallback_ratio=0.0, fallback_burst=3, breaker_failures=100)
    await worker.start(worker.plan(candidate=True, shield=shield))
    statuses = [(await worker.infer()).status for _ in range(5)]
    assert statuses == [200, 200, 200, 502, 502]


async def test_retries_are_bounded_and_only_where_asking_twice_changes_nothing(worker, model):
    worker.model.behave = model.responding(b"", "500 No")
    shield = model.Shield(retry_ratio=0.0, retry_burst=2)
    await worker.start(worker.plan(shield=shield), eject_after=1000)
    for _ in range(3):
        await worker.infer()
    assert [record.attempts for record in worker.journal.calls] == [2, 2, 1]
    assert await worker.metric('shipworthy_gateway_retries_total{plan="digits"}') == 2

    acting = Contract(inputs=model.contract.inputs, outputs=model.contract.outputs)
    arm = worker.arm(3, worker.model.url, contract=acting)
    worker.publish(worker.plan(stable=arm, revision=2))
    await asyncio.sleep(0.05)
    await worker.infer()
    assert (worker.journal.last.release, worker.journal.last.attempts) == ("digits@3", 1)


async def test_a_retry_goes_to_another_endpoint_but_the_failure_counts(worker, model):
    worker.model.behave = model.resetting
    urls = (worker.model.url, worker.candidate_model.url)
    await worker.start(worker.plan(stable=worker.arm(1, *urls)))
    replies = [await worker.infer() for _ in range(4)]
    assert {reply.status for reply in replies} == {200}
    outcomes = [record.outcome for record in worker.journal.calls]
    assert sorted(outcomes) == ["failure", "failure", "success", "success"]
    assert all("x-shipworthy-fallback" not in reply.headers for reply in replies)


async def test_what_was_never_sent_may_go_elsewhere_whatever_the_side_effects(worker, model):
    acting = Contract(inputs=model.contract.inputs, outputs=model.contract.outputs)
    urls = (worker.model.url, worker.candidate_model.url)
    await worker.model.stop()
    await worker.start(worker.plan(stable=worker.arm(1, *urls, contract=acting)))
    assert {(await worker.infer()).status for _ in range(4)} == {200}


async def test_the_breaker_stops_calls_to_a_failing_candidate_and_tries_again(worker, model):
    worker.candidate_model.behave = model.responding(b"", "500 No")
    shield = model.Shield(breaker_window=4, breaker_failures=3, breaker_seconds=0.2)
    await worker.start(worker.plan(candidate=True, shield=shield))
    for _ in range(6):
        assert (await worker.infer()).status == 200
    assert len(worker.candidate_model.received) == 3
    assert [record.reason for record in worker.journal.calls] == ["status_5xx"] * 3 + [
        "ejected"
    ] * 3
    held = worker.journal.last
    assert (held.outcome, held.sent, held.attempt_seconds) == (Outcome.FAILURE, None, None)

    await asyncio.sleep(0.21)
    await worker.infer()
    await worker.infer()
    assert len(worker.candidate_model.received) == 4  # the trial failed

    worker.candidate_model.behave = model.responding(model.answer_of(8))
    await asyncio.sleep(0.21)
    for _ in range(3):
        assert (await worker.infer()).headers["x-shipworthy-release"] == "digits@2"


async def test_a_change_of_plan_keeps_the_breaker_and_finishes_calls(worker, model):
    worker.candidate_model.behave = model.responding(b"", "500 No")
    shield = model.Shield(breaker_window=4, breaker_failures=2, breaker_seconds=30)
    plan = worker.plan(candidate=True, shield=shield)
    await worker.start(plan)
    for _ in range(2):
        await worker.infer()

    async def slow(writer):
        await asyncio.sleep(0.2)
        await model.responding(model.answer_of(5))(writer)

    worker.model.behave = slow
    under_way = asyncio.create_task(worker.infer())
    await worker.until(lambda: worker.model.open == 1)
    worker.publish(msgspec.structs.replace(plan, revision=2, weight=9_999))
    await asyncio.sleep(0.05)
    assert (await under_way).json["outputs"][0]["data"] == [5]
    await worker.infer(unit="u")
    assert worker.journal.last.revision == 2
    assert worker.journal.last.reason == "ejected"
    assert len(worker.candidate_model.received) == 2


async def test_an_endpoint_that_keeps_failing_is_set_aside_until_it_is_well(worker, model):
    worker.model.behave = model.responding(b"", "500 No")
    worker.model.healthy = False
    urls = (worker.model.url, worker.candidate_model.url)
    shield = model.Shield(retry_burst=100)
    await worker.start(
        worker.plan(stable=worker.arm(1, *urls), shield=shield), eject_after=2, eject_seconds=0.05
    )
    for _ in range(12):
        assert (await worker.infer()).status == 200
    assert len(worker.model.received) == 2
    assert await worker.metric("shipworthy_gateway_ejections_total") == 1
    await worker.until(lambda: worker.model.health >= 2)
    assert len(worker.model.received) == 2
    assert (await worker.ask("GET", "/v2/models/digits/ready")).status == 200

    worker.model.healthy = True
    worker.model.behave = model.responding(model.answer_of())

    async def back() -> None:
        while len(worker.model.received) < 4:
            await worker.infer()
            await asyncio.sleep(0.01)

    await asyncio.wait_for(back(), 3)


async def test_a_last_endpoint_is_asked_even_when_it_keeps_failing(worker, model):
    worker.model.behave = model.responding(b"", "500 No")
    await worker.start(
        worker.plan(shield=model.Shield(retry_burst=0)), eject_after=2, eject_seconds=30
    )
    for _ in range(3):
        await worker.infer()
    assert len(worker.model.received) == 3
    ready = await worker.ask("GET", "/v2/models/digits/ready")
    assert (ready.status, ready.json["ready"]) == (503, False)
    worker.model.behave = model.responding(model.answer_of())
    assert (await worker.infer()).status == 200


async def test_the_endpoint_with_the_fewest_calls_under_way_is_asked(worker, model):
    worker.model.behave = model.hanging
    urls = (worker.model.url, worker.candidate_model.url)
    await worker.start(worker.plan(stable=worker.arm(1, *urls)))
    stuck = asyncio.create_task(worker.infer())
    if not await _opens(worker):
        await stuck  # the free one was first in turn
        stuck = asyncio.create_task(worker.infer())
        assert await _opens(worker)
    for _ in range(4):
        assert (await worker.infer()).status == 200
    assert len(worker.model.received) == 1
    stuck.cancel()


async def _opens(worker):
    try:
        await worker.until(lambda: worker.model.open == 1, 0.2)
    except TimeoutError:
        return False
    return True


# --- bounds -----------------------------------------------------------------------------------


async def test_too_many_calls_wait_in_a_bounded_line_then_hear_503(worker, model):
    release = asyncio.Event()

    async def held(writer):
        await release.wait()
        await model.responding(model.answer_of())(writer)

    worker.model.behave = held
    await worker.start(max_in_flight=2, max_queued=1, queue_seconds=1.0)
    calls = [asyncio.create_task(worker.infer()) for _ in range(3)]
    await worker.until(lambda: worker.model.open == 2)
    await asyncio.sleep(0.02)
    over = await worker.infer()
    assert (over.status, over.headers["retry-after"]) == (503, "1")
    assert "too many requests are waiting" in over.error
    assert worker.journal.last.reason == "full"
    assert worker.journal.last.outcome is Outcome.FAILURE
    release.set()
    assert [reply.status for reply in await asyncio.gather(*calls)] == [200] * 3


async def test_waiting_in_line_ends(worker, model):
    worker.model.behave = model.hanging
    await worker.start(max_in_flight=1, queue_seconds=0.05)
    stuck = asyncio.create_task(worker.infer())
    await worker.until(lambda: worker.model.open == 1)
    assert (await worker.infer()).status == 503
    stuck.cancel()


async def test_a_full_candidate_is_replaced_by_stable(worker, model):
    worker.candidate_model.behave = model.hanging
    await worker.start(worker.plan(candidate=True), max_in_flight=1, max_queued=0)
    stuck = asyncio.create_task(worker.infer())
    await worker.until(lambda: worker.candidate_model.open == 1)
    assert (await worker.infer()).headers["x-shipworthy-release"] == "digits@1"
    assert worker.journal.last.reason == "full"
    stuck.cancel()


async def test_the_total_deadline_bounds_all_attempts(worker, model):
    worker.model.behave = worker.candidate_model.behave = model.hanging
    deadlines = model.Deadlines(connect=0.5, attempt=0.2, total=0.3)
    await worker.start(worker.plan(candidate=True, deadlines=deadlines))
    began = time.monotonic()
    reply = await worker.infer()
    assert reply.status == 504
    # Without the bound on all of them, attempts would go on for as long as the retry budget lasts.
    assert 0.3 <= time.monotonic() - began < 2
    assert worker.journal.last.attempts in {2, 3}, "a timer may leave a moment for one more"


async def test_a_clients_deadline_is_kept_and_blames_nobody(worker, model):
    worker.candidate_model.behave = model.hanging
    await worker.start(worker.plan(candidate=True, fallback_message="later"))
    began = time.monotonic()
    reply = await worker.infer(headers={"X-Shipworthy-Deadline": "0.1"})
    assert time.monotonic() - began < 0.5
    assert (reply.status, reply.error) == (504, "the deadline that the request set is over")
    record = worker.journal.last
    assert (record.outcome, record.reason) == (Outcome.CENSORED, "client_deadline")
    assert not worker.model.received


async def test_a_client_that_hangs_up_is_censored_and_frees_the_model(worker, model):
    worker.candidate_model.behave = model.hanging
    await worker.start(worker.plan(candidate=True))
    call = asyncio.create_task(worker.infer(unit="u"))
    await worker.until(lambda: worker.candidate_model.open == 1)
    call.cancel()
    await worker.until(lambda: len(worker.journal.calls) == 1)
    record = worker.journal.last
    assert (record.outcome, record.reason) == (Outcome.CENSORED, "client_gone")
    assert (record.status, record.serving) == (499, None)
    assert record.attempt_seconds > 0
    assert not worker.model.received
    assert await worker.metric("shipworthy_gateway_unhandled_errors_total") == 0


async def test_a_client_that_hangs_up_after_the_failure_leaves_it_to_the_candidate(worker, model):
    worker.candidate_model.behave = model.resetting
    worker.model.behave = model.hanging
    await worker.start(worker.plan(candidate=True))
    call = asyncio.create_task(worker.infer())
    await worker.until(lambda: worker.model.open == 1)
    call.cancel()
    await worker.until(lambda: len(worker.journal.calls) == 1)
    assert worker.journal.last.outcome is Outcome.FAILURE
    assert worker.journal.last.status == 499


async def test_a_credential_that_the_model_refuses_is_the_releases_failure(worker, model):
    endpoint = Endpoint(url=worker.candidate_model.url, credential=None)
    worker.candidate_model.behave = model.responding(b'{"error":"who?"}', "401 No")
    candidate = msgspec.structs.replace(worker.arm(2), endpoints=(endpoint,))
    await worker.start(msgspec.structs.replace(worker.plan(candidate=True), candidate=candidate))
    reply = await worker.infer()
    assert (reply.status, reply.headers["x-shipworthy-fallback"]) == (200, "stable")
    assert worker.journal.last.reason == "status_4xx"


async def test_an_arm_without_endpoints_is_unreachable(worker):
    await worker.start(worker.plan(stable=worker.arm(1)))
    reply = await worker.infer()
    assert (reply.status, reply.error) == (502, "the model can't be reached")
    assert worker.journal.last.reason == "unreachable"


# --- connections that are kept ----------------------------------------------------------------


def answered(body: bytes, status: str = "200 OK", headers: str = "") -> bytes:
    return f"HTTP/1.1 {status}\r\n{headers}content-length: {len(body)}\r\n\r\n".encode() + body


async def test_a_second_answer_behind_the_first_is_not_taken_for_it(worker, model):
    async def both(writer):
        writer.write(answered(model.answer_of(5)) + answered(b"{}", "500 Oh No"))

    worker.model.behave = both
    await worker.start()
    for _ in range(2):
        reply = await worker.infer()
        assert (reply.status, reply.json["outputs"][0]["data"]) == (200, [5])
    assert worker.model.connections == 2  # it has said more than it was asked


async def test_headers_behind_a_body_change_nothing(worker, model):
    async def trailing(writer):
        body = model.answer_of()
        writer.write(
            b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"
            b"%x\r\n%s\r\n0\r\ncontent-encoding: gzip\r\n\r\n" % (len(body), body)
        )

    worker.model.behave = trailing
    await worker.start()
    assert (await worker.infer()).status == 200


async def test_a_header_without_end_is_not_read_for_long(worker, model):
    sent = 0

    async def endless(writer):
        nonlocal sent
        writer.write(b"HTTP/1.1 200 OK\r\nx: ")
        while True:
            writer.write(b"y" * 100_000)
            await writer.drain()
            sent += 100_000

    worker.model.behave = endless
    await worker.start()
    assert (await worker.infer()).status == 502
    assert worker.journal.last.reason == "broken"
    assert sent < 30_000_000  # what sockets hold, and not what a second brings


async def test_a_server_that_answers_before_it_has_read_is_not_asked_on_the_same_connection(
    worker, model
):
    """It would take the rest of the first request for the second one, or reset."""
    loop = asyncio.get_running_loop()

    async def hasty() -> None:
        while True:
            client, _ = await loop.sock_accept(listening)
            with client:
                await loop.sock_recv(client, 500)
                await loop.sock_sendall(client, answered(model.answer_of()))
                await asyncio.sleep(0.2)

    with socket.create_server(("127.0.0.1", 0)) as listening:
        listening.setblocking(False)
        serving = asyncio.ensure_future(hasty())
        url = f"http://127.0.0.1:{listening.getsockname()[1]}"
        await worker.start(worker.plan(stable=worker.arm(1, url)), max_body=20_000_000)
        large = msgspec.json.encode(model.request_of()) + b" " * 12_000_000
        headers = {"Authorization": f"Bearer {worker.keys['client']}"}
        address = f"{worker.url}/v2/models/digits/infer"
        async with worker.client.post(address, data=io.BytesIO(large), headers=headers) as answer:
            assert answer.status == 200
        assert (await worker.infer()).status == 200
        assert [call.attempts for call in worker.journal.calls] == [1, 1]
        serving.cancel()


async def until_of_revision(worker, revision):
    for _ in range(200):
        await worker.infer(body={"inputs": []})  # refused, and asks nobody
        if worker.journal.last.revision == revision:
            return
        await asyncio.sleep(0.01)
    pytest.fail("the plan is not obeyed")


async def test_an_endpoint_that_no_plan_names_any_more_is_let_go(worker, model):
    release = asyncio.Event()

    async def slow(writer):
        await release.wait()
        await model.responding(model.answer_of())(writer)

    worker.model.behave = slow
    plan = worker.plan(
        stable=worker.arm(1, worker.model.url), deadlines=model.Deadlines(attempt=5.0, total=5.0)
    )
    await worker.start(plan)
    calling = asyncio.ensure_future(worker.infer())
    await worker.until(lambda: bool(worker.model.received))
    elsewhere = worker.arm(1, worker.candidate_model.url)
    worker.publish(worker.plan(stable=elsewhere, revision=2))
    await until_of_revision(worker, 2)
    release.set()
    assert (await calling).status == 200
    await worker.until(lambda: worker.model.clients == 0, 1.0)


async def test_an_endpoint_set_aside_that_no_plan_names_any_more_is_probed_no_more(worker, model):
    worker.model.behave, worker.model.healthy = model.resetting, False
    await worker.start(eject_after=1, eject_seconds=0.05, max_eject_seconds=0.05)
    assert (await worker.infer()).status == 502
    await worker.until(lambda: worker.model.health > 1)
    worker.publish(worker.plan(stable=worker.arm(1, worker.candidate_model.url), revision=2))
    await until_of_revision(worker, 2)
    await asyncio.sleep(0.2)  # a probe that was under way
    before = worker.model.health
    await asyncio.sleep(0.4)
    assert worker.model.health == before
