"""Streams: what passes and when, and what becomes of clients, releases and the gateway when one
of them fails. The tables here are those of docs/gateway.md.
"""

import asyncio
import gc
import socket
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import pytest

from shipworthy.domain.contract import Contract
from shipworthy.domain.plan import Behaviour, Capture, Limits, Price
from shipworthy.domain.records import Outcome
from shipworthy.gateway.connection import ClientConnection
from shipworthy.gateway.upstream import EndpointState
from shipworthy.stores.limits import UsageTable

PAGE = Path(__file__).parents[2] / "docs" / "gateway.md"
BOOM = b'{"error": {"message": "boom", "type": "server_error"}}'


def changed(it, **changes: Any):
    return msgspec.structs.replace(it, **changes)


@pytest.fixture
def release(worker, model):
    """Make plans for releases of a language model, whose stable one answers."""
    worker.model.behave = model.telling("st", "able")

    def plan(*, candidate: bool = False, **changes: Any):
        return worker.plan(candidate=candidate, **{"contract": model.language, **changes})

    return plan


def texts(events: list[bytes]) -> str:
    """What a client reads of these events."""
    found: list[str] = []
    for event in events:
        data = event.removeprefix(b"data: ").strip()
        if data == b"[DONE]" or b'"error"' in data:
            continue
        choices = msgspec.json.decode(data)["choices"]
        found += [choice["delta"].get("content") or "" for choice in choices]
    return "".join(found)


def error_of(event: bytes) -> dict[str, Any]:
    return msgspec.json.decode(event.removeprefix(b"data: "))["error"]


# --- the failure tables -----------------------------------------------------------------------


@dataclass
class Failure:
    """What a server may do before anything of an answer is with the client.

    `again` says when the same release is asked once more: always, where a contract says that it
    is `safe`, or never.
    """

    words: str
    reason: str
    status: int
    again: str
    whole: Callable[[Any], Any] | None = None  # when asked for an answer in one piece
    streamed: Callable[[Any], Any] | None = None  # when asked for a stream
    hangs: bool = False


def half(writer_content: bytes) -> Any:
    async def behave(writer: asyncio.StreamWriter) -> None:
        head = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\n"
        writer.write(head + b"transfer-encoding: chunked\r\n\r\n" + writer_content)
        await writer.drain()
        writer.close()

    return behave


def same(make: Callable[[Any], Any]) -> dict[str, Any]:
    return {"whole": make, "streamed": make}


FAILURES = {
    "refuses": Failure("takes no connection", "unreachable", 502, "always"),
    "resets": Failure(
        "resets the connection", "broken", 502, "safe", **same(lambda m: m.resetting)
    ),
    "hangs": Failure(
        "says nothing in time", "timeout", 504, "safe", **same(lambda m: m.hanging), hangs=True
    ),
    "hangs_midway": Failure(
        "begins an answer and falls silent before its first content", "timeout", 504, "safe",
        whole=lambda m: m.hanging_midway,
        streamed=lambda m: m.streaming(m.chunk(), then=m.hanging),
        hangs=True,
    ),
    "status_500": Failure(
        "answers 5xx", "status_5xx", 502, "safe", **same(lambda m: m.responding(BOOM, "500 Oh"))
    ),
    "status_429": Failure(
        "answers 429 with `Retry-After: 7`", "status_429", 503, "safe",
        **same(lambda m: m.responding(BOOM, "429 Busy", "retry-after: 7\r\n")),
    ),
    "status_404": Failure(
        "answers 401, 403, 404 or another 4xx", "status_4xx", 502, "never",
        **same(lambda m: m.responding(BOOM, "404 No")),
    ),
    "redirect": Failure(
        "redirects, or answers another 2xx than 200", "status_other", 502, "never",
        **same(lambda m: m.responding(b"", "302 Found", "location: http://example.org\r\n")),
    ),
    "garbage": Failure(
        "answers what is not HTTP", "broken", 502, "safe", **same(lambda m: m.garbage)
    ),
    "lying_length": Failure(
        "sends less than its content length announces", "broken", 502, "safe",
        whole=lambda m: m.responding(m.chat_answer(), length=5_000),
        streamed=lambda m: m.streaming(
            m.chunk(), then=m.closing, chunked=False, headers="content-length: 5000\r\n"
        ),
    ),
    "broken_off": Failure(
        "breaks off amid a chunked answer", "broken", 502, "safe",
        whole=lambda m: half(b'5\r\n{"cho\r\n'),
        streamed=lambda m: m.streaming(m.chunk(), then=m.closing),
    ),
    "error": Failure(
        "answers 200 with an error, as JSON or as an event", "error_event", 502, "safe",
        whole=lambda m: m.responding(BOOM),
        streamed=lambda m: m.streaming(m.chunk(), b"data: " + BOOM + b"\n\n"),
    ),
    "not_json": Failure(
        "answers 200 with what is not the protocol's", "broken", 502, "safe",
        whole=lambda m: m.responding(b"<html>"),
        streamed=lambda m: m.streaming(m.chunk(), b"data: <html>\n\n"),
    ),
    "nothing": Failure(
        "answers 200 with nothing in it", "broken", 502, "safe",
        whole=lambda m: m.responding(b'{"choices": []}'),
        streamed=lambda m: m.streaming(m.chunk()),
    ),
    "too_large": Failure(
        "sends an answer, or an event of one, that is larger than allowed", "broken", 502, "safe",
        whole=lambda m: m.responding(m.chat_answer("x" * 20_000)),
        streamed=lambda m: m.streaming(m.chunk("x" * 20_000)),
    ),
}  # fmt: skip
AGAIN = {"always": "yes", "safe": "where it is safe", "never": "no"}


