"""What is replaced in bodies before they are written, and what is left as it was."""

from __future__ import annotations

import json
import string
import time
from typing import Any, get_args

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shipworthy.domain.policy import Redaction
from shipworthy.domain.redaction import PATTERNS, Redactor

ALL = Redactor(PATTERNS, ())
KEY = "sw_ab12cd34_" + "0123456789abcdef" * 4
JWT = "eyJhbGciOiJIUzI1NiIsInR5cCI6IkpXVCJ9.eyJzdWIiOiIxMjM0In0.dozjgNryP4J3jVmNHl0w5N_XgL0n3I9P"
PEM = "-----BEGIN RSA PRIVATE KEY-----\nMIIEowIBAAKCAQEA\nq5jY=\n-----END RSA PRIVATE KEY-----"

FOUND = {
    "email": [
        "alice@example.com",
        "first.last+tag@mail.example.co.uk",
        "müller@exämple.de",
        "o'brien_99%x@a-b.org",
        "alice%40example.com",
        "x@y.museum",
    ],
    "phone": [
        "+49 171 1234567",
        "+4915112345678",
        "+1 (415) 555-2671",
        "+44 20 7946 0958",
        "+33 6 12 34 56 78",
        "+49 (0)30 123456-78",
        "0049 30 1234567",
        "(415) 555-2671",
        "415-555-2671",
        "415.555.2671",
        "1-415-555-2671",
        "030 1234567",
        "0171/1234567",
        "(0171) 123-4567",
        "06 12 34 56 78",
        "06.12.34.56.78",
        "020 7946 0958",
        "07700900123",
        "015112345678",
        "090-1234-5678",
        "(11) 91234-5678",
        "+91 98765 43210",
    ],
    "card": [
        "4111111111111111",
        "4111 1111 1111 1111",
        "5500-0000-0000-0004",
        "3782 822463 10005",
        "378282246310005",
        "6011000990139424",
        "2223003122003222",
        "4222222222222",
    ],
    "iban": [
        "DE89370400440532013000",
        "DE89 3704 0044 0532 0130 00",
        "GB82 WEST 1234 5698 7654 32",
        "gb82west12345698765432",
        "FR14 2004 1010 0505 0001 3M02 606",
        "NO93 8601 1117 947",
    ],
    "ip": [
        "192.168.1.17",
        "8.8.8.8",
        "2001:db8::ff00:42:8329",
        "fe80::1",
        "::1",
        "2001:0db8:0000:0000:0000:ff00:0042:8329",
        "::ffff:192.168.1.17",
    ],
    "secret": [
        KEY,
        "sk-proj-abcdefghijklmnop1234567890",
        "sk-ant-api03-abcdefghijklmnop",
        "AKIAIOSFODNN7EXAMPLE",
        "ghp_abcdefghijklmnopqrstuvwxyz0123456789",
        "github_pat_11ABCDEFG0abcdefghijkl_mnopqrstuv",
        "AIzaSyA1234567890abcdefghijklmnopqrstuv",
        "xoxb-123456789012-abcdefABCDEF",
        "glpat-abcdefghij0123456789",
        "hf_abcdefghijklmnopqrstuvwxyzABCD",
        JWT,
        PEM,
    ],
}
ASSIGNED = [
    ("password=hunter2", "hunter2"),
    ("password = 'my pass phrase'", "my pass phrase"),
    ("PASSWORD: hunter2!", "hunter2!"),
    ("db_password=hunter2", "hunter2"),
    ("aws_secret_access_key=wJalrXUtnFEMI/K7MDENG", "wJalrXUtnFEMI/K7MDENG"),
    ("api-key: abcd1234efgh", "abcd1234efgh"),
    ("https://joe:hunter2@example.com/x", "hunter2"),
    ("Authorization: Bearer abcdef0123456789", "abcdef0123456789"),
    ("Authorization: Basic dXNlcjpwYXNzd29yZA==", "dXNlcjpwYXNzd29yZA=="),
    ("refresh_token=abcd-1234", "abcd-1234"),
]
LEFT = [
    "order 4503599627370496 of 2026-11-21",  # a long number without a card's check digit
    "id 1234567890123456, 9007199254740991 and 17637468000000",
    "timestamps 1763746800, 1763746800123 and 1763746800.123456",
    "0000123456 0012345678",
    "3.14159265358979 and 0.123456789012 and +1234567.89 and 1e+10000000 and -122.419416",
    "48.856613, 2.352222 and 52.520008 13.404954",
    "sha256 e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855",
    "550e8400-e29b-41d4-a716-446655440000 and 01234567-89ab-0123-4567-0123456789ab",
    "version 1.2.3 and v1.2.3.4 and version 10.0.0.1 and Chrome/120.0.6099.109",
    "package@1.2.3 and icon@2x.png and @decorator and a @ b",
    "12:34:56 and 01:23:45.678 and 2026-11-21T18:14:00Z and aa:bb:cc:dd:ee:ff",
    "std::vector, a::b and :: and x ? y : z",
    "01/02/2023 10 and 01.02.2023 1234 and 2023-01-02 03:04:05",
    "978-0-306-40615-7 and 0-306-40615-2",
    "hotel 1234567 has rooms; the iphone 15 costs 1,299.00",
    "1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20",
    "DE00370400440532013000 XX89370400440532013000",  # wrong check digits; no such country
    "max_tokens: 1024, completion_tokens=2048 and the token: Hello",
    "the secretary: Anna keeps passwords safe, and password is null: password=null",
    "task-1234567890 disk-abcdefghijklmnop ask-me-anything-about-it",
    "chatcmpl-9f8a7b6c5d4e3f2a1b0c and inf_AQAAAAGhabcdefghijklmnop",
    "0000000000000000 and 4444",
]


