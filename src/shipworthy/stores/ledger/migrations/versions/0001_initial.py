"""All tables of the first ledger, the empty audit chain, and what keeps it append-only."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None

_SECONDS: sa.Double[float] = sa.Double()

_GENESIS = """
INSERT INTO audit_head (id, sequence, hash)
VALUES (1, 0, 'sha256:0000000000000000000000000000000000000000000000000000000000000000')
"""
_APPEND_ONLY = """
CREATE TRIGGER audit_entries_{act} BEFORE {act} ON audit_entries
BEGIN SELECT RAISE(ABORT, 'the audit log is append-only'); END
"""
_HEAD_STAYS = """
CREATE TRIGGER audit_head_delete BEFORE DELETE ON audit_head
BEGIN SELECT RAISE(ABORT, 'the audit log has a head'); END
"""
_HEAD_ADVANCES = """
CREATE TRIGGER audit_head_update BEFORE UPDATE ON audit_head
WHEN NEW.sequence <> OLD.sequence + 1
BEGIN SELECT RAISE(ABORT, 'the head of the audit log goes forward by one'); END
"""
_POSTGRESQL = """
CREATE FUNCTION audit_refuses() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN RAISE EXCEPTION USING MESSAGE = TG_ARGV[0], ERRCODE = 'integrity_constraint_violation'; END
$$;
CREATE TRIGGER audit_entries_update BEFORE UPDATE ON audit_entries
EXECUTE FUNCTION audit_refuses('the audit log is append-only');
CREATE TRIGGER audit_entries_delete BEFORE DELETE OR TRUNCATE ON audit_entries
EXECUTE FUNCTION audit_refuses('the audit log is append-only');
CREATE TRIGGER audit_head_delete BEFORE DELETE OR TRUNCATE ON audit_head
EXECUTE FUNCTION audit_refuses('the audit log has a head');
CREATE TRIGGER audit_head_update BEFORE UPDATE ON audit_head
FOR EACH ROW WHEN (NEW.sequence <> OLD.sequence + 1)
EXECUTE FUNCTION audit_refuses('the head of the audit log goes forward by one');
"""


def upgrade() -> None:
    _registry()
    _access()
    _evidence()
    _delivery()
    _audit()


def _sequence(*, autoincrement: bool = True) -> sa.Column[int]:
    kind = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
    return sa.Column(
        "sequence", kind, autoincrement="auto" if autoincrement else False, nullable=False
    )


def _registry() -> None:
    op.create_table(
        "releases",
        sa.Column("model", sa.String(length=63), nullable=False),
        sa.Column("version", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("digest", sa.String(length=71), nullable=False),
        sa.Column("manifest", sa.Text(), nullable=False),
        sa.Column("created_at", _SECONDS, nullable=False),
        sa.Column("created_by", sa.String(), nullable=False),
        sa.PrimaryKeyConstraint("model", "version", name=op.f("pk_releases")),
        sa.UniqueConstraint("model", "digest", name=op.f("uq_releases_model_digest")),
    )
    op.create_table(
        "stage_entries",
        _sequence(),
        sa.Column("model", sa.String(length=63), nullable=False),
        sa.Column("stage", sa.String(length=16), nullable=False),
        sa.Column("release", sa.String(length=71), nullable=False),
        sa.Column("policy", sa.String(length=71), nullable=True),
        sa.Column("at", _SECONDS, nullable=False),
        sa.Column("rollback", sa.Boolean(), nullable=False),
        sa.ForeignKeyConstraint(
            ["model", "release"],
            ["releases.model", "releases.digest"],
            name=op.f("fk_stage_entries_releases"),
        ),
        sa.PrimaryKeyConstraint("sequence", name=op.f("pk_stage_entries")),
    )
    op.create_index(
        op.f("ix_stage_entries_model_stage_sequence"),
        "stage_entries",
        ["model", "stage", "sequence"],
    )
    op.create_table(
        "policies",
        sa.Column("model", sa.String(length=63), nullable=False),
        sa.Column("revision", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("digest", sa.String(length=71), nullable=False),
        sa.Column("document", sa.Text(), nullable=False),
        sa.Column("applied_at", _SECONDS, nullable=False),
        sa.Column("applied_by", sa.String(), nullable=False),
        sa.PrimaryKeyConstraint("model", "revision", name=op.f("pk_policies")),
    )
    op.create_index(op.f("ix_policies_model_digest"), "policies", ["model", "digest"])


def _access() -> None:
    op.create_table(
        "principals",
        sa.Column("id", sa.String(), nullable=False),
        sa.Column("name", sa.String(), nullable=False),
        sa.Column("kind", sa.String(length=16), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_principals")),
        sa.UniqueConstraint("name", name=op.f("uq_principals_name")),
    )
    op.create_table(
        "keys",
        _sequence(),
        sa.Column("id", sa.String(), nullable=False),
        sa.Column("hash", sa.String(), nullable=False),
        sa.Column("role", sa.String(length=16), nullable=False),
        sa.Column("models", sa.Text(), nullable=False),
        sa.Column("expires", _SECONDS, nullable=True),
        sa.Column("principal", sa.String(), nullable=False),
        sa.Column("created_at", _SECONDS, nullable=False),
        sa.Column("revoked_at", _SECONDS, nullable=True),
        sa.PrimaryKeyConstraint("sequence", name=op.f("pk_keys")),
        sa.UniqueConstraint("id", name=op.f("uq_keys_id")),
        sa.UniqueConstraint("hash", name=op.f("uq_keys_hash")),
    )


def _evidence() -> None:
    op.create_table(
        "findings",
        _sequence(),
        sa.Column("release", sa.String(length=71), nullable=False),
        sa.Column("stage", sa.String(length=16), nullable=False),
        sa.Column("check", sa.String(), nullable=False),
        sa.Column("verdict", sa.String(length=16), nullable=False),
        sa.Column("observed", sa.Text(), nullable=False),
        sa.Column("threshold", sa.Text(), nullable=False),
        sa.Column("at", _SECONDS, nullable=False),
        sa.Column("expires", _SECONDS, nullable=True),
        sa.Column("evidence", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("sequence", name=op.f("pk_findings")),
    )
    op.create_index(
        op.f("ix_findings_release_stage_check_sequence"),
        "findings",
        ["release", "stage", "check", "sequence"],
    )
    op.create_table(
        "approvals",
        _sequence(),
        sa.Column("release", sa.String(length=71), nullable=False),
        sa.Column("stage", sa.String(length=16), nullable=False),
        sa.Column("by", sa.String(), nullable=False),
        sa.Column("at", _SECONDS, nullable=False),
        sa.Column("reason", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("sequence", name=op.f("pk_approvals")),
    )
    op.create_index(op.f("ix_approvals_release_stage"), "approvals", ["release", "stage"])
    op.create_table(
        "waivers",
        _sequence(),
        sa.Column("what", sa.String(), nullable=False),
        sa.Column("by", sa.String(), nullable=False),
        sa.Column("at", _SECONDS, nullable=False),
        sa.Column("reason", sa.Text(), nullable=False),
        sa.Column("model", sa.String(length=63), nullable=True),
        sa.Column("until", _SECONDS, nullable=True),
        sa.PrimaryKeyConstraint("sequence", name=op.f("pk_waivers")),
    )
    op.create_table(
        "decisions",
        _sequence(),
        sa.Column("id", sa.String(), nullable=False),
        sa.Column("at", _SECONDS, nullable=False),
        sa.Column("model", sa.String(length=63), nullable=False),
        sa.Column("kind", sa.String(), nullable=False),
        sa.Column("text", sa.Text(), nullable=False),
        sa.Column("rollout", sa.String(), nullable=True),
        sa.Column("numbers", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("sequence", name=op.f("pk_decisions")),
        sa.UniqueConstraint("id", name=op.f("uq_decisions_id")),
    )
    op.create_index(op.f("ix_decisions_model_sequence"), "decisions", ["model", "sequence"])


def _delivery() -> None:
    op.create_table(
        "deployments",
        _sequence(),
        sa.Column("id", sa.String(), nullable=False),
        sa.Column("model", sa.String(length=63), nullable=False),
        sa.Column("release", sa.String(length=71), nullable=False),
        sa.Column("stage", sa.String(length=16), nullable=False),
        sa.Column("wanted", sa.Boolean(), nullable=False),
        sa.Column("state", sa.String(length=16), nullable=False),
        sa.Column("since", _SECONDS, nullable=False),
        sa.Column("endpoints", sa.Text(), nullable=False),
        sa.Column("message", sa.Text(), nullable=False),
        sa.Column("retire_at", _SECONDS, nullable=True),
        sa.PrimaryKeyConstraint("sequence", name=op.f("pk_deployments")),
        sa.UniqueConstraint("id", name=op.f("uq_deployments_id")),
    )
    op.create_index(op.f("ix_deployments_state"), "deployments", ["state"])
    op.create_table(
        "intents",
        _sequence(),
        sa.Column("id", sa.String(), nullable=False),
        sa.Column("at", _SECONDS, nullable=False),
        sa.Column("actor", sa.String(), nullable=False),
        sa.Column("kind", sa.String(length=16), nullable=False),
        sa.Column("model", sa.String(length=63), nullable=False),
        sa.Column("release", sa.String(), nullable=True),
        sa.Column("stage", sa.String(length=16), nullable=True),
        sa.Column("reason", sa.Text(), nullable=False),
        sa.Column("status", sa.String(length=16), nullable=False),
        sa.Column("answer", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("sequence", name=op.f("pk_intents")),
        sa.UniqueConstraint("id", name=op.f("uq_intents_id")),
    )
    op.create_index(op.f("ix_intents_status"), "intents", ["status"])
    op.create_table(
        "rollouts",
        _sequence(),
        sa.Column("id", sa.String(), nullable=False),
        sa.Column("model", sa.String(length=63), nullable=False),
        sa.Column("status", sa.String(length=16), nullable=False),
        sa.Column("started", _SECONDS, nullable=False),
        sa.Column("ended", _SECONDS, nullable=True),
        sa.Column("state", sa.LargeBinary(), nullable=False),
        sa.PrimaryKeyConstraint("sequence", name=op.f("pk_rollouts")),
        sa.UniqueConstraint("id", name=op.f("uq_rollouts_id")),
    )
    op.create_index(op.f("ix_rollouts_ended"), "rollouts", ["ended"])
    op.create_index(op.f("ix_rollouts_model_sequence"), "rollouts", ["model", "sequence"])
    op.create_table(
        "rollout_units",
        sa.Column("rollout", sa.String(), nullable=False),
        sa.Column("unit", sa.String(), nullable=False),
        sa.Column("history", sa.LargeBinary(), nullable=False),
        sa.ForeignKeyConstraint(
            ["rollout"],
            ["rollouts.id"],
            name=op.f("fk_rollout_units_rollouts"),
            initially="DEFERRED",
            deferrable=True,
        ),
        sa.PrimaryKeyConstraint("rollout", "unit", name=op.f("pk_rollout_units")),
        sqlite_with_rowid=False,
    )
    op.create_table(
        "plans",
        sa.Column("name", sa.String(), nullable=False),
        sa.Column("plan", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("name", name=op.f("pk_plans")),
    )
    op.create_table(
        "traffic_counts",
        sa.Column("plan", sa.String(), nullable=False),
        sa.Column("minute", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("release", sa.String(), nullable=False),
        sa.Column("assigned", sa.BigInteger(), nullable=False),
        sa.Column("failed", sa.BigInteger(), nullable=False),
        sa.Column("served", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("plan", "minute", "release", name=op.f("pk_traffic_counts")),
    )
    op.create_table(
        "journal_cursors",
        sa.Column("segment", sa.String(), nullable=False),
        sa.Column("offset", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("segment", name=op.f("pk_journal_cursors")),
    )
    op.create_table(
        "keeper_term",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("number", sa.BigInteger(), nullable=False),
        sa.CheckConstraint("id = 1", name=op.f("ck_keeper_term_one_row")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_keeper_term")),
    )
    op.execute("INSERT INTO keeper_term (id, number) VALUES (1, 0)")


def _audit() -> None:
    op.create_table(
        "audit_entries",
        _sequence(autoincrement=False),
        sa.Column("at", _SECONDS, nullable=False),
        sa.Column("actor", sa.String(), nullable=False),
        sa.Column("act", sa.String(), nullable=False),
        sa.Column("subject", sa.String(), nullable=False),
        sa.Column("detail", sa.Text(), nullable=False),
        sa.Column("previous", sa.String(length=71), nullable=False),
        sa.Column("hash", sa.String(length=71), nullable=False),
        sa.PrimaryKeyConstraint("sequence", name=op.f("pk_audit_entries")),
    )
    op.create_table(
        "audit_head",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("sequence", sa.BigInteger(), nullable=False),
        sa.Column("hash", sa.String(length=71), nullable=False),
        sa.CheckConstraint("id = 1", name=op.f("ck_audit_head_one_row")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_audit_head")),
    )
    op.execute(_GENESIS)
    if op.get_bind().dialect.name == "sqlite":
        op.execute(_APPEND_ONLY.format(act="UPDATE"))
        op.execute(_APPEND_ONLY.format(act="DELETE"))
        op.execute(_HEAD_STAYS)
        op.execute(_HEAD_ADVANCES)
    else:
        op.execute(_POSTGRESQL)
