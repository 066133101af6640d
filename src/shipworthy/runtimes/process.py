"""The `process` runtime: replicas of a release as processes on this machine.

A deployment has a private folder with the release's verified files and one interpreter; each of its
replicas is a server process that is watched, restarted and stopped. Replicas never outlive the
process that runs this: they hold a pipe from it and end when it does.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import shlex
import shutil
import signal
import socket
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from shipworthy.domain.contract import Protocol
from shipworthy.domain.lifecycle import Deployment, Release
from shipworthy.domain.manifest import Manifest, ProcessServing, Resources
from shipworthy.errors import RuntimeFailed, ShipworthyError, Unavailable
from shipworthy.ports import Blobs, HttpClient
from shipworthy.protocols.questions import HEALTH, base_of
from shipworthy.runtimes.environments import Environments
from shipworthy.runtimes.folder import materialise
from shipworthy.runtimes.hosts import LONG_LIFE, backoff, ending
from shipworthy.runtimes.logs import BoundedLog

GUARD_FILE: Final = Path(__file__).with_name("guard.py")
OURS: Final = ["shipworthy", "serve", "{release}"]
"""The beginning of `serving.command` that means our own model server; options may follow."""

QUICK_DEATHS: Final = 5
"""So many short lives in a row, and the replica counts as failed; it is still tried, but slowly."""

_KEPT_LOGS: Final = 100  # files, of deployments past and present
_SLOWLY: Final = 60.0  # seconds between tries of a failed replica
_PATIENCE: Final = 10.0  # seconds for what was halted to notice
_PROBE_EVERY: Final = 1.0
_UNREADY_PROBES: Final = 3  # so many failed probes in a row, and it is said to answer nowhere
_DEAF_PROBES: Final = 15  # so many without any answer, and it is killed


class _Halted(Exception):
    """The deployment was stopped while its files or interpreter were made."""


class ProcessRuntime:
    """Runs releases below `folder`, which belongs to this object alone. Implements ports.Runtime.

    `rng` spreads restarts in time.
    """

    def __init__(
        self,
        folder: Path,
        *,
        blobs: Blobs,
        environments: Environments,
        http: HttpClient,
        rng: random.Random,
    ) -> None:
        self._folder = folder
        self._blobs = blobs
        self._environments = environments
        self._http = http
        self._rng = rng

    async def start(self, release: Release, deployment: Deployment) -> tuple[ProcessReplica, ...]:
        """Start the least number of replicas that the manifest asks for.

        Returns at once: copying files, building the interpreter and loading the model go on in the
        background, and what goes wrong there is each replica's `problem`.
        """
        manifest = Manifest.model_validate(release.manifest)
        serving = manifest.serving
        if not isinstance(serving, ProcessServing):
            raise RuntimeFailed(f"{release.name} is served elsewhere; use the endpoint runtime")
        deployed = _Deployed(
            release, manifest, self._folder / deployment.id, self._blobs, self._environments
        )
        logs = self._folder / "logs"
        _keep_newest(logs, _KEPT_LOGS)
        return tuple(
            ProcessReplica(
                deployed,
                serving,
                BoundedLog(logs / f"{deployment.id}-{index}.log"),
                index=index,
                http=self._http,
                rng=self._rng,
            )
            for index in range(serving.replicas.min)
        )


class _Deployed:
    """What the replicas of a deployment share: the release's files and its interpreter."""

    def __init__(
        self,
        release: Release,
        manifest: Manifest,
        folder: Path,
        blobs: Blobs,
        environments: Environments,
    ) -> None:
        self.release = release
        self.folder = folder
        self.artifacts = folder / "artifacts"
        self.manifest_file = folder / "manifest.json"
        self.doing = "waiting to start"
        self.protocol: Protocol = manifest.contract.protocol
        self._manifest = manifest
        self._blobs = blobs
        self._environments = environments
        self._halt = threading.Event()
        self._making: asyncio.Task[Path] | None = None
        self._users = 0

    def join(self) -> None:
        """One more replica uses this."""
        self._users += 1

    async def leave(self) -> None:
        """One fewer; the last one removes the files."""
        self._users -= 1
        if self._users:
            return
        self._halt.set()
        if self._making is not None:
            # A build stops at pip's next line; what it builds lies elsewhere and hinders nobody.
            await asyncio.wait((self._making,), timeout=_PATIENCE)
        await asyncio.to_thread(shutil.rmtree, self.folder, ignore_errors=True)

    async def interpreter(self) -> Path:
        """The release's interpreter, its files being in place; made once, again after a failure."""
        failed = self._making is not None and self._making.done() and self._making.exception()
        if self._making is None or failed:
            self._making = asyncio.create_task(asyncio.to_thread(self._make))
        return await asyncio.shield(self._making)

    def _make(self) -> Path:
        shutil.rmtree(self.folder, ignore_errors=True)  # what an earlier life left is not trusted
        self.folder.mkdir(parents=True, mode=0o700)
        done = 0
        total = sum(file.size for file in self._manifest.pinned_files())

        def copied(count: int) -> None:
            nonlocal done
            done += count
            self._tell(f"copying files: {done / 1e6:.0f} of {total / 1e6:.0f} MB")

        materialise(self._manifest, self._blobs, self.artifacts, copied)
        self.manifest_file.write_text(json.dumps(self.release.manifest))
        lock = None
        if self._manifest.environment.lock is not None:
            path = self.folder / "environment.lock"
            self._blobs.copy_to(self._manifest.environment.lock, path)
            lock = path.read_bytes()
        return self._environments.interpreter(self._manifest.environment, lock, self._tell)

    def _tell(self, doing: str) -> None:
        if self._halt.is_set():
            raise _Halted
        self.doing = doing


