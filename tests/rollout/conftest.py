"""A keeper over a real ledger and real journals, with the clock in our hands."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

import msgspec
import pytest

from shipworthy.domain.findings import Finding, Verdict
from shipworthy.domain.lifecycle import (
    Deployment,
    DeploymentState,
    Intent,
    IntentKind,
    Release,
    StageFinding,
)
from shipworthy.domain.manifest import Manifest
from shipworthy.domain.names import Stage
from shipworthy.domain.plan import Plan, Snapshot, decode_snapshot
from shipworthy.domain.policy import Policy
from shipworthy.domain.records import InferenceRecord, Outcome
from shipworthy.domain.rollout import RolloutState
from shipworthy.domain.routing import choose
from shipworthy.ports import Ledger
from shipworthy.release.catalogue import built_in
from shipworthy.rollout.intents import put_policy
from shipworthy.rollout.keeper import Keeper
from shipworthy.stores.journal import JournalReader, JournalWriter
from shipworthy.stores.ledger import migrate, open_ledger
from shipworthy.watch.evidence import gather

MODEL = "digits"


def manifest(**changes: Any) -> dict[str, Any]:
    file = {"path": "model.skops", "digest": "sha256:" + "c" * 64, "size": 1}
    content = {
        "model": MODEL,
        "artifacts": [{"path": "model.skops", "format": "skops", "files": [file]}],
        "code": None,
        "environment": {},
        "data": [],
        "contract": {
            "inputs": [{"name": "input", "datatype": "FP64", "shape": [-1, 64]}],
            "outputs": [{"name": "predict", "datatype": "INT64", "shape": [-1]}],
            "side_effects": "none",
        },
        "inference": {"engine": "sklearn", "engine_version": "1.9"},
    }
    return Manifest.model_validate(content | changes).content()


class Published:
    """What the gateway obeys: the newest of what was published for the highest term."""

    def __init__(self) -> None:
        self.by_fence: dict[int, Snapshot] = {}
        self.count = 0

    def publish(self, fence: int, content: bytes) -> None:
        snapshot = decode_snapshot(content)
        assert snapshot.fence == fence
        self.by_fence[fence] = snapshot
        self.count += 1

    def newest(self) -> int:
        return max(self.by_fence, default=0)


@dataclass
class World:
    """What surrounds a keeper."""

    root: Path
    ledger: Ledger
    now: float = 1_800_000_000.0
    snapshots: Published = field(default_factory=Published)
    keepers: Iterator[int] = field(default_factory=count)
    ids: Iterator[int] = field(default_factory=count)
    units: Iterator[int] = field(default_factory=count)

    def __post_init__(self) -> None:
        self.writer = JournalWriter(self.root / "journals", "worker-0", 1 << 28)
        self.keeper = self.new_keeper()

    def new_keeper(self) -> Keeper:
        """A keeper process that has just started."""

        return Keeper(
            holder=f"keeper-{next(self.keepers)}",
            ledger=self.ledger,
            journal=JournalReader(self.root / "journals"),
            gather=gather,
            snapshots=self.snapshots,
            clock=lambda: self.now,
            new_id=lambda prefix: f"{prefix}_{next(self.ids)}",
            checklist=built_in(),
        )

    @property
    def snapshot(self) -> Snapshot | None:
        return self.snapshots.by_fence.get(self.snapshots.newest())

    def person(self, name: str) -> str:
        with self.ledger.write() as tx:
            return tx.principals.ensure(name).id

    def register(self, version: int, **changes: Any) -> Release:
        content = manifest(description=f"version {version}", **changes)
        release = Release(
            model=MODEL,
            version=version,
            digest=Manifest.model_validate(content).digest(),
            manifest=content,
            created_at=self.now,
            created_by=self.person("maker"),
        )
        with self.ledger.write() as tx:
            tx.releases.add(release)
        return release

    def apply(self, **policy: Any) -> None:
        gate = {"checks": ["assets.stored"]}
        document = {
            "model": MODEL,
            "promotion": {"staging": gate, "production": gate},
            "rollout": {"steps": [{"weight": 0.1}, {"weight": 0.5}]},
        }
        owner = self.person("owner")
        with self.ledger.write() as tx:
            put_policy(tx, Policy.model_validate(document | policy), by=owner, at=self.now)

    def find(self, release: Release, verdict: Verdict = Verdict.PASS) -> None:
        """Let the check that the gates ask for have been observed, at each stage."""
        finding = Finding(
            check="assets.stored",
            verdict=verdict,
            observed="3 files",
            threshold="all",
            at=self.now,
            expires=self.now + 3600,
        )
        with self.ledger.write() as tx:
            for stage in Stage:
                tx.evidence.add_finding(
                    StageFinding(release=release.digest, stage=stage, finding=finding)
                )

    def ask(
        self, kind: IntentKind, release: Release | None = None, stage: Stage | None = None
    ) -> str:
        intent = Intent(
            id=f"int_{next(self.ids)}",
            at=self.now,
            actor=self.person("ada"),
            kind=kind,
            model=MODEL,
            release=release.digest if release else None,
            stage=stage,
            reason="because",
        )
        with self.ledger.write() as tx:
            tx.intents.put(intent)
        return intent.id

    def intent(self, id: str) -> Intent:
        with self.ledger.read() as tx:
            found = tx.intents.get(id)
        assert found is not None
        return found

    def deployments(self) -> list[Deployment]:
        with self.ledger.read() as tx:
            return tx.deployments.list()

    def report(self, state: DeploymentState = DeploymentState.READY, message: str = "") -> None:
        """Do what the supervisor does: start what is wanted, stop what is not."""
        with self.ledger.write() as tx:
            for deployment in tx.deployments.list():
                port = 9000 + int(deployment.id.split("_")[1])
                changes: dict[str, Any] = {"state": DeploymentState.STOPPED, "endpoints": ()}
                if deployment.wanted and deployment.state is DeploymentState.STARTING:
                    urls = (f"http://127.0.0.1:{port}",)
                    ready = state is DeploymentState.READY
                    changes = {"state": state, "endpoints": urls if ready else ()}
                elif deployment.wanted:
                    continue
                tx.deployments.put(msgspec.structs.replace(deployment, message=message, **changes))

    def tick(self, times: int = 1) -> None:
        for _ in range(times):
            self.now += 0.1
            self.keeper.tick()

    def promote(self, release: Release, stage: Stage) -> Intent:
        self.find(release)
        id = self.ask(IntentKind.PROMOTE, release, stage)
        self.tick()
        self.report()
        self.tick()
        return self.intent(id)

    def to_production(self, release: Release) -> Intent:
        assert self.promote(release, Stage.STAGING).status == "done"
        return self.promote(release, Stage.PRODUCTION)

    def plan(self, name: str = MODEL) -> Plan:
        assert self.snapshot is not None
        return self.snapshot.plans[name]

    def rollout(self) -> RolloutState:
        with self.ledger.read() as tx:
            found = tx.rollouts.latest(MODEL)
        assert found is not None
        return found

    def traffic(
        self,
        requests: int,
        fails: Callable[[str, int], bool] = lambda arm, number: False,
    ) -> None:
        """Answer requests as the gateway would, by the plan that was published."""
        plan = self.plan()
        for number in range(requests):
            unit = f"{next(self.units):016x}"
            choice = choose(plan, unit, now=self.now, uniform=0.5)
            arm = plan.candidate if choice.arm == "candidate" else plan.stable
            assert arm is not None
            failed = fails(choice.arm, number)
            record = InferenceRecord(
                id=f"inf_{next(self.ids)}",
                at=self.now,
                plan=plan.name,
                model=plan.model,
                revision=plan.revision,
                key="k",
                assigned=choice.arm,
                probability=choice.probability,
                outcome=Outcome.FAILURE if failed else Outcome.SUCCESS,
                status=200,
                release=arm.release,
                rollout=choice.rollout,
                unit=unit,
                serving="stable" if failed else choice.arm,
                serving_release=plan.stable.release if failed else arm.release,
            )
            assert self.writer.append(record)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run the keeper's main tests over both databases."""
    if "world" in metafunc.fixturenames and metafunc.definition.path.name == "test_keeper.py":
        metafunc.parametrize("world", ["sqlite", "postgresql"], indirect=True)


@pytest.fixture
def world(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[World]:
    if getattr(request, "param", "sqlite") == "sqlite":
        url = f"sqlite:///{tmp_path / 'ledger.db'}"
        migrate(url)
    else:
        url = request.getfixturevalue("databases").make(migrated=True)
    with open_ledger(url) as ledger:
        made = World(tmp_path, ledger)
        yield made
        made.writer.close()
