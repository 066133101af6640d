"""What Linux tells in /proc: processes, who listens, who holds a lock, what is mounted.

Elsewhere, or where it may not be read, nothing is known; nobody is accused for that.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

STOPPED, DEAD = "T", "Z"
"""The kernel's letters for a process that a signal stopped, and one that nobody has waited for."""
_LISTENING = "0A"
_OCTAL = re.compile(r"\\([0-7]{3})")


@dataclass(frozen=True, slots=True)
class Process:
    """One process; `state` is the kernel's letter."""

    pid: int
    command: tuple[str, ...]
    state: str

    def __str__(self) -> str:
        words = " ".join(self.command)
        shown = words if len(words) <= 80 else f"{words[:79]}…"
        return f"process {self.pid} ({shown})" if words else f"process {self.pid}"


@dataclass(frozen=True, slots=True)
class Machine:
    """This machine, as far as its /proc tells."""

    proc: Path = Path("/proc")

    def processes(self) -> Iterator[Process]:
        """All that can be seen."""
        with suppress(OSError):
            for folder in self.proc.iterdir():
                if folder.name.isdigit():
                    process = self.process(int(folder.name))
                    if process is not None:
                        yield process

    def process(self, pid: int) -> Process | None:
        """The process of that id; None when there is none."""
        folder = self.proc / str(pid)
        try:
            words = (folder / "cmdline").read_bytes().decode(errors="replace").split("\0")
            # The name in parentheses may hold anything; the state stands behind the last one.
            state = (folder / "stat").read_text(errors="replace").rpartition(")")[2].split()[0]
        except (OSError, IndexError):
            return None
        return Process(pid, tuple(word for word in words if word), state)

    def listeners(self, port: int) -> list[Process]:
        """Who listens on a TCP port; empty when the owner can't be seen from this account."""
        sockets = set(self._listening(port))
        if not sockets:
            return []
        return [process for process in self.processes() if self._holds(process.pid, sockets)]

    def _listening(self, port: int) -> Iterator[str]:
        for table in ("tcp", "tcp6"):
            with suppress(OSError, ValueError, IndexError):
                for line in (self.proc / "net" / table).read_text().splitlines()[1:]:
                    fields = line.split()
                    if fields[3] == _LISTENING and int(fields[1].rpartition(":")[2], 16) == port:
                        yield f"socket:[{fields[9]}]"

    def _holds(self, pid: int, sockets: set[str]) -> bool:
        with suppress(OSError):
            for entry in (self.proc / str(pid) / "fd").iterdir():
                with suppress(OSError):
                    if str(entry.readlink()) in sockets:
                        return True
        return False

    def lock_holder(self, file: Path) -> Process | None:
        """Who holds a `flock` on a file, where the kernel tells."""
        with suppress(OSError, ValueError, IndexError):
            inode = file.stat().st_ino
            for line in (self.proc / "locks").read_text().splitlines():
                fields = line.split()
                if fields[1] == "FLOCK" and int(fields[5].rpartition(":")[2]) == inode:
                    return self.process(int(fields[4]))
        return None

    def file_system(self, path: Path) -> str | None:
        """The type of the file system that a path lies on, such as `ext4` or `nfs4`."""
        best, kind = -1, None
        with suppress(OSError, IndexError):
            place = path.resolve()
            for line in (self.proc / "self" / "mounts").read_text().splitlines():
                fields = line.split()
                point = Path(_OCTAL.sub(lambda found: chr(int(found[1], 8)), fields[1]))
                if place.is_relative_to(point) and len(point.parts) >= best:
                    best, kind = len(point.parts), fields[2]
        return kind

    def memory(self) -> tuple[int, int] | None:
        """Bytes of memory that are available, and all there are."""
        with suppress(OSError, KeyError, ValueError, IndexError):
            lines = (self.proc / "meminfo").read_text().splitlines()
            found = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines}
            return found["MemAvailable"], found["MemTotal"]
        return None

    def open_files_limit(self, pid: int) -> int | None:
        """How many files a process may hold open; None when unlimited or unknown."""
        with suppress(OSError, ValueError, IndexError):
            for line in (self.proc / str(pid) / "limits").read_text().splitlines():
                if line.startswith("Max open files"):
                    return int(line.split()[3])
        return None
