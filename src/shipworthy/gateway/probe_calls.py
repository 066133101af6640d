"""The calls that a release is looked at with through the gateway, and which answers are right."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, Final, Protocol

import msgspec

from shipworthy.domain.contract import ANY, OPERATIONS, Contract, Operation, Tensor
from shipworthy.gateway.needs import HttpAnswer
from shipworthy.protocols import oip, questions
from shipworthy.protocols.events import EventSplitter
from shipworthy.protocols.openai import StreamReader, read_answer

_MAX_EVENT: Final = 16 * 1024 * 1024


class Asking(msgspec.Struct, frozen=True):
    """One call: what it is, for people, and what is sent where at the gateway."""

    name: str
    path: str
    body: bytes
    stream: bool = False


class Calls(Protocol):
    """What a contract allows and forbids, in the protocol of its clients."""

    @property
    def sample(self) -> Asking:
        """A call that the contract allows."""
        ...

    def allowed(self) -> Iterable[Asking]:
        """The sample, and calls at the edge of what is allowed; InvalidMessage if it is not."""
        ...

    def forbidden(self) -> Iterable[Asking]:
        """Calls that the contract forbids, each in one way only."""
        ...

    def problem(self, asked: Asking, answer: HttpAnswer) -> str:
        """Why an answer with status 200 is no right one; empty when it is."""
        ...

    def tells(self, answer: HttpAnswer) -> bool:
        """Whether there is something of the model in it."""
        ...


def calls_for(plan: str, contract: Contract, sample: bytes) -> Calls:
    """The calls to look at a release with, which clients call by the name of its plan."""
    if contract.tensors:
        return _TensorCalls(plan, contract, sample)
    return _LanguageCalls(plan, contract, sample)


def said(answer: HttpAnswer) -> str:
    """An error's text in whichever shape; empty for an answer, or when there is none."""
    error = _json(answer).get("error")
    if isinstance(error, dict):
        error = msgspec.convert(error, dict[str, Any]).get("message")
    return error[:300] if isinstance(error, str) else ""


def _json(answer: HttpAnswer) -> dict[str, Any]:
    try:
        return msgspec.json.decode(answer.body, type=dict[str, Any])
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return {}


# --- tensors ----------------------------------------------------------------------------------


