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
from collections.abc import Callable
from contextlib import closing
from functools import partial
from pathlib import Path

import msgspec

from shipworthy.app.exporting import OtlpOptions, exporting
from shipworthy.app.processes import follow_parent, heartbeat, log_to_stderr
from shipworthy.errors import ShipworthyError
from shipworthy.gateway.metrics import Metrics
from shipworthy.gateway.options import GatewayOptions, Tls
from shipworthy.gateway.parts import Outside
from shipworthy.gateway.server import run
from shipworthy.gateway.traces import context_of
from shipworthy.stores.journal import JournalWriter
from shipworthy.stores.limits import UsageTable
from shipworthy.stores.snapshots import newest_snapshot


class WorkerOptions(msgspec.Struct, frozen=True, kw_only=True):
    """What a worker is told beyond its state folder.

    It is worker `index` of `workers`, accepts on the `sockets` that it inherits, gives the
    connections that are kept to the others by the `relay` when it ends, and shares its numbers with
    them in the folder `metrics`.
    """

    index: int
    workers: int
    sockets: tuple[int, ...]
    relay: tuple[int, int]
    certificate: str | None
    key: str | None
    max_body: int
    access_log: bool
    drain_seconds: float
    journal_bytes: int
    metrics: str
    otlp: OtlpOptions | None = None

    @property
    def name(self) -> str:
        """What its journal and its numbers bear, over all its restarts.

        Two processes may bear it for a while, since the one is ready before the other ends: each
        segment of a journal and each file of numbers still has one writer, which holds its lock.
        """
        return worker_name(self.index)


def worker_name(index: int | str) -> str:
    """The name of a worker's place: it is that of all processes that take it."""
    return f"worker-{index}"


def main(state: Path, options: WorkerOptions) -> int:
    """Serve until told to stop, or until the process that started this one is gone."""
    log_to_stderr()
    follow_parent(partial(os.kill, os.getpid(), signal.SIGTERM))  # end in order: drain first
    try:
        _serve(state, options)
    except ShipworthyError as error:
        sys.stderr.write(f"{error}\n")
        return error.exit_code
    return 0


def _serve(state: Path, options: WorkerOptions) -> None:
    journal = JournalWriter(
        state / "journals", worker=options.name, max_bytes=options.journal_bytes
    )
    ready, beat = _ready_and_beating(heartbeat())
    with (
        closing(journal),
        closing(Metrics(Path(options.metrics), options.name)) as metrics,
        closing(UsageTable(state / "limits")) as limits,
        exporting(options.otlp, options.name) as exporter,
    ):

        def each_second() -> None:
            beat()
            journal.rest()
            limits.tidy()
            if exporter is not None:
                metrics.settle_spans(exporter.dropped)

        run(
            _gateway_options(options),
            Outside(
                journal=journal,
                newest_snapshot=partial(newest_snapshot, state / "snapshots"),
                signing_secret=(state / "secrets" / "signing").read_bytes(),
                pseudonym_secret=(state / "secrets" / "pseudonyms").read_bytes(),
                clock=time.time,
                uniform=random.SystemRandom().random,
                limits=limits,
                context=exporter.context if exporter else context_of,
                export=exporter.emit if exporter else None,
            ),
            metrics=metrics,
            heartbeat=each_second,
            ready=ready,
        )


def _ready_and_beating(
    heartbeat: Callable[[], None],
) -> tuple[Callable[[str, int], None], Callable[[], None]]:
    """What is called once the worker listens, and what every second: its first beat says so."""
    listens = False

    def ready(_host: str, _port: int) -> None:
        nonlocal listens
        listens = True
        heartbeat()

    def beat() -> None:
        if listens:
            heartbeat()

    return ready, beat


def _gateway_options(options: WorkerOptions) -> GatewayOptions:
    tls: Tls | None = None
    if options.certificate is not None and options.key is not None:
        tls = Tls(certificate=Path(options.certificate), key=Path(options.key))
    return GatewayOptions(
        sockets=options.sockets,
        relay=options.relay,
        tls=tls,
        worker_index=options.index,
        workers=options.workers,
        max_body=options.max_body,
        access_log=options.access_log,
        drain_seconds=options.drain_seconds,
    )


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), msgspec.json.decode(sys.argv[2], type=WorkerOptions)))
