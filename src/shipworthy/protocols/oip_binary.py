"""The Open Inference Protocol's binary tensor data extension, as Triton, MLServer and KServe do it.

A body is JSON followed by the values of those tensors whose `parameters.binary_data_size` says how
many bytes are theirs, in the tensors' order; the header `Inference-Header-Content-Length` gives the
JSON's length, and such a body's content type is `application/octet-stream`. A body without that
header is JSON throughout, which `oip` reads. A client asks for outputs in binary by
`parameters.binary_data_output` of the request, or `parameters.binary_data` of an output.

    >>> body, length = encode_request([TensorValues("x", "FP32", (1, 2), [0.5, 1.0])])
    >>> body[:length]
    b'{"inputs":[{"name":"x","shape":[1,2],"datatype":"FP32","parameters":{"binary_data_size":8}}]}'
    >>> body[length:].hex()
    '0000003f0000803f'

What was read goes to `ContractChecker` as any other message. Where the server behind the gateway
does not `speaks_binary` by its metadata, its client is served all the same: `request_as_json`
before the call, `response_as_binary` after it. Binary data may hold NaN, infinity and BYTES that
are no text; JSON can't carry these, so such a request is refused where it must become JSON.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Annotated, Any, Final

import msgspec
from msgspec import Meta

from shipworthy.domain.contract import Datatype
from shipworthy.protocols.messages import MalformedMessage, decoded
from shipworthy.protocols.oip import (
    EXTENSIONS,
    ContractViolation,
    InferenceRequest,
    InferenceResponse,
    PackedTensor,
    RequestedOutput,
    TensorMessage,
    TensorValues,
)
from shipworthy.protocols.oip import decode_request as _json_request
from shipworthy.protocols.oip import decode_response as _json_response
from shipworthy.protocols.oip import rename_response as _json_rename
from shipworthy.protocols.packed import Packed, pack

HEADER: Final = "Inference-Header-Content-Length"
CONTENT_TYPE: Final = "application/octet-stream"
"""What a body with binary data is; without any it is `application/json`."""

_SIZE: Final = "binary_data_size"
_ALL: Final = "binary_data_output"
_ONE: Final = "binary_data"
_BYTES: Final[Datatype] = "BYTES"  # until a contract says the type: bytes of no known meaning


class _Tensor(msgspec.Struct, frozen=True):
    name: str
    shape: tuple[Annotated[int, Meta(ge=0, le=2**63 - 1)], ...]
    datatype: str
    data: msgspec.Raw = msgspec.Raw()
    parameters: dict[str, Any] | None = None


class _Request(msgspec.Struct, frozen=True):
    inputs: list[_Tensor]
    id: str | None = None
    parameters: dict[str, Any] | None = None
    outputs: list[RequestedOutput] | None = None


class _Response(msgspec.Struct, frozen=True):
    model_name: str
    outputs: list[_Tensor]
    model_version: str | None = None
    id: str | None = None
    parameters: dict[str, Any] | None = None


class _Metadata(msgspec.Struct, frozen=True):
    extensions: list[str] = []


_requests = msgspec.json.Decoder(_Request)
_responses = msgspec.json.Decoder(_Response)
_metadata = msgspec.json.Decoder(_Metadata)
_objects = msgspec.json.Decoder(dict[str, msgspec.Raw])
_lists = msgspec.json.Decoder(list[dict[str, msgspec.Raw]])
_wished = msgspec.json.Decoder(list[dict[str, msgspec.Raw]] | None)
_parameters = msgspec.json.Decoder(dict[str, msgspec.Raw] | None)
_NULL: Final = msgspec.Raw(b"null")
_encoder = msgspec.json.Encoder()


# --- reading ----------------------------------------------------------------------------------


def header_length(value: bytes) -> int:
    """The header's number; MalformedMessage when it is none."""
    if not value.isdigit() or len(value) > 15:
        raise MalformedMessage(f"{HEADER}: send the length of the body's JSON part in bytes")
    return int(value)


def decode_request(body: bytes, header_length: int | None = None) -> InferenceRequest:
    """Read a request; MalformedMessage says where it is not the protocol's.

    `header_length` is what the header says, None where there is none: then all of it is JSON.
    """
    if header_length is None:
        return _json_request(body)
    message = decoded(_requests, _json_part(body, header_length))
    return InferenceRequest(
        _unpacked("inputs", message.inputs, body, header_length),
        message.id,
        message.parameters,
        message.outputs,
    )


def decode_response(body: bytes, header_length: int | None = None) -> InferenceResponse:
    """Read a response; MalformedMessage says where it is not the protocol's."""
    if header_length is None:
        return _json_response(body)
    message = decoded(_responses, _json_part(body, header_length))
    return InferenceResponse(
        message.model_name,
        _unpacked("outputs", message.outputs, body, header_length),
        message.model_version,
        message.id,
        message.parameters,
    )


