"""The Open Inference Protocol's codec: what is accepted, what is refused, and in which words."""

import json
import math
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shipworthy.domain.contract import Contract, Tensor
from shipworthy.protocols import oip
from shipworthy.protocols.oip import (
    ContractChecker,
    ContractViolation,
    InvalidMessage,
    MalformedMessage,
    TensorValues,
    decode_request,
    decode_response,
    encode_request,
    encode_response,
)

CONTRACT = Contract(
    inputs=(Tensor("features", "FP64", (-1, 64)), Tensor("bias", "INT8", (-1,), optional=True)),
    outputs=(Tensor("label", "INT64", (-1,)), Tensor("score", "FP32", (-1, 2), optional=True)),
)
CHECKER = ContractChecker(CONTRACT)


def request(*inputs, **more):
    return json.dumps({"inputs": list(inputs), **more}).encode()


def tensor(name="features", datatype="FP64", shape=(2, 64), data=None):
    size = math.prod(shape) if data is None else 0
    return {
        "name": name,
        "datatype": datatype,
        "shape": list(shape),
        "data": [0.5] * size if data is None else data,
    }


def bias(**changes):
    settings: dict[str, Any] = {"name": "bias", "datatype": "INT8", "shape": (2,), "data": [1, 2]}
    return tensor(**{**settings, **changes})


def refused(body):
    with pytest.raises(InvalidMessage) as caught:
        CHECKER.check_request(decode_request(body))
    return str(caught.value)


# --- requests ---------------------------------------------------------------------------------


def test_flat_and_nested_data_are_accepted():
    flat = CHECKER.check_request(decode_request(request(tensor())))
    nested = CHECKER.check_request(decode_request(request(tensor(data=[[0.5] * 64] * 2))))
    assert (flat[0].name, flat[0].datatype, flat[0].shape) == ("features", "FP64", (2, 64))
    assert flat[0].data == [value for row in nested[0].data for value in row]


