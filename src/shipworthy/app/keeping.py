"""The keeper's process: `python -m shipworthy.app.keeping FOLDER`."""

from __future__ import annotations

import logging
import signal
import sys
import threading
from functools import partial
from pathlib import Path
from types import FrameType

from shipworthy.app.processes import follow_parent, log_to_stderr
from shipworthy.app.session import Session, new_id, open_session
from shipworthy.errors import ShipworthyError
from shipworthy.loops import run_until
from shipworthy.release.catalogue import built_in
from shipworthy.rollout.keeper import Keeper, Superseded
from shipworthy.stores.files import replace_file
from shipworthy.stores.journal import JournalReader
from shipworthy.watch.evidence import gather

log = logging.getLogger(__name__)

TICK_SECONDS = 0.1


def make_keeper(session: Session) -> Keeper:
    """The keeper of a project."""
    project = session.project
    return Keeper(
        ledger=session.ledger,
        journal=JournalReader(project.journals, project.settings.journal.kept),
        gather=gather,
        publish=partial(replace_file, project.snapshot),
        clock=session.clock,
        new_id=new_id,
        checklist=built_in(),
        max_stale=project.settings.keys.max_stale,
    )


def main(folder: Path) -> int:
    """Decide until told to stop, or until the process that started this one is gone.

    Ends with 3 when it can't even begin, and when a newer keeper has taken over.
    """
    log_to_stderr()
    stop = threading.Event()

    def end(_number: int, _frame: FrameType | None) -> None:
        stop.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, end)
    follow_parent(stop.set)
    try:
        run_until(stop, make_keeper(open_session(folder)).tick, every=TICK_SECONDS)
    except (ShipworthyError, Superseded) as error:
        log.warning("%s", error)
        return 3
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