@dataclass
class BreakOff:
    """What may happen amid a stream; `ends` are the words of the event that ends it."""

    words: str
    reason: str
    outcome: Outcome
    ends: str
    then: Callable[[Any], Any] | None = None
    chunked: bool = True


_BROKEN = "the model's answer broke off or is not the protocol's"
BREAK_OFFS = {
    "resets": BreakOff(
        "the server resets the connection", "broken", Outcome.FAILURE, _BROKEN,
        lambda m: m.resetting,
    ),
    "closes": BreakOff(
        "it closes the connection amid a chunk or an event", "broken", Outcome.FAILURE, _BROKEN,
        lambda m: m.closing,
    ),
    "length": BreakOff(
        "it sends less than its content length announces", "broken", Outcome.FAILURE, _BROKEN,
        lambda m: m.closing, chunked=False,
    ),
    "silent": BreakOff(
        "it is silent for longer than `idle`", "idle", Outcome.FAILURE,
        "the model fell silent amid its answer", lambda m: m.hanging,
    ),
    "not_json": BreakOff(
        "it sends an event that is not the protocol's", "broken", Outcome.FAILURE, _BROKEN,
        lambda m: chunks(b"data: <html>\n\n", m.DONE),
    ),
    "too_large": BreakOff(
        "it sends an event that is larger than allowed", "broken", Outcome.FAILURE, _BROKEN,
        lambda m: chunks(m.chunk("x" * 20_000), m.DONE),
    ),
    "error": BreakOff(
        "it sends an error event", "error_event", Outcome.FAILURE, "boom",
        lambda m: chunks(b"data: " + BOOM + b"\n\n", m.DONE),
    ),
    "no_end": BreakOff(
        "it ends the stream with neither `[DONE]` nor a reason to finish", "broken",
        Outcome.FAILURE, _BROKEN, lambda m: chunks(),
    ),
    "too_long": BreakOff(
        "it takes longer than `stream`", "timeout", Outcome.FAILURE,
        "the model did not answer in time",
    ),
    "slow_for_long": BreakOff(
        "it does so because its client reads that slowly", "client_gone", Outcome.CENSORED,
        "the answer was not read in time",
    ),
    "shutdown": BreakOff(
        "the worker ends, and has waited for it for `drain_seconds`", "shutdown",
        Outcome.CENSORED, "the gateway is ending; ask again",
    ),
    "hangs_up": BreakOff(
        "the client hangs up", "client_gone", Outcome.CENSORED, "",
    ),
    "slow": BreakOff(
        "the client reads nothing for `slow_reader_seconds`", "client_gone", Outcome.CENSORED, "",
    ),
}  # fmt: skip


def chunks(*events: bytes) -> Any:
    async def behave(writer: asyncio.StreamWriter) -> None:
        for event in events:
            writer.write(b"%x\r\n%s\r\n" % (len(event), event))
        writer.write(b"0\r\n\r\n")
        await writer.drain()

    return behave


def tables() -> tuple[str, str]:
    """What docs/gateway.md says of it."""
    before = [
        "| the server … | reason | without anybody else the client gets | asked once more |",
        "| --- | --- | --- | --- |",
    ]
    before += [
        f"| {one.words} | `{one.reason}` | {one.status}"
        f"{', with that header' if one.status == 503 else ''} | {AGAIN[one.again]} |"
        for one in FAILURES.values()
    ]
    amid = [
        "| amid a stream … | reason | outcome | it ends with |",
        "| --- | --- | --- | --- |",
    ]
    for one in BREAK_OFFS.values():
        told = f"“{one.ends}”" if one.ends else "nothing; the call upstream is cancelled"
        told = "the server's own event" if one.ends == "boom" else told
        amid.append(f"| {one.words} | `{one.reason}` | {one.outcome.value} | {told} |")
    return "\n".join(before), "\n".join(amid)


@pytest.mark.parametrize("table", tables(), ids=["before", "amid"])
def test_the_page_has_these_tables(table):
    assert f"\n\n{table}\n\n" in PAGE.read_text()


