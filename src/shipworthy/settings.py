"""`shipworthy.yaml`, and where everything of a project lies.

    shipworthy.yaml          settings; every one has a default
    .shipworthy/             state, private to the user
    ├── ledger.db            decisions
    ├── blobs/               what releases pin
    ├── journals/            the gateway's records, until they are in the lake
    ├── lake/                Delta tables of what was asked, answered, learnt and decided; and how
    │                        far their writer is
    ├── lake-condition.json  how the lake's writer is: its lag, and what it waits for
    ├── metrics/             the gateway workers' numbers, each worker's for the others
    ├── snapshots/           what the gateway obeys
    ├── secrets/             keys that never leave this machine
    ├── replicas/            one folder for each running replica
    └── logs/

Everything outgrown is swapped by a URL in the settings.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated
from urllib.parse import quote

from pydantic import Field

from shipworthy.domain.manifest import Document, matching
from shipworthy.domain.policy import Duration
from shipworthy.errors import NotFound, UsageError
from shipworthy.protocols.documents import read_document

FILE = "shipworthy.yaml"
STATE = ".shipworthy"
MEBIBYTE = 1024 * 1024


class OtlpSettings(Document):
    """Where spans of requests are sent; `sample` is the share of traces that begin here.

    `endpoint` is the base address of an OpenTelemetry collector. `headers` refer to secrets.
    """

    endpoint: Annotated[
        str,
        matching(
            r"https?://[^\s/@?#]+(/[^\s?#]*)?",
            "an http:// or https:// address without a name, password or query;"
            " what proves who you are goes into headers",
        ),
    ]
    headers: dict[
        Annotated[str, matching(r"[A-Za-z0-9-]+", "the name of a header")],
        Annotated[
            str,
            matching(
                r"(env|file):\S+",
                "env:NAME or file:PATH, a reference to the value and never the value itself",
            ),
        ],
    ] = Field(default_factory=dict[str, str])
    sample: Annotated[float, Field(ge=0.0, le=1.0)] = 1.0


class TlsSettings(Document):
    """PEM files: the certificate with those that lead to its authority, and its private key."""

    certificate: str
    key: str


class GatewaySettings(Document):
    """Where clients call, and how much one request may bring. Port 0 takes any free one.

    `unix_socket` is a path where it listens as well. `drain` is how long requests that are under
    way may go on when a worker ends.
    """

    host: str = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65_535)] = 8080
    unix_socket: str | None = None
    tls: TlsSettings | None = None
    workers: Annotated[int, Field(ge=1, le=64)] = 2
    max_body_bytes: Annotated[int, Field(ge=1024, le=1024 * MEBIBYTE)] = 10 * MEBIBYTE
    access_log: bool = False
    drain: Duration = 20.0
    otlp: OtlpSettings | None = None


class JournalSettings(Document):
    """How much disk the gateway's records may take until they are in the lake."""

    max_bytes: Annotated[int, Field(ge=MEBIBYTE)] = 1024 * MEBIBYTE


class KeeperSettings(Document):
    """Who decides. A standby takes over within seconds when the keeper dies or hangs."""

    standby: bool = True


class LakeSettings(Document):
    """Where records stay: a folder or `file:///…`; absent, it is in the project.

    `every` is how often records are moved there, `keep` how long they stay.
    """

    url: str | None = None
    every: Duration = 2.0
    keep: Duration = 365 * 86_400.0


class KeySettings(Document):
    """How long the gateway honours keys that no keeper confirms; absent: as long as it takes."""

    max_stale: Duration | None = None


class Settings(Document):
    """`shipworthy.yaml`. `ledger` is a database URL; absent, it is SQLite in the project."""

    preset: str = "standard"
    ledger: str | None = None
    gateway: GatewaySettings = GatewaySettings()
    journal: JournalSettings = JournalSettings()
    keeper: KeeperSettings = KeeperSettings()
    lake: LakeSettings = LakeSettings()
    keys: KeySettings = KeySettings()


