"""The Open Inference Protocol v2 over JSON: what is read, what is written and what is refused.

Both sides use this module: the gateway to check what passes through it, a model server to read
requests and write answers. Tensor data stays raw JSON until a contract says which type to expect,
so a message is parsed once and only as far as needed. Every refusal names the field:
`inputs[0].data: expected 128 values for shape [2, 64], got 127`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from itertools import chain
from typing import Annotated, Any, Final, cast

import msgspec
from msgspec import Meta

from shipworthy.domain.contract import ANY, Contract, Datatype, Tensor
from shipworthy.protocols.messages import (
    InvalidMessage,
    MalformedMessage,  # noqa: F401  # pyright: ignore[reportUnusedImport]  # caught from here
    decoded,
)
from shipworthy.protocols.packed import Packed

EXTENSIONS: Final[tuple[str, ...]] = ("binary_tensor_data",)
"""Protocol extensions that we speak; `oip_binary` reads and writes this one."""

_SHOWN = 80  # characters of a client's own text that an error message repeats


class ContractViolation(InvalidMessage):
    """Well formed, but not what this model's contract declares."""


# --- messages ---------------------------------------------------------------------------------


class TensorMessage(msgspec.Struct, frozen=True):
    """An input or output as it stands in a message; `data` is JSON text not yet looked into."""

    name: str
    shape: tuple[Annotated[int, Meta(ge=0, le=2**63 - 1)], ...]
    datatype: str
    data: msgspec.Raw
    parameters: dict[str, Any] | None = None


class PackedTensor(TensorMessage, frozen=True, kw_only=True):
    """One whose values came in binary, behind the message's JSON; its `data` is empty."""

    packed: Packed


class RequestedOutput(msgspec.Struct, frozen=True):
    """An output that the client asks for by name."""

    name: str
    parameters: dict[str, Any] | None = None


class InferenceRequest(msgspec.Struct, frozen=True):
    """A request to infer; without `outputs` the client wants them all."""

    inputs: list[TensorMessage]
    id: str | None = None
    parameters: dict[str, Any] | None = None
    outputs: list[RequestedOutput] | None = None


class InferenceResponse(msgspec.Struct, frozen=True):
    """A model's answer."""

    model_name: str
    outputs: list[TensorMessage]
    model_version: str | None = None
    id: str | None = None
    parameters: dict[str, Any] | None = None


class TensorValues(msgspec.Struct, frozen=True):
    """One tensor with its data as Python values: row-major, flat or nested to the shape's depth.

    What was checked may hold `Packed` values instead, as they came in binary. An output may hold
    anything with a `tolist()`, such as a numpy array, when it is encoded.
    """

    name: str
    datatype: Datatype
    shape: tuple[int, ...]
    data: Any


_requests = msgspec.json.Decoder(InferenceRequest)
_responses = msgspec.json.Decoder(InferenceResponse)
_objects = msgspec.json.Decoder(dict[str, msgspec.Raw])
_encoder = msgspec.json.Encoder()


def decode_request(body: bytes) -> InferenceRequest:
    """Read a request; MalformedMessage says where it is not JSON or not the protocol's."""
    return decoded(_requests, body)


def decode_response(body: bytes) -> InferenceResponse:
    """Read a response; MalformedMessage says where it is not JSON or not the protocol's."""
    return decoded(_responses, body)


def encode_request(
    inputs: Iterable[TensorValues],
    *,
    outputs: Iterable[str] | None = None,
    id: str | None = None,  # the protocol's word
) -> bytes:
    """A request for these inputs; `outputs` names those wanted."""
    message: dict[str, Any] = {} if id is None else {"id": id}
    message["inputs"] = [_plain(tensor) for tensor in inputs]
    if outputs is not None:
        message["outputs"] = [{"name": name} for name in outputs]
    return _encoder.encode(message)


def encode_response(
    outputs: Iterable[TensorValues],
    *,
    model_name: str,
    model_version: str | None = None,
    id: str | None = None,  # the protocol's word
) -> bytes:
    """A response with these outputs; `id` is the request's, given back."""
    message: dict[str, Any] = {"model_name": model_name}
    if model_version is not None:
        message["model_version"] = model_version
    if id is not None:
        message["id"] = id
    message["outputs"] = [_plain(tensor) for tensor in outputs]
    return _encoder.encode(message)


def rename_response(body: bytes, *, model_name: str, model_version: str) -> bytes:
    """The response under another model name and version; all else, unknown fields too, stays."""
    message: dict[str, Any] = dict(decoded(_objects, body))
    message["model_name"] = model_name
    message["model_version"] = model_version
    return _encoder.encode(message)


