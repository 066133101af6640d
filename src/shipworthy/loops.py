"""Loops that go on: at a pace, through faults, until told to stop."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

from shipworthy.errors import ShipworthyError

log = logging.getLogger(__name__)


def run_until(
    stop: threading.Event,
    work: Callable[[], object],
    *,
    every: float,
    longest_wait: float = 2.0,
) -> None:
    """Call `work` every so many seconds until `stop` is set, and once more behind that.

    A ShipworthyError is a fault outside that may pass: it is logged once for as long as it stays
    the same, and the wait grows to `longest_wait` seconds. Anything else is a bug and ends the
    loop, so that the process is seen to die and is started anew.
    """
    wait, last = every, ""
    while True:
        final = stop.is_set()
        try:
            work()
        except ShipworthyError as error:
            if str(error) != last:
                log.warning("%s", error)
            wait, last = min(wait * 2, longest_wait), str(error)
        else:
            if last:
                log.warning("recovered")
            wait, last = every, ""
        if final:
            return
        stop.wait(wait)
