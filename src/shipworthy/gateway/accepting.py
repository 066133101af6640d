"""Taking connections from listening sockets that several workers may share."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import socket
import ssl
from typing import Final

from shipworthy.errors import Unavailable
from shipworthy.gateway.connection import ClientConnection, Connections
from shipworthy.gateway.options import Tls

_log = logging.getLogger("shipworthy.gateway")

_BREATH_SECONDS: Final = 0.1  # without descriptors
_HANDSHAKE_SECONDS: Final = 10.0
_FULL: Final = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})


class Certificate:
    """The server's certificate and key, read again when their files change.

    Raises Unavailable when they can't be used at first; later the ones before stay in force.
    """

    def __init__(self, files: Tls) -> None:
        self._files = files
        self._seen = self._stamps()
        self._trouble = ""
        try:
            self.context = self._load()
        except (OSError, ValueError) as error:  # ssl.SSLError is an OSError
            message = f"the certificate {files.certificate} with the key {files.key} can't be used"
            raise Unavailable(f"{message} ({error}); give a PEM chain and its own key") from error

    def look(self) -> None:
        """Take over what was renewed; new connections get it."""
        stamps = self._stamps()
        if stamps == self._seen:
            return
        try:
            self.context = self._load()
        except (OSError, ValueError) as error:  # half of it may be there: tried again in a second
            if str(error) != self._trouble:
                self._trouble = str(error)
                _log.error("the renewed certificate can't be used, the old one stays: %s", error)
            return
        self._seen, self._trouble = stamps, ""
        _log.info("the certificate was renewed")

    def _load(self) -> ssl.SSLContext:
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.set_alpn_protocols(["http/1.1"])
        context.load_cert_chain(self._files.certificate, self._files.key)
        return context

    def _stamps(self) -> tuple[tuple[int, int], ...]:
        stamps: list[tuple[int, int]] = []
        for file in (self._files.certificate, self._files.key):
            with contextlib.suppress(OSError):
                status = file.stat()
                stamps.append((status.st_mtime_ns, status.st_ino))
        return tuple(stamps)


class Acceptor:
    """Accepts on one listening socket, one connection each time that there is one to accept.

    So workers that share the socket share its connections: whoever has time takes the next.
    """

    def __init__(
        self, listener: socket.socket, connections: Connections, certificate: Certificate | None
    ) -> None:
        listener.setblocking(False)  # noqa: FBT003  # its only form
        self._listener = listener
        self._connections = connections
        # Whoever may connect to a Unix socket is on this machine.
        self._certificate = None if listener.family == socket.AF_UNIX else certificate
        self._loop = connections.loop
        self._accepting = False

    def start(self) -> None:
        """Begin."""
        self._accepting = True
        self._loop.add_reader(self._listener, self._accept)

    def stop(self) -> None:
        """Take no more. What waits in the queue of a shared socket is for the others."""
        if self._accepting:
            self._accepting = False
            self._loop.remove_reader(self._listener)
        self._listener.close()

    def _accept(self) -> None:
        try:
            client, _ = self._listener.accept()
        except (BlockingIOError, InterruptedError, ConnectionError):
            return  # another worker was faster, or the client has gone
        except OSError as error:
            if error.errno not in _FULL:
                raise
            _log.error("no connection can be taken: %s", error.strerror)
            self._loop.remove_reader(self._listener)
            self._loop.call_later(_BREATH_SECONDS, self._go_on)
            return
        connections = self._connections
        if len(connections.arriving) > connections.options.max_connections:
            client.close()  # who never ends a handshake must not use up the descriptors
            return
        context = self._certificate.context if self._certificate else None
        attach(connections, client, context)

    def _go_on(self) -> None:
        if self._accepting:
            self._loop.add_reader(self._listener, self._accept)


class Relay:
    """Gives kept connections to the other workers of a port, so that one that ends breaks none.

    Whatever a client has just sent goes along, unread. All workers share both ends of a pair of
    sockets: what is put in at the one is taken out by whoever has time.
    """

    def __init__(self, ends: tuple[int, int], connections: Connections) -> None:
        self._in, self._out = (socket.socket(fileno=end) for end in ends)
        for end in (self._in, self._out):
            end.setblocking(False)  # noqa: FBT003  # its only form
        self._connections = connections

    def start(self) -> None:
        """Take what others give."""
        self._connections.loop.add_reader(self._out, self._take)

    def stop(self) -> None:
        """Take no more; what is in it waits for the others."""
        self._connections.loop.remove_reader(self._out)

    def close(self) -> None:
        """Give no more."""
        self._in.close()
        self._out.close()

    def give(self, connection: ClientConnection) -> bool:
        """Whether another worker will have it; it can be only while it is idle, and without TLS.

        Raises OSError when there is no room just now.
        """
        descriptor = connection.detach()
        if descriptor is None:
            return False
        try:
            socket.send_fds(self._in, [b"."], [descriptor])
        finally:
            os.close(descriptor)
        connection.end()
        return True

    def _take(self) -> None:
        try:
            _, descriptors, _, _ = socket.recv_fds(self._out, 1, 1)
        except (BlockingIOError, InterruptedError):
            return  # another worker was faster
        for descriptor in descriptors:
            attach(self._connections, socket.socket(fileno=descriptor), None, kept=True)


def attach(
    connections: Connections,
    client: socket.socket,
    context: ssl.SSLContext | None,
    *,
    kept: bool = False,
) -> None:
    """Begin to serve a client's connection."""
    client.setblocking(False)  # noqa: FBT003  # its only form
    if client.family != socket.AF_UNIX:
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    async def begin() -> None:
        try:
            await connections.loop.connect_accepted_socket(
                lambda: ClientConnection(connections, kept=kept),
                client,
                ssl=context,
                ssl_handshake_timeout=_HANDSHAKE_SECONDS if context else None,
            )
        except (OSError, asyncio.CancelledError):  # a handshake that failed
            client.close()

    task = connections.loop.create_task(begin())
    connections.arriving.add(task)
    task.add_done_callback(connections.arriving.discard)
