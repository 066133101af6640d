"""Named tensors, checked against the contract both ways: the Open Inference Protocol, and MLflow's.

Either can be spoken by the client and by the release, and OIP's tensors come as JSON or in binary:
what the one side sends is translated where the other does not understand it, and else passes byte
for byte.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import msgspec

from shipworthy.domain.contract import Protocol as WireProtocol
from shipworthy.domain.features import Features, features_of_tensors
from shipworthy.gateway.call import Call, EventReader
from shipworthy.gateway.http import Refusal, Request
from shipworthy.gateway.upstream import Outgoing, Reply
from shipworthy.protocols import mlflow, oip, oip_binary
from shipworthy.protocols.messages import InvalidMessage, MalformedMessage
from shipworthy.protocols.oip import InferenceRequest, TensorMessage, TensorValues
from shipworthy.protocols.outcomes import Reason
from shipworthy.protocols.packed import Packed
from shipworthy.protocols.values import ContractViolation

if TYPE_CHECKING:
    from collections.abc import Sequence

    from shipworthy.gateway.live import LiveArm

_SHOWN: Final = 500
_LENGTH: Final = oip_binary.HEADER.lower().encode()
_BINARY: Final = oip_binary.CONTENT_TYPE.encode()
_INVOCATIONS: Final = "/invocations"
_NONE: Final[frozenset[str]] = frozenset()


class _UpstreamError(msgspec.Struct):
    error: str


class _TensorAsk:
    """What both protocols have in common; see `Ask`."""

    operation = "infer"
    stream = False
    unit: str | None = None
    open_ended = False
    input_tokens = output_tokens = 0
    message: InferenceRequest
    values: Sequence[TensorValues]
    _body: bytes
    outputs: Sequence[TensorValues]
    named: tuple[str, str | None]  # model and version, as an answer in tensors names them

    def reader(self, arm: LiveArm, call: Call) -> EventReader:
        """Tensors come in one piece."""
        raise NotImplementedError

    def kept(self) -> bytes:
        """The request as it came: these protocols name nobody."""
        return self._body

    def features(self) -> Features:
        """The columns of what was asked and answered."""
        return features_of_tensors(filter(_readable, self.values), filter(_readable, self.outputs))

    def _answer_of(self, reply: Reply, arm: LiveArm) -> Sequence[TensorValues]:
        """The outputs of an answer, checked. Raises MalformedMessage or ContractViolation."""
        if arm.arm.contract.protocol == "mlflow":
            return arm.scoring.read_response(reply.body, self.message)
        response = oip_binary.decode_response(reply.body, _header_length(reply))
        self.named = response.model_name, response.model_version
        return arm.checker.check_response(response, self.message)

    def judged(self, reply: Reply, arm: LiveArm, call: Call) -> Reply:
        """The answer held against the contract, as the client's protocol puts it."""
        try:
            self.outputs = self._answer_of(reply, arm)
            return self._told(reply, arm, call)
        except ContractViolation as problem:
            return Reply(Reason.AGAINST_CONTRACT, reply.status, detail=str(problem))
        except MalformedMessage as problem:
            return Reply(Reason.BROKEN, reply.status, detail=str(problem))

    def _told(self, reply: Reply, arm: LiveArm, call: Call) -> Reply:
        raise NotImplementedError

    def refusal(self, reply: Reply) -> Reply | None:
        """What the model says of a value that no contract can describe."""
        if reply.reason is not Reason.REFUSED or reply.status not in (400, 422):
            return None
        text = _upstream_text(reply.body)[:_SHOWN]
        return msgspec.structs.replace(reply, body=self._error(text)) if text else None

    def _error(self, text: str) -> bytes:
        raise NotImplementedError


class TensorAsk(_TensorAsk):
    """A request in the Open Inference Protocol. Raises MalformedMessage when it is none."""

    protocol: WireProtocol = "oip-v2"
    __slots__ = ("_body", "_length", "_wants", "message", "named", "outputs", "values")

    def __init__(self, request: Request) -> None:
        said = request.headers.get(_LENGTH)
        self._body = request.body
        self._length = None if said is None else oip_binary.header_length(said)
        self.message = oip_binary.decode_request(request.body, self._length)
        self.values: Sequence[TensorValues] = ()
        self.outputs: Sequence[TensorValues] = ()
        self._wants = _NONE

    def check(self, arm: LiveArm) -> None:
        """Hold it against the contract."""
        _check_kind(arm)
        self.values = arm.checker.check_request(self.message)
        if _may_want_binary(self.message):
            names = [output.name for output in arm.arm.contract.outputs]
            self._wants = oip_binary.wants_binary(self.message, names)

    def outgoing(self, arm: LiveArm, call: Call) -> Outgoing:
        """The very same bytes, for the release's own name of the model, if it understands them."""
        headers = call.passed_on
        if arm.arm.contract.protocol == "mlflow":
            return Outgoing(_INVOCATIONS, arm.scoring.write_request(self.values), headers=headers)
        if self._length is None and not self._wants:
            return Outgoing(arm.infer_path, self._body, headers=headers)
        if not arm.speech.binary:
            arm.speech.wanted = True
            body = oip_binary.request_as_json(self._body, self._length, self.values)
            return Outgoing(arm.infer_path, body, headers=headers)
        if self._length is None:
            return Outgoing(arm.infer_path, self._body, headers=headers)
        line = b"%s: %d\r\n" % (_LENGTH, self._length)
        return Outgoing(arm.infer_path, self._body, _BINARY, headers + line)

    def _told(self, reply: Reply, arm: LiveArm, call: Call) -> Reply:
        name, version = call.live.plan.name, str(arm.arm.version)
        if arm.arm.contract.protocol == "mlflow":
            body, length = oip_binary.encode_response(
                self.outputs,
                model_name=name,
                model_version=version,
                id=self.message.id,
                binary=self._wants,
            )
            return _with(reply, body, length if self._wants else None)
        body, length = reply.body, _header_length(reply)
        if self.named != (name, version):
            body, length = oip_binary.rename_response(
                body, length, model_name=name, model_version=version
            )
        if self._wants and length is None:
            body, length = oip_binary.response_as_binary(body, self.outputs, self._wants)
        elif length is not None and not self._wants:
            body, length = oip_binary.response_as_json(body, length, self.outputs), None
        return _with(reply, body, length)

    def _error(self, text: str) -> bytes:
        return oip.error_body(text)


