"""Published snapshots: a folder with a file for each keeper's term, of which the highest counts.

A file is named by the number of the term that wrote it, 20 digits. So a keeper that was stopped
between its decision and its publication, and wakes up when another one has taken over, replaces a
file that nobody obeys any more; a gateway that starts just then is not misled either.

This module is imported by every gateway worker: no numpy, no SQLAlchemy, no pydantic.
"""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from shipworthy.errors import Unavailable
from shipworthy.stores.files import replace_file

_DIGITS = 20


def newest_snapshot(folder: Path) -> Path | None:
    """The file with the highest fence; None without any. Raises OSError for an unreadable folder.

    Cheap, since every gateway worker asks ten times a second. The folder is listed each time: its
    time stamp is too coarse to tell two changes in a row apart.
    """
    with suppress(FileNotFoundError):
        name = max(filter(_is_fence, os.listdir(folder)), default=None)  # noqa: PTH208  # half the time
        return None if name is None else folder / name
    return None


def newest_fence(folder: Path) -> int:
    """The highest fence published; 0 without any. Raises Unavailable for an unreadable folder."""
    try:
        newest = newest_snapshot(folder)
    except OSError as error:
        message = f"can't read {folder} ({error.strerror}); check its permissions"
        raise Unavailable(message) from error
    return 0 if newest is None else int(newest.name)


class SnapshotFolder:
    """Publishes for the terms of one keeper; the folder must be there."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._tidied = 0

    def publish(self, fence: int, content: bytes) -> None:
        """Replace the term's snapshot; the first one of a term removes those of earlier terms.

        Raises Unavailable, with what was there in place, when the disk refuses.
        """
        replace_file(self._folder / f"{fence:0{_DIGITS}d}", content)
        if fence > self._tidied:
            self._remove_before(fence)
            self._tidied = fence

    def newest(self) -> int:
        """The highest fence that was published here; 0 before the first."""
        return newest_fence(self._folder)

    def _remove_before(self, fence: int) -> None:
        """Remove what earlier terms left, also half-written; what stays there misleads nobody."""
        with suppress(OSError):
            for name in os.listdir(self._folder):  # noqa: PTH208  # names are all that is needed
                published = name.lstrip(".")[:_DIGITS]  # `.<fence>.<random>` is one half-written
                if _is_fence(published) and int(published) < fence:
                    (self._folder / name).unlink(missing_ok=True)


def _is_fence(name: str) -> bool:
    return len(name) == _DIGITS and name.isascii() and name.isdigit()