def test_all_fields_of_the_protocol_are_read():
    message = decode_request(
        request(
            {**tensor(), "parameters": {"content_type": "np"}},
            bias(),
            id="42",
            parameters={"a": 1},
            outputs=[{"name": "label", "parameters": {"classification": 3}}],
            unknown=[{}],
        )
    )
    CHECKER.check_request(message)
    assert (message.id, message.parameters) == ("42", {"a": 1})
    assert [output.name for output in message.outputs or ()] == ["label"]


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (
            request(tensor(data=[0.5] * 127)),
            "inputs[0].data: expected 128 values for shape [2, 64], got 127",
        ),
        (
            request(tensor(data=[[0.5] * 64, [0.5] * 63])),
            "inputs[0].data[1]: expected 64 entries as the shape says, got 63",
        ),
        (
            request(tensor(data=[[0.5] * 64])),
            "inputs[0].data: expected 2 entries as the shape says, got 1",
        ),
        (
            request(tensor(data=[[0.5] * 64, 3])),
            "inputs[0].data[1]: expected an array, got an integer",
        ),
        (
            request(tensor(data=[0.5, [0.5]])),
            "inputs[0].data[1]: expected a number that fits 64 bits, got an array",
        ),
        (
            request(tensor(data=["a"])),
            "inputs[0].data[0]: expected a number that fits 64 bits, got a string",
        ),
        (
            request(tensor(data=[None])),
            "inputs[0].data[0]: expected a number that fits 64 bits, got null",
        ),
        (
            request(tensor(data=[True])),
            "inputs[0].data[0]: expected a number that fits 64 bits, got true or false",
        ),
        (request(tensor(data={})), "inputs[0].data: expected an array, got an object"),
        (request(tensor(data=1)), "inputs[0].data: expected an array, got an integer"),
        (
            request(tensor(shape=(2, 63))),
            "inputs[0].shape: expected [-1, 64], got [2, 63]; -1 stands for any size from 1 up",
        ),
        (
            request(tensor(shape=(0, 64))),
            "inputs[0].shape: expected [-1, 64], got [0, 64]; -1 stands for any size from 1 up",
        ),
        (
            request(tensor(shape=(64,))),
            "inputs[0].shape: expected [-1, 64], got [64]; -1 stands for any size from 1 up",
        ),
        (request(tensor(datatype="FP32")), 'inputs[0].datatype: expected FP64, got "FP32"'),
        (
            request(tensor(), bias(data=[1, 128])),
            "inputs[1].data[1]: expected an integer from -128 to 127, got a value out of range",
        ),
        (
            request(tensor(), bias(data=[1, 1.5])),
            "inputs[1].data[1]: expected an integer from -128 to 127, got a number with a fraction",
        ),
        (
            request(tensor(), bias(shape=(3,), data=[1, 2, 3])),
            "inputs[1].shape: 3 rows, but inputs[0] has 2",
        ),
        (
            request(tensor(), tensor()),
            'inputs[1].name: "features" is given twice',
        ),
        (
            request(tensor(name="pixels")),
            'inputs[0].name: the model has no input "pixels"; it takes "features", "bias"',
        ),
        (request(bias()), 'inputs: "features" is missing'),
        (request(), 'inputs: "features" is missing'),
        (
            request(tensor(), outputs=[{"name": "labels"}]),
            'outputs[0].name: the model has no output "labels"; it returns "label", "score"',
        ),
        (
            request(tensor(), outputs=[{"name": "label"}, {"name": "label"}]),
            'outputs[1].name: "label" is given twice',
        ),
        (b"", "the body is empty; send a JSON object"),
        (b"[]", "body: expected object, got array"),
        (b"{}", "body: object missing required field inputs"),
        (b'{"inputs": [{"name": "x"}]}', "inputs[0]: object missing required field shape"),
        (b'{"inputs": {}}', "inputs: expected array, got object"),
        (request(tensor(shape=(-1, 64), data=[])), "inputs[0].shape[0]: expected int >= 0"),
        (
            request({**tensor(), "shape": [2.5, 64]}),
            "inputs[0].shape[0]: expected int, got float",
        ),
        (b'{"inputs": [}', "the body is not JSON: invalid character (byte 12)"),
        (b'{"inputs"', "the body is not JSON: it, or a string in it, ends too early (9 bytes)"),
        (b'{"inputs": "\xff"}', "the body is not valid UTF-8 (byte 12)"),
        (b'{"ignored": "\xff", "inputs": []}', "the body is not valid UTF-8 (byte 13)"),
        (b'{"ignored": ' + b"[" * 50_000, "the body is nested too deeply"),
        (b'{"inputs": []} {}', "the body is not JSON: trailing characters (byte 16)"),
    ],
)  # fmt: skip
def test_a_refusal_names_the_field(body, says):
    assert refused(body) == says


@pytest.mark.parametrize("token", ["NaN", "Infinity", "-Infinity"])
def test_tokens_that_are_no_json_are_named(token):
    body = request(tensor(data=[7])).replace(b"7", token.encode())
    assert f"it holds {token.lstrip('-')} (byte" in refused(body)
    assert refused(body).endswith("send numbers")


@pytest.mark.parametrize("number", ["1e999", "-1e400", "9" * 400])
def test_numbers_beyond_the_type_are_named(number):
    body = request(tensor(data=[7])).replace(b"[7]", f"[{number}]".encode())
    assert refused(body) == (
        "inputs[0].data[0]: expected a number that fits 64 bits, got a value out of range"
    )


def test_long_names_and_shapes_are_not_echoed_whole():
    assert len(refused(request(tensor(name="x" * 10_000)))) < 200
    assert len(refused(request(tensor(shape=[1] * 1_000, data=[])))) < 250
    assert len(refused(request(tensor(shape=(2**62, 64), data=[])))) < 200


def test_control_characters_in_names_are_escaped():
    assert "\n" not in refused(request(tensor(name="a\nb")))


