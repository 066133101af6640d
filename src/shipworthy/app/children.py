"""The child processes of `shipworthy up`: kept alive, and told about in a file.

They live and die with the process that runs this; `processes` has their side of it.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from shipworthy import __version__
from shipworthy.app.processes import HEARTBEAT_VARIABLE
from shipworthy.ports import Clock
from shipworthy.runtimes.logs import BoundedLog
from shipworthy.settings import Project

log = logging.getLogger(__name__)

PROCESSES_FILE = "processes.json"
"""In the state folder; it is there while an `up` runs, or after one that was killed."""

_FIRST_WAIT, _LONGEST_WAIT = 0.2, 10.0
_QUICK_DEATH = 5.0  # a life shorter than this counts against a child
_START_SECONDS = 60.0  # from its start to its first word, on a machine under load
_STEP_SECONDS = 0.5
_FIRST_STEP_SECONDS = 0.05  # until its first word: somebody may wait for that
_LAST_WORDS = 2_000  # bytes of its output that are looked at when it ends


class ChildState(msgspec.Struct, frozen=True, kw_only=True):
    """One child: `keeper`, `standby`, `lake writer`, or a gateway worker such as `worker-0`.

    `since` is the Unix time of its start or, while `pid` is None, of its end. `problem` is the last
    one in one sentence, from `problem_at` on; empty when it never had one.
    """

    name: str
    pid: int | None
    since: float
    log: str
    restarts: int = 0
    problem: str = ""
    problem_at: float = 0.0


class Renewal(msgspec.Struct, frozen=True, kw_only=True):
    """How the last restart of the gateway's workers went, one worker after the other.

    `number` counts the restarts since `up` began; 0 is none yet. Of `of` workers, `done` have been
    replaced; `problem` says in one sentence why the rest was not. `notes` are what a person should
    know beside that.
    """

    number: int = 0
    running: bool = False
    done: int = 0
    of: int = 0
    problem: str = ""
    notes: tuple[str, ...] = ()


class Processes(msgspec.Struct, frozen=True, kw_only=True):
    """All children of the `up` with this `pid`, which began at `since` and is of this `version`.

    `renewal` is None where an `up` of an earlier version told this, which a SIGHUP would end.
    """

    pid: int
    since: float
    children: tuple[ChildState, ...]
    renewal: Renewal | None = None
    version: str = __version__


def processes_file(project: Project) -> Path:
    """Where `up` tells about its children."""
    return project.state / PROCESSES_FILE


def read_processes(project: Project) -> Processes | None:
    """What the `up` that holds the project, or the one before, told last; None if nothing."""
    try:
        return msgspec.json.decode(processes_file(project).read_bytes(), type=Processes)
    except (OSError, msgspec.MsgspecError):
        return None


@dataclass(slots=True)
class Child:
    """A process kept running: started anew when it dies or hangs, with waits between.

    `silence` is for how many seconds it may say nothing into its heartbeat's pipe. It inherits
    `descriptors`.
    """

    name: str
    command: Sequence[str]
    log_file: Path
    silence: float
    clock: Clock
    descriptors: tuple[int, ...] = ()
    restarts: int = 0
    problem: str = ""
    _problem_at: float = 0.0
    _since: float = 0.0
    _process: asyncio.subprocess.Process | None = None
    _hung: bool = False
    _spoke: bool = False
    _stop: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def pid(self) -> int | None:
        """The process id while it runs."""
        process = self._process
        return process.pid if process is not None and process.returncode is None else None

    @property
    def ready(self) -> bool:
        """Whether it runs and has said so."""
        return self._spoke and self.pid is not None

    @property
    def state(self) -> ChildState:
        """What is known of it now."""
        return ChildState(
            name=self.name,
            pid=self.pid,
            since=self._since,
            log=str(self.log_file),
            restarts=self.restarts,
            problem=self.problem,
            problem_at=self._problem_at,
        )

    async def run(self) -> None:
        """Keep it running until `stop`."""
        wait, loop = 0.0, asyncio.get_running_loop()
        while not self._stop.is_set():
            started = loop.time()
            try:
                problem = await self._live()
            except OSError as error:  # no process, descriptor or memory left: that may pass
                problem = f"can't be started ({error.strerror})"
            if self._stop.is_set():
                return
            wait = next_wait(wait, loop.time() - started)
            self.restarts += 1
            self._since = self._problem_at = self.clock()
            self.problem = f"the {self.name} {problem}"
            log.warning("%s; it is started again in %.1f s", self.problem, wait)
            with suppress(TimeoutError):
                await asyncio.wait_for(self._stop.wait(), wait)

    async def stop(self, grace: float) -> None:
        """Ask it to end, and end it by force after `grace` seconds."""
        self._stop.set()
        process = self._process
        if process is None or process.returncode is not None:
            return
        with suppress(ProcessLookupError):
            process.send_signal(signal.SIGTERM)
        try:
            await asyncio.wait_for(process.wait(), grace)
        except TimeoutError:
            log.warning("the %s did not end within %g s and is killed", self.name, grace)
            self.kill()
            await process.wait()

    def kill(self) -> None:
        """End it by force, now and for good."""
        self._stop.set()
        self._kill()

    async def _live(self) -> str:
        """Start it and wait for its end; says how that came."""
        pulse, told = os.pipe()
        try:
            os.set_blocking(pulse, False)
            process = await self._start(told)
        except BaseException:
            os.close(pulse)
            raise
        finally:
            os.close(told)
        self._process, self._since = process, self.clock()
        self._hung = self._spoke = False
        if self._stop.is_set():  # told to stop while it was being started
            self._kill()
        watching = asyncio.create_task(self._watch(pulse))
        try:
            last = await self._keep_output(process)
            code = await process.wait()
        finally:
            watching.cancel()
            os.close(pulse)
        if self._hung:
            return f"said nothing for {self.silence:g} s and was killed; see {self.log_file}"
        said = f" and last said: {last}" if last and code >= 0 else ""
        return f"ended ({_ending(code)}){said}; see {self.log_file}"

    async def _start(self, told: int) -> asyncio.subprocess.Process:
        return await asyncio.create_subprocess_exec(
            *self.command,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            pass_fds=(told, *self.descriptors),
            env=os.environ | {HEARTBEAT_VARIABLE: str(told)},
            # A Ctrl-C in the terminal is for us to pass on. Not a session of its own: in ours, the
            # system ends a stopped child when we die, also one that is still being started.
            process_group=0,
        )

    async def _keep_output(self, process: asyncio.subprocess.Process) -> str:
        """Keep what it says in its log; gives the last line."""
        assert process.stdout is not None  # noqa: S101  # it was asked for
        output, last = BoundedLog(self.log_file), b""
        try:
            while said := await process.stdout.read(65_536):
                output.write(said)
                last = (last + said)[-_LAST_WORDS:]
        finally:
            output.close()
        lines = last.decode(errors="replace").strip().splitlines()
        return lines[-1].strip() if lines else ""

    async def _watch(self, pulse: int) -> None:
        """Kill it when it is silent for too long.

        Silence is counted in steps of our own, each behind a look into the pipe: if we were stopped
        or slow ourselves, what it said meanwhile is heard first, and its time begins anew.
        """
        silent, limit, step = 0.0, _START_SECONDS, _FIRST_STEP_SECONDS
        while silent < limit:
            await asyncio.sleep(step)
            if _heard(pulse):
                self._spoke = True
                silent, limit, step = 0.0, self.silence, _STEP_SECONDS
            else:
                silent += step
        self._hung = True
        self._kill()

    def _kill(self) -> None:
        process = self._process
        if process is not None and process.returncode is None:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def next_wait(before: float, lived: float) -> float:
    """Seconds until a child is started again that was waited for `before`, and then `lived`.

    A child that can't live is tried ever more rarely. One that is killed now and then comes back at
    once: only deaths in quick succession make the wait longer, and any time in health shorter.
    """
    if lived < _QUICK_DEATH:
        return min(max(before * 2, _FIRST_WAIT), _LONGEST_WAIT)
    return max(before * 0.5 ** (lived / _QUICK_DEATH), _FIRST_WAIT)


def _heard(pulse: int) -> bool:
    """Whether anything was said since the last look."""
    heard = False
    with suppress(BlockingIOError):
        while os.read(pulse, 4096):
            heard = True
    return heard


def _ending(code: int) -> str:
    return f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
