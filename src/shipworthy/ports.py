"""What the rooms need from the outside, as narrow as each need is.

Adapters live in `stores/` and `runtimes/`; `app` decides which ones are used.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import msgspec

from shipworthy.domain.audit import AuditEntry, AuditHead
from shipworthy.domain.erasure import Tombstone
from shipworthy.domain.lifecycle import (
    Approval,
    Decision,
    Deployment,
    Intent,
    Principal,
    Release,
    StageEntry,
    StageFinding,
    StoredPolicy,
    TrafficCount,
    Waiver,
)
from shipworthy.domain.manifest import PinnedFile
from shipworthy.domain.names import ReleaseReference, Stage
from shipworthy.domain.plan import Key, Limits, Plan
from shipworthy.domain.records import Record
from shipworthy.domain.rollout import RolloutState, UnitHistory
from shipworthy.domain.terms import Term

Clock = Callable[[], float]
"""Unix time in seconds."""

Progress = Callable[[int], None]
"""Called with the number of bytes done since the last call."""


# --- ledger -----------------------------------------------------------------------------------


class Releases(Protocol):
    """Registered releases."""

    def add(self, release: Release) -> None:
        """Register; Conflict when the model has that version with another digest."""
        ...

    def find(self, reference: ReleaseReference) -> Release | None:
        """By version, digest prefix, or the stage that it holds now; Conflict if ambiguous."""
        ...

    def list(self, model: str | None = None) -> list[Release]:
        """Newest version first."""
        ...

    def next_version(self, model: str) -> int:
        """One more than the highest so far."""
        ...


class Policies(Protocol):
    """Policies in force and before."""

    def put(self, policy: StoredPolicy) -> None: ...
    def current(self, model: str) -> StoredPolicy | None: ...
    def by_digest(self, model: str, digest: str) -> StoredPolicy | None: ...


class Principals(Protocol):
    """Who acts."""

    def ensure(self, name: str, kind: str = "person") -> Principal:
        """The principal of that name, made when new."""
        ...

    def get(self, id: str) -> Principal | None: ...  # it is an id


class StoredKey(msgspec.Struct, frozen=True, kw_only=True):
    """A gateway key as kept: who holds it, and never the secret itself."""

    key: Key
    principal: str
    created_at: float
    revoked_at: float | None = None

    def in_force(self, now: float) -> bool:
        """Whether it opens anything still."""
        expires = self.key.expires
        return self.revoked_at is None and (expires is None or now < expires)


class Keys(Protocol):
    """Gateway keys."""

    def add(self, key: StoredKey) -> None: ...
    def revoke(self, id: str, at: float) -> bool: ...
    def limit(self, id: str, limits: Limits) -> bool: ...
    def list(self) -> list[StoredKey]: ...


class Evidence(Protocol):
    """Findings, approvals and waivers."""

    def add_finding(self, finding: StageFinding) -> None: ...
    def findings(self, release: str) -> list[StageFinding]:
        """The newest of each check and stage."""
        ...

    def add_approval(self, approval: Approval) -> None: ...
    def approvals(self, release: str, stage: Stage) -> list[Approval]: ...
    def add_waiver(self, waiver: Waiver) -> None: ...
    def waivers(self) -> list[Waiver]:
        """Oldest first, for every model, the expired ones too."""
        ...


class Deployments(Protocol):
    """What runs and what should."""

    def put(self, deployment: Deployment) -> None:
        """Insert or replace by id."""
        ...

    def get(self, id: str) -> Deployment | None: ...
    def list(self, model: str | None = None) -> list[Deployment]:
        """Those not yet stopped, oldest first."""
        ...


class Stages(Protocol):
    """Which release holds which stage, now and before."""

    def enter(self, entry: StageEntry) -> None: ...
    def history(self, model: str, stage: Stage) -> list[StageEntry]:
        """Newest first."""
        ...

    def models(self) -> list[str]:
        """Every model with a registered release."""
        ...


class Intents(Protocol):
    """Requests to the keeper."""

    def put(self, intent: Intent) -> None:
        """Insert or replace by id."""
        ...

    def get(self, id: str) -> Intent | None: ...
    def open(self) -> list[Intent]:
        """Pending and waiting ones, oldest first."""
        ...


class Rollouts(Protocol):
    """Rollouts, their state, and the units that their tests have counted."""

    def save(self, state: RolloutState) -> None: ...
    def get(self, id: str) -> RolloutState | None: ...
    def active(self) -> list[RolloutState]:
        """Those that have not ended, oldest first."""
        ...

    def latest(self, model: str) -> RolloutState | None: ...
    def units(self, id: str) -> dict[str, UnitHistory]: ...
    def save_units(self, id: str, changed: Mapping[str, UnitHistory]) -> None: ...
    def forget_units(self, id: str, units: Iterable[str] | None = None) -> None:
        """Drop these counted units, or all of them."""
        ...


class Decisions(Protocol):
    """What was decided and why."""

    def add(self, decision: Decision) -> None: ...
    def list(self, model: str | None = None, limit: int = 20) -> list[Decision]:
        """Newest first."""
        ...

    def after(self, sequence: int, limit: int) -> Iterable[tuple[int, Decision]]:
        """Up to `limit` of those with a higher sequence, oldest first, each with its sequence."""
        ...


class Plans(Protocol):
    """What the gateway is told."""

    def put(self, plan: Plan) -> None:
        """Insert or replace by name."""
        ...

    def remove(self, name: str) -> None: ...
    def all(self) -> dict[str, Plan]: ...


class Traffic(Protocol):
    """How much each release answered, minute by minute."""

    def add(self, counts: Iterable[TrafficCount]) -> None:
        """Add to what is counted already for the same plan, release and minute."""
        ...

    def since(self, plan: str, minute: int) -> list[TrafficCount]:
        """Counts of that minute and later ones, oldest first."""
        ...

    def forget_before(self, minute: int) -> None: ...


class Cursors(Protocol):
    """How far the keeper has read each journal."""

    def load(self) -> dict[str, int]:
        """Byte offset by segment name."""
        ...

    def save(self, cursors: Mapping[str, int]) -> None:
        """Replace all of them."""
        ...


class Terms(Protocol):
    """Who decides now."""

    def current(self) -> Term:
        """The newest term; number 0 before the first."""
        ...

    def put(self, term: Term) -> None:
        """Begin a term or renew its lease."""
        ...


class Tombstones(Protocol):
    """Units that were forgotten; only ever added to."""

    def add(self, tombstone: Tombstone) -> int:
        """Keep it; its sequence."""
        ...

    def after(self, sequence: int) -> list[Tombstone]:
        """Those with a higher sequence, oldest first."""
        ...


class Audit(Protocol):
    """The append-only log of acts."""

    def append(
        self, *, at: float, actor: str, act: str, subject: str, detail: dict[str, Any] | None = None
    ) -> AuditEntry: ...
    def entries(self) -> Iterator[AuditEntry]:
        """Oldest first."""
        ...

    def head(self) -> AuditHead: ...


class Transaction(Protocol):
    """One consistent view of the ledger; in a writing one, all or nothing is kept."""

    @property
    def releases(self) -> Releases: ...
    @property
    def policies(self) -> Policies: ...
    @property
    def principals(self) -> Principals: ...
    @property
    def keys(self) -> Keys: ...
    @property
    def evidence(self) -> Evidence: ...
    @property
    def deployments(self) -> Deployments: ...
    @property
    def stages(self) -> Stages: ...
    @property
    def intents(self) -> Intents: ...
    @property
    def rollouts(self) -> Rollouts: ...
    @property
    def decisions(self) -> Decisions: ...
    @property
    def plans(self) -> Plans: ...
    @property
    def traffic(self) -> Traffic: ...
    @property
    def cursors(self) -> Cursors: ...
    @property
    def terms(self) -> Terms: ...
    @property
    def tombstones(self) -> Tombstones: ...
    @property
    def audit(self) -> Audit: ...


class Ledger(Protocol):
    """The SQL database of decisions. Raises LedgerUnavailable when it can't be reached."""

    def read(self) -> AbstractContextManager[Transaction]: ...
    def write(self) -> AbstractContextManager[Transaction]:
        """A transaction that holds the one writer's lock throughout; commits on a clean exit."""
        ...


