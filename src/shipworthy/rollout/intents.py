"""What people ask for: promote, roll back, pause, resume, abort; each answered in a paragraph."""

from __future__ import annotations

from collections.abc import Callable

import msgspec

from shipworthy.domain import rollout as machine
from shipworthy.domain.checklist import Checklist
from shipworthy.domain.gates import GateJudgement, judge
from shipworthy.domain.lifecycle import (
    Deployment,
    DeploymentState,
    Intent,
    IntentKind,
    IntentStatus,
    Release,
    StageEntry,
    StoredPolicy,
    manifest_of,
    standing,
)
from shipworthy.domain.names import Stage
from shipworthy.domain.policy import Policy
from shipworthy.domain.rollout import RolloutState, RolloutStatus, Stepped
from shipworthy.errors import Conflict, ShipworthyError
from shipworthy.ports import Transaction
from shipworthy.rollout.turn import Turn

GATE_DECISIONS = ("gate passed", "gate refused")
"""The kinds of decisions that gates make."""

DRAIN_SECONDS = 5.0
"""How long a deployment that left the plan is kept up, so that every worker has seen the plan."""


def handle_intents(turn: Turn) -> None:
    """Take every open intent as far as it can go now, oldest first."""
    for intent in turn.tx.intents.open():
        try:
            _HANDLERS[intent.kind](turn, intent)
        except ShipworthyError as error:  # an intent that can't be followed must not stop the rest
            turn.answer(intent, IntentStatus.REFUSED, str(error))


def judge_entry(
    tx: Transaction, release: Release, stage: Stage, checklist: Checklist, now: float
) -> GateJudgement | str:
    """Judge the gate to a stage on the evidence in the ledger; a string says why it can't be."""
    stored = tx.policies.current(release.model)
    if stored is None:
        return (
            f"{release.name} is held: no policy is in force for {release.model}, and without"
            " conditions nothing is promoted; apply one with 'shipworthy apply -f DIR'."
        )
    policy = Policy.model_validate(stored.document)
    if stage is Stage.PRODUCTION:
        holder = next(iter(tx.stages.history(release.model, Stage.STAGING)), None)
        if holder is None or holder.release != release.digest:
            return (
                f"{release.name} is held: it is not in staging, where its evidence for production"
                f" is observed; run 'shipworthy promote {release.name} --to staging' first."
            )
    approvals = tx.evidence.approvals(release.digest, stage)
    people = {approval.by for approval in approvals} | {release.created_by}
    return judge(
        stage,
        policy.promotion.gate(stage),
        release=release,
        maker=release.created_by,
        claims=manifest_of(release).metrics,
        findings=tx.evidence.findings(release.digest),
        approvals=approvals,
        waivers=tx.evidence.waivers(),
        checklist=checklist,
        now=now,
        first=is_first(tx, release),
        names={id: person.name for id in people if (person := tx.principals.get(id))},
    )


def is_first(tx: Transaction, release: Release) -> bool:
    """Whether nothing but this release has ever been in production.

    Then there is nothing to compare it with, and nothing to go back to.
    """
    history = tx.stages.history(release.model, Stage.PRODUCTION)
    return all(entry.release == release.digest for entry in history)


# --- promote ----------------------------------------------------------------------------------


def _promote(turn: Turn, intent: Intent) -> None:
    if intent.release is None or intent.stage is None:
        turn.answer(intent, IntentStatus.REFUSED, "A promotion names a release and a stage.")
        return
    release = turn.release(intent.model, intent.release)
    holder = turn.holder(intent.model, intent.stage)
    if holder is not None and holder.release == release.digest:
        turn.answer(intent, IntentStatus.DONE, f"{release.name} is in {intent.stage} already.")
    elif intent.status is IntentStatus.WAITING:
        _await_deployment(turn, intent, release, intent.stage)
    elif ahead := _ahead(turn, intent, intent.stage):
        text = f"{release.name} waits in line behind {ahead}."
        turn.answer(intent, IntentStatus.PENDING, text)
    else:
        _enter_gate(turn, intent, release, intent.stage)


