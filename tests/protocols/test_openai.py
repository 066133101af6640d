"""OpenAI's protocol on its way to a release: what is read, changed and refused."""

import json
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shipworthy.domain.plan import Behaviour
from shipworthy.protocols.messages import InvalidMessage, MalformedMessage
from shipworthy.protocols.openai import (
    error_body,
    error_text,
    error_type,
    estimate_tokens,
    for_upstream,
    model_document,
    models_list,
    read_request,
    rename_model,
    with_behaviour,
)

HELLO = {"role": "user", "content": "Hello"}
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**40), 2**40) | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["model", "messages", "x"]) | st.text(max_size=4), inner)
    ),
    max_leaves=8,
)
EXTRA = st.dictionaries(
    st.sampled_from(["logprobs", "metadata", 'a"model', "modèle", "\\", ""]) | st.text(max_size=6),
    JSON,
    max_size=4,
)
PLAIN = st.dictionaries(
    st.text(st.characters(min_codepoint=32, max_codepoint=126)).filter(
        lambda name: name not in {"model", "messages", "stream", "n", "user", "tools"}
    ),
    JSON,
    max_size=4,
)
STYLE = st.fixed_dictionaries(
    {
        "ensure_ascii": st.booleans(),
        "indent": st.sampled_from([None, 0, 2]),
        "separators": st.sampled_from([None, (",", ":"), (" ,\r\n", "\t: ")]),
    }
)


def body(*, model: Any = "chat", messages: Any = (HELLO,), **more: Any):
    return json.dumps({"messages": messages, "model": model, **more}).encode()


def sent(
    said: Any, *, operation: Any = "chat", behaviour=None, want_usage=False, served="org/m-7b"
):
    """The request as a release gets it."""
    encoded = said if isinstance(said, bytes) else json.dumps(said).encode()
    return for_upstream(
        encoded,
        read_request(operation, encoded),
        served_model=served,
        behaviour=behaviour,
        want_usage=want_usage,
    )


def refused(operation: Any, said: Any):
    with pytest.raises(InvalidMessage) as caught:
        read_request(operation, said if isinstance(said, bytes) else json.dumps(said).encode())
    return caught.value


# --- reading ----------------------------------------------------------------------------------


def test_what_a_chat_says():
    request = read_request(
        "chat",
        body(
            stream=True,
            stream_options={"include_usage": True, "more": 1},
            user="u-1",
            n=2,
            max_tokens=5,
            max_completion_tokens=7,
            tools=[{"type": "function"}],
            unknown={"model": "other"},
        ),
    )
    assert (request.operation, request.model, request.user) == ("chat", "chat", "u-1")
    assert (request.stream, request.include_usage, request.tools) == (True, True, True)
    assert (request.n, request.max_tokens, request.messages) == (2, 7, 1)
    assert request.text_bytes == len("Hello") + len('[{"type": "function"}]')


def test_what_a_chat_need_not_say():
    request = read_request("chat", body())
    assert (request.stream, request.include_usage, request.tools) == (False, False, False)
    assert (request.user, request.n, request.max_tokens) == (None, 1, None)


@pytest.mark.parametrize(
    "field",
    ["stream", "stream_options", "user", "n", "max_tokens", "max_completion_tokens", "tools"],
)
def test_null_is_as_good_as_nothing(field):
    assert read_request("chat", body(**{field: None})) == read_request("chat", body())


def test_a_limit_below_nought_is_none():
    assert read_request("chat", body(max_tokens=-1)).max_tokens is None


@pytest.mark.parametrize(
    ("message", "size"),
    [
        ({"role": "user", "content": "größe"}, 7),
        ({"role": "user", "content": 'a\n"'}, 5),
        ({"role": "user", "content": ""}, 0),
        ({"role": "user"}, 0),
        ({"role": "assistant", "content": None, "tool_calls": [{"id": 1}]}, len('[{"id": 1}]')),
        ({"role": "user", "content": [{"type": "text", "text": "abc"}, "de"]}, 5),
        (
            {
                "role": "user",
                "content": [
                    {"type": "image_url", "image_url": {"url": "data:" + "A" * 9_999}},
                    {"type": "text", "text": "What is this?"},
                    {"type": "input_audio", "input_audio": {"data": "AAAA"}},
                    {"type": "new", "text": {"value": 1}},
                ],
            },
            13,
        ),
        ({"role": "assistant", "content": [{"type": "refusal", "refusal": "No."}]}, 3),
        ({"role": "user", "content": 5}, 0),
    ],
)
def test_text_is_counted_and_pictures_are_not(message, size):
    said = json.dumps({"model": "m", "messages": [message]}, ensure_ascii=False).encode()
    assert read_request("chat", said).text_bytes == size