KINDS = [
    pytest.param(name, kind, id=f"{name}-{kind}")
    for name in FAILURES
    for kind in ("whole", "streamed")
]


async def failing(worker, model, which: str, name: str, kind: str) -> Failure:
    """Have a release fail so; deadlines are short where that is what ends it."""
    failure = FAILURES[name]
    server = {"stable": worker.model, "candidate": worker.candidate_model}[which]
    make = getattr(failure, kind)
    if make is None:
        await server.stop()
    else:
        server.behave = make(model)
    return failure


def deadlines(model, failure: Failure):
    attempt = 0.3 if failure.hangs else 10.0
    return model.Deadlines(connect=5.0, attempt=attempt, total=30.0, idle=10.0)


@pytest.mark.parametrize(("name", "kind"), KINDS)
async def test_stable_answers_when_the_candidate_fails_before_its_first_content(
    worker, model, release, name, kind
):
    failure = FAILURES[name]
    stream = kind == "streamed"
    plan = release(candidate=True, deadlines=deadlines(model, failure))
    if not stream:
        worker.model.behave = model.responding(model.chat_answer("stable"))
    await failing(worker, model, "candidate", name, kind)
    await worker.start(plan, max_response=10_000, max_event=10_000)
    reply = await worker.chat(unit="u", stream=stream)
    assert reply.status == 200
    if stream:
        assert texts(reply.events) == "stable"
        assert reply.events[-1] == model.DONE
        assert reply.headers["content-type"] == "text/event-stream"
    else:
        assert reply.json["choices"][0]["message"]["content"] == "stable"
    assert reply.headers["x-shipworthy-release"] == "digits@1"
    assert reply.headers["x-shipworthy-fallback"] == "stable"
    record = worker.journal.last
    assert (record.outcome, record.reason) == (Outcome.FAILURE, failure.reason)
    assert (record.assigned, record.release) == ("candidate", "digits@2")
    assert (record.serving, record.serving_release) == ("stable", "digits@1")
    assert (record.status, record.attempts, record.stream) == (200, 2, stream)
    assert len(worker.journal.calls) == 1


@pytest.mark.parametrize("side_effects", ["none", "unknown"])
@pytest.mark.parametrize(("name", "kind"), KINDS)
async def test_with_nobody_else_the_client_gets_an_error_and_no_stream(
    worker, model, release, name, kind, side_effects
):
    failure = await failing(worker, model, "stable", name, kind)
    contract = Contract(protocol="openai", side_effects=side_effects)
    plan = release(contract=contract, deadlines=deadlines(model, failure))
    await worker.start(plan, max_response=10_000, max_event=10_000)
    reply = await worker.chat(unit="u", stream=kind == "streamed")
    assert reply.status == failure.status
    assert list(reply.error) == ["message", "type", "param", "code"]
    assert reply.error["type"] == "server_error"
    if name == "status_429":
        assert reply.headers["retry-after"] == "7"
    record = worker.journal.last
    again = failure.again == "always" or (failure.again == "safe" and side_effects == "none")
    assert record.attempts == 1 + again
    assert (record.outcome, record.reason) == (Outcome.FAILURE, failure.reason)
    assert (record.assigned, record.serving, record.status) == ("stable", None, failure.status)
    assert record.first_content_seconds is None
    retries = await worker.metric('shipworthy_gateway_retries_total{plan="digits"}')
    assert retries == again


AMID = [name for name, one in BREAK_OFFS.items() if one.then is not None]


@pytest.mark.parametrize("which", ["stable", "candidate"])
@pytest.mark.parametrize("name", AMID)
async def test_what_fails_amid_a_stream_ends_it_with_an_error_event(
    worker, model, release, name, which
):
    broken = BREAK_OFFS[name]
    assert broken.then is not None
    server = {"stable": worker.model, "candidate": worker.candidate_model}[which]
    server.behave = model.streaming(
        model.chunk(), model.chunk("he"), 0.05, model.chunk("llo"),
        then=broken.then(model),
        chunked=broken.chunked,
        headers="" if broken.chunked else "content-length: 5000\r\n",
    )  # fmt: skip
    short = 0.3 if name == "silent" else 10.0
    plan = release(
        candidate=which == "candidate",
        deadlines=model.Deadlines(attempt=60.0, total=60.0, idle=short),
    )
    await worker.start(plan, max_event=10_000)
    async with asyncio.timeout(20):  # and not the sixty seconds of the attempt
        reply = await worker.chat(unit="u", stream=True)
    assert reply.status == 200
    assert texts(reply.events) == "hello"
    last = reply.events[-1]
    assert error_of(last)["message"] == broken.ends
    assert error_of(last)["type"] == "server_error"
    if name == "error":
        assert last == b"data: " + BOOM + b"\n\n"
    assert model.DONE not in reply.events
    assert len(reply.events) == 4
    assert "x-shipworthy-fallback" not in reply.headers
    record = worker.journal.last
    assert (record.outcome, record.reason) == (broken.outcome, broken.reason)
    assert (record.assigned, record.serving, record.status) == (which, which, 200)
    assert (record.attempts, record.stream) == (1, True)
    assert record.response_bytes == len(reply.body)
    assert (record.output_tokens, record.tokens_estimated) == (2, True)
    asked = len(worker.model.received) + len(worker.candidate_model.received)
    assert asked == 1


