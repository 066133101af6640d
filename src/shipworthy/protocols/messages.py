"""What the codecs of all protocols share: how a body is read, and in which words it is refused."""

from __future__ import annotations

import re
from typing import TypeVar

import msgspec

from shipworthy.errors import UsageError

_T = TypeVar("_T")


class InvalidMessage(UsageError):
    """A request or response that can't be accepted; the message begins with the field at fault."""


class MalformedMessage(InvalidMessage):
    """Not JSON, or not the protocol's structure, whatever the model."""


def decoded(decoder: msgspec.json.Decoder[_T], body: bytes) -> _T:
    """The body as the decoder's type; MalformedMessage says where it is not JSON or not that."""
    try:
        if not body.isascii():
            body.decode()  # the parser looks into no string that it skips; a server upstream would
        return decoder.decode(body)
    except UnicodeDecodeError as error:
        raise MalformedMessage(f"the body is not valid UTF-8 (byte {error.start})") from None
    except RecursionError:
        raise MalformedMessage("the body is nested too deeply") from None
    except msgspec.ValidationError as error:
        raise MalformedMessage(_structure_problem(str(error))) from None
    except msgspec.DecodeError as error:
        raise MalformedMessage(_json_problem(str(error), body)) from None


_AT = re.compile(r" - at `\$\.?(.*)`$")
_BYTE = re.compile(r"\(byte (\d+)\)")


def _json_problem(text: str, body: bytes) -> str:
    if not body:
        return "the body is empty; send a JSON object"
    at = _BYTE.search(text)
    if at is None:
        return f"the body is not JSON: it, or a string in it, ends too early ({len(body)} bytes)"
    position = int(at.group(1))
    around = body[max(0, position - 1) : position + 9]
    for token in (b"NaN", b"Infinity"):
        if token in around:
            return (
                f"the body is not JSON: it holds {token.decode()} (byte {position}); send numbers"
            )
    return "the body is not JSON: " + text.removeprefix("JSON is malformed: ")


def _structure_problem(text: str) -> str:
    at = _AT.search(text)
    where = at.group(1) if at else "body"
    what = _AT.sub("", text).replace("`", "")
    return f"{where}: {what[0].lower()}{what[1:]}"