# --- documents --------------------------------------------------------------------------------


def error_body(message: str) -> bytes:
    """The protocol's shape of an error."""
    return _encoder.encode({"error": message})


def server_metadata(name: str, version: str) -> bytes:
    """`GET /v2`."""
    return _encoder.encode({"name": name, "version": version, "extensions": EXTENSIONS})


def server_live(*, live: bool) -> bytes:
    """`GET /v2/health/live`."""
    return _encoder.encode({"live": live})


def server_ready(*, ready: bool) -> bytes:
    """`GET /v2/health/ready`."""
    return _encoder.encode({"ready": ready})


def model_ready(name: str, *, ready: bool) -> bytes:
    """`GET /v2/models/{name}/ready`."""
    return _encoder.encode({"name": name, "ready": ready})


def model_metadata(
    name: str, contract: Contract, *, versions: Sequence[str] = (), platform: str = ""
) -> bytes:
    """`GET /v2/models/{name}`."""
    return _encoder.encode(
        {
            "name": name,
            "versions": versions,
            "platform": platform,
            "inputs": [_described(tensor) for tensor in contract.inputs],
            "outputs": [_described(tensor) for tensor in contract.outputs],
        }
    )


def _described(tensor: Tensor) -> dict[str, Any]:
    return {"name": tensor.name, "datatype": tensor.datatype, "shape": tensor.shape}


# --- contracts --------------------------------------------------------------------------------


class ContractChecker:
    """A contract made ready to check many messages."""

    def __init__(self, contract: Contract) -> None:
        self._inputs = {tensor.name: tensor for tensor in contract.inputs}
        self._outputs = {tensor.name: tensor for tensor in contract.outputs}
        self._required_inputs = _required(contract.inputs)
        self._required_outputs = _required(contract.outputs)

    def check_request(self, request: InferenceRequest) -> list[TensorValues]:
        """The inputs' values, or a ContractViolation for the first field that is at fault."""
        values = _check_tensors("inputs", request.inputs, self._inputs, self._required_inputs)
        _one_batch(request.inputs, self._inputs)
        self._check_requested(request.outputs or ())
        return values

    def check_response(
        self, response: InferenceResponse, request: InferenceRequest
    ) -> list[TensorValues]:
        """The outputs' values if the model kept its word to this request.

        Else a ContractViolation for the first field that is at fault.
        """
        required = self._required_outputs
        if request.outputs:
            required = tuple(output.name for output in request.outputs)
        values = _check_tensors("outputs", response.outputs, self._outputs, required)
        rows = _batch(request.inputs, self._inputs)
        answered = _batch(response.outputs, self._outputs)
        if rows and answered and rows[0] != answered[0]:
            raise ContractViolation(
                f"outputs[{answered[1]}].shape: the request has {rows[0]} rows,"
                f" the answer {answered[0]}"
            )
        return values

    def _check_requested(self, outputs: Sequence[RequestedOutput]) -> None:
        seen: set[str] = set()
        for index, output in enumerate(outputs):
            field = f"outputs[{index}].name"
            if output.name not in self._outputs:
                raise ContractViolation(
                    f"{field}: the model has no output {_quoted(output.name)};"
                    f" it returns {_listed(self._outputs)}"
                )
            if output.name in seen:
                raise ContractViolation(f"{field}: {_quoted(output.name)} is given twice")
            seen.add(output.name)


def _required(tensors: Iterable[Tensor]) -> tuple[str, ...]:
    return tuple(tensor.name for tensor in tensors if not tensor.optional)


def _check_tensors(
    kind: str,
    tensors: Sequence[TensorMessage],
    declared: Mapping[str, Tensor],
    required: Sequence[str],
) -> list[TensorValues]:
    seen: dict[str, TensorValues] = {}
    for index, tensor in enumerate(tensors):
        expected = declared.get(tensor.name)
        if expected is None:
            verb = "takes" if kind == "inputs" else "returns"
            raise ContractViolation(
                f"{kind}[{index}].name: the model has no {kind[:-1]} {_quoted(tensor.name)};"
                f" it {verb} {_listed(declared)}"
            )
        if tensor.name in seen:
            raise ContractViolation(f"{kind}[{index}].name: {_quoted(tensor.name)} is given twice")
        field = f"{kind}[{index}]"
        _check_declaration(field, tensor, expected)
        data: Any
        if isinstance(tensor, PackedTensor):
            data = _packed(field, tensor, expected.datatype)
        else:
            data = _values(f"{field}.data", tensor, expected.datatype)
        seen[tensor.name] = TensorValues(tensor.name, expected.datatype, tensor.shape, data)
    for name in required:
        if name not in seen:
            raise ContractViolation(f"{kind}: {_quoted(name)} is missing")
    return list(seen.values())