async def test_a_stream_that_takes_too_long_is_ended(worker, model, release):
    broken = BREAK_OFFS["too_long"]
    worker.model.behave = model.streaming(*[model.chunk("x"), 0.05] * 600)
    await worker.start(release(deadlines=model.Deadlines(idle=10.0, stream=0.4)))
    async with asyncio.timeout(20):
        reply = await worker.chat(stream=True)
    assert error_of(reply.events[-1])["message"] == broken.ends
    record = worker.journal.last
    assert (record.outcome, record.reason) == (broken.outcome, broken.reason)


# --- what passes ------------------------------------------------------------------------------


async def test_events_pass_one_by_one_and_only_the_models_name_is_changed(worker, model, release):
    odd = b': keep-alive\r\n\r\nevent: x\nid: 7\ndata: {"choices":[],\ndata: "y": 1.0}\n\n'
    spaced = b'data:{"x_new": [1, 2.50], "model" : "served", "choices":[{"index":0,"delta":{"content":"a"}}]}\n\n'  # noqa: E501
    worker.model.behave = model.streaming(odd + spaced, model.LAST, model.DONE)
    await worker.start(release())
    reply = await worker.chat(stream=True)
    expected = odd + spaced + model.LAST + model.DONE
    assert reply.body == expected.replace(b"served", b"digits")
    assert reply.headers["transfer-encoding"] == "chunked"
    assert reply.headers["x-shipworthy-inference"] == worker.journal.last.id
    sent = msgspec.json.decode(worker.model.received[0].body)
    assert sent == model.chat_of(model="served", stream=True)


async def test_an_event_is_with_the_client_before_the_next_one_is_made(worker, model, release):
    going = asyncio.Event()

    async def step(writer: asyncio.StreamWriter) -> None:
        await model.streaming(model.chunk("one"), then=waiting)(writer)

    async def waiting(writer: asyncio.StreamWriter) -> None:
        await going.wait()
        await chunks(model.chunk("two"), model.LAST, model.DONE)(writer)

    worker.model.behave = step
    await worker.start(release())
    async with worker.watching() as response:
        first = await response.content.readuntil(b"\n\n")
        assert texts([first]) == "one"
        assert worker.journal.calls == []
        going.set()
        rest = await response.content.read()
    assert rest.endswith(model.DONE)
    record = worker.journal.last
    assert (record.outcome, record.finish, record.status) == (Outcome.SUCCESS, "stop", 200)


async def test_an_event_in_pieces_is_passed_on_as_a_whole(worker, model, release):
    event = model.chunk("whole")
    cut = len(event) - 1
    worker.model.behave = model.streaming(
        *[event[at : at + 1] for at in range(cut)], event[cut:], model.LAST + model.DONE
    )
    await worker.start(release())
    reply = await worker.chat(stream=True)
    assert texts(reply.events) == "whole"


async def test_completions_are_streamed_too(worker, model, release):
    event = (
        b'data: {"model":"served","choices":[{"index":0,"text":"abc","finish_reason":null}]}\n\n'
    )
    worker.model.behave = model.streaming(event, model.DONE)
    await worker.start(release())
    asked = {"model": "digits", "prompt": "a", "stream": True}
    reply = await worker.ask("POST", "/v1/completions", body=asked)
    assert reply.body == event.replace(b"served", b"digits") + model.DONE
    assert worker.journal.last.operation == "completions"


async def test_a_server_that_takes_no_notice_of_stream_answers_in_one_piece(worker, model, release):
    worker.model.behave = model.responding(model.chat_answer("all of it"))
    await worker.start(release())
    reply = await worker.chat(stream=True)
    assert reply.headers["content-type"] == "application/json"
    assert reply.json["choices"][0]["message"]["content"] == "all of it"
    record = worker.journal.last
    assert (record.outcome, record.stream, record.output_tokens) == (Outcome.SUCCESS, False, 2)


@pytest.mark.parametrize("refuse", ["stable", "both"])
async def test_what_a_server_refuses_is_passed_on_in_one_piece(worker, model, release, refuse):
    worker.candidate_model.behave = model.responding(BOOM, "400 Bad Request")
    if refuse == "both":
        worker.model.behave = model.responding(BOOM, "400 Bad Request")
    await worker.start(release(candidate=True))
    reply = await worker.chat(stream=True, unit="u")
    record = worker.journal.last
    if refuse == "both":
        assert (reply.status, reply.body) == (400, BOOM)
        assert (record.outcome, record.reason) == (Outcome.CLIENT_FAULT, "refused_input")
    else:
        assert texts(reply.events) == "stable"
        assert (record.outcome, record.reason) == (Outcome.FAILURE, "status_4xx")


