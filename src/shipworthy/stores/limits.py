"""What keys and models have used, in a table that all gateway workers of a host map into memory.

`usage` in a folder of its own is

    header      a page: magic, version and sizes with their checksum; how many slots and rows are
                in use, and a number that grows whenever rows are given away
    directory   for each row the digest of whom it is for, with a checksum, and since when nobody
                wants it
    rows        a page each: for every slot eight words, of which only the slot's owner writes

Each worker owns a slot for as long as it holds the lock of the slot's file, which the kernel drops
with the process, however that ends. On a request's way there is no lock, so nobody waits for a
worker that was stopped: it adds to its own words first, and sums everybody's then. Two that do so
at once may both see too much, never too little. There are two words of each kind, for even and odd
minutes or days, so that the one before stays. Those of requests and money bear their minute or day
in their upper bits, and tokens go with the requests beside them. A word is written as one.

Giving rows away, taking slots over and replacing a file that makes no sense is done under a lock
file, for which nobody waits long: a worker that can't have it counts for itself alone meanwhile.

This module is imported by every gateway worker: no numpy, no SQLAlchemy, no pydantic.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import logging
import mmap
import os
import struct
import threading
import time
import zlib
from collections.abc import Callable, Generator, Iterable, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

from shipworthy.domain.limits import Usage
from shipworthy.stores.files import new_file

_log = logging.getLogger("shipworthy.gateway")

VERSION: Final = 1
SLOTS: Final = 64
"""Workers of a host that count together."""

ROWS: Final = 16_384
"""Keys and models with limits; beyond that, a worker counts for itself alone."""

PATIENCE: Final = 0.05
"""Seconds that a worker that serves waits for another one that gives rows away."""

IDLE: Final = 600.0
"""Seconds after which a row that nobody wants may be given to somebody else."""

_PAGE: Final = 4096
_WORDS: Final = 8  # a slot's in a row: requests, tokens; the same; money twice; calls under way
_RUNNING: Final = 6
_BYTES: Final = 8 * _WORDS
_GROUP: Final = struct.Struct(f"{_WORDS}Q")
_ENTRY: Final = struct.Struct("<16sQII")  # digest, since when nobody wants it, 0, checksum
_DIRECTORY: Final = _PAGE
_FIRST_ROW: Final = _DIRECTORY + ROWS * _ENTRY.size
_SIZE: Final = _FIRST_ROW + ROWS * _PAGE

_HEADER: Final = struct.Struct("<8sIIII")
_MAGIC: Final = b"SWLIMITS"
_WIDTH: Final = 8  # word of the header: slots in use are all below this one
_USED: Final = 9  # rows in use are all below this one
_CHANGES: Final = 10
_TAKEN: Final = 16  # from this word on, for each slot whether it may hold what its owner counted

# A word is its minute or day, of which the low bits are kept, above what was counted in it. Of such
# a word XOR a minute's the count alone is left if it is of that minute, else more than any count.
_BITS: Final = 40
_COUNT: Final = (1 << _BITS) - 1
_TAG: Final = (1 << 64 - _BITS) - 1
_MONEY_BITS: Final = 48
_MONEY: Final = (1 << _MONEY_BITS) - 1
_DAY_TAG: Final = (1 << 64 - _MONEY_BITS) - 1


class Row:
    """What one key or model has used. Only the table makes rows, and moves them."""

    __slots__ = ("_bytes", "_own", "_start", "_words")

    def __init__(self) -> None:
        self.leave()

    def add(
        self, minute: int, day: int, requests: int, tokens: int, micros: int, running: int
    ) -> None:
        """Count more, in that minute and day."""
        words, own = self._words, self._own
        at = own + 2 if minute & 1 else own
        tag = (minute & _TAG) << _BITS
        counted = words[at] ^ tag
        if counted <= _COUNT:
            words[at + 1] += tokens
            if requests:
                words[at] += requests
        else:  # tokens first: until the minute is there they count for nothing
            words[at + 1] = tokens
            words[at] = tag | requests
        if micros:
            at = own + 5 if day & 1 else own + 4
            tag = (day & _DAY_TAG) << _MONEY_BITS
            counted = words[at] ^ tag
            micros += counted if counted <= _MONEY else 0
            words[at] = tag | (micros if micros < _MONEY else _MONEY)  # noqa: FURB136
        if running:
            words[own + _RUNNING] += running

    def take_back(
        self, minute: int, day: int, requests: int, tokens: int, micros: int, running: int
    ) -> None:
        """Count less of what was added in that minute and day, as far as it still counts."""
        words, own = self._words, self._own
        if requests or tokens:
            at = own + 2 if minute & 1 else own
            counted = words[at] ^ (minute & _TAG) << _BITS
            if counted <= _COUNT:
                if requests:
                    words[at] -= min(requests, counted)
                if tokens:
                    left = words[at + 1] - tokens
                    words[at + 1] = left if left > 0 else 0  # noqa: FURB136  # a third of max()
        if micros:
            at = own + 5 if day & 1 else own + 4
            counted = words[at] ^ (day & _DAY_TAG) << _MONEY_BITS
            if counted <= _MONEY:
                words[at] -= micros if micros < counted else counted  # noqa: FURB136
        if running and words[own + _RUNNING]:
            words[own + _RUNNING] -= running

    def leave(self) -> None:
        """Count for this worker alone, from nothing."""
        self._words = memoryview(bytearray(_PAGE)).cast("Q")
        self._words[_WIDTH] = 1
        self._bytes = self._words.cast("B")
        self._own = _TAKEN
        self._start = 8 * _TAKEN

    def move(self, table: _Table, index: int, slot: int, now: float) -> None:
        """Count at a place in a table from now on, and bring along what was counted."""
        words, own = self._words, self._own
        self.point(table, index, slot)
        if self._words is not words or self._own != own:
            _pour(words, own, self._words, self._own, now)
            self._words[self._own + _RUNNING] += words[own + _RUNNING]
            words[own + _RUNNING] = 0

    def point(self, table: _Table, index: int, slot: int) -> None:
        """Count at a place in a table from now on."""
        self._words, self._bytes = table.words, table.bytes
        self._start = _row_start(index)
        self._own = self._start // 8 + slot * _WORDS

    def usage(self, minute: int, day: int) -> Usage:
        """What all workers have counted."""
        start, most, odd_day = self._start, _COUNT, day & 1
        groups = _GROUP.iter_unpack(self._bytes[start : start + _BYTES * self._words[_WIDTH]])
        now, before = (minute & _TAG) << _BITS, (minute - 1 & _TAG) << _BITS
        even, odd = (before, now) if minute & 1 else (now, before)
        today = (day & _DAY_TAG) << _MONEY_BITS
        even_requests = even_tokens = odd_requests = odd_tokens = spent = under_way = 0
        for in_even, its_tokens, in_odd, tokens, even_money, odd_money, running, _ in groups:
            counted = in_even ^ even
            if counted <= most:
                even_requests += counted
                even_tokens += its_tokens
            counted = in_odd ^ odd
            if counted <= most:
                odd_requests += counted
                odd_tokens += tokens
            counted = (odd_money if odd_day else even_money) ^ today
            if counted <= _MONEY:
                spent += counted
            under_way += running
        if minute & 1:
            return even_requests, odd_requests, even_tokens, odd_tokens, spent, under_way
        return odd_requests, even_requests, odd_tokens, even_tokens, spent, under_way


def _pour(source: memoryview[int], at: int, target: memoryview[int], to: int, now: float) -> None:
    """Add one group's counts to another's, where they still matter, and empty it of them."""
    minute, day = int(now // 60), int(now // 86_400)
    for pair in (0, 2):
        word, tokens = source[at + pair], source[at + pair + 1]
        if (minute - (word >> _BITS)) & _TAG <= 1:
            if target[to + pair] >> _BITS != word >> _BITS:
                target[to + pair + 1] = 0
                target[to + pair] = word & ~_COUNT
            target[to + pair + 1] += tokens
            target[to + pair] += word & _COUNT
        source[at + pair] = source[at + pair + 1] = 0
    for one in (4, 5):
        word = source[at + one]
        if (day - (word >> _MONEY_BITS)) & _DAY_TAG <= 1:
            there = target[to + one]
            spent = there & _MONEY if there >> _MONEY_BITS == word >> _MONEY_BITS else 0
            target[to + one] = (word & ~_MONEY) | min(_MONEY, spent + (word & _MONEY))
        source[at + one] = 0


class UsageTable:
    """A worker's part in the table. Not for several threads.

    Nothing here raises while serving. Where the disk, a lock or a full table stands in the way,
    the worker counts for itself alone, says so, and `tidy` tries again.

    Args:
        folder: Where all workers of this host count; made when it is not there.
        clock: Unix time in seconds.
        patience: Seconds to wait for another worker that is just starting.

    """

    def __init__(
        self, folder: Path, clock: Callable[[], float] = time.time, patience: float = 2.0
    ) -> None:
        self._folder = folder
        self._clock = clock
        self._table: _Table | None = None
        self._slot = -1
        self._slot_lock = -1
        self._rows: dict[str, Row] = {}
        self._trouble = ""
        self._unplaced = False
        self._gate = threading.Lock()
        self._gate.acquire()
        self._arrange(patience)

    def rows(self, wanted: Iterable[str]) -> Mapping[str, Row]:
        """The rows of those names; what others had counts no more for this worker."""
        names = set(wanted)
        if names != self._rows.keys():
            self._rows = {name: self._rows.get(name) or Row() for name in names}
            self._unplaced = True
            self._arrange(PATIENCE)
        return self._rows

    def fence(self) -> None:
        """Let other workers see what was counted before anything that is read from here on.

        Processors may delay a write behind later reads. Letting go of a lock and taking it again
        orders both, and is the cheapest way to do so from here.
        """
        self._gate.release()
        self._gate.acquire()

    def tidy(self) -> None:
        """Take over what ended workers counted, and try again what failed; once a second."""
        self._arrange(0.0)

    def close(self) -> None:
        """Give the slot back; what its calls under way held is free."""
        for row in self._rows.values():
            row.leave()
        self._table = None
        if self._slot_lock >= 0:
            os.close(self._slot_lock)
            self._slot_lock = self._slot = -1

    def _arrange(self, patience: float) -> None:
        """Do whatever has to be done under the lock; without anything, not even take it."""
        try:
            if not self._has_work():
                return
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            with _lock(self._folder / "lock", patience) as held:
                if held:
                    self._work()
                elif patience:
                    self._complain("another worker holds its lock")
        except OSError as error:
            self._complain(f"{self._folder}: {error.strerror}")

    def _has_work(self) -> bool:
        table = self._table
        if table is None or self._unplaced or not table.is_at(self._folder / "usage"):
            return True
        return table.changed() or any(
            table.words[_TAKEN + slot] for slot in range(table.words[_WIDTH]) if slot != self._slot
        )

    def _work(self) -> None:
        if self._slot < 0:
            self._take_slot()
        if self._table is None or not self._table.is_at(self._folder / "usage"):
            self._table = self._open()
            self._table.occupy(self._slot)
            self._unplaced = True
        now = self._clock()
        for slot in range(self._table.words[_WIDTH]):
            if slot != self._slot and self._table.words[_TAKEN + slot] and not self._lives(slot):
                self._table.absorb(slot, self._slot, now)
        self._table.narrow(self._slot)
        if self._unplaced or self._table.changed():
            places = self._table.places(list(self._rows), now)
            for name, index in places.items():
                self._rows[name].move(self._table, index, self._slot, now)
            self._unplaced = len(places) < len(self._rows)
            if self._unplaced:
                self._complain(f"it has rows for {ROWS:,} keys and models, and all are in use")
                return
        if self._trouble:
            _log.warning("limits hold across the workers of this host again")
            self._trouble = ""

    def _complain(self, trouble: str) -> None:
        """Say it once."""
        if trouble != self._trouble:
            self._trouble = trouble
            _log.error(
                "the table of limits can't be used (%s); until it can, limits hold for each worker"
                " by itself",
                trouble,
            )

    def _open(self) -> _Table:
        path = self._folder / "usage"
        try:
            return _Table(path)
        except FileNotFoundError:
            pass
        except ValueError as error:
            _log.error("%s %s; it is replaced, and what was used counts anew", path, error)
        with new_file(path) as handle:
            handle.write(_header())
            handle.write(bytes(_FIRST_ROW - handle.tell()))
            handle.truncate(_SIZE)
        return _Table(path)

    def _take_slot(self) -> None:
        for slot in range(SLOTS):
            descriptor = self._slot_file(slot)
            if _flocked(descriptor):
                self._slot, self._slot_lock = slot, descriptor
                return
            os.close(descriptor)
        raise OSError(errno.EAGAIN, f"{SLOTS} workers use it already")

    def _lives(self, slot: int) -> bool:
        """Whether a slot has an owner; to be asked under the lock, as starting ones look too."""
        descriptor = self._slot_file(slot)
        try:
            return not _flocked(descriptor)
        finally:
            os.close(descriptor)

    def _slot_file(self, slot: int) -> int:
        return os.open(self._folder / f"worker-{slot:02d}", os.O_RDWR | os.O_CREAT, 0o600)


class _Table:
    """The file, mapped. ValueError when it is none, or not of this version.

    What changes more than one's own words is to be done under the lock.
    """

    def __init__(self, path: Path) -> None:
        descriptor = os.open(path, os.O_RDWR)
        try:
            self._status = os.fstat(descriptor)
            if self._status.st_size != _SIZE:
                raise ValueError(f"has {self._status.st_size} bytes, and not {_SIZE}")
            memory = mmap.mmap(descriptor, _SIZE)
        finally:
            os.close(descriptor)
        self._path = path
        self.bytes = memoryview(memory)
        self.words = self.bytes.cast("Q")
        if self.bytes[: _HEADER.size].tobytes() != _header():
            raise ValueError(f"is no table of limits of version {VERSION}")
        if not (self.words[_WIDTH] <= SLOTS and self.words[_USED] <= ROWS):
            raise ValueError("is damaged")
        self._seen = -1

    def is_at(self, path: Path) -> bool:
        """Whether that is this file still."""
        with suppress(FileNotFoundError):
            return os.path.samestat(self._status, path.stat())
        return False

    def changed(self) -> bool:
        """Whether rows were given away since places were last asked for."""
        return self.words[_CHANGES] != self._seen

    def occupy(self, slot: int) -> None:
        """Begin with a slot: what the one before had under way has ended."""
        self.words[_WIDTH] = max(self.words[_WIDTH], slot + 1)
        for each in range(self.words[_WIDTH]):  # whoever had them before is looked for once
            self.words[_TAKEN + each] = 1
        for index in range(self.words[_USED]):
            self.words[_group(index, slot) + _RUNNING] = 0

    def absorb(self, slot: int, own: int, now: float) -> None:
        """Take over what the ended owner of a slot counted, but for the calls it had under way."""
        words = self.words
        for index in range(words[_USED]):
            source, target = _group(index, slot), _group(index, own)
            if any(words[source : source + _WORDS]):
                _pour(words, source, words, target, now)
                words[source + _RUNNING] = words[source + _RUNNING + 1] = 0
        words[_TAKEN + slot] = 0

    def narrow(self, own: int) -> None:
        """Leave out of all sums the slots above the highest one that is taken."""
        taken = [slot for slot in range(self.words[_WIDTH]) if self.words[_TAKEN + slot]]
        self.words[_WIDTH] = max([own, *taken]) + 1

    def places(self, names: list[str], now: float) -> dict[str, int]:
        """The rows of those names, given to them if need be; fewer when the table is full.

        Raises OSError when the disk is.
        """
        directory = self._directory()
        places: dict[str, int] = {}
        wanted = {_digest(name): name for name in names}
        for index, (digest, since) in enumerate(directory):
            name = wanted.pop(digest, None)
            if name is not None:
                places[name] = index
            if (name is None) != bool(since) or since > now + IDLE:
                self._enter(index, digest, 0 if name is not None else max(1, int(now)))
        if wanted:
            free = self._free(directory, now)
            for (digest, name), index in zip(wanted.items(), free, strict=False):
                self._give(index, digest)
                places[name] = index
            self.words[_CHANGES] += 1
        self._seen = self.words[_CHANGES]
        return places

    def _directory(self) -> list[tuple[bytes, int]]:
        """Digest and since when nobody wants it, of each row; damaged ones are nobody's."""
        end = _DIRECTORY + self.words[_USED] * _ENTRY.size
        found: list[tuple[bytes, int]] = []
        for digest, since, _, checksum in _ENTRY.iter_unpack(self.bytes[_DIRECTORY:end]):
            if zlib.crc32(digest) != checksum:
                _log.error("a row of %s is damaged; what was counted there is lost", self._path)
                digest, since = bytes(16), 1  # noqa: PLW2901  # put right
                self._enter(len(found), digest, since)
                self.words[_CHANGES] += 1
            found.append((digest, since))
        return found

    def _free(self, directory: list[tuple[bytes, int]], now: float) -> Generator[int]:
        """Rows to give away: those long unwanted, without any use that still counts, then new."""
        minute = int(now // 60)
        scratch = Row()
        for index, (_, since) in enumerate(directory):
            if since and since <= now - IDLE:
                scratch.point(self, index, 0)
                if not any(scratch.usage(minute, minute // 1440)):
                    yield index
        yield from range(len(directory), ROWS)

    def _give(self, index: int, digest: bytes) -> None:
        descriptor = os.open(self._path, os.O_RDWR)
        try:  # not by way of the mapping, where a full disk would end the process
            if os.pwrite(descriptor, bytes(_PAGE), _row_start(index)) < _PAGE:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        finally:
            os.close(descriptor)
        self._enter(index, digest, 0)
        self.words[_USED] = max(self.words[_USED], index + 1)

    def _enter(self, index: int, digest: bytes, since: int) -> None:
        start = _DIRECTORY + index * _ENTRY.size
        entry = _ENTRY.pack(digest, since, 0, zlib.crc32(digest))
        self.bytes[start : start + _ENTRY.size] = entry


def _row_start(index: int) -> int:
    return _FIRST_ROW + index * _PAGE


def _group(index: int, slot: int) -> int:
    return _row_start(index) // 8 + slot * _WORDS


def _header() -> bytes:
    content = _HEADER.pack(_MAGIC, VERSION, SLOTS, ROWS, 0)
    return _HEADER.pack(_MAGIC, VERSION, SLOTS, ROWS, zlib.crc32(content))


def _digest(name: str) -> bytes:
    return hashlib.blake2b(name.encode(), digest_size=16).digest()


@contextmanager
def _lock(path: Path, patience: float) -> Generator[bool]:
    """Hold the lock of that file, if it can be had in so many seconds; it goes with the process."""
    deadline = time.monotonic() + patience
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        held = _flocked(descriptor)
        while not held and time.monotonic() < deadline:
            time.sleep(0.002)
            held = _flocked(descriptor)
        yield held
    finally:
        os.close(descriptor)


def _flocked(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