def _check_declaration(field: str, tensor: TensorMessage, expected: Tensor) -> None:
    if tensor.datatype != expected.datatype:
        raise ContractViolation(
            f"{field}.datatype: expected {expected.datatype}, got {_quoted(tensor.datatype)}"
        )
    shape, wanted = tensor.shape, expected.shape
    if len(shape) != len(wanted) or any(
        size != want if want != ANY else size == 0 for size, want in zip(shape, wanted, strict=True)
    ):
        note = "; -1 stands for any size from 1 up" if ANY in wanted else ""
        raise ContractViolation(
            f"{field}.shape: expected {list(wanted)}, got {_shortened(str(list(shape)))}{note}"
        )


def _batch(
    tensors: Sequence[TensorMessage], declared: Mapping[str, Tensor]
) -> tuple[int, int] | None:
    """Rows and index of the first tensor whose first dimension is free, as a batch is."""
    for index, tensor in enumerate(tensors):
        shape = declared[tensor.name].shape
        if shape and shape[0] == ANY:
            return tensor.shape[0], index
    return None


def _one_batch(tensors: Sequence[TensorMessage], declared: Mapping[str, Tensor]) -> None:
    first = _batch(tensors, declared)
    if first is None or len(tensors) == 1:
        return
    for index, tensor in enumerate(tensors):
        shape = declared[tensor.name].shape
        if shape and shape[0] == ANY and tensor.shape[0] != first[0]:
            raise ContractViolation(
                f"inputs[{index}].shape: {tensor.shape[0]} rows,"
                f" but inputs[{first[1]}] has {first[0]}"
            )


# --- data -------------------------------------------------------------------------------------

_FP16_MAX = 65504.0
_FP32_MAX = 3.4028234663852886e38


def _between(low: int, high: int) -> Any:
    return Annotated[int, Meta(ge=low, le=high)]


_ELEMENTS: Final[dict[str, Any]] = {
    "BOOL": bool,
    "UINT8": _between(0, 2**8 - 1),
    "UINT16": _between(0, 2**16 - 1),
    "UINT32": _between(0, 2**32 - 1),
    "UINT64": Annotated[int, Meta(ge=0)],  # msgspec's bounds end at 63 bits: see _fits_64_bits
    "INT8": _between(-(2**7), 2**7 - 1),
    "INT16": _between(-(2**15), 2**15 - 1),
    "INT32": _between(-(2**31), 2**31 - 1),
    "INT64": int,
    "FP16": Annotated[float, Meta(ge=-_FP16_MAX, le=_FP16_MAX)],
    "FP32": Annotated[float, Meta(ge=-_FP32_MAX, le=_FP32_MAX)],
    "FP64": float,
    "BYTES": str,
}
_WANTED: Final[dict[str, str]] = {
    "BOOL": "true or false",
    "UINT8": "an integer from 0 to 255",
    "UINT16": "an integer from 0 to 65535",
    "UINT32": "an integer from 0 to 4294967295",
    "UINT64": "an integer from 0 to 18446744073709551615",
    "INT8": "an integer from -128 to 127",
    "INT16": "an integer from -32768 to 32767",
    "INT32": "an integer from -2147483648 to 2147483647",
    "INT64": "an integer from -9223372036854775808 to 9223372036854775807",
    "FP16": "a number from -65504 to 65504",
    "FP32": "a number that fits 32 bits",
    "FP64": "a number that fits 64 bits",
    "BYTES": "a string",
}
_INT64: Final = {"UINT64": (0, 2**64 - 1), "INT64": (-(2**63), 2**63 - 1)}


@cache
def _data_decoder(datatype: str, depth: int) -> msgspec.json.Decoder[Any]:
    """Reads lists of this type, nested `depth` deep."""
    kind: Any = _ELEMENTS[datatype]
    for _ in range(depth):
        kind = list[kind]
    return msgspec.json.Decoder(kind)


