"""Sample rows from a file, and the input tensors that a model makes of them.

CSV, TSV, JSON and JSON lines are read here; Parquet by the release's interpreter, if it has pandas.
A JSON file may also be a whole Open Inference Protocol request, for inputs that no table can hold.
"""

from __future__ import annotations

import csv
import json
import math
import subprocess
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, cast, get_args

import msgspec

from shipworthy.domain.contract import Contract, Datatype, Tensor
from shipworthy.errors import RuntimeFailed, UsageError
from shipworthy.protocols import oip
from shipworthy.protocols.oip import TensorValues

MOST_ROWS: Final = 1_000
"""Rows that are read to tell the columns' types."""

LABELS: Final = frozenset({"label", "labels", "target", "class", "y"})
"""Columns that are left out of a table without feature names, when that makes it fit."""

_MISSING: Final = frozenset({"", "NA", "N/A", "NaN", "nan", "null", "NULL", "None"})


@dataclass(frozen=True, kw_only=True)
class Sample:
    """A few rows as a client would send them.

    `columns` is None when the rows have no names. Cells of CSV are text still (`typed` False),
    those of JSON are values. With `tensors` the file was a request and has no rows.
    """

    source: str
    columns: tuple[str, ...] | None = None
    rows: tuple[tuple[Any, ...], ...] = ()
    typed: bool = True
    tensors: tuple[TensorValues, ...] = ()

    @classmethod
    def read(cls, path: Path, *, python: Path | None = None) -> Sample:
        """Read a file by its suffix; UsageError says what is wrong with it.

        `python` is the interpreter that reads Parquet.
        """
        reader = _READERS.get(path.suffix.lower())
        if reader is None:
            known = ", ".join(sorted(_READERS))
            raise UsageError(f"{path.name} is no table that can be read; give one of {known}")
        try:
            sample = reader(path) if reader is not _read_parquet else _read_parquet(path, python)
        except OSError as error:
            raise UsageError(f"{path} can't be read ({error.strerror}); check the path") from error
        except (ValueError, csv.Error, UnicodeDecodeError) as error:
            raise UsageError(f"{path.name} is not valid {path.suffix[1:]} ({error})") from error
        if not sample.rows and not sample.tensors:
            raise UsageError(f"{path.name} holds no rows; give at least one")
        return sample


# --- reading ----------------------------------------------------------------------------------


def _read_csv(path: Path) -> Sample:
    with path.open(newline="", encoding="utf-8-sig") as file:
        head = file.readline()
        file.seek(0)
        delimiter = max("\t;,", key=head.count)
        lines = [
            row
            for row, _ in zip(
                csv.reader(file, delimiter=delimiter), range(MOST_ROWS + 1), strict=False
            )
            if row
        ]
    if not lines:
        return Sample(source=path.name)
    for number, line in enumerate(lines, start=1):
        if len(line) != len(lines[0]):
            raise UsageError(
                f"{path.name}, row {number} has {len(line)} cells and the first has"
                f" {len(lines[0])}; check its commas and quotes"
            )
    rows = [tuple(line) for line in lines]
    if all(_number(cell) is not None for cell in rows[0]):  # no header
        return Sample(source=path.name, rows=tuple(rows), typed=False)
    columns = tuple(name.strip() for name in rows[0])
    return Sample(source=path.name, columns=columns, rows=tuple(rows[1:]), typed=False)


def _read_json_lines(path: Path) -> Sample:
    with path.open(encoding="utf-8-sig") as file:
        lines = [line for line, _ in zip(file, range(MOST_ROWS), strict=False) if line.strip()]
    return _table(path, [json.loads(line) for line in lines])


def _read_json(path: Path) -> Sample:
    content: Any = json.loads(path.read_text(encoding="utf-8-sig"))
    if isinstance(content, list):
        return _table(path, cast("list[Any]", content)[:MOST_ROWS])
    if "inputs" in content:
        return Sample(source=path.name, tensors=_request(path))
    content = content.get("dataframe_split", content)
    if {"columns", "data"} <= content.keys():
        rows = tuple(tuple(row) for row in content["data"][:MOST_ROWS])
        return Sample(source=path.name, columns=tuple(map(str, content["columns"])), rows=rows)
    return _table(path, [content])


