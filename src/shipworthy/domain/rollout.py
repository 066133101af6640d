"""The rollout state machine: evidence in, a new state and what was decided out.

    preparing ──▶ progressing ──▶ completed
                   │   ▲   │
                   ▼   │   ▼
            paused, held   rolled_back        and from any of them ──▶ aborted

`preparing` waits for the candidate's endpoints. While `progressing`, `paused` or `held` the
candidate keeps its weight and every guardrail stays armed; only `progressing` may go up. `held`
means undecided for too long: a person must resume or abort.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from enum import StrEnum
from typing import Any

import msgspec

from shipworthy.domain.plan import BUCKETS
from shipworthy.domain.policy import Policy
from shipworthy.domain.statistics.breaker import BreakerRule, BreakerWindow
from shipworthy.domain.statistics.guardrail import (
    ArmCounts,
    CountedUnit,
    ErrorGuardrail,
    count_unit,
    counted_share,
    judge_errors,
)
from shipworthy.domain.statistics.noninferiority import NonInferiority

MAX_UNITS = 200_000
"""Most units that a rollout remembers; beyond it only a fixed fraction of all units is counted."""


class RolloutStatus(StrEnum):
    """Where a rollout stands."""

    PREPARING = "preparing"
    PROGRESSING = "progressing"
    PAUSED = "paused"
    HELD = "held"
    COMPLETED = "completed"
    ROLLED_BACK = "rolled_back"
    ABORTED = "aborted"

    @property
    def ended(self) -> bool:
        """Whether nothing will happen any more."""
        return self in {self.COMPLETED, self.ROLLED_BACK, self.ABORTED}

    @property
    def exposed(self) -> bool:
        """Whether the candidate may be getting traffic."""
        return self in {self.PROGRESSING, self.PAUSED, self.HELD}


class Step(msgspec.Struct, frozen=True, kw_only=True):
    """A step as the policy had it when the rollout began; `weight` in basis points."""

    weight: int
    requests: int
    units: int
    duration: float


class RolloutRules(msgspec.Struct, frozen=True, kw_only=True):
    """What the policy said when the rollout began; a policy applied later changes nothing here."""

    steps: tuple[Step, ...]
    margin: float
    alpha_up: float
    step_limit: float
    ready_limit: float
    alpha_down: float
    harm_floor: float
    breaker_window: int
    breaker_failures: int


class UnitHistory(msgspec.Struct, frozen=True):
    """What a rollout remembers of a unit.

    `step` is the last one that counted it; `errors` is what its counted errors revealed about its
    place in the split.
    """

    step: int
    errors: CountedUnit | None = None


class Observation(msgspec.Struct, frozen=True, kw_only=True):
    """One request of a rollout, by intention to treat: the first attempt of the assigned arm.

    `weight` is the candidate's share that the request was assigned under. Client faults and
    requests that the client gave up on are no observations.
    """

    inference: str
    at: float
    revision: int
    candidate: bool
    failed: bool
    weight: float
    unit: str | None = None


class RolloutState(msgspec.Struct, frozen=True, kw_only=True):
    """All that a rollout needs to go on after a restart, but for its units' histories.

    `candidate` and `stable` are release digests; the names are for people. `revision` is the
    plan's in force for this rollout: going up counts only what was assigned under the current
    step's. `thinning` halves, each time it grows, the fraction of units that are counted.
    """

    id: str
    model: str
    candidate: str
    candidate_name: str
    stable: str
    stable_name: str
    policy: str
    rules: RolloutRules
    started: float
    status: RolloutStatus = RolloutStatus.PREPARING
    step: int = 0
    step_started: float = 0.0
    step_revision: int = 0
    thinning: int = 0
    exposed_requests: int = 0
    step_candidate: ArmCounts = ArmCounts()
    step_stable: ArmCounts = ArmCounts()
    guardrail: ErrorGuardrail
    breaker: BreakerWindow
    going_up: NonInferiority
    ended: float | None = None
    reason: str = ""

    @property
    def weight(self) -> int:
        """The candidate's weight now, in basis points."""
        return self.rules.steps[self.step].weight if self.status.exposed else 0


class Verdict(msgspec.Struct, frozen=True, kw_only=True):
    """A decision of the state machine, as a paragraph and its numbers."""

    kind: str
    text: str
    numbers: dict[str, Any]


class Stepped(msgspec.Struct, frozen=True, kw_only=True):
    """The result of a step: new state, decisions in order, units whose history changed."""

    state: RolloutState
    decisions: tuple[Verdict, ...] = ()
    units: dict[str, UnitHistory] = {}


