"""OpenAI's doors in one piece: what is changed on the way, what is refused, and what is written."""

import asyncio
import hashlib
from typing import Any

import msgspec
import pytest

from shipworthy.domain.contract import Contract
from shipworthy.domain.plan import Behaviour, Capture, Limits, Price
from shipworthy.domain.records import Outcome
from shipworthy.domain.routing import choose
from shipworthy.gateway.traces import Sampler
from shipworthy.stores.limits import UsageTable

REQUEST = (
    b'{ "messages":[{"role":"user","content":[{"type":"text","text":"what is this?"},'
    b' {"type":"image_url","image_url":{"url":"data:image/png;base64,AAAA"}}]}],\n'
    b'  "model" : "digits", "n": 2, "logprobs":true,"temperature":1.50,'
    b' "response_format":{"type":"json_object"}, "x_unheard_of": {"a": [1, 2.0, null]} }'
)
ANSWER = (
    b'{"id":"c-1", "object":"chat.completion","model" :"served","system_fingerprint":null,'
    b' "choices":[{"index":0,"message":{"role":"assistant","content":"one"},'
    b'"logprobs":{"content":[]},"finish_reason":"stop"},'
    b'{"index":1,"message":{"role":"assistant","content":"a model, \\"model\\":\\"served\\""},'
    b'"finish_reason":"length"}], "usage":{"prompt_tokens":7,"completion_tokens":4,'
    b'"prompt_tokens_details":{"cached_tokens":3}}, "x_new": 1.0}'
)


@pytest.fixture
def release(worker, model):
    """Make plans for releases of a language model, which has answers."""
    worker.model.behave = model.responding(model.chat_answer("from stable"))
    worker.candidate_model.behave = model.responding(model.chat_answer("from candidate"))

    def plan(*, candidate: bool = False, **changes: Any):
        return worker.plan(candidate=candidate, **{"contract": model.language, **changes})

    return plan


def changed(arm, **changes: Any):
    return msgspec.structs.replace(arm, **changes)


def sent_to(model, at: int = -1) -> dict[str, Any]:
    return msgspec.json.decode(model.received[at].body)


def said(reply) -> str:
    return reply.json["choices"][0]["message"]["content"]


# --- what passes ------------------------------------------------------------------------------


async def test_nothing_but_the_models_name_is_changed(worker, model, release):
    worker.model.behave = model.responding(ANSWER)
    await worker.start(release())
    reply = await worker.chat(body=REQUEST)
    [got] = worker.model.received
    assert got.path == "/v1/chat/completions"
    assert got.body == REQUEST.replace(b'"digits"', b'"served"')
    assert "authorization" not in got.headers
    assert reply.status == 200
    assert reply.body == ANSWER.replace(b'"model" :"served"', b'"model" :"digits"')
    assert reply.headers["content-type"] == "application/json"
    assert reply.headers["x-shipworthy-release"] == "digits@1"
    assert reply.headers["x-shipworthy-inference"] == worker.journal.last.id


async def test_a_server_below_a_path_of_its_own_is_asked_there(worker, model, release):
    plan = release()
    [endpoint] = plan.stable.endpoints
    below = changed(endpoint, url=endpoint.url + "/openai/v1/")
    await worker.start(changed(plan, stable=changed(plan.stable, endpoints=(below,))))
    assert (await worker.chat()).status == 200
    assert worker.model.received[0].path == "/openai/v1/chat/completions"


async def test_completions(worker, model, release):
    body = b'{"object":"text_completion","model":"served","choices":[{"index":0,"text":"abcd"}]}'
    worker.model.behave = model.responding(body)
    await worker.start(release())
    asked = {"model": "digits", "prompt": ["one", "two"], "echo": True}
    reply = await worker.ask("POST", "/v1/completions", body=asked)
    assert reply.body == body.replace(b"served", b"digits")
    assert worker.model.received[0].path == "/v1/completions"
    assert sent_to(worker.model) == {**asked, "model": "served"}
    record = worker.journal.last
    assert (record.protocol, record.operation, record.outcome) == (
        "openai", "completions", Outcome.SUCCESS,
    )  # fmt: skip
    assert (record.input_tokens, record.output_tokens, record.tokens_estimated) == (2, 1, True)