async def test_a_stream_may_end_without_done_when_all_of_it_has_finished(worker, model, release):
    worker.model.behave = model.streaming(model.chunk("a"), model.LAST)
    await worker.start(release())
    reply = await worker.chat(stream=True)
    assert texts(reply.events) == "a"
    assert len(reply.events) == 2
    assert worker.journal.last.outcome is Outcome.SUCCESS


async def test_a_stream_whose_choices_are_not_all_finished_has_broken_off(worker, model, release):
    second = {"index": 1, "delta": {"content": "b"}, "finish_reason": None}
    worker.model.behave = model.streaming(
        model.chunk("a"), model.chunk(choices=[second]), model.LAST
    )
    await worker.start(release())
    reply = await worker.chat(stream=True, n=2)
    assert error_of(reply.events[-1])["message"] == _BROKEN
    assert worker.journal.last.reason == "broken"


# --- times and usage --------------------------------------------------------------------------


async def test_times_to_the_first_content_and_between_pieces_are_recorded(worker, model, release):
    worker.model.behave = model.streaming(
        model.chunk(), 0.2, model.chunk("a"), 0.1, model.chunk("b"), 0.3, model.chunk("c"),
        model.LAST, model.DONE,
    )  # fmt: skip
    await worker.start(release())
    await worker.chat(stream=True)
    record = worker.journal.last
    assert 0.19 < record.first_content_seconds < record.seconds
    assert record.attempt_seconds >= record.first_content_seconds
    assert 0.19 < record.gap_seconds <= record.longest_gap_seconds
    assert 0.29 < record.longest_gap_seconds < record.seconds


async def test_usage_that_only_we_asked_for_is_hidden(worker, model, release):
    worker.model.behave = model.streaming(model.chunk("a"), model.LAST, model.USAGE, model.DONE)
    plan = release()
    price = Price(per_1k_input=1.0, per_1k_output=1.0)
    await worker.start(changed(plan, stable=changed(plan.stable, price=price)))
    reply = await worker.chat(stream=True, stream_options={"x_own": 1})
    asked = msgspec.json.decode(worker.model.received[0].body)
    assert asked["stream_options"] == {"x_own": 1, "include_usage": True}
    assert b'"usage"' not in reply.body
    assert len(reply.events) == 3
    reply = await worker.chat(stream=True, stream_options={"include_usage": True})
    assert b'"usage":{"prompt_tokens":9' in reply.events[2]
    for record in worker.journal.calls:
        assert (record.input_tokens, record.output_tokens) == (9, 2)
        assert not record.tokens_estimated
        assert record.cost == pytest.approx(0.011)


async def test_usage_that_a_server_does_not_tell_is_counted(worker, model, release):
    worker.model.behave = model.telling("a", "bcdefghij", "k")
    plan = release()
    adding = changed(plan.stable, behaviour=Behaviour(system="x" * 30))
    await worker.start(changed(plan, stable=adding))
    await worker.chat(stream=True, messages=[{"role": "user", "content": "y" * 40}])
    record = worker.journal.last
    assert (record.input_tokens, record.output_tokens) == (18, 3)
    assert record.tokens_estimated


async def test_limits_are_settled_to_what_a_stream_has_used(worker, model, release, tmp_path):
    worker.outside["limits"] = UsageTable(tmp_path / "limits", worker.clock)
    keys = dict(worker.snapshot.keys)
    keys["client"] = changed(keys["client"], limits=Limits(tokens_per_minute=1000))
    worker.snapshot = changed(worker.snapshot, keys=keys)
    worker.model.behave = model.streaming(model.chunk("a"), model.LAST, model.USAGE, model.DONE)
    await worker.start(release())
    for used in (0, 11, 22):
        reply = await worker.chat(stream=True, max_tokens=500)
        assert reply.headers["x-ratelimit-remaining-tokens"] == str(1000 - 501 - used)


async def test_a_stream_is_captured_as_the_client_got_it(worker, model, release):
    worker.model.behave = model.telling("mail jo@example.org", " " * 3000)
    capture = Capture(payloads="full", max_bytes=400, redact=("email",))
    await worker.start(release(capture=capture))
    reply = await worker.chat(stream=True)
    record = worker.journal.last
    assert b"jo@example.org" in reply.body
    assert b"jo@" not in record.response
    assert record.redacted == 1
    assert len(record.response) <= 400 < record.response_bytes == len(reply.body)
    assert len(record.response_digest) == 64


