"""Replacing personal data and secrets in bodies, before anything of them is written.

    redactor = Redactor(("email", "card"), ("messages.content",))
    kept, replaced = redactor.redact(body, limit=16_384)

What the patterns find is replaced by what it was (`[email]`), the values of fields by `[redacted]`.
JSON stays JSON, and all else in it as it was sent. Of a stream of events the joined text of the
pieces is searched, and of JSON inside a string the text that it stands for.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from shipworthy.domain.redaction.checks import CHECKS, may_hide
from shipworthy.domain.redaction.fields import Fields
from shipworthy.domain.redaction.finders import FINDERS, Finder
from shipworthy.domain.redaction.streams import across_events, each_event, is_stream
from shipworthy.domain.redaction.texts import edited, edits_of

__all__ = ["PATTERNS", "Redactor"]

PATTERNS = tuple(FINDERS)
"""The names of the patterns that there are."""

_BEYOND = 4_096  # bytes after a limit that are searched too: what begins before it may end there
_PIECEWISE = b'"logprobs"'


class Redactor:
    """Patterns and fields, made ready for many bodies. False where there are none."""

    def __init__(self, patterns: tuple[str, ...], fields: tuple[str, ...]) -> None:
        """Raises ValueError for a pattern that there is not."""
        unknown = sorted(set(patterns) - FINDERS.keys())
        if unknown:
            message = f"there is no pattern {unknown[0]!r}; there are {', '.join(FINDERS)}"
            raise ValueError(message)
        self._finders = tuple((name, find) for name, find in FINDERS.items() if name in patterns)
        self._checks = tuple({check for name in patterns for check in CHECKS[name]})
        self._fields = Fields(fields) if fields else None

    def __bool__(self) -> bool:
        return bool(self._finders) or self._fields is not None

    def redact(self, body: bytes, limit: int | None = None) -> tuple[bytes, int]:
        """The body with what is asked for replaced, and the number of replacements.

        With a `limit` it is no longer than that: what lies behind the body's first `limit` bytes is
        left out, and hardly costs anything. Cut it in no other way: a find that is cut through
        isn't one any more.
        """
        replaced = 0
        stream = is_stream(body)
        if self._fields:
            body, replaced = _in_fields(self._fields, body, stream=stream)
        if not self._finders:
            return body[:limit], replaced
        found, count = self._in_text(body, limit, stream=stream)
        if count and _PIECEWISE in found:
            # The same text once more, a token at a time and in bytes, which nobody can search.
            body, again = _in_fields(_LOGPROBS, body, stream=stream)
            if again:
                found, count = self._in_text(body, limit, stream=stream)
                count += again
        return found, replaced + count

    def _in_text(self, body: bytes, limit: int | None, *, stream: bool) -> tuple[bytes, int]:
        count = 0
        if stream:
            if limit is not None:
                end = body.find(b"\n", limit + _BEYOND)
                body = body if end < 0 else body[:end]
            body, count = across_events(body, partial(edits_of, finders=self._finders))
        kept = len(body) if limit is None else limit
        searched = body if kept + _BEYOND >= len(body) else body[: kept + _BEYOND]
        finders = self._promising(searched)
        if not finders:
            return body[:limit], count
        text = searched.decode("utf-8", "surrogateescape")
        edits = edits_of(text, finders)
        if kept < len(body):
            end = len(body[:kept].decode("utf-8", "ignore"))
            edits = [edit for edit in edits if edit.start < end]
            text = text[: max(end, edits[-1].end if edits else 0)]
        if edits:
            body = edited(text, edits).encode("utf-8", "surrogateescape")
        return body[:limit], count + len(edits)

    def _promising(self, body: bytes) -> Sequence[tuple[str, Finder]]:
        """The finders that may find something."""
        if may_hide(body):
            return self._finders
        held = [check for check in self._checks if check(body)]
        if not held:
            return ()
        return [each for each in self._finders if any(one in held for one in CHECKS[each[0]])]


def _in_fields(fields: Fields, body: bytes, *, stream: bool) -> tuple[bytes, int]:
    return each_event(body, fields.redact) if stream else fields.redact(body)


_LOGPROBS = Fields(("choices.logprobs",))