async def test_embeddings(worker, model, release):
    body = (
        b'{"object":"list","data":[{"object":"embedding","index":0,"embedding":"AACAPwAAAAA="}],'
        b'"model":"served","usage":{"prompt_tokens":5,"total_tokens":5}}'
    )
    worker.model.behave = model.responding(body)
    await worker.start(release())
    asked = {"model": "digits", "input": "some text", "encoding_format": "base64"}
    reply = await worker.ask("POST", "/v1/embeddings", body=asked)
    assert reply.body == body.replace(b"served", b"digits")
    assert sent_to(worker.model) == {**asked, "model": "served"}
    record = worker.journal.last
    assert record.operation == "embeddings"
    assert (record.input_tokens, record.output_tokens, record.tokens_estimated) == (5, 0, False)


@pytest.mark.parametrize(
    ("path", "asked", "answer", "problem"),
    [
        ("chat/completions", {"messages": [{"content": "a"}]}, {"choices": []}, "choices: empty"),
        ("completions", {"prompt": "a"}, {"choices": [{}]}, "choices[0].text: missing"),
        ("embeddings", {"input": "a"}, {"data": []}, "data: empty"),
    ],
)
async def test_an_answer_with_nothing_in_it_is_none(worker, model, release, path, asked, answer, problem):  # fmt: skip  # noqa: E501
    worker.model.behave = model.responding(msgspec.json.encode(answer))
    await worker.start(release(shield=model.Shield(retry_burst=0)))
    reply = await worker.ask("POST", f"/v1/{path}", body={"model": "digits", **asked})
    assert reply.status == 502
    assert reply.error["message"].endswith(f"is not the protocol's: {problem}")
    assert reply.error["type"] == "server_error"
    assert worker.journal.last.reason == "broken"


# --- what a release adds ----------------------------------------------------------------------


TOOLS = ({"type": "function", "function": {"name": "look_up"}},)


async def test_each_arm_gets_its_own_behaviour(worker, model, release):
    plan = release(candidate=True)
    plain = Behaviour(system="be kind", sampling={"temperature": 0.5, "top_p": 0.9})
    strict = Behaviour(
        system="be strict",
        tools=TOOLS,
        tool_choice="required",
        sampling={"temperature": 0.0, "max_tokens": 5},
        pinned=True,
        chat_template="{{ messages }}",
    )
    plan = changed(
        plan,
        stable=changed(plan.stable, behaviour=plain),
        candidate=changed(plan.candidate, behaviour=strict),
        weight=5_000,
    )
    await worker.start(plan)
    for draw in (0.9, 0.1):
        worker.draw = draw
        await worker.chat(temperature=1.0, max_completion_tokens=99, x_own=[1])
    [to_stable], [to_candidate] = worker.model.received, worker.candidate_model.received
    user = {"role": "user", "content": "hi"}
    assert msgspec.json.decode(to_stable.body) == {
        "model": "served",
        "messages": [{"role": "system", "content": "be kind"}, user],
        "temperature": 1.0,
        "max_completion_tokens": 99,
        "x_own": [1],
        "top_p": 0.9,
    }
    assert msgspec.json.decode(to_candidate.body) == {
        "model": "served",
        "messages": [{"role": "system", "content": "be strict"}, user],
        "temperature": 0.0,
        "max_tokens": 5,
        "x_own": [1],
        "tools": list(TOOLS),
        "tool_choice": "required",
        "chat_template": "{{ messages }}",
    }


async def test_the_clients_own_tools_stay(worker, model, release):
    plan = release()
    own = [{"type": "function", "function": {"name": "mine"}}]
    adding = Behaviour(tools=TOOLS, tool_choice="required")
    await worker.start(changed(plan, stable=changed(plan.stable, behaviour=adding)))
    await worker.chat(tools=own)
    assert sent_to(worker.model)["tools"] == own
    assert "tool_choice" not in sent_to(worker.model)


async def test_when_stable_answers_for_the_candidate_it_does_so_in_its_own_way(
    worker, model, release
):
    plan = release(candidate=True)
    plan = changed(plan, candidate=changed(plan.candidate, behaviour=Behaviour(system="new")))
    worker.candidate_model.behave = model.resetting
    await worker.start(plan)
    assert said(await worker.chat(unit="u")) == "from stable"
    assert sent_to(worker.candidate_model)["messages"][0] == {"role": "system", "content": "new"}
    assert sent_to(worker.model)["messages"] == [{"role": "user", "content": "hi"}]