def _ahead(turn: Turn, intent: Intent, stage: Stage) -> str | None:
    """What has to end before this promotion is judged; it is judged on what holds by then.

    Another promotion that waits for its deployment is ahead too: both would find the stage empty,
    and the second would take all of the traffic with no rollout, or undo a later wish.
    """
    running = _running(turn, intent.model) if stage is Stage.PRODUCTION else None
    if running is not None and running.candidate == intent.release:
        # In line behind itself it would be rolled out again, should it have to be rolled back.
        message = f"{running.candidate_name} is being rolled out already."
        raise Conflict(message)
    if running is not None:
        return running.candidate_name
    for other in turn.tx.intents.open():
        if other.model != intent.model or other.status is not IntentStatus.WAITING:
            continue
        if other.kind is IntentKind.ROLLBACK and stage is Stage.PRODUCTION:
            return "the rollback"
        if other.stage is stage and other.release not in {None, intent.release}:
            return turn.release(other.model, other.release or "").name
    return None


def _enter_gate(turn: Turn, intent: Intent, release: Release, stage: Stage) -> None:
    """Judge, and on a pass start what serves the release; development has no gate."""
    text = f"{release.name} is started in development."
    if stage is not Stage.DEVELOPMENT:
        judged = judge_entry(turn.tx, release, stage, turn.checklist, turn.now)
        passed = isinstance(judged, GateJudgement) and judged.passed
        text = judged if isinstance(judged, str) else judged.paragraph
        kind = GATE_DECISIONS[0] if passed else GATE_DECISIONS[1]
        turn.decide(release.model, kind, text, actor=intent.actor)
        if not passed:
            turn.answer(intent, IntentStatus.REFUSED, text)
            return
    deployment = turn.want(release.model, stage, release.digest)
    holder = turn.holder(release.model, stage)
    if stage is Stage.PRODUCTION and holder is not None:
        _begin_rollout(turn, release, holder)
        follow = (
            f"Its rollout begins; 'shipworthy rollout status {release.model}' tells how it goes."
        )
        turn.answer(intent, IntentStatus.DONE, f"{text} {follow}")
    else:
        turn.answer(intent, IntentStatus.WAITING, text)
        _await_deployment(turn, intent, release, stage, deployment)


def _begin_rollout(turn: Turn, release: Release, holder: StageEntry) -> None:
    policy = turn.policy(release.model)
    if policy is None:  # the gate has just been judged by it, in this very transaction
        message = f"no policy is in force for {release.model}"
        raise ShipworthyError(message)
    stable = turn.release(release.model, holder.release)
    state = machine.begin(
        id=turn.new_id("rol"),
        model=release.model,
        candidate=(release.digest, release.name),
        stable=(stable.digest, stable.name),
        policy=policy,
        now=turn.now,
    )
    turn.tx.rollouts.save(state)


def _await_deployment(
    turn: Turn,
    intent: Intent,
    release: Release,
    stage: Stage,
    deployment: Deployment | None = None,
) -> None:
    """Without a rollout a release takes its stage as soon as it answers."""
    deployment = deployment or turn.deployment(release.model, stage, release.digest)
    if deployment is None or deployment.state is DeploymentState.FAILED:
        why = deployment.message if deployment else "its deployment was stopped"
        turn.retire(release.model, stage, release.digest, after=0)
        text = f"{release.name} did not start in {stage}: {why}"
        turn.decide(release.model, "start failed", text, actor=intent.actor)
        turn.answer(intent, IntentStatus.REFUSED, text)
    elif deployment.state is DeploymentState.READY:
        before = turn.holder(release.model, stage)
        take_over(turn, release, stage)
        if before is not None:
            turn.retire(release.model, stage, before.release, after=DRAIN_SECONDS)
        turn.answer(intent, IntentStatus.DONE, f"{intent.answer} It answers in {stage} now.")