async def test_the_record_is_written_before_the_last_piece_leaves(
    worker, model, release, monkeypatch
):
    written: list[int] = []
    end = ClientConnection.end_stream

    def noting(self, last: bytes = b"") -> None:
        written.append(len(worker.journal.calls))
        end(self, last)

    monkeypatch.setattr(ClientConnection, "end_stream", noting)
    await worker.start(release())
    await worker.chat(stream=True)
    worker.model.behave = model.streaming(model.chunk("a"), then=model.closing)
    await worker.chat(stream=True)
    assert written == [1, 2]


# --- clients ----------------------------------------------------------------------------------


async def test_a_client_that_hangs_up_cancels_the_call_upstream(worker, model, release):
    broken = BREAK_OFFS["hangs_up"]
    worker.candidate_model.behave = model.streaming(
        model.chunk("one"), model.chunk("two"), then=model.hanging
    )
    await worker.start(release(candidate=True, capture=Capture(payloads="full")))
    async with worker.watching(user="u") as response:
        await response.content.readuntil(b"\n\n")
        await response.content.readuntil(b"\n\n")
        response.close()
    await worker.until(lambda: worker.candidate_model.hung_up == 1)
    await worker.until(lambda: bool(worker.journal.calls))
    record = worker.journal.last
    assert (record.outcome, record.reason) == (broken.outcome, broken.reason)
    assert (record.assigned, record.serving, record.status) == ("candidate", "candidate", 499)
    assert (record.output_tokens, record.tokens_estimated) == (2, True)
    assert b"two" in record.response
    assert worker.model.received == []


async def test_one_that_hangs_up_before_the_first_content_too(worker, model, release):
    worker.model.behave = model.streaming(model.chunk(), then=model.hanging)
    await worker.start(release())
    asking = asyncio.create_task(worker.chat(stream=True))
    await worker.until(lambda: worker.model.open == 1)
    asking.cancel()
    await asyncio.gather(asking, return_exceptions=True)
    await worker.until(lambda: worker.model.hung_up == 1)
    await worker.until(lambda: bool(worker.journal.calls))
    record = worker.journal.last
    assert (record.outcome, record.reason, record.serving) == (
        Outcome.CENSORED, "client_gone", None,
    )  # fmt: skip


class Endless:
    """A stream that goes on for as long as it is read, with numbers."""

    def __init__(self, model) -> None:
        self.model = model
        self.sent = 0
        self.number = 0
        self.enough = False

    async def __call__(self, writer: asyncio.StreamWriter) -> None:
        head = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n"
        writer.write(head + b"transfer-encoding: chunked\r\n\r\n")
        while not self.enough:
            event = self.model.chunk(f"{self.number}," + " " * 8000)
            writer.write(b"%x\r\n%s\r\n" % (len(event), event))
            await writer.drain()
            self.sent += len(event)
            self.number += 1
        await chunks(self.model.LAST, self.model.DONE)(writer)


def asking(worker, model, **changes: Any) -> bytes:
    body = msgspec.json.encode(model.chat_of(stream=True, **changes))
    return (
        f"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\n"
        f"authorization: Bearer {worker.keys['client']}\r\n\r\n".encode()
    ) + body


async def slow_reader(worker, model) -> socket.socket:
    """A client that has asked, and reads nothing."""
    client = socket.socket()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 16_384)
    client.setblocking(False)
    loop = asyncio.get_running_loop()
    await loop.sock_connect(client, ("127.0.0.1", worker.port))
    await loop.sock_sendall(client, asking(worker, model))
    return client


async def stalled(endless: Endless) -> None:
    """Until it has sent nothing for a while."""
    async with asyncio.timeout(20):
        before = -1
        while before != endless.sent or not before:
            before = endless.sent
            await asyncio.sleep(0.3)


async def test_a_slow_reader_slows_the_server_down(worker, model, release):
    endless = worker.model.behave = Endless(model)
    await worker.start(release(), slow_reader_seconds=60.0)
    client = await slow_reader(worker, model)
    await stalled(endless)
    assert endless.sent < 32 * 1024 * 1024  # what fits into the sockets' buffers
    [wire] = [one for one in gc.get_objects() if type(one).__name__ == "Wire" and not one.lost]
    assert wire._size < 1024 * 1024
    endless.enough = True
    loop, got = asyncio.get_running_loop(), bytearray()
    async with asyncio.timeout(30):
        while b"[DONE]" not in got[-100:]:
            got += await loop.sock_recv(client, 1 << 20)
    client.close()
    numbers = [int(part.split(b",")[0]) for part in bytes(got).split(b'"content":"')[1:-1]]
    assert numbers == list(range(endless.number))
    await worker.until(lambda: bool(worker.journal.calls))
    assert worker.journal.last.outcome is Outcome.SUCCESS


async def test_a_reader_that_stops_is_cut_off(worker, model, release):
    broken = BREAK_OFFS["slow"]
    worker.model.behave = Endless(model)
    await worker.start(release(), slow_reader_seconds=0.3)
    client = await slow_reader(worker, model)
    await worker.until(lambda: worker.model.open == 0 and bool(worker.model.received), 20)
    await worker.until(lambda: bool(worker.journal.calls))
    record = worker.journal.last
    assert (record.outcome, record.reason) == (broken.outcome, broken.reason)
    client.close()