LIMITS = {
    "UINT8": (0, 2**8 - 1), "UINT16": (0, 2**16 - 1), "UINT32": (0, 2**32 - 1),
    "UINT64": (0, 2**64 - 1), "INT8": (-(2**7), 2**7 - 1), "INT16": (-(2**15), 2**15 - 1),
    "INT32": (-(2**31), 2**31 - 1), "INT64": (-(2**63), 2**63 - 1),
}  # fmt: skip


@pytest.mark.parametrize("datatype", LIMITS)
@pytest.mark.parametrize("nested", [False, True])
def test_integers_are_held_to_their_range(datatype, nested):
    low, high = LIMITS[datatype]
    checker = ContractChecker(
        Contract(inputs=(Tensor("n", datatype, (-1, 1)),), outputs=CONTRACT.outputs)
    )

    def check(*values):
        data = [[value] for value in values] if nested else list(values)
        body = request(tensor("n", datatype, (len(values), 1), data))
        return checker.check_request(decode_request(body))

    assert check(low, high, 0)
    for wrong in (low - 1, high + 1):
        with pytest.raises(ContractViolation, match=r"inputs\[0\]\.data\[1\]"):
            check(0, wrong)


@pytest.mark.parametrize(
    ("datatype", "good", "bad"),
    [
        ("BOOL", [True, False], [1]),
        ("BYTES", ["a", "é", ""], [1]),
        ("FP16", [65504, -1.5], [65520]),
        ("FP32", [3.4e38, 1], [3.5e38]),
        ("FP64", [1e308, -0.0, 2], ["1"]),
    ],
)
def test_each_type_takes_its_values(datatype, good, bad):
    checker = ContractChecker(
        Contract(inputs=(Tensor("n", datatype, (-1,)),), outputs=CONTRACT.outputs)
    )
    body = request(tensor("n", datatype, (len(good),), good))
    assert checker.check_request(decode_request(body))[0].data == good
    with pytest.raises(ContractViolation, match=r"inputs\[0\]\.data\[0\]"):
        checker.check_request(decode_request(request(tensor("n", datatype, (1,), bad))))


def test_a_scalar_has_no_batch():
    checker = ContractChecker(
        Contract(
            inputs=(Tensor("x", "FP64", ()), Tensor("y", "FP64", (-1,))), outputs=CONTRACT.outputs
        )
    )
    body = request(tensor("x", shape=(), data=[1.0]), tensor("y", shape=(3,)))
    assert checker.check_request(decode_request(body))[0].shape == ()


def test_a_contract_without_inputs_takes_none():
    checker = ContractChecker(Contract(inputs=(), outputs=CONTRACT.outputs))
    assert checker.check_request(decode_request(request())) == []
    with pytest.raises(ContractViolation, match="it takes none"):
        checker.check_request(decode_request(request(tensor())))


# --- responses --------------------------------------------------------------------------------

ASKED = decode_request(request(tensor()))


def response(*outputs, **more):
    return json.dumps({"model_name": "m", "outputs": list(outputs), **more}).encode()


def label(**changes):
    settings: dict[str, Any] = {"name": "label", "datatype": "INT64", "shape": (2,), "data": [1, 2]}
    return tensor(**{**settings, **changes})


def test_a_response_that_keeps_the_contract_is_accepted():
    CHECKER.check_response(decode_response(response(label())), ASKED)
    score = tensor("score", "FP32", (2, 2))
    CHECKER.check_response(decode_response(response(label(), score, model_version="3")), ASKED)


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (response(), 'outputs: "label" is missing'),
        (response(label(), label()), 'outputs[1].name: "label" is given twice'),
        (
            response(label(name="x")),
            'outputs[0].name: the model has no output "x"; it returns "label", "score"',
        ),
        (response(label(datatype="INT32")), 'outputs[0].datatype: expected INT64, got "INT32"'),
        (
            response(label(shape=(3,), data=[1, 2, 3])),
            "outputs[0].shape: the request has 2 rows, the answer 3",
        ),
        (response(label(data=[1])), "outputs[0].data: expected 2 values for shape [2], got 1"),
        (response(label(data=[1, None])), "outputs[0].data[1]: expected an integer"),
    ],
)  # fmt: skip
def test_a_response_against_the_contract_is_refused(body, says):
    with pytest.raises(ContractViolation) as caught:
        CHECKER.check_response(decode_response(body), ASKED)
    assert str(caught.value).startswith(says)


