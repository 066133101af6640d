"""The state of every model from release to live traffic, and what needs a person first."""

from __future__ import annotations

import fcntl
from collections.abc import Mapping
from contextlib import suppress

import msgspec

from shipworthy.app.health import troubles
from shipworthy.app.session import Session
from shipworthy.domain.lifecycle import Deployment, DeploymentState, Release, TrafficCount
from shipworthy.domain.names import ReleaseReference, Stage, plan_name
from shipworthy.domain.plan import BUCKETS, Limits, Mirror, Plan
from shipworthy.domain.policy import Policy
from shipworthy.domain.rollout import RolloutState, RolloutStatus, missing_to_go_up
from shipworthy.ports import Transaction
from shipworthy.rollout.unheeded import unheeded
from shipworthy.settings import Project
from shipworthy.stores.snapshots import newest_snapshot

_TRAFFIC_MINUTES = 15
LOCK = "up.lock"
NOT_RUNNING = "not running"


class Serving(msgspec.Struct, frozen=True, kw_only=True):
    """One release at one stage; traffic is that of the last quarter of an hour."""

    stage: Stage
    release: str
    digest: str
    since: float
    state: str
    message: str
    weight: float
    answers: int
    failed: int
    assigned: int


class RolloutStatusLine(msgspec.Struct, frozen=True, kw_only=True):
    """A rollout under way, or the newest one that ended."""

    id: str
    candidate: str
    stable: str
    status: str
    weight: float
    step: int
    steps: int
    exposed_requests: int
    e_value: float
    alarm_at: float
    missing: list[str]
    reason: str
    ended: float | None


class ModelStatus(msgspec.Struct, frozen=True, kw_only=True):
    """One model.

    `mirror` and `limits` are what the gateway does in production, in words; empty for nothing.
    `unheeded` says what the policy asks for and is not done.
    """

    model: str
    releases: int
    newest: str
    serving: list[Serving]
    rollout: RolloutStatusLine | None
    mirror: str = ""
    limits: str = ""
    unheeded: list[str] = []


class Status(msgspec.Struct, frozen=True, kw_only=True):
    """All there is to know at a glance; `needs_a_person` comes first."""

    running: bool
    keeper_seen: float | None
    needs_a_person: list[str]
    models: list[ModelStatus]


def status_of(session: Session, model: str | None = None) -> Status:
    """Look at the whole project, or one model of it."""
    now = session.clock()
    with session.ledger.read() as tx:
        plans = tx.plans.all()
        models = [
            _model(tx, name, now, plans) for name in tx.stages.models() if model in (None, name)
        ]
        waiting = [
            f"{intent.model}: a request to {intent.kind} waits: {intent.answer or 'unanswered'}"
            for intent in tx.intents.open()
            if now - intent.at > 5
        ]
        term = tx.terms.current()
    running = is_running(session)
    if not running:
        models = [_stopped(status) for status in models]
    needs = [need for status in models for need in _needs(status)] + waiting
    if not running:
        needs.insert(0, "nothing is running here; start it with 'shipworthy up'")
    else:
        needs = troubles(session.project, term, now, up_for(session.project, now)) + needs
    return Status(
        running=running,
        keeper_seen=_keeper_seen(session.project),
        needs_a_person=needs,
        models=models,
    )


def _keeper_seen(project: Project) -> float | None:
    """When a keeper published last."""
    with suppress(OSError):
        newest = newest_snapshot(project.snapshots)
        return newest.stat().st_mtime if newest else None
    return None


def _stopped(status: ModelStatus) -> ModelStatus:
    """What was last reported of deployments is not so any more when nothing runs."""
    serving = [msgspec.structs.replace(line, state=NOT_RUNNING) for line in status.serving]
    return msgspec.structs.replace(status, serving=serving)


def is_running(session: Session) -> bool:
    """Whether a `shipworthy up` holds this project."""
    return is_held(session.project)


def is_held(project: Project) -> bool:
    """Whether a `shipworthy up` holds it, also where nothing else of it can be read."""
    file = project.state / LOCK
    if not file.is_file():
        return False
    with file.open("rb") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def up_for(project: Project, now: float) -> float:
    """Seconds since an `up` took the lock."""
    return now - (project.state / LOCK).stat().st_mtime