@pytest.mark.parametrize(
    ("value", "count", "size"),
    [
        ("four", 1, 4),
        (["four", "more"], 2, 8),
        ([1, 2, 3], 1, 12),
        ([[1, 2], [3]], 2, 12),
        ([], 0, 0),
    ],
)
@pytest.mark.parametrize(
    ("operation", "field"), [("completions", "prompt"), ("embeddings", "input")]
)
def test_prompts_and_inputs_are_texts_or_token_ids(operation, field, value, count, size):
    request = read_request(operation, json.dumps({"model": "m", field: value}).encode())
    assert (request.messages, request.text_bytes) == (count, size)


def test_a_prompt_may_be_null_and_an_input_a_picture():
    assert read_request("completions", b'{"model":"m","prompt":null}').messages == 1
    request = read_request("embeddings", b'{"model":"m","input":[{"image":"AA,AA"}]}')
    assert (request.messages, request.text_bytes) == (1, 0)


@pytest.mark.parametrize(
    ("operation", "said"),
    [
        ("chat", {"messages": [{}] * 3_000}),
        ("chat", {"messages": [{"content": ["a"] * 3_000}]}),
        ("embeddings", {"input": ["a"] * 3_000}),
    ],
)
def test_of_more_than_anybody_sends_the_size_is_a_bound(operation, said):
    encoded = json.dumps({"model": "m", **said}).encode()
    assert 3_000 <= read_request(operation, encoded).text_bytes <= len(encoded)


def test_content_in_lists_in_lists_is_none():
    nested = b'{"model":"m","messages":[{"content":' + b"[" * 900 + b'"a"' + b"]" * 900 + b"}]}"
    assert read_request("chat", nested).text_bytes == 0


def test_of_more_fields_than_anybody_sends_the_spaces_may_go():
    said = {"messages": [HELLO], **{f"x{number}": [1] for number in range(300)}, "model": "chat"}
    changed = sent(said)
    assert json.loads(changed) == {**said, "model": "org/m-7b"}
    assert b'"messages":[{"role": "user"' in changed


def test_embeddings_are_never_streamed():
    assert not read_request("embeddings", b'{"model":"m","input":"a","stream":true}').stream


@pytest.mark.parametrize(
    ("operation", "said", "says"),
    [
        ("chat", {"model": "m"}, "messages: missing; send at least one message"),
        ("chat", {"model": "m", "messages": None}, "messages: missing"),
        ("chat", {"model": "m", "messages": []}, "messages: empty"),
        ("chat", {"messages": [HELLO]}, "model: missing; name the model to ask"),
        ("chat", {"model": "", "messages": [HELLO]}, "model: missing"),
        ("chat", {"model": None, "messages": [HELLO]}, "model: missing"),
        ("completions", {"model": "m"}, "prompt: missing"),
        ("completions", {"model": "m", "prompt": 5}, "prompt: expected a text or an array"),
        ("embeddings", {"model": "m"}, "input: missing"),
        ("embeddings", {"model": "m", "input": None}, "input: missing"),
        ("embeddings", {"model": "m", "input": {}}, "input: expected a text or an array"),
    ],
)
def test_what_is_missing_is_named(operation, said, says):
    problem = refused(operation, said)
    assert str(problem).startswith(says)
    assert not isinstance(problem, MalformedMessage)


@pytest.mark.parametrize(
    ("said", "says"),
    [
        (b"", "the body is empty"),
        (b"[]", "body: expected object, got array"),
        (b"{", "the body is not JSON"),
        (b'{"model":"m","messages":[NaN]}', "the body is not JSON: it holds NaN"),
        (b'{"model":"m","x":"\xff"}', "the body is not valid UTF-8 (byte 18)"),
        (b'{"model":"m","x":' + b"[" * 100_000, "the body is nested too deeply"),
        (body(model=5), "model: expected str | null, got int"),
        (body(messages="hi"), "messages: expected array | null, got str"),
        (body(messages=["hi"]), "messages[0]: expected object, got str"),
        (body(stream="yes"), "stream: expected bool | null, got str"),
        (body(stream_options=[]), "stream_options: expected object | null, got array"),
        (body(user=5), "user: expected str | null, got int"),
        (body(n=0), "n: expected int >= 1"),
        (body(n=2**80), "n: "),
        (body(max_tokens="5"), "max_tokens: expected int | null, got str"),
        (body(max_completion_tokens=1.5), "max_completion_tokens: expected int | null, got float"),
    ],
)
def test_what_is_malformed_is_named(said, says):
    problem = refused("chat", said)
    assert str(problem).startswith(says)
    assert isinstance(problem, MalformedMessage)


