"""MLflow's scoring protocol as the tensors of a contract, held to what a real server answered.

`samples/mlflow.json` holds exchanges with MLflow's own scoring server: what a client sent, the
answer, the same request after we read and wrote it, and the answer to that.
"""

import json
import math
import struct
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shipworthy.domain.contract import Contract, Tensor
from shipworthy.protocols import mlflow, oip
from shipworthy.protocols.mlflow import Scoring, UnsupportedContent
from shipworthy.protocols.oip import (
    ContractViolation,
    InvalidMessage,
    MalformedMessage,
    TensorValues,
)
from shipworthy.protocols.packed import Packed, flattened

EXCHANGES = json.loads(Path(__file__).with_name("samples").joinpath("mlflow.json").read_text())[
    "exchanges"
]

COLUMNS = Contract(
    inputs=(
        Tensor("age", "FP64", (-1,)),
        Tensor("plan", "BYTES", (-1, 1)),
        Tensor("calls", "INT32", (-1,), optional=True),
    ),
    outputs=(
        Tensor("risk", "FP64", (-1,)),
        Tensor("why", "BYTES", (-1, 1)),
        Tensor("shares", "FP32", (-1, 2), optional=True),
    ),
)
MATRIX = Contract(
    inputs=(Tensor("x", "FP64", (-1, 2)),),
    outputs=(Tensor("label", "INT64", (-1,)), Tensor("shares", "FP32", (-1, 2), optional=True)),
)
OTHER = Contract(  # neither columns nor the one matrix
    inputs=(Tensor("words", "INT64", (-1, -1)), Tensor("limit", "FP32", (), optional=True)),
    outputs=(Tensor("words", "INT64", (-1, -1)), Tensor("cost", "FP64", ())),
)


def read(contract, body, content_type="application/json"):
    sent = body if isinstance(body, bytes) else json.dumps(body).encode()
    values = Scoring(contract).read_request(sent, content_type)
    checked = oip.ContractChecker(contract).check_request(request_of(values))
    assert [(one.name, one.shape) for one in checked] == [(one.name, one.shape) for one in values]
    return {one.name: one for one in values}


def request_of(values, outputs=None):
    return oip.decode_request(oip.encode_request(values, outputs=outputs))


def plain(values):
    return {name: (one.shape, one.data) for name, one in values.items()}


def refused(contract, body, content_type="application/json"):
    with pytest.raises(InvalidMessage) as caught:
        read(contract, body, content_type)
    return str(caught.value)


# --- as MLflow does it ------------------------------------------------------------------------


def _contract(exchange, **more):
    inputs, outputs = (
        tuple(Tensor(name, kind, tuple(shape)) for name, kind, shape in exchange[side])
        for side in ("inputs", "outputs")
    )
    return Contract(inputs=inputs, outputs=outputs, **more)


@pytest.mark.parametrize("exchange", EXCHANGES)
def test_requests_reach_a_real_server_as_they_were_meant(exchange):
    contract = _contract(exchange, protocol="mlflow")
    scoring = Scoring(contract)
    values = scoring.read_request(exchange["request"].encode(), exchange["content_type"])
    assert scoring.write_request(values).decode() == exchange["translated"]
    if exchange["status"] == 200:
        assert exchange["answer_to_translated"] == exchange["answer"]
    via_oip = oip.ContractChecker(contract).check_request(request_of(values))
    assert scoring.write_request(via_oip).decode() == exchange["translated"]


@pytest.mark.parametrize(
    "exchange", [one for one in EXCHANGES if one["status"] == 200 and "NaN" not in one["answer"]]
)
def test_a_real_server_s_answers_become_tensors_and_back(exchange):
    contract = _contract(exchange)
    scoring = Scoring(contract)
    sent = exchange["request"].encode()
    request = request_of(scoring.read_request(sent, exchange["content_type"]))
    outputs = scoring.read_response(exchange["answer"].encode(), request)
    body = oip.encode_response(outputs, model_name="m")
    outputs = oip.ContractChecker(contract).check_response(oip.decode_response(body), request)
    answer: Any = json.loads(exchange["answer"])["predictions"]
    if exchange["model"] in ("series", "named_series"):
        answer = [value for row in answer for value in row.values()]
    if exchange["model"] == "dict":
        total, label = answer["total"], answer["label"]
        answer = [{"total": one, "label": two} for one, two in zip(total, label, strict=True)]
    assert json.loads(scoring.write_response(outputs)) == {"predictions": answer}


