"""How much text there is inside messages, without decoding any of it."""

from __future__ import annotations

import msgspec
from msgspec import Raw

ABSENT = Raw()
"""What a field holds that the message does not."""

MOST = 2_000
"""Messages or parts of one: more are not looked into one by one, lest others wait."""

_QUOTE, _BRACKET, _BRACE = b'"[{'


class _Part(msgspec.Struct, gc=False):
    """A piece of a message's content; pictures, sound and files have no text."""

    text: Raw = ABSENT
    refusal: Raw = ABSENT


_part = msgspec.json.Decoder(_Part)
items = msgspec.json.Decoder(list[Raw])


def length(value: Raw) -> int:
    """The bytes of a string, or of the text in a list of content parts, as JSON writes them.

    Whatever else it may be, it has no text.
    """
    if len(value) <= 2:
        return 0
    text = bytes(value)
    if text[0] == _QUOTE:
        return len(text) - 2
    if text[0] != _BRACKET:
        return 0
    parts = items.decode(text)
    if len(parts) > MOST:
        return len(text)
    return sum(map(_part_length, parts))


def _part_length(value: Raw) -> int:
    if bytes(value)[0] != _BRACE:
        return string_length(value)
    part = _part.decode(value)
    return string_length(part.text) + string_length(part.refusal)


def string_length(value: Raw) -> int:
    """The bytes of a string; nothing else has any."""
    return len(value) - 2 if len(value) > 2 and bytes(value)[0] == _QUOTE else 0


def given(value: Raw | None) -> bool:
    """Whether a field is there and not null."""
    return value is not None and len(value) > 0 and bytes(value) != b"null"
