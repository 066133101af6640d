"""The binary tensor data extension: bytes behind the JSON, both ways, and never an odd error."""

import json
import math
import struct
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shipworthy.domain.contract import Contract, Tensor
from shipworthy.protocols import oip, oip_binary
from shipworthy.protocols.oip import (
    ContractChecker,
    ContractViolation,
    InvalidMessage,
    MalformedMessage,
    TensorValues,
)
from shipworthy.protocols.packed import Packed, flattened, nested, pack

CONTRACT = Contract(
    inputs=(
        Tensor("x", "FP32", (-1, 2)),
        Tensor("texts", "BYTES", (-1,), optional=True),
        Tensor("flags", "BOOL", (-1,), optional=True),
    ),
    outputs=(Tensor("label", "INT64", (-1,)), Tensor("score", "FP16", (-1, 2), optional=True)),
)
CHECKER = ContractChecker(CONTRACT)
X = struct.pack("<2f", 0.5, 1.0)


def tensor(name, datatype, shape, size=None, **more):
    described = {"name": name, "datatype": datatype, "shape": shape, **more}
    return described if size is None else {**described, "parameters": {"binary_data_size": size}}


def message(*inputs, data=X, **more):
    head = json.dumps({"inputs": list(inputs), **more}).encode()
    return head + data, len(head)


def x(size: Any = 8, **more):
    return tensor("x", "FP32", [1, 2], size, **more)


def texts(raw):
    return message(x(), tensor("texts", "BYTES", [1], len(raw)), data=X + raw)


def refused(body, length):
    with pytest.raises(InvalidMessage) as caught:
        CHECKER.check_request(oip_binary.decode_request(body, length))
    return str(caught.value)


# --- requests ---------------------------------------------------------------------------------


def test_binary_and_json_inputs_may_stand_side_by_side():
    body, length = message(
        tensor("flags", "BOOL", [1], 1), x(None, data=[0.5, 1]), tensor("texts", "BYTES", [1], 7),
        data=b"\1\3\0\0\0abc", id="7", parameters={"a": 1}, outputs=[{"name": "label"}],
    )  # fmt: skip
    request = oip_binary.decode_request(body, length)
    values = {one.name: one for one in CHECKER.check_request(request)}
    assert values["flags"].data.tolist() == [True]
    assert values["x"].data == [0.5, 1.0]
    assert values["texts"].data.tolist() == ["abc"]
    assert (request.id, request.parameters) == ("7", {"a": 1})
    assert [output.name for output in request.outputs or ()] == ["label"]


def test_a_body_without_the_header_is_json():
    body, _ = message(x(None, data=[0.5, 1]), data=b"")
    assert oip_binary.decode_request(body) == oip.decode_request(body)


def test_binary_data_may_hold_what_json_can_not():
    nan = struct.pack("<2f", math.nan, math.inf)
    assert CHECKER.check_request(oip_binary.decode_request(*message(x(), data=nan)))
    body, length = texts(b"\2\0\0\0\xff\xfe")
    values = CHECKER.check_request(oip_binary.decode_request(body, length))
    assert values[1].data.raw == b"\2\0\0\0\xff\xfe"
    with pytest.raises(UnicodeDecodeError):
        values[1].data.tolist()