def test_a_real_server_s_nan_and_failure_are_told():
    [nan] = [one for one in EXCHANGES if "NaN" in one["answer"]]
    scoring = Scoring(_contract(nan))
    request = request_of(scoring.read_request(nan["request"].encode()))
    with pytest.raises(MalformedMessage, match="it holds NaN"):
        scoring.read_response(nan["answer"].encode(), request)
    [failure] = [one for one in EXCHANGES if one["model"] == "fail"]
    said = mlflow.error_text(failure["answer"].encode())
    assert said.startswith("Encountered an unexpected error while evaluating the model.")
    assert mlflow.error_text(b"<html>") == ""
    assert mlflow.error_text(mlflow.error_body("no")) == "no"
    assert json.loads(mlflow.error_body("no", "NOT_FOUND"))["error_code"] == "NOT_FOUND"


# --- requests ---------------------------------------------------------------------------------

ROWS = {"age": ((2,), [31.0, 40.5]), "plan": ((2, 1), ["pro", "basic"])}


@pytest.mark.parametrize(
    "body",
    [
        {"dataframe_split": {"columns": ["age", "plan"], "data": [[31, "pro"], [40.5, "basic"]]}},
        {"dataframe_split": {"columns": ["plan", "age"], "data": [["pro", 31], ["basic", 40.5]]}},
        {
            "dataframe_split": {
                "columns": ["age", "plan"], "data": [[31, "pro"], [40.5, "basic"]],
                "index": ["a", "b"],
            }
        },
        {"dataframe_records": [{"age": 31, "plan": "pro"}, {"plan": "basic", "age": 40.5}]},
        {"instances": [{"age": 31, "plan": "pro"}, {"plan": "basic", "age": 40.5}]},
        {"instances": {"age": [31, 40.5], "plan": ["pro", "basic"]}},
        {"inputs": [{"age": 31, "plan": "pro"}, {"plan": "basic", "age": 40.5}]},
        {"inputs": {"plan": ["pro", "basic"], "age": [31, 40.5]}, "params": {}},
        {"inputs": {"age": [31, 40.5], "plan": ["pro", "basic"]}, "params": None, "else": 1},
    ],
)  # fmt: skip
def test_columns_become_inputs_of_the_same_name(body):
    assert plain(read(COLUMNS, body)) == ROWS


def test_a_list_of_one_is_a_row_too():
    assert read(COLUMNS, {"inputs": {"age": [31], "plan": [["pro"]]}})["plan"].data == [["pro"]]


@pytest.mark.parametrize("content_type", ["text/csv", "text/csv; charset=utf-8", "TEXT/CSV"])
@pytest.mark.parametrize(
    "body",
    [
        b"age,plan\n31,pro\n40.5,basic\n",
        b'plan,age\r\npro, 31\r\n\r\n"basic",40.5',
        b"\xef\xbb\xbfage,plan\n31,pro\n4.05e1,basic",
    ],
)  # fmt: skip
def test_csv_is_read_by_the_contract_s_types(body, content_type):
    assert plain(read(COLUMNS, body, content_type)) == ROWS


def test_csv_holds_texts_as_they_are():
    body = b'age,plan,calls\n1,"a ""b"",\nc",2\n1, x ,3\n1,,4\n'
    values = read(COLUMNS, body, "text/csv")
    assert values["plan"].data == ['a "b",\nc', " x ", ""]
    assert values["calls"].data == [2, 3, 4]


