"""Rows and columns as the tensors of a contract, and each misfit named by its row and column.

A table is given by its columns and by rows that nobody has looked into. Where the columns are names
of tensors, each becomes that tensor, its cells scalars, or lists when a row of the tensor is one.
Otherwise all columns together become the one matrix that the contract has, in the order in which
they came; for a matrix with names of its own nothing else tells the order.
"""

from __future__ import annotations

import csv
import io
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from types import GenericAlias
from typing import Any, Final, cast

import msgspec

from shipworthy.domain.contract import ANY, Tensor
from shipworthy.protocols.messages import MalformedMessage
from shipworthy.protocols.oip import TensorValues
from shipworthy.protocols.values import (
    DATA_ERRORS,
    ELEMENTS,
    WANTED,
    ContractViolation,
    check_64_bits,
    check_nesting,
    data_problem,
    decoder_of,
    expectation,
    quoted,
)

_generic_rows = msgspec.json.Decoder(list[Any])
_open_records = msgspec.json.Decoder(list[dict[str, msgspec.Raw]])


class TableReader:
    """The tensors of one side of a contract, made ready to be read from many tables.

    `verb` is what the model does with them, in an error: it takes its inputs and returns its
    outputs.
    """

    def __init__(self, tensors: Sequence[Tensor], verb: str) -> None:
        self._tensors: Final = {tensor.name: tensor for tensor in tensors}
        self._verb: Final = verb
        self.required: Final = tuple(tensor.name for tensor in tensors if not tensor.optional)
        only = self._tensors[self.required[0]] if len(self.required) == 1 else None
        self.only: Final = only
        self._matrix: Final = only if only is not None and len(only.shape) == 2 else None
        self._matrix_records = None
        if self._matrix is not None:
            element = ELEMENTS[self._matrix.datatype]
            self._matrix_records = msgspec.json.Decoder(list[dict[str, element]])

    def split(self, field: str, columns: Sequence[str], data: msgspec.Raw) -> list[TensorValues]:
        """Tensors from rows that are lists, all in the order of these columns."""
        named = self._named(field, columns)
        if named is None:
            matrix = cast("Tensor", self._matrix)
            self._check_width(field, matrix, len(columns))
            return [self._rows_as_matrix(f"{field}.data", matrix, data, len(columns))]
        kinds = tuple((tensor.datatype, _depth(tensor)) for tensor in named)
        try:
            rows = _row_decoder(kinds).decode(data)
        except DATA_ERRORS as error:
            raise ContractViolation(_cell_problem(f"{field}.data", error, named, data)) from None
        return self._columns(f"{field}.data", named, list(zip(*rows, strict=True)))

    def untitled(self, field: str, data: msgspec.Raw) -> list[TensorValues]:
        """Tensors from rows that are lists, when nobody says what the columns are."""
        if self._matrix is None:
            raise ContractViolation(
                f"{field}.columns: missing; the model takes {self.listed()} by name"
            )
        return [self._rows_as_matrix(f"{field}.data", self._matrix, data, None)]

    def records(self, field: str, data: msgspec.Raw) -> list[TensorValues]:
        """Tensors from rows that are objects."""
        if self._matrix is not None and self._matrix_records is not None:
            try:
                rows = self._matrix_records.decode(data)
            except DATA_ERRORS as error:
                if not self._names_tensors(data):
                    problem = _record_problem(field, error, self._matrix.datatype, data)
                    raise ContractViolation(problem) from None
            else:
                if not rows or not rows[0].keys() <= self._tensors.keys():
                    return [self._records_as_matrix(field, self._matrix, rows)]
        return self._by_column(field, _open(field, data))

    def named(self, field: str, values: Mapping[str, msgspec.Raw]) -> list[TensorValues]:
        """Tensors from an object of nested lists by name."""
        self._check_names(field, values)
        found = [nested_values(f"{field}.{name}", raw, self._tensors[name])
                 for name, raw in values.items()]  # fmt: skip
        _one_batch(field, found, self._tensors)
        return found

    def single(self, field: str, data: msgspec.Raw) -> list[TensorValues]:
        """The one tensor that the contract requires, from a nested list."""
        if self.only is None:
            raise ContractViolation(
                f"{field}: a plain list, but the model {self._verb} {self.listed()};"
                " give each by its name"
            )
        return [nested_values(field, data, self.only)]

    def text(self, body: str) -> list[TensorValues]:
        """Tensors from CSV with a header line; empty lines count for nothing."""
        try:
            lines: list[list[str]] = list(
                filter(None, csv.reader(io.StringIO(body, newline=""), strict=True))
            )
        except csv.Error as error:
            raise MalformedMessage(f"the body is not CSV: {error}") from None
        if len(lines) < 2:
            raise MalformedMessage("the body has no rows; send a header line and at least one more")
        columns, rows = lines[0], lines[1:]
        named = self._named("csv", columns)
        width = len(columns)
        for index, row in enumerate(rows):
            if len(row) != width:
                raise ContractViolation(
                    f"csv row {index}: expected {width} values, one for each column, got {len(row)}"
                )
        if named is None:
            matrix = cast("Tensor", self._matrix)
            self._check_width("csv", matrix, width)
            cells = _cells(rows, [(name, matrix.datatype) for name in columns])
            return [_whole("csv", matrix, cells, (len(rows), width))]
        for tensor in named:
            if _depth(tensor):
                raise ContractViolation(
                    f"csv: column {quoted(tensor.name)} is to hold lists, which CSV can't;"
                    " send JSON"
                )
        cells = _cells(rows, [(tensor.name, tensor.datatype) for tensor in named])
        return self._columns("csv", named, list(zip(*cells, strict=True)))

    def listed(self) -> str:
        """The tensors' names for an error."""
        return ", ".join(map(quoted, self._tensors)) or "none"

    # --- columns by name

    def _named(self, field: str, columns: Sequence[str]) -> list[Tensor] | None:
        """The tensors that the columns name; None when they are those of the matrix."""
        if len(set(columns)) != len(columns):
            twice = next(name for name in columns if columns.count(name) > 1)
            raise ContractViolation(f"{field}: column {quoted(twice)} is given twice")
        if self._matrix is not None and not self._tensors.keys() >= set(columns):
            return None
        self._check_names(field, columns)
        return [self._tensors[name] for name in columns]

    def _check_names(self, field: str, names: Iterable[str]) -> None:
        for name in names:
            if name not in self._tensors:
                raise ContractViolation(
                    f"{field}: the model has no {quoted(name)}; it {self._verb} {self.listed()}"
                )
        for name in self.required:
            if name not in names:
                raise ContractViolation(f"{field}: {quoted(name)} is missing")

    def _columns(
        self, field: str, tensors: Sequence[Tensor], columns: Sequence[Sequence[Any]]
    ) -> list[TensorValues]:
        if not columns:
            raise ContractViolation(f"{field}: there are no rows; send at least one")
        return [
            _column(f"{field}, column {quoted(tensor.name)}", tensor, list(values))
            for tensor, values in zip(tensors, columns, strict=True)
        ]

    def _by_column(self, field: str, rows: Sequence[dict[str, msgspec.Raw]]) -> list[TensorValues]:
        if not rows:
            raise ContractViolation(f"{field}: there are no rows; send at least one")
        self._check_names(f"{field}[0]", rows[0])
        _check_same_columns(field, rows)
        found: list[TensorValues] = []
        for name in rows[0]:
            tensor = self._tensors[name]
            cells = b"[" + b",".join([row[name] for row in rows]) + b"]"
            try:
                values = decoder_of(tensor.datatype, 1 + _depth(tensor)).decode(cells)
            except DATA_ERRORS as error:
                at = _ROW.search(str(error))
                row, inside = at.groups() if at else ("0", "")
                raise ContractViolation(
                    f"{field}[{row}], column {quoted(name)}{inside}:"
                    f" {expectation(error, tensor.datatype)}"
                ) from None
            found.append(_column(f"{field}, column {quoted(name)}", tensor, values))
        return found

    def _names_tensors(self, data: msgspec.Raw) -> bool:
        try:
            rows = _open_records.decode(data)
        except DATA_ERRORS:
            return False
        return bool(rows) and rows[0].keys() <= self._tensors.keys()

    # --- all columns as one matrix

    def _check_width(self, field: str, matrix: Tensor, width: int) -> None:
        if matrix.shape[1] not in (ANY, width) or not width:
            raise ContractViolation(
                f"{field}: expected {matrix.shape[1] if matrix.shape[1] != ANY else 'some'} columns"
                f" for {quoted(matrix.name)} {list(matrix.shape)}, got {width}"
            )

    def _rows_as_matrix(
        self, field: str, matrix: Tensor, data: msgspec.Raw, width: int | None
    ) -> TensorValues:
        try:
            rows = decoder_of(matrix.datatype, 2).decode(data)
        except DATA_ERRORS as error:
            raise ContractViolation(data_problem(field, error, matrix.datatype)) from None
        if width is None:
            width = len(rows[0]) if rows and matrix.shape[1] == ANY else matrix.shape[1]
        return _whole(field, matrix, rows, (len(rows), width))

    def _records_as_matrix(
        self, field: str, matrix: Tensor, rows: Sequence[dict[str, Any]]
    ) -> TensorValues:
        columns = list(rows[0]) if rows else []
        if rows:
            self._check_width(f"{field}[0]", matrix, len(columns))
        _check_same_columns(field, rows)
        data = [[row[name] for name in columns] for row in rows]
        return _whole(field, matrix, data, (len(rows), len(columns)))


