"""Having on the disk what was committed to a table.

delta-rs leaves that to the system. After a power cut a commit could be there without content, which
makes the table unreadable, while the journals that it came from are deleted.
"""

from __future__ import annotations

import os
from pathlib import Path
from urllib.parse import unquote

import msgspec

from shipworthy.stores.files import sync_folder

_LOG = "_delta_log"


class _Added(msgspec.Struct):
    path: str  # spelt as URLs are


class _Action(msgspec.Struct):
    add: _Added | None = None


_actions = msgspec.json.Decoder(_Action)


def sync_commits(table: Path, first: int, last: int) -> None:
    """Write through the commits of these versions, their files and checkpoints. Raises OSError."""
    log = table / _LOG
    files = [log / "_last_checkpoint"]
    for number in range(first, last + 1):
        commit = log / f"{number:020d}.json"
        files += [commit, *log.glob(f"{number:020d}.checkpoint*")]
        actions = map(_actions.decode, commit.read_bytes().splitlines())
        files += [table / unquote(action.add.path) for action in actions if action.add]
    for file in files:
        if file.exists():
            _sync(file)
    for folder in {file.parent for file in files} | {table, table.parent}:
        sync_folder(folder)


def _sync(file: Path) -> None:
    descriptor = os.open(file, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