@pytest.mark.parametrize(
    "body",
    [
        {"dataframe_split": {"columns": ["p", "q"], "data": [[1, 2], [3, 4.5]]}},
        {"dataframe_split": {"columns": [0, 1], "data": [[1, 2], [3, 4.5]]}},
        {"dataframe_split": {"data": [[1, 2], [3, 4.5]]}},
        {"dataframe_split": {"columns": ["x"], "data": [[[1, 2]], [[3, 4.5]]]}},
        {"dataframe_records": [{"p": 1, "q": 2}, {"q": 4.5, "p": 3}]},
        {"dataframe_records": [{"x": [1, 2]}, {"x": [3, 4.5]}]},
        {"instances": [{"x": [1, 2]}, {"x": [3, 4.5]}]},
        {"instances": [[1, 2], [3, 4.5]]},
        {"inputs": [[1, 2], [3, 4.5]]},
        {"inputs": {"x": [[1, 2], [3, 4.5]]}},
    ],
)
def test_all_columns_together_are_the_one_matrix(body):
    assert plain(read(MATRIX, body)) == {"x": ((2, 2), [[1.0, 2.0], [3.0, 4.5]])}


def test_csv_columns_are_the_one_matrix_too():
    values = read(MATRIX, b"p,q\n1,2\n3,4.5\n", "text/csv")
    assert plain(values) == {"x": ((2, 2), [[1.0, 2.0], [3.0, 4.5]])}


def test_sizes_that_the_contract_leaves_open_are_those_that_come():
    assert plain(read(OTHER, {"inputs": {"words": [[1, 2, 3]], "limit": 0.5}})) == {
        "words": ((1, 3), [[1, 2, 3]]),
        "limit": ((), [0.5]),
    }
    assert plain(read(OTHER, {"inputs": [[1, 2, 3]]})) == {"words": ((1, 3), [[1, 2, 3]])}


