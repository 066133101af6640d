"""Child processes that live and die with the one that started them."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from shipworthy.runtimes.logs import BoundedLog

log = logging.getLogger(__name__)

_FIRST_WAIT, _LONGEST_WAIT = 0.2, 10.0
_LONG_LIFE = 30.0  # a child that lived this long starts its waits anew


def log_to_stderr() -> None:
    """Log as a line each, with the time; the parent keeps what is written."""
    logging.basicConfig(
        level=logging.INFO,
        stream=sys.stderr,
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
    )


def follow_parent(stop: Callable[[], object]) -> None:
    """Call `stop` when the parent is gone: it holds the other end of our standard input."""

    def wait() -> None:
        with contextlib.suppress(OSError, ValueError):
            while os.read(sys.stdin.fileno(), 1024):
                pass
        stop()

    threading.Thread(target=wait, name="follow-parent", daemon=True).start()


@dataclass(slots=True)
class Child:
    """A process kept running: started anew when it dies, with growing waits between."""

    name: str
    command: Sequence[str]
    log_file: Path
    restarts: int = 0
    problem: str = ""
    _process: asyncio.subprocess.Process | None = None
    _stopping: bool = False

    @property
    def pid(self) -> int | None:
        """The process id while it runs."""
        process = self._process
        return process.pid if process is not None and process.returncode is None else None

    async def run(self) -> None:
        """Keep it running until `stop`."""
        wait, loop = _FIRST_WAIT, asyncio.get_running_loop()
        while not self._stopping:
            started = loop.time()
            try:
                problem = f"ended ({_ending(await self._live())}); see {self.log_file}"
            except OSError as error:  # no process, descriptor or memory left: that may pass
                problem = f"can't be started ({error.strerror})"
            if self._stopping:
                return
            self.restarts += 1
            self.problem = f"{self.name} {problem}"
            wait = _FIRST_WAIT if loop.time() - started > _LONG_LIFE else wait
            log.warning("%s; it is started again in %.1f s", self.problem, wait)
            await asyncio.sleep(wait)
            wait = min(wait * 2, _LONGEST_WAIT)

    async def _live(self) -> int:
        process = self._process = await asyncio.create_subprocess_exec(
            *self.command,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            start_new_session=True,  # a Ctrl-C in the terminal is for the parent to pass on
        )
        output = BoundedLog(self.log_file)
        try:
            while process.stdout is not None and (said := await process.stdout.read(65_536)):
                output.write(said)
            return await process.wait()
        finally:
            output.close()

    async def stop(self, grace: float) -> None:
        """Ask it to end, and end it by force after `grace` seconds."""
        self._stopping = True
        process = self._process
        if process is None or process.returncode is not None:
            return
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(signal.SIGTERM)
        try:
            await asyncio.wait_for(process.wait(), grace)
        except TimeoutError:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            await process.wait()


def _ending(code: int) -> str:
    return f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