def take_over(turn: Turn, release: Release, stage: Stage, *, rollback: bool = False) -> None:
    """Let a release hold a stage, under the policy in force."""
    policy = turn.tx.policies.current(release.model)
    turn.tx.stages.enter(
        StageEntry(
            model=release.model,
            stage=stage,
            release=release.digest,
            policy=policy.digest if policy else None,
            at=turn.now,
            rollback=rollback,
        )
    )
    turn.tx.audit.append(
        at=turn.now,
        actor=turn.keeper,
        act="take over",
        subject=release.name,
        detail={"stage": stage.value, "digest": release.digest, "rollback": rollback},
    )


# --- the way back -----------------------------------------------------------------------------


def _roll_back(turn: Turn, intent: Intent) -> None:
    """Never gated: out of the rollout that runs, else back to the release before.

    `intent.release` is the one to leave, as the person saw it: when a guardrail or somebody else
    was quicker, going back once more would take away the release that is wanted.
    """
    running = _running(turn, intent.model)
    if running is not None:
        by = turn.name_of(intent.actor)
        out = machine.abort(running, by=by, reason=intent.reason, now=turn.now, kind="roll back")
        _settle(turn, intent, running, out)
        return
    stack = standing(turn.tx.stages.history(intent.model, Stage.PRODUCTION))
    if stack and intent.release not in {None, stack[-1].release}:
        left = turn.release(intent.model, intent.release or "")
        serving = turn.release(intent.model, stack[-1].release)
        text = f"{left.name} is out of {intent.model}'s traffic already; {serving.name} serves."
        turn.answer(intent, IntentStatus.DONE, text)
        return
    if len(stack) < 2:  # the current release and the one before it
        text = f"{intent.model} has no earlier production release to go back to."
        turn.answer(intent, IntentStatus.REFUSED, text)
        return
    before, current = stack[-2], stack[-1]
    release = turn.release(intent.model, before.release)
    waiting = intent.status is IntentStatus.WAITING
    deployment = turn.deployment(intent.model, Stage.PRODUCTION, before.release)
    if deployment is None or not waiting:
        deployment = turn.want(intent.model, Stage.PRODUCTION, before.release)
    if deployment.state is DeploymentState.READY:
        _return_to(turn, intent, release, before, current)
    elif deployment.state is DeploymentState.FAILED:
        text = f"{release.name} could not be restored: {deployment.message}"
        turn.retire(intent.model, Stage.PRODUCTION, before.release, after=0)
        turn.answer(intent, IntentStatus.REFUSED, text)
    else:
        text = f"{release.name} is restored from its pinned parts; traffic moves when it answers."
        leaving = msgspec.structs.replace(intent, release=current.release)
        turn.answer(leaving, IntentStatus.WAITING, text)


def _return_to(
    turn: Turn, intent: Intent, release: Release, before: StageEntry, current: StageEntry
) -> None:
    """Give production back to the release before, with the policy that it ran under."""
    policy = turn.tx.policies.current(release.model)
    earlier = turn.tx.policies.by_digest(release.model, before.policy) if before.policy else None
    if earlier and policy and earlier.digest != policy.digest:
        again = Policy.model_validate(earlier.document)
        put_policy(turn.tx, again, by=intent.actor, at=turn.now)
    take_over(turn, release, Stage.PRODUCTION, rollback=True)
    turn.retire(release.model, Stage.PRODUCTION, current.release, after=DRAIN_SECONDS)
    left = turn.release(release.model, current.release)
    because = f" ({intent.reason})" if intent.reason else ""
    how = "was still warm" if intent.status is IntentStatus.PENDING else "was restored"
    text = (
        f"{left.name} is rolled back by {turn.name_of(intent.actor)}{because}: {release.name}, the"
        f" release before it, takes all of {release.model}'s traffic with the policy that it ran"
        f" under. It {how}, {turn.now - intent.at:.1f} s after the request."
    )
    turn.decide(release.model, "roll back", text, actor=intent.actor)
    turn.answer(intent, IntentStatus.DONE, text)


