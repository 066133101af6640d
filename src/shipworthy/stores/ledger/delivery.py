"""What runs, what was asked for, and what the gateway is told."""

from __future__ import annotations

import builtins
from collections.abc import Iterable, Mapping
from itertools import islice

import msgspec
from sqlalchemy import (
    Connection,
    Row,
    Select,
    delete,
    insert,
    select,
    update,
)

from shipworthy.domain.lifecycle import Deployment, DeploymentState, Intent, IntentStatus
from shipworthy.domain.plan import Plan
from shipworthy.domain.rollout import RolloutState, UnitHistory
from shipworthy.domain.terms import Term
from shipworthy.stores.ledger import schema
from shipworthy.stores.ledger.rows import all_of, first_of, from_row, replace, to_row, unreadable

_deployments = schema.deployments.c
_intents = schema.intents.c
_rollouts = schema.rollouts.c
_units = schema.rollout_units.c
_plans = schema.plans.c
_cursors = schema.journal_cursors.c

_CHUNK = 1_000
"""Units named in one statement: one by one they take several times as long on a server."""

_packer = msgspec.msgpack.Encoder()
_states = msgspec.msgpack.Decoder(RolloutState)
_histories = msgspec.msgpack.Decoder(UnitHistory)


class SqlDeployments:
    """What runs and what should."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def put(self, deployment: Deployment) -> None:
        """Insert or replace by id."""
        where = _deployments.id == deployment.id
        replace(self._connection, schema.deployments, where, to_row(deployment))

    def get(self, id: str) -> Deployment | None:
        """The deployment of that id."""
        return first_of(self._connection, _all_deployments.where(_deployments.id == id), Deployment)

    def list(self, model: str | None = None) -> builtins.list[Deployment]:
        """Those not yet stopped, oldest first."""
        query = _all_deployments.where(_deployments.state != DeploymentState.STOPPED)
        if model is not None:
            query = query.where(_deployments.model == model)
        return all_of(self._connection, query.order_by(_deployments.sequence), Deployment)


class SqlIntents:
    """Requests to the keeper."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def put(self, intent: Intent) -> None:
        """Insert or replace by id."""
        replace(self._connection, schema.intents, _intents.id == intent.id, to_row(intent))

    def get(self, id: str) -> Intent | None:
        """The intent of that id."""
        return first_of(self._connection, select(schema.intents).where(_intents.id == id), Intent)

    def open(self) -> list[Intent]:
        """Pending and waiting ones, oldest first."""
        query = (
            select(schema.intents)
            .where(_intents.status.in_([IntentStatus.PENDING, IntentStatus.WAITING]))
            .order_by(_intents.sequence)
        )
        return all_of(self._connection, query, Intent)


class SqlRollouts:
    """Rollouts, their state, and the units that their tests have counted."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def save(self, state: RolloutState) -> None:
        """Insert or replace by id."""
        row = {
            "id": state.id,
            "model": state.model,
            "status": state.status.value,
            "started": state.started,
            "ended": state.ended,
            "state": _packer.encode(state),
        }
        replace(self._connection, schema.rollouts, _rollouts.id == state.id, row)

    def get(self, id: str) -> RolloutState | None:
        """The rollout of that id."""
        return self._first(_all_rollouts.where(_rollouts.id == id))

    def active(self) -> list[RolloutState]:
        """Those that have not ended, oldest first."""
        query = _all_rollouts.where(_rollouts.ended.is_(None)).order_by(_rollouts.sequence)
        return [_state(row) for row in self._connection.execute(query)]

    def latest(self, model: str) -> RolloutState | None:
        """The model's newest rollout, ended or not."""
        query = _all_rollouts.where(_rollouts.model == model)
        return self._first(query.order_by(_rollouts.sequence.desc()).limit(1))

    def units(self, id: str) -> dict[str, UnitHistory]:
        """What is remembered of each unit; empty for a rollout that is not there."""
        query = select(_units.unit, _units.history).where(_units.rollout == id)
        try:
            return {
                unit: _histories.decode(history)
                for unit, history in self._connection.execute(query)
            }
        except msgspec.DecodeError as error:
            raise unreadable("rollout's unit", error) from error

    def save_units(self, id: str, changed: Mapping[str, UnitHistory]) -> None:
        """Insert or replace these units; Conflict on commit when the rollout was never saved."""
        if not changed:
            return
        rows = [
            {"rollout": id, "unit": unit, "history": _packer.encode(history)}
            for unit, history in changed.items()
        ]
        self.forget_units(id, changed)  # two passes over all rows are quicker than a look at each
        self._connection.execute(insert(schema.rollout_units), rows)

    def forget_units(self, id: str, units: Iterable[str] | None = None) -> None:
        """Drop these counted units, or all of them."""
        forget = delete(schema.rollout_units).where(_units.rollout == id)
        if units is None:
            self._connection.execute(forget)
            return
        named = iter(units)
        while chunk := list(islice(named, _CHUNK)):
            self._connection.execute(forget.where(_units.unit.in_(chunk)))

    def _first(self, query: Select[bytes]) -> RolloutState | None:
        row = self._connection.execute(query).first()
        return None if row is None else _state(row)


class SqlPlans:
    """What the gateway is told."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def put(self, plan: Plan) -> None:
        """Insert or replace by name."""
        row = {"name": plan.name, "plan": to_row(plan)}
        replace(self._connection, schema.plans, _plans.name == plan.name, row)

    def remove(self, name: str) -> None:
        """Forget the plan of that name, if there is one."""
        self._connection.execute(delete(schema.plans).where(_plans.name == name))

    def all(self) -> dict[str, Plan]:
        """Every plan by name."""
        rows = self._connection.execute(select(_plans.name, _plans.plan).order_by(_plans.name))
        try:
            return {name: msgspec.convert(plan, Plan) for name, plan in rows}
        except msgspec.ValidationError as error:
            raise unreadable("plan", error) from error


class SqlCursors:
    """How far the keeper has read each journal."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def load(self) -> dict[str, int]:
        """Byte offset by segment name."""
        query = select(_cursors.segment, _cursors.offset)
        return {row.segment: row.offset for row in self._connection.execute(query)}

    def save(self, cursors: Mapping[str, int]) -> None:
        """Replace all of them."""
        self._connection.execute(delete(schema.journal_cursors))
        if cursors:
            rows = [{"segment": name, "offset": offset} for name, offset in cursors.items()]
            self._connection.execute(insert(schema.journal_cursors), rows)


class SqlTerms:
    """Who decides now."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def current(self) -> Term:
        """The newest term; number 0 before the first."""
        row = self._connection.execute(select(schema.keeper_term)).mappings().one()
        return from_row(row, Term)

    def put(self, term: Term) -> None:
        """Begin a term or renew its lease."""
        self._connection.execute(update(schema.keeper_term).values(to_row(term)))


_all_deployments = select(schema.deployments)
_all_rollouts: Select[bytes] = select(_rollouts.state)


def _state(row: Row[bytes]) -> RolloutState:
    try:
        return _states.decode(row.state)
    except msgspec.DecodeError as error:
        raise unreadable("rollout", error) from error