async def test_a_reader_as_slow_as_can_be_does_not_hold_a_stream_for_ever(worker, model, release):
    worker.model.behave = Endless(model)
    deadlines = model.Deadlines(idle=10.0, stream=0.5)
    await worker.start(release(deadlines=deadlines), slow_reader_seconds=5.0)
    client = await slow_reader(worker, model)
    loop, got = asyncio.get_running_loop(), b""
    async with asyncio.timeout(30):
        while b"not read in time" not in got:
            got = got[-100:] + await loop.sock_recv(client, 65_536)
            await asyncio.sleep(0 if worker.journal.calls else 0.01)
    record = worker.journal.last
    assert (record.outcome, record.reason) == (Outcome.CENSORED, "client_gone")
    client.close()


async def test_a_worker_that_ends_tells_so_in_the_stream(worker, model, release):
    broken = BREAK_OFFS["shutdown"]
    worker.model.behave = model.streaming(model.chunk("one"), then=model.hanging)
    await worker.start(release(), drain_seconds=0.2)
    async with worker.watching() as response:
        first = await response.content.readuntil(b"\n\n")
        worker.begin_stop()
        rest = await response.content.read()
    assert texts([first]) == "one"
    assert error_of(rest)["message"] == broken.ends
    record = worker.journal.last
    assert (record.outcome, record.reason) == (broken.outcome, broken.reason)
    assert (record.serving, record.output_tokens) == ("stable", 1)


async def test_a_stream_that_ends_in_time_is_not_cut_off_by_a_worker_that_ends(
    worker, model, release
):
    worker.model.behave = model.streaming(
        model.chunk("one"), 0.3, model.chunk("two"), model.LAST, model.DONE
    )
    await worker.start(release(), drain_seconds=10.0)
    async with worker.watching() as response:
        await response.content.readuntil(b"\n\n")
        worker.begin_stop()
        rest = await response.content.read()
    assert rest.endswith(model.DONE)
    assert worker.journal.last.outcome is Outcome.SUCCESS


# --- connections ------------------------------------------------------------------------------


