import json

import pytest

from shipworthy.errors import RuntimeFailed, UsageError
from shipworthy.protocols.oip import TensorValues
from shipworthy.runtimes.samples import Sample, inputs_from

ROWS = [("a", "b"), (1.0, "x"), (2.5, "y")]


def read(tmp_path, name: str, text: str) -> Sample:
    (tmp_path / name).write_text(text)
    return Sample.read(tmp_path / name)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("t.csv", "a,b\n1,x\n2.5,y\n"),
        ("t.csv", "\ufeffa;b\r\n1;x\r\n2.5;y\r\n"),
        ("t.tsv", "a\tb\n1\tx\n2.5\ty\n"),
        ("t.jsonl", '{"a": 1, "b": "x"}\n\n{"b": "y", "a": 2.5}\n'),
        ("t.json", '[{"a": 1, "b": "x"}, {"a": 2.5, "b": "y"}]'),
        ("t.json", '{"columns": ["a", "b"], "data": [[1, "x"], [2.5, "y"]]}'),
        ("t.json", '{"dataframe_split": {"columns": ["a", "b"], "data": [[1, "x"], [2.5, "y"]]}}'),
    ],
)
def test_the_same_rows_in_any_format(tmp_path, name, text):
    takes = {"columns": ["b", "a"], "texts": [], "chooses": False}
    found = inputs_from(read(tmp_path, name, text), takes, rows=8)
    assert found.tensors == [
        TensorValues("b", "BYTES", (2, 1), ["x", "y"]),
        TensorValues("a", "FP64", (2, 1), [1.0, 2.5]),
    ]
    assert found.notes == []


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("t.xls", "", "no table"),
        ("t.csv", "", "no rows"),
        ("t.csv", "a,b\n", "no rows"),
        ("t.csv", "a,b\n1\n", "row 2 has 1 cells"),
        ("t.json", "{", "not valid json"),
        ("t.json", "[1, 2]", "lists of one length"),
        ("t.json", "[[1], [1, 2]]", "lists of one length"),
        ("t.json", '{"inputs": [{"name": "x"}]}', "missing required field"),
        (
            "t.json",
            '{"inputs": [{"name": "x", "datatype": "FP8", "shape": [1], "data": [1]}]}',
            "no datatype",
        ),
        (
            "t.json",
            '{"inputs": [{"name": "x", "datatype": "FP64", "shape": [2], "data": [1]}]}',
            "expected 2 values",
        ),
        ("t.jsonl", "{}\n{", "not valid jsonl"),
    ],
)
def test_what_is_wrong_with_a_file(tmp_path, name, text, said):
    with pytest.raises(UsageError, match=said) as caught:
        read(tmp_path, name, text)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(UsageError, match="check the path"):
        Sample.read(tmp_path / "none.csv")


def test_parquet_needs_an_interpreter_that_reads_it(tmp_path):
    import sys
    from pathlib import Path

    (tmp_path / "t.parquet").write_bytes(b"")
    with pytest.raises(UsageError, match="give CSV"):
        Sample.read(tmp_path / "t.parquet")
    with pytest.raises(UsageError, match="install pandas and pyarrow there"):
        Sample.read(tmp_path / "t.parquet", python=Path(sys.executable))


@pytest.mark.parametrize(
    ("cells", "datatype", "values"),
    [
        (["1", "2"], "FP64", [1.0, 2.0]),
        (["1", "x"], "BYTES", ["1", "x"]),
        (["01", "2"], "BYTES", ["01", "2"]),
        (["0", "0.5"], "FP64", [0.0, 0.5]),
        (["True", "false"], "BOOL", [True, False]),
        (["inf", "1"], "BYTES", ["inf", "1"]),
    ],
)
def test_the_type_of_a_csv_column(tmp_path, cells, datatype, values):
    sample = read(tmp_path, "t.csv", "\n".join(["c", *cells]) + "\n")
    (tensor,) = inputs_from(sample, {}, rows=8).tensors
    assert (tensor.datatype, tensor.data) == (datatype, values)


def test_all_rows_tell_the_type_and_the_first_ones_are_sent(tmp_path):
    sample = read(tmp_path, "t.csv", "c\n1\n2\nx\n")
    assert inputs_from(sample, {}, rows=2).tensors == [
        TensorValues("c", "BYTES", (2, 1), ["1", "2"])
    ]


def test_rows_with_empty_cells_are_left_out(tmp_path):
    sample = read(tmp_path, "t.csv", "c,d\n1,\n,2\n3,NA\n")
    found = inputs_from(sample, {"columns": ["c"], "texts": [], "chooses": False}, rows=8)
    assert found.tensors[0].data == [1.0, 3.0]
    assert found.notes == ["the model does not take d", "1 rows with empty cells were left out"]
    with pytest.raises(RuntimeFailed, match="at least one complete row"):
        inputs_from(sample, {"columns": ["d", "c"], "texts": [], "chooses": False}, rows=8)


def test_lists_in_cells_are_rows_of_a_tensor(tmp_path):
    sample = read(
        tmp_path, "t.json", json.dumps([{"x": [[1, 2], [3, 4]]}, {"x": [[5, 6], [7, 8]]}])
    )
    (tensor,) = inputs_from(sample, {}, rows=8).tensors
    assert tensor == TensorValues("x", "FP64", (2, 2, 2), [1.0, 2, 3, 4, 5, 6, 7, 8])
    ragged = read(tmp_path, "u.json", json.dumps([{"x": [1, 2]}, {"x": [1]}]))
    with pytest.raises(RuntimeFailed, match="equally long"):
        inputs_from(ragged, {}, rows=8)


@pytest.mark.parametrize(
    ("text", "notes"),
    [
        ("1,2\n3,4\n", []),
        ("p,q\n1,2\n3,4\n", []),
        ("label,p,q\nyes,1,2\nno,3,4\n", ["the model does not take label"]),
    ],
)
def test_a_matrix(tmp_path, text, notes):
    found = inputs_from(read(tmp_path, "t.csv", text), {"features": 2}, rows=8)
    assert found.tensors == [TensorValues("input", "FP64", (2, 2), [1.0, 2.0, 3.0, 4.0])]
    assert found.notes == notes


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("p,q,r\n1,2,3\n", "has 3 columns and the model takes 2"),
        ("p,q\n1,x\n", "column q of t.csv is text"),
    ],
)
def test_a_matrix_that_does_not_fit(tmp_path, text, said):
    with pytest.raises(RuntimeFailed, match=said):
        inputs_from(read(tmp_path, "t.csv", text), {"features": 2}, rows=8)


def test_texts(tmp_path):
    found = inputs_from(
        read(tmp_path, "t.csv", "mail,label\n1,a\nhi,b\n"), {"features": None}, rows=8
    )
    assert found.tensors == [TensorValues("input", "BYTES", (2,), ["1", "hi"])]


def test_declared_tensors_decide_the_type(tmp_path):
    takes = {
        "tensors": [
            {"name": "n", "datatype": "INT64", "shape": [-1]},
            {"name": "s", "datatype": "BYTES", "shape": [-1, 1]},
        ]
    }
    found = inputs_from(read(tmp_path, "t.csv", "s,n\n7,1\n8,2\n"), takes, rows=8)
    assert found.tensors == [
        TensorValues("n", "INT64", (2,), [1, 2]),
        TensorValues("s", "BYTES", (2, 1), ["7", "8"]),
    ]
