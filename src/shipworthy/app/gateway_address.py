"""Where this project's gateway listens: what `up` wrote once a worker answered."""

from __future__ import annotations

import hashlib
import http.client
import ssl
from pathlib import Path

import msgspec

from shipworthy.app.certificates import fingerprint
from shipworthy.errors import Unavailable, UsageError
from shipworthy.settings import Project

ADDRESS_FILE = "gateway.json"
"""In the state folder."""


class GatewayAddress(msgspec.Struct, frozen=True, kw_only=True):
    """Where clients call: host and port, and a Unix socket where one is set.

    `pid` is the process that holds the sockets, `up`. `tls` is the file of the certificate where
    the gateway speaks HTTPS.
    """

    host: str
    port: int
    pid: int
    unix_socket: str | None = None
    tls: str | None = None

    @property
    def reachable(self) -> str:
        """The host to call from this machine."""
        return "127.0.0.1" if self.host in {"0.0.0.0", "::"} else self.host  # noqa: S104

    @property
    def url(self) -> str:
        """Where clients call."""
        host = f"[{self.reachable}]" if ":" in self.reachable else self.reachable
        return f"{'https' if self.tls else 'http'}://{host}:{self.port}"

    def connection(self, seconds: float) -> http.client.HTTPConnection:
        """A connection to it, past any proxy of the environment.

        Raises OSError, and ssl.SSLError where another certificate than ours is shown.
        """
        if self.tls is None:
            return http.client.HTTPConnection(self.reachable, self.port, timeout=seconds)
        connection = http.client.HTTPSConnection(
            self.reachable, self.port, timeout=seconds, context=_unverified()
        )
        connection.connect()
        assert isinstance(connection.sock, ssl.SSLSocket)  # noqa: S101  # what it made
        shown = connection.sock.getpeercert(binary_form=True) or b""
        try:
            ours = hashlib.sha256(shown).digest() == fingerprint(Path(self.tls))
        except UsageError as error:
            connection.close()
            raise ssl.SSLError(str(error)) from error
        if not ours:
            connection.close()
            message = f"it shows another certificate than {self.tls}"
            raise ssl.SSLError(message)
        return connection

    def pin(self, url: str) -> bytes | None:
        """The certificate's SHA-256 that must be shown there; None where it is not this gateway."""
        if self.tls is None or not f"{url}/".startswith(f"{self.url}/"):
            return None
        try:
            return fingerprint(Path(self.tls))
        except UsageError as error:
            raise Unavailable(str(error)) from error


def gateway_file(project: Project) -> Path:
    """Where `up` says which address it got."""
    return project.state / ADDRESS_FILE


def gateway_address(project: Project) -> GatewayAddress:
    """Where this project's gateway answers. Raises Unavailable when none has been started."""
    try:
        return msgspec.json.decode(gateway_file(project).read_bytes(), type=GatewayAddress)
    except (OSError, msgspec.MsgspecError) as error:
        message = "no gateway runs here; start one with 'shipworthy up'"
        raise Unavailable(message) from error


def gateway_url(project: Project) -> str:
    """The address as clients write it. Raises Unavailable when none has been started."""
    return gateway_address(project).url


def gateway_pin(project: Project, url: str) -> bytes | None:
    """The certificate's SHA-256 that must be shown at a URL; None where any authority's will do."""
    try:
        address = gateway_address(project)
    except Unavailable:
        return None
    return address.pin(url)


def _unverified() -> ssl.SSLContext:
    """For a certificate that is compared itself: no authority is asked."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context
