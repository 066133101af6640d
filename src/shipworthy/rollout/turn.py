"""One turn of the keeper: a writing transaction, a moment, and how decisions are recorded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import msgspec

from shipworthy.domain.checklist import Checklist
from shipworthy.domain.lifecycle import (
    Decision,
    Deployment,
    DeploymentState,
    Intent,
    IntentStatus,
    Release,
    StageEntry,
)
from shipworthy.domain.names import ReleaseReference, Stage
from shipworthy.domain.policy import Policy
from shipworthy.domain.rollout import Verdict
from shipworthy.errors import NotFound
from shipworthy.ports import Transaction

NewId = Callable[[str], str]
"""Makes an id that nothing else has, beginning with the given prefix."""


@dataclass(frozen=True, slots=True)
class Turn:
    """All changes of a turn are kept together or not at all."""

    tx: Transaction
    now: float
    fence: int
    keeper: str
    new_id: NewId
    checklist: Checklist

    def decide(
        self,
        model: str,
        kind: str,
        text: str,
        *,
        rollout: str | None = None,
        numbers: dict[str, Any] | None = None,
        actor: str | None = None,
    ) -> None:
        """Record what was decided and why; the audit log refers to it without repeating names."""
        decision = Decision(
            id=self.new_id("dec"),
            at=self.now,
            model=model,
            kind=kind,
            text=text,
            rollout=rollout,
            numbers=numbers or {},
        )
        self.tx.decisions.add(decision)
        self.tx.audit.append(
            at=self.now,
            actor=actor or self.keeper,
            act=kind,
            subject=model,
            detail={"decision": decision.id, **({"rollout": rollout} if rollout else {})},
        )

    def record(self, model: str, rollout: str, verdicts: tuple[Verdict, ...]) -> None:
        """Record the decisions of the state machine."""
        for verdict in verdicts:
            self.decide(model, verdict.kind, verdict.text, rollout=rollout, numbers=verdict.numbers)

    def answer(self, intent: Intent, status: IntentStatus, text: str) -> None:
        """Answer an intent, or say what it waits for."""
        if (intent.status, intent.answer) != (status, text):
            self.tx.intents.put(msgspec.structs.replace(intent, status=status, answer=text))

    def name_of(self, principal: str) -> str:
        """A principal's name for a sentence, or its id once the name was erased."""
        found = self.tx.principals.get(principal)
        return found.name if found else principal

    def release(self, model: str, digest: str) -> Release:
        """The release of that digest; NotFound when the ledger has lost it."""
        found = self.tx.releases.find(ReleaseReference(model, digest=digest))
        if found is None:
            message = f"{model}@{digest} is not registered"
            raise NotFound(message)
        return found

    def policy(self, model: str) -> Policy | None:
        """The policy in force."""
        stored = self.tx.policies.current(model)
        return Policy.model_validate(stored.document) if stored else None

    def holder(self, model: str, stage: Stage) -> StageEntry | None:
        """The release that holds a stage now."""
        return next(iter(self.tx.stages.history(model, stage)), None)

    def deployment(self, model: str, stage: Stage, digest: str) -> Deployment | None:
        """The newest deployment of a release at a stage that has not stopped."""
        found = [
            deployment
            for deployment in self.tx.deployments.list(model)
            if deployment.stage is stage and deployment.release == digest and deployment.wanted
        ]
        return found[-1] if found else None

    def want(self, model: str, stage: Stage, digest: str) -> Deployment:
        """The deployment of a release at a stage, asked for when there is none.

        One that failed is replaced: who asks again wants it tried again, and the way back must not
        depend on a replica that died while it was kept warm.
        """
        found = self.deployment(model, stage, digest)
        if found is not None and found.state is DeploymentState.FAILED:
            self.tx.deployments.put(msgspec.structs.replace(found, wanted=False))
            found = None
        if found is None:
            found = Deployment(
                id=self.new_id("dep"),
                model=model,
                release=digest,
                stage=stage,
                wanted=True,
                state=DeploymentState.STARTING,
                since=self.now,
            )
            self.tx.deployments.put(found)
        elif found.retire_at is not None:
            found = msgspec.structs.replace(found, retire_at=None)
            self.tx.deployments.put(found)
        return found

    def retire(self, model: str, stage: Stage, digest: str, *, after: float) -> None:
        """Stop a release's deployment at a stage `after` seconds from now."""
        found = self.deployment(model, stage, digest)
        if found is not None:
            self.tx.deployments.put(msgspec.structs.replace(found, retire_at=self.now + after))