class ProcessReplica:
    """A server process that is kept running until `stop`. Implements ports.RunningReplica."""

    def __init__(
        self,
        deployed: _Deployed,
        serving: ProcessServing,
        log: BoundedLog,
        *,
        index: int,
        http: HttpClient,
        rng: random.Random,
    ) -> None:
        self._deployed = deployed
        self._serving = serving
        self._protocol: Protocol = deployed.protocol
        self._log = log
        self._ready_file = deployed.folder / f"replica-{index}.json"
        self._http = http
        self._rng = rng
        self._url: str | None = None
        self._problem: str | None = None
        self._doing: str | None = None
        self._process: asyncio.subprocess.Process | None = None
        self._keeping: asyncio.Task[None] | None = None
        self._born = 0.0
        self._answered = False
        deployed.join()
        self._life = asyncio.create_task(self._live())

    @property
    def url(self) -> str | None:
        """Where it answers; None until it is ready, and while it is not."""
        return self._url

    @property
    def problem(self) -> str | None:
        """Why it is not running, in one sentence; None while it starts or runs."""
        return self._problem

    @property
    def doing(self) -> str:
        """What goes on now, for people: `collecting packages: 3 of 12`, `ready`."""
        return self._problem or self._doing or self._deployed.doing

    def last_lines(self, count: int = 20) -> list[str]:
        """The newest lines of what it printed, restarts included, oldest first."""
        return self._log.last_lines(count)

    async def stop(self, grace: float) -> None:
        """Let it finish its requests and end; by force after `grace` seconds."""
        self._url = None
        self._life.cancel()
        await asyncio.gather(self._life, return_exceptions=True)
        if self._process is not None:
            await _end(self._process, grace)
        await self._output_kept()
        self._log.close()
        await self._deployed.leave()

    async def _live(self) -> None:
        deaths = 0
        clock = asyncio.get_running_loop().time
        while True:
            self._born, stated = clock(), False
            try:
                reason = await self._one_life(await self._deployed.interpreter())
            except ShipworthyError as error:
                reason, stated = str(error), True
            except (OSError, ValueError) as error:  # a full disk; a command that can't be split
                reason, stated = f"{error}; see to the disk and serving.command", True
            self._url = None
            self._doing = "starting again"
            deaths = 0 if clock() - self._born > LONG_LIFE else deaths + 1
            # A stated reason (a missing module, altered bytes) would only be stated again, but not
            # if these very bytes have answered before: then what is around them fails for now.
            hopeless = (stated and not self._answered) or deaths >= QUICK_DEATHS
            if hopeless:
                self._problem = reason
            self._log.write(f"{reason}\n".encode())
            most = _SLOWLY if hopeless else _SLOWLY / 4
            delay = backoff(deaths, self._rng, first=_SLOWLY if hopeless else 0.25, most=most)
            await asyncio.sleep(delay)

    async def _one_life(self, python: Path) -> str:
        """Run the process once, until it has ended; says how. RuntimeFailed when it said why."""
        self._born = asyncio.get_running_loop().time()
        self._ready_file.unlink(missing_ok=True)
        command, url = self._command(python)
        self._doing = "loading the model"
        process = await asyncio.create_subprocess_exec(
            *command,
            stdin=asyncio.subprocess.PIPE,  # held open: its end is ours
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            cwd=self._deployed.artifacts,
            env=_environment(os.environ, self._serving.resources),
            process_group=0,  # in our session, which ends it when it is stopped and we die
        )
        self._process = process
        self._keeping = asyncio.create_task(self._keep_output(process))
        watching = asyncio.create_task(self._watch(process, url))
        try:
            code = await process.wait()
        finally:
            watching.cancel()
        _kill(process)  # what it left behind in its group
        await self._output_kept()
        self._process = None
        told = _told(self._ready_file)
        if "problem" in told:
            raise RuntimeFailed(told["problem"])
        lines = [line for line in self.last_lines(5) if line.strip()]
        said = f", and last said: {lines[-1].strip()}" if lines else ""
        return f"the server process ended ({ending(code)}{said}); its log tells more"

    async def _output_kept(self) -> None:
        """Wait for the last output; not for long, since a stray child may hold the pipe open."""
        if self._keeping is not None:
            await asyncio.wait((self._keeping,), timeout=1.0)
            self._keeping.cancel()
            await asyncio.gather(self._keeping, return_exceptions=True)

    async def _keep_output(self, process: asyncio.subprocess.Process) -> None:
        assert process.stdout is not None  # noqa: S101  # it was asked for
        while chunk := await process.stdout.read(65_536):
            self._log.write(chunk)

    async def _watch(self, process: asyncio.subprocess.Process, url: str | None) -> None:
        """Tell where it answers as long as it does; kill it when it has been deaf for long."""
        while url is None:
            await asyncio.sleep(0.05)
            url = _told(self._ready_file).get("url")
        failed = deaf = 0
        while True:
            status = await self._probe(url)
            failed = 0 if status == 200 else failed + 1
            deaf = 0 if status is not None else deaf + 1
            if status == 200:
                self._url, self._problem, self._doing = url, None, "ready"
                self._answered = True
            elif failed >= _UNREADY_PROBES and self._url is not None:
                self._url, self._doing = None, "not ready"
            if deaf >= _DEAF_PROBES and self._doing != "loading the model":
                self._log.write(b"the server did not answer its health checks and is killed\n")
                _kill(process)
            await asyncio.sleep(0.1 if self._doing == "loading the model" else _PROBE_EVERY)

    async def _probe(self, url: str) -> int | None:
        """The HTTP status of its readiness; None without an answer."""
        try:
            response = await self._http.request(
                "GET", base_of(url, self._protocol) + HEALTH[self._protocol], timeout=2.0
            )
        except (Unavailable, OSError):  # TimeoutError is one
            return None
        return response.status

    def _command(self, python: Path) -> tuple[list[str], str | None]:
        """What to run, and where it will answer if we choose that ourselves."""
        words = shlex.split(self._serving.command)
        deployed = self._deployed
        if words[: len(OURS)] == OURS:
            server = [sys.executable, "-m", "shipworthy.runtimes.model_server", "--watch-stdin"]
            server += ["--folder", str(deployed.artifacts), "--interpreter", str(python)]
            server += [
                "--manifest",
                str(deployed.manifest_file),
                "--release",
                deployed.release.name,
            ]
            return [*server, "--ready-file", str(self._ready_file), *words[len(OURS) :]], None
        if "{port}" not in self._serving.command:
            raise RuntimeFailed(
                f"serving.command of {deployed.release.name} does not say where to listen;"
                " put {port} in it, as in `server --port {port}`"
            )
        port = _free_port()
        values = {
            "{release}": deployed.release.name,
            "{folder}": str(deployed.artifacts),
            "{manifest}": str(deployed.manifest_file),
            "{python}": str(python),
            "{port}": str(port),
        }
        filled = [_filled(word, values) for word in words]
        return [sys.executable, "-I", str(GUARD_FILE), *filled], f"http://127.0.0.1:{port}"


