"""The keeper: journal tails in, one ledger transaction, a snapshot out; under a second in all.

Cursors, test state and decisions are committed together, so that a keeper killed at any moment goes
on with no request counted twice or left out. The snapshot is written after the commit; one lost in
between is written again by the next turn.

Any number of keepers may run: one is in office, for a term with a number and a lease, the others
stand by and look whether its lease has run out. The number is read again in every transaction that
decides, and names the published snapshot. So it is the number that protects, whatever a clock says
and however long a keeper was paused; the lease only says when to take over.
"""

from __future__ import annotations

import logging
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
from shipworthy.domain.terms import (
    Term,
    following,
    given_up,
    held_by_another,
    renewal_is_due,
    renewed,
)
from shipworthy.ports import Clock, JournalReader, Ledger, Transaction
from shipworthy.rollout.intents import close, handle_intents
from shipworthy.rollout.plans import refresh_plans
from shipworthy.rollout.turn import NewId, Turn

log = logging.getLogger(__name__)

BATCH = 5_000
"""Most records taken into one transaction."""
KEEP_TRAFFIC_MINUTES = 7 * 24 * 60
LEASE_SECONDS = 3.0
"""How long a keeper that died keeps its office.

Renewed after a third, so that a turn may take two seconds on a busy machine or slow disk before a
standby takes over from a keeper that lives. Even that would cost no more than another term.
"""
_LOOKS = 0.25  # seconds between a standby's looks at the lease
_LEASE_RENEWALS = 3  # a plan's lease is renewed this many times before it would run out


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


class Snapshots(Protocol):
    """Where plans are published for the gateway, by the number of the term."""

    def publish(self, fence: int, content: bytes) -> None:
        """Replace that term's snapshot. Raises Unavailable when it can't be written."""
        ...

    def newest(self) -> int:
        """The highest fence that was ever published; 0 before the first."""
        ...


class _Superseded(Exception):  # a state of affairs, and no fault
    """Another keeper has begun a later term."""


@dataclass(slots=True)
class Keeper:
    """Decides, from journal tails. Call `tick` often; it does little when nothing happened.

    `holder` is a name that no other keeper has. `max_stale` is passed on to the gateway.
    """

    holder: str
    ledger: Ledger
    journal: JournalReader
    gather: Callable[[Iterable[Record]], Gathered]
    snapshots: Snapshots
    clock: Clock
    new_id: NewId
    checklist: Checklist
    max_stale: float | None = None
    _cursors: dict[str, int] | None = None  # None: not in office
    _fence: int = 0
    _keeper: str = ""
    _units: dict[str, dict[str, UnitHistory]] = field(
        default_factory=dict[str, dict[str, UnitHistory]]
    )
    _published: tuple[dict[str, Plan], dict[str, Key]] | None = None
    _published_at: float = 0.0
    _looked: float = -_LOOKS

    @property
    def in_office(self) -> bool:
        """Whether this keeper decides, as far as it knows; else it stands by."""
        return self._cursors is not None

    def tick(self) -> int:
        """Take one turn; returns how many records were taken in.

        Raises LedgerUnavailable when the ledger can't be reached: nothing is lost then, the same
        records are read again by the next tick. Raises Unavailable when the snapshot can't be
        written: the next tick tries again.
        """
        cursors = self._cursors
        if cursors is None:
            cursors = self._take_office()
        if cursors is None:
            return 0
        try:
            plans, keys, count, now = self._turn(cursors)
        except _Superseded as later:
            self._stand_by()
            log.warning("%s; this keeper stands by", later)
            return 0
        except BaseException:
            # What memory holds may be ahead of what was committed: start again from the ledger.
            self._stand_by()
            raise
        self._publish(plans, keys, now)
        return count

    def retire(self) -> None:
        """Take in all that is left and give the office up, for a standby to take it at once."""
        self._looked = -_LOOKS
        while self.tick() >= BATCH:
            pass
        if not self.in_office:
            return
        with self.ledger.write() as tx:
            current = tx.terms.current()
            if self._is_mine(current):
                tx.terms.put(given_up(current))
        self._stand_by()

    def _turn(self, before: dict[str, int]) -> tuple[dict[str, Plan], dict[str, Key], int, float]:
        """Take in records, decide and commit; gives what is to be published, how many, and when."""
        records, cursors = self.journal.read(before, BATCH)
        gathered = self.gather(records)
        with self.ledger.write() as tx:
            now = self.clock()  # the lock may have been waited for
            self._hold_office(tx, now)
            turn = Turn(tx, now, self._fence, self._keeper, self.new_id, self.checklist)
            tx.traffic.add(gathered.traffic)
            handle_intents(turn)
            self._advance(turn, gathered.observations)
            _retire(turn)
            plans = refresh_plans(turn)
            keys = {
                stored.key.id: stored.key for stored in tx.keys.list() if stored.revoked_at is None
            }
            if cursors != before:
                tx.cursors.save(cursors)
        self._cursors = cursors
        return plans, keys, len(records), now

    # --- office -------------------------------------------------------------------------------

    def _take_office(self) -> dict[str, int] | None:
        """Begin the following term, with the cursors that it begins at; None to stand by."""
        now = self.clock()
        if self._looked <= now < self._looked + _LOOKS:
            return None
        with self.ledger.read() as tx:  # a standby keeps no writer waiting
            free = self._may_begin(tx.terms.current(), now)
        if not free:
            self._looked = now
            return None
        newest = self.snapshots.newest()
        with self.ledger.write() as tx:
            now = self.clock()
            current = tx.terms.current()
            if not self._may_begin(current, now):
                return None
            # Where an older ledger was put back, the gateway obeys a later term than it knows of.
            latest = msgspec.structs.replace(current, number=max(current.number, newest))
            term = following(latest, self.holder, now, LEASE_SECONDS)
            tx.terms.put(term)
            keeper = tx.principals.ensure("keeper", "service").id
            tx.audit.append(at=now, actor=keeper, act="begin term", subject=str(term.number))
            tx.traffic.forget_before(int(now // 60) - KEEP_TRAFFIC_MINUTES)
            cursors = tx.cursors.load()
        self._fence, self._keeper, self._cursors = term.number, keeper, cursors
        self._published = None
        log.info("term %d begins", term.number)
        return cursors

    def _hold_office(self, tx: Transaction, now: float) -> None:
        """Renew the lease when that is due; _Superseded when a later term has begun.

        A lease that ran out while nobody took over is still ours.
        """
        current = tx.terms.current()
        if not self._is_mine(current):
            message = f"another keeper began term {current.number} after term {self._fence}"
            raise _Superseded(message)
        if renewal_is_due(current, now, LEASE_SECONDS):
            tx.terms.put(renewed(current, now, LEASE_SECONDS))

    def _may_begin(self, current: Term, now: float) -> bool:
        return not held_by_another(current, self.holder, now, LEASE_SECONDS)

    def _is_mine(self, current: Term) -> bool:
        return (current.number, current.holder) == (self._fence, self.holder)

    def _stand_by(self) -> None:
        self._cursors = None
        self._units.clear()

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
        self.snapshots.publish(
            self._fence,
            encode_snapshot(
                Snapshot(
                    written=now,
                    plans=leased,
                    keys=keys,
                    max_stale=self.max_stale,
                    fence=self._fence,
                )
            ),
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
