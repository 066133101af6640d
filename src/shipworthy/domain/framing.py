"""Where the JSON of a message ends, and the bytes that the binary tensor extension adds begin."""

from __future__ import annotations

import re

import msgspec

_TRAILING = re.compile(r"trailing characters \(byte (\d+)\)")
_decoder = msgspec.json.Decoder(msgspec.Raw)


def end_of_json(body: bytes) -> int:
    """The length of the JSON that the body begins with. Raises msgspec.DecodeError for none.

    The message's own header says it too; whoever has only the body can tell by this.
    """
    end = len(body)
    try:
        _decoder.decode(body)
    except msgspec.DecodeError as error:
        found = _TRAILING.search(str(error))
        if found is None:
            raise
        end = int(found[1]) - 1  # counted from one; and tensors may begin like white space
    return len(body[:end].rstrip(b" \t\r\n"))