def test_the_patterns_are_those_that_a_policy_may_name():
    assert set(PATTERNS) == set(get_args(Redaction))


@pytest.mark.parametrize(("name", "value"), [(n, v) for n, vs in FOUND.items() for v in vs])
def test_each_kind_is_found_alone_and_together_with_all_others(name: str, value: str):
    for redactor in (Redactor((name,), ()), ALL):
        for before, after in [("", ""), ("see ", ", please"), ("\n", "\n"), ("(", ")"), ("“", "”")]:
            body = f"{before}{value}{after}".encode()
            found, count = redactor.redact(body)
            assert found.replace(b'"', b"") == f"{before}[{name}]{after}".encode()
            assert count == 1


@pytest.mark.parametrize(("text", "value"), ASSIGNED)
def test_of_what_is_assigned_the_value_goes(text: str, value: str):
    redacted, count = Redactor(("secret",), ()).redact(text.encode())
    assert (redacted.decode(), count) == (text.replace(value, "[secret]"), 1)


@pytest.mark.parametrize("text", LEFT)
def test_what_only_looks_like_it_is_left(text: str):
    assert ALL.redact(text.encode()) == (text.encode(), 0)
    body = json.dumps({"messages": [{"content": text}]}).encode()
    assert ALL.redact(body) == (body, 0)


def test_a_body_without_finds_stays_as_it_was_to_the_byte():
    body = b'{ "a" : 1.0, "a":\t1e400, "\\u00e9\\/": "\\n\xff", "n": 12345678901234567890 }'
    assert ALL.redact(body) == (body, 0)


def test_names_are_checked():
    with pytest.raises(ValueError, match="no pattern 'emial'; there are"):
        Redactor(("emial",), ())


def test_nothing_asked_for_is_false():
    assert not Redactor((), ())
    assert Redactor(("ip",), ())
    assert Redactor((), ("user",))
    assert Redactor((), ()).redact(b"alice@example.com") == (b"alice@example.com", 0)


# --- JSON ---------------------------------------------------------------------------------------


def of_json(value: Any, redactor: Redactor = ALL) -> Any:
    body, count = redactor.redact(json.dumps(value).encode())
    assert count
    return json.loads(body)


def test_escapes_hide_nothing():
    body = rb'{"a": "alice\u0040example.com", "b": "030\/1234567", "c": "\u0034111111111111111"}'
    found, count = ALL.redact(body)
    assert json.loads(found) == {"a": "[email]", "b": "[phone]", "c": "[card]"}
    assert count == 3


def test_keys_are_searched_like_values():
    assert of_json({"alice@example.com": {"10.0.0.1": 1}}) == {"[email]": {"[ip]": 1}}