def test_only_the_outputs_that_were_asked_for_are_due():
    asked = decode_request(request(tensor(), outputs=[{"name": "score"}]))
    score = tensor("score", "FP32", (2, 2))
    CHECKER.check_response(decode_response(response(score)), asked)
    with pytest.raises(ContractViolation, match='"score" is missing'):
        CHECKER.check_response(decode_response(response(label())), asked)


@pytest.mark.parametrize("body", [b"", b"null", b"<html>", b'{"outputs": []}', b"\x80abc"])
def test_a_response_that_is_none_is_malformed(body):
    with pytest.raises(MalformedMessage):
        decode_response(body)


def test_renaming_keeps_everything_else_as_it_is():
    body = b'{"x":[1.50,{"a":1}],"model_name":"served","outputs":[{"name":"label"}],"id":"7"}'
    renamed = oip.rename_response(body, model_name="digits", model_version="3")
    assert renamed == (
        b'{"x":[1.50,{"a":1}],"model_name":"digits","model_version":"3",'
        b'"outputs":[{"name":"label"}],"id":"7"}'
    )


def test_renaming_keeps_spaces_and_escapes_in_keys():
    body = b'{ "m\\u006fre": 1.0,\n "model_name" : "served", "model_version": "9", "outputs": [ ] }'
    renamed = oip.rename_response(body, model_name="digits", model_version="3")
    assert renamed == body.replace(b"served", b"digits").replace(b"9", b"3")


# --- documents --------------------------------------------------------------------------------


def test_documents_have_the_protocols_fields():
    assert json.loads(oip.error_body('no "x"')) == {"error": 'no "x"'}
    assert json.loads(oip.server_metadata("s", "1")) == {
        "name": "s", "version": "1", "extensions": ["binary_tensor_data"],
    }  # fmt: skip
    assert json.loads(oip.server_live(live=True)) == {"live": True}
    assert json.loads(oip.server_ready(ready=False)) == {"ready": False}
    assert json.loads(oip.model_ready("m", ready=True)) == {"name": "m", "ready": True}
    document = json.loads(oip.model_metadata("m", CONTRACT, versions=["3"], platform="sklearn"))
    assert document["name"] == "m"
    assert document["versions"] == ["3"]
    assert document["platform"] == "sklearn"
    assert document["inputs"][0] == {"name": "features", "datatype": "FP64", "shape": [-1, 64]}
    assert document["outputs"][1] == {"name": "score", "datatype": "FP32", "shape": [-1, 2]}


# --- any message ------------------------------------------------------------------------------

_ELEMENTS = {
    "BOOL": st.booleans(),
    "BYTES": st.text(),
    "FP16": st.floats(-65504, 65504, width=16),
    "FP32": st.floats(allow_nan=False, allow_infinity=False, width=32),
    "FP64": st.floats(allow_nan=False, allow_infinity=False),
    **{name: st.integers(*limits) for name, limits in LIMITS.items()},
}


@st.composite
def tensors(draw):
    datatype = draw(st.sampled_from(sorted(_ELEMENTS)))
    shape = tuple(draw(st.lists(st.integers(1, 4), max_size=3)))
    size = math.prod(shape)
    data = draw(st.lists(_ELEMENTS[datatype], min_size=size, max_size=size))
    return TensorValues(draw(st.text(max_size=10)), datatype, shape, data)


def nested(data, shape):
    if len(shape) < 2:
        return data
    size = math.prod(shape[1:])
    return [nested(data[n : n + size], shape[1:]) for n in range(0, len(data), size)]


