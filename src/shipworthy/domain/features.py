"""The numbers and words of a request in which drift is looked for, taken once while it passes.

They are few and small, so they are kept for every request, whether its bodies are or not. Of
tensors these are the columns, by a name that stays the same for as long as the contract does:

- `input.age`: a tensor with one value for each row;
- `input.features[3]`: a column of a tensor with several; of one with more dimensions in row-major
  order;
- `output.label`: the same of the answer;
- `rows`: how many rows there were.

Of one row they are its values, of a batch the means. Words are kept where they are short and of one
row only. What has no value, or one that is no finite number, is left out. Of a language model they
are `messages`, `tools`, `temperature`, `finish`, `input_bytes` and `output_bytes`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import lru_cache
from itertools import chain
from math import isfinite
from typing import Any, Protocol, cast

COLUMNS = 32
"""How many columns are kept, of all inputs together and of all outputs together."""
LONGEST_WORD = 32
_ROWS = 256  # of a batch, those that its means are taken of
_VALUES = 65_536  # in a tensor that is not a list, beyond which it is not turned into one

Features = dict[str, float | str]


class TensorLike(Protocol):
    """A tensor whose `data` is a list, flat or nested to the shape's depth, or has a `tolist()`."""

    @property
    def name(self) -> str: ...  # noqa: D102  # as in the protocol
    @property
    def shape(self) -> Sequence[int]: ...  # noqa: D102  # the first dimension is the batch
    @property
    def data(self) -> Any: ...  # noqa: D102


def features_of_tensors(
    inputs: Iterable[TensorLike], outputs: Iterable[TensorLike] = (), limit: int = COLUMNS
) -> Features:
    """The features of a request and its answer, which may be none."""
    found: Features = {}
    rows = _add(found, "input", inputs, limit)
    if rows is not None:
        found["rows"] = rows
    _add(found, "output", outputs, limit)
    return found


def features_of_text(
    *,
    messages: int,
    input_bytes: int,
    output_bytes: int,
    tools: int = 0,
    temperature: float | None = None,
    finish: str = "",
) -> Features:
    """The features of a request for a language model and its answer.

    `messages` counts them (prompts and inputs count as one each), `tools` those that were offered.
    """
    found: Features = {
        "messages": messages,
        "input_bytes": input_bytes,
        "output_bytes": output_bytes,
        "tools": tools,
    }
    if temperature is not None and isfinite(temperature):
        found["temperature"] = temperature
    if 0 < len(finish) <= LONGEST_WORD:
        found["finish"] = finish
    return found


def _add(found: Features, side: str, tensors: Iterable[TensorLike], room: int) -> int | None:
    """Add the columns of these tensors; how many rows the first has."""
    rows: int | None = None
    for tensor in tensors:
        count = tensor.shape[0] if tensor.shape else 1
        rows = count if rows is None else rows
        columns = _columns_of(tensor.shape)
        kept = min(columns, room)
        if kept < 1 or count < 1:
            continue
        room -= kept
        names = _names(side, tensor.name, columns, kept)
        values = _flat(tensor.data, columns, count)
        if count == 1:
            for name, value in zip(names, values, strict=False):
                _add_value(found, name, value)
        else:
            for at, name in enumerate(names):
                _add_value(found, name, _mean(values[at::columns]))
    return rows


def _columns_of(shape: Sequence[int]) -> int:
    columns = 1
    for size in shape[1:]:
        columns *= size
    return columns


@lru_cache(maxsize=1024)
def _names(side: str, name: str, columns: int, kept: int) -> tuple[str, ...]:
    if columns == 1:
        return (f"{side}.{name}",)
    return tuple(f"{side}.{name}[{at}]" for at in range(kept))


def _flat(data: Any, columns: int, rows: int) -> Sequence[Any]:
    """The values of the first rows, row after row; none where getting at them costs too much."""
    if not isinstance(data, list):
        if rows * columns > _VALUES:
            return ()
        data = data.tolist() if hasattr(data, "tolist") else list(data)
    values = cast("list[Any]", data)
    if values and isinstance(values[0], list):
        values = values[:_ROWS]
        while values and isinstance(values[0], list):
            values = list(chain.from_iterable(cast("list[list[Any]]", values)))
    return values[: columns * _ROWS] if len(values) > columns * _ROWS else values


def _add_value(found: Features, name: str, value: Any) -> None:
    if isinstance(value, str):
        if len(value) <= LONGEST_WORD:
            found[name] = value
    elif isinstance(value, (float, int)) and isfinite(value):
        found[name] = float(value)


def _mean(values: Sequence[Any]) -> float | None:
    """The mean of what is a finite number; None where nothing is."""
    try:
        total = sum(values)
    except TypeError:  # some have no value, or all are words
        total = float("nan")
    if isfinite(total):
        return total / len(values) if values else None
    numbers = [each for each in values if isinstance(each, (float, int)) and isfinite(each)]
    return sum(numbers) / len(numbers) if numbers else None
