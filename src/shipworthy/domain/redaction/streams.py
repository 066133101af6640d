"""The text of a stream, which comes in pieces: a word may begin in one event and end in another."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from typing import Any, cast

import msgspec

from shipworthy.domain.redaction.texts import Edit

_DATA = b"data:"
_FIRST = (_DATA, b"event:", b"id:", b"retry:", b":")
_NO_TEXT = frozenset({"id", "role", "type", "finish_reason", "name"})
_Path = tuple[str | int, ...]


def is_stream(body: bytes) -> bool:
    """Whether it looks like server-sent events."""
    return body[:16].lstrip().startswith(_FIRST)


def each_event(body: bytes, redact: Callable[[bytes], tuple[bytes, int]]) -> tuple[bytes, int]:
    """The stream with the data of each event redacted by itself, and the number of finds."""
    total = 0
    lines = body.split(b"\n")
    for at, line in enumerate(lines):
        if line.startswith(_DATA):
            data, count = redact(line[len(_DATA) :].strip())
            if count:
                total += count
                lines[at] = b"data: " + data
    return b"\n".join(lines), total


def across_events(body: bytes, find: Callable[[str], Sequence[Edit]]) -> tuple[bytes, int]:
    """The stream with what is found in the joined text of its pieces replaced.

    The replacement takes the place of a find's first piece; the others lose their part of it.
    """
    lines = body.split(b"\n")
    events: dict[int, Any] = {}
    texts: dict[_Path, list[tuple[int, Any, str | int]]] = {}
    for at, line in enumerate(lines):
        if line.startswith(_DATA):
            event = _decoded(line[len(_DATA) :])
            if isinstance(event, dict):
                events[at] = event
                choices = cast("dict[str, Any]", event).get("choices")
                for path, holder, key in _strings(choices, ()):
                    texts.setdefault(path, []).append((at, holder, key))
    changed: set[int] = set()
    total = 0
    for pieces in texts.values():
        if len(pieces) > 1:
            edits = find("".join(holder[key] for _, holder, key in pieces))
            total += len(edits)
            changed.update(_apply(pieces, edits))
    for at in changed:
        lines[at] = b"data: " + msgspec.json.encode(events[at])
    return b"\n".join(lines), total


def _decoded(data: bytes) -> Any:
    try:
        return msgspec.json.decode(data)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return None  # `[DONE]`, or what is searched as text


def _strings(value: Any, path: _Path) -> Generator[tuple[_Path, Any, str | int]]:
    """Where the texts are, and a path by which pieces of the same text know each other."""
    if isinstance(value, dict):
        fields = cast("dict[str, Any]", value)
        for name, inner in fields.items():
            if isinstance(inner, str):
                if name not in _NO_TEXT:
                    yield (*path, name), fields, name
            elif inner:
                yield from _strings(inner, (*path, name))
    elif isinstance(value, list):
        items = cast("list[Any]", value)
        for at, item in enumerate(items):
            if isinstance(item, str):
                yield (*path, "*"), items, at
            elif isinstance(item, dict):
                index = cast("dict[str, Any]", item).get("index", "*")
                yield from _strings(item, (*path, index))


def _apply(pieces: list[tuple[int, Any, str | int]], edits: Sequence[Edit]) -> Generator[int]:
    """Make the edits of the joined text in its pieces; the events that changed."""
    offset = 0
    first = 0
    for at, holder, key in pieces:
        text: str = holder[key]
        end = offset + len(text)
        while first < len(edits) and edits[first].end <= offset:
            first += 1
        made: list[str] = []
        position = offset
        for edit in edits[first:]:
            if edit.start >= end:
                break
            made.append(text[position - offset : max(edit.start, offset) - offset])
            if edit.start >= offset:
                made.append(edit.text)
            position = min(edit.end, end)
        if position > offset or made:
            made.append(text[position - offset :])
            holder[key] = "".join(made)
            yield at
        offset = end