# --- blobs ------------------------------------------------------------------------------------


class Blobs(Protocol):
    """Files by the digest of their content."""

    def put(self, source: Path, progress: Progress | None = None) -> PinnedFile:
        """Store a file, reading it once; `path` of the result is the source's name."""
        ...

    def put_bytes(self, content: bytes, path: str) -> PinnedFile: ...
    def has(self, digest: str) -> bool: ...
    def verify(self, file: PinnedFile, progress: Progress | None = None) -> None:
        """Re-read every byte; IntegrityError when it differs, NotFound when it is gone."""
        ...

    def copy_to(self, file: PinnedFile, target: Path, progress: Progress | None = None) -> None:
        """Write the file to `target`, verified on the way; nothing is left there on an error."""
        ...

    def open(self, digest: str) -> BinaryIO: ...


# --- journal ----------------------------------------------------------------------------------


class JournalWriter(Protocol):
    """A gateway worker's own append-only file."""

    def append(self, record: Record) -> bool:
        """Whether the record is written (`write(2)` returned); False when it was dropped."""
        ...

    def close(self) -> None: ...


class JournalReader(Protocol):
    """All workers' journals, read in order from where a cursor stands."""

    def read(self, cursors: Mapping[str, int], limit: int) -> tuple[list[Record], dict[str, int]]:
        """Up to `limit` further records, and the cursors behind them; fewer where they are big."""
        ...

    def read_between(self, start: Mapping[str, int], end: Mapping[str, int]) -> list[Record]:
        """The records between two cursors that `read` took and gave: the same ones as then."""
        ...

    def discard(self, cursors: Mapping[str, int], *others: Mapping[str, int]) -> int:
        """Delete the closed segments that are wholly behind all these cursors; how many."""
        ...


