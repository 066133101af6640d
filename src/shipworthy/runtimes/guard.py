"""Runs any server's command and ends it, with all that it started, when stdin does.

`python -I guard.py COMMAND…`, started in a process group of its own. Our own model server watches
its stdin itself; a server that is not ours would outlive the one that asked for it. On Linux the
server is killed also when this process is, and this one goes on if it is stopped when its parent
dies: it would not see stdin end.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence

_PR_SET_PDEATHSIG = 1


def _at_death_of_parent(number: signal.Signals) -> None:
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, number)


def main(command: Sequence[str]) -> int:
    """Run the command; its exit code, in the shell's way when a signal ended it."""
    _at_death_of_parent(signal.SIGCONT)
    try:
        server = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            preexec_fn=lambda: _at_death_of_parent(signal.SIGKILL),  # noqa: PLW1509  # no thread yet
        )
    except OSError as error:
        sys.stderr.write(f"{command[0]} does not start: {error.strerror}\n")
        return 127

    def watch() -> None:
        while os.read(0, 4_096):  # not sys.stdin: its lock would abort a later clean exit
            pass
        os.killpg(os.getpgrp(), signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):  # the group has them too
        signal.signal(number, signal.SIG_IGN)
    code = server.wait()
    return 128 - code if code < 0 else code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
