"""The gateway workers' journals: append-only local files, tailed by keeper and lake writer.

A worker writes segments `<creation, ns>-<worker>.journal` into a folder that all workers of a host
share. A segment is

    header    twice, so that no single damaged byte makes a segment unreadable:
              "SWJOURNL" | version u16 | sync marker, 4 random bytes | seed u32 | crc32 u32
    frames    sync marker | length u32 | crc32 u32 of the payload, begun at the seed | payload

with little-endian integers and one MessagePack record as the payload of a frame. Marker and seed
are drawn for each segment: behind a damaged stretch the reader looks for the next marker, and
nobody can send a request whose body would be taken for a frame there.

A writer holds an exclusive `flock` on its segment for as long as it may still append, and the
kernel drops it with the process, however that ends. So an unlocked segment with a header never
changes again: what is incomplete at its end was never acknowledged. At the end of a locked one it
may be a write under way.

This module is imported by every gateway worker: no numpy, no SQLAlchemy, no pydantic.
"""

from __future__ import annotations

import fcntl
import os
import re
import secrets
import struct
import sys
import time
import zlib
from collections import Counter
from collections.abc import Generator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from shipworthy.domain.records import Record

VERSION = 1
MAX_RECORD = 8 * 1024 * 1024
"""Largest payload of a frame in bytes. A larger record is dropped as too large."""

SEGMENT_BYTES = 16 * 1024 * 1024
SEGMENT_SECONDS = 600.0
"""Age at which a segment is ended, so that what it holds can be forgotten."""
MAX_READ = 64 * 1024 * 1024
"""Bytes of frames after which a reader gives what it has, to bound its memory."""
_WINDOW = 1024 * 1024
_RESCAN = 0.25  # seconds between looks for space when the journals are full
_SCANS = 16  # looks for space while a segment fills
_LEAST_SEGMENTS = 8  # that the journals may take together
_RESERVE = 64 * 1024 * 1024  # bytes of the disk that are left to ledger, snapshot and lake,
_RESERVE_SHARE = 8  # or this part of a small disk: with none at all nothing could ever be deleted
_STILLBORN = 60.0  # seconds after which a segment without a header never gets one

_MAGIC = b"SWJOURNL"
_HEADER = struct.Struct("<8sH4sII")
_FRAME = struct.Struct("<4sII")
_START = 2 * _HEADER.size

_NAME = re.compile(r"(\d{20})-([A-Za-z0-9_-]{1,64})\.journal")

_UNENCODABLE = (TypeError, ValueError, OverflowError, RecursionError, msgspec.MsgspecError)
_UNDECODABLE = (ValueError, RecursionError, msgspec.MsgspecError)


