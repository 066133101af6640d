"""Text inside messages: what shapes it has, and how long it is."""

from __future__ import annotations

import msgspec


class Part(msgspec.Struct, gc=False):
    """A piece of a message's content; pictures, sound and files have no text."""

    text: str | None = None
    refusal: str | None = None


Content = str | list[Part | str] | None


def length(content: Content) -> int:
    """The size of the text in UTF-8."""
    if not content:
        return 0
    if isinstance(content, str):
        return len(content) if content.isascii() else len(content.encode())
    size = 0
    for part in content:
        if isinstance(part, str):
            size += length(part)
        else:
            size += length(part.text) + length(part.refusal)
    return size


def given(value: msgspec.Raw | None) -> bool:
    """Whether a field is there and not null."""
    return value is not None and len(value) > 0 and bytes(value) != b"null"
