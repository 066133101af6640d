"""A keeper's term has a holder and a lease; units can be forgotten."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"

_SECONDS: sa.Double[float] = sa.Double()


def upgrade() -> None:
    _terms()
    _tombstones()


def _terms() -> None:
    # Made anew around its one number: columns that are added later would need defaults for ever.
    number = op.get_bind().execute(sa.text("SELECT number FROM keeper_term")).scalar_one()
    op.drop_table("keeper_term")
    table = op.create_table(
        "keeper_term",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("number", sa.BigInteger(), nullable=False),
        sa.Column("holder", sa.String(), nullable=False),
        sa.Column("until", _SECONDS, nullable=False),
        sa.CheckConstraint("id = 1", name=op.f("ck_keeper_term_one_row")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_keeper_term")),
    )
    op.bulk_insert(table, [{"id": 1, "number": number, "holder": "", "until": 0.0}])


def _tombstones() -> None:
    counter = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
    op.create_table(
        "tombstones",
        sa.Column("sequence", counter, autoincrement="auto", nullable=False),
        sa.Column("unit", sa.String(), nullable=False),
        sa.Column("at", _SECONDS, nullable=False),
        sa.Column("by", sa.String(), nullable=False),
        sa.PrimaryKeyConstraint("sequence", name=op.f("pk_tombstones")),
    )
