"""The keeper from intents and journal tails to plans, over a real ledger and real journals."""

from __future__ import annotations

import msgspec
import pytest
from tests.rollout.conftest import MODEL, World

from shipworthy.domain.audit import verify
from shipworthy.domain.findings import Verdict
from shipworthy.domain.lifecycle import DeploymentState, IntentKind, IntentStatus
from shipworthy.domain.names import ReleaseReference, Stage
from shipworthy.domain.plan import Plan
from shipworthy.domain.rollout import RolloutStatus
from shipworthy.rollout.keeper import LEASE_SECONDS


def test_the_first_release_takes_production_once_it_answers(world: World) -> None:
    world.apply()
    first = world.register(1)
    done = world.to_production(first)
    assert done.status is IntentStatus.DONE
    plan = world.plan()
    assert plan.stable.release == "digits@1"
    assert plan.stable.endpoints
    assert plan.candidate is None
    assert world.plan("digits@staging").stable.release == "digits@1"


def test_nothing_is_promoted_without_a_policy_or_evidence(world: World) -> None:
    first = world.register(1)
    refused = world.promote(first, Stage.STAGING)
    assert refused.status is IntentStatus.REFUSED
    assert "no policy is in force" in refused.answer
    world.apply()
    id = world.ask(IntentKind.PROMOTE, first, Stage.PRODUCTION)
    world.tick()
    assert "not in staging" in world.intent(id).answer
    assert world.deployments() == []


def test_expired_evidence_holds(world: World) -> None:
    world.apply()
    first = world.register(1)
    world.find(first)
    world.now += 7200
    id = world.ask(IntentKind.PROMOTE, first, Stage.STAGING)
    world.tick()
    assert world.intent(id).status is IntentStatus.REFUSED
    assert "stale" in world.intent(id).answer


def test_a_failing_check_refuses(world: World) -> None:
    world.apply()
    first = world.register(1)
    world.find(first, Verdict.FAIL)
    id = world.ask(IntentKind.PROMOTE, first, Stage.STAGING)
    world.tick()
    assert world.intent(id).status is IntentStatus.REFUSED
    assert world.deployments() == []


def test_a_release_that_does_not_start_takes_no_stage(world: World) -> None:
    world.apply()
    first = world.register(1)
    world.find(first)
    id = world.ask(IntentKind.PROMOTE, first, Stage.STAGING)
    world.tick()
    world.report(DeploymentState.FAILED, "no module named foo")
    world.tick()
    assert "no module named foo" in world.intent(id).answer
    with world.ledger.read() as tx:
        assert tx.stages.history(MODEL, Stage.STAGING) == []


def begin_second(world: World) -> None:
    world.apply()
    assert world.to_production(world.register(1)).status is IntentStatus.DONE
    assert world.to_production(world.register(2)).status is IntentStatus.DONE


def test_a_good_candidate_reaches_all_traffic_step_by_step(world: World) -> None:
    begin_second(world)
    assert world.plan().weight == 1000
    weights = {1000}
    for _ in range(60):
        world.traffic(500)
        world.tick()
        weights.add(world.plan().weight)
        if world.rollout().status.ended:
            break
    assert world.rollout().status is RolloutStatus.COMPLETED
    assert weights == {1000, 5000, 0}
    assert world.plan().stable.release == "digits@2"
    assert world.plan().candidate is None
    kept = [d for d in world.deployments() if d.stage is Stage.PRODUCTION and d.wanted]
    assert len(kept) == 2, "the old one stays warm"
    world.now += 3700
    world.tick()
    kept = [d for d in world.deployments() if d.stage is Stage.PRODUCTION and d.wanted]
    assert len(kept) == 1


def test_a_bad_candidate_is_out_with_the_batch_that_proves_it(world: World) -> None:
    begin_second(world)
    world.traffic(600, lambda arm, number: arm == "candidate" and number % 2 == 0)
    world.tick()
    assert world.rollout().status is RolloutStatus.ROLLED_BACK
    assert world.plan().candidate is None
    assert world.plan().stable.release == "digits@1"
    with world.ledger.read() as tx:
        newest = tx.decisions.list(MODEL, limit=1)[0]
        assert newest.kind == "roll back"
        assert "digits@2 is rolled back at 10%" in newest.text
        assert tx.stages.history(MODEL, Stage.PRODUCTION)[0].release != ""
        assert verify(tx.audit.entries()) == []


