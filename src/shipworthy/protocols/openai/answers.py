"""What an answer of a language model says that a gateway has to know, in one piece or streamed."""

from __future__ import annotations

from collections.abc import Iterable
from enum import IntEnum
from typing import Any

import msgspec
from msgspec import Raw

from shipworthy.domain.contract import Operation
from shipworthy.protocols.events import parsed
from shipworthy.protocols.messages import MalformedMessage, decoded
from shipworthy.protocols.openai.documents import error_text
from shipworthy.protocols.openai.passing import rename_event
from shipworthy.protocols.openai.text import ABSENT, given, length

_encode = msgspec.json.Encoder().encode
_SENSIBLE = 2**40  # no call uses more tokens
_MAX_FINISH = 200  # a reason is a word, but it is the server that says it


class Usage(msgspec.Struct, frozen=True, gc=False):
    """Tokens as the server counted them; `cached` are those of the input that it had met before."""

    input: int
    output: int
    cached: int | None = None


class Answered(msgspec.Struct, frozen=True, gc=False):
    """What an answer says that a gateway has to know.

    `finish` is the first choice's reason, or the different ones of several with commas between.
    `problem` says why this is no valid answer; empty when it is one.
    """

    usage: Usage | None = None
    finish: str = ""
    output_text_bytes: int = 0
    tool_calls: bool = False
    problem: str = ""


class _Function(msgspec.Struct, gc=False):
    name: Raw = ABSENT
    arguments: Raw = ABSENT


class _ToolCall(msgspec.Struct, gc=False):
    function: _Function | None = None


class _Said(msgspec.Struct, gc=False):
    """A message, or a piece of one."""

    content: Raw = ABSENT
    reasoning_content: Raw = ABSENT
    reasoning: Raw = ABSENT
    refusal: Raw = ABSENT
    tool_calls: list[_ToolCall] | None = None
    function_call: _Function | None = None
    audio: Raw = ABSENT


class _Choice(msgspec.Struct, gc=False):
    index: int = 0
    message: _Said | None = None
    delta: _Said | None = None
    text: Raw = ABSENT
    finish_reason: str | None = None


class _Reply(msgspec.Struct, gc=False):
    """An answer to chat or completions, or a piece of one."""

    choices: list[_Choice] | None = None
    usage: Raw = ABSENT
    error: Raw = ABSENT
    object: str | None = None
    model: Any = None


class _Vector(msgspec.Struct, gc=False):
    embedding: Raw


class _Vectors(msgspec.Struct, gc=False):
    data: list[_Vector] | None = None
    usage: Raw = ABSENT
    error: Raw = ABSENT


class _CachedTokens(msgspec.Struct, gc=False):
    cached_tokens: int | None = None


class _Usage(msgspec.Struct, gc=False):
    prompt_tokens: int
    completion_tokens: int | None = None
    prompt_tokens_details: _CachedTokens | None = None


_replies = msgspec.json.Decoder(_Reply)
_vectors = msgspec.json.Decoder(_Vectors)
_usages = msgspec.json.Decoder(_Usage)


def read_answer(operation: Operation, body: bytes) -> Answered:
    """What an answer with status 200 says, or why it is none."""
    try:
        if operation == "embeddings":
            return _read_vectors(decoded(_vectors, body), body)
        reply = decoded(_replies, body)
    except MalformedMessage as problem:
        return Answered(problem=str(problem))
    if given(reply.error) or reply.object == "error":
        return Answered(problem=f"error: {error_text(body)}")
    if not reply.choices:
        return Answered(problem="choices: missing" if reply.choices is None else "choices: empty")
    size, tools = 0, False
    for index, choice in enumerate(reply.choices):
        said = choice.message
        if said is not None:
            size += _said(said)
            tools = tools or bool(said.tool_calls) or said.function_call is not None
        elif operation == "chat" or not given(choice.text):
            field = "message" if operation == "chat" else "text"
            return Answered(problem=f"choices[{index}].{field}: missing")
        size += length(choice.text)
    if len(reply.choices) == 1:  # nearly always
        finish = (reply.choices[0].finish_reason or "")[:_MAX_FINISH]
    else:
        finish = _joined(choice.finish_reason for choice in reply.choices)
    return Answered(_usage(reply.usage), finish, size, tools)


def _read_vectors(vectors: _Vectors, body: bytes) -> Answered:
    if given(vectors.error):
        return Answered(problem=f"error: {error_text(body)}")
    if not vectors.data:
        return Answered(problem="data: missing" if vectors.data is None else "data: empty")
    return Answered(_usage(vectors.usage))


