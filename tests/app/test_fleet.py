"""The fleet: what it tells the ledger of replicas."""

from __future__ import annotations

import asyncio
from collections.abc import Generator, Iterable
from dataclasses import dataclass
from pathlib import Path

import pytest
from postgres import Databases

from shipworthy.app.fleet import Fleet
from shipworthy.app.place import check_here, keeper_name
from shipworthy.domain.lifecycle import Deployment, DeploymentState, Release
from shipworthy.domain.names import Stage
from shipworthy.domain.terms import Term
from shipworthy.errors import Conflict
from shipworthy.ports import RunningReplica
from shipworthy.settings import Project, Settings
from shipworthy.stores.ledger import SqlLedger, migrate, open_ledger

DIGEST = "sha256:" + "a" * 64


@dataclass
class Replica:
    """One that does not answer, for a reason; until it is given an address."""

    problem: str | None
    url: str | None = None
    doing: str = ""

    async def stop(self, grace: float) -> None:
        pass

    def last_lines(self, count: int = 20) -> list[str]:
        return [self.problem or ""][:count]


@dataclass
class Runtime:
    problem: str | None

    def __post_init__(self) -> None:
        self.replica = Replica(self.problem)

    async def start(self, release: Release, deployment: Deployment) -> Iterable[RunningReplica]:
        return [self.replica]


@pytest.fixture(params=["sqlite", "postgresql"])
def ledger(request: pytest.FixtureRequest, tmp_path: Path) -> Generator[SqlLedger]:
    """One with a deployment that is wanted."""
    if request.param == "sqlite":
        url = f"sqlite:///{tmp_path / 'ledger.db'}"
        migrate(url)
    else:
        databases: Databases = request.getfixturevalue("databases")
        url = databases.make(migrated=True)
    release = Release(
        model="m", version=1, digest=DIGEST, manifest={}, created_at=1.0, created_by="p"
    )
    deployment = Deployment(
        id="d",
        model="m",
        release=DIGEST,
        stage=Stage.STAGING,
        wanted=True,
        state=DeploymentState.STARTING,
        since=1.0,
    )
    with open_ledger(url) as opened:
        with opened.write() as tx:
            tx.releases.add(release)
            tx.deployments.put(deployment)
        yield opened


def test_where_another_folder_s_keepers_decide_nothing_is_started_or_told(
    ledger: SqlLedger, tmp_path: Path
) -> None:
    here, there = (Project(tmp_path / name, Settings()) for name in ("here", "there"))

    def check(term: Term) -> None:
        check_here(here, term, now=100.0)

    fleet = Fleet(ledger, Runtime("no"), check)
    with ledger.write() as tx:
        tx.terms.put(Term(number=7, holder=keeper_name(there), until=102.0))
    with pytest.raises(Conflict, match=r"the keepers of .*/there decide .*term 7.*; stop"):
        asyncio.run(fleet.reconcile())
    with ledger.write() as tx:
        tx.terms.put(Term(number=7, holder=keeper_name(there), until=99.0))
    asyncio.run(told(ledger, fleet, DeploymentState.FAILED))


async def told(ledger: SqlLedger, fleet: Fleet, state: DeploymentState) -> Deployment:
    while True:
        await fleet.reconcile()
        with ledger.read() as tx:
            deployment = tx.deployments.get("d")
        assert deployment is not None
        if deployment.state is state:
            return deployment


def test_last_words_that_no_database_takes_are_told_without_what_it_refuses(
    ledger: SqlLedger,
) -> None:
    fleet = Fleet(ledger, Runtime("it said: \0\x1b[31mno \ud800\n\u00fcber"), bool)
    deployment = asyncio.run(told(ledger, fleet, DeploymentState.FAILED))
    assert deployment.message == "it said: \ufffd\ufffd[31mno \ufffd\n\u00fcber"


def test_one_that_has_answered_and_does_not_for_now_is_told_from_one_that_never_has(
    ledger: SqlLedger,
) -> None:
    async def life() -> None:
        runtime = Runtime(None)
        fleet = Fleet(ledger, runtime, bool)
        await told(ledger, fleet, DeploymentState.STARTING)
        runtime.replica.url = "http://127.0.0.1:9"
        await told(ledger, fleet, DeploymentState.READY)
        runtime.replica.url = None
        assert (await told(ledger, fleet, DeploymentState.RESTARTING)).endpoints == ()
        await told(ledger, Fleet(ledger, Runtime(None), bool), DeploymentState.STARTING)

    asyncio.run(life())