class ScoringAsk(_TensorAsk):
    """A request in MLflow's scoring protocol, read by the contract of `public`.

    Raises InvalidMessage when it is none, or not by that contract.
    """

    protocol: WireProtocol = "mlflow"
    __slots__ = ("_arm", "_body", "_type", "message", "named", "outputs", "values")

    def __init__(self, request: Request, public: LiveArm) -> None:
        self._type = request.headers.get(b"content-type", b"application/json").decode("latin-1")
        self._body = request.body
        self.outputs: Sequence[TensorValues] = ()
        self._read(public)

    def _read(self, arm: LiveArm) -> None:
        _check_kind(arm)
        try:
            self.values = arm.scoring.read_request(self._body, self._type)
        except mlflow.UnsupportedContent as problem:
            raise Refusal(415, str(problem), reason=Reason.UNSUPPORTED) from None
        self._arm = arm
        self.message = InferenceRequest([_described(one) for one in self.values])

    def check(self, arm: LiveArm) -> None:
        """Hold it against the contract, which the reading does."""
        if arm is not self._arm:
            self._read(arm)

    def outgoing(self, arm: LiveArm, call: Call) -> Outgoing:
        """The very same bytes for a server that speaks this too, else tensors."""
        self.check(arm)
        if arm.arm.contract.protocol == "mlflow":
            kind = self._type.encode("latin-1")
            return Outgoing(_INVOCATIONS, self._body, kind, call.passed_on)
        return Outgoing(arm.infer_path, oip.encode_request(self.values), headers=call.passed_on)

    def _told(self, reply: Reply, arm: LiveArm, call: Call) -> Reply:
        del call  # the protocol names no models
        if arm.arm.contract.protocol == "mlflow":
            return reply
        return _with(reply, arm.scoring.write_response(self.outputs), None)

    def _error(self, text: str) -> bytes:
        return mlflow.error_body(text)


def scoring_error(status: int, message: str, code: str = "") -> bytes:
    """An error in MLflow's shape."""
    if code:
        return mlflow.error_body(message, "REQUEST_LIMIT_EXCEEDED")
    other = "INTERNAL_ERROR" if status >= 500 else "BAD_REQUEST"
    return mlflow.error_body(message, _CODES.get(status, other))


_CODES: Final = {
    401: "UNAUTHENTICATED",
    403: "PERMISSION_DENIED",
    404: "RESOURCE_DOES_NOT_EXIST",
    429: "REQUEST_LIMIT_EXCEEDED",
    503: "TEMPORARILY_UNAVAILABLE",
}


def _check_kind(arm: LiveArm) -> None:
    if arm.arm.contract.protocol == "openai":
        raise InvalidMessage(
            "model: takes no tensors; call it at /v1/chat/completions and its like"
        )


def _described(values: TensorValues) -> TensorMessage:
    """What an answer is held against: names and shapes; the values are not looked at again."""
    return TensorMessage(values.name, values.shape, values.datatype, msgspec.Raw())


def _readable(values: TensorValues) -> bool:
    """Whether its values can be had: bytes need not be text."""
    data = values.data
    return not isinstance(data, Packed) or data.datatype != "BYTES" or data.json_problem() is None


def _may_want_binary(message: InferenceRequest) -> bool:
    """Whether it says anything at all of how its outputs are to come."""
    if message.parameters:
        return True
    return any(output.parameters for output in message.outputs or ())


def _header_length(reply: Reply) -> int | None:
    said = reply.headers.get(_LENGTH)
    return None if said is None else oip_binary.header_length(said)


def _with(reply: Reply, body: bytes, length: int | None) -> Reply:
    """The reply with another body, `length` bytes of which are JSON if it is in binary."""
    if length is None:
        return msgspec.structs.replace(reply, body=body)
    said = (_LENGTH, b"%d" % length)
    return msgspec.structs.replace(reply, body=body, content_type=_BINARY, extra=(said,))


def _upstream_text(body: bytes) -> str:
    """What a server of either protocol says of an error; empty when it says nothing."""
    try:
        return msgspec.json.decode(body, type=_UpstreamError).error
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return mlflow.error_text(body)
