"""MLflow's scoring protocol, and what it says in the tensors of a contract.

`POST /invocations` of MLflow's servers (2.0 and later) takes exactly one of `dataframe_split`,
`dataframe_records`, `instances` and `inputs`, or CSV with a header line, and answers
`{"predictions": …}`. `Scoring` reads and writes both sides as the tensors of a contract, so that
whatever speaks the one protocol can be put in front of what speaks the other:

    >>> contract = Contract(
    ...     inputs=(Tensor("age", "FP64", (-1,)), Tensor("plan", "BYTES", (-1,))),
    ...     outputs=(Tensor("risk", "FP64", (-1,)), Tensor("why", "BYTES", (-1,))),
    ... )
    >>> scoring = Scoring(contract)
    >>> body = b'{"dataframe_split": {"columns": ["plan", "age"], "data": [["pro", 31]]}}'
    >>> inputs = scoring.read_request(body, "application/json")
    >>> [(one.name, one.shape, one.data) for one in inputs]
    [('plan', (1,), ['pro']), ('age', (1,), [31.0])]
    >>> scoring.write_request(inputs)
    b'{"dataframe_split":{"columns":["age","plan"],"data":[[31.0,"pro"]]}}'

    >>> request = oip.decode_request(oip.encode_request(inputs))
    >>> answer = b'{"predictions": [{"risk": 0.25, "why": "young"}]}'
    >>> outputs = scoring.read_response(answer, request)
    >>> [(one.name, one.data) for one in outputs]
    [('risk', [0.25]), ('why', ['young'])]
    >>> scoring.write_response(outputs)
    b'{"predictions":[{"risk":0.25,"why":"young"}]}'

Columns are tensors of the same name, or all of them, in their order, the one matrix of a contract
that has no other input. Unlike MLflow's own server, this refuses surplus columns, nulls and
fractions where integers are due, and `params` for a release that has no use for them: MLflow drops
or truncates them in silence. What is refused is named by its row and column.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Final

import msgspec

from shipworthy.domain.contract import ANY, Contract, Tensor
from shipworthy.protocols import oip
from shipworthy.protocols.messages import MalformedMessage, decoded
from shipworthy.protocols.oip import TensorValues
from shipworthy.protocols.packed import Packed, flattened, nested
from shipworthy.protocols.tables import TableReader, begins
from shipworthy.protocols.values import DATA_ERRORS, ContractViolation, quoted

JSON: Final = "application/json"
CSV: Final = "text/csv"

_FORMATS: Final = ("dataframe_split", "dataframe_records", "instances", "inputs")


class UnsupportedContent(MalformedMessage):
    """A body of a type that is not read; MLflow's servers answer 415."""