def _json_part(body: bytes, length: int) -> bytes:
    if length > len(body):
        raise MalformedMessage(
            f"{HEADER}: {length} bytes of JSON are announced, but the body has {len(body)};"
            " send the length of the JSON part alone"
        )
    if length <= 0:
        raise MalformedMessage(
            f"{HEADER}: a body without JSON is not accepted;"
            " send the protocol's JSON in front of the data, and its length"
        )
    return body[:length]


def _unpacked(
    kind: str, tensors: Sequence[_Tensor], body: bytes, offset: int
) -> list[TensorMessage]:
    view = memoryview(body)
    messages: list[TensorMessage] = []
    for index, tensor in enumerate(tensors):
        parameters = tensor.parameters
        if parameters is None or _SIZE not in parameters:
            if not tensor.data:
                raise MalformedMessage(
                    f"{kind}[{index}].data: missing; send the values here, or behind the JSON"
                    f" with their size in parameters.{_SIZE}"
                )
            messages.append(
                TensorMessage(tensor.name, tensor.shape, tensor.datatype, tensor.data, parameters)
            )
            continue
        end = offset + _size(f"{kind}[{index}]", tensor, parameters[_SIZE], len(body) - offset)
        messages.append(
            PackedTensor(
                tensor.name,
                tensor.shape,
                tensor.datatype,
                tensor.data,
                parameters,
                packed=Packed(_BYTES, view[offset:end]),
            )
        )
        offset = end
    if offset != len(body):
        raise MalformedMessage(
            f"the body has {len(body) - offset} bytes more than its JSON and the sizes in"
            f" parameters.{_SIZE} say; check both and {HEADER}"
        )
    return messages


def _size(field: str, tensor: _Tensor, size: Any, left: int) -> int:
    if tensor.data:
        raise MalformedMessage(f"{field}: has both data and parameters.{_SIZE}; send one")
    if type(size) is not int or size < 0:
        raise MalformedMessage(f"{field}.parameters.{_SIZE}: send the number of bytes")
    if size > left:
        raise MalformedMessage(
            f"{field}.parameters.{_SIZE}: of {size} bytes only {left} follow; send them all"
        )
    return size


# --- writing ----------------------------------------------------------------------------------


def encode_request(
    inputs: Iterable[TensorValues],
    *,
    outputs: Iterable[str] | None = None,
    id: str | None = None,  # the protocol's word
    binary_output: bool = False,
) -> tuple[bytes, int]:
    """A request with these inputs in binary, and its JSON's length for the header.

    With `binary_output` the answer is wanted in binary too.
    """
    message: dict[str, Any] = {} if id is None else {"id": id}
    parts: list[bytes | memoryview] = []
    message["inputs"] = [_described(tensor, parts) for tensor in inputs]
    if outputs is not None:
        message["outputs"] = [{"name": name} for name in outputs]
    if binary_output:
        message["parameters"] = {_ALL: True}
    return _joined(_encoder.encode(message), parts)


def encode_response(
    outputs: Iterable[TensorValues],
    *,
    model_name: str,
    model_version: str | None = None,
    id: str | None = None,  # the protocol's word
    binary: frozenset[str],
) -> tuple[bytes, int]:
    """A response with those outputs in binary that `binary` names, and its JSON's length."""
    message: dict[str, Any] = {"model_name": model_name}
    if model_version is not None:
        message["model_version"] = model_version
    if id is not None:
        message["id"] = id
    parts: list[bytes | memoryview] = []
    message["outputs"] = [
        _described(tensor, parts) if tensor.name in binary else _plain(index, tensor)
        for index, tensor in enumerate(outputs)
    ]
    return _joined(_encoder.encode(message), parts)


def _described(tensor: TensorValues, parts: list[bytes | memoryview]) -> dict[str, Any]:
    raw = pack(tensor.datatype, tensor.data)
    parts.append(raw)
    return {
        "name": tensor.name,
        "shape": tensor.shape,
        "datatype": tensor.datatype,
        "parameters": {_SIZE: len(raw)},
    }


def _plain(index: int, tensor: TensorValues) -> dict[str, Any]:
    data = tensor.data
    if isinstance(data, Packed):
        data = _listed(f"outputs[{index}]", data)
    elif hasattr(data, "tolist"):
        data = data.tolist()
    shape = tensor.shape
    return {"name": tensor.name, "shape": shape, "datatype": tensor.datatype, "data": data}


def _joined(json: bytes, parts: Sequence[bytes | memoryview]) -> tuple[bytes, int]:
    return b"".join((json, *parts)), len(json)


