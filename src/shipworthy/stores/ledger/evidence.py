"""What was found, approved, waived, decided and forgotten."""

from __future__ import annotations

import builtins
from collections.abc import Iterable

from sqlalchemy import Connection, func, insert, select

from shipworthy.domain.erasure import Tombstone
from shipworthy.domain.findings import Finding
from shipworthy.domain.lifecycle import Approval, Decision, StageFinding, Waiver
from shipworthy.domain.names import Stage
from shipworthy.stores.ledger import schema
from shipworthy.stores.ledger.rows import all_of, from_row, to_row

_findings = schema.findings.c
_approvals = schema.approvals.c
_waivers = schema.waivers.c
_decisions = schema.decisions.c
_tombstones = schema.tombstones.c


class SqlEvidence:
    """Findings, approvals and waivers; all are only ever added."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def add_finding(self, finding: StageFinding) -> None:
        """Keep what a check observed."""
        fields = to_row(finding)
        self._connection.execute(insert(schema.findings).values(fields.pop("finding") | fields))

    def findings(self, release: str) -> list[StageFinding]:
        """The newest of each check and stage: the one that was added last."""
        newest = (
            select(func.max(_findings.sequence))
            .where(_findings.release == release)
            .group_by(_findings.stage, _findings.check)
        )
        query = (
            select(schema.findings)
            .where(_findings.sequence.in_(newest))
            .order_by(_findings.sequence)
        )
        return [
            StageFinding(
                release=row["release"], stage=Stage(row["stage"]), finding=from_row(row, Finding)
            )
            for row in self._connection.execute(query).mappings()
        ]

    def add_approval(self, approval: Approval) -> None:
        """Keep a person's yes."""
        self._connection.execute(insert(schema.approvals).values(to_row(approval)))

    def approvals(self, release: str, stage: Stage) -> list[Approval]:
        """Oldest first."""
        query = (
            select(schema.approvals)
            .where(_approvals.release == release, _approvals.stage == stage)
            .order_by(_approvals.sequence)
        )
        return all_of(self._connection, query, Approval)

    def add_waiver(self, waiver: Waiver) -> None:
        """Keep who set a rule aside."""
        self._connection.execute(insert(schema.waivers).values(to_row(waiver)))

    def waivers(self) -> list[Waiver]:
        """Oldest first, for every model, the expired ones too."""
        query = select(schema.waivers).order_by(_waivers.sequence)
        return all_of(self._connection, query, Waiver)


class SqlDecisions:
    """What was decided and why; only ever added to."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def add(self, decision: Decision) -> None:
        """Keep a decision; Conflict when its id is known."""
        self._connection.execute(insert(schema.decisions).values(to_row(decision)))

    def list(self, model: str | None = None, limit: int = 20) -> builtins.list[Decision]:
        """Newest first."""
        query = select(schema.decisions).order_by(_decisions.sequence.desc()).limit(limit)
        if model is not None:
            query = query.where(_decisions.model == model)
        return all_of(self._connection, query, Decision)

    def after(self, sequence: int, limit: int) -> Iterable[tuple[int, Decision]]:
        """Up to `limit` of those with a higher sequence, oldest first, each with its sequence."""
        query = (
            select(schema.decisions)
            .where(_decisions.sequence > sequence)
            .order_by(_decisions.sequence)
            .limit(limit)
        )
        rows = self._connection.execute(query).mappings()
        return [(row["sequence"], from_row(row, Decision)) for row in rows]


class SqlTombstones:
    """Units that were forgotten; only ever added to."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def add(self, tombstone: Tombstone) -> int:
        """Keep it; its sequence."""
        fields = to_row(tombstone)
        del fields["sequence"]
        statement = insert(schema.tombstones).values(fields).returning(_tombstones.sequence)
        return self._connection.execute(statement).scalar_one()

    def after(self, sequence: int) -> builtins.list[Tombstone]:
        """Those with a higher sequence, oldest first."""
        query = (
            select(schema.tombstones)
            .where(_tombstones.sequence > sequence)
            .order_by(_tombstones.sequence)
        )
        return all_of(self._connection, query, Tombstone)