async def test_a_release_can_put_text_before_a_prompt_but_not_before_token_ids(
    worker, model, release
):
    plan = release(shield=model.Shield(retry_burst=0))
    worker.model.behave = model.responding(b'{"choices":[{"index":0,"text":"x"}]}')
    adding = Behaviour(system="Q: ")
    await worker.start(changed(plan, stable=changed(plan.stable, behaviour=adding)))
    await worker.ask("POST", "/v1/completions", body={"model": "digits", "prompt": "why?"})
    assert sent_to(worker.model)["prompt"] == "Q: why?"
    reply = await worker.ask("POST", "/v1/completions", body={"model": "digits", "prompt": [1, 2]})
    assert reply.status == 400
    assert reply.error["message"].startswith("prompt: this model puts a text of its own before")
    record = worker.journal.last
    assert (record.outcome, record.reason) == (Outcome.CLIENT_FAULT, "invalid_input")


# --- whom it is for ---------------------------------------------------------------------------


async def test_the_user_field_is_the_unit_unless_a_header_names_one(worker, model, release):
    plan = release(candidate=True, weight=5_000)
    await worker.start(plan)
    for number in range(8):
        user = f"user-{number}"
        due = choose(plan, user, now=0, uniform=0)
        for draw in (0.0, 0.99):
            worker.draw = draw
            assert said(await worker.chat(user=user)) == f"from {due.arm}"
        assert worker.journal.calls[-1].unit == worker.journal.calls[-2].unit != user
        assert said(await worker.chat(user="somebody else", unit=user)) == f"from {due.arm}"
        assert worker.journal.calls[-1].unit == worker.journal.calls[-2].unit
    assert sent_to(worker.candidate_model)["user"].startswith(("user-", "somebody"))


# --- what is refused --------------------------------------------------------------------------


async def test_what_the_contract_does_not_name_is_refused(worker, model, release):
    chats = Contract(protocol="openai", operations=("chat", "completions"))
    await worker.start(release(contract=chats))
    reply = await worker.ask("POST", "/v1/embeddings", body={"model": "digits", "input": "a"})
    assert (reply.status, reply.error) == (
        400,
        {
            "message": "model: does not do embeddings; it does chat, completions",
            "type": "invalid_request_error",
            "param": None,
            "code": None,
        },
    )
    assert worker.model.received == []
    assert worker.journal.last.outcome is Outcome.CLIENT_FAULT
    assert (await worker.chat()).status == 200


async def test_a_candidate_that_does_less_than_stable_is_charged(worker, model, release):
    plan = release(candidate=True)
    less = Contract(protocol="openai", operations=("embeddings",))
    await worker.start(changed(plan, candidate=changed(plan.candidate, contract=less)))
    assert said(await worker.chat(unit="u")) == "from stable"
    record = worker.journal.last
    assert (record.outcome, record.reason) == (Outcome.FAILURE, "narrowed_contract")


async def test_tensors_and_language_do_not_mix(worker, model, release):
    table = changed(worker.plan(), name="table")
    await worker.start(release(), table)
    reply = await worker.chat(model="table")
    assert (reply.status, reply.error["message"]) == (
        400, "model: takes tensors; call it at /v2/models/{name}/infer",
    )  # fmt: skip
    reply = await worker.infer()
    assert (reply.status, reply.error) == (
        400, "model: takes no tensors; call it at /v1/chat/completions and its like",
    )  # fmt: skip
    reply = await worker.ask("POST", "/models/digits/invocations", body={"inputs": [1]})
    assert (reply.status, reply.json) == (
        400,
        {
            "error_code": "BAD_REQUEST",
            "message": "model: takes no tensors; call it at /v1/chat/completions and its like",
        },
    )
    assert worker.model.received == []
    assert {call.outcome for call in worker.journal.calls} == {Outcome.CLIENT_FAULT}


