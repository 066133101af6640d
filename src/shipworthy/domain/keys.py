"""Gateway keys as text: `sw_<id>_<secret>`. Only the SHA-256 of the whole text is ever stored."""

from __future__ import annotations

import hashlib
import re

from shipworthy.errors import UsageError

LEAST_RANDOM_BYTES = 24
"""What a secret is made of: fewer could be guessed."""

_ID = re.compile(r"[A-Za-z0-9-]{1,64}")


def new_key(id: str, random_bytes: bytes) -> str:
    """The text to hand out, once, for the key of that id; the randomness is the caller's.

    Raises UsageError when the id holds anything but letters, digits and '-', or when there are
    fewer than 24 random bytes.
    """
    if not _ID.fullmatch(id):
        raise UsageError(f"{id!r} is not a key id; use 1 to 64 letters, digits and '-'")
    if len(random_bytes) < LEAST_RANDOM_BYTES:
        raise UsageError(f"a key needs {LEAST_RANDOM_BYTES} random bytes; got {len(random_bytes)}")
    return f"sw_{id}_{random_bytes.hex()}"


def key_id(text: str) -> str | None:
    """The id in a key's text; None when the text is no key. It says nothing about the secret."""
    prefix, _, rest = text.partition("_")
    id, _, secret = rest.partition("_")
    return id if prefix == "sw" and secret and _ID.fullmatch(id) else None


def hash_key(text: str) -> str:
    """What is stored and compared: the hexadecimal SHA-256 of the key's whole text.

    A plain hash does, because the secret is long and random; nobody can search through it.
    """
    return hashlib.sha256(text.encode()).hexdigest()
