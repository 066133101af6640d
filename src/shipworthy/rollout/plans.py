"""Plans follow from the ledger: who holds a stage, what is being rolled out, and what answers."""

from __future__ import annotations

from contextlib import suppress

import msgspec

from shipworthy.domain.lifecycle import (
    Deployment,
    DeploymentState,
    Release,
    StageEntry,
    manifest_of,
)
from shipworthy.domain.manifest import EndpointServing
from shipworthy.domain.names import Stage, plan_name
from shipworthy.domain.plan import Arm, Capture, Deadlines, Endpoint, Plan
from shipworthy.domain.policy import Policy
from shipworthy.domain.rollout import RolloutState
from shipworthy.errors import IntegrityError
from shipworthy.rollout.turn import Turn


def refresh_plans(turn: Turn) -> dict[str, Plan]:
    """Bring every plan in line with the ledger; a changed one gets the next revision."""
    plans = turn.tx.plans.all()
    rollouts = {state.model: state for state in turn.tx.rollouts.active()}
    for model in turn.tx.stages.models():
        policy = turn.policy(model)
        for stage in Stage:
            name = plan_name(model, stage)
            holder = turn.holder(model, stage)
            rollout = rollouts.get(model) if stage is Stage.PRODUCTION else None
            before = plans.get(name)
            wanted = _plan(turn, name, holder, rollout, policy, before) if holder else None
            if wanted is not None and wanted != before:
                plans[name] = msgspec.structs.replace(wanted, revision=wanted.revision + 1)
                turn.tx.plans.put(plans[name])
    return plans


def _plan(
    turn: Turn,
    name: str,
    holder: StageEntry,
    rollout: RolloutState | None,
    policy: Policy | None,
    before: Plan | None,
) -> Plan | None:
    """The plan as it should be, with the revision that it has; None until something answers."""
    stable = _arm(turn, holder.stage, holder.model, holder.release, before)
    if stable is None:
        return before
    candidate = None
    if rollout is not None and rollout.status.exposed and not _starting(turn, rollout):
        candidate = _arm(turn, holder.stage, holder.model, rollout.candidate, before)
    conduct = policy or Policy(model=holder.model)
    return Plan(
        name=name,
        model=holder.model,
        revision=before.revision if before else 0,
        fence=turn.fence,
        stable=stable,
        candidate=candidate,
        weight=rollout.weight if rollout and candidate else 0,
        rollout=rollout.id if rollout and candidate else "",
        lease_seconds=conduct.rollout.lease,
        deadlines=Deadlines(
            connect=conduct.deadlines.connect,
            attempt=conduct.deadlines.attempt,
            total=conduct.deadlines.total,
        ),
        capture=Capture(payloads=conduct.capture.payloads, max_bytes=conduct.capture.max_bytes),
        fallback_message=conduct.fallback_message,
    )


def _starting(turn: Turn, rollout: RolloutState) -> bool:
    """Whether the candidate has yet to come up on a machine that was started anew.

    Calling it would charge it with what the machine did. One that dies on its own is `restarting`:
    it keeps its share, and what fails there counts.
    """
    deployment = turn.deployment(rollout.model, Stage.PRODUCTION, rollout.candidate)
    return deployment is not None and deployment.state is DeploymentState.STARTING


def _arm(turn: Turn, stage: Stage, model: str, digest: str, before: Plan | None) -> Arm | None:
    """A release as the gateway reaches it; its last known arm while there is none to be had.

    A manifest that was altered in the ledger is not obeyed, and one model's must not stop the rest.
    """
    deployment = turn.deployment(model, stage, digest)
    if deployment is not None and deployment.endpoints:
        with suppress(IntegrityError):
            return arm_of(turn.release(model, digest), deployment)
    known = (before.stable, before.candidate) if before else ()
    return next((arm for arm in known if arm is not None and arm.digest == digest), None)


def arm_of(release: Release, deployment: Deployment) -> Arm:
    """The arm of a deployed release."""
    manifest = manifest_of(release)
    serving = manifest.serving
    credential, served_model = None, release.model
    if isinstance(serving, EndpointServing):
        credential, served_model = serving.credential, serving.served_model
    return Arm(
        release=release.name,
        digest=release.digest,
        version=release.version,
        endpoints=tuple(Endpoint(url=url, credential=credential) for url in deployment.endpoints),
        served_model=served_model,
        contract=manifest.contract,
    )