def _model(tx: Transaction, name: str, now: float, plans: Mapping[str, Plan]) -> ModelStatus:
    stored = tx.policies.current(name)
    policy = Policy.model_validate(stored.document) if stored else None
    live = plans.get(name)
    releases = tx.releases.list(name)
    deployments = tx.deployments.list(name)
    rollout = tx.rollouts.latest(name)
    active = rollout if rollout is not None and not rollout.status.ended else None
    serving: list[Serving] = []
    for stage in reversed(Stage):
        entry = next(iter(tx.stages.history(name, stage)), None)
        plan = plan_name(name, stage)
        counts = tx.traffic.since(plan, int(now // 60) - _TRAFFIC_MINUTES)
        held = [(entry.release, entry.at)] if entry else []
        if active is not None and stage is Stage.PRODUCTION:
            held.append((active.candidate, active.started))
        for digest, since in held:
            release = tx.releases.find(ReleaseReference(name, digest=digest))
            if release is not None:
                share = _share(active, digest) if stage is Stage.PRODUCTION else 1.0
                serving.append(_serving(release, stage, since, share, deployments, counts))
    return ModelStatus(
        model=name,
        releases=len(releases),
        newest=releases[0].name if releases else "",
        serving=serving,
        rollout=_rollout(rollout, now) if rollout else None,
        mirror=_mirror(live.mirror) if live and live.mirror else "",
        limits=_limits(live.limits) if live else "",
        unheeded=unheeded(tx, policy) if policy else [],
    )


def _mirror(mirror: Mirror) -> str:
    budget = "" if mirror.budget_per_day is None else f", for {mirror.budget_per_day:g} a day"
    return f"{mirror.share:.4g} of the requests are copied to {mirror.arm.release}{budget}"


def _limits(limits: Limits) -> str:
    said = {
        "requests a minute": limits.requests_per_minute,
        "tokens a minute": limits.tokens_per_minute,
        "at once": limits.concurrency,
        "money a day": limits.budget_per_day,
    }
    return ", ".join(f"{most:,} {what}" for what, most in said.items() if most is not None)


def _share(active: RolloutState | None, digest: str) -> float:
    if active is None:
        return 1.0
    weight = active.weight / BUCKETS
    return weight if digest == active.candidate else 1.0 - weight


def _serving(
    release: Release,
    stage: Stage,
    since: float,
    share: float,
    deployments: list[Deployment],
    counts: list[TrafficCount],
) -> Serving:
    found = [d for d in deployments if d.release == release.digest and d.stage is stage]
    ours = [count for count in counts if count.release == release.name]
    return Serving(
        stage=stage,
        release=release.name,
        digest=release.digest,
        since=since,
        state=found[-1].state.value if found else DeploymentState.STOPPED.value,
        message=found[-1].message if found else "",
        weight=share,
        answers=sum(count.served for count in ours),
        failed=sum(count.failed for count in ours),
        assigned=sum(count.assigned for count in ours),
    )


def _rollout(state: RolloutState, now: float) -> RolloutStatusLine:
    return RolloutStatusLine(
        id=state.id,
        candidate=state.candidate_name,
        stable=state.stable_name,
        status=state.status.value,
        weight=1.0 if state.status is RolloutStatus.COMPLETED else state.weight / BUCKETS,
        step=state.step + 1,
        steps=len(state.rules.steps),
        exposed_requests=state.exposed_requests,
        e_value=state.guardrail.e_value,
        alarm_at=1.0 / state.rules.alpha_down,
        missing=missing_to_go_up(state, now) if state.status.exposed else [],
        reason=state.reason,
        ended=state.ended,
    )


def rollout_of(session: Session, model: str) -> RolloutStatusLine | None:
    """The model's rollout under way, or its newest."""
    with session.ledger.read() as tx:
        state = tx.rollouts.latest(model)
    return _rollout(state, session.clock()) if state else None


def _needs(status: ModelStatus) -> list[str]:
    needs: list[str] = []
    rollout = status.rollout
    if rollout is not None and rollout.status == RolloutStatus.HELD:
        needs.append(
            f"{status.model}: the rollout of {rollout.candidate} is held; "
            f"'shipworthy rollout resume {status.model}' or 'rollout abort {status.model}'"
        )
    if rollout is not None and rollout.status == RolloutStatus.ROLLED_BACK:
        current = {line.release for line in status.serving if line.stage is Stage.PRODUCTION}
        if rollout.stable in current:
            needs.append(f"{rollout.candidate} was rolled back ({_first_sentence(rollout.reason)})")
    needs += [
        f"{line.release} in {line.stage} is {line.state}: {line.message or 'no reason given'}"
        for line in status.serving
        if line.state in {DeploymentState.FAILED, DeploymentState.STOPPED}
    ]
    return needs


def _first_sentence(text: str) -> str:
    return text.split(". ", maxsplit=1)[0].rstrip(".")