def split(columns, *rows):
    return {"dataframe_split": {"columns": columns, "data": rows}}


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (
            split(["age", "plan"], [31, "pro"], [None, "pro"]),
            'dataframe_split.data[1], column "age": expected a number that fits 64 bits, got null',
        ),
        (
            split(["plan", "calls", "age"], ["pro", 2.5, 1]),
            'dataframe_split.data[0], column "calls": expected an integer from -2147483648',
        ),
        (
            split(["plan", "calls", "age"], ["pro", 2**31, 1]),
            'dataframe_split.data[0], column "calls": expected an integer from -2147483648',
        ),
        (
            split(["age", "plan"], [31, "pro"], [31]),
            "dataframe_split.data[1]: expected 2 values, one for each column, got 1",
        ),
        (split(["age", "plan"], [31, "pro"], 5), "dataframe_split.data[1]: expected a list with"),
        (split(["age"], [31]), 'dataframe_split: "plan" is missing'),
        (
            split(["age", "plan", "zip"], [31, "pro", 1]),
            'dataframe_split: the model has no "zip"; it takes "age", "plan", "calls"',
        ),
        (split(["age", "age"], [1, 2]), 'dataframe_split: column "age" is given twice'),
        (split(["age", "plan"]), "dataframe_split.data: there are no rows; send at least one"),
        ({"dataframe_split": {"data": [[1, "a"]]}}, "dataframe_split.columns: missing; the model"),
        (
            {"dataframe_split": {"columns": ["age", "plan"], "data": 5}},
            "dataframe_split.data: expected a list of rows",
        ),
        ({"dataframe_split": {"columns": ["age"]}}, "dataframe_split: object missing required"),
        ({"dataframe_split": []}, "dataframe_split: expected object"),
        ({"dataframe_split": {"data": [], "rows": []}}, "dataframe_split: object contains unknown"),
        ({"dataframe_records": [{"age": 1}]}, 'dataframe_records[0]: "plan" is missing'),
        (
            {"dataframe_records": [{"age": 1, "plan": "a", "zip": 2}]},
            'dataframe_records[0]: the model has no "zip"; it takes "age", "plan", "calls"',
        ),
        (
            {"dataframe_records": [{"age": 1, "plan": "a"}, {"age": "1", "plan": "a"}]},
            'dataframe_records[1], column "age": expected a number that fits 64 bits, got a string',
        ),
        (
            {"instances": [{"age": 1, "plan": "a", "calls": 1}, {"age": 1, "plan": "a"}]},
            'instances[1]: column "calls" is in this row or in the first, and not in both',
        ),
        ({"dataframe_records": {"age": 1}}, "dataframe_records: expected a list of objects"),
        ({"dataframe_records": []}, "dataframe_records: there are no rows; send at least one"),
        ({"dataframe_records": [5]}, "dataframe_records[0]: expected an object, one for each row"),
        ({"inputs": [1, 2]}, 'inputs: a plain list, but the model takes "age", "plan", "calls";'),
        (
            {"inputs": {"age": [1, 2], "plan": ["a"]}},
            'inputs.plan: 1 rows, but "age" has 2',
        ),
        ({"inputs": {"age": [1, None], "plan": ["a"]}}, "inputs.age[1]: expected a number"),
        ({"inputs": {"age": [], "plan": []}}, 'inputs.age: expected "age" [-1], got an empty list'),
        ({"inputs": 5}, "inputs: a plain list, but"),
        ({"inputs": None}, "inputs: a plain list, but"),
        ({}, "body: has no data; send exactly one of dataframe_split, dataframe_records, inst"),
        ({"messages": []}, "body: has no data; send exactly one of"),
        ({"inputs": [], "instances": []}, "body: has instances and inputs; send exactly one of"),
        ({"inputs": [[1, 2]], "params": {"a": 1}}, "params: this model takes none; leave them out"),
        ({"inputs": [[1, 2]], "params": 5}, "params: expected object"),
        ([], "body: expected object"),
        (b"", "the body is empty; send a JSON object"),
        (b'{"inputs": [NaN]}', "the body is not JSON: it holds NaN"),
        (b'{"inputs": "\xff"}', "the body is not valid UTF-8"),
    ],
)
def test_a_refusal_names_row_and_column(body, says):
    assert refused(COLUMNS, body).startswith(says)


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (split(["p"], [1]), 'dataframe_split: expected 2 columns for "x" [-1, 2], got 1'),
        (split([], []), 'dataframe_split: "x" is missing'),
        (split(["p", "q"], [1, 2], [1]), "dataframe_split.data[1]: expected 2 entries as the"),
        (split(["p", "q"], [1, "2"]), "dataframe_split.data[0][1]: expected a number"),
        ({"dataframe_split": {"data": [[1]]}}, "dataframe_split.data[0]: expected 2 entries"),
        ({"dataframe_split": {"data": []}}, "dataframe_split.data: there are no rows"),
        (
            {"dataframe_records": [{"p": 1, "q": 2}, {"p": 1}]},
            'dataframe_records[1]: column "q" is in this row or in the first, and not in both',
        ),
        (
            {"dataframe_records": [{"p": 1, "q": 2}, {"p": 1, "q": None}]},
            'dataframe_records[1], column "q": expected a number that fits 64 bits, got null',
        ),
        ({"dataframe_records": [{"p": 1}]}, "dataframe_records[0]: expected 2 columns for"),
        ({"dataframe_records": [{"x": [1]}]}, 'dataframe_records, column "x"[0]: expected 2'),
        ({"dataframe_records": []}, "dataframe_records: there are no rows; send at least one"),
        ({"inputs": [[1, 2], [3]]}, "inputs[1]: expected 2 entries as the shape says, got 1"),
        ({"inputs": [1, 2]}, "inputs[0]: expected an array, got"),
        ({"inputs": {"p": [1], "q": [2]}}, 'inputs: the model has no "p"; it takes "x"'),
    ],
)
def test_a_matrix_that_does_not_fit_is_named(body, says):
    assert refused(MATRIX, body).startswith(says)


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (b"age,plan\n1,a\nx,b\n", 'csv row 1, column "age": expected a number that fits 64 bits'),
        (b"age,plan\n1,a\n,b\n", 'csv row 1, column "age": expected a number that fits 64 bits'),
        (b"age,plan\nnan,b\n", 'csv row 0, column "age": expected a number that fits 64 bits, got'),
        (b"age,plan\n-inf,b\n", 'csv row 0, column "age": expected a number that fits 64 bits'),
        (b"age,plan,calls\n1,b,2.5\n", 'csv row 0, column "calls": expected an integer from'),
        (b"age,plan,calls\n1,b,3000000000\n", 'csv row 0, column "calls": expected an integer'),
        (b"age,plan\n1,a\n2\n", "csv row 1: expected 2 values, one for each column, got 1"),
        (b"age,zip\n1,a\n", 'csv: the model has no "zip"; it takes "age", "plan", "calls"'),
        (b"age\n1\n", 'csv: "plan" is missing'),
        (b"age,age\n1,1\n", 'csv: column "age" is given twice'),
        (b"age,plan\n", "the body has no rows; send a header line and at least one more"),
        (b"", "the body has no rows; send a header line and at least one more"),
        (b'age,plan\n1,"a', "the body is not CSV: "),
        (b"age,plan\n1,\xff\n", "the body is not valid UTF-8 (byte 11)"),
    ],
)
def test_csv_that_does_not_fit_is_named(body, says):
    assert refused(COLUMNS, body, "text/csv").startswith(says)


