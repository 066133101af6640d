"""What the gateway changes in bodies that pass: the model's name, and what a release adds."""

from __future__ import annotations

import msgspec
from msgspec import Raw

from shipworthy.domain.plan import Behaviour
from shipworthy.protocols.events import event as sent
from shipworthy.protocols.events import parsed
from shipworthy.protocols.messages import InvalidMessage
from shipworthy.protocols.openai.requests import OpenAIRequest
from shipworthy.protocols.openai.text import given
from shipworthy.protocols.splice import replaced

_encode = msgspec.json.Encoder().encode
_fields = msgspec.json.Decoder(dict[str, Raw])
_texts = msgspec.json.Decoder(list[str])
_NULL = b"null"


def for_upstream(
    body: bytes,
    request: OpenAIRequest,
    *,
    served_model: str,
    behaviour: Behaviour | None,
    want_usage: bool,
) -> bytes:
    """The body of `request` as it is sent to a release that its server knows as `served_model`.

    With neither a behaviour nor usage to add, all but the model's name is byte for byte the
    client's. InvalidMessage when the behaviour can't be applied to this request.
    """
    fields = _fields.decode(body)
    model = _encode(served_model)
    usage = want_usage and request.stream and not request.include_usage
    if request.operation == "embeddings":
        behaviour = None  # there is nothing to say to the model
    if behaviour is None and not usage:
        return replaced(body, fields, "model", model)
    if behaviour is not None:
        _add_sampling(fields, behaviour)
        if request.operation == "chat":
            _add_to_chat(fields, request, behaviour)
        elif behaviour.system:
            fields["prompt"] = _behind(behaviour.system, fields["prompt"])
    if usage:
        fields["stream_options"] = _with_usage(fields.get("stream_options"))
    fields["model"] = Raw(model)
    return _encode(fields)


def with_behaviour(request: OpenAIRequest, behaviour: Behaviour | None) -> OpenAIRequest:
    """What the request comes to once a release has added to it: for limits and estimates."""
    if behaviour is None or request.operation == "embeddings":
        return request
    size = request.text_bytes
    if behaviour.system:
        copies = request.messages if request.operation == "completions" else 1
        size += copies * len(_encode(behaviour.system))
    if behaviour.tools and request.operation == "chat" and not request.tools:
        size += len(_encode(behaviour.tools))
    limit, n = request.max_tokens, request.n
    for name in _LIMITS:
        said = behaviour.sampling.get(name)
        if isinstance(said, int) and (behaviour.pinned or limit is None):
            limit = said
    said = behaviour.sampling.get("n")
    if isinstance(said, int) and (behaviour.pinned or n == 1):
        n = said
    return msgspec.structs.replace(request, text_bytes=size, max_tokens=limit, n=n)


_LIMITS = ("max_tokens", "max_completion_tokens")
"""Two names of one thing: what says one has no use for the other."""


def _add_sampling(fields: dict[str, Raw], behaviour: Behaviour) -> None:
    for name, value in behaviour.sampling.items():
        same = _LIMITS if name in _LIMITS else (name,)
        if behaviour.pinned:
            for other in same:
                fields.pop(other, None)
        elif any(given(fields.get(other)) for other in same):
            continue
        fields[name] = Raw(_encode(value))


def _add_to_chat(fields: dict[str, Raw], request: OpenAIRequest, behaviour: Behaviour) -> None:
    if behaviour.system:
        prompt = _encode({"role": "system", "content": behaviour.system})
        fields["messages"] = Raw(b"[%b,%b" % (prompt, bytes(fields["messages"])[1:]))
    if behaviour.tools and not request.tools:
        fields["tools"] = Raw(_encode(behaviour.tools))
        if behaviour.tool_choice is not None and not given(fields.get("tool_choice")):
            fields["tool_choice"] = Raw(_encode(behaviour.tool_choice))
    if behaviour.chat_template is not None:
        fields["chat_template"] = Raw(_encode(behaviour.chat_template))


def _behind(system: str, prompt: Raw) -> Raw:
    """The prompt, or each of several, with the release's own text before it."""
    text = bytes(prompt)
    head = _encode(system)[:-1]
    if text.startswith(b'"'):
        return Raw(head + text[1:])
    if text == _NULL:
        return Raw(_encode(system))
    try:
        prompts = _texts.decode(text)
    except msgspec.ValidationError:
        raise InvalidMessage(
            "prompt: this model puts a text of its own before the prompt, which token ids"
            " can't follow; send text"
        ) from None
    return Raw(_encode([Raw(head + bytes(_encode(prompt))[1:]) for prompt in prompts]))


def _with_usage(options: Raw | None) -> Raw:
    said = _fields.decode(options) if options is not None and given(options) else {}
    return Raw(_encode({**said, "include_usage": True}))


def replace_user(body: bytes, word: str) -> bytes:
    """A request that was read, with another word for whom it is for."""
    fields = _fields.decode(body)
    return replaced(body, fields, "user", _encode(word)) if "user" in fields else body


def rename_model(data: bytes, served_model: str, model: str) -> bytes:
    """An answer, or an event's data, under the name that the client called.

    The same object when there is nothing to change: the names are equal, or it names no model.
    """
    if served_model == model:
        return data
    try:
        fields = _fields.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return data
    if "model" not in fields or bytes(fields["model"])[:1] != b'"':
        return data
    return replaced(data, fields, "model", _encode(model))


def rename_event(event: bytes, served_model: str, model: str) -> bytes:
    """A whole event of a stream with its data renamed so; all else in it stays as it is."""
    if served_model == model:
        return event
    name, data = parsed(event)
    if data is None:
        return event
    renamed = rename_model(data, served_model, model)
    if renamed is data:
        return event
    before, found, after = event.partition(data)
    if found:
        return b"%b%b%b" % (before, renamed, after)
    return sent(renamed, name or None)  # its data was on several lines