async def test_models_are_listed_for_the_key_that_asks(worker, model, release):
    await worker.start(release(), changed(worker.plan(), name="words"))
    [mine] = (await worker.ask("GET", "/v1/models", key="other")).json["data"]
    assert mine == {"id": "words", "object": "model", "created": 0, "owned_by": "shipworthy"}
    listed = await worker.ask("GET", "/v1/models")
    assert listed.json["object"] == "list"
    assert [each["id"] for each in listed.json["data"]] == ["digits", "words"]
    assert (await worker.ask("GET", "/v1/models/digits")).json["id"] == "digits"
    head = await worker.ask("HEAD", "/v1/models/digits")
    assert (head.status, head.body) == (200, b"")
    refused = await worker.ask("GET", "/v1/models/digits", key="other")
    assert (refused.status, refused.error["type"]) == (403, "permission_error")
    missing = await worker.ask("GET", "/v1/models/none")
    assert (missing.status, missing.error["type"]) == (404, "not_found_error")


@pytest.mark.parametrize(
    ("asked", "status", "kind", "message"),
    [
        ({"key": None}, 401, "authentication_error", "no valid key"),
        ({"key": "sw_client_wrong"}, 401, "authentication_error", "no valid key"),
        ({"key": "other"}, 403, "permission_error", "may not call 'digits'"),
        ({"model": "none", "key": "admin"}, 404, "not_found_error", "no model 'none'"),
        ({"model": None}, 400, "invalid_request_error", "model: missing"),
        ({"messages": []}, 400, "invalid_request_error", "messages: empty"),
        ({"n": "x"}, 400, "invalid_request_error", "n: "),
        ({"body": b"{"}, 400, "invalid_request_error", "JSON"),
        ({"body": b" " * 5000}, 413, "invalid_request_error", "larger than 4000 bytes"),
        ({"headers": {"content-encoding": "gzip"}}, 415, "invalid_request_error", "compressed"),
        ({"unit": "x" * 300}, 400, "invalid_request_error", "longer than 256"),
    ],
)
async def test_errors_have_openais_shape(worker, model, release, asked, status, kind, message):
    await worker.start(release(), max_body=4000)
    reply = await worker.chat(**asked)
    assert (reply.status, reply.error["type"]) == (status, kind)
    assert message in reply.error["message"]
    assert list(reply.error) == ["message", "type", "param", "code"]
    assert worker.model.received == []


async def test_the_wrong_method_and_unknown_addresses_too(worker, model, release):
    await worker.start(release())
    for method, path, status in (
        ("GET", "/v1/chat/completions", 405),
        ("HEAD", "/v1/chat/completions", 405),
        ("POST", "/v1/models", 405),
        ("POST", "/v1/images/generations", 404),
    ):
        reply = await worker.ask(method, path)
        assert reply.status == status
        if method != "HEAD":
            assert reply.error["message"]
    assert worker.journal.calls == []


# --- what a server refuses --------------------------------------------------------------------


TOO_LONG = (
    b'{"error": {"message": "too many tokens", "type": "BadRequestError", "param": "n",'
    b' "code": 400}, "object" : "error"}'
)


@pytest.mark.parametrize("status", ["400 Bad Request", "413 Too Large", "422 Unprocessable"])
async def test_what_a_server_says_of_an_input_is_passed_on_word_for_word(
    worker, model, release, status
):
    worker.model.behave = model.responding(TOO_LONG, status)
    await worker.start(release())
    reply = await worker.chat()
    assert (reply.status, reply.body) == (int(status[:3]), TOO_LONG)
    assert len(worker.model.received) == 1
    record = worker.journal.last
    assert (record.outcome, record.reason, record.serving) == (
        Outcome.CLIENT_FAULT, "refused_input", None,
    )  # fmt: skip


@pytest.mark.parametrize("status", ["401 No", "403 No", "404 No", "405 No", "409 No"])
async def test_what_is_between_gateway_and_server_is_not_the_clients(
    worker, model, release, status
):
    worker.model.behave = model.responding(b'{"error":"the key sk-123 is bad"}', status)
    await worker.start(release())
    reply = await worker.chat()
    assert (reply.status, reply.error["message"]) == (
        502, "the model refused a request that its contract allows",
    )  # fmt: skip
    assert (worker.journal.last.outcome, worker.journal.last.reason) == (
        Outcome.FAILURE, "status_4xx",
    )  # fmt: skip


