"""What a process prints: kept in a file of bounded size, as far as the disk allows."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path


class BoundedLog:
    """A file, and the one before it, of at most `limit` bytes each; older output is dropped.

    Nothing here raises for what the disk refuses: whoever stops reading a process's output because
    its log is full stops the process. What can't be written is lost, and the file is tried again
    with the next output.
    """

    def __init__(self, path: Path, limit: int = 4 * 1024 * 1024) -> None:
        self._path = path
        self._before = path.with_name(path.name + ".1")
        self._limit = limit
        self._descriptor = -1
        self._size = 0
        self._closed = False

    def write(self, content: bytes) -> None:
        """Append, starting a new file when this one is full."""
        with suppress(OSError):
            self._append(content[-self._limit :])

    def last_lines(self, count: int) -> list[str]:
        """The newest lines, oldest first."""
        content = b""
        for path in (self._path, self._before):
            if content.count(b"\n") <= count:
                with suppress(OSError):
                    content = path.read_bytes() + content
        return content.decode(errors="replace").splitlines()[-count:]

    def close(self) -> None:
        """No more output follows."""
        self._closed = True
        self._end_file()

    def _append(self, content: bytes) -> None:
        if self._descriptor < 0:
            self._begin_file()
        if self._size + len(content) > self._limit and self._size:
            self._end_file()
            self._path.replace(self._before)
            self._begin_file()
        self._size += os.write(self._descriptor, content)

    def _begin_file(self) -> None:
        if self._closed:
            return
        self._path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT
        self._descriptor = os.open(self._path, flags, 0o600)
        self._size = os.fstat(self._descriptor).st_size

    def _end_file(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1
