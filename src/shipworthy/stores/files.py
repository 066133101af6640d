"""Small files that others read while we write: replaced whole or not at all."""

from __future__ import annotations

import os
import secrets
from pathlib import Path

from shipworthy.errors import Unavailable


def replace_file(path: Path, content: bytes, mode: int = 0o600) -> None:
    """Replace a file by an atomic rename, readable by `mode` from its first byte on.

    Raises Unavailable, with the old content in place, when the disk refuses.
    """
    fresh = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        descriptor = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
        with os.fdopen(descriptor, "wb") as handle:
            handle.write(content)
        fresh.replace(path)
    except OSError as error:
        fresh.unlink(missing_ok=True)
        message = f"can't write {path} ({error.strerror}); make room or check its permissions"
        raise Unavailable(message) from error
