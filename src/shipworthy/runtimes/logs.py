"""What a replica prints: kept in a file of bounded size."""

from __future__ import annotations

from pathlib import Path


class BoundedLog:
    """A file, and the one before it, of at most `limit` bytes each; older output is dropped."""

    def __init__(self, path: Path, limit: int = 4 * 1024 * 1024) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._path = path
        self._before = path.with_name(path.name + ".1")
        self._limit = limit
        self._file = path.open("ab", buffering=0)
        self._size = path.stat().st_size

    @property
    def path(self) -> Path:
        """The newest file."""
        return self._path

    def write(self, content: bytes) -> None:
        """Append, starting a new file when this one is full."""
        if self._size + len(content) > self._limit and self._size:
            self._file.close()
            self._path.replace(self._before)
            self._file = self._path.open("wb", buffering=0)
            self._size = 0
        self._file.write(content[-self._limit :])
        self._size += len(content)

    def last_lines(self, count: int) -> list[str]:
        """The newest lines, oldest first."""
        content = b""
        for path in (self._path, self._before):
            if content.count(b"\n") <= count and path.exists():
                content = path.read_bytes() + content
        return content.decode(errors="replace").splitlines()[-count:]

    def close(self) -> None:
        """No more output follows."""
        self._file.close()