@pytest.mark.parametrize(
    ("sent", "says"),
    [
        (message(x(), data=X[:7]), "inputs[0].parameters.binary_data_size: of 8 bytes only 7"),
        (message(x(), data=X + b"z"), "the body has 1 bytes more than its JSON and the sizes"),
        (
            message(x(4), data=X[:4]),
            "inputs[0]: its binary data is not FP32 [1, 2]: expected 2 values of 4 bytes each, got",
        ),
        (message(x(data=[1, 2])), "inputs[0]: has both data and parameters.binary_data_size"),
        (message(x(None), data=b""), "inputs[0].data: missing; send the values here, or behind"),
        (message(x(-8)), "inputs[0].parameters.binary_data_size: send the number of bytes"),
        (message(x(True)), "inputs[0].parameters.binary_data_size: send the number of bytes"),
        (message(x("8")), "inputs[0].parameters.binary_data_size: send the number of bytes"),
        (message(x(2**70)), "inputs[0].parameters.binary_data_size: "),
        ((b"{}", 3), "Inference-Header-Content-Length: 3 bytes of JSON are announced, but"),
        ((X, 0), "Inference-Header-Content-Length: a body without JSON is not accepted"),
        ((b"{}", -1), "Inference-Header-Content-Length: a body without JSON is not accepted"),
        ((b"{}", 1), "the body is not JSON: it, or a string in it, ends too early"),
        ((b'{"inputs": []}' + X, 15), "the body is not "),
        (message(tensor("y", "FP32", [1, 2], 8)), 'inputs[0].name: the model has no input "y"'),
        (message(tensor("x", "FP64", [1, 1], 8)), 'inputs[0].datatype: expected FP32, got "FP64"'),
        (message(tensor("x", "FP32", [2**40, 2], 8)), "inputs[0]: its binary data is not FP32"),
        (
            message(x(), tensor("flags", "BOOL", [1], 1), data=X + b"\2"),
            "inputs[1]: its binary data is not BOOL [1]: expected a byte 0 or 1 per value, got 2",
        ),
        (texts(b""), "inputs[1]: its binary data is not BYTES [1]: expected 1 values, got 0"),
        (texts(b"\0\0\0"), "inputs[1]: its binary data is not BYTES [1]: expected 1 values, got 0"),
        (
            texts(b"\4\0\0\0abc"),
            "inputs[1]: its binary data is not BYTES [1]: the value at index 0 ends 1 bytes beyond",
        ),
        (
            texts(b"\1\0\0\0ab"),
            "inputs[1]: its binary data is not BYTES [1]: expected 1 values, got 1 bytes after",
        ),
        (texts(b"\xff\xff\xff\xff"), "inputs[1]: its binary data is not BYTES [1]: the value at"),
    ],
)
def test_a_refusal_names_the_field(sent, says):
    assert refused(*sent).startswith(says)


def test_rows_are_compared_with_json_inputs_too():
    body, length = message(x(), tensor("flags", "BOOL", [2], 2), data=X + b"\0\1")
    assert refused(body, length) == "inputs[1].shape: 2 rows, but inputs[0] has 1"


@pytest.mark.parametrize("value", [b"", b"-1", b"1.5", b"0x10", b" 7", b"9" * 30, b"\xb2"])
def test_a_header_that_is_no_length_is_named(value):
    with pytest.raises(MalformedMessage, match=r"^Inference-Header-Content-Length: send"):
        oip_binary.header_length(value)
    assert oip_binary.header_length(b"120") == 120


# --- answers ----------------------------------------------------------------------------------

ASKED = oip_binary.decode_request(*message(x()))
LABEL = TensorValues("label", "INT64", (1,), [7])
SCORE = TensorValues("score", "FP16", (1, 2), [[0.25, 0.75]])


def test_answers_in_binary_are_held_to_the_contract():
    body, length = oip_binary.encode_response(
        [LABEL, SCORE], model_name="m", model_version="3", id="a", binary=frozenset({"score"})
    )
    response = oip_binary.decode_response(body, length)
    values = CHECKER.check_response(response, ASKED)
    assert [one.data for one in values] == [[7], Packed("FP16", pack("FP16", [0.25, 0.75]))]
    assert (response.model_name, response.model_version, response.id) == ("m", "3", "a")
    broken = body.replace(b'"binary_data_size":4', b'"binary_data_size":3')[:-1]
    response = oip_binary.decode_response(broken, length)
    with pytest.raises(ContractViolation, match=r"^outputs\[1\]: its binary data is not FP16"):
        CHECKER.check_response(response, ASKED)