def rename_response(
    body: bytes, header_length: int | None, *, model_name: str, model_version: str
) -> tuple[bytes, int | None]:
    """The response under another model name and version, and its JSON's new length.

    All else, unknown fields too, stays; so does the binary data behind the JSON.
    """
    if header_length is None:
        return _json_rename(body, model_name=model_name, model_version=model_version), None
    json = _json_rename(
        _json_part(body, header_length), model_name=model_name, model_version=model_version
    )
    return _joined(json, (memoryview(body)[header_length:],))


# --- who wants what ---------------------------------------------------------------------------


def speaks_binary(server_metadata: bytes) -> bool:
    """Whether a server says of itself, in its `GET /v2`, that it speaks this extension."""
    try:
        return EXTENSIONS[0] in decoded(_metadata, server_metadata).extensions
    except MalformedMessage:
        return False


def wants_binary(request: InferenceRequest, names: Iterable[str]) -> frozenset[str]:
    """Which outputs of these names the request wants in binary.

    MalformedMessage when it says so by anything but true or false.
    """
    every = _flag("", request.parameters, _ALL, default=False)
    outputs = request.outputs
    if not outputs:
        return frozenset(names) if every else frozenset()
    return frozenset(
        output.name
        for index, output in enumerate(outputs)
        if _flag(f"outputs[{index}].", output.parameters, _ONE, default=every)
    )


def _flag(field: str, parameters: dict[str, Any] | None, name: str, *, default: bool) -> bool:
    if parameters is None:
        return default
    value = parameters.get(name, default)
    if type(value) is not bool:
        raise MalformedMessage(f"{field}parameters.{name}: send true or false")
    return value


# --- from one form to the other ---------------------------------------------------------------


def request_as_json(
    body: bytes, header_length: int | None, values: Sequence[TensorValues]
) -> bytes:
    """The request for a server that takes and answers JSON alone.

    `values` are what `check_request` made of it. All other fields stay, but the wish for binary
    outputs goes. A ContractViolation names the value that JSON can't carry.
    """
    message = _message(body, header_length, "inputs", values)
    _without(message, _ALL)
    if "outputs" in message and (outputs := _wished.decode(message["outputs"])):
        for output in outputs:
            _without(output, _ONE)
        message["outputs"] = outputs
    return _encoder.encode(message)


def response_as_json(
    body: bytes, header_length: int | None, values: Sequence[TensorValues]
) -> bytes:
    """The response with all its values in JSON; `values` are what `check_response` made of it.

    A ContractViolation names the value that JSON can't carry.
    """
    return _encoder.encode(_message(body, header_length, "outputs", values))


def response_as_binary(
    body: bytes, values: Sequence[TensorValues], binary: frozenset[str]
) -> tuple[bytes, int | None]:
    """A JSON response with those outputs in binary that `binary` names, and its JSON's length.

    `values` are what `check_response` made of it. None, and the body as it is, when none of these
    outputs is in it.
    """
    if not any(tensor.name in binary for tensor in values):
        return body, None
    message: dict[str, Any] = dict(decoded(_objects, body))
    tensors: list[dict[str, Any]] = list(_lists.decode(message["outputs"]))
    parts: list[bytes | memoryview] = []
    for tensor, value in zip(tensors, values, strict=True):
        if value.name in binary:
            raw = pack(value.datatype, value.data)
            parts.append(raw)
            del tensor["data"]
            parameters: dict[str, Any] = dict(
                _parameters.decode(tensor.get("parameters", _NULL)) or ()
            )
            parameters[_SIZE] = len(raw)
            tensor["parameters"] = parameters
    message["outputs"] = tensors
    return _joined(_encoder.encode(message), parts)


def _message(
    body: bytes, header_length: int | None, kind: str, values: Sequence[TensorValues]
) -> dict[str, Any]:
    """The message's JSON with the values that came in binary put into it."""
    json = body if header_length is None else _json_part(body, header_length)
    message: dict[str, Any] = dict(decoded(_objects, json))
    if header_length is None:
        return message
    tensors: list[dict[str, Any]] = list(_lists.decode(message[kind]))
    for index, (tensor, value) in enumerate(zip(tensors, values, strict=True)):
        if isinstance(value.data, Packed):
            tensor["data"] = _listed(f"{kind}[{index}]", value.data)
            _without(tensor, _SIZE)
    message[kind] = tensors
    return message


def _without(message: dict[str, Any], parameter: str) -> None:
    """Take one parameter away, and `parameters` too when it was the only one."""
    parameters = _parameters.decode(message.get("parameters", _NULL))
    if parameters is None or parameter not in parameters:
        return
    del parameters[parameter]
    if parameters:
        message["parameters"] = parameters
    else:
        del message["parameters"]


def _listed(field: str, data: Packed) -> list[Any]:
    problem = data.json_problem()
    if problem is not None:
        raise ContractViolation(
            f"{field}: {problem}, which JSON can't carry, and binary is not spoken here;"
            " send other values"
        )
    return data.tolist()
