"""Replacing what finders find in a text as it was sent: JSON, events, or anything else.

JSON is not parsed for this. Its escapes are resolved, however deep they are nested (a tool call's
arguments are JSON inside a string), and each find is replaced where it stood, from the beginning of
one character or escape to the end of another. So all else stays as it was, JSON stays JSON, and a
text that is cut or broken is searched like any other.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from shipworthy.domain.redaction.finders import QUOTES, Finder

_ESCAPE = re.compile(r"(\\+)(u[0-9a-fA-F]{4}|[\"/bfnrt])?")
_IN_NUMBERS = "-+.eE0123456789"
_NUMBER = re.compile(r"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][-+]?[0-9]+)?")
_SPACE = " \t\r\n"


class Edit(NamedTuple):
    """Characters from `start` to `end` become `text`."""

    start: int
    end: int
    text: str


class _Plain:
    """A text with its escapes resolved, each to one character."""

    def __init__(self, raw: str) -> None:
        self._raw = raw
        self._plain_points, self._raw_points = [0], [0]
        self.text = self._resolved() if "\\" in raw else raw

    def raw_at(self, plain: int) -> int:
        """Where in the text as it was sent a character stands."""
        nearest = bisect_right(self._plain_points, plain) - 1
        return self._raw_points[nearest] + plain - self._plain_points[nearest]

    def raw(self, start: int, end: int) -> str:
        """How characters were sent."""
        return self._raw[self.raw_at(start) : self.raw_at(end)]

    def _resolved(self) -> str:
        raw = self._raw
        nested = '\\"' in raw
        pieces: list[str] = []
        length = after = 0
        for found in _ESCAPE.finditer(raw):
            start, end = found.span()
            character = _resolved(found, nested=nested)
            if character is None:  # backslashes before what is no escape
                character, end = "\\", found.end(1)
            pieces += (raw[after:start], character)
            length += start - after + 1
            after = end
            self._plain_points.append(length)
            self._raw_points.append(end)
        pieces.append(raw[after:])
        return "".join(pieces)


def _resolved(escape: re.Match[str], *, nested: bool) -> str | None:
    backslashes, what = escape.groups()
    if what is None:
        return None
    if what[0] == "u":
        character = chr(int(what[1:], 16))
        return _quote(backslashes) if character == '"' else character
    if what == "/":
        return "/"
    # An even number of them stands for backslashes; in a string inside a string also for an escape.
    if len(backslashes) % 2 == 0 and (what == '"' or not nested):
        return None
    return _quote(backslashes) if what == '"' else "\n"


def _quote(backslashes: str) -> str:
    """A quote in a string takes one backslash; inside a string in that one three, then seven."""
    return QUOTES[min(len(backslashes).bit_length(), len(QUOTES)) - 1]


def edits_of(raw: str, finders: Iterable[tuple[str, Finder]]) -> list[Edit]:
    """What is to be replaced by what, in order and apart from each other."""
    plain = _Plain(raw)
    found = [(*span, name) for name, find in finders for span in find(plain.text)]
    if not found:
        return []
    edits: list[Edit] = []
    quotes = counted = 0
    for start, end, name in _merged(found):
        quotes += plain.text.count('"', counted, start)
        counted = start
        edits.append(_edit(plain, start, end, f"[{name}]", inside=quotes % 2 == 1))
    return edits


def edited(raw: str, edits: Sequence[Edit]) -> str:
    """The text with these edits."""
    pieces: list[str] = []
    after = 0
    for start, end, text in edits:
        pieces += (raw[after:start], text)
        after = end
    pieces.append(raw[after:])
    return "".join(pieces)


def _merged(found: list[tuple[int, int, str]]) -> list[tuple[int, int, str]]:
    """Finds that overlap as one, called as the longest of them is."""
    found.sort(key=lambda each: each[0])
    merged = [found[0]]
    longest = found[0]
    for each in found[1:]:
        start, end, name = merged[-1]
        if each[0] >= end:
            merged.append(each)
            longest = each
            continue
        if each[1] - each[0] > longest[1] - longest[0]:
            longest, name = each, each[2]
        merged[-1] = (start, max(end, each[1]), name)
    return merged


def _edit(plain: _Plain, start: int, end: int, text: str, *, inside: bool) -> Edit:
    quote = ""
    if not inside:
        number = _number_around(plain.text, start, end)
        if number:
            (start, end), quote = number, '"'
    elif plain.text[start - 1 : start].isspace() or plain.text[start - 1 : start] == ":":
        quote = _quote_of_key(plain, start, end)
    return Edit(plain.raw_at(start), plain.raw_at(end), f"{quote}{text}{quote}")


def _number_around(text: str, start: int, end: int) -> tuple[int, int] | None:
    """The JSON number that a find outside of strings is in."""
    while start > 0 and text[start - 1] in _IN_NUMBERS:
        start -= 1
    while end < len(text) and text[end] in _IN_NUMBERS:
        end += 1
    before = _neighbour(text, start - 1, -1)
    after = _neighbour(text, end, 1)
    if before in {"", ":", ",", "["} and after in {"", ",", "}", "]"}:
        return (start, end) if _NUMBER.fullmatch(text, start, end) else None
    return None


def _quote_of_key(plain: _Plain, start: int, end: int) -> str:
    """How strings are quoted where a find is the number after a key, in JSON inside a string."""
    text = plain.text
    at = start - 1
    while at > 0 and text[at] in _SPACE:
        at -= 1
    if text[at] != ":" or text[at - 1] not in QUOTES or _neighbour(text, end, 1) not in {",", "}"}:
        return ""
    return plain.raw(at - 1, at)


def _neighbour(text: str, at: int, step: int) -> str:
    while 0 <= at < len(text) and text[at] in _SPACE:
        at += step
    return text[at] if 0 <= at < len(text) else ""
