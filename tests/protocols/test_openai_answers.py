"""OpenAI's protocol on its way back: what an answer says, and what a stream has said so far."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shipworthy.protocols.events import DONE, EventSplitter, error_event, event
from shipworthy.protocols.openai import (
    Seen,
    StreamReader,
    Usage,
    read_answer,
    rename_event,
)

USAGE = {"prompt_tokens": 9, "completion_tokens": 3, "total_tokens": 12}
COUNTED = Usage(9, 3)


def answer(*choices, usage: Any = USAGE, **more: Any):
    said = {"id": "1", "model": "m", "choices": list(choices), "usage": usage, **more}
    return json.dumps(said, ensure_ascii=False).encode()


def choice(content: Any = "Hi", finish: str | None = "stop", **message: Any):
    said = {"role": "assistant", "content": content, **message}
    return {"index": 0, "message": said, "logprobs": None, "finish_reason": finish}


def chunk(*choices, operation="chat", **more: Any):
    kind = "chat.completion.chunk" if operation == "chat" else "text_completion"
    said = {"id": "1", "object": kind, "model": "org/m", "choices": list(choices), **more}
    return event(json.dumps(said, separators=(",", ":")).encode())


def piece(index=0, finish: str | None = None, **delta: Any):
    return {"index": index, "delta": delta, "logprobs": None, "finish_reason": finish}


def seen(*events, operation: Any = "chat"):
    """What a reader makes of these events, and the reader."""
    reader = StreamReader(operation)
    return [reader.see(one) for one in events], reader


# --- in one piece -----------------------------------------------------------------------------


def test_what_an_answer_says():
    answered = read_answer("chat", answer(choice("größe")))
    assert (answered.usage, answered.finish, answered.problem) == (COUNTED, "stop", "")
    assert (answered.output_text_bytes, answered.tool_calls) == (7, False)


def test_a_server_can_not_fill_records_with_its_reason():
    assert len(read_answer("chat", answer(choice(finish="x" * 10_000))).finish) == 200


def test_cached_tokens_are_told_where_the_server_does():
    usage = {**USAGE, "prompt_tokens_details": {"cached_tokens": 4, "audio_tokens": 0}}
    assert read_answer("chat", answer(choice(), usage=usage)).usage == Usage(9, 3, 4)


def test_tool_calls_and_reasoning_are_output_too():
    call = {"id": "1", "type": "function", "function": {"name": "abc", "arguments": "{1}"}}
    tools = read_answer("chat", answer(choice(None, "tool_calls", tool_calls=[call])))
    assert (tools.output_text_bytes, tools.tool_calls, tools.finish) == (6, True, "tool_calls")
    old = read_answer("chat", answer(choice(None, function_call={"name": "abc", "arguments": ""})))
    assert (old.output_text_bytes, old.tool_calls) == (3, True)
    reasoned = read_answer("chat", answer(choice("Hi", reasoning_content="Hm", reasoning="Hm")))
    assert reasoned.output_text_bytes == 4
    assert read_answer("chat", answer(choice(None, refusal="No."))).output_text_bytes == 3
    assert read_answer("chat", answer(choice([{"type": "text", "text": "a"}]))).problem == ""


def test_several_choices_tell_their_different_reasons():
    same = read_answer("chat", answer(choice(), choice()))
    assert (same.finish, same.output_text_bytes) == ("stop", 4)
    both = read_answer("chat", answer(choice(), choice(finish="length"), choice(finish=None)))
    assert both.finish == "stop,length"


def test_a_completion_is_text():
    said = {"text": "Hi", "index": 0, "finish_reason": "length", "logprobs": {"tokens": ["Hi"]}}
    answered = read_answer("completions", answer(said))
    assert (answered.output_text_bytes, answered.finish, answered.problem) == (2, "length", "")
    assert read_answer("completions", answer({**said, "text": ""})).problem == ""


def test_embeddings_have_no_output_tokens():
    said = {"data": [{"embedding": [0.5]}, {"embedding": "AAA="}], "usage": {"prompt_tokens": 4}}
    answered = read_answer("embeddings", json.dumps(said).encode())
    assert (answered.usage, answered.problem) == (Usage(4, 0), "")


@pytest.mark.parametrize(
    "usage",
    [
        None, {}, 5, [], "9", {"prompt_tokens": None}, {"prompt_tokens": -1},
        {"prompt_tokens": 1.5}, {"prompt_tokens": 10**30}, {**USAGE, "completion_tokens": "3"},
        {**USAGE, "completion_tokens": -3},
    ],
)  # fmt: skip
def test_a_count_that_makes_no_sense_is_none_and_no_ones_fault(usage):
    answered = read_answer("chat", answer(choice(), usage=usage))
    assert (answered.usage, answered.problem) == (None, "")


def test_more_cached_tokens_than_there_are_were_not_counted():
    usage = {**USAGE, "prompt_tokens_details": {"cached_tokens": 10}}
    assert read_answer("chat", answer(choice(), usage=usage)).usage == COUNTED


@pytest.mark.parametrize(
    ("operation", "said", "problem"),
    [
        ("chat", b"", "the body is empty"),
        ("chat", b"<html>", "the body is not JSON"),
        ("chat", b"[]", "body: expected object, got array"),
        ("chat", b'{"choices":[{"message":{"content":"\xff"}}]}', "the body is not valid UTF-8"),
        ("chat", b"{}", "choices: missing"),
        ("chat", b'{"choices":[]}', "choices: empty"),
        ("chat", b'{"choices":{}}', "choices: expected array | null, got object"),
        ("chat", b'{"choices":["a"]}', "choices[0]: expected object, got str"),
        ("chat", b'{"choices":[{"text":"a"}]}', "choices[0].message: missing"),
        ("chat", b'{"choices":[{"message":"a"}]}', "choices[0].message: expected object"),
        ("chat", b'{"error":{"message":"out of memory"}}', "error: out of memory"),
        ("chat", answer(choice(), error="late"), "error: late"),
        ("chat", b'{"object":"error","message":"old"}', "error: old"),
        ("completions", b'{"choices":[{"message":{}}]}', ""),
        ("completions", b'{"choices":[{"index":0}]}', "choices[0].text: missing"),
        ("completions", b'{"choices":[{"text":null}]}', "choices[0].text: missing"),
        ("embeddings", b'{"usage":{}}', "data: missing"),
        ("embeddings", b'{"data":[]}', "data: empty"),
        ("embeddings", b'{"data":[{"index":0}]}', "data[0]: object missing required field"),
        ("embeddings", b'{"error":"no"}', "error: no"),
    ],
)
def test_a_200_without_an_answer_is_a_problem(operation, said, problem):
    found = read_answer(operation, said).problem
    assert found.startswith(problem)
    assert bool(found) == bool(problem)


def test_an_error_of_null_is_none():
    assert read_answer("chat", answer(choice(), error=None)).problem == ""


@given(st.sampled_from(["chat", "completions", "embeddings"]), st.binary())
def test_any_bytes_are_an_answer_or_have_a_problem(operation, said):
    assert read_answer(operation, said).problem


# --- streams ----------------------------------------------------------------------------------

CHAT = [
    chunk(piece(role="assistant", content="")),
    chunk(piece(content="größe")),
    b": keep-alive\n\n",
    chunk(piece(content=" und")),
    chunk(piece(finish="stop")),
    chunk(usage=USAGE),
    DONE,
]


def test_a_stream_from_beginning_to_end():
    kinds, reader = seen(*CHAT)
    assert kinds == [
        Seen.OTHER, Seen.CONTENT, Seen.OTHER, Seen.CONTENT, Seen.OTHER, Seen.USAGE, Seen.DONE,
    ]  # fmt: skip
    assert (reader.usage, reader.finish, reader.content_events) == (COUNTED, "stop", 2)
    assert reader.output_text_bytes == len(r"gr\u00f6\u00dfe und")
    assert (reader.done, reader.broken_off, reader.tool_calls, reader.error) == (
        True,
        False,
        False,
        "",
    )


@pytest.mark.parametrize(
    "delta",
    [
        {"content": "a"},
        {"reasoning_content": "a"},
        {"reasoning": "a"},
        {"refusal": "a"},
        {"tool_calls": [{"index": 0, "id": "1", "function": {"name": "f", "arguments": ""}}]},
        {"tool_calls": [{"index": 0}]},
        {"function_call": {"name": "f"}},
        {"content": [{"type": "text", "text": "a"}]},
        {"audio": {"data": "AA"}},
    ],
)
def test_anything_to_read_is_content(delta):
    kinds, reader = seen(chunk(piece(**delta)))
    assert kinds == [Seen.CONTENT]
    assert reader.content_events == 1
    assert reader.tool_calls == bool(set(delta) & {"tool_calls", "function_call"})


@pytest.mark.parametrize(
    "one",
    [
        chunk(piece(role="assistant")),
        chunk(piece(role="assistant", content=None)),
        chunk(piece(content="", tool_calls=None, audio=None, refusal=None, reasoning="")),
        chunk(piece(tool_calls=[])),
        chunk({"index": 0, "delta": None, "finish_reason": None}),
        chunk(),
        chunk(usage=None, prompt_filter_results=[]),
        event(b"{}"),
        b": comment\n\n",
        b"id: 1\n\n",
        b"\n\n",
    ],
)
def test_all_else_is_not(one):
    kinds, reader = seen(one)
    assert (kinds, reader.content_events, reader.error) == ([Seen.OTHER], 0, "")


def test_a_completions_text_is_content():
    def text(said, finish=None):
        piece = {"text": said, "index": 0, "logprobs": None, "finish_reason": finish}
        return chunk(piece, operation="completions")

    kinds, reader = seen(text("a"), text(""), text("b", "length"), operation="completions")
    assert kinds == [Seen.CONTENT, Seen.OTHER, Seen.CONTENT]
    assert (reader.output_text_bytes, reader.finish, reader.broken_off) == (2, "length", False)


def test_usage_that_comes_along_with_content_counts_and_is_passed_on():
    kinds, reader = seen(chunk(piece(content="a"), usage=USAGE), chunk(usage={**USAGE, "x": 1}))
    assert kinds == [Seen.CONTENT, Seen.USAGE]
    assert reader.usage == COUNTED


@pytest.mark.parametrize(
    ("one", "says"),
    [
        (error_event("overloaded", "server_error", None), "overloaded"),
        (event(b'{"error":"plain"}'), "plain"),
        (event(b'{"object":"error","message":"old"}'), "old"),
        (event(b'{"message":"named"}', b"error"), "named"),
        (event(b'{"detail":"named"}', b"error"), "named"),
        (event(b"boom", b"error"), "the body is not JSON"),
        (chunk(piece(content="a"), error={"message": "late"}), "late"),
    ],
)
def test_an_error_says_what_it_is(one, says):
    kinds, reader = seen(one)
    assert kinds == [Seen.ERROR]
    assert reader.error.startswith(says)


@pytest.mark.parametrize(
    "data",
    [
        b"hello", b"[1]", b'{"choices":', b'{"choices":5}', b'{"x":"\xff"}', b"[DONE", b"",
        b'{"choices":[{"delta":"a"}]}', b"[" * 100_000,
    ],
)  # fmt: skip
def test_data_that_is_not_the_protocols_is_garbage(data):
    kinds, reader = seen(event(data))
    assert kinds == [Seen.GARBAGE]
    assert reader.error


@pytest.mark.parametrize(
    ("events", "broken"),
    [
        ([], True),
        (CHAT[:1], True),
        (CHAT[:4], True),
        (CHAT[:5], False),
        ([DONE], False),
        (
            [chunk(piece(0, content="a")), chunk(piece(1, content="b")), chunk(piece(0, "stop"))],
            True,
        ),
        ([chunk(piece(0, "stop")), chunk(piece(1, "length"))], False),
    ],
)
def test_a_stream_without_an_end_is_broken_off(events, broken):
    assert seen(*events)[1].broken_off is broken


def test_choices_of_a_stream_tell_their_different_reasons_in_their_order():
    _, reader = seen(chunk(piece(2, "stop")), chunk(piece(1, "length")), chunk(piece(0, "stop")))
    assert reader.finish == "stop,length"


@given(st.lists(st.binary() | st.sampled_from(CHAT)))
def test_of_any_bytes_a_reader_makes_something(events):
    kinds, reader = seen(*events)
    assert len(kinds) == len(events)
    assert reader.content_events == kinds.count(Seen.CONTENT)


@given(st.lists(st.integers(0, 2_000)))
def test_how_a_stream_arrives_changes_nothing_in_what_it_says(cuts):
    stream, splitter, start = b"".join(CHAT), EventSplitter(1_000), 0
    kinds, reader = [], StreamReader("chat")
    for cut in [*sorted(cut for cut in cuts if cut < len(stream)), len(stream)]:
        kinds += map(reader.see, splitter.feed(stream[start:cut]))
        start = cut
    assert kinds == seen(*CHAT)[0]


# --- the name in events -----------------------------------------------------------------------

SPOKEN = [
    *CHAT,
    chunk(piece(content='"model":"org/m" and "model')),
    chunk(piece(content="a", model="org/m")),
    event(b'{"choices":[{"model":"org/m","delta":{"content":"a"}}]}'),
    event(b'{"choices":[{"model":"org/m","delta":{}}],"\\u006dodel":"org/m"}'),
    event(b'{"model":"org/m","choices":[],"model":"org/m"}'),
    event(b'{"model":"dated-2026","choices":[]}'),
    event(b'{"model":"chat","choices":[]}'),
    event(b'{"model":5,"choices":[]}'),
    b'event: e\r\ndata: {"choices":[],"model" : "org/m"}\r\nid: "model"\r\n\r\n',
    b'data: {"choices":[],\ndata:  "model":"org/m"}\n\n',
    b'data: {"choices":[],"model":"org/m"}',
]


@pytest.mark.parametrize("one", SPOKEN)
def test_an_event_changes_its_name_alone(one):
    renamed = rename_event(one, "org/m", "chat")
    assert seen(renamed)[0] == seen(one)[0]
    data = [json.loads(line) for line in joined(one) if line.startswith("{")]
    for said in data:
        if isinstance(said.get("model"), str):
            said["model"] = "chat"
    assert [json.loads(line) for line in joined(renamed) if line.startswith("{")] == data


def joined(one):
    """The event's data, in a list that is empty when there is none."""
    lines = [line.partition(":")[2] for line in one.decode().splitlines() if line[:5] == "data:"]
    return ["".join(lines).strip()] if lines else []


@pytest.mark.parametrize("one", SPOKEN)
@pytest.mark.parametrize("served", ["org/m", "chat"])
def test_a_reader_renames_what_it_saw_just_so(one, served):
    reader = StreamReader("chat")
    for _ in range(2):
        reader.see(one)
        assert reader.renamed(one, served, "chat") == rename_event(one, served, "chat")
    reader.see(DONE)
    assert reader.renamed(DONE, served, "chat") is DONE


def test_other_fields_of_an_event_stay_as_they_are():
    one = b'id: "model"\r\nevent: e\r\ndata:{ "model" : "org/m" }\r\nretry: 5\r\n\r\n'
    assert rename_event(one, "org/m", "chat") == one.replace(b"org/m", b"chat")


@given(st.binary(), st.sampled_from([b"data: ", b"data:", b""]))
def test_of_any_event_renaming_makes_no_error(data, head):
    one = head + data + b"\n\n"
    reader = StreamReader("completions")
    reader.see(one)
    assert isinstance(reader.renamed(one, "org/m", "chat"), bytes)
    assert isinstance(rename_event(one, "org/m", "chat"), bytes)