class _Split(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    data: msgspec.Raw
    columns: list[str | int] | None = None
    index: msgspec.Raw = msgspec.Raw()


class _Request(msgspec.Struct, frozen=True):
    dataframe_split: _Split | None = None
    dataframe_records: msgspec.Raw = msgspec.Raw()
    instances: msgspec.Raw = msgspec.Raw()
    inputs: msgspec.Raw = msgspec.Raw()
    params: dict[str, Any] | None = None


class _Response(msgspec.Struct, frozen=True):
    predictions: msgspec.Raw


class _Error(msgspec.Struct, frozen=True):
    message: str


_requests = msgspec.json.Decoder(_Request)
_responses = msgspec.json.Decoder(_Response)
_errors = msgspec.json.Decoder(_Error)
_objects = msgspec.json.Decoder(dict[str, msgspec.Raw])
_records = msgspec.json.Decoder(list[dict[str, msgspec.Raw]])
_NOTHING: Final = msgspec.Raw()
_encoder = msgspec.json.Encoder()


class Scoring:
    """A contract made ready to read and write many messages of MLflow's scoring protocol."""

    def __init__(self, contract: Contract) -> None:
        self._inputs: Final = {tensor.name: tensor for tensor in contract.inputs}
        self._order: Final = {name: place for place, name in enumerate(self._inputs)}
        self._outputs: Final = {tensor.name: tensor for tensor in contract.outputs}
        self._takes: Final = TableReader(contract.inputs, "takes")
        self._required: Final = [one.name for one in contract.outputs if not one.optional]
        self._returns: Final = TableReader(
            [replace(one, optional=True) for one in contract.outputs], "returns"
        )
        self._single: Final = {
            one.name: TableReader([replace(one, optional=False)], "returns")
            for one in contract.outputs
        }
        self._has_params: Final = contract.protocol == "mlflow"

    # --- requests

    def read_request(self, body: bytes, content_type: str = JSON) -> list[TensorValues]:
        """The inputs that a scoring request gives, as `ContractChecker.check_request` would.

        MalformedMessage when it is none, UnsupportedContent when it is neither JSON nor CSV, and a
        ContractViolation for the first row and column that are at fault.
        """
        if _content(content_type) == CSV:
            return self._takes.text(_text(body))
        message = decoded(_requests, body)
        self._check_params(message.params)
        name = _only_format(message)
        if message.dataframe_split is not None:
            split = message.dataframe_split
            if split.columns is None:
                return self._takes.untitled(name, split.data)
            return self._takes.split(name, [str(one) for one in split.columns], split.data)
        data: msgspec.Raw = getattr(message, name)
        kind = begins(data)
        if name == "dataframe_records" or kind == b"[{":
            return self._takes.records(name, data)
        if kind.startswith(b"{"):
            return self._takes.named(name, _objects.decode(data))
        return self._takes.single(name, data)

    def write_request(self, inputs: Sequence[TensorValues]) -> bytes:
        """These inputs, as they were checked, for a server that speaks scoring.

        Columns go as `dataframe_split`, the one matrix or list as `inputs`, anything else as
        `inputs` by name: so they reach models with and without a signature. Without one, columns
        must be in the order of the contract, which is why they are put into it. ContractViolation
        for a value that JSON can't carry.
        """
        inputs = sorted(inputs, key=lambda one: self._order[one.name])
        if _are_columns(inputs):
            columns = [flattened(_listed(one)) for one in inputs]
            rows = list(zip(*columns, strict=True))
            split = {"columns": [one.name for one in inputs], "data": rows}
            return _encoder.encode({"dataframe_split": split})
        if len(inputs) == 1:
            return _encoder.encode({"inputs": _nested(inputs[0])})
        return _encoder.encode({"inputs": {one.name: _nested(one) for one in inputs}})

    def _check_params(self, params: Mapping[str, Any] | None) -> None:
        if params and not self._has_params:
            raise ContractViolation("params: this model takes none; leave them out")

    # --- answers

    def read_response(self, body: bytes, request: oip.InferenceRequest) -> list[TensorValues]:
        """The outputs that a scoring server answers this request with.

        A list of values is the one output that is due. Records and objects have outputs by name;
        of one that stands alone the name does not matter, as a pandas Series has none of its own.
        MalformedMessage or ContractViolation as for requests.
        """
        data = decoded(_responses, body).predictions
        due = [output.name for output in request.outputs or ()] or self._required
        kind = begins(data)
        if kind.startswith(b"{"):
            found = self._returns.named("predictions", _objects.decode(data))
        elif len(due) == 1:
            if kind == b"[{":
                found = self._one_by_record(due[0], data)
            else:
                found = self._single[due[0]].single("predictions", data)
        elif kind == b"[{":
            found = self._returns.records("predictions", data)
        else:
            found = self._returns.single("predictions", data)
        given = {one.name for one in found}
        for name in due:
            if name not in given:
                raise ContractViolation(f"predictions: {quoted(name)} is missing")
        self._check_rows(found, request)
        return [one for one in found if one.name in due] if request.outputs else found

    def write_response(self, outputs: Sequence[TensorValues]) -> bytes:
        """These outputs as a scoring server's answer.

        One output is a nested list. Several are a record for each row, as of a DataFrame, or an
        object of nested lists when they are not of the same rows. ContractViolation for a value
        that JSON can't carry.
        """
        if len(outputs) == 1:
            return _encoder.encode({"predictions": _nested(outputs[0])})
        names = [one.name for one in outputs]
        if len({one.shape[:1] for one in outputs} - {()}) != 1 or not all(
            one.shape for one in outputs
        ):
            return _encoder.encode({"predictions": {one.name: _nested(one) for one in outputs}})
        columns = [_cells(one) for one in outputs]
        records = [dict(zip(names, row, strict=True)) for row in zip(*columns, strict=True)]
        return _encoder.encode({"predictions": records})

    def _one_by_record(self, name: str, data: msgspec.Raw) -> list[TensorValues]:
        """The one output that is due from records, which a DataFrame or a Series becomes."""
        reader = self._single[name]
        try:
            rows = _records.decode(data)
        except DATA_ERRORS:
            return reader.records("predictions", data)  # which says what is wrong
        columns = rows[0].keys()
        if columns <= self._outputs.keys():
            return self._returns.records("predictions", data)
        if len(columns) > 1:
            return reader.records("predictions", data)
        for index, row in enumerate(rows):
            if row.keys() != columns:
                raise ContractViolation(
                    f"predictions[{index}]: its columns are not those of the first row"
                )
        values = b",".join(bytes(value) for row in rows for value in row.values())
        return reader.single("predictions", msgspec.Raw(b"[" + values + b"]"))

    def _check_rows(self, found: Sequence[TensorValues], request: oip.InferenceRequest) -> None:
        asked = next(
            (one.shape[0] for one in request.inputs if _is_batch(self._inputs.get(one.name))), None
        )
        for one in found:
            if asked is None or not _is_batch(self._outputs.get(one.name)):
                continue
            if one.shape[0] != asked:
                raise ContractViolation(
                    f"predictions: the request has {asked} rows,"
                    f" the answer {one.shape[0]} of {quoted(one.name)}"
                )


# --- documents --------------------------------------------------------------------------------


def error_body(message: str, code: str = "BAD_REQUEST") -> bytes:
    """MLflow's shape of an error."""
    return _encoder.encode({"error_code": code, "message": message})


def error_text(body: bytes) -> str:
    """What an MLflow server says of a failure, without its stack trace; else empty."""
    try:
        return decoded(_errors, body).message
    except MalformedMessage:
        return ""


# --- bodies -----------------------------------------------------------------------------------


def _content(content_type: str) -> str:
    kind, _, rest = content_type.partition(";")
    kind = kind.strip().lower()
    charset = rest.strip().lower().replace('"', "").replace(" ", "")
    if kind not in (JSON, CSV, ""):
        raise UnsupportedContent(
            f"content-type: {quoted(kind)} is not accepted; send {JSON} or {CSV}"
        )
    if charset not in ("", "charset=utf-8", "charset=utf8"):
        raise UnsupportedContent(f"content-type: {quoted(charset)} is not accepted; send UTF-8")
    return kind or JSON


def _text(body: bytes) -> str:
    try:
        return body.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise MalformedMessage(f"the body is not valid UTF-8 (byte {error.start})") from None


def _only_format(message: _Request) -> str:
    given = [
        name
        for name in _FORMATS
        if getattr(message, name) is not None and getattr(message, name) != _NOTHING
    ]
    if len(given) != 1:
        raise MalformedMessage(
            f"body: has {' and '.join(given) or 'no data'};"
            f" send exactly one of {', '.join(_FORMATS)}"
        )
    return given[0]


# --- values -----------------------------------------------------------------------------------


def _is_batch(tensor: Tensor | None) -> bool:
    return tensor is not None and tensor.shape[:1] == (ANY,)


def _are_columns(values: Sequence[TensorValues]) -> bool:
    """Whether these are columns of one table: alone only when declared as one, `[-1, 1]`."""
    if len(values) == 1 and len(values[0].shape) < 2:
        return False
    rows = {one.shape[:1] for one in values}
    return len(rows) == 1 and rows != {()} and all(_is_column(one.shape) for one in values)


def _is_column(shape: Sequence[int]) -> bool:
    return all(size == 1 for size in shape[1:])


def _listed(tensor: TensorValues) -> Any:
    """The values as lists, flat or nested."""
    data = tensor.data
    if isinstance(data, Packed) and (problem := data.json_problem()) is not None:
        raise ContractViolation(
            f"{quoted(tensor.name)}: {problem}, which JSON can't carry; send other values"
        )
    return data.tolist() if hasattr(data, "tolist") else data


def _nested(tensor: TensorValues) -> Any:
    """The values nested as the shape says."""
    data = _listed(tensor)
    if len(tensor.shape) > 1 and data and isinstance(data[0], list):
        return data
    return nested(data, tensor.shape)


def _cells(tensor: TensorValues) -> Sequence[Any]:
    """A value for each row: a scalar, or a list when the row is one."""
    return flattened(_listed(tensor)) if _is_column(tensor.shape) else _nested(tensor)
