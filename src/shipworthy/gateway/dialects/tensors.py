"""The Open Inference Protocol: named tensors, checked against the contract both ways."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import msgspec

from shipworthy.domain.contract import Protocol as WireProtocol
from shipworthy.gateway.call import Call, EventReader
from shipworthy.gateway.http import Refusal, Request
from shipworthy.gateway.upstream import Outgoing, Reply
from shipworthy.protocols.oip import (
    ContractViolation,
    MalformedMessage,
    decode_request,
    decode_response,
    error_body,
    rename_response,
)
from shipworthy.protocols.outcomes import Reason

if TYPE_CHECKING:
    from shipworthy.gateway.live import LiveArm

_SHOWN: Final = 500


class _UpstreamError(msgspec.Struct):
    error: str


class TensorAsk:
    """An inference request; see `Ask`. Raises MalformedMessage when it is none."""

    protocol: WireProtocol = "oip-v2"
    operation = "infer"
    stream = False
    unit: str | None = None
    open_ended = False
    input_tokens = output_tokens = 0
    __slots__ = ("_body", "message")

    def __init__(self, request: Request) -> None:
        if b"inference-header-content-length" in request.headers:
            raise Refusal(
                400,
                "binary tensor data is not accepted; send it as JSON",
                reason=Reason.UNSUPPORTED,
            )
        self._body = request.body
        self.message = decode_request(request.body)

    def check(self, arm: LiveArm) -> None:
        """Hold it against the contract."""
        arm.checker.check_request(self.message)

    def outgoing(self, arm: LiveArm, call: Call) -> Outgoing:
        """The very same bytes, for the release's own name of the model."""
        return Outgoing(arm.infer_path, self._body, headers=call.passed_on)

    def judged(self, reply: Reply, arm: LiveArm, call: Call) -> Reply:
        """The answer held against the contract, under the name that the client called."""
        try:
            response = decode_response(reply.body)
            arm.checker.check_response(response, self.message)
        except ContractViolation as problem:
            return Reply(Reason.AGAINST_CONTRACT, reply.status, detail=str(problem))
        except MalformedMessage as problem:
            return Reply(Reason.BROKEN, reply.status, detail=str(problem))
        name, version = call.live.plan.name, str(arm.arm.version)
        if response.model_name == name and response.model_version == version:
            return reply
        renamed = rename_response(reply.body, model_name=name, model_version=version)
        return msgspec.structs.replace(reply, body=renamed)

    def reader(self, arm: LiveArm, call: Call) -> EventReader:
        """Tensors come in one piece."""
        raise NotImplementedError

    def refusal(self, reply: Reply) -> Reply | None:
        """What the model says of a value that no contract can describe."""
        if reply.reason is not Reason.REFUSED or reply.status not in (400, 422):
            return None
        try:
            text = msgspec.json.decode(reply.body, type=_UpstreamError).error[:_SHOWN]
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            return None
        return msgspec.structs.replace(reply, body=error_body(text)) if text else None