def test_csv_can_not_hold_lists():
    contract = Contract(inputs=(Tensor("a", "FP64", (-1, 2)), Tensor("b", "FP64", (-1,))))
    assert refused(contract, b"a,b\n1,2\n", "text/csv").startswith('csv: column "a" is to hold')


@pytest.mark.parametrize(
    "content_type", ["application/vnd.apache.parquet", "text/csv; charset=latin-1", "x"]
)
def test_other_content_is_told_apart(content_type):
    with pytest.raises(UnsupportedContent, match=r"^content-type: .*; send "):
        Scoring(MATRIX).read_request(b"", content_type)


def test_a_server_of_mlflow_s_takes_params():
    scoring = Scoring(Contract(inputs=MATRIX.inputs, outputs=MATRIX.outputs, protocol="mlflow"))
    assert scoring.read_request(b'{"inputs": [[1, 2]], "params": {"a": 1}}')


@pytest.mark.parametrize(
    ("values", "written"),
    [
        ([TensorValues("x", "FP64", (1, 2), [1.0, 2.0])], {"inputs": [[1.0, 2.0]]}),
        ([TensorValues("x", "FP64", (2,), [1.0, 2.0])], {"inputs": [1.0, 2.0]}),
        (
            [TensorValues("x", "FP64", (2, 1), [1.0, 2.0])],
            {"dataframe_split": {"columns": ["x"], "data": [[1.0], [2.0]]}},
        ),
        (
            [
                TensorValues("y", "BYTES", (2, 1), [["a"], ["b"]]),
                TensorValues("x", "FP64", (2,), [1.0, 2.0]),
            ],
            {"dataframe_split": {"columns": ["x", "y"], "data": [[1.0, "a"], [2.0, "b"]]}},
        ),
        (
            [
                TensorValues("x", "FP64", (1, 2), [1.0, 2.0]),
                TensorValues("y", "BYTES", (1,), ["a"]),
            ],
            {"inputs": {"x": [[1.0, 2.0]], "y": ["a"]}},
        ),
        (
            [TensorValues("x", "FP64", (), [1.0]), TensorValues("y", "FP64", (), [2.0])],
            {"inputs": {"x": 1.0, "y": 2.0}},
        ),
        (
            [TensorValues("x", "FP32", (1, 2), Packed("FP32", struct.pack("<2f", 1, 2)))],
            {"inputs": [[1.0, 2.0]]},
        ),
    ],
)
def test_tensors_are_written_as_mlflow_s_models_want_them(values, written):
    names = Contract(inputs=(Tensor("x", "FP64", (-1,)), Tensor("y", "FP64", (-1,))))
    assert json.loads(Scoring(names).write_request(values)) == written


