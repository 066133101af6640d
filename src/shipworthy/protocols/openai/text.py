"""How much text there is inside messages, without decoding any of it."""

from __future__ import annotations

import msgspec
from msgspec import Raw

ABSENT = Raw()
"""What a field holds that the message does not."""

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
    if text[0] == _BRACKET:
        return sum(map(length, items.decode(text)))
    if text[0] == _BRACE:
        part = _part.decode(text)
        return length(part.text) + length(part.refusal)
    return 0


def given(value: Raw | None) -> bool:
    """Whether a field is there and not null."""
    return value is not None and len(value) > 0 and bytes(value) != b"null"