# --- HTTP -------------------------------------------------------------------------------------


class HttpResponse(msgspec.Struct, frozen=True, kw_only=True):
    """An answer; header names are lower case."""

    status: int
    headers: dict[str, str]
    body: bytes


class HttpClient(Protocol):
    """A plain HTTP client for probes; Unavailable when nobody answers."""

    def request(
        self,
        method: str,
        url: str,
        *,
        headers: Mapping[str, str] | None = None,
        body: bytes | None = None,
        timeout: float = 10.0,
    ) -> Awaitable[HttpResponse]: ...


# --- runtimes ---------------------------------------------------------------------------------


class RunningReplica(Protocol):
    """One replica of a release."""

    @property
    def url(self) -> str | None:
        """Where it answers; None until it does."""
        ...

    @property
    def problem(self) -> str | None:
        """Why it is not running, in one sentence; None while it starts or runs."""
        ...

    @property
    def doing(self) -> str:
        """What goes on now, for people: `collecting packages: 3 of 12`, `ready`, the problem."""
        ...

    def last_lines(self, count: int = 20) -> list[str]:
        """The newest lines of its log, oldest first; none where the log is elsewhere."""
        ...

    async def stop(self, grace: float) -> None:
        """Drain, then end it; by force after `grace` seconds."""
        ...


class Runtime(Protocol):
    """Starts what serves a release."""

    async def start(self, release: Release, deployment: Deployment) -> Iterable[RunningReplica]:
        """Start the replicas that the manifest asks for; they become ready later."""
        ...