def test_values_that_json_can_not_carry_are_not_sent():
    values = [TensorValues("x", "FP64", (1, 2), Packed("FP64", struct.pack("<2d", 1, math.nan)))]
    with pytest.raises(ContractViolation, match=r'^"x": the value at index 1 is nan, which JSON'):
        Scoring(MATRIX).write_request(values)


# --- answers ----------------------------------------------------------------------------------

PEOPLE = request_of(
    [TensorValues("age", "FP64", (2,), [1, 2]), TensorValues("plan", "BYTES", (2, 1), ["a", "b"])]
)
NUMBERS = request_of([TensorValues("x", "FP64", (2, 2), [1, 2, 3, 4])])


def answer(contract, predictions, request):
    body = json.dumps({"predictions": predictions}).encode()
    return {one.name: one for one in Scoring(contract).read_response(body, request)}


def asking(request, *names):
    message = json.loads(oip._encoder.encode(request))
    return oip.decode_request(
        json.dumps({**message, "outputs": [{"name": name} for name in names]}).encode()
    )


@pytest.mark.parametrize(
    "predictions",
    [
        [{"risk": 0.5, "why": "x"}, {"why": "y", "risk": 1}],
        {"risk": [0.5, 1], "why": ["x", "y"]},
    ],
)
def test_outputs_by_name_are_read(predictions):
    assert plain(answer(COLUMNS, predictions, PEOPLE)) == {
        "risk": ((2,), [0.5, 1.0]),
        "why": ((2, 1), ["x", "y"]),
    }


def test_an_output_that_is_not_asked_for_may_come_along():
    rows = [{"risk": 0.5, "why": "x", "shares": [0, 1]}, {"risk": 1, "why": "y", "shares": [1, 0]}]
    found = answer(COLUMNS, rows, PEOPLE)
    assert plain(found)["shares"] == ((2, 2), [[0.0, 1.0], [1.0, 0.0]])
    assert list(answer(COLUMNS, rows, asking(PEOPLE, "why"))) == ["why"]
    assert list(answer(COLUMNS, rows, asking(PEOPLE, "why", "risk"))) == ["risk", "why"]


@pytest.mark.parametrize(
    ("predictions", "asked", "found"),
    [
        ([1, 2], (), {"label": ((2,), [1, 2])}),
        ([{"label": 1}, {"label": 2}], (), {"label": ((2,), [1, 2])}),
        ([{"0": 1}, {"0": 2}], (), {"label": ((2,), [1, 2])}),
        ({"label": [1, 2]}, (), {"label": ((2,), [1, 2])}),
        ([[0, 1], [1, 0.5]], ("shares",), {"shares": ((2, 2), [[0, 1], [1, 0.5]])}),
        (
            [{"no": 0, "yes": 1}, {"no": 1, "yes": 0.5}],
            ("shares",),
            {"shares": ((2, 2), [[0, 1], [1, 0.5]])},
        ),
        (
            [{"label": 1, "shares": [0, 1]}, {"label": 1, "shares": [0, 1]}],
            ("shares",),
            {"shares": ((2, 2), [[0, 1], [0, 1]])},
        ),
    ],
)
def test_the_one_output_that_is_due_is_read(predictions, asked, found):
    request = asking(NUMBERS, *asked) if asked else NUMBERS
    assert plain(answer(MATRIX, predictions, request)) == found


def test_a_scalar_is_the_output_of_a_scalar_contract():
    request = request_of([TensorValues("words", "INT64", (1, 2), [1, 2])])
    assert plain(answer(OTHER, 5, asking(request, "cost"))) == {"cost": ((), [5.0])}


