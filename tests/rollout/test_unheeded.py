"""What a policy asks for and is not done is told, once, and again when it is another thing."""

from __future__ import annotations

import pytest
from tests.rollout.conftest import MODEL, World, manifest

from shipworthy.domain.lifecycle import Release
from shipworthy.domain.names import Stage
from shipworthy.domain.policy import Policy
from shipworthy.rollout.plans import MIRROR_DECISION
from shipworthy.rollout.unheeded import unheeded

EFFECTS = manifest()["contract"] | {"side_effects": "unknown"}
MIRROR = {"to": "staging", "share": 0.25}


def told(world: World) -> list[str]:
    """What was decided of copies, oldest first."""
    with world.ledger.read() as tx:
        decisions = tx.decisions.list(MODEL, limit=100)
    return [one.text for one in reversed(decisions) if one.kind == MIRROR_DECISION]


def said(world: World, **policy: object) -> list[str]:
    with world.ledger.read() as tx:
        return unheeded(tx, Policy.model_validate({"model": MODEL, **policy}))


def to_staging(world: World, release: Release) -> None:
    world.promote(release, Stage.STAGING)
    world.tick(2)


def test_copies_are_told_when_they_begin_and_when_they_do_not(world: World) -> None:
    world.apply(mirror=MIRROR)
    world.to_production(world.register(1))
    world.tick(5)
    assert world.plan().mirror is None
    assert told(world)[-1] == (
        "nothing of digits is copied to staging: digits@1 is what answers in production; promote"
        " another one to staging."
    )
    to_staging(world, world.register(2, contract=EFFECTS))
    assert world.plan().mirror is None
    assert "digits@2 does not say that it has no side effects" in told(world)[-1]
    to_staging(world, world.register(3))
    mirror = world.plan().mirror
    assert mirror is not None
    assert (mirror.arm.release, mirror.share) == ("digits@3", 0.25)
    assert world.plan("digits@staging").mirror is None, "it is production's requests"
    assert told(world)[-1] == "0.25 of digits's requests are copied to digits@3."
    count = len(told(world))
    world.tick(5)
    assert len(told(world)) == count, "once is enough"
    assert said(world, mirror=MIRROR) == []


@pytest.mark.parametrize(
    ("to", "why"),
    [
        ("development", "development holds no release"),
        ("digits@7", "digits@7 is not registered"),
        ("letters@1", "letters@1 is not registered"),  # as only an older policy can say
        ("digits@2", "digits@2 does not run there now"),
    ],
)
def test_copies_that_nobody_could_get_are_told(world: World, to: str, why: str) -> None:
    world.apply()
    world.to_production(world.register(1))
    world.register(2)
    (sentence,) = said(world, mirror={"to": to})
    assert why in sentence
    assert ";" in sentence, "with the cure"


def test_hedging_what_has_side_effects_is_told(world: World) -> None:
    world.apply()
    hedge = {"after": "50ms"}
    assert said(world, hedge=hedge) == [], "there is nothing yet to ask"
    world.to_production(world.register(1, contract=EFFECTS))
    (sentence,) = said(world, hedge=hedge)
    assert "no request for digits is asked twice: digits@1" in sentence
    assert said(world) == []