def test_renaming_keeps_the_data_and_tells_the_new_length():
    data = b"\x07\0\0\0\0\0\0\0"
    head = b'{"x":[1.50],"model_name":"served","outputs":[{"name":"label"}]}'
    body, length = oip_binary.rename_response(
        head + data, len(head), model_name="digits", model_version="3"
    )
    assert body[:length] == (
        b'{"x":[1.50],"model_name":"digits","model_version":"3","outputs":[{"name":"label"}]}'
    )
    assert body[length:] == data
    assert oip_binary.rename_response(head, None, model_name="digits", model_version="3") == (
        body[:length],
        None,
    )


@pytest.mark.parametrize(
    ("more", "wanted"),
    [
        ({}, set()),
        ({"parameters": {"binary_data_output": True}}, {"label", "score"}),
        ({"outputs": [{"name": "score", "parameters": {"binary_data": True}}]}, {"score"}),
        (
            {
                "parameters": {"binary_data_output": True},
                "outputs": [
                    {"name": "score", "parameters": {"binary_data": False}},
                    {"name": "label"},
                ],
            },
            {"label"},
        ),
    ],
)
def test_who_asks_for_binary_outputs_is_told_by_parameters(more, wanted):
    request = oip.decode_request(message(x(None, data=[1, 2]), data=b"", **more)[0])
    assert oip_binary.wants_binary(request, ["label", "score"]) == wanted


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ({"parameters": {"binary_data_output": 1}}, "parameters.binary_data_output: send true"),
        (
            {"outputs": [{"name": "label", "parameters": {"binary_data": "yes"}}]},
            "outputs[0].parameters.binary_data: send true or false",
        ),
    ],
)
def test_a_wish_that_is_no_flag_is_refused(more, says):
    request = oip.decode_request(message(x(None, data=[1, 2]), data=b"", **more)[0])
    with pytest.raises(MalformedMessage) as caught:
        oip_binary.wants_binary(request, ["label"])
    assert str(caught.value).startswith(says)


@pytest.mark.parametrize(
    ("metadata", "speaks"),
    [
        (oip.server_metadata("s", "1"), True),
        (b'{"name":"triton","extensions":["x","binary_tensor_data"]}', True),
        (b'{"name":"other","extensions":[]}', False),
        (b'{"name":"other"}', False),
        (b'{"extensions":"binary_tensor_data"}', False),
        (b"<html>", False),
        (b"\xff", False),
    ],
)
def test_a_server_says_in_its_metadata_whether_it_speaks_binary(metadata, speaks):
    assert oip_binary.speaks_binary(metadata) is speaks


# --- servers that take JSON alone -------------------------------------------------------------


def test_a_binary_request_becomes_json_and_keeps_all_else():
    body, length = message(
        {**x(), "parameters": {"binary_data_size": 8, "content_type": "np"}, "extra": [1.50]},
        id="7", unknown={"a": 1},
        parameters={"binary_data_output": True, "priority": 2},
        outputs=[
            {"name": "label", "parameters": {"binary_data": True}},
            {"name": "score", "parameters": {"binary_data": False, "classification": 3}},
        ],
    )  # fmt: skip
    values = CHECKER.check_request(oip_binary.decode_request(body, length))
    assert json.loads(oip_binary.request_as_json(body, length, values)) == {
        "inputs": [
            {
                "name": "x", "datatype": "FP32", "shape": [1, 2], "data": [0.5, 1.0],
                "parameters": {"content_type": "np"}, "extra": [1.5],
            }
        ],
        "id": "7", "unknown": {"a": 1}, "parameters": {"priority": 2},
        "outputs": [
            {"name": "label"}, {"name": "score", "parameters": {"classification": 3}},
        ],
    }  # fmt: skip