@pytest.mark.parametrize(
    ("contract", "predictions", "asked", "says"),
    [
        (MATRIX, [1], (), "predictions: the request has 2 rows, the answer 1"),
        (MATRIX, [1, 2.5], (), "predictions[1]: expected an integer"),
        (MATRIX, [1, None], (), "predictions[1]: expected an integer"),
        (MATRIX, [[1], [2]], (), "predictions[0]: expected an integer"),
        (MATRIX, [], (), 'predictions: expected "label" [-1], got an empty list'),
        (MATRIX, "no", (), "predictions: expected an array, got a string"),
        (MATRIX, [{"a": 1}, {"b": 1}], (), "predictions[1]: its columns are not those of the"),
        (MATRIX, [{"a": 1, "b": 1}], (), 'predictions[0]: the model has no "a"; it returns'),
        (MATRIX, [{"shares": [0, 1]}] * 2, (), 'predictions: "label" is missing'),
        (MATRIX, {"shares": [[0, 1]] * 2}, (), 'predictions: "label" is missing'),
        (MATRIX, {"zip": [1]}, (), 'predictions: the model has no "zip"; it returns'),
        (COLUMNS, [{"risk": 1, "why": "x"}, 5], (), "predictions[1]: expected an object"),
        (MATRIX, [{}], (), 'predictions: "label" is missing'),
        (MATRIX, [[0, 1], [1]], ("shares",), "predictions[1]: expected 2 entries"),
        (COLUMNS, [1, 2], (), "predictions: a plain list, but the model returns"),
        (COLUMNS, [{"risk": 1}] * 2, (), 'predictions: "why" is missing'),
        (COLUMNS, [{"risk": 1, "why": 1}] * 2, (), 'predictions[0], column "why": expected a stri'),
    ],
)  # fmt: skip
def test_an_answer_against_the_contract_is_named(contract, predictions, asked, says):
    request = NUMBERS if contract is MATRIX else PEOPLE
    with pytest.raises(InvalidMessage) as caught:
        answer(contract, predictions, asking(request, *asked) if asked else request)
    assert str(caught.value).startswith(says)


@pytest.mark.parametrize("body", [b"", b"[]", b"{}", b"<html>", b'{"predictions": [NaN]}'])
def test_an_answer_that_is_none_is_malformed(body):
    with pytest.raises(MalformedMessage):
        Scoring(MATRIX).read_response(body, NUMBERS)


@pytest.mark.parametrize(
    ("outputs", "written"),
    [
        ([TensorValues("a", "INT64", (2,), (1, 2))], [1, 2]),
        ([TensorValues("a", "FP32", (2, 2), (1.0, 2.0, 3.0, 4.0))], [[1.0, 2.0], [3.0, 4.0]]),
        ([TensorValues("a", "FP32", (2, 1), [[1.0], [2.0]])], [[1.0], [2.0]]),
        ([TensorValues("a", "FP32", (), [1.0])], 1.0),
        ([TensorValues("a", "INT8", (2,), Packed("INT8", b"\1\2"))], [1, 2]),
        (
            [
                TensorValues("a", "FP32", (2, 1), [1, 2]),
                TensorValues("b", "FP32", (2, 2), range(4)),
            ],
            [{"a": 1, "b": [0, 1]}, {"a": 2, "b": [2, 3]}],
        ),
        (
            [TensorValues("a", "FP32", (2,), [1, 2]), TensorValues("b", "FP32", (1,), [5])],
            {"a": [1, 2], "b": [5]},
        ),
        (
            [TensorValues("a", "FP32", (2,), [1, 2]), TensorValues("b", "FP32", (), [5])],
            {"a": [1, 2], "b": 5},
        ),
    ],
)
def test_answers_are_written_as_mlflow_does(outputs, written):
    outputs = [
        one if not isinstance(one.data, range) else TensorValues(
            one.name, one.datatype, one.shape, list(one.data)
        )
        for one in outputs
    ]  # fmt: skip
    assert json.loads(Scoring(MATRIX).write_response(outputs)) == {"predictions": written}


# --- any message ------------------------------------------------------------------------------

