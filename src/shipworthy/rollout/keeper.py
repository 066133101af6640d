"""The keeper: journal tails in, one ledger transaction, a snapshot out; under a second in all.

Cursors, test state and decisions are committed together, so that a keeper killed at any moment goes
on with no request counted twice or left out. The snapshot is written after the commit; one lost in
between is written again by the next turn.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

import msgspec

from shipworthy.domain import rollout as machine
from shipworthy.domain.checklist import Checklist
from shipworthy.domain.lifecycle import DeploymentState, TrafficCount
from shipworthy.domain.names import Stage
from shipworthy.domain.plan import Key, Plan, Snapshot, encode_snapshot
from shipworthy.domain.records import Record
from shipworthy.domain.rollout import Observation, RolloutState, RolloutStatus, UnitHistory
from shipworthy.domain.terms import Term
from shipworthy.ports import Clock, JournalReader, Ledger
from shipworthy.rollout.intents import close, handle_intents
from shipworthy.rollout.plans import refresh_plans
from shipworthy.rollout.turn import NewId, Turn

BATCH = 5_000
"""Most records taken into one transaction."""
KEEP_TRAFFIC_MINUTES = 7 * 24 * 60
_LEASE_RENEWALS = 3  # a lease is renewed this many times before it would run out


DISCARD_SECONDS = 30.0


class Superseded(Exception):  # a state of affairs, and no fault
    """A keeper with a later term decides now."""


class Gathered(Protocol):
    """What a batch of records says; `watch` makes it."""

    @property
    def observations(self) -> dict[str, list[Observation]]:
        """By rollout id, in order of arrival."""
        ...

    @property
    def traffic(self) -> list[TrafficCount]:
        """To be added to what is counted."""
        ...


@dataclass(slots=True)
class Keeper:
    """Decides, from journal tails. Call `tick` often; it does little when nothing happened.

    `publish` replaces the gateway's snapshot file. `lease` is in seconds; `max_stale` is passed on
    to the gateway.
    """

    ledger: Ledger
    journal: JournalReader
    gather: Callable[[Iterable[Record]], Gathered]
    publish: Callable[[bytes], None]
    clock: Clock
    new_id: NewId
    checklist: Checklist
    max_stale: float | None = None
    _cursors: dict[str, int] | None = None
    _fence: int = 0
    _keeper: str = ""
    _units: dict[str, dict[str, UnitHistory]] = field(
        default_factory=dict[str, dict[str, UnitHistory]]
    )
    _published: tuple[dict[str, Plan], dict[str, Key]] | None = None
    _published_at: float = 0.0
    _discarded_at: float = 0.0

    def tick(self) -> int:
        """Take one turn; returns how many records were taken in.

        Raises LedgerUnavailable when the ledger can't be reached: nothing is lost then, the same
        records are read again by the next tick. Raises Unavailable when the snapshot can't be
        written: the next tick tries again.
        """
        now = self.clock()
        try:
            plans, keys, count = self._turn(now)
        except BaseException:
            # What memory holds may be ahead of what was committed: start again from the ledger.
            self._cursors = None
            self._units.clear()
            raise
        self._publish(plans, keys, now)
        return count

    def _turn(self, now: float) -> tuple[dict[str, Plan], dict[str, Key], int]:
        """Take in records, decide and commit; gives what is to be published, and how many."""
        if self._cursors is None:
            self._begin_term(now)
        records, cursors = self.journal.read(self._cursors or {}, BATCH)
        gathered = self.gather(records)
        with self.ledger.write() as tx:
            if tx.terms.current().number != self._fence:
                message = f"another keeper took over from term {self._fence}; this one stops"
                raise Superseded(message)
            turn = Turn(tx, now, self._fence, self._keeper, self.new_id, self.checklist)
            tx.traffic.add(gathered.traffic)
            handle_intents(turn)
            self._advance(turn, gathered.observations)
            _retire(turn)
            plans = refresh_plans(turn)
            keys = {
                stored.key.id: stored.key for stored in tx.keys.list() if stored.revoked_at is None
            }
            if cursors != self._cursors:
                tx.cursors.save(cursors)
        begun = cursors.keys() != (self._cursors or {}).keys()
        self._cursors = cursors
        self._tidy_journals(cursors, now, begun=begun)
        return plans, keys, len(records)

    def _tidy_journals(self, cursors: Mapping[str, int], now: float, *, begun: bool) -> None:
        """Delete what is read now and then, and when a segment was begun: its worker needs room."""
        if begun or not self._discarded_at <= now < self._discarded_at + DISCARD_SECONDS:
            self.journal.discard(cursors)
            self._discarded_at = now

    def _begin_term(self, now: float) -> None:
        with self.ledger.write() as tx:
            self._fence = tx.terms.current().number + 1
            tx.terms.put(Term(number=self._fence))
            self._keeper = tx.principals.ensure("keeper", "service").id
            tx.audit.append(at=now, actor=self._keeper, act="begin term", subject=str(self._fence))
            tx.traffic.forget_before(int(now // 60) - KEEP_TRAFFIC_MINUTES)
            self._cursors = tx.cursors.load()

    # --- rollouts -----------------------------------------------------------------------------

    def _advance(self, turn: Turn, observations: Mapping[str, list[Observation]]) -> None:
        plans = turn.tx.plans.all()
        active = turn.tx.rollouts.active()
        for state in active:
            if state.status is RolloutStatus.PREPARING:
                self._prepare(turn, state, _next_revision(plans, state.model))
            else:
                self._step(turn, state, observations.get(state.id, []), plans)
        for ended in self._units.keys() - {state.id for state in active}:
            del self._units[ended]

    def _prepare(self, turn: Turn, state: RolloutState, next_revision: int) -> None:
        """Expose the candidate once it answers, or give up on it."""
        deployment = turn.deployment(state.model, Stage.PRODUCTION, state.candidate)
        if deployment is not None and deployment.state is DeploymentState.READY:
            out = machine.expose(state, revision=next_revision, now=turn.now)
        elif deployment is None or deployment.state is DeploymentState.FAILED:
            why = deployment.message if deployment else "its deployment was stopped"
            out = machine.give_up_waiting(state, why, now=turn.now)
        elif turn.now - state.started > state.rules.ready_limit:
            out = machine.give_up_waiting(state, deployment.message, now=turn.now)
        else:
            return
        self._keep(turn, state, out)

    def _step(
        self,
        turn: Turn,
        state: RolloutState,
        observations: list[Observation],
        plans: Mapping[str, Plan],
    ) -> None:
        units = self._units.get(state.id)
        if units is None:
            units = self._units[state.id] = turn.tx.rollouts.units(state.id)
        out = machine.step(
            state,
            observations,
            units,
            now=turn.now,
            next_revision=_next_revision(plans, state.model),
        )
        if out.state != state:
            self._keep(turn, state, out)

    def _keep(self, turn: Turn, before: RolloutState, out: machine.Stepped) -> None:
        state = out.state
        turn.tx.rollouts.save(state)
        turn.record(state.model, state.id, out.decisions)
        if state.status.ended:
            close(turn, state)
            return
        if out.units:
            turn.tx.rollouts.save_units(state.id, out.units)
            self._units[state.id].update(out.units)
        if state.thinning > before.thinning:
            self._forget_uncounted(turn, state)

    def _forget_uncounted(self, turn: Turn, state: RolloutState) -> None:
        units = self._units[state.id]
        gone = [unit for unit in units if not machine.counted(unit, state.thinning)]
        for unit in gone:
            del units[unit]
        turn.tx.rollouts.forget_units(state.id, gone)

    # --- snapshot -----------------------------------------------------------------------------

    def _publish(self, plans: dict[str, Plan], keys: dict[str, Key], now: float) -> None:
        """Write the snapshot when it changed, and often enough that no lease runs out."""
        due = self._published_at + self._shortest_lease(plans) / _LEASE_RENEWALS
        early = self._published_at <= now < due  # a clock that was set back renews at once
        if (plans, keys) == self._published and early:
            return
        leased = {
            name: plan
            if plan.candidate is None
            else msgspec.structs.replace(plan, lease=now + plan.lease_seconds)
            for name, plan in plans.items()
        }
        self.publish(
            encode_snapshot(
                Snapshot(
                    written=now,
                    plans=leased,
                    keys=keys,
                    max_stale=self.max_stale,
                    fence=self._fence,
                )
            )
        )
        self._published, self._published_at = (plans, keys), now

    @staticmethod
    def _shortest_lease(plans: Mapping[str, Plan]) -> float:
        return min((plan.lease_seconds for plan in plans.values()), default=15.0)


def _retire(turn: Turn) -> None:
    """Stop what has been kept up long enough."""
    for deployment in turn.tx.deployments.list():
        if deployment.wanted and deployment.retire_at is not None:
            if turn.now < deployment.retire_at:
                continue
            turn.tx.deployments.put(msgspec.structs.replace(deployment, wanted=False))


def _next_revision(plans: Mapping[str, Plan], model: str) -> int:
    plan = plans.get(model)
    return plan.revision + 1 if plan else 1