def test_a_json_request_loses_only_its_wish_for_binary():
    sent = x(None, data=[1, 2])
    body, _ = message(sent, data=b"", parameters={"binary_data_output": True}, outputs=None)
    values = CHECKER.check_request(oip.decode_request(body))
    assert json.loads(oip_binary.request_as_json(body, None, values)) == {
        "inputs": [sent],
        "outputs": None,
    }


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (message(x(), data=struct.pack("<2f", 1, math.nan)), "inputs[0]: the value at index 1 is"),
        (texts(b"\1\0\0\0\xff"), "inputs[1]: the value at index 0 is not UTF-8 text, which JSON"),
    ],
)
def test_what_json_can_not_carry_is_refused_where_it_must_be_json(body, says):
    values = CHECKER.check_request(oip_binary.decode_request(body[0], body[1]))
    with pytest.raises(ContractViolation) as caught:
        oip_binary.request_as_json(body[0], body[1], values)
    assert str(caught.value).startswith(says)


def test_a_json_answer_becomes_binary_where_it_was_asked_for():
    outputs = [
        {"name": "label", "datatype": "INT64", "shape": [1], "data": [7], "more": 1},
        {
            "name": "score", "datatype": "FP16", "shape": [1, 2], "data": [[0.25, 0.75]],
            "parameters": {"a": 1},
        },
    ]  # fmt: skip
    body = json.dumps({"model_name": "m", "outputs": outputs, "unknown": 1}).encode()
    values = CHECKER.check_response(oip.decode_response(body), ASKED)
    assert oip_binary.response_as_binary(body, values, frozenset()) == (body, None)

    packed, length = oip_binary.response_as_binary(body, values, frozenset({"score", "label"}))
    assert json.loads(packed[:length]) == {
        "model_name": "m",
        "outputs": [
            {
                "name": "label", "datatype": "INT64", "shape": [1], "more": 1,
                "parameters": {"binary_data_size": 8},
            },
            {
                "name": "score", "datatype": "FP16", "shape": [1, 2],
                "parameters": {"a": 1, "binary_data_size": 4},
            },
        ],
        "unknown": 1,
    }  # fmt: skip
    assert packed[length:] == struct.pack("<q2e", 7, 0.25, 0.75)

    values = CHECKER.check_response(oip_binary.decode_response(packed, length), ASKED)
    back = json.loads(oip_binary.response_as_json(packed, length, values))
    assert back["outputs"][0] == outputs[0]
    assert back["outputs"][1] == {**outputs[1], "data": [0.25, 0.75]}


# --- any message ------------------------------------------------------------------------------

_INTEGERS = {
    f"{sign}INT{bits}": st.integers(
        -(2 ** (bits - 1)) if not sign else 0, 2 ** (bits - (not sign)) - 1
    )
    for sign in ("", "U")
    for bits in (8, 16, 32, 64)
}
_ELEMENTS = {
    "BOOL": st.booleans(),
    "BYTES": st.text(max_size=5),
    "FP16": st.floats(width=16, allow_nan=False),
    "FP32": st.floats(width=32, allow_nan=False),
    "FP64": st.floats(allow_nan=False),
    **_INTEGERS,
}


@st.composite
def tensors(draw):
    datatype = draw(st.sampled_from(sorted(_ELEMENTS)))
    shape = tuple(draw(st.lists(st.integers(1, 3), max_size=3)))
    size = math.prod(shape)
    data = draw(st.lists(_ELEMENTS[datatype], min_size=size, max_size=size))
    return TensorValues(draw(st.text(max_size=5)), datatype, shape, data)


def plain(values):
    return [msgspec.structs.replace(value, data=value.data.tolist()) for value in values]