class JournalWriter:
    """One worker's journal. Not for several threads at once.

    Nothing here raises while serving: what can't be written is dropped and counted in `dropped`, by
    reason: `full` (all journals of the folder exceed `max_bytes`), `disk` (it refused, or has only
    left what others need to make room again), `too large` and `invalid` (the record can't be
    encoded). The folder and segments are made when first needed.

    Args:
        folder: Where all workers of this host write.
        worker: This worker's name: letters, digits, `-` and `_`.
        max_bytes: Most that all segments in the folder may take together; with several workers it
            is exceeded by at most a sixteenth of a segment, or one record, for each.
        segment_bytes: Size at which a new segment is begun; less when `max_bytes` is small, since
            only what is closed can be deleted. One is also begun when the last is ten minutes old.

    """

    def __init__(
        self, folder: Path, worker: str, max_bytes: int, segment_bytes: int = SEGMENT_BYTES
    ) -> None:
        if not _NAME.fullmatch(f"{0:020d}-{worker}.journal"):
            message = f"{worker!r} is no worker name; use 1 to 64 letters, digits, '-' and '_'"
            raise ValueError(message)
        self.dropped: Counter[str] = Counter()
        self._folder = folder
        self._worker = worker
        self._max_bytes = max_bytes
        self._segment_bytes = min(segment_bytes, max_bytes // _LEAST_SEGMENTS)
        self._encoder = msgspec.msgpack.Encoder()
        self._created = 0
        self._descriptor = -1
        self._marker = b""
        self._seed = 0
        self._size = 0
        self._begun = 0.0
        self._room = 0  # bytes that may still be written before space is looked at again
        self._full = ""  # the reason, while there is no room
        self._looked = 0.0

    def append(self, record: Record) -> bool:
        """Whether the record is written (`write(2)` returned); False when it was dropped."""
        try:
            payload = self._encoder.encode(record)
        except _UNENCODABLE:
            return self._drop("invalid")
        length = len(payload)
        if length > MAX_RECORD:
            return self._drop("too large")
        total = _FRAME.size + length
        if total > self._room and (reason := self._look_for_room(total)):
            return self._drop(reason)
        if self._descriptor < 0 or self._size + total > self._segment_bytes or self._is_old():
            self._begin()
            if self._descriptor < 0:
                return self._drop("disk")
        # One copy of the payload costs less than views of a buffer that is kept.
        header = _FRAME.pack(self._marker, length, zlib.crc32(payload, self._seed))
        return self._write(header + payload, total)

    def close(self) -> None:
        """End the segment; what is appended later begins another one."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def rest(self) -> None:
        """End a segment that is old; to be called now and then when nothing may be appended."""
        if self._is_old():
            self.close()

    def _is_old(self) -> bool:
        return time.monotonic() - self._begun > SEGMENT_SECONDS

    def _write(self, frame: bytes, total: int) -> bool:
        try:
            written = os.write(self._descriptor, frame)
        except OSError:
            written = -1
        if written == total:
            self._size += total
            self._room -= total
            return True
        if written > 0:
            try:
                os.ftruncate(self._descriptor, self._size)
            except OSError:
                # A torn frame stays. Nothing may follow it in this segment: the reader would take
                # what is acknowledged behind it for a write that is still under way.
                self.close()
        return self._drop("disk")

    def _drop(self, reason: str) -> bool:
        self.dropped[reason] += 1
        return False

    def _look_for_room(self, needed: int) -> str:
        """Why there is none, or nothing; looks at most a few times a second while it is so."""
        now = time.monotonic()
        if self._full and now - self._looked < _RESCAN:
            return self._full
        self._looked = now
        try:
            free = self._max_bytes - sum(size for _, size in _segments(self._folder))
        except OSError:
            free = self._segment_bytes  # beginning a segment will tell what is wrong
        self._full = "full" if free < needed else ""
        left = self._left_on_disk()
        if not self._full and left < needed:
            self._full = "disk"
        # Other workers write too, so look again soon.
        soon = max(needed, self._segment_bytes // _SCANS)
        self._room = 0 if self._full else min(free, left, soon)
        return self._full

    def _left_on_disk(self) -> int:
        """Bytes that may be written without taking what others need to make room again."""
        try:
            disk = os.statvfs(self._folder)
        except OSError:
            return self._segment_bytes  # as above
        if not disk.f_blocks:
            return self._segment_bytes  # some kinds of file systems don't tell
        size, free = disk.f_blocks * disk.f_frsize, disk.f_bavail * disk.f_frsize
        reserve = min(_RESERVE, size // _RESERVE_SHARE)
        # What a whole segment says must fit into the lake before the segment can be deleted.
        self._segment_bytes = min(self._segment_bytes, reserve // 2)
        return free - reserve

    def _begin(self) -> None:
        """Begin a segment; the one before stays in use, and may grow, when that fails."""
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            descriptor = self._create()
        except OSError:
            return
        marker, seed = secrets.token_bytes(4), secrets.randbits(32)
        fields = _HEADER.pack(_MAGIC, VERSION, marker, seed, 0)[:-4]
        header = fields + struct.pack("<I", zlib.crc32(fields))
        try:
            # Locked before the header is there: a segment with a header and no lock is closed.
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            complete = os.write(descriptor, header * 2) == _START
        except OSError:
            complete = False
        if not complete:
            with suppress(OSError):
                (self._folder / self._name()).unlink()
            os.close(descriptor)
            return
        self.close()
        self._descriptor, self._marker, self._seed, self._size = descriptor, marker, seed, _START
        self._begun = time.monotonic()

    def _create(self) -> int:
        """Make a file that sorts behind this worker's earlier ones, whatever the clock says."""
        if not self._created:
            mine = [n for n, _ in _segments(self._folder) if _worker_of(n) == self._worker]
            self._created = max((int(name[:20]) for name in mine), default=0)
        while True:
            self._created = max(self._created + 1, time.time_ns())
            flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_EXCL
            with suppress(FileExistsError):  # another process bears this worker's name
                return os.open(self._folder / self._name(), flags, 0o600)

    def _name(self) -> str:
        return f"{self._created:020d}-{self._worker}.journal"


@dataclass(slots=True)
class _Haul:
    """Records as they are read, until there are `limit` or they took about `max_bytes`."""

    limit: int
    max_bytes: int
    records: list[Record] = field(default_factory=list[Record])
    taken: int = 0

    @property
    def full(self) -> bool:
        return len(self.records) >= self.limit or self.taken >= self.max_bytes


class JournalReader:
    """All workers' journals in a folder.

    Nothing here raises for what is in the files. What can't be read is passed over and counted in
    `skipped`, by reason: `corrupt` (a damaged stretch between whole frames, or the end of a closed
    segment), `torn` (the incomplete end of a closed segment: never acknowledged), `unknown` (whole,
    but no record that this version knows), `version` (segments that only a newer one can read; they
    stay unread), `unreadable` (the system refuses to open one; tried again each time) and `missing`
    (read before, and gone when it was to be read again).

    Args:
        folder: Where the workers of this host write.

    """

    def __init__(self, folder: Path) -> None:
        self.skipped: Counter[str] = Counter()
        self._folder = folder
        self._decoder = msgspec.msgpack.Decoder(Record)
        self._refused: set[str] = set()

    def read(
        self, cursors: Mapping[str, int], limit: int, max_bytes: int = MAX_READ
    ) -> tuple[list[Record], dict[str, int]]:
        """Up to `limit` further records, and the cursors behind them.

        Reading also ends once their frames take `max_bytes`, give or take a frame. In order within
        each worker's journal; workers share both limits evenly. Cursors of segments that are gone
        are left out.
        """
        try:
            segments = _segments(self._folder)
        except OSError:
            self.skipped["unreadable"] += 1
            return [], dict(cursors)
        after = {name: cursors[name] for name, _ in segments if name in cursors}
        self._refused.intersection_update(name for name, _ in segments)
        unread: dict[str, list[str]] = {}
        for name, size in segments:
            if size > after.get(name, 0) and name not in self._refused:
                unread.setdefault(_worker_of(name), []).append(name)
        whole = _Haul(limit, max_bytes)
        queues: list[list[str]] = list(unread.values())
        while queues and not whole.full:
            # Whoever has less to say than its share leaves the rest to the others.
            shares = len(queues)
            queues = [names for names in queues if self._read_share(names, after, whole, shares)]
        return whole.records, after

    def read_between(self, start: Mapping[str, int], end: Mapping[str, int]) -> list[Record]:
        """The records between two cursors that `read` took and gave: the same ones as then."""
        whole = _Haul(limit=sys.maxsize, max_bytes=sys.maxsize)
        for name, behind in end.items():
            after = {name: start.get(name, 0)}
            if behind <= after[name]:
                continue
            try:
                with _opened(self._folder / name) as descriptor:
                    self._read_segment(name, descriptor, after, whole, behind)
            except FileNotFoundError:
                self.skipped["missing"] += 1
        return whole.records

    def discard(self, cursors: Mapping[str, int], *others: Mapping[str, int]) -> int:
        """Delete the segments that are closed and wholly behind all these cursors; how many.

        Also those whose worker died before it could write anything.
        """
        gone = 0
        with suppress(OSError):
            for name, size in _segments(self._folder):
                read = all(each.get(name, 0) >= size for each in (cursors, *others))
                gone += (read or size < _START) and self._delete(name, size)
        return gone

    def _delete(self, name: str, size: int) -> bool:
        with suppress(OSError), _opened(self._folder / name) as descriptor:
            status = os.fstat(descriptor)
            young = time.time() - status.st_mtime < _STILLBORN
            if size < _START and young:  # its worker may be about to lock it
                return False
            # The last record may have come after the folder was listed.
            if _is_closed(descriptor) and status.st_size == size:
                (self._folder / name).unlink()
                return True
        return False

    def _read_share(
        self, names: list[str], after: dict[str, int], whole: _Haul, shares: int
    ) -> bool:
        """Read one worker's segments, oldest first; whether there was more than its share."""
        haul = _Haul(
            max(1, (whole.limit - len(whole.records)) // shares),
            max(1, (whole.max_bytes - whole.taken) // shares),
        )
        for name in names:
            if haul.full or whole.full:
                break
            try:
                with _opened(self._folder / name) as descriptor:
                    self._read_segment(name, descriptor, after, haul)
            except FileNotFoundError:
                continue
            except OSError:
                self.skipped["unreadable"] += 1
        whole.records += haul.records
        whole.taken += haul.taken
        return haul.full

    def _read_segment(
        self,
        name: str,
        descriptor: int,
        after: dict[str, int],
        haul: _Haul,
        end: int = sys.maxsize,
    ) -> None:
        content = os.pread(descriptor, _START, 0)
        if len(content) < _START:
            return  # not begun yet
        header = _read_header(content)
        if header is None:
            size = os.fstat(descriptor).st_size
            self.skipped["corrupt"] += size > after.get(name, 0)
            after[name] = size
            return
        version, marker, seed = header
        if version != VERSION:
            self.skipped["version"] += 1
            self._refused.add(name)
            return
        segment = _Segment(descriptor, marker, seed, self._decoder, self.skipped)
        after[name] = segment.read(max(after.get(name, 0), _START), end, haul)


class _Segment:
    """An open segment with a sound header."""

    def __init__(
        self,
        descriptor: int,
        marker: bytes,
        seed: int,
        decoder: msgspec.msgpack.Decoder[Record],
        skipped: Counter[str],
    ) -> None:
        self._descriptor = descriptor
        self._marker = marker
        self._seed = seed
        self._decoder = decoder
        self._skipped = skipped

    def read(self, offset: int, end: int, haul: _Haul) -> int:
        """Read on until the haul is full, or up to `end`; give the offset behind it."""
        # Asked before reading: if it is closed now, what is read below is final.
        closed = _is_closed(self._descriptor)
        while not haul.full and offset < end:
            window = os.pread(self._descriptor, min(_WINDOW, end - offset), offset)
            if not window:
                break
            used = self._decode_frames(window, haul)
            if not used:
                behind = self._pass(offset, haul.records, closed=closed)
                if behind == offset:
                    break
                used = behind - offset
            offset += used
            haul.taken += used
        return offset

    def _decode_frames(self, window: bytes, haul: _Haul) -> int:
        """Decode the whole frames that a window begins with; give the bytes that they take."""
        position, size, records = 0, len(window), haul.records
        unpack, header, marker, seed = _FRAME.unpack_from, _FRAME.size, self._marker, self._seed
        room = haul.limit - len(records)
        most = haul.max_bytes - haul.taken
        while room > 0 and position < most and position + header <= size:
            found, length, checksum = unpack(window, position)
            start = position + header
            end = start + length
            if found != marker or end > size:
                break
            payload = window[start:end]
            if zlib.crc32(payload, seed) != checksum:
                break
            room -= self._decode(payload, records)
            position = end
        return position

    def _decode(self, payload: bytes, records: list[Record]) -> bool:
        try:
            records.append(self._decoder.decode(payload))
        except _UNDECODABLE:
            self._skipped["unknown"] += 1
            return False
        return True

    def _pass(self, offset: int, records: list[Record], *, closed: bool) -> int:
        """Get over what is no whole frame in a window; give where to go on, or the same offset."""
        payload = self._frame_at(offset)
        if payload is not None:  # larger than a window
            self._decode(payload, records)
            return offset + _FRAME.size + len(payload)
        following = self._find_frame(offset + 1)
        if following is not None:
            self._skipped["corrupt"] += 1
            return following
        if not closed:
            return offset  # a write may be under way
        self._skipped["torn" if self._is_torn(offset) else "corrupt"] += 1
        return os.fstat(self._descriptor).st_size

    def _frame_at(self, offset: int) -> bytes | None:
        """The payload of the whole frame that begins here."""
        header = os.pread(self._descriptor, _FRAME.size, offset)
        if len(header) < _FRAME.size:
            return None
        found, length, checksum = _FRAME.unpack(header)
        if found != self._marker or length > MAX_RECORD:
            return None
        payload = os.pread(self._descriptor, length, offset + _FRAME.size)
        whole = len(payload) == length and zlib.crc32(payload, self._seed) == checksum
        return payload if whole else None

    def _find_frame(self, start: int) -> int | None:
        """Where the next whole frame begins."""
        overlap = len(self._marker) - 1
        while True:
            window = os.pread(self._descriptor, _WINDOW, start)
            position = window.find(self._marker)
            while position >= 0:
                if self._frame_at(start + position) is not None:
                    return start + position
                position = window.find(self._marker, position + 1)
            if len(window) < _WINDOW:
                return None
            start += len(window) - overlap

    def _is_torn(self, offset: int) -> bool:
        """Whether a frame begins here that the segment is too short for."""
        header = os.pread(self._descriptor, _FRAME.size, offset)
        if len(header) < _FRAME.size:
            return True
        found, length, _ = _FRAME.unpack(header)
        end = offset + _FRAME.size + length
        return found == self._marker and end > os.fstat(self._descriptor).st_size


def _segments(folder: Path) -> list[tuple[str, int]]:
    """Names and sizes in bytes, oldest first; a folder that is not there has none."""
    segments: list[tuple[str, int]] = []
    with suppress(FileNotFoundError), os.scandir(folder) as entries:
        for entry in entries:
            if _NAME.fullmatch(entry.name):
                with suppress(FileNotFoundError):
                    segments.append((entry.name, entry.stat().st_size))
    return sorted(segments)


def _worker_of(name: str) -> str:
    return name[21 : -len(".journal")]


@contextmanager
def _opened(path: Path) -> Generator[int]:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _is_closed(descriptor: int) -> bool:
    """Whether no writer holds a segment any more; to be asked only once it has a header."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        return False
    fcntl.flock(descriptor, fcntl.LOCK_UN)
    return True


def _read_header(content: bytes) -> tuple[int, bytes, int] | None:
    """Version, marker and seed, from whichever copy is undamaged."""
    for start in (0, _HEADER.size):
        magic, version, marker, seed, checksum = _HEADER.unpack_from(content, start)
        if magic == _MAGIC and zlib.crc32(content[start : start + _HEADER.size - 4]) == checksum:
            return version, marker, seed
    return None