def test_json_numbers_become_strings():
    body = {"card": 4111111111111111, "phone": 4155552671, "n": [1, 4111111111111111]}
    assert of_json(body) == {"card": "[card]", "phone": "[phone]", "n": [1, "[card]"]}
    assert of_json(-4111111111111111) == "[card]"


def test_values_of_keys_that_say_so_are_secrets():
    body = {"password": "x", "client_secret": 'a"b\\', "apiKey": 12345678, "accessToken": "abc"}
    assert set(of_json(body).values()) == {"[secret]"}
    kept = b'{"password": null, "secret": true, "token": "Hello", "max_tokens": 1024}'
    assert ALL.redact(kept) == (kept, 0)


def test_arguments_of_tool_calls_are_json_inside_a_string():
    inner = {"mail": "müller@exämple.de", "password": 'a "b" \\c', "phone": 4155552671}
    for depth in range(1, 4):
        body: Any = inner
        for _ in range(depth):
            body = {"arguments": json.dumps(body)}
        found = of_json(body)
        for _ in range(depth):
            found = json.loads(found["arguments"])
        assert found == {"mail": "[email]", "password": "[secret]", "phone": "[phone]"}


def test_line_breaks_written_as_escapes_are_none_of_a_find():
    text = "Tel:\n+49 171 1234567\nalice@example.com\tC:\\new\\bob@example.com"
    assert of_json([text]) == ["Tel:\n[phone]\n[email]\tC:\\new\\[email]"]


def test_a_private_key_in_json_goes_whole():
    assert of_json({"a": [PEM, PEM.replace("\n", "\r\n")], "b": "x"}) == {
        "a": ["[secret]", "[secret]"],
        "b": "x",
    }


def test_broken_json_is_searched_as_text():
    for body in (b'{"a": "alice@example.com', b'["a\\u0040b.org",,', b"\xff\xfe alice@example.com"):
        found, count = ALL.redact(body)
        assert count == 1
        assert b"[email]" in found


# --- streams ------------------------------------------------------------------------------------


def stream(*pieces: Any, name: str = "content", end: bytes = b"data: [DONE]\n\n") -> bytes:
    events = ({"id": "c", "choices": [{"index": 0, "delta": {name: piece}}]} for piece in pieces)
    return b"".join(b"data: " + json.dumps(each).encode() + b"\n\n" for each in events) + end


def pieces(body: bytes, name: str = "content") -> list[Any]:
    lines = [line for line in body.split(b"\n") if line.startswith(b"data: {")]
    return [json.loads(line[6:])["choices"][0]["delta"][name] for line in lines]


def test_a_find_may_be_spread_over_events():
    body = stream("Write ", "al", "ice@exa", "mple.com", " or 4111 1111", " 1111 1111. ", "Bye")
    found, count = ALL.redact(body)
    assert count == 2
    assert pieces(found) == ["Write ", "[email]", "", "", " or [card]", ". ", "Bye"]
    untouched = body.split(b"\n")
    assert found.split(b"\n")[0] == untouched[0]
    assert found.endswith(b"data: [DONE]\n\n")


def test_several_finds_in_one_piece_and_one_over_many():
    body = stream("a@b.org c@d.org e", "@f.org", "", " g@h.org")
    found, count = ALL.redact(body)
    assert count == 4
    assert pieces(found) == ["[email] [email] [email]", "", "", " [email]"]


def test_arguments_in_pieces_are_searched_as_the_json_that_they_make():
    calls = ['{"mail": "al', "ice\\u00", '40example.com", "n', '": 1}']
    body = stream(
        *([{"index": 0, "function": {"arguments": each}}] for each in calls), name="tool_calls"
    )
    found, count = ALL.redact(body)
    said = [each[0]["function"]["arguments"] for each in pieces(found, "tool_calls")]
    assert json.loads("".join(said)) == {"mail": "[email]", "n": 1}
    assert count == 1


def test_choices_of_a_stream_are_told_apart():
    events = [
        {"choices": [{"index": at % 2, "text": text}]}
        for at, text in enumerate(["alice@", "bob@", "example.com", "example.org"])
    ]
    body = b"".join(b"data: " + json.dumps(each).encode() + b"\r\n\r\n" for each in events)
    found, count = ALL.redact(body)
    assert count == 2
    assert b"alice" not in found
    assert b"example" not in found