_ELEMENTS = {
    "BOOL": st.booleans(),
    "BYTES": st.text(max_size=5),
    "FP64": st.floats(allow_nan=False, allow_infinity=False),
    "INT64": st.integers(-(2**63), 2**63 - 1),
    "UINT8": st.integers(0, 255),
}
_NAMES = st.text(max_size=8)


@st.composite
def tables(draw):
    rows = draw(st.integers(1, 3))
    names = draw(st.lists(_NAMES, min_size=1, max_size=4, unique=True))
    values = []
    for name in names:
        datatype = draw(st.sampled_from(sorted(_ELEMENTS)))
        shape = (rows, *draw(st.sampled_from([(), (1,), (2,), (2, 2)])))
        size = math.prod(shape)
        data = draw(st.lists(_ELEMENTS[datatype], min_size=size, max_size=size))
        values.append(TensorValues(name, datatype, shape, data))
    return values


def _flat(values):
    return [(one.name, one.datatype, one.shape, flattened(one.data)) for one in values]


@given(tables())
def test_any_tensors_go_through_scoring_and_come_back_the_same(values):
    described = tuple(Tensor(one.name, one.datatype, (-1, *one.shape[1:])) for one in values)
    scoring = Scoring(Contract(inputs=described, outputs=described))
    body = scoring.write_request(values)
    assert _flat(scoring.read_request(body)) == _flat(values)
    outputs = scoring.read_response(scoring.write_response(values), request_of(values))
    assert _flat(outputs) == _flat(values)
    as_records = json.dumps(
        {"dataframe_records": json.loads(scoring.write_response(values))["predictions"]}
    )
    if len(values) > 1:
        assert _flat(scoring.read_request(as_records.encode())) == _flat(values)


def tried(contract, body, content_type="application/json"):
    """Reads a request and an answer; anything raised but a refusal is a fault."""
    scoring = Scoring(contract)
    request = NUMBERS if contract is MATRIX else PEOPLE
    try:
        values = scoring.read_request(body, content_type)
    except InvalidMessage:
        pass
    else:
        oip.ContractChecker(contract).check_request(request_of(values))
    try:
        outputs = scoring.read_response(body, request)
    except InvalidMessage:
        pass
    else:
        answer = oip.decode_response(oip.encode_response(outputs, model_name="m"))
        oip.ContractChecker(contract).check_response(answer, request)


_CONTRACTS = st.sampled_from([COLUMNS, MATRIX, OTHER])
_LEAVES = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3) | st.just("x")
)
_KEYS = st.sampled_from(
    ["age", "plan", "calls", "x", "words", "limit", "label", "risk", "why", "shares", "p", "q"]
)
_JSON = st.recursive(
    _LEAVES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_KEYS, inner, max_size=3),
    max_leaves=20,
)


@given(_CONTRACTS, st.binary(max_size=100), st.sampled_from(["application/json", "text/csv", "x"]))
def test_no_bytes_raise_anything_but_a_refusal(contract, body, content_type):
    tried(contract, body, content_type)


@given(
    _CONTRACTS,
    st.dictionaries(
        st.sampled_from(
            ["dataframe_records", "instances", "inputs", "params", "predictions", "dataframe_split"]
        ),
        _JSON | st.fixed_dictionaries({"data": _JSON, "columns": st.lists(_KEYS, max_size=3)}),
        max_size=2,
    ),
)
def test_no_json_raises_anything_but_a_refusal(contract, message):
    tried(contract, json.dumps(message).encode())


@given(
    _CONTRACTS,
    st.lists(_KEYS, max_size=3),
    st.lists(
        st.lists(st.text(max_size=4) | st.integers().map(str) | st.floats().map(str), max_size=3),
        max_size=3,
    ),
)
def test_no_csv_raises_anything_but_a_refusal(contract, columns, rows):
    text = "\n".join(",".join(row) for row in [columns, *rows])
    tried(contract, text.encode("utf-8", "surrogatepass"), "text/csv")
