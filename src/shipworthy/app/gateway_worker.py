"""A gateway worker's process: `python -m shipworthy.app.gateway_worker STATE OPTIONS`.

STATE is the project's state folder, OPTIONS the worker's options as JSON. It reads no settings and
imports no more than the gateway needs, so that it starts fast, stays small, and starts again when
keeper and ledger are gone.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from contextlib import closing
from functools import partial
from pathlib import Path

import msgspec

from shipworthy.app.processes import follow_parent, heartbeat, log_to_stderr
from shipworthy.errors import ShipworthyError
from shipworthy.gateway.options import GatewayOptions
from shipworthy.gateway.server import run
from shipworthy.stores.journal import JournalWriter
from shipworthy.stores.snapshots import newest_snapshot

ADDRESS_FILE = "gateway.json"
"""Where a worker says, in the state folder, which address it got."""


class WorkerOptions(msgspec.Struct, frozen=True, kw_only=True):
    """What a worker is told beyond its state folder."""

    worker: str
    host: str
    port: int
    max_body: int
    journal_bytes: int


def main(state: Path, options: WorkerOptions) -> int:
    """Serve until told to stop, or until the process that started this one is gone."""
    log_to_stderr()
    follow_parent(partial(os.kill, os.getpid(), signal.SIGTERM))  # end in order: drain first
    try:
        journal = JournalWriter(
            state / "journals", worker=options.worker, max_bytes=options.journal_bytes
        )
        beat = heartbeat()

        def each_second() -> None:
            beat()
            journal.rest()

        with closing(journal):
            run(
                GatewayOptions(
                    host=options.host,
                    port=options.port,
                    max_body=options.max_body,
                    ready_file=state / ADDRESS_FILE,
                ),
                journal=journal,
                newest_snapshot=partial(newest_snapshot, state / "snapshots"),
                signing_secret=(state / "secrets" / "signing").read_bytes(),
                pseudonym_secret=(state / "secrets" / "pseudonyms").read_bytes(),
                clock=time.time,
                uniform=random.SystemRandom().random,
                heartbeat=each_second,
            )
    except ShipworthyError as error:
        sys.stderr.write(f"{error}\n")
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), msgspec.json.decode(sys.argv[2], type=WorkerOptions)))
