"""Requests that cross each other, or what the keeper decides by itself."""

from __future__ import annotations

import msgspec
from tests.rollout.conftest import World

from shipworthy.domain.lifecycle import DeploymentState, IntentKind, IntentStatus, Release
from shipworthy.domain.names import Stage
from shipworthy.domain.rollout import RolloutStatus


def reach_production(world: World, release: Release) -> None:
    """Through staging and, if there is another one before it, a whole rollout."""
    assert world.to_production(release).status is IntentStatus.DONE
    while world.plan().stable.release != release.name:
        world.traffic(1000)
        world.tick()


def cool_down(world: World) -> None:
    """Let what was kept warm be stopped."""
    world.now += 3700
    world.tick()
    world.report()


def test_the_same_release_does_not_wait_in_line_behind_itself(world: World) -> None:
    world.apply()
    reach_production(world, world.register(1))
    second = world.register(2)
    assert world.to_production(second).status is IntentStatus.DONE
    again = world.ask(IntentKind.PROMOTE, second, Stage.PRODUCTION)
    world.tick()
    assert world.intent(again).status is IntentStatus.REFUSED
    assert world.intent(again).answer == "digits@2 is being rolled out already."
    world.traffic(600, lambda arm, number: arm == "candidate")
    world.tick()
    assert world.rollout().status is RolloutStatus.ROLLED_BACK
    world.tick(3)
    assert world.rollout().status is RolloutStatus.ROLLED_BACK, "nobody sees it a second time"


def test_a_rollback_that_comes_behind_the_guardrail_leaves_stable_alone(world: World) -> None:
    world.apply()
    reach_production(world, world.register(1))
    reach_production(world, world.register(2))
    third = world.register(3)
    assert world.to_production(third).status is IntentStatus.DONE
    world.traffic(600, lambda arm, number: arm == "candidate")
    world.tick()
    assert world.rollout().status is RolloutStatus.ROLLED_BACK
    late = world.ask(IntentKind.ROLLBACK, third)
    world.tick()
    assert world.intent(late).status is IntentStatus.DONE
    assert "digits@3 is out of digits's traffic already" in world.intent(late).answer
    assert world.plan().stable.release == "digits@2"


def test_two_rollbacks_of_the_same_release_go_back_once(world: World) -> None:
    world.apply()
    for version in (1, 2, 3):
        reach_production(world, world.register(version))
    cool_down(world)
    ids = [world.ask(IntentKind.ROLLBACK)]
    world.tick()
    ids.append(world.ask(IntentKind.ROLLBACK))
    world.tick()
    assert {world.intent(id).status for id in ids} == {IntentStatus.WAITING}
    world.report()
    world.tick(3)
    assert {world.intent(id).status for id in ids} == {IntentStatus.DONE}
    assert world.plan().stable.release == "digits@2"


def test_a_promotion_waits_for_a_rollback_that_is_being_restored(world: World) -> None:
    world.apply()
    for version in (1, 2):
        reach_production(world, world.register(version))
    third = world.register(3)
    assert world.promote(third, Stage.STAGING).status is IntentStatus.DONE
    cool_down(world)
    back = world.ask(IntentKind.ROLLBACK)
    world.tick()
    world.find(third)
    forth = world.ask(IntentKind.PROMOTE, third, Stage.PRODUCTION)
    world.tick(2)
    assert world.intent(forth).answer == "digits@3 waits in line behind the rollback."
    world.report()
    world.tick()
    assert world.intent(back).status is IntentStatus.DONE
    assert world.plan().stable.release == "digits@1"
    world.tick()
    assert world.rollout().candidate_name == "digits@3"
    assert world.rollout().stable_name == "digits@1"


def test_of_two_first_releases_the_second_is_rolled_out(world: World) -> None:
    world.apply()
    first, second = world.register(1), world.register(2)
    assert world.promote(first, Stage.STAGING).status is IntentStatus.DONE
    one = world.ask(IntentKind.PROMOTE, first, Stage.PRODUCTION)
    world.tick()
    world.find(second)
    world.ask(IntentKind.PROMOTE, second, Stage.STAGING)
    world.tick()
    with world.ledger.write() as tx:  # the second one starts in staging before the first is up
        for deployment in tx.deployments.list():
            if deployment.stage is Stage.STAGING:
                tx.deployments.put(
                    msgspec.structs.replace(
                        deployment, state=DeploymentState.READY, endpoints=("http://h:1",)
                    )
                )
    world.tick()
    two = world.ask(IntentKind.PROMOTE, second, Stage.PRODUCTION)
    world.tick()
    assert world.intent(two).answer == "digits@2 waits in line behind digits@1."
    world.report()
    world.tick(2)
    assert world.intent(one).status is IntentStatus.DONE
    assert world.plan().stable.release == "digits@1"
    assert world.rollout().candidate_name == "digits@2"


def test_the_later_wish_holds_a_stage(world: World) -> None:
    world.apply()
    first, second = world.register(1), world.register(2)
    for release in (first, second):
        world.find(release)
        world.ask(IntentKind.PROMOTE, release, Stage.STAGING)
        world.tick()
    for _ in range(3):
        world.report()
        world.tick()
    assert world.plan("digits@staging").stable.release == "digits@2"


def test_a_warm_release_that_died_is_restored(world: World) -> None:
    world.apply()
    for version in (1, 2):
        reach_production(world, world.register(version))
    with world.ledger.write() as tx:
        for deployment in tx.deployments.list():
            if deployment.retire_at is not None:
                failed = DeploymentState.FAILED
                tx.deployments.put(
                    msgspec.structs.replace(deployment, state=failed, endpoints=(), message="died")
                )
    back = world.ask(IntentKind.ROLLBACK)
    world.tick()
    assert world.intent(back).status is IntentStatus.WAITING
    world.report()
    world.tick()
    assert world.intent(back).status is IntentStatus.DONE
    assert world.plan().stable.release == "digits@1"


def test_a_restore_that_fails_is_tried_once_and_leaves_nothing_behind(world: World) -> None:
    world.apply()
    for version in (1, 2):
        reach_production(world, world.register(version))
    cool_down(world)
    back = world.ask(IntentKind.ROLLBACK)
    world.tick()
    world.report(DeploymentState.FAILED, "no space left")
    world.tick(2)
    assert world.intent(back).status is IntentStatus.REFUSED
    assert "no space left" in world.intent(back).answer
    world.report()
    wanted = [one for one in world.deployments() if one.stage is Stage.PRODUCTION and one.wanted]
    assert len(wanted) == 1
    again = world.ask(IntentKind.ROLLBACK)
    world.tick()
    world.report()
    world.tick()
    assert world.intent(again).status is IntentStatus.DONE


def test_a_manifest_altered_in_the_ledger_is_not_obeyed(world: World) -> None:
    import json
    import sqlite3
    from contextlib import closing

    world.apply()
    reach_production(world, world.register(1))
    second = world.register(2)
    before = world.plan()
    with closing(sqlite3.connect(world.root / "ledger.db")) as connection, connection:
        for version in (1, 2):
            row = connection.execute("SELECT manifest FROM releases WHERE version=?", (version,))
            content = json.loads(row.fetchone()[0]) | {"contract": "none"}
            change = "UPDATE releases SET manifest=? WHERE version=?"
            connection.execute(change, (json.dumps(content), version))
    world.tick()
    assert world.plan() == before
    world.find(second)
    asked = world.ask(IntentKind.PROMOTE, second, Stage.STAGING)
    world.tick()
    assert world.intent(asked).status is IntentStatus.REFUSED
    assert "manifest of digits@2 is not the registered one" in world.intent(asked).answer