async def test_what_both_releases_refuse_is_the_clients_fault(worker, model, release):
    worker.candidate_model.behave = model.responding(b'{"error":"candidate"}', "400 Bad Request")
    worker.model.behave = model.responding(TOO_LONG, "422 No")
    await worker.start(release(candidate=True))
    reply = await worker.chat(unit="u")
    assert (reply.status, reply.body) == (422, TOO_LONG)
    record = worker.journal.last
    assert (record.outcome, record.reason) == (Outcome.CLIENT_FAULT, "refused_input")
    assert (record.assigned, record.attempts, record.serving) == ("candidate", 2, None)


async def test_what_stable_takes_the_candidate_may_not_refuse(worker, model, release):
    worker.candidate_model.behave = model.responding(TOO_LONG, "400 Bad Request")
    await worker.start(release(candidate=True))
    assert said(await worker.chat(unit="u")) == "from stable"
    record = worker.journal.last
    assert (record.outcome, record.reason) == (Outcome.FAILURE, "status_4xx")
    assert (record.assigned, record.serving) == ("candidate", "stable")


async def test_a_candidate_is_not_charged_for_refusing_what_stable_fails_to_answer(
    worker, model, release
):
    worker.candidate_model.behave = model.responding(TOO_LONG, "400 Bad Request")
    worker.model.behave = model.responding(b"", "500 No")
    await worker.start(release(candidate=True, shield=model.Shield(retry_burst=0)))
    reply = await worker.chat(unit="u")
    assert (reply.status, reply.body) == (400, TOO_LONG)
    record = worker.journal.last
    assert (record.outcome, record.reason) == (Outcome.CLIENT_FAULT, "refused_input")


@pytest.mark.parametrize("takes", [False, True])
async def test_clients_can_not_have_a_candidate_set_aside_by_asking_what_none_takes(
    worker, model, release, takes
):
    worker.candidate_model.behave = model.responding(TOO_LONG, "400 Bad Request")
    if not takes:
        worker.model.behave = model.responding(TOO_LONG, "400 Bad Request")
    shield = model.Shield(breaker_window=5, breaker_failures=3, breaker_seconds=60.0)
    await worker.start(release(candidate=True, shield=shield))
    for _ in range(5):
        await worker.chat(unit="u")
    reasons = [call.reason for call in worker.journal.calls]
    broken = ["status_4xx"] * 3 + ["ejected"] * 2
    assert reasons == (broken if takes else ["refused_input"] * 5)


# --- limits -----------------------------------------------------------------------------------


@pytest.fixture
def limited(worker, tmp_path):
    """Give the key `client` limits, and make plans that count."""
    table = UsageTable(tmp_path / "limits", worker.clock)
    worker.outside["limits"] = table

    def limit(**limits: Any) -> None:
        keys = dict(worker.snapshot.keys)
        keys["client"] = changed(keys["client"], limits=Limits(**limits))
        worker.snapshot = changed(worker.snapshot, keys=keys)

    return limit


async def test_limits_are_told_in_openais_way(worker, model, release, limited):
    limited(requests_per_minute=2, tokens_per_minute=1000)
    await worker.start(release())
    first = await worker.chat(max_tokens=100)
    assert first.status == 200
    told = {k: v for k, v in first.headers.items() if k.startswith("x-ratelimit")}
    assert told["x-ratelimit-limit-requests"] == "2"
    assert told["x-ratelimit-remaining-requests"] == "1"
    assert told["x-ratelimit-limit-tokens"] == "1000"
    assert told["x-ratelimit-remaining-tokens"] == "899"  # 100 to be written, 1 to be read
    await worker.chat(max_tokens=100)
    refused = await worker.chat(max_tokens=100)
    assert refused.status == 429
    assert refused.error["type"] == "rate_limit_error"
    assert refused.error["code"] == "rate_limit_exceeded"
    assert "2 requests per minute" in refused.error["message"]
    assert 1 <= int(refused.headers["retry-after"]) <= 120
    assert refused.headers["x-ratelimit-remaining-requests"] == "0"
    record = worker.journal.last
    assert (record.outcome, record.reason, record.status) == (
        Outcome.CLIENT_FAULT, "over_limit", 429,
    )  # fmt: skip
    assert len(worker.model.received) == 2