@given(st.sampled_from(["chat", "completions", "embeddings"]), st.binary() | JSON)
def test_any_bytes_are_read_or_refused_by_name(operation, said):
    said = said if isinstance(said, bytes) else json.dumps(said).encode()
    with suppress(InvalidMessage):
        assert read_request(operation, said).model


def test_estimates_are_rounded_up():
    assert [estimate_tokens(size) for size in (0, 1, 4, 5, 4_000)] == [0, 1, 1, 2, 1_000]


# --- to a release -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "said",
    [
        b'{"model":NAME,"messages":[{"role":"user","content":"say \\"model\\":\\"chat\\""}]}',
        b'{ "messages" : [ {"role":"user", "content":"\\"model"} ] ,\r\n\t"model" :NAME }\n',
        b'{"tools":[{"model":"chat"}],"x\\"model":"chat","messages":[{}],"model":NAME,"y":"model"}',
        b'{"messages": [{"model": "chat"}], "model": NAME, "seed": 1.0, "x": 1e400, "y": "\\/"}',
        b'{"m":{"model":"chat"},"model":NAME,"messages":[{"content":"\\ud83d\\ude00"}]}',
        b'{"m": {"model":"chat"},"model"  : NAME,"messages":[{"content":"\\ud83d\\ude00"}]}',
        b'{"models":"chat", "messages":[{}],"model":NAME}',
    ],
)
@pytest.mark.parametrize("served", ["org/m-7b", "chat", 'q"\\é', "NAME"])
def test_the_models_name_alone_is_replaced(said, served):
    name = json.dumps(served, ensure_ascii=False).encode()
    assert sent(said.replace(b"NAME", b'"chat"'), served=served) == said.replace(b"NAME", name)


@given(EXTRA, EXTRA, STYLE, st.text(min_size=1), st.text())
def test_exactly_one_value_changes(before, after, style, name, served):
    said = {**before, "messages": [HELLO], "model": name, **after}
    said |= {"messages": [HELLO], "model": name}
    changed = sent(json.dumps(said, **style).encode(), served=served)
    assert json.loads(changed) == {**said, "model": served}


@given(PLAIN, PLAIN, STYLE, st.sampled_from(["org/m-7b", "chat", "x"]))
def test_all_else_stays_byte_for_byte_whatever_the_layout(before, after, style, served):
    def written(name):
        said = {**before, "messages": [HELLO], "model": name, **after}
        return json.dumps(said, **style).encode()

    assert sent(written("chat"), served=served) == written(served)


@pytest.mark.parametrize(
    "said",
    [
        b'{"model":"secret","messages":[{}],"model":"chat"}',
        b'{"model":"chat","messages":[{}],"model":"chat"}',
        b'{"model":"secret","messages":[{}],"\\u006dodel":"chat"}',
        b'{"\\u006dodel":"chat", "messages":[{}]}',
        b'{"model" : "chat", "messages" : [{}], "n" : 9, "n" : 1}',
    ],
)
@pytest.mark.parametrize("served", ["org/m-7b", "chat"])
def test_a_key_that_stands_twice_reaches_nobody_twice(said, served):
    pairs = json.loads(sent(said, served=served), object_pairs_hook=list)
    assert sorted(dict(pairs)) == sorted(name for name, _ in pairs)
    assert dict(pairs)["model"] == served
    assert dict(pairs).get("n", 1) == 1


def test_usage_is_asked_for_only_in_streams_whose_client_did_not():
    asked = {"include_usage": True}
    stream = {"model": "chat", "messages": [HELLO], "stream": True}
    assert json.loads(sent(stream, want_usage=True))["stream_options"] == asked
    more = {**stream, "stream_options": {"include_usage": False, "chunk": 5}}
    assert json.loads(sent(more, want_usage=True))["stream_options"] == {**asked, "chunk": 5}
    null = {**stream, "stream_options": None}
    assert json.loads(sent(null, want_usage=True))["stream_options"] == asked
    for said in (
        {**stream, "stream": False},
        {**stream, "stream_options": asked},
    ):
        assert json.loads(sent(said, want_usage=True)) == {**said, "model": "org/m-7b"}
    assert json.loads(sent(stream)) == {**stream, "model": "org/m-7b"}


