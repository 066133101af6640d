"""Whether a body may hold something at all: a few microseconds, before anything is decoded.

A check may be wrong in saying yes, never in saying no.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Final

Check = Callable[[bytes], bool]

_LETTERS = bytes(range(65, 91)) + bytes(range(97, 123))
_DIGITS = b"0123456789"
_NUMBER = re.compile(rb'[0-9][^A-Za-z"]{6}')
_WORDS = bytes(97 if each in _LETTERS + _DIGITS + b"_-" else 32 for each in range(256))
_LONG_WORD = b"a" * 15
_IP6 = re.compile(rb":[0-9A-Fa-f]{0,4}:")
_NAMES = re.compile(rb"pass|pwd|secret|credential|key|bearer|basic|-----begin")
_TOKEN = re.compile(rb"token[^s]")
_ESCAPED = re.compile(rb"\\u(?:00[2-7aA]|20(?:1[013]|2[fF]))")


def may_hide(body: bytes) -> bool:
    """Whether characters that matter to the other checks may be written as escapes."""
    return b"\\u" in body and _ESCAPED.search(body) is not None


def _at_sign(body: bytes) -> bool:
    return b"@" in body or b"%40" in body


def _digits(body: bytes) -> bool:
    return _NUMBER.search(body) is not None


def _colons(body: bytes) -> bool:
    return _IP6.search(body) is not None


def _secret(body: bytes) -> bool:
    if _LONG_WORD in body.translate(_WORDS):
        return True
    lower = body.lower()
    if _NAMES.search(lower) or _TOKEN.search(lower):
        return True
    return b"@" in body and (b"://" in body or b":\\/" in body)


CHECKS: Final[dict[str, tuple[Check, ...]]] = {
    "secret": (_secret,),
    "email": (_at_sign,),
    "iban": (_digits,),
    "card": (_digits,),
    "phone": (_digits,),
    "ip": (_digits, _colons),
}
"""By name of the pattern, those of which one has to say yes."""
