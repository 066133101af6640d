"""The keeper's process: `python -m shipworthy.app.keeping FOLDER`.

Any number may run; one of them is in office, the others stand by.
"""

from __future__ import annotations

import sys
from pathlib import Path

from shipworthy.app.place import keeper_name
from shipworthy.app.processes import Worker
from shipworthy.app.session import Session, new_id, open_session
from shipworthy.errors import ShipworthyError
from shipworthy.loops import run_until
from shipworthy.release.catalogue import built_in
from shipworthy.rollout.keeper import Keeper
from shipworthy.stores.journal import JournalReader
from shipworthy.stores.snapshots import SnapshotFolder
from shipworthy.watch.evidence import gather

TICK_SECONDS = 0.1
_LONGEST_WAIT = 0.5  # behind a fault; a ledger that is locked has been waited for by then
_PATIENCE = 60.0  # for a turn, which is bounded: one that takes longer waits for what won't come


def make_keeper(session: Session) -> Keeper:
    """A keeper of the project; its name tells people which process it is."""
    project = session.project
    return Keeper(
        holder=keeper_name(project),
        ledger=session.ledger,
        journal=JournalReader(project.journals),
        gather=gather,
        snapshots=SnapshotFolder(project.snapshots),
        clock=session.clock,
        new_id=new_id,
        checklist=built_in(),
        max_stale=project.settings.keys.max_stale,
    )


def main(folder: Path) -> int:
    """Decide or stand by until told to stop, or until the process that started this one is gone.

    Ends with 3 when it can't even begin.
    """
    worker = Worker(_PATIENCE)
    try:
        keeper = make_keeper(open_session(folder))
        turn = worker.turn(keeper.tick)
        run_until(worker.stop, turn, every=TICK_SECONDS, longest_wait=_LONGEST_WAIT)
        keeper.retire()
    except ShipworthyError as error:
        sys.stderr.write(f"{error}\n")
        return 3
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
