"""A private PostgreSQL server for tests and benches: in a folder of its own, ended with us.

It needs Debian's package `postgresql` (15 or newer), but neither its service nor root: as root the
server runs under another account, since PostgreSQL refuses root.

    with PostgresServer(fsync=True) as server:
        url = server.create("ledger")  # of a role that owns nothing but this database
        server.restart()
"""

from __future__ import annotations

import os
import pwd
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

import psycopg
from psycopg import sql

ROLE = "shipworthy"
"""Who owns the databases; no superuser."""
_PATIENCE = 60.0


class Missing(Exception):
    """PostgreSQL's programs are not on this machine."""


def programs() -> Path:
    """Where `initdb` and `postgres` are, in the newest version; raises Missing."""
    found = sorted(
        Path("/usr/lib/postgresql").glob("*/bin/postgres"), key=lambda path: int(path.parts[-3])
    )
    on_path = shutil.which("postgres")
    if found:
        return found[-1].parent
    if on_path:
        return Path(on_path).parent
    raise Missing("PostgreSQL's programs are missing; install Debian's package postgresql")


class PostgresServer:
    """A server on a free port of 127.0.0.1, which keeps its port and data over restarts.

    A context manager. `pid` is there to be signalled.
    """

    def __init__(self, *, fsync: bool = False) -> None:
        self._programs = programs()
        account = _account()
        self._user = account and account.pw_uid
        self._group = account and account.pw_gid
        self._groups: list[int] | None = [] if account else None
        self.folder = Path(tempfile.mkdtemp(prefix="postgres-"))
        self.port = _free_port()
        self._options = {
            "port": str(self.port),
            "listen_addresses": "127.0.0.1",
            "unix_socket_directories": str(self.folder),
            "fsync": "on" if fsync else "off",
            "shared_buffers": "16MB",
            "max_connections": "100",
        }
        self._process: subprocess.Popen[bytes] | None = None
        self._made = False

    @property
    def pid(self) -> int:
        """The server's first process, whose end is the end of all."""
        assert self._process is not None, "the server does not run"
        return self._process.pid

    def start(self) -> Self:
        """Start, for the first time or again, and wait until it answers."""
        if not self._made:
            self._make()
        deadline = time.monotonic() + _PATIENCE
        while not self._answers():
            if self._process is None or self._process.poll() is not None:
                # After a kill its children may hold the data for a moment longer.
                self._process = self._launch()
            if time.monotonic() > deadline:
                raise TimeoutError((self.folder / "log").read_text()[-2_000:])
            time.sleep(0.05)
        if not self._made:
            self.execute(sql.SQL("CREATE ROLE {} LOGIN").format(sql.Identifier(ROLE)))
            self._made = True
        return self

    def stop(self, how: signal.Signals = signal.SIGINT) -> None:
        """End it: SIGINT breaks connections off, SIGQUIT and SIGKILL are crashes."""
        if self._process is not None:
            self._process.send_signal(how)
            self._process.wait(_PATIENCE)
            self._process = None

    def restart(self, how: signal.Signals = signal.SIGINT) -> None:
        """Stop and start on the same port."""
        self.stop(how)
        self.start()

    def close(self) -> None:
        """End it and remove its folder."""
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(signal.SIGCONT)
        self.stop(signal.SIGQUIT)
        shutil.rmtree(self.folder, ignore_errors=True)

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.close()

    def create(self, name: str, template: str = "template0") -> str:
        """Make a database that belongs to ROLE, from one that nobody is connected to; its URL."""
        statement = sql.SQL("CREATE DATABASE {} TEMPLATE {} OWNER {}")
        self.execute(statement.format(*map(sql.Identifier, (name, template, ROLE))))
        return self.url(name)

    def drop(self, name: str) -> None:
        """Remove a database and end its connections."""
        statement = sql.SQL("DROP DATABASE IF EXISTS {} WITH (FORCE)")
        self.execute(statement.format(sql.Identifier(name)))

    def url(self, name: str, user: str = ROLE) -> str:
        """The URL of a database."""
        return f"postgresql://{user}@127.0.0.1:{self.port}/{name}"

    def execute(
        self, statement: str | sql.Composed, parameters: Any = None, *, database: str = "postgres"
    ) -> list[tuple[Any, ...]]:
        """Run a statement as superuser; its rows, if it has any."""
        with psycopg.connect(self.url(database, "postgres"), autocommit=True) as connection:
            text = statement.encode() if isinstance(statement, str) else statement
            cursor = connection.execute(text, parameters)
            return cursor.fetchall() if cursor.description else []

    def _make(self) -> None:
        if self._user is not None and self._group is not None:
            os.chown(self.folder, self._user, self._group)
        # An ICU collation orders names unlike SQLite, as most servers out there do.
        command = [
            *(self._programs / "initdb", "-D", self.folder / "data", "-U", "postgres"),
            *("--auth=trust", "--no-sync", "--encoding=UTF8", "--locale=C.UTF-8"),
            *("--locale-provider=icu", "--icu-locale=en"),
        ]
        done = subprocess.run(
            command,
            cwd=self.folder,
            capture_output=True,
            check=False,
            user=self._user,
            group=self._group,
            extra_groups=self._groups,
        )
        if done.returncode:
            raise RuntimeError(done.stderr.decode())

    def _launch(self) -> subprocess.Popen[bytes]:
        options = [f"--{name}={value}" for name, value in self._options.items()]
        command: list[str | Path] = [self._programs / "postgres", "-D", self.folder / "data"]
        dies_with_us = ["setpriv", "--pdeathsig", "QUIT"] if shutil.which("setpriv") else []
        with (self.folder / "log").open("ab") as log:
            return subprocess.Popen(
                [*dies_with_us, *command, *options],
                cwd=self.folder,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                user=self._user,
                group=self._group,
                extra_groups=self._groups,
            )

    def _answers(self) -> bool:
        if self._process is None:
            return False
        try:
            psycopg.connect(self.url("postgres", "postgres"), connect_timeout=2).close()
        except psycopg.OperationalError:
            return False
        return True


class Databases:
    """Databases for one test; a context manager that drops them."""

    def __init__(self, server: PostgresServer, migrate: Callable[[str], None]) -> None:
        self.server = server
        self._migrate = migrate
        self._names: list[str] = []

    def make(self, *, migrated: bool = False) -> str:
        """Make a database, empty or with an empty ledger; its URL."""
        name = f"t{secrets.token_hex(6)}"
        self._names.append(name)
        return self.server.create(name, self._template() if migrated else "template0")

    def _template(self) -> str:
        """A migrated ledger to copy, which takes less time than to migrate another one."""
        name = "migrated"
        if not self.server.execute("SELECT 1 FROM pg_database WHERE datname = %s", [name]):
            self._migrate(self.server.create(name))
        return name

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for name in self._names:
            self.server.drop(name)


def wait_for(condition: Callable[[], Any], seconds: float = _PATIENCE) -> None:
    """Return once it holds; TimeoutError when it never does."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError("it did not come true")
        time.sleep(0.02)


def _account() -> pwd.struct_passwd | None:
    """Whom the server runs as: ourselves (None), or somebody else when we are root."""
    if os.geteuid() != 0:
        return None
    known = {each.pw_name: each for each in pwd.getpwall()}
    return known.get("postgres") or known["nobody"]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