def _check_same_columns(field: str, rows: Sequence[Mapping[str, Any]]) -> None:
    columns = rows[0].keys() if rows else ()
    for index, row in enumerate(rows):
        if row.keys() != columns:
            odd = next(name for one in (row, rows[0]) for name in one
                       if name not in row or name not in rows[0])  # fmt: skip
            raise ContractViolation(
                f"{field}[{index}]: column {quoted(odd)} is in this row or in the first, and not in"
                " both; send the same columns in every row"
            )


def _open(field: str, data: msgspec.Raw) -> list[dict[str, msgspec.Raw]]:
    try:
        return _open_records.decode(data)
    except DATA_ERRORS as error:
        at = _ROW.search(str(error))
        if at is None:
            raise ContractViolation(
                f"{field}: expected a list of objects, one for each row"
            ) from None
        raise ContractViolation(
            f"{field}[{at.group(1)}]: expected an object, one for each row"
        ) from None


# --- reading ----------------------------------------------------------------------------------


def nested_values(field: str, raw: msgspec.Raw, tensor: Tensor) -> TensorValues:
    """A tensor from a nested list, whose sizes say the shape where the contract leaves it open.

    A row of one value need not be a list of its own.
    """
    depth = len(tensor.shape)
    if depth > 1 and not _depth(tensor) and not begins(raw).startswith(b"[["):
        depth = 1
    try:
        values = decoder_of(tensor.datatype, depth).decode(raw)
    except DATA_ERRORS as error:
        if depth:
            raise ContractViolation(data_problem(field, error, tensor.datatype)) from None
        raise ContractViolation(f"{field}: {expectation(error, tensor.datatype)}") from None
    if not depth:
        values = [values]
    check_64_bits(field, values, tensor.datatype)
    return TensorValues(tensor.name, tensor.datatype, _shape(field, values, tensor, depth), values)


