"""What each child process of `shipworthy up` does: say that it lives, and end with its parent.

Every gateway worker imports this: no numpy, no SQLAlchemy, no pydantic.
"""

from __future__ import annotations

import logging
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from types import FrameType

from shipworthy.runtimes.orphans import wake_when_orphaned

HEARTBEAT_VARIABLE = "SHIPWORTHY_HEARTBEAT"
"""Names the descriptor of the pipe into which a child says that it lives."""

HEARTBEAT_SECONDS = 1.0
_ORPHAN_SECONDS = 30.0  # more than a gateway worker drains for


def log_to_stderr() -> None:
    """Log as a line each, with the time; the parent keeps what is written."""
    logging.basicConfig(
        level=logging.INFO,
        stream=sys.stderr,
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
    )


def follow_parent(stop: Callable[[], object]) -> None:
    """Call `stop` when the parent is gone: it holds the other end of our standard input.

    Whoever is not done then within half a minute is ended by force: nobody else would see that it
    hangs.
    """

    def wait() -> None:
        with suppress(OSError, ValueError):
            while os.read(sys.stdin.fileno(), 1024):
                pass
        stop()
        time.sleep(_ORPHAN_SECONDS)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=wait, name="follow-parent", daemon=True).start()
    wake_when_orphaned()


def heartbeat() -> Callable[[], None]:
    """Give what says that this process lives, for it to be called every HEARTBEAT_SECONDS.

    The first time also says that it is ready. It does nothing where nobody listens.
    """
    text = os.environ.pop(HEARTBEAT_VARIABLE, None)
    if text is None:
        return lambda: None
    descriptor = int(text)
    os.set_inheritable(descriptor, False)  # noqa: FBT003  # its only form
    os.set_blocking(descriptor, False)

    def beat() -> None:
        with suppress(OSError):  # full, because the parent is stopped, or closed: it has gone
            os.write(descriptor, b".")

    return beat


class Worker:
    """The frame of a child that works in turns, in its main thread.

    It says that it lives for as long as no turn takes longer than `patience` seconds; beyond that
    it is taken for one that hangs, which its parent ends.
    """

    def __init__(self, patience: float = math.inf) -> None:
        log_to_stderr()
        self.stop = threading.Event()
        self._patience = patience
        self._began = time.monotonic()
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._end)
        follow_parent(self.stop.set)
        threading.Thread(target=self._beat, name="heartbeat", daemon=True).start()

    def turn(self, work: Callable[[], object]) -> Callable[[], object]:
        """The same work, as turns."""

        def watched() -> object:
            self._began = time.monotonic()
            return work()

        return watched

    def _end(self, _number: int, _frame: FrameType | None) -> None:
        self.stop.set()

    def _beat(self) -> None:
        beat = heartbeat()
        while True:
            if time.monotonic() - self._began < self._patience:
                beat()
            time.sleep(HEARTBEAT_SECONDS)
