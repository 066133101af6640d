"""One field of a JSON object replaced, and everything else byte for byte as it came."""

from __future__ import annotations

import re

import msgspec

_encode = msgspec.json.Encoder().encode
_MOST = 200  # fields: more are passed on without their spaces, lest others wait
_KEY = re.compile(rb"[ \t\n\r]*[{,][ \t\n\r]*")
_STRING = re.compile(rb'"(?:[^"\\]++|\\.)*+"')
_VALUE = re.compile(rb"[ \t\n\r]*:[ \t\n\r]*")
_CLOSE = re.compile(rb"[ \t\n\r]*\}[ \t\n\r]*")


def replaced(body: bytes, fields: dict[str, msgspec.Raw], name: str, value: bytes) -> bytes:
    """The object with this value under `name`.

    `fields` is what `body` decodes to, and holds `name`. A key that the body has twice is left in
    once, with the value that counts, so that nobody downstream can take the other.
    """
    changed = {**fields, name: msgspec.Raw(value)}
    encoded = _encode(changed)
    before = len(fields[name])
    spaces = len(body) - before - (len(encoded) - len(value))
    if not spaces or len(fields) > _MOST:
        return encoded  # without spaces or escapes there is one way only to write it
    if spaces == 2 * len(fields) - 1 and _spaced(fields) == body:
        return _spaced(changed)
    at = _place(body, fields, name)
    if at is None:
        return encoded
    return b"%b%b%b" % (body[:at], value, body[at + before :])


def _spaced(fields: dict[str, msgspec.Raw]) -> bytes:
    """The object as Python's json module writes it, which is worth not searching through."""
    pairs = [b"%b: %b" % (_encode(name), bytes(value)) for name, value in fields.items()]
    return b"{%b}" % b", ".join(pairs)


def _place(body: bytes, fields: dict[str, msgspec.Raw], name: str) -> int | None:
    """Where the value begins; None when the body does not hold each of these fields just once.

    Each step must find what the field is known to hold, so this can't be led astray by what the
    values hold; a key may be written in any way.
    """
    at, place = 0, None
    for key, raw in fields.items():
        value = bytes(raw)
        gap = _KEY.match(body, at)
        written = _STRING.match(body, gap.end()) if gap else None
        colon = _VALUE.match(body, written.end()) if written else None
        if colon is None or not body.startswith(value, colon.end()):
            return None
        at = colon.end() + len(value)
        if key == name:
            place = colon.end()
    return place if _CLOSE.fullmatch(body, at) else None
