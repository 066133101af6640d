"""The checklist as data: what a policy's names mean, and what an item's finding amounts to."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from shipworthy.domain.checklist import (
    ATTESTED_BY,
    Checklist,
    ChecklistItem,
    ItemStatus,
    Moment,
    status_of,
)
from shipworthy.domain.findings import Finding, Verdict
from shipworthy.domain.names import Stage
from shipworthy.domain.policy import PRESETS
from shipworthy.errors import NotFound, UsageError
from shipworthy.release.catalogue import built_in, load

ALL = built_in()


def item(id="own.check", **more):
    fields = {"group": "own", "when": ["P"], "title": "Ours", "observes": "What we say"}
    return ChecklistItem.model_validate({"id": id, **fields, **more})


def test_the_catalogue_is_whole() -> None:
    assert len(ALL.items) == 58
    assert {moment for one in ALL.items for moment in one.when} == set(Moment)
    assert {one.id for one in ALL.items if one.next} == {
        "contract.compatible", "quality.not-worse", "rollback.restorable", "traffic.moved",
        "old.retired",
    }  # fmt: skip


def test_names_mean_an_item_a_group_or_a_family() -> None:
    assert [one.id for one in ALL.select("assets.stored")] == ["assets.stored"]
    assert [one.id for one in ALL.select("assets")] == [
        "assets.stored", "assets.described", "assets.final-format",
    ]  # fmt: skip
    assert "rollout.rules" in {
        one.id for one in ALL.select("rollback")
    }  # the group, not the prefix
    for name in ALL.names():
        assert ALL.select(name)


def test_unknown_names_get_the_nearest() -> None:
    with pytest.raises(UsageError, match=r"did you mean 'contract\.enforced'"):
        ALL.select("contract.enforce")
    with pytest.raises(UsageError, match=r"did you mean 'owner\.contact'"):
        ALL.get("owner.contacts")
    assert len(ALL.unknown(["assets", "asets", "qqq"])) == 2


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_name_only_what_exists(preset) -> None:
    gates = PRESETS[preset]["promotion"].values()
    assert not ALL.unknown(name for gate in gates for name in gate["checks"])


def test_a_team_adds_and_replaces_items(tmp_path) -> None:
    file = tmp_path / "checks.yaml"
    file.write_text(
        "items:\n  - {id: own.check, group: own, when: [P], title: Ours, observes: What we say}\n"
        "  - {id: docs.card, group: documentation, when: [R], title: Card, observes: A card}\n"
    )
    more = load(file)
    assert len(more.items) == len(ALL.items) + 1
    assert more.get("docs.card").when == (Moment.REGISTRATION,)
    assert load() is ALL
    with pytest.raises(NotFound, match="check its path"):
        load(tmp_path / "nowhere.yaml")


def test_an_id_is_listed_once() -> None:
    with pytest.raises(ValidationError, match="listed twice"):
        Checklist(items=(item(), item()))
    with pytest.raises(ValidationError, match="twice"):
        item(when=["P", "P"])


@pytest.mark.parametrize(
    ("when", "staging", "production", "confirmed"),
    [
        ("R", {"development"}, {"development", "staging"}, set()),
        ("S", {"development"}, {"development", "staging"}, set()),
        ("P", set(), {"staging"}, set()),
        ("C", set(), set(), {"production"}),
        ("L", set(), set(), set()),
        ("PC", set(), {"staging"}, {"production"}),
    ],
)
def test_where_an_item_can_be_observed(when, staging, production, confirmed) -> None:
    one = item(when=list(when))
    assert one.observed_at(Stage.STAGING) == staging
    assert one.observed_at(Stage.PRODUCTION) == production
    assert one.observed_at(Stage.DEVELOPMENT) == frozenset()
    assert one.confirmed_at() == confirmed


def finding(verdict, expires=None, **evidence):
    return Finding(
        check="own.check", verdict=verdict, observed="x", threshold="y", at=0.0, expires=expires,
        evidence=evidence,
    )  # fmt: skip


def test_no_finding_is_not_measured() -> None:
    assert status_of(None, 0.0) is ItemStatus.INCONCLUSIVE


@given(st.sampled_from(Verdict), st.floats(0, 100), st.floats(0, 100))
def test_an_expired_finding_is_stale_whatever_it_said(verdict, expires, now) -> None:
    status = status_of(finding(verdict, expires), now)
    assert (status is ItemStatus.STALE) == (now >= expires)


def test_a_word_counts_as_attested_only_for_a_pass() -> None:
    assert status_of(finding(Verdict.PASS, **{ATTESTED_BY: "Ann"}), 0.0) is ItemStatus.ATTESTED
    assert status_of(finding(Verdict.FAIL, **{ATTESTED_BY: "Ann"}), 0.0) is ItemStatus.FAIL


@pytest.mark.parametrize("status", ItemStatus)
def test_bad_and_unknown_are_told_apart(status) -> None:
    assert status.holds == (status not in {"pass", "waived", "attested"})
    assert status.measured == (status in {"pass", "fail", "attested"})
