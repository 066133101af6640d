"""Inference ids that prove themselves, and pseudonyms of units.

An id carries who asked, when, and on which arm, under a MAC, so that feedback which names it can be
judged by any worker without a store.
"""

from __future__ import annotations

import base64
import binascii
import hmac
import struct
from hashlib import blake2b
from itertools import count
from typing import Final

import msgspec

from shipworthy.domain.routing import ArmName
from shipworthy.errors import UsageError

_PREFIX: Final = "inf_"
_FORMAT: Final = 1
_ARMS: Final[tuple[ArmName, ...]] = ("stable", "candidate")
# format, arm, milliseconds, worker, number, key, unit
_FIELDS: Final = struct.Struct(">BBQ4sI8s8s")
_MAC_BYTES: Final = 12
_NO_UNIT: Final = bytes(8)
LEAST_SECRET_BYTES: Final = 16
"""Shorter signing or pseudonym secrets are refused."""


class Ticket(msgspec.Struct, frozen=True):
    """What a genuine inference id says. `unit` is the pseudonym, `at` Unix seconds."""

    at: float
    arm: ArmName
    key_mark: bytes
    unit: str | None

    def issued_to(self, key: str) -> bool:
        """Whether the inference was asked for with the key of that id."""
        return self.key_mark == _mark(key)


class TicketOffice:
    """Issues and reads inference ids. `worker` is four bytes that no other worker has."""

    def __init__(self, secret: bytes, *, worker: bytes) -> None:
        if len(secret) < LEAST_SECRET_BYTES:
            raise UsageError(
                f"the signing secret has {len(secret)} bytes; give at least {LEAST_SECRET_BYTES}"
            )
        key = blake2b(secret, digest_size=32, person=b"inference-id").digest()
        self._keyed = blake2b(key=key, digest_size=_MAC_BYTES)
        self._worker = worker
        self._numbers = count()
        self._marks: dict[str, bytes] = {}

    def issue(self, *, at: float, key: str, arm: ArmName, unit: str | None) -> str:
        """A new id, unlike any other."""
        mark = self._marks.get(key)
        if mark is None:
            mark = self._marks[key] = _mark(key)
        fields = _FIELDS.pack(
            _FORMAT,
            arm == "candidate",
            int(at * 1000),
            self._worker,
            next(self._numbers) & 0xFFFFFFFF,
            mark,
            bytes.fromhex(unit) if unit else _NO_UNIT,
        )
        return _PREFIX + base64.urlsafe_b64encode(fields + self._mac(fields)).decode().rstrip("=")

    def read(self, text: str) -> Ticket | None:
        """What the id says; None when we did not issue it."""
        if not text.startswith(_PREFIX) or len(text) > 100 or not text.isascii():
            return None
        body = text.removeprefix(_PREFIX)
        try:
            content = base64.b64decode(body + "=" * (-len(body) % 4), b"-_", validate=True)
        except binascii.Error:
            return None
        fields, mac = content[:-_MAC_BYTES], content[-_MAC_BYTES:]
        if len(fields) != _FIELDS.size or not hmac.compare_digest(mac, self._mac(fields)):
            return None
        unpacked: tuple[int, int, int, bytes, int, bytes, bytes] = _FIELDS.unpack(fields)
        version, arm, milliseconds, _, _, mark, unit = unpacked
        if version != _FORMAT:
            return None
        return Ticket(
            milliseconds / 1000, _ARMS[arm], mark, None if unit == _NO_UNIT else unit.hex()
        )

    def _mac(self, fields: bytes) -> bytes:
        mac = self._keyed.copy()
        mac.update(fields)
        return mac.digest()


class Pseudonyms:
    """Turns units into what may be written.

    It is 16 hexadecimal characters, the same for a unit each time, and of no use to anybody
    without the secret.
    """

    def __init__(self, secret: bytes) -> None:
        if len(secret) < LEAST_SECRET_BYTES:
            raise UsageError(
                f"the pseudonym secret has {len(secret)} bytes; give at least {LEAST_SECRET_BYTES}"
            )
        key = blake2b(secret, digest_size=32, person=b"unit-pseudonym").digest()
        self._keyed = blake2b(key=key, digest_size=8)

    def of(self, unit: str) -> str:
        """The unit's pseudonym."""
        pseudonym = self._keyed.copy()
        pseudonym.update(unit.encode())
        return pseudonym.hexdigest()


def _mark(key: str) -> bytes:
    return blake2b(key.encode(), digest_size=8, person=b"gateway-key").digest()