def _keep_newest(folder: Path, count: int) -> None:
    logs = sorted(folder.glob("*.log*"), key=lambda path: path.stat().st_mtime, reverse=True)
    for path in logs[count:]:
        path.unlink(missing_ok=True)


def _filled(word: str, values: Mapping[str, str]) -> str:
    for name, value in values.items():
        word = word.replace(name, value)
    return word


def _told(ready_file: Path) -> dict[str, str]:
    with contextlib.suppress(OSError, ValueError):
        return json.loads(ready_file.read_bytes())
    return {}


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _environment(ours: Mapping[str, str], resources: Resources) -> dict[str, str]:
    """Our environment without our own settings and secrets, and with what the replica may use."""
    kept = {name: value for name, value in ours.items() if not name.startswith("SHIPWORTHY_")}
    threads = str(max(1, int(resources.cpu)))
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        kept[name] = threads
    if resources.gpu == 0:
        kept["CUDA_VISIBLE_DEVICES"] = ""
    return kept | {"PYTHONUNBUFFERED": "1"}


async def _end(process: asyncio.subprocess.Process, grace: float) -> None:
    _signal(process, signal.SIGTERM)
    try:
        async with asyncio.timeout(grace):
            await process.wait()
    except TimeoutError:
        pass
    _kill(process)
    await process.wait()


def _kill(process: asyncio.subprocess.Process) -> None:
    _signal(process, signal.SIGKILL)


def _signal(process: asyncio.subprocess.Process, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, number)