@dataclass(frozen=True, slots=True)
class Project:
    """A folder with a `shipworthy.yaml`."""

    root: Path
    settings: Settings

    @property
    def state(self) -> Path:
        """All that Shipworthy itself writes, but for the files that people edit."""
        return self.root / STATE

    @property
    def ledger_url(self) -> str:
        """The ledger's database URL; a relative path in it begins at the project's folder."""
        scheme, separator, path = (self.settings.ledger or "").partition(":///")
        if not separator or not scheme.startswith("sqlite"):
            return self.settings.ledger or sqlite_url(self.state / "ledger.db")
        if not path or path.startswith("/"):
            return f"{scheme}:///{path}"
        return f"{sqlite_url(self.root)}/{path}"

    @property
    def snapshots(self) -> Path:
        """What the gateway obeys: a file for each keeper's term, of which the newest counts."""
        return self.state / "snapshots"

    @property
    def journals(self) -> Path:
        """The gateway's records, until they are in the lake."""
        return self.state / "journals"

    @property
    def lake(self) -> Path:
        """The folder of the Delta tables. UsageError for a URL that names no folder."""
        url = self.settings.lake.url
        if url is None:
            return self.state / "lake"
        scheme, separator, path = url.partition("://")
        if separator and scheme != "file":
            message = f"lake.url: {scheme} is no kind of lake that there is; give a folder"
            raise UsageError(message)
        return self.root / (path if separator else url.removeprefix("file:"))

    @property
    def lake_lock(self) -> Path:
        """Who changes the lake, its writer's state or the journals' segments holds this lock."""
        return self.state / "lake.lock"

    @property
    def lake_writer(self) -> Path:
        """How far the lake's writer is: of no use without the lake, so it is kept there."""
        return self.lake / "writer.json"

    @property
    def lake_condition(self) -> Path:
        """How the lake's writer is: its lag, and what it waits for."""
        return self.state / "lake-condition.json"

    @property
    def metrics(self) -> Path:
        """The gateway workers' numbers, in a folder for each `up`."""
        return self.state / "metrics"

    @property
    def certificate(self) -> Path | None:
        """The gateway's certificate; None where it speaks plain HTTP."""
        tls = self.settings.gateway.tls
        return self.root / tls.certificate if tls else None

    @property
    def private_key(self) -> Path | None:
        """The private key of `certificate`."""
        tls = self.settings.gateway.tls
        return self.root / tls.key if tls else None

    @property
    def unix_socket(self) -> Path | None:
        """Where the gateway listens beside its port."""
        path = self.settings.gateway.unix_socket
        return self.root / path if path else None

    @property
    def blobs(self) -> Path:
        """What releases pin."""
        return self.state / "blobs"

    @property
    def secrets(self) -> Path:
        """Keys that never leave this machine."""
        return self.state / "secrets"

    @property
    def replicas(self) -> Path:
        """One folder for each running replica."""
        return self.state / "replicas"

    @property
    def logs(self) -> Path:
        """What the processes said."""
        return self.state / "logs"


def sqlite_url(file: Path) -> str:
    """The database URL of a file, whatever its name: a `%` or `?` in a URL means something else."""
    return f"sqlite:///{quote(str(file))}"


def load_project(root: Path) -> Project:
    """Read the project in this very folder; NotFound when there is none."""
    file = root / FILE
    if not file.is_file():
        message = f"no {FILE} in {root}; make a project with 'shipworthy init'"
        raise NotFound(message)
    return Project(root.resolve(), read_document(file.read_bytes(), FILE, Settings))


def find_project(start: Path) -> Project:
    """Read the project that a folder belongs to: its own, or the nearest above it."""
    for folder in (start.resolve(), *start.resolve().parents):
        if (folder / FILE).is_file():
            return load_project(folder)
    message = f"no {FILE} here or in a folder above; make a project with 'shipworthy init'"
    raise NotFound(message)
