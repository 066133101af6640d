"""The gateway's own certificate: whether it can be used, until when, and how we know it again.

What asks our own gateway trusts this very certificate and nothing else: that needs no authority,
and no name that fits.
"""

from __future__ import annotations

import hashlib
import ssl
from pathlib import Path

from shipworthy.errors import UsageError

_BEGIN, _END = "-----BEGIN CERTIFICATE-----", "-----END CERTIFICATE-----"
_NOT_YET_VALID, _EXPIRED = 9, 10  # OpenSSL's X509_V_ERR_…


def check_certificate(certificate: Path, key: Path, now: float) -> float:
    """See that a server can use them; seconds from `now` until the certificate expires.

    These are negative for one that has expired: that hinders clients, and not the server. Raises
    UsageError with what is wrong.
    """
    for name, file in (("certificate", certificate), ("key", key)):
        try:
            file.read_bytes()
        except OSError as error:
            message = f"gateway.tls.{name}: {file} can't be read ({error.strerror}); check the path"
            raise UsageError(message) from error
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    locked = False

    def no_password() -> str:
        nonlocal locked
        locked = True
        return ""

    try:
        context.load_cert_chain(certificate, key, no_password)
    except (ssl.SSLError, ValueError) as error:
        message = f"gateway.tls: {_problem(certificate, key, error, locked=locked)}"
        raise UsageError(message) from error
    return _expiry(certificate, context, now) - now


def _problem(certificate: Path, key: Path, error: Exception, *, locked: bool) -> str:
    reason = getattr(error, "reason", None) or str(error)
    if locked:
        return f"{key} is locked by a password; give the key without one, readable by you alone"
    if reason == "KEY_VALUES_MISMATCH":
        return f"{key} is not the key of {certificate}; give the two that belong together"
    return f"{certificate} and {key} can't be used ({reason}); both must be PEM files"


def fingerprint(certificate: Path) -> bytes:
    """The SHA-256 of a server's certificate, the first one in its file.

    Raises UsageError where none is there.
    """
    try:
        _, _, rest = certificate.read_text().partition(_BEGIN)
        content = ssl.PEM_cert_to_DER_cert(f"{_BEGIN}{rest.partition(_END)[0]}{_END}")
    except (OSError, ValueError):
        content = b""
    if not content:
        message = f"gateway.tls.certificate: no certificate can be read from {certificate}"
        raise UsageError(f"{message}; put a PEM file there")
    return hashlib.sha256(content).digest()


def _expiry(certificate: Path, server: ssl.SSLContext, now: float) -> float:
    """When it expires, as a client sees it that trusts this very certificate."""
    client = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    client.check_hostname = False
    client.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    client.load_verify_locations(certificate)
    try:
        told = _handshake(client, server)
    except ssl.SSLCertVerificationError as error:
        if error.verify_code == _EXPIRED:
            return now - 1.0
        if error.verify_code == _NOT_YET_VALID:
            message = f"gateway.tls.certificate: {certificate} is not valid yet; check the clock"
            raise UsageError(message) from error
        message = f"gateway.tls.certificate: {certificate} is of no use ({error.verify_message})"
        raise UsageError(f"{message}; get one for a server") from error
    return ssl.cert_time_to_seconds(told)


def _handshake(client: ssl.SSLContext, server: ssl.SSLContext) -> str:
    """Greet each other in memory; gives the `notAfter` of the server's certificate."""
    to_client, to_server = ssl.MemoryBIO(), ssl.MemoryBIO()
    caller = client.wrap_bio(to_client, to_server)
    answerer = server.wrap_bio(to_server, to_client, server_side=True)
    waiting = [caller, answerer]
    for _ in range(10):  # more than any version of TLS needs
        for side in list(waiting):
            try:
                side.do_handshake()
            except ssl.SSLWantReadError:
                continue
            waiting.remove(side)
    certificate = caller.getpeercert() or {}
    return str(certificate.get("notAfter", ""))