async def test_what_was_reserved_is_settled_to_what_was_used(worker, model, release, limited):
    limited(tokens_per_minute=1000)
    await worker.start(release())
    for used in (0, 11, 22):
        reply = await worker.chat(max_tokens=500)
        assert reply.headers["x-ratelimit-remaining-tokens"] == str(1000 - 501 - used)
    refused = await worker.chat(max_tokens=5000)
    assert refused.status == 429
    assert refused.error["code"] == "request_too_large"
    assert refused.headers["x-should-retry"] == "false"


async def test_a_budget_is_spent_in_money(worker, model, release, limited):
    limited(budget_per_day=0.02)
    plan = release()
    price = Price(per_1k_input=1.0, per_1k_output=0.5)  # 9 read and 2 written: 0.010
    await worker.start(changed(plan, stable=changed(plan.stable, price=price)))
    first = await worker.chat(max_tokens=4)
    assert first.headers["x-shipworthy-budget-remaining"] == "0.017000"
    second = await worker.chat(max_tokens=4)
    assert second.headers["x-shipworthy-budget-remaining"] == "0.007000"
    refused = await worker.chat(max_tokens=4)
    assert (refused.status, refused.error["code"]) == (429, "budget_exceeded")
    assert [call.cost for call in worker.journal.calls] == [0.01, 0.01, None]
    worker.clock.ahead = 86_400
    worker.publish()  # keys must be fresh
    assert (await worker.chat(max_tokens=4)).status == 200


async def test_a_place_is_free_again_however_a_call_ends(worker, model, release, limited):
    limited(concurrency=1)
    await worker.start(
        release(
            shield=model.Shield(retry_burst=0),
            deadlines=model.Deadlines(connect=0.3, attempt=0.3, total=5.0),
        )
    )
    good = worker.model.behave
    for behave in (
        model.resetting, model.garbage, model.hanging, model.responding(b"", "500 No"),
        model.responding(TOO_LONG, "400 Bad"), good,
    ):  # fmt: skip
        worker.model.behave = behave
        assert (await worker.chat()).status != 429
    worker.publish(changed(worker.snapshot.plans["digits"], deadlines=model.Deadlines()))
    await asyncio.sleep(0.1)
    worker.model.behave = model.hanging
    hanging = asyncio.create_task(worker.chat())
    await worker.until(lambda: worker.model.open == 1)
    second = await worker.chat()
    assert (second.status, second.error["code"]) == (429, "concurrency_exceeded")
    hanging.cancel()
    await asyncio.gather(hanging, return_exceptions=True)
    await worker.until(lambda: worker.journal.last.reason == "client_gone")
    worker.model.behave = good
    assert (await worker.chat()).status == 200


async def test_a_place_is_free_again_when_the_worker_ends(worker, model, release, limited):
    limited(concurrency=1)
    await worker.start(release(), drain_seconds=0.1)
    good, worker.model.behave = worker.model.behave, model.hanging
    hanging = asyncio.create_task(worker.chat())
    await worker.until(lambda: worker.model.open == 1)
    worker.begin_stop()
    reply = await hanging
    assert (reply.status, reply.error["type"]) == (503, "server_error")
    await worker.stop()
    record = worker.journal.last
    assert (record.outcome, record.reason) == (Outcome.CENSORED, "shutdown")
    worker.model.behave = good
    await worker.start()
    assert (await worker.chat()).status == 200


# --- what is written --------------------------------------------------------------------------


async def test_the_record_tells_what_was_used_and_what_it_cost(worker, model, release):
    worker.model.behave = model.responding(ANSWER)
    plan = release(capture=Capture(payloads="full"))
    price = Price(per_1k_input=1.0, per_1k_output=2.0, per_call=0.5)
    await worker.start(changed(plan, stable=changed(plan.stable, price=price)))
    reply = await worker.chat(body=REQUEST)
    record = worker.journal.last
    assert (record.protocol, record.operation, record.stream) == ("openai", "chat", False)
    assert (record.input_tokens, record.output_tokens, record.cached_tokens) == (7, 4, 3)
    assert record.tokens_estimated is False
    assert record.cost == pytest.approx(0.5 + 0.007 + 0.008)
    assert record.finish == "stop,length"
    assert (record.request, record.response) == (REQUEST, reply.body)
    assert (record.request_digest, record.response_digest) == (None, None)
    assert record.features["messages"] == 1
    assert record.features["finish"] == "stop,length"