def begins(raw: msgspec.Raw) -> bytes:
    """The first two signs of a JSON text, past blanks."""
    text = bytes(raw).lstrip()
    return text[:1] + text[1:].lstrip()[:1]


def _shape(field: str, values: list[Any], tensor: Tensor, depth: int) -> tuple[int, ...]:
    sizes: list[int] = []
    inner: Any = values
    for size in tensor.shape[:depth]:
        sizes.append(len(inner) if size == ANY else size)
        if size == ANY and not inner:
            raise ContractViolation(
                f"{field}: expected {quoted(tensor.name)} {list(tensor.shape)}, got an empty list;"
                " send at least one row"
            )
        inner = inner[0] if inner else ()
    if sizes:
        check_nesting(field, values, tuple(sizes))
    return (*sizes, *tensor.shape[depth:])


def _column(field: str, tensor: Tensor, values: list[Any]) -> TensorValues:
    if not tensor.shape:
        raise ContractViolation(f"{field}: it is a single value and no column; send `inputs`")
    check_64_bits(field, values, tensor.datatype)
    depth = _depth(tensor)
    if depth or tensor.shape[0] not in (ANY, len(values)):
        shape = _shape(field, values, tensor, 1 + depth)
    else:
        shape = (len(values), *tensor.shape[1:])
    return TensorValues(tensor.name, tensor.datatype, shape, values)


def _whole(
    field: str, matrix: Tensor, rows: list[list[Any]], shape: tuple[int, int]
) -> TensorValues:
    if not rows:
        raise ContractViolation(f"{field}: there are no rows; send at least one")
    if matrix.shape[0] not in (ANY, shape[0]):
        raise ContractViolation(f"{field}: expected {matrix.shape[0]} rows, got {shape[0]}")
    if not shape[1]:
        raise ContractViolation(f"{field}[0]: there are no columns; send at least one")
    check_nesting(field, rows, shape)
    check_64_bits(field, rows, matrix.datatype)
    return TensorValues(matrix.name, matrix.datatype, shape, rows)


def _depth(tensor: Tensor) -> int:
    """How deep the lists in a cell are; 0 when a row is one value."""
    row = tensor.shape[1:]
    return 0 if row.count(1) == len(row) else len(row)


