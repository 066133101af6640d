"""The gateway's sockets, which `up` opens once and all workers accept on.

They stay open for as long as `up` runs, whatever becomes of its workers: while one is started anew,
clients wait in the system's queue for the others, and nobody is refused.
"""

from __future__ import annotations

import errno
import os
import socket
import stat
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from shipworthy.errors import Unavailable
from shipworthy.settings import Project

_BACKLOG = 2048
_LONGEST_PATH = 107  # bytes that the system takes in a Unix socket's address


@dataclass(frozen=True, slots=True)
class Listeners:
    """What clients connect to."""

    tcp: socket.socket
    unix: socket.socket | None = None
    unix_path: Path | None = None
    unix_file: tuple[int, int] = (0, 0)

    @property
    def host(self) -> str:
        """The address that is listened on."""
        return str(self.tcp.getsockname()[0])

    @property
    def port(self) -> int:
        """The port, also where the settings leave it to the system."""
        return int(self.tcp.getsockname()[1])

    @property
    def descriptors(self) -> tuple[int, ...]:
        """What a worker inherits."""
        return tuple(each.fileno() for each in (self.tcp, self.unix) if each is not None)

    def close(self) -> None:
        """Listen no more, and leave no socket file behind that is still ours."""
        self.tcp.close()
        if self.unix is not None and self.unix_path is not None:
            self.unix.close()
            with suppress(OSError):
                if _identity(self.unix_path) == self.unix_file:
                    self.unix_path.unlink()


def listen(project: Project) -> Listeners:
    """Open the port, and the Unix socket where one is set.

    Raises Unavailable when an address is taken or is none of this machine's.
    """
    gateway, path = project.settings.gateway, project.unix_socket
    tcp = _listen_on_port(gateway.host, gateway.port)
    if path is None:
        return Listeners(tcp)
    try:
        return Listeners(tcp, _listen_on_path(path), path, _identity(path))
    except BaseException:
        tcp.close()
        raise


def _listen_on_port(host: str, port: int) -> socket.socket:
    listener: socket.socket | None = None
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(_BACKLOG)
        listener.setblocking(False)  # noqa: FBT003  # its only form
    except (OSError, UnicodeError) as error:
        if listener is not None:
            listener.close()
        why = error.strerror if isinstance(error, OSError) else "no name of a host"
        message = (
            f"the gateway can't listen on {host}:{port} ({why}); free the port, or set"
            " gateway.port in shipworthy.yaml (0 takes any free one)"
        )
        raise Unavailable(message) from error
    return listener


def _listen_on_path(path: Path) -> socket.socket:
    """A Unix socket of its owner alone, from its first moment on."""
    if len(os.fsencode(path)) > _LONGEST_PATH:
        message = (
            f"gateway.unix_socket: {path} is longer than the {_LONGEST_PATH} bytes that a socket's"
            " path may have; choose a shorter one"
        )
        raise Unavailable(message)
    _make_room(path)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    before = os.umask(0o177)
    try:
        listener.bind(str(path))
        listener.listen(_BACKLOG)
        listener.setblocking(False)  # noqa: FBT003  # its only form
    except OSError as error:
        listener.close()
        message = (
            f"the gateway can't listen on {path} ({error.strerror}); set gateway.unix_socket in"
            " shipworthy.yaml to a path that can be made"
        )
        raise Unavailable(message) from error
    finally:
        os.umask(before)
    return listener


def _make_room(path: Path) -> None:
    """Remove what a killed one left there, and nothing else."""
    try:
        mode = path.lstat().st_mode
    except OSError:
        return  # nothing there, or binding says what is wrong
    if not stat.S_ISSOCK(mode):
        message = f"gateway.unix_socket: {path} is there and no socket; remove it or choose another"
        raise Unavailable(message)
    if _is_listened_on(path):
        message = (
            f"somebody listens on {path} already; stop that one or set another gateway.unix_socket"
        )
        raise Unavailable(message)
    with suppress(OSError):
        path.unlink()


def _is_listened_on(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(1.0)
        try:
            probe.connect(str(path))
        except OSError as error:
            return error.errno not in {errno.ECONNREFUSED, errno.ENOENT}
    return True


def _identity(path: Path) -> tuple[int, int]:
    """Which file that is: somebody else may have put another one there."""
    status = path.lstat()
    return status.st_dev, status.st_ino
