"""What was found, approved, waived and decided."""

from __future__ import annotations

import builtins

from sqlalchemy import Connection, func, insert, select

from shipworthy.domain.findings import Finding
from shipworthy.domain.lifecycle import Approval, Decision, StageFinding, Waiver
from shipworthy.domain.names import Stage
from shipworthy.stores.ledger import schema
from shipworthy.stores.ledger.rows import all_of, from_row, to_row

_findings = schema.findings.c
_approvals = schema.approvals.c
_waivers = schema.waivers.c
_decisions = schema.decisions.c


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