def rules_of(policy: Policy) -> RolloutRules:
    """Freeze what a policy says about rollouts."""
    rollout, rollback = policy.rollout, policy.rollback
    return RolloutRules(
        steps=tuple(
            Step(
                weight=max(1, round(step.weight * BUCKETS)),
                requests=step.requests,
                units=step.units,
                duration=step.duration,
            )
            for step in rollout.steps
        ),
        margin=rollout.margin,
        alpha_up=rollout.alpha,
        step_limit=rollout.step_limit,
        ready_limit=rollout.ready_limit,
        alpha_down=rollback.alpha,
        harm_floor=rollback.harm_floor,
        breaker_window=rollback.breaker.window,
        breaker_failures=rollback.breaker.failures,
    )


def begin(
    *,
    id: str,  # it is an id
    model: str,
    candidate: tuple[str, str],
    stable: tuple[str, str],
    policy: Policy,
    now: float,
) -> RolloutState:
    """A rollout that waits for its candidate; `candidate` and `stable` are (digest, name)."""
    rules = rules_of(policy)
    return RolloutState(
        id=id,
        model=model,
        candidate=candidate[0],
        candidate_name=candidate[1],
        stable=stable[0],
        stable_name=stable[1],
        policy=policy.digest(),
        rules=rules,
        started=now,
        guardrail=ErrorGuardrail(),
        breaker=BreakerWindow(BreakerRule(rules.breaker_window, rules.breaker_failures)),
        going_up=_fresh_test(rules, 0),
    )


def expose(state: RolloutState, *, revision: int, now: float) -> Stepped:
    """The candidate answers: give it the first step's share."""
    if state.status is not RolloutStatus.PREPARING:
        return Stepped(state=state)
    state = _enter(state, 0, now, revision)
    text = (
        f"{state.candidate_name} takes {_percent(state.weight)} of {state.model}'s traffic beside"
        f" {state.stable_name}: the gate passed and its endpoints answer."
    )
    return Stepped(state=state, decisions=(_verdict("expose", state, text),))


def step(
    state: RolloutState,
    observations: Iterable[Observation],
    units: Mapping[str, UnitHistory],
    *,
    now: float,
    next_revision: int,
) -> Stepped:
    """Take in evidence and decide: back, hold, up or nothing.

    The guardrails are judged after every observation, so the first that suffices decides; going up
    and holding are judged once, behind the last. `next_revision` is what the plan's revision will
    be if this step changes it. When `thinning` grew, the caller forgets the units that are not
    `counted` any more.
    """
    if not state.status.exposed:
        return Stepped(state=state)
    seen: dict[str, UnitHistory] = {}
    thinning = state.thinning
    for observation in observations:
        history = None
        if observation.unit is not None:
            if not counted(observation.unit, thinning):
                state = _count(state, observation)
                continue
            history = seen.get(observation.unit) or units.get(observation.unit)
            if history is None and len(units) + len(seen) >= MAX_UNITS:
                thinning = state.thinning + 1
        state, history = _learn(state, observation, history)
        if observation.unit is not None and history is not None:
            seen[observation.unit] = history
        harm = _harm(state) if observation.failed else None
        if harm is not None:
            return _roll_back(state, harm, observation, now, seen)
    state = msgspec.structs.replace(state, thinning=thinning)
    verdict_state, verdicts = _progress(state, now, next_revision)
    return Stepped(state=verdict_state, decisions=verdicts, units=seen)


def counted(unit: str, thinning: int) -> bool:
    """Whether a unit (a hexadecimal pseudonym) is still counted; never depends on an outcome."""
    return thinning == 0 or int(unit[-8:], 16) % (1 << thinning) == 0


def _count(state: RolloutState, observation: Observation) -> RolloutState:
    """Count a request without drawing evidence from it."""
    if not observation.candidate:
        return state
    return msgspec.structs.replace(state, exposed_requests=state.exposed_requests + 1)