def _request(path: Path) -> tuple[TensorValues, ...]:
    """The inputs of a whole request, checked against what they say of themselves."""
    request = msgspec.structs.replace(oip.decode_request(path.read_bytes()), outputs=None)
    for tensor in request.inputs:
        if tensor.datatype not in get_args(Datatype):
            raise UsageError(f"{path.name}: {tensor.datatype!r} is no datatype; use FP64 or BYTES")
    declared = Contract(
        inputs=tuple(
            Tensor(tensor.name, cast("Datatype", tensor.datatype), tensor.shape)
            for tensor in request.inputs
        ),
        outputs=(),
    )
    return tuple(oip.ContractChecker(declared).check_request(request))


def _table(path: Path, rows: list[Any]) -> Sample:
    if all(isinstance(row, dict) for row in rows):
        columns = tuple(dict.fromkeys(str(name) for row in rows for name in row))
        cells = tuple(tuple(row.get(name) for name in columns) for row in rows)
        return Sample(source=path.name, columns=columns, rows=cells)
    if {_shape(row)[:1] for row in rows} == {_shape(rows[0])[:1]} != {()}:
        return Sample(source=path.name, rows=tuple(tuple(row) for row in rows))
    raise UsageError(f"{path.name} must hold objects, or lists of one length, one for each row")


_PARQUET: Final = """
import sys
import pandas
table = pandas.read_parquet(sys.argv[1]).head(int(sys.argv[2]))
print(table.to_json(orient="split", index=False, default_handler=str))
"""


