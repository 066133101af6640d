"""Releases, the stages that they hold, and policies."""

from __future__ import annotations

import builtins

from sqlalchemy import ColumnElement, Connection, func, insert, select

from shipworthy.domain.lifecycle import Release, StageEntry, StoredPolicy
from shipworthy.domain.names import ReleaseReference, Stage
from shipworthy.errors import Conflict
from shipworthy.stores.ledger import schema
from shipworthy.stores.ledger.rows import all_of, first_of, to_row

_releases = schema.releases.c
_entries = schema.stage_entries.c
_policies = schema.policies.c


class SqlReleases:
    """Registered releases."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def add(self, release: Release) -> None:
        """Register; the same again changes nothing.

        Raises:
            Conflict: The version has another digest, or the digest another version.

        """
        either = (_releases.version == release.version) | (_releases.digest == release.digest)
        for known in self._where(_releases.model == release.model, either):
            if (known.version, known.digest) == (release.version, release.digest):
                return
            if known.version == release.version:
                raise Conflict(
                    f"{known.name} is registered with other content ({known.digest});"
                    " a release never changes, so register this one under a new version"
                )
            raise Conflict(
                f"this content is registered already, as {known.name}; use that release, or change"
                " what makes this one different"
            )
        self._connection.execute(insert(schema.releases).values(to_row(release)))

    def find(self, reference: ReleaseReference) -> Release | None:
        """By version, digest prefix, or the stage that it holds now; Conflict if ambiguous."""
        if reference.version is not None:
            matches = _releases.version == reference.version
        elif reference.digest is not None:
            matches = _releases.digest.startswith(reference.digest, autoescape=True)
        else:
            newest = (
                select(_entries.release)
                .where(_entries.model == reference.model, _entries.stage == reference.stage)
                .order_by(_entries.sequence.desc())
                .limit(1)
                .scalar_subquery()
            )
            matches = _releases.digest == newest
        found = self._where(_releases.model == reference.model, matches)
        if len(found) > 1:
            names = ", ".join(release.name for release in found[:3])
            raise Conflict(
                f"{reference.model}@{reference.digest} could be {names};"
                " write more of the digest, or the version"
            )
        return found[0] if found else None

    def list(self, model: str | None = None) -> builtins.list[Release]:
        """Newest version first; without a model, by model."""
        found = self._where() if model is None else self._where(_releases.model == model)
        return sorted(found, key=lambda release: release.model)  # as we order, not the database

    def next_version(self, model: str) -> int:
        """One more than the highest so far."""
        highest = select(func.max(_releases.version)).where(_releases.model == model)
        return (self._connection.execute(highest).scalar() or 0) + 1

    def _where(self, *conditions: ColumnElement[bool]) -> builtins.list[Release]:
        query = select(schema.releases).where(*conditions)
        return all_of(self._connection, query.order_by(_releases.version.desc()), Release)


class SqlStages:
    """Which release holds which stage, now and before."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def enter(self, entry: StageEntry) -> None:
        """Let a release take over a stage; Conflict when it is not registered."""
        self._connection.execute(insert(schema.stage_entries).values(to_row(entry)))

    def history(self, model: str, stage: Stage) -> list[StageEntry]:
        """Newest first."""
        query = (
            select(schema.stage_entries)
            .where(_entries.model == model, _entries.stage == stage)
            .order_by(_entries.sequence.desc())
        )
        return all_of(self._connection, query, StageEntry)

    def models(self) -> list[str]:
        """Every model with a registered release, by name."""
        query = select(_releases.model).distinct()
        return sorted(self._connection.execute(query).scalars())


class SqlPolicies:
    """Policies in force and before."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def put(self, policy: StoredPolicy) -> None:
        """Keep a policy; Conflict when the model's policy of that revision says something else."""
        known = self._first(_policies.model == policy.model, _policies.revision == policy.revision)
        if known is None:
            self._connection.execute(insert(schema.policies).values(to_row(policy)))
        elif known.digest != policy.digest:
            raise Conflict(
                f"revision {policy.revision} of the policy for {policy.model} is taken by another"
                " one; apply this one again to give it the next number"
            )

    def current(self, model: str) -> StoredPolicy | None:
        """The one of the highest revision."""
        return self._first(_policies.model == model)

    def by_digest(self, model: str, digest: str) -> StoredPolicy | None:
        """The policy of that content; the latest revision, if it was applied more than once."""
        return self._first(_policies.model == model, _policies.digest == digest)

    def _first(self, *conditions: ColumnElement[bool]) -> StoredPolicy | None:
        query = select(schema.policies).where(*conditions).order_by(_policies.revision.desc())
        return first_of(self._connection, query.limit(1), StoredPolicy)