@given(
    st.lists(tensors(), max_size=3, unique_by=lambda one: one.name),
    st.none() | st.text(max_size=5),
    st.booleans(),
)
def test_what_is_packed_unpacks_to_the_same(values, name, as_nested):
    described = tuple(Tensor(one.name, one.datatype, one.shape) for one in values)
    checker = ContractChecker(Contract(inputs=described, outputs=described))
    sent = [
        msgspec.structs.replace(one, data=nested(one.data, one.shape) if as_nested else one.data)
        for one in values
        if one.shape or not as_nested
    ]
    if len(sent) < len(values):
        sent = values
    body, length = oip_binary.encode_request(sent, id=name, binary_output=True)
    request = oip_binary.decode_request(body, length)
    assert plain(checker.check_request(request)) == values
    wanted = oip_binary.wants_binary(request, [one.name for one in values])
    answer, length = oip_binary.encode_response(values, model_name="m", id=name, binary=wanted)
    response = oip_binary.decode_response(answer, length)
    assert plain(checker.check_response(response, request)) == values
    assert response.id == request.id == name


@given(st.lists(tensors(), min_size=1, max_size=3, unique_by=lambda one: one.name))
def test_binary_to_json_and_back_is_the_same(values):
    described = tuple(Tensor(one.name, one.datatype, one.shape) for one in values)
    checker = ContractChecker(Contract(inputs=described, outputs=described))
    request = oip_binary.decode_request(*oip_binary.encode_request(values))
    body, length = oip_binary.encode_response(
        values, model_name="m", binary=frozenset(one.name for one in values)
    )
    checked = checker.check_response(oip_binary.decode_response(body, length), request)
    try:
        as_json = oip_binary.response_as_json(body, length, checked)
    except ContractViolation:
        assert any(one.data.json_problem() for one in checked)
        return
    checked = checker.check_response(oip.decode_response(as_json), request)
    names = frozenset(one.name for one in values)
    assert oip_binary.response_as_binary(as_json, checked, names) == (body, length)


@given(st.lists(st.integers(), min_size=8, max_size=8), st.sampled_from([(8,), (2, 4), (2, 2, 2)]))
def test_flattening_undoes_nesting(values, shape):
    assert flattened(nested(values, shape)) == values


def accepted(body, length):
    """Whether all steps accept the message; anything raised but a refusal is a fault."""
    try:
        request = oip_binary.decode_request(body, length)
        values = CHECKER.check_request(request)
        oip_binary.wants_binary(request, ["label", "score"])
        oip_binary.request_as_json(body, length, values)
    except InvalidMessage:
        return False
    return True


@given(st.binary(max_size=100), st.none() | st.integers(-5, 120))
def test_no_bytes_raise_anything_but_a_refusal(body, length):
    assert not accepted(body, length)
    with pytest.raises(MalformedMessage):
        oip_binary.decode_response(body, length)


WHOLE = message(
    x(), tensor("texts", "BYTES", [1], 7), tensor("flags", "BOOL", [1], 1),
    data=X + b"\3\0\0\0abc\1", parameters={"binary_data_output": True},
    outputs=[{"name": "label", "parameters": {"binary_data": True}}],
)  # fmt: skip


@given(st.integers(0, 1_000), st.integers(0, 255), st.integers(-3, 3))
def test_one_altered_byte_or_a_wrong_length_is_accepted_or_refused(place, byte, off):
    body = bytearray(WHOLE[0])
    assert accepted(*WHOLE)
    body[place % len(body)] = byte
    accepted(bytes(body), WHOLE[1] + off)


@given(
    st.sampled_from(sorted(_ELEMENTS)),
    st.binary(max_size=40),
    st.lists(st.integers(0, 2**63 - 1) | st.integers(0, 5), max_size=3),
)
def test_any_data_is_accepted_or_named(datatype, raw, shape):
    checker = ContractChecker(Contract(inputs=(Tensor("n", datatype, (-1,) * len(shape)),)))
    body, length = message(tensor("n", datatype, shape, len(raw)), data=raw)
    request = oip_binary.decode_request(body, length)
    try:
        [value] = checker.check_request(request)
    except ContractViolation as problem:
        said = str(problem)
    else:
        if datatype != "BYTES":
            assert len(value.data.tolist()) == math.prod(shape)
        assert pack(datatype, value.data) == raw
        said = "inputs[0]"
    assert said.startswith("inputs[0]")
