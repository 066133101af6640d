"""Whether a mirrored release says the same."""

from __future__ import annotations

import base64
import json
import struct
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shipworthy.domain.agreement import agreement
from shipworthy.domain.contract import Protocol


def tensors(*outputs: tuple[str, str, list[int], Any], **more: Any) -> bytes:
    named = [
        dict(zip(("name", "datatype", "shape", "data"), each, strict=True)) for each in outputs
    ]
    return json.dumps({"model_name": "m", "outputs": named, **more}).encode()


def binary(datatype: str, shape: list[int], data: bytes) -> bytes:
    parameters = {"binary_data_size": len(data)}
    output = {"name": "y", "datatype": datatype, "shape": shape, "parameters": parameters}
    return json.dumps({"outputs": [output]}).encode() + data


Y = ("y", "FP32", [2], [0.5, 1000.0])


@pytest.mark.parametrize(
    ("theirs", "verdict"),
    [
        (tensors(Y, model_version="7", id="x"), (True, "")),
        (tensors(("y", "FP64", [2], [0.5004, 1000.9])), (True, "")),
        (tensors(("y", "FP32", [2], [0.5, 1002.0])), (False, "outputs.y.data[1]")),
        (tensors(("y", "FP32", [2, 1], [[0.5], [1000.0]])), (False, "outputs.y.shape")),
        (tensors(("y", "INT32", [2], [0, 1000])), (False, "outputs.y.datatype")),
        (tensors(("z", "FP32", [2], [0.5, 1000.0])), (False, "outputs.y")),
        (tensors(Y, ("z", "FP32", [1], [0.5])), (False, "outputs.z")),
        (tensors(("y", "FP32", [2], [0.5])), (None, "")),
        (binary("FP32", [2], struct.pack("<2f", 0.5, 1000)), (True, "")),
        (binary("FP16", [2], struct.pack("<2e", 0.5, 900)), (False, "outputs.y.data[1]")),
        (binary("FP32", [2], b"\0"), (None, "")),
        (b'{"error": "no"}', (None, "")),
        (b"no", (None, "")),
        (b"", (None, "")),
    ],
)
def test_tensors(theirs: bytes, verdict: tuple[bool | None, str]):
    assert agreement("oip-v2", tensors(Y), theirs) == verdict
    found, where = agreement("oip-v2", theirs, tensors(Y))
    assert found == verdict[0]
    assert bool(where) == bool(verdict[1])


def test_order_nesting_and_kinds_of_tensors():
    one = tensors(("a", "INT64", [1, 2], [[1, 2]]), ("b", "BYTES", [1], ["x"]))
    assert agreement(
        "oip-v2", one, tensors(("b", "BYTES", [1], ["x"]), ("a", "INT64", [1, 2], [1, 2]))
    ) == (True, "")
    assert agreement(
        "oip-v2", one, tensors(("a", "INT64", [1, 2], [1, 3]), ("b", "BYTES", [1], ["x"]))
    ) == (False, "outputs.a.data[1]")
    text = binary("BYTES", [1], b"\x01\0\0\0x")
    assert agreement("oip-v2", text, tensors(("y", "BYTES", [1], ["x"]))) == (True, "")
    blank = binary("INT8", [2], b"\n ")  # which looks like white space behind the JSON
    assert agreement("oip-v2", blank, tensors(("y", "INT8", [2], [10, 32]))) == (True, "")
    assert agreement("oip-v2", blank, tensors(("y", "INT8", [2], [10, 33]))) == (
        False,
        "outputs.y.data[1]",
    )


def test_nan_equals_nan_and_no_number():
    nan = binary("FP64", [1], struct.pack("<d", float("nan")))
    assert agreement("oip-v2", nan, nan) == (True, "")
    one = binary("FP64", [1], struct.pack("<d", 1.0))
    assert agreement("oip-v2", nan, one) == (False, "outputs.y.data[0]")


@pytest.mark.parametrize(
    ("ours", "theirs", "verdict"),
    [
        ([1, 2], [1, 2], (True, "")),
        ([1.0, 2], [1.0005, 2.0], (True, "")),
        ([1, 2], [1, 3], (False, "predictions[1]")),
        ([1], [1, 2], (False, "predictions")),
        ([True], [1], (False, "predictions[0]")),
        ([True], [1.0], (False, "predictions[0]")),
        ([{"a": 1, "b": "x"}], [{"b": "x", "a": 1}], (True, "")),
        ([{"a": 1, "b": "x"}], [{"a": 1, "b": "y"}], (False, "predictions[0].b")),
        ([{"a": 1}], [{"a": 1, "c": 2}], (False, "predictions[0].c")),
        ({"y": [None]}, {"y": [None]}, (True, "")),
        ({"y": [None]}, {"y": [0.0]}, (False, "predictions.y[0]")),
    ],
)
def test_predictions(ours: Any, theirs: Any, verdict: tuple[bool, str]):
    bodies = [json.dumps({"predictions": each}).encode() for each in (ours, theirs)]
    assert agreement("mlflow", *bodies) == verdict
    assert agreement("mlflow", bodies[0], b'{"error_code": "X", "message": "no"}') == (None, "")


def chat(content: str | None, *calls: tuple[str, str], **more: Any) -> bytes:
    message: dict[str, Any] = {"role": "assistant", "content": content}
    if calls:
        message["tool_calls"] = [
            {"id": str(id(name)), "function": {"name": name, "arguments": said}}
            for name, said in calls
        ]
    return json.dumps({"id": "1", "choices": [{"message": message}], **more}).encode()