def _values(field: str, tensor: TensorMessage, datatype: Datatype) -> list[Any]:
    """The data as a flat or nested list, checked against type, range and shape."""
    depth = 1
    try:
        try:
            values = _data_decoder(datatype, 1).decode(tensor.data)
        except msgspec.ValidationError as error:
            if len(tensor.shape) < 2 or not str(error).endswith("got `array` - at `$[0]`"):
                raise
            depth = len(tensor.shape)
            values = _data_decoder(datatype, depth).decode(tensor.data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ContractViolation(_data_problem(field, error, datatype)) from None
    if depth > 1:
        if not _is_nested(values, tensor.shape):
            _check_nested(field, values, tensor.shape)
    elif len(values) != math.prod(tensor.shape):
        raise ContractViolation(
            f"{field}: expected {_shortened(str(math.prod(tensor.shape)))} values for shape"
            f" {_shortened(str(list(tensor.shape)))}, got {len(values)}"
        )
    if datatype in _INT64:
        _fits_64_bits(field, values, datatype)
    return values


def _packed(field: str, tensor: PackedTensor, datatype: Datatype) -> Packed:
    packed = Packed(datatype, tensor.packed.raw)
    problem = packed.problem(math.prod(tensor.shape))
    if problem is not None:
        raise ContractViolation(
            f"{field}: its binary data is not {datatype} {_shortened(str(list(tensor.shape)))}:"
            f" {_shortened(problem)}"
        )
    return packed


def _is_nested(values: list[Any], shape: Sequence[int]) -> bool:
    """What `_check_nested` says, without naming who is at fault, and so many times faster.

    A million short rows would hold up everybody else's requests for seconds.
    """
    if len(values) != shape[0]:
        return False
    last = len(shape) - 1
    for depth in range(1, len(shape)):
        if set(map(len, values)) != {shape[depth]}:
            return False
        if depth < last:
            values = list(chain.from_iterable(values))
    return True


def _check_nested(field: str, values: list[Any], shape: tuple[int, ...]) -> None:
    if len(values) != shape[0]:
        raise ContractViolation(
            f"{field}: expected {shape[0]} entries as the shape says, got {len(values)}"
        )
    if len(shape) > 1:
        for index, inner in enumerate(values):
            _check_nested(f"{field}[{index}]", inner, shape[1:])


def _fits_64_bits(field: str, values: list[Any], datatype: str) -> None:
    low, high = _INT64[datatype]
    if values and isinstance(values[0], int) and low <= min(values) and max(values) <= high:
        return
    for index, value in enumerate(values):
        if isinstance(value, list):
            _fits_64_bits(f"{field}[{index}]", cast("list[Any]", value), datatype)
        elif not low <= value <= high:
            raise ContractViolation(
                f"{field}[{index}]: expected {_WANTED[datatype]}, got a value out of range"
            )


_AT = re.compile(r" - at `\$\.?(.*)`$")
_GOT = re.compile(r"got `([^`]*)`")


def _data_problem(field: str, error: Exception, datatype: str) -> str:
    text = str(error)
    at = _AT.search(text)
    where = f"{field}{at.group(1) if at else ''}"
    if isinstance(error, UnicodeDecodeError):
        return f"{where}: a string is not valid UTF-8"
    got = _GOT.search(text)
    if text.startswith("JSON is malformed"):
        return f"{where}: not JSON: {text.removeprefix('JSON is malformed: ')}"
    if got is None:
        return f"{where}: expected {_WANTED[datatype]}, got a value out of range"
    if not at:
        return f"{where}: expected an array, got {_json_word(got.group(1))}"
    wanted = "an array" if text.startswith("Expected `array`") else _WANTED[datatype]
    return f"{where}: expected {wanted}, got {_json_word(got.group(1))}"


def _json_word(kind: str) -> str:
    words = {"int": "an integer", "float": "a number with a fraction", "str": "a string"}
    more = {"bool": "true or false", "array": "an array", "object": "an object", "null": "null"}
    return (words | more).get(kind, kind)


# --- words ------------------------------------------------------------------------------------


def _plain(tensor: TensorValues) -> dict[str, Any]:
    data = tensor.data
    return {
        "name": tensor.name,
        "shape": tensor.shape,
        "datatype": tensor.datatype,
        "data": data.tolist() if hasattr(data, "tolist") else data,
    }


def _shortened(text: str) -> str:
    return text if len(text) <= _SHOWN else text[:_SHOWN] + "…"


def _quoted(name: str) -> str:
    return _encoder.encode(_shortened(name)).decode()


def _listed(names: Iterable[str]) -> str:
    return ", ".join(map(_quoted, names)) or "none"
