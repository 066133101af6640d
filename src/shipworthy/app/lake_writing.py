"""The lake writer's process: `python -m shipworthy.app.lake_writing FOLDER`."""

from __future__ import annotations

import secrets
import sys
import threading
import time
from functools import partial
from pathlib import Path

from shipworthy.app.processes import Worker
from shipworthy.app.session import Session, open_session
from shipworthy.errors import ShipworthyError
from shipworthy.loops import run_until
from shipworthy.stores.journal import JournalReader
from shipworthy.stores.lake.writer import Files, LakeWriter

BETWEEN_SECONDS = 0.05
"""How long the lake's lock is free between batches."""
LONGEST_WAIT = 5.0
"""Seconds between tries, through faults."""
LAST_SECONDS = 5.0
"""How long a writer that was told to stop goes on while there are records; the rest may wait."""


def make_writer(session: Session) -> LakeWriter:
    """The writer of a project's lake."""
    project = session.project
    return LakeWriter(
        files=Files(
            lake=project.lake,
            place=project.lake_writer,
            condition=project.lake_condition,
            lock=project.lake_lock,
        ),
        journal=JournalReader(project.journals),
        ledger=session.ledger,
        clock=session.clock,
        new_slot=partial(secrets.token_hex, 8),
        keep=project.settings.lake.keep,
    )


def move_all(writer: LakeWriter, stop: threading.Event) -> None:
    """Move what there is, letting others at the lake in between."""
    deadline = float("inf")
    while writer.cycle() and time.monotonic() < deadline:
        if stop.wait(BETWEEN_SECONDS):
            deadline = min(deadline, time.monotonic() + LAST_SECONDS)


def main(folder: Path) -> int:
    """Move records until told to stop, or until the process that started this one is gone.

    Ends with 3 when it can't even begin.
    """
    worker = Worker()
    try:
        session = open_session(folder)
        work = worker.turn(partial(move_all, make_writer(session), worker.stop))
        every = session.project.settings.lake.every
        run_until(worker.stop, work, every=every, longest_wait=max(every, LONGEST_WAIT))
    except ShipworthyError as error:
        sys.stderr.write(f"{error}\n")
        return 3
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
