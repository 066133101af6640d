"""What the ledger remembers about releases on their way: who, what, when and why."""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum
from typing import Any, Literal

import msgspec

from shipworthy.domain.canonical import digest_of
from shipworthy.domain.findings import Finding
from shipworthy.domain.manifest import Manifest
from shipworthy.domain.names import Stage
from shipworthy.errors import IntegrityError

FOUR_EYES = "four-eyes"
"""The waiver that lets a lone user approve what they made."""


class Principal(msgspec.Struct, frozen=True, kw_only=True):
    """A person or service that acts; all else refers to `id`, so that a name can be erased."""

    id: str
    name: str
    kind: Literal["person", "service"] = "person"


class Release(msgspec.Struct, frozen=True, kw_only=True):
    """A registered release. `manifest` is the manifest's plain JSON content."""

    model: str
    version: int
    digest: str
    manifest: dict[str, Any]
    created_at: float
    created_by: str

    @property
    def name(self) -> str:
        """`model@version`."""
        return f"{self.model}@{self.version}"


def manifest_of(release: Release) -> Manifest:
    """What a release pins, as it was registered; IntegrityError when the ledger's copy differs.

    Everything that starts, judges or routes to a release reads its manifest by this.
    """
    if digest_of(release.manifest) != release.digest:
        message = (
            f"the ledger's manifest of {release.name} is not the registered one; restore the ledger"
            f" from a backup ('shipworthy release verify {release.name}' tells more)"
        )
        raise IntegrityError(message)
    return Manifest.model_validate(release.manifest)


class StoredPolicy(msgspec.Struct, frozen=True, kw_only=True):
    """A policy that is or was in force; `document` is its plain JSON content."""

    model: str
    revision: int
    digest: str
    document: dict[str, Any]
    applied_at: float
    applied_by: str


class StageFinding(msgspec.Struct, frozen=True, kw_only=True):
    """A finding on a release, observed while it ran at `stage`."""

    release: str
    stage: Stage
    finding: Finding


class Approval(msgspec.Struct, frozen=True, kw_only=True):
    """A person's yes for a release (by digest) to enter a stage."""

    release: str
    stage: Stage
    by: str
    at: float
    reason: str = ""


class Waiver(msgspec.Struct, frozen=True, kw_only=True):
    """A rule set aside: by whom, why and until when (None: standing). `model` None means all."""

    what: str
    by: str
    at: float
    reason: str
    model: str | None = None
    until: float | None = None


class DeploymentState(StrEnum):
    """How far a deployment is; `restarting` is one that has answered and does not for now."""

    STARTING = "starting"
    READY = "ready"
    RESTARTING = "restarting"
    FAILED = "failed"
    STOPPED = "stopped"


class Deployment(msgspec.Struct, frozen=True, kw_only=True):
    """A release that runs, or should, at a stage.

    `wanted` is decided by the keeper; `state`, `endpoints` and `message` are reported by whoever
    runs it. `retire_at` is when a replaced deployment stops being kept warm.
    """

    id: str
    model: str
    release: str
    stage: Stage
    wanted: bool
    state: DeploymentState
    since: float
    endpoints: tuple[str, ...] = ()
    message: str = ""
    retire_at: float | None = None


class IntentKind(StrEnum):
    """What people may ask of the keeper."""

    PROMOTE = "promote"
    ROLLBACK = "rollback"
    PAUSE = "pause"
    RESUME = "resume"
    ABORT = "abort"


class IntentStatus(StrEnum):
    """What became of a request: `waiting` in line or for a deployment, `done` or `refused`."""

    PENDING = "pending"
    WAITING = "waiting"
    DONE = "done"
    REFUSED = "refused"


class Intent(msgspec.Struct, frozen=True, kw_only=True):
    """A person's request to the keeper; `answer` is the paragraph that it was answered with."""

    id: str
    at: float
    actor: str
    kind: IntentKind
    model: str
    release: str | None = None
    stage: Stage | None = None
    reason: str = ""
    status: IntentStatus = IntentStatus.PENDING
    answer: str = ""


class Decision(msgspec.Struct, frozen=True, kw_only=True):
    """Something decided: one paragraph for people, the numbers behind it for machines."""

    id: str
    at: float
    model: str
    kind: str
    text: str
    rollout: str | None = None
    numbers: dict[str, Any] = {}


class StageEntry(msgspec.Struct, frozen=True, kw_only=True):
    """A release (by digest) that took over a stage, and the policy it ran under.

    `rollback` says that it came back in place of the one that had replaced it.
    """

    model: str
    stage: Stage
    release: str
    policy: str | None
    at: float
    rollback: bool = False


class TrafficCount(msgspec.Struct, frozen=True, kw_only=True):
    """What one release did for one plan within a minute, from the gateway's own records.

    `minute` is Unix time divided by 60. `assigned` counts requests whose first attempt was this
    release's, `failed` those of them that it failed; `served` the answers that came from it.
    """

    plan: str
    release: str
    minute: int
    assigned: int = 0
    failed: int = 0
    served: int = 0


def standing(history: Sequence[StageEntry]) -> list[StageEntry]:
    """The entries that a rollback can walk down, the current one last; `history` newest first.

    A promotion puts a release on top; a rollback takes the top off again.
    """
    stack: list[StageEntry] = []
    for entry in reversed(history):
        if not entry.rollback:
            stack.append(entry)
        elif len(stack) > 1:
            stack.pop()
    return stack
