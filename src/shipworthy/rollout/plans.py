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
from shipworthy.domain.manifest import EndpointServing, Manifest
from shipworthy.domain.names import Stage, plan_name
from shipworthy.domain.plan import (
    Arm,
    Behaviour,
    Capture,
    Deadlines,
    Endpoint,
    Hedge,
    Limits,
    Mirror,
    Plan,
    Price,
)
from shipworthy.domain.policy import MirrorPolicy, Policy
from shipworthy.domain.rollout import RolloutState
from shipworthy.errors import IntegrityError
from shipworthy.rollout.turn import Turn
from shipworthy.rollout.unheeded import unheeded_mirror

MIRROR_DECISION = "mirror"
_NO_BEHAVIOUR = (Behaviour(), Behaviour(pinned=True))


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
        if policy is not None and policy.mirror is not None:
            _tell_of_mirror(turn, policy, policy.mirror, plans.get(model))
    return plans


def _tell_of_mirror(turn: Turn, policy: Policy, wanted: MirrorPolicy, plan: Plan | None) -> None:
    """Record whether requests are copied, and if not why, whenever that is another thing to say."""
    model, mirror = policy.model, plan and plan.mirror
    text = unheeded_mirror(turn.tx, policy) + "."
    if mirror is not None:
        text = f"{wanted.share:.4g} of {model}'s requests are copied to {mirror.arm.release}."
    elif text == ".":
        return  # it starts
    told = (one for one in turn.tx.decisions.list(model) if one.kind == MIRROR_DECISION)
    last = next(told, None)
    if last is None or last.text != text:
        turn.decide(model, MIRROR_DECISION, text)


def _plan(
    turn: Turn,
    name: str,
    holder: StageEntry,
    rollout: RolloutState | None,
    policy: Policy | None,
    before: Plan | None,
) -> Plan | None:
    """The plan as it should be, with the revision that it has; None until something answers."""
    known = (before.stable, before.candidate) if before else ()
    stable = _arm(turn, holder.stage, holder.model, holder.release, known)
    if stable is None:
        return before
    candidate = None
    if rollout is not None and rollout.status.exposed and not _starting(turn, rollout):
        candidate = _arm(turn, holder.stage, holder.model, rollout.candidate, known)
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
        deadlines=_deadlines(conduct, stable),
        capture=_capture(conduct),
        limits=Limits(**conduct.limits.model_dump()),
        hedge=conduct.hedge and Hedge(**conduct.hedge.model_dump()),
        mirror=_mirror(turn, holder, conduct.mirror, before),
        fallback_message=conduct.fallback_message,
    )


def _starting(turn: Turn, rollout: RolloutState) -> bool:
    """Whether the candidate has yet to come up on a machine that was started anew.

    Calling it would charge it with what the machine did. One that dies on its own is `restarting`:
    it keeps its share, and what fails there counts.
    """
    deployment = turn.deployment(rollout.model, Stage.PRODUCTION, rollout.candidate)
    return deployment is not None and deployment.state is DeploymentState.STARTING


def _arm(
    turn: Turn, stage: Stage, model: str, digest: str, known: tuple[Arm | None, ...]
) -> Arm | None:
    """A release as the gateway reaches it; its last known arm while there is none to be had.

    A manifest that was altered in the ledger is not obeyed, and one model's must not stop the rest.
    """
    deployment = turn.deployment(model, stage, digest)
    if deployment is not None and deployment.endpoints:
        with suppress(IntegrityError):
            return arm_of(turn.release(model, digest), deployment)
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
        endpoints=tuple(
            Endpoint(url=url, credential=credential, concurrency=serving.concurrency)
            for url in deployment.endpoints
        ),
        served_model=served_model,
        contract=manifest.contract,
        behaviour=behaviour_of(manifest),
        price=_price(manifest),
    )


def behaviour_of(manifest: Manifest) -> Behaviour | None:
    """What the gateway adds to each request; None for nothing."""
    said = dict(manifest.behaviour or {})
    behaviour = Behaviour(
        system=said.get("system"),
        chat_template=said.get("chat_template"),
        tools=tuple(said.get("tools", ())),
        tool_choice=said.get("tool_choice"),
        sampling=dict(manifest.inference.sampling) if not manifest.contract.tensors else {},
        pinned=bool(said.get("pin_sampling")),
    )
    return None if behaviour in _NO_BEHAVIOUR else behaviour


def _price(manifest: Manifest) -> Price | None:
    cost = manifest.cost
    if cost is None:
        return None
    return Price(
        per_1k_input=cost.per_1k_input_tokens or 0.0,
        per_1k_output=cost.per_1k_output_tokens or 0.0,
        per_call=cost.per_call or 0.0,
    )


def _deadlines(policy: Policy, stable: Arm) -> Deadlines:
    """What the policy says; language models take longer where it says nothing."""
    said = policy.deadlines
    attempt, total = (5.0, 15.0) if stable.contract.tensors else (60.0, 120.0)
    attempt = attempt if said.attempt is None else said.attempt
    return Deadlines(
        connect=said.connect,
        attempt=attempt,
        total=max(attempt, total) if said.total is None else said.total,
        idle=said.idle,
        stream=said.stream,
    )


def _capture(policy: Policy) -> Capture:
    said = policy.capture
    return Capture(
        payloads=said.payloads,
        sample=said.sample,
        max_bytes=said.max_bytes,
        redact=said.redact,
        redact_fields=said.redact_fields,
        features=said.features,
    )


def _mirror(
    turn: Turn, holder: StageEntry, policy: MirrorPolicy | None, before: Plan | None
) -> Mirror | None:
    """The copy's receiver as the gateway reaches it; None while there is none that may have one.

    What answers the requests itself has no use for copies of them.
    """
    if policy is None or holder.stage is not Stage.PRODUCTION:
        return None
    model = holder.model
    found = _mirrored(turn, model, policy.to)
    if found is None or found[1] == holder.release:
        return None
    stage, digest = found
    known = before.mirror.arm if before and before.mirror else None
    arm = _arm(turn, stage, model, digest, (known,))
    if arm is None or arm.contract.side_effects != "none":
        return None
    return Mirror(
        arm=arm,
        share=policy.share,
        concurrency=policy.concurrency,
        budget_per_day=policy.budget_per_day,
    )


def _mirrored(turn: Turn, model: str, to: str) -> tuple[Stage, str] | None:
    """Stage and digest of the release that a mirror names; None when it runs nowhere."""
    if to in {stage.value for stage in Stage}:
        holder = turn.holder(model, Stage(to))
        return holder and (holder.stage, holder.release)
    for deployment in turn.tx.deployments.list(model):
        if deployment.wanted and turn.release(model, deployment.release).name == to:
            return deployment.stage, deployment.release
    return None