@given(
    st.lists(tensors(), min_size=1, max_size=3, unique_by=lambda one: one.name),
    st.booleans(),
    st.none() | st.text(max_size=20),
)
def test_what_is_encoded_decodes_to_the_same(values, as_nested, name):
    contract = Contract(
        inputs=tuple(Tensor(v.name, v.datatype, v.shape) for v in values),
        outputs=tuple(Tensor(v.name, v.datatype, v.shape) for v in values),
    )
    sent = [
        msgspec.structs.replace(v, data=nested(v.data, v.shape) if as_nested else v.data)
        for v in values
    ]
    message = decode_request(encode_request(sent, id=name, outputs=[v.name for v in values]))
    assert ContractChecker(contract).check_request(message) == sent
    assert message.id == name
    answer = encode_response(sent, model_name="m", model_version="1", id=name)
    decoded = decode_response(answer)
    ContractChecker(contract).check_response(decoded, message)
    assert (decoded.model_name, decoded.model_version, decoded.id) == ("m", "1", name)


def problem_with(body):
    """What a body is refused with; empty when it is accepted. Anything else raised is a fault."""
    try:
        CHECKER.check_request(decode_request(body))
    except InvalidMessage as problem:
        return str(problem) or "refused without a word"
    return ""


@given(st.binary(max_size=200))
def test_no_bytes_raise_anything_but_a_refusal(body):
    assert problem_with(body) not in {"", "refused without a word"}
    with pytest.raises(MalformedMessage):
        decode_response(body)


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4)
    ),
    max_leaves=20,
)


@given(data=_JSON, shape=_JSON, datatype=_JSON, name=_JSON)
def test_no_json_raises_anything_but_a_refusal(data, shape, datatype, name):
    body = request({"name": name, "shape": shape, "datatype": datatype, "data": data})
    problem = problem_with(body)
    assert not problem or problem.startswith(("inputs", "the body"))


@given(data=_JSON)
def test_any_data_is_accepted_or_named(data):
    problem = problem_with(request(tensor(data=data)))
    assert not problem or problem.startswith(("inputs[0].data", "the body"))


@given(st.integers(0, 400), st.integers(0, 255))
def test_one_altered_byte_is_accepted_or_refused(place, byte):
    body = bytearray(request(tensor(shape=(1, 64))))
    body[place % len(body)] = byte
    assert problem_with(bytes(body)) != "refused without a word"


def test_arrays_with_a_tolist_are_encoded():
    class Array:
        def tolist(self):
            return [1, 2]

    body = encode_response([TensorValues("label", "INT64", (2,), Array())], model_name="m")
    assert json.loads(body)["outputs"][0]["data"] == [1, 2]


@pytest.mark.parametrize(
    ("shape", "data", "says"),
    [
        ((2, 2, 2), [[[1, 2], [3, 4]], [[5, 6], [7, 8]]], None),
        ((2, 2, 2), [[[1, 2], [3, 4]], [[5, 6], [7]]], "data[1][1]: expected 2 entries"),
        ((2, 2, 2), [[[1, 2], [3, 4]], [[5, 6]]], "data[1]: expected 2 entries"),
        ((2, 1), [[1], [2**64]], "data[1][0]: expected an integer"),
        ((2, 1), [[1], [2]], None),
    ],
)
def test_nested_data_names_the_row_at_fault(shape, data, says):
    tensor = Tensor("a", "INT64", (-1, *shape[1:]))
    checker = oip.ContractChecker(Contract(inputs=(tensor,), outputs=()))
    sent = {"name": "a", "shape": shape, "datatype": "INT64", "data": data}
    request = oip.decode_request(json.dumps({"inputs": [sent]}).encode())
    if says is None:
        [value] = checker.check_request(request)
        assert value.data == data
    else:
        with pytest.raises(oip.ContractViolation) as caught:
            checker.check_request(request)
        assert says in str(caught.value)