class _TensorCalls:
    """In the Open Inference Protocol, which the gateway translates for a server of MLflow's."""

    def __init__(self, plan: str, contract: Contract, sample: bytes) -> None:
        self._path = f"/v2/models/{plan}/infer"
        self._contract = contract
        self._checker = oip.ContractChecker(contract)
        self.sample = Asking("the sample", self._path, sample)

    def allowed(self) -> Iterable[Asking]:
        """See `Calls`."""
        for name, body in self._bodies():
            yield Asking(name, self._path, body)

    def _bodies(self) -> Iterable[tuple[str, bytes]]:
        sample = self.sample.body
        values = self._checker.check_request(oip.decode_request(sample))
        declared = {tensor.name: tensor for tensor in self._contract.inputs}
        yield "the sample", sample
        batched = all(_batched(declared[value.name]) for value in values)
        if batched and values:
            yield "one row", oip.encode_request(_rows(value, 1) for value in values)
            several = 2 * values[0].shape[0]
            yield f"{several} rows", oip.encode_request(_rows(value, several) for value in values)
        required = [value for value in values if not declared[value.name].optional]
        yield "required inputs alone", oip.encode_request(required)
        output = self._contract.outputs[0].name
        yield "one output", oip.encode_request(values, outputs=[output])
        yield "all zero or empty", oip.encode_request(_filled(value, _ZERO) for value in values)

    def forbidden(self) -> Iterable[Asking]:
        """See `Calls`."""
        sample = self.sample.body
        bodies = {
            "an empty body": b"",
            "half a body": sample[: len(sample) // 2],
            "no JSON": b"features=1,2,3",
            "a list": b"[]",
            "no inputs": b'{"inputs": []}',
            "invalid UTF-8": b'{"id": "\xff", ' + sample.lstrip()[1:],
            **{name: _changed(sample, change) for name, change in _CHANGES.items()},
            "an unknown output": _with(sample, outputs=[{"name": "no-such-output"}]),
            "not a number": _changed(sample, {"data": ["@"]}).replace(b'"@"', b"NaN"),
        }
        for name, body in bodies.items():
            yield Asking(name, self._path, body)

    def problem(self, asked: Asking, answer: HttpAnswer) -> str:
        """See `Calls`."""
        try:
            response = oip.decode_response(answer.body)
            self._checker.check_response(response, oip.decode_request(asked.body))
        except oip.InvalidMessage as error:
            return str(error)
        return ""

    def tells(self, answer: HttpAnswer) -> bool:
        """See `Calls`."""
        return "outputs" in _json(answer)


_CHANGES: Final[dict[str, dict[str, Any]]] = {
    "an unknown input": {"name": "no-such-input"},
    "an unknown datatype": {"datatype": "FP7"},
    "a shape that is no list": {"shape": "wide"},
    "a shape of another rank": {"shape": [1] * 9},
    "a negative shape": {"shape": [-1]},
    "no values": {"data": []},
    "values that are no list": {"data": 7},
    "a null among the values": {"data": [None]},
    "an object among the values": {"data": [{}]},
}
_ZERO: Final = {"BYTES": "", "BOOL": False}


def _with(sample: bytes, **changes: Any) -> bytes:
    message: dict[str, Any] = msgspec.json.decode(sample)
    return msgspec.json.encode({**message, **changes})


def _changed(sample: bytes, change: dict[str, Any]) -> bytes:
    """The sample with something else in its first input."""
    message: dict[str, Any] = msgspec.json.decode(sample)
    first, *others = message["inputs"]
    return msgspec.json.encode({**message, "inputs": [{**first, **change}, *others]})


def _batched(tensor: Tensor) -> bool:
    return bool(tensor.shape) and tensor.shape[0] == ANY


def _rows(values: oip.TensorValues, count: int) -> oip.TensorValues:
    """So many rows, repeating those that are there."""
    flat = _flat(values)
    size = math.prod(values.shape[1:])
    rows = [flat[at : at + size] for at in range(0, len(flat), size)]
    data = [value for number in range(count) for value in rows[number % len(rows)]]
    return oip.TensorValues(values.name, values.datatype, (count, *values.shape[1:]), data)


def _filled(values: oip.TensorValues, by_type: dict[str, Any]) -> oip.TensorValues:
    data = [by_type.get(values.datatype, 0)] * math.prod(values.shape)
    return oip.TensorValues(values.name, values.datatype, values.shape, data)


def _flat(values: oip.TensorValues) -> list[Any]:
    flat: list[Any] = values.data
    while flat and isinstance(flat[0], list):
        flat = [value for row in flat for value in row]
    return flat


# --- language models --------------------------------------------------------------------------


class _LanguageCalls:
    """In OpenAI's protocol. What a model says is not judged here, only that it says something."""

    def __init__(self, plan: str, contract: Contract, sample: bytes) -> None:
        self._plan = plan
        self._operations = contract.operations or OPERATIONS
        self._operation: Operation = questions.operation_of(sample)
        self._sample = sample
        self.sample = self._asking("the sample", self._operation, sample)

    def _asking(
        self, name: str, operation: Operation, body: bytes, *, stream: bool = False
    ) -> Asking:
        changes = {"stream": True} if stream else {}
        sent = questions.addressed(body, self._plan, **changes)
        return Asking(name, _door(operation), sent, stream)

    def allowed(self) -> Iterable[Asking]:
        """See `Calls`: each operation that the contract names, all where it names none."""
        for operation in self._operations:
            own = operation == self._operation
            body = self._sample if own else questions.plain_request(operation)
            name = "the sample" if own else f"plain {operation}"
            yield self._asking(name, operation, body)
            if operation != "embeddings":
                yield self._asking(f"{name}, streamed", operation, body, stream=True)

    def forbidden(self) -> Iterable[Asking]:
        """See `Calls`."""
        operation = self._operation
        path, sample = _door(operation), self.sample.body
        for other in OPERATIONS:
            if other not in self._operations:
                yield self._asking(f"{other}", other, questions.plain_request(other))
        asked = next(name for name in ("messages", "prompt", "input") if name in _fields(sample))
        bodies = {
            "an empty body": b"",
            "half a body": sample[: len(sample) // 2],
            "no JSON": b"messages=hello",
            "a list": b"[]",
            "invalid UTF-8": b'{"user": "\xff", ' + sample.lstrip()[1:],
            f"no {asked}": _without(sample, asked),
            f"{asked} that is a number": _with(sample, **{asked: 7}),
            "a stream that is a word": _with(sample, stream="yes"),
            "a number of answers that is a word": _with(sample, n="two"),
        }
        for name, body in bodies.items():
            yield Asking(name, path, body)

    def problem(self, asked: Asking, answer: HttpAnswer) -> str:
        """See `Calls`."""
        operation: Operation = next(each for each in OPERATIONS if _door(each) == asked.path)
        if asked.stream:
            return _stream_problem(operation, answer.body)
        return read_answer(operation, answer.body).problem

    def tells(self, answer: HttpAnswer) -> bool:
        """See `Calls`."""
        return bool(_json(answer).keys() & {"choices", "data"}) or b'"choices"' in answer.body


def _door(operation: Operation) -> str:
    return f"/v1{questions.PATHS[operation]}"


def _fields(body: bytes) -> dict[str, Any]:
    return msgspec.json.decode(body, type=dict[str, Any])


def _without(sample: bytes, name: str) -> bytes:
    return msgspec.json.encode({each: v for each, v in _fields(sample).items() if each != name})


def _stream_problem(operation: Operation, content: bytes) -> str:
    reader = StreamReader(operation)
    for event in EventSplitter(_MAX_EVENT).feed(content):
        reader.see(event)
        if reader.error:
            return f"an event says {reader.error}"
    if reader.broken_off:
        return "the stream ends before it is over"
    return "" if reader.content_events or reader.finish else "the stream says nothing"