def _one_batch(field: str, found: Sequence[TensorValues], tensors: Mapping[str, Tensor]) -> None:
    free = [one for one in found if tensors[one.name].shape[:1] == (ANY,)]
    for one in free[1:]:
        if one.shape[0] != free[0].shape[0]:
            raise ContractViolation(
                f"{field}.{one.name}: {one.shape[0]} rows,"
                f" but {quoted(free[0].name)} has {free[0].shape[0]}"
            )


@lru_cache(maxsize=256)
def _row_decoder(kinds: tuple[tuple[str, int], ...]) -> msgspec.json.Decoder[list[Any]]:
    """Reads rows whose cells are of these types, each nested so deep."""
    cells = tuple(_nested_type(datatype, depth) for datatype, depth in kinds)
    return msgspec.json.Decoder(list[GenericAlias(tuple, cells)])


def _nested_type(datatype: str, depth: int) -> Any:
    kind: Any = ELEMENTS[datatype]
    for _ in range(depth):
        kind = list[kind]
    return kind


# --- CSV --------------------------------------------------------------------------------------

_FLOATS: Final = frozenset({"FP16", "FP32", "FP64"})


def _cells(rows: Sequence[list[str]], columns: Sequence[tuple[str, str]]) -> list[list[Any]]:
    """The texts of rows as values of each column's type; `columns` are names and datatypes."""
    kinds = {datatype for _, datatype in columns}
    if kinds == {"BYTES"}:
        return list(rows)
    texts = [datatype == "BYTES" for _, datatype in columns]
    stripped = [
        [cell if text else cell.strip() for cell, text in zip(row, texts, strict=True)]
        for row in rows
    ]
    if len(kinds) == 1:
        kind: Any = list[ELEMENTS[kinds.pop()]]
    else:
        kind = GenericAlias(tuple, tuple(ELEMENTS[datatype] for _, datatype in columns))
    try:
        values = msgspec.convert(stripped, list[kind], strict=False)
    except msgspec.ValidationError as error:
        at = _CELL.search(str(error))
        row, column = (int(at.group(1)), int(at.group(2))) if at else (0, 0)
    else:
        places = _not_finite(values, [datatype in _FLOATS for _, datatype in columns])
        if places is None:
            return values
        row, column = places
    name, datatype = columns[column]
    raise ContractViolation(
        f"csv row {row}, column {quoted(name)}: expected {WANTED[datatype]},"
        f" got {quoted(rows[row][column])}"
    )


def _not_finite(rows: list[Any], floats: Sequence[bool]) -> tuple[int, int] | None:
    """Where a text was read as NaN or infinity, which no JSON could say."""
    for column, is_float in enumerate(floats):
        if is_float and not all(math.isfinite(row[column]) for row in rows):
            return next(
                (at for at, one in enumerate(rows) if not math.isfinite(one[column]))
            ), column
    return None


# --- words ------------------------------------------------------------------------------------

_CELL = re.compile(r" - at `\$\[(\d+)\]\[(\d+)\](.*)`$", re.DOTALL)
_ROW = re.compile(r" - at `\$\[(\d+)\](.*)`$", re.DOTALL)


def _cell_problem(
    field: str, error: Exception, tensors: Sequence[Tensor], data: msgspec.Raw
) -> str:
    text = str(error)
    cell = _CELL.search(text)
    if cell is not None:
        tensor = tensors[int(cell.group(2))]
        said = expectation(error, tensor.datatype)
        return f"{field}[{cell.group(1)}], column {quoted(tensor.name)}{cell.group(3)}: {said}"
    row = _ROW.search(text)
    if row is None:
        return f"{field}: expected a list of rows"
    index = int(row.group(1))
    try:
        got = _generic_rows.decode(data)[index]
    except DATA_ERRORS:
        got = None
    if not isinstance(got, list):
        return f"{field}[{index}]: expected a list with a value for each column"
    return (
        f"{field}[{index}]: expected {len(tensors)} values, one for each column,"
        f" got {len(cast('list[Any]', got))}"
    )


def _record_problem(field: str, error: Exception, datatype: str, data: msgspec.Raw) -> str:
    """What is wrong with a record of which all values are of one type."""
    rows = _open(field, data)
    at = _ROW.search(str(error))
    where = f"{field}[{at.group(1) if at else 0}]"
    said = expectation(error, datatype)
    for name, value in rows[int(at.group(1)) if at else 0].items():
        try:
            decoder_of(datatype, 0).decode(value)
        except DATA_ERRORS:
            return f"{where}, column {quoted(name)}: {said}"
    return f"{where}: {said}"