async def test_tokens_are_counted_where_the_server_does_not(worker, model, release):
    worker.model.behave = model.responding(model.chat_answer("abcdefgh", usage=None))
    plan = release()
    adding = Behaviour(system="x" * 40)
    await worker.start(changed(plan, stable=changed(plan.stable, behaviour=adding)))
    await worker.chat(messages=[{"role": "user", "content": "x" * 40}])
    record = worker.journal.last
    assert (record.input_tokens, record.output_tokens) == (21, 2)
    assert record.tokens_estimated


async def test_what_is_personal_is_replaced_and_what_is_long_is_cut(worker, model, release):
    mail = "write to jo@example.org please"
    worker.model.behave = model.responding(model.chat_answer(mail + " " + "z" * 500))
    capture = Capture(
        payloads="full", max_bytes=300, redact=("email",), redact_fields=("metadata.account",)
    )
    await worker.start(release(capture=capture))
    reply = await worker.chat(
        messages=[{"role": "user", "content": mail}], metadata={"account": "DE-77"}
    )
    assert mail in said(reply)
    assert b"jo@example.org" in worker.model.received[0].body
    record = worker.journal.last
    for kept in (record.request, record.response):
        assert b"jo@example.org" not in kept
        assert b"write to" in kept
    assert b"DE-77" not in record.request
    assert record.redacted == 3
    assert len(record.response) <= 300 < record.response_bytes == len(reply.body)
    assert record.response_digest == hashlib.sha256(reply.body).hexdigest()
    assert record.request_digest is None


async def test_bodies_are_kept_of_a_sample(worker, model, release):
    await worker.start(release(capture=Capture(payloads="sampled", sample=0.3)))
    for draw, kept in ((0.29, True), (0.3, False), (0.9, False)):
        worker.draw = draw
        await worker.chat()
        record = worker.journal.last
        assert (record.request is not None, record.response is not None) == (kept, kept)
        assert record.request_bytes
        assert record.response_bytes


async def test_with_metadata_alone_no_word_is_written(worker, model, release):
    await worker.start(release(capture=Capture(features=False)))
    await worker.chat(user="someone-secret")
    record = worker.journal.last
    assert (record.request, record.response, record.features) == (None, None, {})
    assert b"someone-secret" not in msgspec.json.encode(record)


async def test_a_long_name_of_a_user_holds_nobody_up_and_stays_on_its_side(worker, model):
    worker.model.behave = worker.candidate_model.behave = model.responding(model.chat_answer())
    await worker.start(worker.plan(contract=model.language, candidate=True, weight=5_000))
    names = [f"{number}{'x' * 500_000}" for number in range(8)]
    sides: list[list[str]] = []
    for _ in range(2):
        for name in names:
            assert (await worker.chat(user=name)).status == 200
        sides.append([call.assigned for call in worker.journal.calls[-8:]])
    assert sides[0] == sides[1]
    assert set(sides[0]) == {"stable", "candidate"}


async def test_whom_a_request_is_for_is_never_kept_openly(worker, release):
    await worker.start(release(capture=Capture(payloads="full")))
    assert (await worker.chat(user="ada@example.org")).status == 200
    record = worker.journal.last
    assert sent_to(worker.model)["user"] == "ada@example.org"
    assert b"ada@example.org" not in record.request
    assert msgspec.json.decode(record.request)["user"] == "[unit]"
    assert record.unit is not None


async def test_each_attempt_is_told_to_whoever_traces_and_parents_what_it_causes(
    worker, model, release
):
    told: list[Any] = []
    worker.outside = {
        "context": Sampler(1.0, uniform=lambda: 0.5, bits=lambda bits: 2**bits - 1).context,
        "export": lambda record, context, attempts: told.append((context, attempts)),
    }
    worker.candidate_model.behave = model.responding(b"{}", "500 No")
    await worker.start(release(candidate=True))
    assert (await worker.chat()).status == 200
    [(context, attempts)] = told
    assert [(one.release, one.reason, one.status) for one in attempts] == [
        ("digits@2", "status_5xx", 500),
        ("digits@1", "", 200),
    ]
    sent = [worker.candidate_model.received[0], worker.model.received[0]]
    parents = [got.headers["traceparent"].split("-")[2] for got in sent]
    assert parents == [f"{context.span_of(number):016x}" for number in (1, 2)]