def test_a_keeper_killed_between_ticks_goes_on_with_the_same_evidence(world: World) -> None:
    begin_second(world)
    world.traffic(500, lambda _, number: number % 50 == 0)
    world.tick()
    before = world.rollout()
    world.keeper = world.new_keeper()
    world.tick()
    assert world.rollout() == before, "the killed one's lease has not run out"
    world.now += LEASE_SECONDS
    world.tick()
    assert world.rollout() == before
    world.traffic(500, lambda _, number: number % 50 == 0)
    world.tick()
    assert world.rollout().exposed_requests > before.exposed_requests


def test_a_keeper_that_dies_in_a_transaction_counts_nothing_twice(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    begin_second(world)
    world.traffic(400, lambda _, number: number % 20 == 0)
    cursors = type(world.keeper)._publish

    def boom(*_: object) -> None:
        raise OSError("the disk is full")

    monkeypatch.setattr(type(world.keeper), "_publish", boom)
    with pytest.raises(OSError, match="full"):
        world.tick()
    monkeypatch.setattr(type(world.keeper), "_publish", cursors)
    world.tick()
    total = world.rollout().step_candidate.requests + world.rollout().step_stable.requests
    assert total == 400


def test_the_lease_is_renewed_while_a_candidate_is_out(world: World) -> None:
    begin_second(world)
    leases = set()
    for _ in range(200):
        world.tick()
        lease = world.plan().lease
        assert lease is not None
        assert lease > world.now
        leases.add(lease)
    assert 3 <= len(leases) <= 10, "renewed a few times, not at every tick"


def test_rollback_returns_at_once_to_the_warm_release_and_its_policy(world: World) -> None:
    begin_second(world)
    while not world.rollout().status.ended:
        world.traffic(1000)
        world.tick()
    world.apply(fallback_message="sorry")
    world.tick()
    assert world.plan().fallback_message == "sorry"
    id = world.ask(IntentKind.ROLLBACK)
    world.tick()
    assert world.intent(id).status is IntentStatus.DONE
    assert "still warm" in world.intent(id).answer
    assert world.plan().stable.release == "digits@1"
    assert world.plan().fallback_message is None
    id = world.ask(IntentKind.ROLLBACK)
    world.tick()
    assert "no earlier production release" in world.intent(id).answer


def test_rollback_restores_a_release_that_was_stopped(world: World) -> None:
    begin_second(world)
    while not world.rollout().status.ended:
        world.traffic(1000)
        world.tick()
    world.now += 3700
    world.tick()
    world.report()
    id = world.ask(IntentKind.ROLLBACK)
    world.tick()
    assert world.intent(id).status is IntentStatus.WAITING
    assert world.plan().stable.release == "digits@2"
    world.report()
    world.tick()
    assert "was restored" in world.intent(id).answer
    assert world.plan().stable.release == "digits@1"


def test_people_pause_resume_abort_and_roll_back_a_rollout(world: World) -> None:
    begin_second(world)
    world.ask(IntentKind.PAUSE)
    world.tick()
    assert world.rollout().status is RolloutStatus.PAUSED
    for _ in range(20):
        world.traffic(500)
        world.tick()
    assert world.plan().weight == 1000
    world.ask(IntentKind.RESUME)
    world.tick()
    assert world.rollout().step == 1
    id = world.ask(IntentKind.ABORT)
    world.tick()
    assert world.intent(id).status is IntentStatus.DONE
    assert world.plan().candidate is None
    id = world.ask(IntentKind.ABORT)
    world.tick()
    assert world.intent(id).status is IntentStatus.REFUSED


def test_a_second_candidate_waits_in_line(world: World) -> None:
    begin_second(world)
    third = world.register(3)
    assert world.promote(third, Stage.STAGING).status is IntentStatus.DONE
    world.find(third)
    id = world.ask(IntentKind.PROMOTE, third, Stage.PRODUCTION)
    world.tick(3)
    assert world.intent(id).status is IntentStatus.PENDING
    assert "waits in line behind digits@2" in world.intent(id).answer
    world.ask(IntentKind.ABORT)
    world.tick(2)
    assert world.intent(id).status is IntentStatus.DONE
    assert world.rollout().candidate_name == "digits@3"


def test_a_candidate_that_never_starts_exposes_nobody(world: World) -> None:
    world.apply()
    world.to_production(world.register(1))
    second = world.register(2)
    world.promote(second, Stage.STAGING)
    world.find(second)
    world.ask(IntentKind.PROMOTE, second, Stage.PRODUCTION)
    world.tick()
    world.report(DeploymentState.FAILED, "killed by the kernel")
    world.tick()
    assert world.rollout().status is RolloutStatus.ABORTED
    assert world.rollout().exposed_requests == 0
    assert world.plan().stable.release == "digits@1"


def test_a_plan_keeps_its_last_known_endpoints_while_a_replica_restarts(world: World) -> None:
    world.apply()
    world.to_production(world.register(1))
    before = world.plan()
    with world.ledger.write() as tx:
        for deployment in tx.deployments.list():
            tx.deployments.put(
                msgspec.structs.replace(deployment, state=DeploymentState.STARTING, endpoints=())
            )
    world.tick()
    assert world.plan() == before
    world.report()
    world.tick()
    assert world.plan().stable.endpoints == before.stable.endpoints


def test_a_candidate_gets_no_traffic_until_a_machine_started_anew_has_it_running(
    world: World,
) -> None:
    world.apply()
    world.to_production(world.register(1))
    world.to_production(world.register(2))
    exposed = world.plan()
    assert exposed.candidate is not None
    [candidate] = [
        deployment
        for deployment in world.deployments()
        if deployment.stage is Stage.PRODUCTION and deployment.release == world.rollout().candidate
    ]

    def reported(state: DeploymentState) -> Plan:
        with world.ledger.write() as tx:
            tx.deployments.put(msgspec.structs.replace(candidate, state=state, endpoints=()))
        world.tick()
        return world.plan()

    assert reported(DeploymentState.RESTARTING) == exposed  # it died: what fails now is its own
    parked = reported(DeploymentState.STARTING)
    assert (parked.candidate, parked.weight, parked.rollout) == (None, 0, "")
    world.report()
    world.tick()
    back = world.plan()
    assert (back.candidate, back.weight, back.rollout) == (
        exposed.candidate,
        exposed.weight,
        exposed.rollout,
    )
    assert back.revision > parked.revision > exposed.revision


def test_keys_reach_the_snapshot_and_leave_it_when_revoked(world: World) -> None:
    from shipworthy.domain.plan import Key
    from shipworthy.ports import StoredKey

    holder = world.person("shop")
    key = Key(id="a1", hash="0" * 64, role="client")
    with world.ledger.write() as tx:
        tx.keys.add(StoredKey(key=key, principal=holder, created_at=world.now))
    world.tick()
    assert world.snapshot is not None
    assert "a1" in world.snapshot.keys
    with world.ledger.write() as tx:
        tx.keys.revoke("a1", world.now)
    world.tick()
    assert "a1" not in world.snapshot.keys


def test_releases_are_found_by_the_stage_that_they_hold(world: World) -> None:
    begin_second(world)
    with world.ledger.read() as tx:
        found = tx.releases.find(ReleaseReference(MODEL, stage=Stage.PRODUCTION))
    assert found is not None
    assert found.name == "digits@1"


def test_a_clock_that_is_set_back_lets_no_lease_run_out(world: World) -> None:
    begin_second(world)
    world.now -= 3600
    written = world.snapshots.count
    world.tick()
    assert world.snapshots.count == written + 1
    lease = world.plan().lease
    assert lease is not None
    assert world.now < lease < world.now + 60
    world.tick()
    assert world.snapshots.count == written + 1, "and only once"


def test_a_snapshot_that_can_not_be_written_is_tried_again_without_a_new_term(
    world: World,
) -> None:
    from shipworthy.errors import Unavailable

    begin_second(world)
    publish = world.snapshots.publish

    def refuse(fence: int, content: bytes) -> None:
        raise Unavailable("the disk is full")

    def terms() -> int:
        with world.ledger.read() as tx:
            return tx.terms.current().number

    before = terms()
    world.snapshots.publish = refuse
    world.traffic(20)
    world.now += 60
    for _ in range(3):
        with pytest.raises(Unavailable):
            world.tick()
    world.snapshots.publish = publish
    written = world.snapshots.count
    world.tick()
    assert world.snapshots.count == written + 1
    assert terms() == before
    counted = world.rollout()
    assert counted.step_candidate.requests + counted.step_stable.requests == 20
