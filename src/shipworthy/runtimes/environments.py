"""The interpreter that a release's lock asks for, built once and kept.

An environment lies in `<cache>/<key>`, its key the digest of the lock and of the Python that it is
built with. It is built in place, since virtual environments can't be moved: a marker file says that
it is whole, and a file lock lets only one builder in, whichever process it is in.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Final

from shipworthy.domain.manifest import Environment
from shipworthy.errors import RuntimeFailed

OnProgress = Callable[[str], None]
"""Called with what is being done now, in a few words."""

_FORMAT: Final = "1"  # a change in how environments are built makes new ones
_WHOLE: Final = ".whole"
_PACKAGE: Final = re.compile(rb"^[A-Za-z0-9]", re.MULTILINE)
_PROBE: Final = """
import platform, sys
version = platform.python_version()
print(*version.split(".")[:2], version, sys._base_executable, platform.machine(), sep="\\n")
"""


class Environments:
    """Interpreters by lock, below `cache`; `timeout` bounds each step of a build, in seconds.

    A progress function may raise to give a build up.
    """

    def __init__(self, cache: Path, *, timeout: float = 1_800.0) -> None:
        self._cache = cache
        self._timeout = timeout

    def interpreter(
        self,
        environment: Environment,
        lock: bytes | None,
        on_progress: OnProgress | None = None,
    ) -> Path:
        """The Python to run a release with; built now if need be, which can take minutes.

        `lock` is the content of `environment.lock`. Without one it is our own interpreter. pip is
        configured as its user has it. RuntimeFailed when that Python is not installed or the lock
        can't be installed; nothing half built is ever used.
        """
        if lock is None:
            return _own(environment)
        python = _python(environment.python)
        described = _describe(python)
        if described is None:
            raise RuntimeFailed(f"{python} does not run; repair or remove it")
        key = hashlib.sha256("\0".join([_FORMAT, *described]).encode() + b"\0" + lock).hexdigest()[
            :32
        ]
        home = self._cache / key
        built = home / "bin" / "python"
        if (home / _WHOLE).exists():
            return built
        tell = on_progress or _silent
        self._cache.mkdir(parents=True, exist_ok=True, mode=0o700)
        with _only_builder(self._cache / f"{key}.lock", tell):
            if not (home / _WHOLE).exists():  # somebody else may have built it meanwhile
                self._build(home, python, lock, tell)
        return built

    def _build(self, home: Path, python: Path, lock: bytes, tell: OnProgress) -> None:
        log = home.with_suffix(".log")
        requirements = home.with_suffix(".txt")
        requirements.write_bytes(lock)
        log.unlink(missing_ok=True)
        hashes = ["--require-hashes"] if b"--hash=" in lock else []
        pip = [home / "bin" / "python", "-I", "-m", "pip", "--disable-pip-version-check", "install"]
        try:
            tell("making a virtual environment")
            self._run([python, "-I", "-m", "venv", "--clear", home], log, "venv", tell)
            counted = _counting(len(_PACKAGE.findall(lock)), tell)
            command = [*pip, "--no-input", "--progress-bar", "off", *hashes, "-r", requirements]
            self._run(command, log, "pip", counted)
        except BaseException:
            shutil.rmtree(home, ignore_errors=True)
            raise
        (home / _WHOLE).touch()

    def _run(self, command: list[str | Path], log: Path, name: str, tell: OnProgress) -> None:
        """Run a step with its output in `log`; RuntimeFailed repeats its last lines."""
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # so that a time limit ends its compilers too
            env={**os.environ, "PIP_REQUIRE_VIRTUALENV": "0"},
        )
        late = threading.Event()

        def end() -> None:
            late.set()
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)

        timer = threading.Timer(self._timeout, end)
        timer.start()
        try:
            assert process.stdout is not None  # noqa: S101  # it was asked for
            with process.stdout as output, log.open("ab") as file:
                for line in output:
                    file.write(line)
                    tell(line.decode(errors="replace").strip())
            code = process.wait()
        except BaseException:
            end()
            process.wait()
            raise
        finally:
            timer.cancel()
        if late.is_set():
            raise RuntimeFailed(
                f"building the release's interpreter took longer than {self._timeout:g} s;"
                f" see {log}, and allow more time if it was busy"
            )
        if code != 0:
            raise RuntimeFailed(
                f"the release's interpreter can't be built, {name} said: {_last_errors(log)};"
                f" correct environment.lock (all of it is in {log})"
            )


def _own(environment: Environment) -> Path:
    ours = f"3.{sys.version_info.minor}"
    if environment.python not in (None, ours):
        raise RuntimeFailed(
            f"the release asks for Python {environment.python} and has no lock to build it from"
            f" (this is {ours}); add environment.lock"
        )
    return Path(sys.executable)


def _python(wanted: str | None) -> Path:
    """An installed Python of that minor version: ours, on the PATH, or one of pyenv's."""
    if wanted in (None, f"3.{sys.version_info.minor}"):
        return Path(sys.executable)
    pyenv = Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv")
    candidates = [
        *(Path(folder, f"python{wanted}") for folder in os.get_exec_path()),
        *sorted(pyenv.glob(f"versions/{wanted}*/bin/python{wanted}"), reverse=True),
    ]
    for candidate in candidates:
        described = _describe(candidate) if candidate.exists() else None
        if described is not None and ".".join(described[:2]) == wanted:
            return candidate
    raise RuntimeFailed(
        f"the release asks for Python {wanted}, which is not installed here;"
        f" install it so that `python{wanted}` runs, or change environment.python"
    )


def _describe(python: Path) -> list[str] | None:
    """Major, minor, full version, base executable and machine; None when it does not run."""
    try:
        probe = subprocess.run(
            [python, "-I", "-c", _PROBE], capture_output=True, text=True, timeout=30, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return probe.stdout.splitlines() if probe.returncode == 0 else None


@contextlib.contextmanager
def _only_builder(path: Path, tell: OnProgress) -> Generator[None, None, None]:
    """Hold the build's lock; the kernel gives it back if we die."""
    with path.open("a") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:  # asked again and again, so that `tell` may raise to give up
                tell("waiting for another build of this interpreter")
                time.sleep(0.2)
        yield


def _counting(total: int, tell: OnProgress) -> OnProgress:
    """A reader of pip's output that tells how many packages it has collected."""
    seen = 0

    def read(line: str) -> None:
        nonlocal seen
        if line.startswith(("Collecting ", "Requirement already")):
            seen += 1
            tell(f"collecting packages: {min(seen, total)} of {total}")
        elif line.startswith("Installing collected"):
            tell(f"installing {total} packages")

    return read


def _last_errors(log: Path) -> str:
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    errors = [line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR: ")]
    return " ".join((errors or lines or ["nothing"])[-2:])


def _silent(_: str) -> None:
    """Nobody watches."""