async def test_a_connection_goes_on_after_a_stream(worker, model, release):
    await worker.start(release())
    reader, writer = await asyncio.open_connection("127.0.0.1", worker.port)
    for _ in range(3):
        writer.write(asking(worker, model))
        answer = await reader.readuntil(b"0\r\n\r\n")
        assert answer.startswith(b"HTTP/1.1 200 OK\r\n")
        assert b"[DONE]" in answer
        assert b"connection: close" not in answer
    writer.write(b"GET /healthz HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
    assert (await reader.read()).startswith(b"HTTP/1.1 200 OK\r\n")
    writer.close()


async def test_what_is_sent_behind_a_stream_is_answered_behind_it(worker, model, release):
    worker.model.behave = model.streaming(
        model.chunk("a"), 0.2, model.chunk("b"), model.LAST, model.DONE
    )
    await worker.start(release())
    health = b"GET /healthz HTTP/1.1\r\nhost: x\r\n\r\n"
    last = health.replace(b"\r\n\r\n", b"\r\nconnection: close\r\n\r\n")
    twice = asking(worker, model) + health + asking(worker, model) + last
    answer = await worker.raw(twice, 20)
    parts = answer.split(b"HTTP/1.1 200 OK\r\n")[1:]
    assert [b"[DONE]" in part for part in parts] == [True, False, True, False]
    assert [b"connection: close" in part for part in parts] == [False, False, False, True]
    assert len(worker.model.received) == 2


async def test_a_client_of_http_1_0_gets_a_stream_that_ends_with_the_connection(
    worker, model, release
):
    await worker.start(release())
    answer = await worker.raw(asking(worker, model).replace(b"HTTP/1.1", b"HTTP/1.0"))
    head, _, body = answer.partition(b"\r\n\r\n")
    assert b"transfer-encoding" not in head
    assert b"content-length" not in head
    assert b"connection: close" in head
    assert body.endswith(b"\n\n" + model.DONE)
    assert texts([e + b"\n\n" for e in body.split(b"\n\n")[:-1]]) == "stable"


async def test_a_client_that_wants_to_close_gets_a_stream_and_the_end(worker, model, release):
    await worker.start(release())
    asked = asking(worker, model).replace(b"host: x", b"host: x\r\nconnection: close")
    answer = await worker.raw(asked)
    assert b"connection: close" in answer.partition(b"\r\n\r\n")[0]
    assert answer.endswith(b"[DONE]\n\n\r\n0\r\n\r\n")


def kept(url: str) -> int:
    """How many connections to this server wait to be used again."""
    states = [one for one in gc.get_objects() if isinstance(one, EndpointState)]
    return sum(len(one.pool._idle) for one in states if one.url == url)


@pytest.mark.parametrize("pause", [0.0, 0.2])
async def test_the_connection_upstream_is_used_again_after_done(worker, model, release, pause):
    worker.model.behave = model.streaming(model.chunk("a"), model.LAST, model.DONE, pause)
    await worker.start(release())
    for _ in range(3):
        await worker.chat(stream=True)
        await worker.until(lambda: kept(worker.model.url) == 1)
    assert worker.model.connections == 1


async def test_a_server_that_does_not_end_after_done_is_left(worker, model, release):
    worker.model.behave = model.streaming(
        model.chunk("a"), model.LAST, model.DONE, then=model.hanging
    )
    await worker.start(release())
    for _ in range(2):
        reply = await worker.chat(stream=True)
        assert reply.events[-1] == model.DONE
    assert {call.outcome for call in worker.journal.calls} == {Outcome.SUCCESS}
    await worker.until(lambda: worker.model.hung_up == 2, 10)
    assert worker.model.connections == 2


async def test_what_is_wrong_behind_a_stream_never_gets_into_it(worker, model, release):
    worker.model.behave = model.streaming(model.chunk("a"), then=model.hanging)
    await worker.start(release(), head_seconds=0.3)
    reader, writer = await asyncio.open_connection("127.0.0.1", worker.port)
    writer.write(asking(worker, model))
    begun = await reader.readuntil(b"\n\n\r\n")
    writer.write(b"\x00garbage\r\n\r\n")
    async with asyncio.timeout(20):
        rest = await reader.read()
    writer.transport.abort()
    assert begun.count(b"HTTP/1.1 ") == 1
    assert rest == b""
    await worker.until(lambda: bool(worker.journal.calls))
    record = worker.journal.last
    assert (record.outcome, record.reason) == (Outcome.CENSORED, "client_gone")
    await worker.until(lambda: worker.model.hung_up == 1)


async def test_half_a_head_behind_a_stream_waits_for_its_end(worker, model, release):
    go_on = asyncio.Event()

    async def held(writer):
        await go_on.wait()
        writer.write(b"%x\r\n%s\r\n0\r\n\r\n" % (len(model.DONE), model.DONE))

    worker.model.behave = model.streaming(model.chunk("a"), model.LAST, then=held)
    await worker.start(release(), head_seconds=0.1)
    reader, writer = await asyncio.open_connection("127.0.0.1", worker.port)
    writer.write(asking(worker, model))
    await reader.readuntil(b"\n\n\r\n")
    writer.write(b"GET / HTTP/1.1\r\nhost")
    await asyncio.sleep(0.3)
    go_on.set()
    async with asyncio.timeout(20):
        rest = await reader.read()
    writer.close()
    assert model.DONE in rest
    assert rest.endswith(b"}")  # and then the head is late
    assert b"HTTP/1.1 408" in rest
    assert worker.journal.last.outcome is Outcome.SUCCESS


async def test_a_stream_without_length_or_chunks_ends_with_its_connection(worker, model, release):
    worker.model.behave = model.streaming(
        model.chunk("a"), model.LAST, model.DONE, then=model.closing, chunked=False
    )
    await worker.start(release())
    reply = await worker.chat(stream=True)
    assert texts(reply.events) == "a"
    assert worker.journal.last.outcome is Outcome.SUCCESS
    worker.model.behave = model.streaming(model.chunk("a"), then=model.closing, chunked=False)
    reply = await worker.chat(stream=True)
    assert error_of(reply.events[-1])["message"] == _BROKEN
    assert worker.journal.last.reason == "broken"


async def test_hints_before_an_answer_are_passed_over(worker, model, release):
    async def hinting(writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 103 Early Hints\r\ncontent-type: text/html\r\nlink: </x>\r\n\r\n")
        await writer.drain()
        await asyncio.sleep(0.05)
        await model.telling("a")(writer)

    worker.model.behave = hinting
    await worker.start(release())
    for _ in range(2):
        assert texts((await worker.chat(stream=True)).events) == "a"
    assert worker.model.connections == 1


async def test_a_compressed_stream_is_none(worker, model, release):
    worker.model.behave = model.streaming(
        b"\x1f\x8b\x08\x00" * 20, then=model.closing, headers="content-encoding: gzip\r\n"
    )
    await worker.start(release(shield=model.Shield(retry_burst=0)))
    reply = await worker.chat(stream=True)
    assert (reply.status, worker.journal.last.reason) == (502, "broken")


async def test_what_comes_before_the_first_content_is_bounded(worker, model, release):
    """A server that says much and tells nothing must not fill this worker's memory."""
    worker.model.behave = model.streaming(*(100 * [b": " + b"x" * 10_000 + b"\n\n"]), 5.0)
    await worker.start(release(), max_event=100_000)
    reply = await worker.chat(stream=True)
    assert (reply.status, worker.journal.last.reason) == (502, "broken")