def _learn(
    state: RolloutState, observation: Observation, history: UnitHistory | None
) -> tuple[RolloutState, UnitHistory | None]:
    """Let one request count where it may: arms, breaker, guardrail, and the test to go up."""
    candidate, failed = observation.candidate, observation.failed
    first = history is None or history.step < state.step
    current = observation.revision >= state.step_revision
    changes: dict[str, Any] = {
        "breaker": state.breaker.observe(observation.unit, failed, candidate)
    }
    if candidate:
        changes["exposed_requests"] = state.exposed_requests + 1
    if current:
        arm = "step_candidate" if candidate else "step_stable"
        counts: ArmCounts = getattr(state, arm)
        changes[arm] = ArmCounts(counts.requests + 1, counts.failures + failed)
        if first:
            changes["going_up"] = state.going_up.observe(float(failed), candidate)
    errors = history.errors if history else None
    if failed and (share := counted_share(observation.weight, errors)) is not None:
        changes["guardrail"] = state.guardrail.observe(share, candidate)
        errors = count_unit(observation.weight, errors, candidate=candidate)
    counted = state.step if current else (history.step if history else -1)
    return msgspec.structs.replace(state, **changes), UnitHistory(counted, errors)


def _harm(state: RolloutState) -> tuple[str, str, dict[str, Any]] | None:
    """The first guardrail that fires, as (rule, sentence, numbers)."""
    broken = state.breaker.read()
    if broken.tripped:
        return "breaker", broken.explanation, msgspec.to_builtins(broken)
    rules = state.rules
    reading = judge_errors(
        state.guardrail, state.step_candidate, state.step_stable, rules.alpha_down, rules.harm_floor
    )
    if reading.fired:
        return "errors", reading.explanation, msgspec.to_builtins(reading)
    return None


def _roll_back(
    state: RolloutState,
    harm: tuple[str, str, dict[str, Any]],
    last: Observation,
    now: float,
    seen: dict[str, UnitHistory],
) -> Stepped:
    rule, sentence, numbers = harm
    weight = state.weight
    text = (
        f"{state.candidate_name} is rolled back at {_percent(weight)} of {state.model}'s traffic,"
        f" after {state.exposed_requests:,} requests to it; {state.stable_name} takes everything."
        f" {sentence}"
    )
    ended = msgspec.structs.replace(
        state, status=RolloutStatus.ROLLED_BACK, ended=now, reason=f"{rule}: {sentence}"
    )
    numbers = {
        **numbers,
        "rule": rule,
        "deciding_inference": last.inference,
        "deciding_at": last.at,
    }
    return Stepped(
        state=ended, decisions=(_verdict("roll back", ended, text, numbers),), units=seen
    )


def _progress(
    state: RolloutState, now: float, next_revision: int
) -> tuple[RolloutState, tuple[Verdict, ...]]:
    """Go up when the step has shown enough, hold when it has taken too long."""
    if state.status is not RolloutStatus.PROGRESSING:
        return state, ()
    missing = missing_to_go_up(state, now)
    if not missing:
        return _go_up(state, now, next_revision)
    if now - state.step_started < state.rules.step_limit:
        return state, ()
    text = (
        f"{state.candidate_name} is held at {_percent(state.weight)} of {state.model}'s traffic:"
        f" undecided after {_minutes(now - state.step_started)}. Still missing: "
        f"{'; '.join(missing)}. Resume it to wait as long again, or abort it."
    )
    held = msgspec.structs.replace(state, status=RolloutStatus.HELD, reason="; ".join(missing))
    return held, (_verdict("hold", held, text),)


def missing_to_go_up(state: RolloutState, now: float) -> list[str]:
    """What the current step has not shown yet, a phrase each; empty when it may go up."""
    step_rules = state.rules.steps[state.step]
    missing: list[str] = []
    requests, units = state.step_candidate.requests, state.going_up.candidate.units
    if requests < step_rules.requests:
        missing.append(f"{requests:,} of at least {step_rules.requests:,} candidate requests")
    if units < step_rules.units:
        missing.append(f"{units:,} of at least {step_rules.units:,} candidate units")
    if now - state.step_started < step_rules.duration:
        missing.append(
            f"{_minutes(now - state.step_started)} of at least {_minutes(step_rules.duration)}"
        )
    if not state.going_up.passed(state.rules.alpha_up):
        missing.append(
            f"proof that it fails at most {state.rules.margin:.2%} more often than stable"
            f" ({state.going_up.explain(state.rules.alpha_up)})"
        )
    return missing


def _go_up(
    state: RolloutState, now: float, next_revision: int
) -> tuple[RolloutState, tuple[Verdict, ...]]:
    proof = state.going_up.explain(state.rules.alpha_up)
    numbers = {
        "upper_limit": state.going_up.upper_limit(state.rules.alpha_up),
        "margin": state.rules.margin,
    }
    if state.step + 1 < len(state.rules.steps):
        before = state.weight
        raised = _enter(state, state.step + 1, now, next_revision)
        text = (
            f"{state.candidate_name} goes from {_percent(before)} to {_percent(raised.weight)} of"
            f" {state.model}'s traffic. {proof}"
        )
        return raised, (_verdict("go up", raised, text, numbers),)
    done = msgspec.structs.replace(state, status=RolloutStatus.COMPLETED, ended=now)
    text = (
        f"{state.candidate_name} takes all of {state.model}'s traffic and is the stable release"
        f" now; {state.stable_name} is kept warm for an instant way back. {proof}"
    )
    return done, (_verdict("complete", done, text, numbers),)


