"""What a request for a language model says that a gateway has to know."""

from __future__ import annotations

from typing import Annotated, Any, Final

import msgspec
from msgspec import Meta, Raw

from shipworthy.domain.contract import Operation
from shipworthy.protocols.messages import InvalidMessage, decoded
from shipworthy.protocols.openai.text import ABSENT, MOST, given, items, length

BYTES_PER_TOKEN: Final = 4
"""What a token stands for in English text, by OpenAI's own rule of thumb."""


class OpenAIRequest(msgspec.Struct, frozen=True, gc=False):
    """What a request says that a gateway has to know.

    `messages` counts the messages, prompts or inputs. `text_bytes` is the size of the text that the
    model reads, tools included and pictures not, as the JSON has it; token ids count as their text
    would. `tools` tells whether the client brings its own, `include_usage` whether it wants the
    usage at the end of a stream. `max_tokens` is None where the client sets no limit.
    """

    operation: Operation
    model: str
    stream: bool
    include_usage: bool
    user: str | None
    n: int
    max_tokens: int | None
    messages: int
    text_bytes: int
    tools: bool


class _StreamOptions(msgspec.Struct, gc=False):
    include_usage: bool | None = None


class _Message(msgspec.Struct, gc=False):
    content: Raw = ABSENT
    tool_calls: Raw = ABSENT


class _Asked(msgspec.Struct, gc=False):
    """What all operations may say."""

    model: str | None = None
    stream: bool | None = None
    stream_options: _StreamOptions | None = None
    user: str | None = None
    n: Annotated[int, Meta(ge=1, le=2**31)] | None = None
    max_tokens: Annotated[int, Meta(le=2**53)] | None = None
    max_completion_tokens: Annotated[int, Meta(le=2**53)] | None = None
    tools: Raw = ABSENT
    functions: Raw = ABSENT


class _Chat(_Asked, gc=False):
    messages: list[_Message] | None = None

    def sizes(self, most: int) -> tuple[int, int]:
        """Number and size of what the model is given to read, which is `most` at most."""
        if not self.messages:
            missing = "missing" if self.messages is None else "empty"
            raise InvalidMessage(f"messages: {missing}; send at least one message")
        if len(self.messages) > MOST:
            return len(self.messages), most
        size = 0
        for message in self.messages:
            size += length(message.content) + len(message.tool_calls)
        return len(self.messages), size


class _Completion(_Asked, gc=False):
    prompt: Raw = ABSENT

    def sizes(self, most: int) -> tuple[int, int]:
        """Number and size of what the model is given to read, which is `most` at most."""
        if not self.prompt:
            raise InvalidMessage("prompt: missing; send the text that is to be completed")
        return _sizes("prompt", self.prompt, most)


class _Embedding(_Asked, gc=False):
    input: Raw = ABSENT

    def sizes(self, most: int) -> tuple[int, int]:
        """Number and size of what the model is given to read, which is `most` at most."""
        if not given(self.input):
            raise InvalidMessage("input: missing; send the text that is to be embedded")
        return _sizes("input", self.input, most)


_requests: Final[dict[Operation, msgspec.json.Decoder[Any]]] = {
    "chat": msgspec.json.Decoder(_Chat),
    "completions": msgspec.json.Decoder(_Completion),
    "embeddings": msgspec.json.Decoder(_Embedding),
}


def read_request(operation: Operation, body: bytes) -> OpenAIRequest:
    """What the request says.

    MalformedMessage when it is not JSON, or a field that is read has a wrong type; InvalidMessage
    when one is missing. Whatever else there is stays the server's business.
    """
    asked: _Chat | _Completion | _Embedding = decoded(_requests[operation], body)
    if not asked.model:
        raise InvalidMessage("model: missing; name the model to ask")
    messages, size = asked.sizes(len(body))
    tools = given(asked.tools) or given(asked.functions)
    if tools:
        size += len(asked.tools) + len(asked.functions)
    options = asked.stream_options
    limit = asked.max_completion_tokens
    if limit is None:
        limit = asked.max_tokens
    return OpenAIRequest(
        operation,
        asked.model,
        operation != "embeddings" and asked.stream is True,
        options is not None and options.include_usage is True,
        asked.user or None,
        asked.n or 1,
        limit if limit is None or limit >= 0 else None,  # some say -1 for as much as there is
        messages,
        size,
        tools,
    )


def estimate_tokens(text_bytes: int) -> int:
    """About how many tokens so much text is, where no server has counted them.

    Roughly four bytes of UTF-8 are one token. That is about right for English; code and most other
    languages take more tokens, up to twice as many.
    """
    return -(-text_bytes // BYTES_PER_TOKEN)


def _sizes(field: str, texts: Raw, most: int) -> tuple[int, int]:
    """Number and size of prompts or inputs: a text, token ids, or several of either."""
    content = bytes(texts)
    if content == b"null":
        return 1, 0
    if content.startswith(b'"'):
        return 1, len(content) - 2
    if not content.startswith(b"["):
        raise InvalidMessage(f"{field}: expected a text or an array, got neither")
    first = content[1:].lstrip()[:1]
    if first in b"-0123456789":
        return 1, min(most, _ids(content))
    several = items.decode(content)
    if first == b"[":
        return len(several), min(most, _ids(content))
    if first == b'"':
        return len(several), sum(map(len, several)) - 2 * len(several)
    return len(several), 0  # pictures and the like


def _ids(content: bytes) -> int:
    """What token ids come to, in one array or several."""
    return (content.count(b",") + 1) * BYTES_PER_TOKEN
