"""The demo's hands: this very command line, by several people, and `shipworthy up` beside it."""

from __future__ import annotations

import io
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack, redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer

from shipworthy.app.gateway_address import gateway_url
from shipworthy.app.session import KEY_VARIABLE, PROJECT_VARIABLE
from shipworthy.errors import ShipworthyError, Unavailable
from shipworthy.settings import Project

INTERRUPTED = 130
"""The exit code after Ctrl-C."""
_UP_SECONDS = 60.0
_STOP_SECONDS = 60.0


class DemoFailed(ShipworthyError):
    """The story did not go as it was promised; the message says where."""

    exit_code = 1


@dataclass(frozen=True, slots=True)
class Person:
    """Somebody of the team; `key` is empty for the account that runs the demo."""

    name: str
    key: str = ""


class CommandLine:
    """Runs commands as a person would type them, without starting Python anew for each."""

    def __init__(self, context: typer.Context, tell: Callable[[Person, str], None]) -> None:
        self._root: Any = context.find_root().command
        self._tell = tell

    def run(self, line: str, by: Person, *, secret: bool = False) -> str:
        """Run `shipworthy LINE`; what it printed. DemoFailed when it does not end well.

        Progress is shown where there is a terminal, unless what comes of it is `secret`.
        """
        self._tell(by, line)
        with ExitStack() as stack:
            said = stack.enter_context(redirect_stdout(io.StringIO()))
            if secret or not sys.stderr.isatty():
                stack.enter_context(redirect_stderr(io.StringIO()))
            code = self._run(line, by)
        text = said.getvalue().strip()
        if code == INTERRUPTED:  # Typer's word for a Ctrl-C amid a command
            raise KeyboardInterrupt
        if code:
            message = f"'shipworthy {line}' ended with exit code {code}: {text}"
            raise DemoFailed(message)
        return text

    def _run(self, line: str, by: Person) -> int:
        os.environ.pop(KEY_VARIABLE, None)
        if by.key:
            os.environ[KEY_VARIABLE] = by.key
        try:
            words = shlex.split(line)
            return self._root.main(words, prog_name="shipworthy", standalone_mode=False) or 0
        except ShipworthyError as error:
            message = f"'shipworthy {line}' failed: {error}"
            raise DemoFailed(message) from error
        finally:
            os.environ.pop(KEY_VARIABLE, None)


class UpProcess:
    """`shipworthy up` of a project, as a process of its own."""

    def __init__(self, project: Project) -> None:
        self._project = project
        self._log = project.logs / "up.log"
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        """The process that runs everything else; 0 before the start."""
        return self._process.pid if self._process else 0

    def start(self) -> str:
        """Start it; the gateway's address once that listens."""
        hidden = {KEY_VARIABLE, PROJECT_VARIABLE}
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "shipworthy", "up", "--quiet"],
                cwd=self._project.root,
                env={name: value for name, value in os.environ.items() if name not in hidden},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # a Ctrl-C here is for us: we end it in order
            )
        deadline = time.monotonic() + _UP_SECONDS
        while time.monotonic() < deadline:
            self.check()
            with suppress(Unavailable):
                return gateway_url(self._project)
            time.sleep(0.05)
        message = f"the gateway did not start within {_UP_SECONDS:.0f} s; see {self._log}"
        raise DemoFailed(message)

    def check(self) -> None:
        """DemoFailed when it has ended by itself."""
        if self._process is not None and self._process.poll() is not None:
            said = self._log.read_text(errors="replace").strip().splitlines()[-3:]
            message = f"'shipworthy up' ended by itself: {' '.join(said) or 'it said nothing'}"
            raise DemoFailed(message)

    def stop(self) -> None:
        """End it in order: what is under way is answered, then all its processes end."""
        process = self._process
        if process is None or process.poll() is not None:
            return
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()  # its children end with it
            process.wait()


def write_secret(file: Path, text: str) -> None:
    """Keep a key in a file of its owner alone."""
    file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "w") as handle:
        handle.write(f"{text}\n")
