"""What a policy says, in units that people write, over a preset."""

import pytest
from pydantic import ValidationError

from shipworthy.domain.names import Stage
from shipworthy.domain.policy import PRESETS, Policy, Rule, StageGate, with_preset


def policy(**content):
    return Policy.model_validate(with_preset({"model": "digits", **content}))


@pytest.mark.parametrize("preset", PRESETS)
def test_each_preset_is_a_policy_and_none_is_empty(preset) -> None:
    made = policy(preset=preset)
    for stage in (Stage.STAGING, Stage.PRODUCTION):
        assert made.promotion.gate(stage).checks
    assert made.promotion.confirm.checks


def test_stricter_presets_ask_for_more() -> None:
    light, standard, critical = (policy(preset=one) for one in PRESETS)
    assert light.promotion.production.approvals < standard.promotion.production.approvals
    assert standard.promotion.production.approvals < critical.promotion.production.approvals
    assert set(light.promotion.production.checks) < set(standard.promotion.production.checks)
    assert light.rollout.margin > standard.rollout.margin > critical.rollout.margin


def test_a_document_changes_what_it_names_and_no_more() -> None:
    made = policy(preset="critical", rollout={"keep_warm": "2h"})
    assert made.rollout.keep_warm == 7200.0
    assert made.rollout.steps == policy(preset="critical").rollout.steps
    assert made.digest() != policy(preset="critical").digest()


def test_an_unknown_preset_is_refused() -> None:
    with pytest.raises(ValidationError, match="prototype, standard, critical"):
        policy(preset="strict")


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("250ms", 0.25), ("30s", 30), ("5m", 300), ("1.5h", 5400), ("7d", 604800), (9, 9)],
)
def test_durations(text, seconds) -> None:
    assert policy(rollout={"keep_warm": text}).rollout.keep_warm == pytest.approx(seconds)


@pytest.mark.parametrize("text", ["5 minutes", "fast", "-3s", -1, "1h30m"])
def test_what_is_no_duration(text) -> None:
    with pytest.raises(ValidationError):
        policy(rollout={"keep_warm": text})


@pytest.mark.parametrize(("text", "share"), [("5%", 0.05), ("0.1 %", 0.001), (0.25, 0.25)])
def test_shares(text, share) -> None:
    assert policy(rollout={"margin": text}).rollout.margin == pytest.approx(share)


@pytest.mark.parametrize(
    "bad",
    [
        {"rollout": {"steps": []}},
        {"rollout": {"steps": [{"weight": 0.5}, {"weight": 0.5}]}},
        {"rollout": {"steps": [{"weight": 0.96}]}},
        {"rollout": {"margin": 0}},
        {"rollback": {"breaker": {"window": 10, "failures": 11}}},
        {"promotion": {"production": {"approvals": -1}}},
        {"risks": [{"problem": "x"}]},
    ],
)
def test_what_makes_no_sense_is_refused(bad) -> None:
    with pytest.raises(ValidationError):
        policy(**bad)


@pytest.mark.parametrize("bounds", [{}, {"at_least": 1, "at_most": 2}])
def test_a_rule_has_exactly_one_condition(bounds) -> None:
    with pytest.raises(ValidationError, match="exactly one"):
        Rule(metric="heldout.accuracy", **bounds)
    with pytest.raises(ValidationError, match=r"suite\.metric"):
        Rule(metric="accuracy", at_least=1)


def test_development_has_no_gate() -> None:
    assert policy().promotion.gate(Stage.DEVELOPMENT) == StageGate()


def test_a_step_must_be_able_to_end_before_the_rollout_is_held() -> None:
    steps = [{"weight": 0.1, "duration": "2d"}]
    with pytest.raises(ValidationError, match="step_limit must be above each step's duration"):
        policy(rollout={"steps": steps})
    assert policy(rollout={"steps": steps, "step_limit": "3d"}).rollout.steps[0].duration == 172_800


@pytest.mark.parametrize("to", ["staging", "development", "digits@4"])
def test_copies_go_to_a_stage_or_a_release_of_the_model(to):
    assert Policy.model_validate({"model": "digits", "mirror": {"to": to}}).nowhere() == ""


@pytest.mark.parametrize("to", ["production", "letters@4", "digits", "digits@staging", "canary"])
def test_copies_go_nowhere_else_and_a_stored_policy_stays_readable(to):
    policy = Policy.model_validate({"model": "digits", "mirror": {"to": to}})
    assert "mirror.to" in policy.nowhere()