def _said(said: _Said) -> int:
    """How many bytes of text it comes to."""
    size = length(said.content) + length(said.refusal)
    size += length(said.reasoning_content) or length(said.reasoning)  # two names of one thing
    if said.tool_calls:
        for call in said.tool_calls:
            size += _called(call.function)
    return size + _called(said.function_call)


def _called(function: _Function | None) -> int:
    if function is None:
        return 0
    return length(function.name) + length(function.arguments)


def _usage(raw: Raw) -> Usage | None:
    """The server's count; None where it gives none or one that makes no sense."""
    if len(raw) <= 4:
        return None
    try:
        usage = _usages.decode(raw)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None
    output = usage.completion_tokens or 0
    details = usage.prompt_tokens_details
    cached = None if details is None else details.cached_tokens
    if not 0 <= usage.prompt_tokens < _SENSIBLE or not 0 <= output < _SENSIBLE:
        return None
    if cached is not None and not 0 <= cached <= usage.prompt_tokens:
        cached = None
    return Usage(usage.prompt_tokens, output, cached)


def _joined(reasons: Iterable[str | None]) -> str:
    different = dict.fromkeys(reason for reason in reasons if reason)
    return ",".join(different)[:_MAX_FINISH]


# --- streams ----------------------------------------------------------------------------------


class Seen(IntEnum):
    """What an event of a stream is.

    CONTENT is something to read: from the first on, no other release can answer in this one's
    place. USAGE is the count at the end, dropped when the client did not ask for it. GARBAGE is
    data that is not the protocol's. OTHER is what there is besides: roles, reasons, keep-alives.
    """

    OTHER = 0
    CONTENT = 1
    USAGE = 2
    ERROR = 3
    DONE = 4
    GARBAGE = 5


class StreamReader:
    """Reads along while a stream of chat or completions passes.

    `error` is what an error event said, or what was wrong with one that is no event of the
    protocol.
    """

    __slots__ = (
        "_chat",
        "_finishes",
        "_highest",
        "_model",
        "_names",
        "content_events",
        "done",
        "error",
        "output_text_bytes",
        "tool_calls",
        "usage",
    )

    def __init__(self, operation: Operation) -> None:
        self._chat = operation == "chat"
        self.usage: Usage | None = None
        self.output_text_bytes = 0
        self.content_events = 0
        self.tool_calls = False
        self.done = False
        self.error = ""
        self._finishes: dict[int, str] = {}
        self._highest = 0
        self._model: object = None  # which the event seen last names
        self._names: tuple[object, str, bytes, bytes] = (None, "", b"", b"")

    @property
    def finish(self) -> str:
        """As in `Answered`."""
        return _joined(reason for _, reason in sorted(self._finishes.items()))

    @property
    def broken_off(self) -> bool:
        """Whether the stream would end too early if it ended now."""
        return not self.done and len(self._finishes) <= self._highest

    def see(self, event: bytes) -> Seen:
        """What this event is; it is counted in."""
        name, data = parsed(event)
        self._model = None
        if data is None:
            return Seen.OTHER
        if data == b"[DONE]":
            self.done = True
            return Seen.DONE
        try:
            chunk = decoded(_replies, data)
        except MalformedMessage as problem:
            self.error = error_text(data) or str(problem)
            return Seen.ERROR if name == b"error" else Seen.GARBAGE
        if name == b"error" or given(chunk.error) or chunk.object == "error":
            self.error = error_text(data)
            return Seen.ERROR
        self._model = chunk.model
        usage = _usage(chunk.usage)
        if usage is not None:
            self.usage = usage
        if not chunk.choices:
            return Seen.OTHER if usage is None else Seen.USAGE
        return self._read(chunk.choices)

    def renamed(self, event: bytes, served_model: str, model: str) -> bytes:
        """The event seen last as `rename_event` has it, for less."""
        named = self._model
        if not isinstance(named, str) or model in (served_model, named):
            return event
        if event.count(b'"model"') == 1 and b"\\u006" not in event:  # no other key can be meant
            if self._names[:2] != (named, model):
                key = b'"model":'
                self._names = (named, model, key + _encode(named), key + _encode(model))
            changed = event.replace(self._names[2], self._names[3])
            if changed != event:
                return changed
        return rename_event(event, served_model, model)

    def _read(self, choices: list[_Choice]) -> Seen:
        size, content = 0, False
        for choice in choices:
            index = choice.index
            self._highest = max(self._highest, index)
            if choice.finish_reason:
                self._finishes[index] = choice.finish_reason
            said = choice.delta if self._chat else None
            if said is None:
                size += length(choice.text)
                continue
            size += _said(said)
            if said.tool_calls or said.function_call is not None:
                self.tool_calls = content = True
            elif len(said.audio) > 4:
                content = True
        if not size and not content:
            return Seen.OTHER
        self.output_text_bytes += size
        self.content_events += 1
        return Seen.CONTENT