# --- what a release adds ----------------------------------------------------------------------

TOOL = {"type": "function", "function": {"name": "look_up"}}


def added(behaviour: Behaviour, *, operation: Any = "chat", **said: Any):
    """The request with what a release adds, decoded."""
    said = {"model": "chat", **({"messages": [HELLO]} if operation == "chat" else {}), **said}
    return json.loads(sent(said, operation=operation, behaviour=behaviour))


def test_the_system_prompt_goes_before_the_clients_messages():
    own = {"role": "system", "content": "Mine."}
    messages = added(Behaviour(system='Be "kind".\n'), messages=[own, HELLO])["messages"]
    assert messages == [{"role": "system", "content": 'Be "kind".\n'}, own, HELLO]


def test_messages_keep_their_bytes_behind_a_system_prompt():
    said = b'{"model":"m","messages":[ {"content" : "\\u00e9", "x": 1.0} ], "z": 1e3}'
    changed = sent(said, behaviour=Behaviour(system="S"))
    assert b'{"content" : "\\u00e9", "x": 1.0} ]' in changed
    assert changed.endswith(b'"z":1e3}')


@pytest.mark.parametrize(
    ("prompt", "becomes"),
    [
        ("a\n", "S: a\n"),
        ("", "S: "),
        (["a", "b"], ["S: a", "S: b"]),
        (None, "S: "),
    ],
)
def test_of_a_completion_it_goes_before_each_prompt(prompt, becomes):
    assert (
        added(Behaviour(system="S: "), operation="completions", prompt=prompt)["prompt"] == becomes
    )


@pytest.mark.parametrize("prompt", [[1, 2], [[1], [2]], ["a", [1]]])
def test_token_ids_can_follow_no_system_prompt(prompt):
    with pytest.raises(InvalidMessage, match=r"prompt: .* send text"):
        added(Behaviour(system="S: "), operation="completions", prompt=prompt)


def test_embeddings_are_asked_for_as_they_are():
    said = b'{ "model": "chat" , "input": "a"}'
    behaviour = Behaviour(system="S", sampling={"temperature": 0}, tools=(TOOL,), pinned=True)
    changed = sent(said, operation="embeddings", behaviour=behaviour)
    assert changed == said.replace(b"chat", b"org/m-7b")


def test_tools_are_offered_unless_the_client_brings_its_own():
    behaviour = Behaviour(tools=(TOOL,), tool_choice="required")
    assert added(behaviour)["tools"] == [TOOL]
    assert added(behaviour)["tool_choice"] == "required"
    assert added(behaviour, tool_choice="none")["tool_choice"] == "none"
    assert added(behaviour, tools=None)["tools"] == [TOOL]
    own = {"type": "function", "function": {"name": "mine"}}
    brought = added(behaviour, tools=[own])
    assert (brought["tools"], "tool_choice" in brought) == ([own], False)
    assert "tools" not in added(behaviour, functions=[{"name": "mine"}])
    assert "tools" not in added(behaviour, operation="completions", prompt="a")


def test_sampling_fills_in_what_the_client_leaves_out():
    behaviour = Behaviour(sampling={"temperature": 0.5, "top_p": 0.9})
    assert added(behaviour, temperature=0)["temperature"] == 0
    assert added(behaviour, temperature=0)["top_p"] == 0.9
    assert added(behaviour, temperature=None)["temperature"] == 0.5
    assert added(behaviour, operation="completions", prompt="a")["top_p"] == 0.9


def test_pinned_sampling_replaces_what_the_client_says():
    behaviour = Behaviour(sampling={"temperature": 0.5}, pinned=True)
    said = added(behaviour, temperature=2, top_p=0.1)
    assert (said["temperature"], said["top_p"]) == (0.5, 0.1)


@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens"])
@pytest.mark.parametrize("pinned", [False, True])
def test_both_names_of_the_limit_are_never_sent_together(name, pinned):
    said = added(Behaviour(sampling={"max_tokens": 9}, pinned=pinned), **{name: 50})
    limits = {field: said[field] for field in said if field.startswith("max_")}
    assert limits == ({"max_tokens": 9} if pinned else {name: 50})


def test_a_template_goes_along_with_chats():
    assert added(Behaviour(chat_template="{{ x }}"))["chat_template"] == "{{ x }}"
    said = added(Behaviour(chat_template="t"), operation="completions", prompt="a")
    assert "chat_template" not in said


