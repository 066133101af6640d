"""Processes that end with the one that started them, also when somebody has stopped them."""

from __future__ import annotations

import ctypes
import signal
import sys
from contextlib import suppress

_PR_SET_PDEATHSIG = 1


def wake_when_orphaned() -> None:
    """Have Linux continue this process, should it be stopped, once its parent has gone.

    It is for those that hold a pipe from their parent and end in order when that closes: a stopped
    process can't see it close. One that had gone before this was called has closed it already.

    POSIX ends a stopped process group (by SIGHUP and SIGCONT) when its parent in the same session
    dies, but not where whoever inherits it is of that session too, as the init of a container.
    """
    if sys.platform == "linux":
        with suppress(OSError, AttributeError):
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGCONT)
