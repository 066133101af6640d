"""Nothing passes a gate without evidence, and bad is told apart from unknown."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shipworthy.domain.checklist import ATTESTED_BY, Checklist, ItemStatus
from shipworthy.domain.findings import Finding, Verdict
from shipworthy.domain.gates import GateVerdict, judge, judge_confirmation, unmeetable
from shipworthy.domain.lifecycle import FOUR_EYES, Approval, Release, StageFinding, Waiver
from shipworthy.domain.manifest import Metric
from shipworthy.domain.names import Stage
from shipworthy.domain.policy import (
    PRESETS,
    Confirm,
    Policy,
    Promotion,
    Rule,
    StageGate,
    with_preset,
)

DAY = 86_400.0
NOW = 100 * DAY
RELEASE = Release(
    model="digits", version=3, digest="sha256:a", manifest={}, created_at=0.0, created_by="maker"
)
ITEMS = {
    "own.reg": "R",
    "own.stage": "S",
    "own.live": "P",
    "own.next": "P",
    "own.done": "C",
    "own.later": "L",
}
CHECKLIST = Checklist.model_validate(
    {
        "items": [
            {"id": id, "group": "ours", "when": [when], "title": id, "observes": id}
            | {"next": id == "own.next"}
            for id, when in ITEMS.items()
        ]
    }
)  # fmt: skip
CLAIMS = {
    "heldout": {
        "accuracy": Metric(value=0.985, n=540),
        "latency": Metric(value=80.0, std_error=2.0),
        "bare": Metric(value=0.9),
        "sure": Metric(value=0.9, std_error=0.0),
        "rmse": Metric(value=7.0, n=100),
    }
}


def seen(check, stage=Stage.STAGING, verdict=Verdict.PASS, release="sha256:a", at=NOW - 60, **more):
    finding = Finding(
        check=check, verdict=verdict, observed="3 of 3", threshold="all", at=at, **more
    )
    return StageFinding(release=release, stage=stage, finding=finding)


def yes(by, at=NOW - DAY, stage=Stage.PRODUCTION, release="sha256:a"):
    return Approval(release=release, stage=stage, by=by, at=at)


def waive(what, until=None, model=None, by="boss"):
    return Waiver(what=what, by=by, at=0.0, reason="we know", model=model, until=until)


def judged(gate, *, stage=Stage.PRODUCTION, findings=(), approvals=(), waivers=(), first=False):
    return judge(
        stage, gate, release=RELEASE, maker="maker", claims=CLAIMS, findings=findings,
        approvals=approvals, waivers=waivers, checklist=CHECKLIST, now=NOW, first=first,
        names={"boss": "Bo", "ann": "Ann"},
    )  # fmt: skip


def status(judgement, what):
    return {item.what: item.verdict for item in judgement.items}[what]


# --- without evidence ---------------------------------------------------------------------------


def test_a_gate_without_conditions_holds() -> None:
    for stage in (Stage.STAGING, Stage.PRODUCTION, Stage.DEVELOPMENT):
        held = judged(StageGate(), stage=stage)
        assert held.verdict is GateVerdict.HOLD
        assert "no conditions" in held.paragraph


@pytest.mark.parametrize(
    ("finding", "expected", "verdict"),
    [
        (None, ItemStatus.INCONCLUSIVE, GateVerdict.HOLD),
        (seen("own.live", verdict=Verdict.INCONCLUSIVE), ItemStatus.INCONCLUSIVE, GateVerdict.HOLD),
        (seen("own.live", verdict=Verdict.ERROR), ItemStatus.ERROR, GateVerdict.HOLD),
        (seen("own.live", expires=NOW), ItemStatus.STALE, GateVerdict.HOLD),
        (seen("own.live", verdict=Verdict.FAIL), ItemStatus.FAIL, GateVerdict.FAIL),
        (seen("own.live", verdict=Verdict.FAIL, expires=NOW), ItemStatus.STALE, GateVerdict.HOLD),
        (seen("own.live", release="sha256:b"), ItemStatus.INCONCLUSIVE, GateVerdict.HOLD),
        (seen("own.live", stage=Stage.DEVELOPMENT), ItemStatus.INCONCLUSIVE, GateVerdict.HOLD),
        (seen("own.live", stage=Stage.PRODUCTION), ItemStatus.INCONCLUSIVE, GateVerdict.HOLD),
        (seen("own.live", expires=NOW + 1), ItemStatus.PASS, GateVerdict.PASS),
        (seen("own.live", evidence={ATTESTED_BY: "Ann"}), ItemStatus.ATTESTED, GateVerdict.PASS),
    ],
)
def test_one_check(finding, expected, verdict) -> None:
    out = judged(StageGate(checks=("own.live",)), findings=[finding] if finding else [])
    assert (status(out, "own.live"), out.verdict) == (expected, verdict)
    assert out.passed == (verdict is GateVerdict.PASS)
    item = out.items[0]
    assert item.explanation
    assert bool(item.cure) == item.verdict.holds


def test_the_newest_finding_counts() -> None:
    good = seen("own.reg", stage=Stage.DEVELOPMENT, at=NOW - 100)
    bad = seen("own.reg", verdict=Verdict.FAIL, at=NOW - 50)
    gate = StageGate(checks=("own.reg",))
    assert judged(gate, findings=[bad, good]).verdict is GateVerdict.FAIL
    assert judged(gate, findings=[good]).verdict is GateVerdict.PASS
    # To enter staging only what was seen before it can count.
    assert judged(gate, stage=Stage.STAGING, findings=[good, bad]).verdict is GateVerdict.PASS


def test_bad_wins_over_unknown() -> None:
    gate = StageGate(checks=("own.reg", "own.live"))
    out = judged(gate, findings=[seen("own.live", verdict=Verdict.FAIL)])
    assert out.verdict is GateVerdict.FAIL
    assert "own.reg is not yet measured" in out.paragraph


def test_next_items_count_only_when_something_is_in_production() -> None:
    gate = StageGate(checks=("own.live", "own.next"))
    findings = [seen("own.live")]
    assert judged(gate, findings=findings, first=True).verdict is GateVerdict.PASS
    assert judged(gate, findings=findings).verdict is GateVerdict.HOLD
    assert judged(StageGate(checks=("own.next",)), first=True).verdict is GateVerdict.HOLD


def test_a_group_stands_for_what_can_be_known_by_then() -> None:
    out = judged(StageGate(checks=("ours", "own.reg")), stage=Stage.STAGING)
    assert [item.what for item in out.items] == ["own.reg", "own.stage"]
    out = judged(StageGate(checks=("ours",)))
    assert {item.what for item in out.items} == {"own.reg", "own.stage", "own.live", "own.next"}


@pytest.mark.parametrize("name", ["own.later", "own.done", "own.liv", "nothing"])
def test_what_can_not_be_met_holds_and_says_why(name) -> None:
    out = judged(StageGate(checks=("own.live", name)), findings=[seen("own.live")])
    assert (status(out, name), out.verdict) == (ItemStatus.ERROR, GateVerdict.HOLD)


# --- rules --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        (Rule(metric="heldout.accuracy", at_least=0.97), ItemStatus.PASS),
        (Rule(metric="heldout.accuracy", at_least=0.98), ItemStatus.INCONCLUSIVE),
        (Rule(metric="heldout.accuracy", at_least=0.995), ItemStatus.FAIL),
        (Rule(metric="heldout.accuracy", at_most=0.995), ItemStatus.PASS),
        (Rule(metric="heldout.accuracy", at_most=0.97), ItemStatus.FAIL),
        (Rule(metric="heldout.latency", at_most=85), ItemStatus.PASS),
        (Rule(metric="heldout.latency", at_most=82), ItemStatus.INCONCLUSIVE),
        (Rule(metric="heldout.latency", at_most=70), ItemStatus.FAIL),
        (Rule(metric="heldout.bare", at_least=0.1), ItemStatus.INCONCLUSIVE),
        (Rule(metric="heldout.sure", at_least=0.1), ItemStatus.INCONCLUSIVE),
        (Rule(metric="heldout.rmse", at_most=100), ItemStatus.INCONCLUSIVE),
        (Rule(metric="heldout.acuracy", at_least=0.1), ItemStatus.ERROR),
    ],
)
def test_rules_are_judged_on_bounds(rule, expected) -> None:
    out = judged(StageGate(rules=(rule,)))
    assert status(out, rule.metric) is expected
    assert out.passed == (expected is ItemStatus.PASS)


def test_an_undecided_rule_says_how_much_would_decide() -> None:
    item = judged(StageGate(rules=(Rule(metric="heldout.accuracy", at_least=0.98),))).items[0]
    assert "about 3,400 items" in item.cure
    item = judged(StageGate(rules=(Rule(metric="heldout.latency", at_most=82),))).items[0]
    assert "std_error is about 0.98" in item.cure
    item = judged(StageGate(rules=(Rule(metric="heldout.accuracy", at_least=0.985),))).items[0]
    assert "too close" in item.cure


def test_an_unknown_metric_names_what_is_claimed() -> None:
    item = judged(StageGate(rules=(Rule(metric="heldout.acuracy", at_least=0.98),))).items[0]
    assert "claimed metrics are heldout.accuracy, heldout.bare" in item.explanation
    assert "nearest is heldout.accuracy" in item.explanation


@given(st.floats(0, 1), st.integers(1, 10**5), st.floats(0, 1))
def test_a_rule_never_both_passes_and_fails_and_more_of_the_same_only_helps(
    value, n, limit
) -> None:
    def verdict(count):
        claims = {"s": {"m": Metric(value=value, n=count)}}
        gate = StageGate(rules=(Rule(metric="s.m", at_least=limit),))
        return judge(
            Stage.STAGING, gate, release=RELEASE, maker="m", claims=claims, findings=(),
            approvals=(), waivers=(), checklist=CHECKLIST, now=NOW, first=True,
        ).verdict  # fmt: skip

    small, large = verdict(n), verdict(n * 4)
    if small is not GateVerdict.HOLD and value != limit:
        assert large is small
    if small is GateVerdict.PASS:
        assert value >= limit


# --- approvals ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("needed", "approvals", "verdict"),
    [
        (1, [yes("ann")], GateVerdict.PASS),
        (1, [], GateVerdict.HOLD),
        (1, [yes("maker")], GateVerdict.HOLD),
        (2, [yes("ann"), yes("ann", at=NOW)], GateVerdict.HOLD),
        (2, [yes("ann"), yes("ben")], GateVerdict.PASS),
        (1, [yes("ann", at=NOW - 15 * DAY)], GateVerdict.HOLD),
        (1, [yes("ann", at=NOW - 15 * DAY), yes("ann")], GateVerdict.PASS),
        (1, [yes("ann", stage=Stage.STAGING)], GateVerdict.HOLD),
        (1, [yes("ann", release="sha256:b")], GateVerdict.HOLD),
    ],
)
def test_approvals_are_of_distinct_others_and_recent(needed, approvals, verdict) -> None:
    assert judged(StageGate(approvals=needed), approvals=approvals).verdict is verdict


def test_the_four_eyes_waiver_fills_one_place_and_says_so() -> None:
    gate = StageGate(checks=("own.live",), approvals=1)
    out = judged(gate, findings=[seen("own.live")], waivers=[waive(FOUR_EYES)])
    assert out.passed
    assert status(out, "approvals") is ItemStatus.WAIVED
    assert "waived by Bo, standing: we know" in out.paragraph
    two = StageGate(checks=("own.live",), approvals=2)
    assert not judged(two, findings=[seen("own.live")], waivers=[waive(FOUR_EYES)]).passed
    late = judged(gate, findings=[seen("own.live")], waivers=[waive(FOUR_EYES, until=NOW)])
    assert not late.passed
    other = judged(gate, findings=[seen("own.live")], waivers=[waive(FOUR_EYES, model="fraud")])
    assert not other.passed


def test_others_who_approved_need_no_waiver() -> None:
    out = judged(StageGate(approvals=1), approvals=[yes("ann")], waivers=[waive(FOUR_EYES)])
    assert status(out, "approvals") is ItemStatus.ATTESTED


# --- waivers ------------------------------------------------------------------------------------


def test_a_waived_check_is_marked_and_a_pass_needs_no_waiver() -> None:
    gate = StageGate(checks=("own.live", "own.reg"))
    bad = [seen("own.live"), seen("own.reg", verdict=Verdict.FAIL)]
    out = judged(gate, findings=bad, waivers=[waive("own.reg", until=NOW + DAY)])
    assert out.passed
    assert status(out, "own.reg") is ItemStatus.WAIVED
    assert "own.reg fails" in out.paragraph
    assert "waived by Bo" in out.paragraph
    fine = judged(gate, findings=[seen("own.live"), seen("own.reg")], waivers=[waive("own.reg")])
    assert status(fine, "own.reg") is ItemStatus.PASS
    assert not judged(gate, findings=bad, waivers=[waive("own.reg", until=NOW)]).passed


def test_waivers_alone_are_no_evidence() -> None:
    gate = StageGate(checks=("own.live",), approvals=1)
    out = judged(gate, waivers=[waive("own.live"), waive(FOUR_EYES)])
    assert out.verdict is GateVerdict.HOLD
    assert "every condition is waived" in out.paragraph


# --- whatever happens ---------------------------------------------------------------------------

FINDINGS = st.builds(
    lambda check, stage, verdict, release, at, life: seen(
        check, stage, verdict, release, at=at, expires=None if life is None else at + life
    ),
    check=st.sampled_from([*ITEMS, "own.foreign"]),
    stage=st.sampled_from(Stage),
    verdict=st.sampled_from(Verdict),
    release=st.sampled_from(["sha256:a", "sha256:b"]),
    at=st.floats(0, NOW),
    life=st.none() | st.floats(0, NOW),
)
APPROVALS = st.builds(
    yes,
    by=st.sampled_from(["maker", "ann", "ben"]),
    at=st.floats(0, NOW),
    stage=st.sampled_from(Stage),
    release=st.sampled_from(["sha256:a", "sha256:b"]),
)
WAIVERS = st.builds(
    waive,
    what=st.sampled_from([*ITEMS, FOUR_EYES, "heldout.accuracy"]),
    until=st.none() | st.floats(0, 2 * NOW),
    model=st.sampled_from([None, "digits", "fraud"]),
)
GATES = st.builds(
    StageGate,
    checks=st.lists(st.sampled_from([*ITEMS, "ours", "unknown"]), max_size=4).map(tuple),
    rules=st.lists(
        st.builds(
            Rule,
            metric=st.sampled_from(["heldout.accuracy", "heldout.bare", "heldout.none"]),
            at_least=st.floats(0, 1),
        ),
        max_size=2,
    ).map(tuple),
    approvals=st.integers(0, 2),
)
GOOD = {ItemStatus.PASS, ItemStatus.ATTESTED}


@given(
    GATES,
    st.sampled_from([Stage.STAGING, Stage.PRODUCTION]),
    st.lists(FINDINGS, max_size=6),
    st.lists(APPROVALS, max_size=3),
    st.lists(WAIVERS, max_size=3),
    st.booleans(),
)
def test_a_pass_rests_on_evidence(gate, stage, findings, approvals, waivers, first) -> None:
    out = judged(
        gate, stage=stage, findings=findings, approvals=approvals, waivers=waivers, first=first
    )
    assert out.items
    assert out.paragraph.startswith("digits@3 ")
    if any(item.verdict is ItemStatus.FAIL for item in out.items):
        assert out.verdict is GateVerdict.FAIL
    if not out.passed:
        return
    assert all(item.verdict in {*GOOD, ItemStatus.WAIVED} for item in out.items)
    assert any(item.verdict in GOOD for item in out.items)
    for item in out.items:
        if item.what in ITEMS and item.verdict is ItemStatus.PASS:
            assert any(
                one.finding.check == item.what
                and one.release == "sha256:a"
                and one.finding.verdict is Verdict.PASS
                and not one.finding.stale(NOW)
                for one in findings
            )
    # Take all evidence away, and the same gate holds.
    bare = judged(gate, stage=stage, waivers=waivers, first=first)
    if not gate.rules:
        assert not bare.passed


# --- confirmation and the policy itself ---------------------------------------------------------


def confirmed(checks, findings=()):
    return judge_confirmation(
        Confirm(checks=checks), release=RELEASE, findings=findings, waivers=(),
        checklist=CHECKLIST, now=NOW, first=False,
    )  # fmt: skip


def test_a_move_is_confirmed_in_production() -> None:
    assert confirmed(()).verdict is GateVerdict.HOLD
    assert confirmed(("own.done",), [seen("own.done")]).verdict is GateVerdict.HOLD
    assert confirmed(("own.done",), [seen("own.done", stage=Stage.PRODUCTION)]).passed
    assert confirmed(("own.live",)).verdict is GateVerdict.HOLD  # can't be known then


def test_a_policy_that_asks_for_the_impossible_is_told() -> None:
    promotion = Promotion(
        staging=StageGate(checks=("own.live", "own.reg", "ours")),
        production=StageGate(checks=("own.later", "own.liv")),
        confirm=Confirm(checks=("own.reg",)),
    )
    told = unmeetable(promotion, CHECKLIST)
    assert len(told) == 4
    assert any("own.live can't be known at promotion.staging" in one for one in told)


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_ask_for_the_possible(preset) -> None:
    from shipworthy.release.catalogue import built_in

    policy = Policy.model_validate(with_preset({"model": "digits", "preset": preset}))
    assert unmeetable(policy.promotion, built_in()) == []
