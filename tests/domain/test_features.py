"""The numbers in which drift is looked for."""

from __future__ import annotations

import math
from typing import Any

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from shipworthy.domain.features import COLUMNS, features_of_tensors, features_of_text
from shipworthy.protocols.oip import TensorValues
from shipworthy.protocols.packed import Packed, pack


def tensor(name: str, shape: tuple[int, ...], data: Any, datatype: Any = "FP64") -> TensorValues:
    return TensorValues(name, datatype, shape, data)


def test_of_one_row_each_column_is_its_value():
    found = features_of_tensors(
        [tensor("features", (1, 3), [[5.5, 3, True]]), tensor("age", (1,), [41])],
        [tensor("label", (1, 1), ["setosa"], "BYTES")],
    )
    assert found == {
        "rows": 1,
        "input.features[0]": 5.5,
        "input.features[1]": 3.0,
        "input.features[2]": 1.0,
        "input.age": 41.0,
        "output.label": "setosa",
    }


def test_of_a_batch_they_are_means_flat_or_nested():
    expected = {"rows": 2, "input.x[0]": 2.0, "input.x[1]": 3.0, "output.y": 0.5}
    outputs = [tensor("y", (2,), [0, 1])]
    assert features_of_tensors([tensor("x", (2, 2), [[1, 2], [3, 4]])], outputs) == expected
    assert features_of_tensors([tensor("x", (2, 2), [1, 2, 3, 4])], outputs) == expected


def test_more_dimensions_are_columns_in_row_major_order():
    found = features_of_tensors([tensor("x", (1, 2, 2), [[[1, 2], [3, 4]]])])
    assert [found[f"input.x[{at}]"] for at in range(4)] == [1, 2, 3, 4]


def test_columns_beyond_the_first_are_left_out_over_all_tensors():
    found = features_of_tensors(
        [tensor("a", (1, 30), [0.5] * 30), tensor("b", (1, 30), [0.5] * 30)],
        [tensor("c", (1, 40), [0.5] * 40)],
    )
    assert len(found) == 1 + 2 * COLUMNS
    assert "input.b[1]" in found
    assert "input.b[2]" not in found


def test_what_is_no_finite_number_and_no_short_word_is_left_out():
    odd = [math.nan, math.inf, None, "x" * 33, "", 1.0]
    found = features_of_tensors([tensor("x", (1, 6), odd)])
    assert found == {"rows": 1, "input.x[4]": "", "input.x[5]": 1.0}
    found = features_of_tensors([tensor("x", (6,), [math.nan, None, math.inf, 1, 2, 3])])
    assert found == {"rows": 6, "input.x": 2.0}
    found = features_of_tensors([tensor("x", (4,), [1.0, math.nan, None, 3.0])])
    assert found == {"rows": 4, "input.x": 2.0}


def test_words_of_batches_and_empty_batches_have_no_mean():
    assert features_of_tensors([tensor("x", (2,), ["a", "b"], "BYTES")]) == {"rows": 2}
    assert features_of_tensors([tensor("x", (0, 3), [])]) == {"rows": 0}
    assert features_of_tensors([]) == {}


def test_values_in_binary_are_looked_into_while_they_are_few():
    few = Packed("FP32", pack("FP32", [1.5, 2.5]))
    assert features_of_tensors([tensor("x", (1, 2), few, "FP32")])["input.x[1]"] == 2.5
    many = Packed("FP32", bytes(4 * 70_000))
    assert features_of_tensors([tensor("x", (70_000, 1), many, "FP32")]) == {"rows": 70_000}


def test_of_language_models():
    found = features_of_text(
        messages=2, input_bytes=10, output_bytes=20, tools=1, temperature=0.5, finish="stop"
    )
    assert found == {
        "messages": 2, "input_bytes": 10, "output_bytes": 20, "tools": 1, "temperature": 0.5,
        "finish": "stop",
    }  # fmt: skip
    found = features_of_text(
        messages=1, input_bytes=0, output_bytes=0, temperature=math.nan, finish="x" * 33
    )
    assert found == {"messages": 1, "input_bytes": 0, "output_bytes": 0, "tools": 0}


anything = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=40)


@given(st.lists(anything, max_size=12), st.sampled_from([(1, 12), (12,), (4, 3), (2, 2, 3), ()]))
def test_any_data_gives_what_json_can_carry(data: list[Any], shape: tuple[int, ...]):
    found = features_of_tensors([tensor("x", shape, data)], [tensor("y", shape, [data])])
    assert msgspec.json.decode(msgspec.json.encode(found), type=dict[str, float | str]) == found