def test_logprobs_repeat_the_text_in_pieces_and_go_with_a_find():
    def answer(content: str) -> dict[str, Any]:
        tokens = [{"token": each, "logprob": -0.1} for each in ("alice", "@example.com")]
        return {"choices": [{"message": {"content": content}, "logprobs": {"content": tokens}}]}

    redacted = of_json(answer("alice@example.com"))["choices"][0]
    assert redacted == {"message": {"content": "[email]"}, "logprobs": "[redacted]"}
    harmless = json.dumps({"choices": [{"text": "hi", "logprobs": {"tokens": ["hi"]}}]}).encode()
    assert ALL.redact(harmless) == (harmless, 0)


# --- fields -------------------------------------------------------------------------------------


def fields(body: Any, *paths: str) -> Any:
    found, _ = Redactor((), paths).redact(json.dumps(body).encode())
    return json.loads(found)


def test_paths_walk_through_lists():
    body = {"user": "u", "messages": [{"role": "user", "content": "x"}, {"content": [{"text": 1}]}]}
    found = fields(body, "messages.content", "user")
    assert found["user"] == "[redacted]"
    assert [each["content"] for each in found["messages"]] == ["[redacted]"] * 2
    assert found["messages"][0]["role"] == "user"
    assert (
        fields(body, "messages.content.text")["messages"][1]["content"][0]["text"] == "[redacted]"
    )


def test_a_star_is_any_name():
    body = {"metadata": {"a": 1, "b": {"c": None}}, "x": {"a": {"z": 1, "y": 2}, "b": {"z": 3}}}
    found = fields(body, "metadata.*", "x.*.z")
    assert found["metadata"] == {"a": "[redacted]", "b": "[redacted]"}
    assert found["x"] == {"a": {"z": "[redacted]", "y": 2}, "b": {"z": "[redacted]"}}


def test_what_has_no_value_stays_so():
    assert Redactor((), ("user",)).redact(b'{"user":null}') == (b'{"user":null}', 0)


def test_a_tensor_is_a_field_by_its_name():
    def tensor(name: str) -> dict[str, Any]:
        return {"name": name, "datatype": "FP32", "shape": [1, 2], "data": [[1.5, 2.5]]}

    body = {"inputs": [tensor("age"), tensor("size")]}
    found = fields(body, "inputs.age")
    assert found["inputs"] == [{**tensor("age"), "data": "[redacted]"}, tensor("size")]
    found = fields({"outputs": [tensor("age")], **body}, "inputs.*")
    assert [each["data"] for each in found["inputs"]] == ["[redacted]"] * 2
    assert found["outputs"] == [tensor("age")]
    assert fields(body, "inputs") == {"inputs": "[redacted]"}


def test_tensors_behind_the_json_go_with_what_says_what_they_are():
    header = {
        "inputs": [
            {"name": "age", "datatype": "INT8", "shape": [2], "parameters": {"binary_data_size": 2}}
        ]
    }
    body = msgspec.json.encode(header) + b"\x11\x12"
    found, count = Redactor((), ("inputs.age",)).redact(body)
    assert count == 1
    assert json.loads(found)["inputs"][0]["data"] == "[redacted]"
    assert Redactor((), ("inputs.weight",)).redact(body) == (body, 0)


@pytest.mark.parametrize(
    "body",
    [
        {"inputs": {"age": [41, 42], "size": [1, 2]}},
        {"dataframe_split": {"columns": ["size", "age"], "data": [[1, 41], [2, 42]]}},
        {"dataframe_records": [{"age": 41, "size": 1}, {"age": 42, "size": 2}]},
        {"instances": [{"age": 41, "size": 1}, {"age": 42, "size": 2}]},
    ],
)
def test_a_column_of_mlflow_is_a_field_in_each_of_its_forms(body: dict[str, Any]):
    found = json.dumps(fields(body, "inputs.age"))
    assert "41" not in found
    assert "42" not in found
    assert json.dumps(fields(body, "inputs.weight")) == json.dumps(body)
    for size in ("1", "2"):
        assert size in found


def test_predictions_are_outputs():
    found = fields({"predictions": [{"name": "x", "score": 1}]}, "outputs.name")
    assert found == {"predictions": [{"name": "[redacted]", "score": 1}]}


