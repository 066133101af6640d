"""The audit log as a chain of hashes: an entry can't be changed, dropped or slipped in unseen."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import msgspec

from shipworthy.domain.canonical import digest_of

GENESIS = "sha256:" + "0" * 64
"""What the first entry follows."""


class AuditEntry(msgspec.Struct, frozen=True, kw_only=True):
    """One act. `actor` is a principal's id, never a name: people can be forgotten, acts can't."""

    sequence: int
    at: float
    actor: str
    act: str
    subject: str
    detail: dict[str, Any]
    previous: str
    hash: str = ""


class AuditHead(msgspec.Struct, frozen=True, kw_only=True):
    """The chain's end: what an exported copy must still contain."""

    sequence: int
    hash: str


def seal(entry: AuditEntry) -> AuditEntry:
    """The entry with the hash that covers all its other fields."""
    content = msgspec.to_builtins(entry)
    del content["hash"]
    return msgspec.structs.replace(entry, hash=digest_of(content))


def verify(
    entries: Iterable[AuditEntry],
    *,
    head: AuditHead | None = None,
    exported: AuditHead | None = None,
) -> list[str]:
    """What is wrong with a chain, oldest entry first; empty when it holds.

    `head` is where it must end now, so that nothing is taken off its end. With an `exported` head
    the chain must also still contain that entry, unaltered.
    """
    problems: list[str] = []
    previous, sequence = GENESIS, 0
    found = exported is None or exported.sequence == 0
    for entry in entries:
        sequence += 1
        if entry.sequence != sequence:
            problems.append(f"entry {sequence} is missing: {entry.sequence} follows {sequence - 1}")
            sequence = entry.sequence
        if entry.previous != previous:
            problems.append(f"entry {entry.sequence} does not follow the entry before it")
        if seal(entry).hash != entry.hash:
            problems.append(f"entry {entry.sequence} was altered: its hash does not match")
        if exported and entry.sequence == exported.sequence:
            found = True
            if entry.hash != exported.hash:
                problems.append(f"entry {entry.sequence} is not the one in the exported head")
        previous = entry.hash
    if head and (sequence, previous) != (head.sequence, head.hash):
        problems.append(f"the chain ends at {sequence}, and its head says {head.sequence}")
    if exported and not found:
        problems.append(
            f"the chain ends at {sequence}, before the exported head {exported.sequence}"
        )
    return problems