@given(EXTRA, STYLE)
def test_what_a_release_does_not_add_stays(extra, style):
    said = {**extra, "messages": [HELLO], "model": "chat"}
    behaviour = Behaviour(system="S", sampling={"seed": 7}, pinned=True)
    changed = json.loads(sent(json.dumps(said, **style).encode(), behaviour=behaviour))
    assert changed == {
        **said,
        "messages": [{"role": "system", "content": "S"}, HELLO],
        "model": "org/m-7b",
        "seed": 7,
    }


def test_what_a_release_adds_counts_toward_limits():
    request = read_request("chat", body())
    assert with_behaviour(request, None) is request
    system = with_behaviour(request, Behaviour(system="four"))
    assert system.text_bytes >= request.text_bytes + 4
    tools = with_behaviour(request, Behaviour(tools=(TOOL,)))
    assert tools.text_bytes == request.text_bytes + len(json.dumps([TOOL], separators=(",", ":")))
    limited = Behaviour(sampling={"max_tokens": 9, "n": 3})
    assert with_behaviour(request, limited).max_tokens == 9
    assert with_behaviour(request, limited).n == 3
    asked = read_request("chat", body(max_tokens=50))
    assert with_behaviour(asked, limited).max_tokens == 50
    pinned = Behaviour(sampling={"max_tokens": 9}, pinned=True)
    assert with_behaviour(asked, pinned).max_tokens == 9


# --- the name in answers ----------------------------------------------------------------------


@given(EXTRA, STYLE, st.text(), st.text())
def test_an_answer_changes_its_name_alone(extra, style, served, name):
    said = {"id": "1", **extra, "model": served, "choices": [{"model": served}]}
    renamed = rename_model(json.dumps(said, **style).encode(), "served", name)
    assert json.loads(renamed) == {**said, "model": name}


@pytest.mark.parametrize(
    "data",
    [
        b'{"model":"served"',
        b"[DONE]",
        b"",
        b'"model"',
        b'[{"model":"served"}]',
        b'{"choices":[{"model":"served"}]}',
        b'{"model":null}',
        b'{"model":5}',
        b'{"\xff":"\xff"}',
        b"[" * 100_000,
    ],
)
def test_what_names_no_model_stays_the_same_object(data):
    assert rename_model(data, "served", "chat") is data


def test_equal_names_leave_the_same_object():
    data = b'{"model":"dated-2026-01-01"}'
    assert rename_model(data, "chat", "chat") is data
    assert rename_model(data, "served", "chat") == b'{"model":"chat"}'


@given(st.binary())
def test_of_any_bytes_renaming_makes_no_error(data):
    assert isinstance(rename_model(data, "served", "chat"), bytes)


# --- errors and documents ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (400, "invalid_request_error"), (401, "authentication_error"), (403, "permission_error"),
        (404, "not_found_error"), (413, "invalid_request_error"), (422, "invalid_request_error"),
        (429, "rate_limit_error"), (500, "server_error"), (503, "server_error"),
    ],
)  # fmt: skip
def test_the_kind_of_an_error_follows_from_its_status(status, kind):
    assert error_type(status) == kind


def test_errors_have_openais_shape_and_read_back():
    written = error_body(
        "too long", type="invalid_request_error", code="too_long", param="messages"
    )
    assert json.loads(written)["error"] == {
        "message": "too long",
        "type": "invalid_request_error",
        "param": "messages",
        "code": "too_long",
    }
    assert error_text(written) == "too long"


@pytest.mark.parametrize(
    ("said", "text"),
    [
        ({"error": "plain"}, "plain"),
        ({"object": "error", "message": "older"}, "older"),
        ({"detail": "of FastAPI"}, "of FastAPI"),
        ({"error": {"message": "x" * 900}}, "x" * 500),
        ({"error": {"code": 5}}, ""),
        ({"detail": [{"msg": "no"}]}, ""),
        ([], ""),
    ],
)
def test_a_servers_error_is_told_in_any_known_shape(said, text):
    assert error_text(json.dumps(said).encode()) == text


def test_models_are_listed_as_openai_lists_them():
    support = {"id": "support", "object": "model", "created": 7, "owned_by": "team"}
    assert json.loads(model_document("support", 7, "team")) == support
    listed = json.loads(models_list([("support", 7, "team")]))
    assert listed == {"object": "list", "data": [support]}