def test_fields_reach_into_json_inside_strings_and_into_streams():
    body = {"messages": [{"tool_calls": [{"arguments": '{"name": "x", "n": 1}'}]}]}
    found = fields(body, "messages.tool_calls.arguments.name")
    arguments = found["messages"][0]["tool_calls"][0]["arguments"]
    assert json.loads(arguments) == {"name": "[redacted]", "n": 1}
    body, count = Redactor((), ("choices.message.content",)).redact(stream("a", "b"))
    assert (pieces(body), count) == (["[redacted]", "[redacted]"], 2)


@pytest.mark.parametrize(
    "body",
    [
        b'{"user": "alice", }',
        b'{"user": "alice"',
        b'{"user": "al\xffice"',
        b'[{"user":' * 200_000,
        b'{"\\u0075ser": "alice"}',
        b'{"x": 1, "user": "alice", "user": null, "user": "bob"}',
    ],
)
def test_no_oddity_of_json_lets_a_field_through(body: bytes):
    found, _ = Redactor((), ("user", "x.user")).redact(body)
    assert b"alice" not in found
    assert b"bob" not in found
    assert len(found) < 1_000


def test_lists_deeper_than_any_protocol_has_go_whole():
    body = b'{"a":' + b"[" * 50 + b'{"b": "alice"}' + b"]" * 50 + b"}"
    found, count = Redactor((), ("a.b",)).redact(body)
    assert b"alice" not in found
    assert count == 1
    msgspec.json.decode(found)


# --- limits -------------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", [0, 1, 10, 39, 40, 41, 60, 61, 100, 10_000])
def test_a_limit_cuts_what_was_redacted_and_never_a_find(limit: int):
    body = (
        "ünd so weiter: alice@example.com, tel. +49 171 1234567 und 4111 1111 1111 1111. ".encode()
        * 9
    )
    whole, _ = ALL.redact(body)
    found, _ = ALL.redact(body, limit)
    assert len(found) <= limit
    assert whole.startswith(found)
    assert found.count(b"[") == min(whole[: len(found)].count(b"["), found.count(b"["))
    for part in ("alice", "171", "4111", "1111"):
        assert part.encode() not in found


def test_a_key_that_goes_on_beyond_the_limit_is_replaced():
    body = (
        b"x" * 90 + b" " + PEM.replace("q5jY=", "A" * 20_000).encode() + b" " + JWT.encode() * 900
    )
    found, count = ALL.redact(body, 100)
    assert (found, count) == (b"x" * 90 + b" [secret]", 1)
    found, count = ALL.redact(b"x" * 95 + b" " + b"eyJ" + b"a" * 20_000 + b".b", 100)
    assert b"aaaaa" not in found


def test_a_stream_is_cut_after_its_pieces_were_joined():
    body = stream(*["x" * 100] * 50, "alice@", "example.com", *["y"] * 2_000)
    whole, _ = ALL.redact(body)
    at = body.index(b"alice")
    found, _ = ALL.redact(body, at + 10)
    assert b"alice" not in found
    assert whole[: at - 10] == found[: at - 10]
    assert len(found) <= at + 10


# --- nothing planted survives ---------------------------------------------------------------------

words = st.text(string.ascii_letters + " .,;:!?\n\t\"\\'/äß€{}[]<>", max_size=30)


def _luhn(digits: str) -> str:
    total = sum(
        sum(divmod(int(each) * (2 if at % 2 == 0 else 1), 10))
        for at, each in enumerate(reversed(digits))
    )
    return digits + str(-total % 10)


def _grouped(start: str, rest: str, joint: str) -> str:
    number = _luhn(start + rest)
    return joint.join(number[at : at + 4] for at in range(0, 16, 4))


cards = st.builds(
    _grouped,
    st.sampled_from(["4777", "5177", "2221", "6011", "3577"]),
    st.text(string.digits, min_size=11, max_size=11),
    st.sampled_from(["", " ", "-"]),
)
_emails = st.builds(
    "{}@{}.{}".format,
    st.from_regex(r"[a-z0-9]([a-z0-9.+_-]{0,20}[a-z0-9])?", fullmatch=True),
    st.from_regex(r"[a-z0-9]{1,12}", fullmatch=True),
    st.sampled_from(["com", "co.uk", "de", "example"]),
)
_phones = st.builds(
    "+{} {} {}".format,
    st.sampled_from([1, 44, 49, 33, 91, 358]),
    st.integers(100, 999),
    st.integers(1_000_000, 99_999_999),
)
_tokens = st.builds(
    "{}{}".format,
    st.sampled_from(["sk-", "ghp_", "sw_ab_", "xoxb-1-"]),
    st.text(string.ascii_letters + string.digits, min_size=36, max_size=40),
)
planted = st.one_of(_emails, cards, _phones, _tokens)