def events(*deltas: dict[str, Any]) -> bytes:
    lines = (json.dumps({"choices": [{"index": 0, "delta": each}]}) for each in deltas)
    return "".join(f"data: {line}\n\n" for line in lines).encode() + b"data: [DONE]\n\n"


CONTENT = "choices[0].message.content"
CALL = "choices[0].message.tool_calls[0].function"


@pytest.mark.parametrize(
    ("ours", "theirs", "verdict"),
    [
        (chat("a b"), chat(" a\n\n b ", model="x", created=9, usage={"n": 1}), (True, "")),
        (chat("a b"), chat("a c"), (False, CONTENT)),
        (chat("a b"), chat(None), (False, CONTENT)),
        (chat(None, ("f", '{"a": 1, "b": 2}')), chat("", ("f", '{"b":2,"a":1}')), (True, "")),
        (
            chat(None, ("f", '{"a": 1}')),
            chat(None, ("f", '{"a": 2}')),
            (False, f"{CALL}.arguments"),
        ),
        (chat(None, ("f", "{}")), chat(None, ("g", "{}")), (False, f"{CALL}.name")),
        (chat(None, ("f", "{}")), chat("x"), (False, f"{CALL}.name")),
        (
            chat("a b"),
            events({"role": "assistant"}, {"content": "a "}, {"content": "b"}),
            (True, ""),
        ),
        (chat("a b"), events({"content": "a"}), (False, CONTENT)),
        (
            chat(None, ("f", '{"a":1}')),
            events(
                {"tool_calls": [{"index": 0, "function": {"name": "f", "arguments": ""}}]},
                {"tool_calls": [{"index": 0, "function": {"arguments": '{"a"'}}]},
                {"tool_calls": [{"index": 0, "function": {"arguments": ": 1}"}}]},
            ),
            (True, ""),
        ),
        (chat("a"), b'data: {"error": {"message": "no"}}\n\n', (None, "")),
        (chat("a"), b'{"error": {"message": "no"}}', (None, "")),
        (chat("a"), b'{"choices": []}', (None, "")),
        (chat("a"), b'{"choices": [{"text": "a"}]}', (None, "")),
        (chat("a"), b"data: {broken\n\n", (None, "")),
        (chat("a"), b"<html>", (None, "")),
        (chat("a"), b"[" * 100_000, (None, "")),
    ],
)
def test_language(ours: bytes, theirs: bytes, verdict: tuple[bool | None, str]):
    found, where = agreement("openai", ours, theirs)
    assert found == verdict[0]
    assert where == verdict[1] or {where, verdict[1]} == {CONTENT, f"{CALL}.name"}
    assert agreement("openai", theirs, ours)[0] == verdict[0]


def test_completions():
    one = b'{"choices": [{"text": "a  b"}, {"text": "other"}]}'
    pieces = (
        b'data: {"choices":[{"text":"a"}]}\n\ndata: {"choices":[{"text":" b"}]}\n\ndata: [DONE]\n'
    )
    assert agreement("openai", one, pieces) == (True, "")
    found = agreement("openai", one, b'{"choices": [{"text": "b"}]}')
    assert found == (False, "choices[0].text")


def test_embeddings():
    def vectors(*vectors: Any) -> bytes:
        return json.dumps({"data": [{"embedding": each} for each in vectors]}).encode()

    one = vectors([1.0, 0.0], [0.0, 2.0])
    assert agreement("openai", one, vectors([0.99, 0.01], [0.0, 1.0])) == (True, "")
    assert agreement("openai", one, vectors([1, 0], [0.1, 1])) == (False, "data[1].embedding")
    assert agreement("openai", one, vectors([1, 0])) == (False, "data")
    assert agreement("openai", one, vectors([1, 0], [0, 1, 0])) == (False, "data[1].embedding")
    assert agreement("openai", vectors([0, 0]), vectors([0, 0])) == (True, "")
    packed = base64.b64encode(struct.pack("<2f", 1, 0)).decode()
    assert agreement("openai", vectors([1.0, 0.0]), vectors(packed)) == (True, "")
    assert agreement("openai", one, vectors("?", "?")) == (None, "")


@given(
    st.sampled_from(["oip-v2", "mlflow", "openai"]), st.binary(max_size=80), st.binary(max_size=80)
)
def test_any_bytes_are_taken(protocol: Protocol, ours: bytes, theirs: bytes):
    for start in (b"", b'{"outputs":[', b'data: {"choices":[', b'{"data":'):
        found, _ = agreement(protocol, start + ours, start + theirs)
        assert found in {None, True, False}


NAMES = [
    "outputs", "name", "datatype", "shape", "data", "parameters", "predictions", "choices",
    "message", "content", "tool_calls", "function", "arguments", "text", "embedding", "error",
]  # fmt: skip
leaves = st.none() | st.booleans() | st.integers(-9, 9) | st.text(max_size=3)
json_values = st.recursive(
    leaves | st.floats(allow_nan=False),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(NAMES), inner, max_size=4)
    ),
    max_leaves=12,
)


@given(st.sampled_from(["oip-v2", "mlflow", "openai"]), json_values, json_values)
def test_any_json_is_taken_and_agrees_with_itself(protocol: Protocol, ours: Any, theirs: Any):
    one, other = json.dumps(ours).encode(), json.dumps(theirs).encode()
    agreement(protocol, one, other)
    assert agreement(protocol, one, one)[0] is not False
