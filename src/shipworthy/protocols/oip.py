"""The Open Inference Protocol v2 over JSON: what is read, what is written and what is refused.

Both sides use this module: the gateway to check what passes through it, a model server to read
requests and write answers. Tensor data stays raw JSON until a contract says which type to expect,
so a message is parsed once and only as far as needed. Every refusal names the field:
`inputs[0].data: expected 128 values for shape [2, 64], got 127`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any, Final

import msgspec
from msgspec import Meta

from shipworthy.domain.contract import ANY, Contract, Datatype, Tensor
from shipworthy.protocols.messages import (
    InvalidMessage,  # noqa: F401  # pyright: ignore[reportUnusedImport]  # caught from here
    MalformedMessage,  # noqa: F401  # pyright: ignore[reportUnusedImport]  # and this
    decoded,
)
from shipworthy.protocols.packed import Packed
from shipworthy.protocols.splice import replaced
from shipworthy.protocols.values import (
    DATA_ERRORS,
    INT64,
    ContractViolation,
    check_64_bits,
    check_nesting,
    data_problem,
    decoder_of,
    quoted,
    shortened,
)

EXTENSIONS: Final[tuple[str, ...]] = ("binary_tensor_data",)
"""Protocol extensions that we speak; `oip_binary` reads and writes this one."""


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
    fields = decoded(_objects, body)
    name, version = _encoder.encode(model_name), _encoder.encode(model_version)
    if "model_version" not in fields:
        name = b'%b,"model_version":%b' % (name, version)
    renamed = replaced(body, fields, "model_name", name)
    if "model_version" not in fields:
        return renamed
    return replaced(renamed, {**fields, "model_name": msgspec.Raw(name)}, "model_version", version)


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
                    f"{field}: the model has no output {quoted(output.name)};"
                    f" it returns {_listed(self._outputs)}"
                )
            if output.name in seen:
                raise ContractViolation(f"{field}: {quoted(output.name)} is given twice")
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
                f"{kind}[{index}].name: the model has no {kind[:-1]} {quoted(tensor.name)};"
                f" it {verb} {_listed(declared)}"
            )
        if tensor.name in seen:
            raise ContractViolation(f"{kind}[{index}].name: {quoted(tensor.name)} is given twice")
        field = f"{kind}[{index}]"
        _check_declaration(field, tensor, expected)
        data = _values(field, tensor, expected.datatype)
        seen[tensor.name] = TensorValues(tensor.name, expected.datatype, tensor.shape, data)
    for name in required:
        if name not in seen:
            raise ContractViolation(f"{kind}: {quoted(name)} is missing")
    return list(seen.values())


def _check_declaration(field: str, tensor: TensorMessage, expected: Tensor) -> None:
    if tensor.datatype != expected.datatype:
        raise ContractViolation(
            f"{field}.datatype: expected {expected.datatype}, got {quoted(tensor.datatype)}"
        )
    shape, wanted = tensor.shape, expected.shape
    if len(shape) != len(wanted) or any(
        size != want if want != ANY else size == 0 for size, want in zip(shape, wanted, strict=True)
    ):
        note = "; -1 stands for any size from 1 up" if ANY in wanted else ""
        raise ContractViolation(
            f"{field}.shape: expected {list(wanted)}, got {shortened(str(list(shape)))}{note}"
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


# --- data ---------------------------------------------------------------------------------------


def _values(field: str, tensor: TensorMessage, datatype: Datatype) -> list[Any] | Packed:
    """The data as a flat or nested list, or packed, checked against type, range and shape."""
    if type(tensor) is PackedTensor:
        return _packed(field, tensor, datatype)
    field += ".data"
    depth = 1
    try:
        try:
            values = decoder_of(datatype, 1).decode(tensor.data)
        except msgspec.ValidationError as error:
            if len(tensor.shape) < 2 or not str(error).endswith("got `array` - at `$[0]`"):
                raise
            depth = len(tensor.shape)
            values = decoder_of(datatype, depth).decode(tensor.data)
    except DATA_ERRORS as error:
        raise ContractViolation(data_problem(field, error, datatype)) from None
    if depth > 1:
        check_nesting(field, values, tensor.shape)
    elif len(values) != math.prod(tensor.shape):
        raise ContractViolation(
            f"{field}: expected {shortened(str(math.prod(tensor.shape)))} values for shape"
            f" {shortened(str(list(tensor.shape)))}, got {len(values)}"
        )
    if datatype in INT64:
        check_64_bits(field, values, datatype)
    return values


def _packed(field: str, tensor: PackedTensor, datatype: Datatype) -> Packed:
    packed = Packed(datatype, tensor.packed.raw)
    problem = packed.problem(math.prod(tensor.shape))
    if problem is not None:
        raise ContractViolation(
            f"{field}: its binary data is not {datatype} {shortened(str(list(tensor.shape)))}:"
            f" {shortened(problem)}"
        )
    return packed


def _plain(tensor: TensorValues) -> dict[str, Any]:
    data = tensor.data
    return {
        "name": tensor.name,
        "shape": tensor.shape,
        "datatype": tensor.datatype,
        "data": data.tolist() if hasattr(data, "tolist") else data,
    }


def _listed(names: Iterable[str]) -> str:
    return ", ".join(map(quoted, names)) or "none"
