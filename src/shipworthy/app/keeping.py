"""The keeper's process: `python -m shipworthy.app.keeping FOLDER`."""

from __future__ import annotations

import signal
import sys
import threading
from functools import partial
from pathlib import Path
from types import FrameType

from shipworthy.app.processes import follow_parent, log_to_stderr
from shipworthy.app.session import Session, new_id, open_session
from shipworthy.loops import run_until
from shipworthy.release.catalogue import built_in
from shipworthy.rollout.keeper import Keeper
from shipworthy.stores.files import replace_file
from shipworthy.stores.journal import JournalReader
from shipworthy.watch.evidence import gather

TICK_SECONDS = 0.1


def make_keeper(session: Session) -> Keeper:
    """The keeper of a project."""
    project = session.project
    return Keeper(
        ledger=session.ledger,
        journal=JournalReader(project.journals, project.settings.journal.keep_bytes),
        gather=gather,
        publish=partial(replace_file, project.snapshot),
        clock=session.clock,
        new_id=new_id,
        checklist=built_in(),
        max_stale=project.settings.keys.max_stale,
    )


def main(folder: Path) -> None:
    """Decide until told to stop, or until the process that started this one is gone."""
    log_to_stderr()
    keeper = make_keeper(open_session(folder))
    stop = threading.Event()

    def end(_number: int, _frame: FrameType | None) -> None:
        stop.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, end)
    follow_parent(stop.set)
    run_until(stop, keeper.tick, every=TICK_SECONDS)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
