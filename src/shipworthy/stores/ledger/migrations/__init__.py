"""Alembic migrations of the ledger, shipped with the package; `migrate` runs them."""
