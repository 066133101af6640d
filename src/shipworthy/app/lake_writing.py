"""The lake writer's process: `python -m shipworthy.app.lake_writing FOLDER`."""

from __future__ import annotations

import logging
import signal
import sys
import threading
from pathlib import Path
from types import FrameType

import msgspec

from shipworthy.app.processes import follow_parent, log_to_stderr
from shipworthy.app.session import Session, open_session
from shipworthy.errors import ShipworthyError
from shipworthy.loops import run_until
from shipworthy.settings import Project
from shipworthy.stores.lake.state import Condition

log = logging.getLogger(__name__)


def read_condition(project: Project) -> Condition | None:
    """How the lake's writer is; None where none has run yet."""
    try:
        return msgspec.json.decode(project.lake_condition.read_bytes(), type=Condition)
    except (OSError, msgspec.MsgspecError):
        return None


def make_work(session: Session) -> None:
    """Nothing yet."""


def main(folder: Path) -> int:
    """Move records until told to stop, or until the process that started this one is gone.

    Ends with 3 when it can't even begin.
    """
    log_to_stderr()
    stop = threading.Event()

    def end(_number: int, _frame: FrameType | None) -> None:
        stop.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, end)
    follow_parent(stop.set)
    try:
        session = open_session(folder)
        every = session.project.settings.lake.every
        run_until(stop, lambda: make_work(session), every=every)
    except ShipworthyError as error:
        log.warning("%s", error)
        return 3
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
