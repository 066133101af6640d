"""For all tests: how Hypothesis draws its examples, and a PostgreSQL server."""

import os
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, settings
from postgres import Databases, Missing, PostgresServer

from shipworthy.stores.ledger import migrate

# No deadline: two busy cores make any example slow once. `make test` draws the same examples each
# time, so that a change is never blamed for an example that another one would have met as well;
# `make test-all` and a bare `pytest` look for new ones.
settings.register_profile("dev", deadline=None)
settings.register_profile("ci", deadline=None, derandomize=True, database=None, print_blob=True)
settings.register_profile(
    "long",
    deadline=None,
    max_examples=1_000,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "dev"))


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[PostgresServer]:
    """A server that all tests of this process share; who restarts servers starts another one."""
    try:
        server = PostgresServer()
    except Missing as missing:
        if os.environ.get("CI"):
            pytest.fail(str(missing), pytrace=False)
        pytest.skip(str(missing))
    with server:
        yield server


@pytest.fixture
def databases(postgres_server: PostgresServer) -> Iterator[Databases]:
    """Ledgers on PostgreSQL, for this test alone."""
    with Databases(postgres_server, migrate) as made:
        yield made