def give_up_waiting(state: RolloutState, why: str, *, now: float) -> Stepped:
    """End a rollout whose candidate did not become ready; nobody was exposed to it."""
    text = (
        f"{state.candidate_name} never took traffic: after {_minutes(now - state.started)} of at"
        f" most {_minutes(state.rules.ready_limit)} it was not ready{_because(why)}."
        f" {state.stable_name} serves on."
    )
    ended = msgspec.structs.replace(
        state, status=RolloutStatus.ABORTED, ended=now, reason=f"not ready: {why or 'no word'}"
    )
    return Stepped(state=ended, decisions=(_verdict("abort", ended, text),))


def pause(state: RolloutState, *, by: str, reason: str) -> Stepped:
    """Stop going up; the weight stays and the guardrails stay armed."""
    if state.status not in {RolloutStatus.PROGRESSING, RolloutStatus.HELD}:
        return Stepped(state=state)
    paused = msgspec.structs.replace(state, status=RolloutStatus.PAUSED, reason=reason)
    text = (
        f"{state.candidate_name} is paused at {_percent(paused.weight)} by {by}{_because(reason)};"
        " its guardrails stay armed."
    )
    return Stepped(state=paused, decisions=(_verdict("pause", paused, text),))


def resume(state: RolloutState, *, by: str, reason: str, now: float) -> Stepped:
    """Go on after a pause or a hold; the step's time limit starts anew, its evidence is kept."""
    if state.status not in {RolloutStatus.PAUSED, RolloutStatus.HELD}:
        return Stepped(state=state)
    going = msgspec.structs.replace(
        state, status=RolloutStatus.PROGRESSING, step_started=now, reason=""
    )
    text = (
        f"{state.candidate_name} goes on at {_percent(going.weight)}, resumed by {by}"
        f"{_because(reason)}."
    )
    return Stepped(state=going, decisions=(_verdict("resume", going, text),))


def abort(state: RolloutState, *, by: str, reason: str, now: float, kind: str = "abort") -> Stepped:
    """A person sends everything back to stable: `abort`, or `roll back` while it was exposed."""
    if state.status.ended:
        return Stepped(state=state)
    status = RolloutStatus.ROLLED_BACK if kind == "roll back" else RolloutStatus.ABORTED
    ended = msgspec.structs.replace(state, status=status, ended=now, reason=f"{by}: {reason}")
    text = (
        f"{state.candidate_name} is taken out of {state.model}'s traffic by {by}{_because(reason)},"
        f" after {state.exposed_requests:,} requests to it; {state.stable_name} takes everything."
    )
    return Stepped(state=ended, decisions=(_verdict(kind, ended, text),))


def _enter(state: RolloutState, index: int, now: float, revision: int) -> RolloutState:
    """Begin a step: the test to go up is fresh, the guardrail is never reset."""
    return msgspec.structs.replace(
        state,
        status=RolloutStatus.PROGRESSING,
        step=index,
        step_started=now,
        step_revision=revision,
        step_candidate=ArmCounts(),
        step_stable=ArmCounts(),
        going_up=_fresh_test(state.rules, index),
        reason="",
    )


def _fresh_test(rules: RolloutRules, index: int) -> NonInferiority:
    return NonInferiority.start(rules.steps[index].weight / BUCKETS, rules.margin)


def _verdict(
    kind: str, state: RolloutState, text: str, numbers: dict[str, Any] | None = None
) -> Verdict:
    basis = {
        "step": state.step,
        "weight": state.weight,
        "exposed_requests": state.exposed_requests,
        "candidate_requests": state.step_candidate.requests,
        "candidate_failures": state.step_candidate.failures,
        "stable_requests": state.step_stable.requests,
        "stable_failures": state.step_stable.failures,
        "e_value": state.guardrail.e_value,
    }
    return Verdict(kind=kind, text=text, numbers={**basis, **(numbers or {})})


def _percent(weight: int) -> str:
    return f"{weight * 100 / BUCKETS:g}%"


def _minutes(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"


def _because(reason: str) -> str:
    return f" ({reason})" if reason else ""
