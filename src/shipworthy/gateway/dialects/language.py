"""OpenAI's protocol: chat, completions and embeddings, in one piece or as a stream."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Final

import msgspec

from shipworthy.domain.contract import OPERATIONS, Operation
from shipworthy.domain.contract import Protocol as WireProtocol
from shipworthy.domain.features import Features, features_of_text
from shipworthy.gateway.call import MAX_UNIT, Call, EventReader, Usage
from shipworthy.gateway.upstream import Outgoing, Reply, told_on
from shipworthy.protocols.events import error_event
from shipworthy.protocols.messages import InvalidMessage
from shipworthy.protocols.openai import (
    StreamReader,
    error_body,
    error_type,
    estimate_tokens,
    for_upstream,
    read_answer,
    read_request,
    rename_event,
    rename_model,
    replace_user,
    with_behaviour,
)
from shipworthy.protocols.outcomes import Reason
from shipworthy.protocols.questions import PATHS

if TYPE_CHECKING:
    from shipworthy.gateway.live import LiveArm

_MAY_REFUSE_INPUT: Final = frozenset({400, 413, 422})
_NOBODY: Final = "[unit]"
_EXPECTED_OUTPUT: Final = 256  # tokens reserved where nobody says how many there may be


def language_error(status: int, message: str, code: str = "") -> bytes:
    """An error in OpenAI's shape."""
    return error_body(message, type=error_type(status), code=code or None)


def _named(user: str | None) -> str | None:
    """Whom it is for; of a long name a digest, since others wait while a side is chosen by it."""
    if user is None or len(user) <= MAX_UNIT:
        return user
    return hashlib.sha256(user.encode()).hexdigest()


class LanguageAsk:
    """A request for a language model; see `Ask`. Raises InvalidMessage when it is none."""

    protocol: WireProtocol = "openai"
    open_ended = True
    __slots__ = ("_body", "finish", "operation", "output_bytes", "said", "stream", "unit")

    def __init__(self, operation: Operation, body: bytes) -> None:
        self._body = body
        self.operation: str = operation
        self.said = read_request(operation, body)
        self.stream = self.said.stream
        self.unit = _named(self.said.user)
        self.output_bytes = 0
        self.finish = ""

    @property
    def input_tokens(self) -> int:
        """About how many tokens the model reads."""
        return estimate_tokens(self.said.text_bytes)

    @property
    def output_tokens(self) -> int:
        """How many tokens it may write, or about how many it will."""
        if self.said.operation == "embeddings":
            return 0
        limit = self.said.max_tokens
        return self.said.n * (_EXPECTED_OUTPUT if limit is None else limit)

    def check(self, arm: LiveArm) -> None:
        """Whether the release does such a thing at all."""
        contract = arm.arm.contract
        allowed = contract.operations or OPERATIONS
        if contract.tensors:
            raise InvalidMessage("model: takes tensors; call it at /v2/models/{name}/infer")
        if self.said.operation not in allowed:
            raise InvalidMessage(
                f"model: does not do {self.said.operation}; it does {', '.join(allowed)}"
            )

    def outgoing(self, arm: LiveArm, call: Call) -> Outgoing:
        """The client's bytes, with the served name and what the release adds."""
        release = arm.arm
        body = for_upstream(
            self._body,
            self.said,
            served_model=release.served_model,
            behaviour=release.behaviour,
            want_usage=self.stream and call.counts_tokens(arm),
        )
        return Outgoing(PATHS[self.said.operation], body, headers=call.passed_on)

    def judged(self, reply: Reply, arm: LiveArm, call: Call) -> Reply:
        """The answer as its client gets it; no answer if there is none in it."""
        answered = read_answer(self.said.operation, reply.body)
        if answered.problem:
            error = answered.problem.startswith("error")
            reason = Reason.ERROR_EVENT if error else Reason.BROKEN
            return Reply(reason, reply.status, detail=answered.problem)
        given = answered.usage
        output = self.output_bytes = answered.output_text_bytes
        self.finish = answered.finish
        call.usage = Usage(
            input_tokens=given.input if given else self.read_by(arm),
            output_tokens=given.output if given else estimate_tokens(output),
            cached_tokens=given.cached if given else None,
            estimated=given is None,
            finish=answered.finish,
        )
        return msgspec.structs.replace(
            reply,
            body=rename_model(reply.body, arm.arm.served_model, call.live.plan.name),
            content_type=reply.headers.get(b"content-type", b"application/json"),
            extra=told_on(reply.headers),
        )

    def reader(self, arm: LiveArm, call: Call) -> EventReader:
        """What reads along with its stream."""
        return _Reader(self, arm, call)

    def kept(self) -> bytes:
        """The request with `user` replaced: of units only pseudonyms are written."""
        if self.said.user is None:
            return self._body
        return replace_user(self._body, _NOBODY)

    def features(self) -> Features:
        """What can be told without reading the text."""
        said = self.said
        return features_of_text(
            messages=said.messages,
            input_bytes=said.text_bytes,
            output_bytes=self.output_bytes,
            tools=int(said.tools),
            finish=self.finish,
        )

    def refusal(self, reply: Reply) -> Reply | None:
        """What the server says of an input, word for word."""
        if reply.reason is not Reason.REFUSED or reply.status not in _MAY_REFUSE_INPUT:
            return None
        if not reply.body:
            return None
        kind = reply.headers.get(b"content-type", b"application/json")
        return msgspec.structs.replace(reply, content_type=kind, extra=told_on(reply.headers))

    def read_by(self, arm: LiveArm) -> int:
        """About how many tokens an arm reads, with what its release adds."""
        said = with_behaviour(self.said, arm.arm.behaviour)
        return estimate_tokens(said.text_bytes)


class _Reader:
    """Reads along with a stream; see `EventReader`."""

    def __init__(self, ask: LanguageAsk, arm: LiveArm, call: Call) -> None:
        asked = call.counts_tokens(arm) and not ask.said.include_usage
        self.tells_usage = not asked  # by us: then it is not the client's to see
        self._reader = StreamReader(ask.said.operation)
        self._ask = ask
        self._arm = arm
        self._served = arm.arm.served_model
        self._name = call.live.plan.name
        self.see = self._reader.see

    @property
    def pieces(self) -> int:
        """Events with content so far."""
        return self._reader.content_events

    @property
    def error(self) -> str:
        """What an error event said."""
        return self._reader.error

    @property
    def broken_off(self) -> bool:
        """Whether the stream would end too early if it ended now."""
        return self._reader.broken_off

    def renamed(self, event: bytes) -> bytes:
        """The event under the name that the client called."""
        if self._served == self._name:
            return event
        return rename_event(event, self._served, self._name)

    def usage(self) -> Usage:
        """What was used so far."""
        reader, given = self._reader, self._reader.usage
        self._ask.output_bytes, self._ask.finish = reader.output_text_bytes, reader.finish
        if given is not None:
            return Usage(given.input, given.output, given.cached, finish=reader.finish)
        return Usage(
            self._ask.read_by(self._arm),
            max(reader.content_events, estimate_tokens(reader.output_text_bytes)),
            estimated=True,
            finish=reader.finish,
        )

    def error_event(self, text: str) -> bytes:
        """How the protocol tells of an error amid a stream."""
        return error_event(text, "server_error", None)