@given(planted, words, words, st.integers(0, 3), st.booleans())
def test_what_is_planted_in_json_never_survives(
    value: str, before: str, after: str, depth: int, ascii_only: bool
):
    body: Any = {
        "model": "m",
        "messages": [{"content": f"{before} {value} {after}"}],
        value: [value],
    }
    for _ in range(depth):
        body = {"arguments": json.dumps(body, ensure_ascii=ascii_only)}
    sent = json.dumps(body, ensure_ascii=ascii_only).encode()
    found, count = ALL.redact(sent)
    assert count >= 3
    assert value.encode() not in found
    msgspec.json.decode(found)
    assert ALL.redact(found, None)[0].count(value.encode()) == 0


@given(planted, words, words, st.data())
def test_what_is_planted_in_a_stream_never_survives(
    value: str, before: str, after: str, data: st.DataObject
):
    text = f"{before} {value} {after}"
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=8)))
    parts = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    found, count = ALL.redact(stream(*parts))
    assert count
    assert value not in "".join(pieces(found))
    assert len(pieces(found)) == len(parts)


@given(planted, words, words, st.integers(0, 200))
def test_what_is_planted_never_survives_a_limit_in_part(
    value: str, before: str, after: str, limit: int
):
    text = f"{before} {value} {after}".encode()
    found, _ = ALL.redact(text, limit)
    whole, _ = ALL.redact(text)
    assert whole.startswith(found)
    assert value.encode() not in whole


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | words | planted,
        lambda inner: (
            st.lists(inner, max_size=4) | st.dictionaries(words | planted, inner, max_size=4)
        ),
    )
)
def test_json_stays_json_of_the_same_shape(value: Any):
    def shape(one: Any) -> Any:
        if isinstance(one, dict):
            return [shape(each) for each in one.values()]
        return [shape(each) for each in one] if isinstance(one, list) else None

    found, count = ALL.redact(json.dumps(value).encode())
    decoded = json.loads(
        found, object_pairs_hook=lambda pairs: dict(enumerate(v for _, v in pairs))
    )
    assert shape(decoded) == shape(value)
    if not count:
        assert json.loads(found) == value


@given(st.binary(max_size=300), st.integers(0, 300))
def test_any_bytes_are_taken(body: bytes, limit: int):
    for redactor in (ALL, Redactor(PATTERNS, ("a", "inputs.*", "*.b"))):
        for start in (b"", b"data: ", b"{", b'{"inputs":['):
            assert len(redactor.redact(start + body, limit)[0]) <= limit


# --- time ---------------------------------------------------------------------------------------

HOSTILE = [
    "4444 ", "4", "1 ", "0", "01 ", "+1", "+", "(1", "00", "a@", "@", "a@a.", "%40", "a.a", "::",
    ":1", "1.1.", "f:", "sk-", "sw_", "eyJ", "eyJaaaaaaaaaaaaa.", "-----BEGIN ",
    "-----BEGIN PRIVATE KEY-----", "password", "password=", 'password="', "bearer ", "://",
    "://a:", "DE89 ", "DE89", "\\", "\\\\u0040", '\\"', '"', "tel ", "phone: 1", "[", "{",
    '{"a":', "data:\n", 'data: {"choices":[{"text":"a"}]}\n', "é",
]  # fmt: skip


@pytest.mark.parametrize("unit", HOSTILE)
def test_time_grows_no_faster_than_the_body(unit: str):
    redactor = Redactor(PATTERNS, ("a.b", "messages.content"))

    def seconds(size: int) -> float:
        body = (unit * (size // len(unit))).encode()
        least = float("inf")
        for _ in range(3):
            began = time.process_time()
            redactor.redact(body)
            least = min(least, time.process_time() - began)
        return least

    # What takes quadratic time takes 256 times as long, of which this is far away.
    assert seconds(16 * 12_000) < 90 * seconds(12_000) + 0.05