def put_policy(tx: Transaction, policy: Policy, *, by: str, at: float) -> bool:
    """Put a policy in force; False when that very policy is in force already."""
    current = tx.policies.current(policy.model)
    digest = policy.digest()
    if current is not None and current.digest == digest:
        return False
    tx.policies.put(
        StoredPolicy(
            model=policy.model,
            revision=current.revision + 1 if current else 1,
            digest=digest,
            document=policy.model_dump(mode="json"),
            applied_at=at,
            applied_by=by,
        )
    )
    tx.audit.append(
        at=at, actor=by, act="apply policy", subject=policy.model, detail={"digest": digest}
    )
    return True


# --- a running rollout ------------------------------------------------------------------------


def _pause(turn: Turn, intent: Intent) -> None:
    _on_running(turn, intent, lambda state, by: machine.pause(state, by=by, reason=intent.reason))


def _resume(turn: Turn, intent: Intent) -> None:
    _on_running(
        turn,
        intent,
        lambda state, by: machine.resume(state, by=by, reason=intent.reason, now=turn.now),
    )


def _abort(turn: Turn, intent: Intent) -> None:
    _on_running(
        turn,
        intent,
        lambda state, by: machine.abort(state, by=by, reason=intent.reason, now=turn.now),
    )


def _on_running(turn: Turn, intent: Intent, act: Callable[[RolloutState, str], Stepped]) -> None:
    running = _running(turn, intent.model)
    if running is None:
        text = f"No rollout of {intent.model} is under way."
        turn.answer(intent, IntentStatus.REFUSED, text)
        return
    _settle(turn, intent, running, act(running, turn.name_of(intent.actor)))


def _settle(turn: Turn, intent: Intent, before: RolloutState, out: Stepped) -> None:
    """Keep what a person's act made of a rollout, and answer."""
    if not out.decisions:
        text = (
            f"The rollout of {before.candidate_name} is {before.status}; nothing to {intent.kind}."
        )
        turn.answer(intent, IntentStatus.REFUSED, text)
        return
    turn.tx.rollouts.save(out.state)
    for verdict in out.decisions:
        turn.decide(
            before.model,
            verdict.kind,
            verdict.text,
            rollout=before.id,
            numbers=verdict.numbers,
            actor=intent.actor,
        )
    if out.state.status.ended:
        close(turn, out.state)
    turn.answer(intent, IntentStatus.DONE, out.decisions[-1].text)


def close(turn: Turn, state: RolloutState) -> None:
    """Tidy up behind a rollout that ended: who holds production, and what stays up how long."""
    turn.tx.rollouts.forget_units(state.id)
    if state.status is not RolloutStatus.COMPLETED:
        turn.retire(state.model, Stage.PRODUCTION, state.candidate, after=DRAIN_SECONDS)
        return
    take_over(turn, turn.release(state.model, state.candidate), Stage.PRODUCTION)
    policy = turn.policy(state.model)
    warm = policy.rollout.keep_warm if policy else 0.0
    turn.retire(state.model, Stage.PRODUCTION, state.stable, after=max(warm, DRAIN_SECONDS))


def _running(turn: Turn, model: str) -> RolloutState | None:
    return next((state for state in turn.tx.rollouts.active() if state.model == model), None)


_HANDLERS: dict[IntentKind, Callable[[Turn, Intent], None]] = {
    IntentKind.PROMOTE: _promote,
    IntentKind.ROLLBACK: _roll_back,
    IntentKind.PAUSE: _pause,
    IntentKind.RESUME: _resume,
    IntentKind.ABORT: _abort,
}