def _read_parquet(path: Path, python: Path | None = None) -> Sample:
    if python is None:
        raise UsageError(
            f"{path.name} is Parquet, which needs an interpreter with pandas; give CSV"
        )
    reader = subprocess.run(
        [python, "-I", "-c", _PARQUET, str(path.resolve()), str(MOST_ROWS)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    if reader.returncode != 0:
        last = (reader.stderr.strip().splitlines() or ["no message"])[-1]
        raise UsageError(
            f"{path.name} can't be read by {python} ({last});"
            " install pandas and pyarrow there, or give the rows as CSV or JSON"
        )
    content = json.loads(reader.stdout)
    rows = tuple(tuple(row) for row in content["data"])
    return Sample(source=path.name, columns=tuple(content["columns"]), rows=rows)


_READERS: Final[dict[str, Callable[[Path], Sample]]] = {
    ".csv": _read_csv, ".tsv": _read_csv, ".json": _read_json, ".jsonl": _read_json_lines,
    ".ndjson": _read_json_lines, ".parquet": _read_parquet, ".pq": _read_parquet,
}  # fmt: skip


# --- tensors ----------------------------------------------------------------------------------


@dataclass
class Inputs:
    """Tensors for a model, and what a person should know of how they came about."""

    tensors: list[TensorValues]
    notes: list[str] = field(default_factory=list[str])


def inputs_from(sample: Sample, takes: dict[str, Any], *, rows: int) -> Inputs:
    """The first `rows` complete rows as what the model takes (`Engine.describe` in model_host).

    RuntimeFailed names the columns that are missing or do not fit.
    """
    if sample.tensors:
        return Inputs(list(sample.tensors))
    if "columns" in takes:
        return _by_column(sample, takes["columns"], rows, texts=frozenset(takes["texts"]))
    if "features" in takes:
        return _matrix(sample, "input", takes["features"], rows)
    if "tensors" in takes:
        return _declared(sample, takes["tensors"], rows)
    return _by_column(sample, _named(sample), rows)


def _named(sample: Sample) -> Sequence[str]:
    if sample.columns is None:
        raise RuntimeFailed(f"the rows of {sample.source} have no column names; give a header row")
    return sample.columns


def _declared(sample: Sample, tensors: list[dict[str, Any]], rows: int) -> Inputs:
    if len(tensors) == 1 and (sample.columns is None or tensors[0]["name"] not in sample.columns):
        (tensor,) = tensors
        shape = tensor["shape"]
        width = shape[-1] if len(shape) > 1 and shape[-1] > 0 else None
        text = tensor["datatype"] == "BYTES"
        inputs = _matrix(sample, tensor["name"], width or _width(sample), rows, text=text)
    else:
        texts = frozenset(tensor["name"] for tensor in tensors if tensor["datatype"] == "BYTES")
        inputs = _by_column(sample, [tensor["name"] for tensor in tensors], rows, texts=texts)
    declared = {tensor["name"]: tensor for tensor in tensors}
    inputs.tensors = [_as_declared(tensor, declared[tensor.name]) for tensor in inputs.tensors]
    return inputs


def _width(sample: Sample) -> int:
    return len(sample.rows[0])


def _as_declared(tensor: TensorValues, declared: dict[str, Any]) -> TensorValues:
    datatype: Datatype = declared["datatype"]
    convert: Any = str if datatype == "BYTES" else bool if datatype == "BOOL" else float
    if "INT" in datatype:
        convert = round
    flat = len(declared["shape"]) == 1
    shape = (tensor.shape[0],) if flat else tensor.shape
    return TensorValues(tensor.name, datatype, shape, [convert(value) for value in tensor.data])


def _by_column(
    sample: Sample, names: Sequence[str], rows: int, *, texts: frozenset[str] = frozenset()
) -> Inputs:
    """One tensor [n, 1] for each column; [n, …] for a column whose cells are lists."""
    columns = _named(sample) if sample.columns or len(names) != _width(sample) else tuple(names)
    missing = [name for name in names if name not in columns]
    if missing:
        raise RuntimeFailed(
            f"{sample.source} lacks columns that the model takes ({', '.join(missing)});"
            " give a sample with the columns that it was trained on"
        )
    chosen = [columns.index(name) for name in names]
    inputs = Inputs([])
    ignored = [name for name in columns if name not in names]
    if ignored:
        inputs.notes.append(f"the model does not take {', '.join(ignored)}")
    complete = _complete(sample, chosen, inputs.notes)
    for name, position in zip(names, chosen, strict=True):
        datatype, width, values = _column(
            [row[position] for row in complete], typed=sample.typed, text=name in texts
        )
        flat = values[: rows * math.prod(width)]
        inputs.tensors.append(
            TensorValues(name, datatype, (min(rows, len(complete)), *width), flat)
        )
    return inputs


def _matrix(
    sample: Sample, name: str, features: int | None, rows: int, *, text: bool = False
) -> Inputs:
    """One tensor [n, features]; a list of texts [n] when `features` is None."""
    inputs = Inputs([])
    if sample.columns is not None and name in sample.columns:
        inputs = _by_column(
            sample, [name], rows, texts=frozenset([name] if text or not features else [])
        )
        if features is None:
            inputs.tensors = [_flat(inputs.tensors[0])]
        return inputs
    wanted = features or 1
    chosen = _fitting(sample, wanted, inputs.notes)
    complete = _complete(sample, chosen, inputs.notes)
    columns = [
        _column(
            [row[position] for row in complete], typed=sample.typed, text=text or features is None
        )
        for position in chosen
    ]
    for position, (datatype, _, _) in zip(chosen, columns, strict=True):
        if datatype == "BYTES" and not text and features is not None:
            which = sample.columns[position] if sample.columns else f"number {position + 1}"
            raise RuntimeFailed(
                f"column {which} of {sample.source} is text; the model takes numbers"
            )
    datatype: Datatype = "BYTES" if text or features is None else "FP64"
    values = [column[2][row] for row in range(min(rows, len(complete))) for column in columns]
    shape = (min(rows, len(complete)), wanted)
    tensor = TensorValues(
        name, datatype, shape, values if datatype == "BYTES" else list(map(float, values))
    )
    inputs.tensors = [tensor if features is not None else _flat(tensor)]
    return inputs


def _flat(tensor: TensorValues) -> TensorValues:
    return TensorValues(tensor.name, tensor.datatype, tensor.shape[:1], tensor.data)


def _fitting(sample: Sample, wanted: int, notes: list[str]) -> list[int]:
    """Positions of the columns to use of a table whose names the model does not know."""
    every = list(range(_width(sample)))
    if len(every) > wanted and sample.columns is not None:
        labels = [at for at in every if sample.columns[at].lower() in LABELS]
        if len(every) - len(labels) == wanted:
            notes.append(
                f"the model does not take {', '.join(sample.columns[at] for at in labels)}"
            )
            return [at for at in every if at not in labels]
    if len(every) != wanted:
        raise RuntimeFailed(
            f"{sample.source} has {len(every)} columns and the model takes {wanted};"
            " give the columns that it was trained on, in that order and without the label"
        )
    return every


def _complete(sample: Sample, chosen: Iterable[int], notes: list[str]) -> list[tuple[Any, ...]]:
    """The rows with no empty cell among the chosen: the protocol has no word for a missing one."""
    positions = list(chosen)
    complete = [row for row in sample.rows if not any(_empty(row[at]) for at in positions)]
    if not complete:
        raise RuntimeFailed(
            f"every row of {sample.source} has an empty cell in a column that the model takes;"
            " give at least one complete row"
        )
    if len(complete) < len(sample.rows):
        left_out = len(sample.rows) - len(complete)
        notes.append(f"{left_out} rows with empty cells were left out")
    return complete


def _empty(cell: Any) -> bool:
    if isinstance(cell, str):
        return cell.strip() in _MISSING
    return cell is None or (isinstance(cell, float) and not math.isfinite(cell))


def _column(
    cells: list[Any], *, typed: bool, text: bool
) -> tuple[Datatype, tuple[int, ...], list[Any]]:
    """A column's type, the shape of one cell as a tensor's row, and all values in one flat list."""
    if isinstance(cells[0], list):
        return _lists(cells)
    if text:
        return (
            "BYTES",
            (1,),
            [cell if isinstance(cell, str) else json.dumps(cell) for cell in cells],
        )
    values = cells if typed else _parsed(cells)
    if all(isinstance(value, bool) for value in values):
        return "BOOL", (1,), values
    if all(isinstance(value, int | float) for value in values):
        return "FP64", (1,), [float(value) for value in values]
    return "BYTES", (1,), [cell if isinstance(cell, str) else json.dumps(cell) for cell in cells]


def _lists(cells: list[Any]) -> tuple[Datatype, tuple[int, ...], list[Any]]:
    shapes = {_shape(cell) for cell in cells}
    if len(shapes) != 1:
        raise RuntimeFailed("lists of different lengths in one column; make them equally long")
    (shape,) = shapes
    flat: list[Any] = cells
    for _ in shape:
        flat = [value for inner in flat for value in inner]
    if all(isinstance(value, str) for value in flat):
        return "BYTES", shape, flat
    return "FP64", shape, [float(value) for value in flat]


def _shape(cell: Any) -> tuple[int, ...]:
    shape: list[int] = []
    while isinstance(cell, list):
        inner = cast("list[Any]", cell)
        shape.append(len(inner))
        cell = inner[0] if inner else None
    return tuple(shape)


def _parsed(cells: list[str]) -> list[Any]:
    """The cells as truth values or numbers if all of them are, else as they stand."""
    words = {cell.strip().lower() for cell in cells}
    if words <= {"true", "false"}:
        return [cell.strip().lower() == "true" for cell in cells]
    numbers = [_number(cell) for cell in cells]
    return cells if None in numbers else numbers


def _number(cell: str) -> float | None:
    """The number that the text is; None for `007` too, which is a code."""
    text = cell.strip()
    if len(text) > 1 and text[0] == "0" and text[1].isdigit():
        return None
    try:
        number = float(text)
    except ValueError:
        return None
    return number if math.isfinite(number) else None
