"""Workers are replaced and killed while plans and keys change, under load: `bench/churn.py`."""

from __future__ import annotations

import pytest
from churn import Options, Outcome, churn

pytestmark = [pytest.mark.timeout(300), pytest.mark.xdist_group("churn")]


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    """A short one, at half of what the machine can do just now, and in no haste to obey."""
    options = Options(
        seconds=8.0, workers=2, load=0.5, kills=1, calibrate=2.0, replace_every=2.5, obeyed=10.0
    )
    return churn(tmp_path_factory.mktemp("churn"), options)


def test_nothing_is_dropped_or_misrouted_while_all_changes(outcome: Outcome) -> None:
    assert outcome.replaced >= 1
    assert outcome.calm.wrong == {}, outcome.calm.examples
    assert outcome.calm.statuses[200] > 100
    assert {one.kind for one in outcome.asked if one.status == 200} == {"infer", "chat", "stream"}
    assert {one.way for one in outcome.asked if one.status == 200} == {"kept", "resting", "new"}
    assert 0 < outcome.calm.to_candidates < outcome.calm.statuses[200]
    assert set(outcome.codes) == {0}


def test_a_killed_worker_breaks_only_what_was_under_way_in_it(outcome: Outcome) -> None:
    assert outcome.stormy.wrong == {}, outcome.stormy.examples
    assert outcome.stormy.statuses[200] > 20


def test_a_revoked_key_is_refused_and_one_given_back_is_good(outcome: Outcome) -> None:
    asked = [one for one in outcome.asked if one.key in {"lent", "leaked"}]
    refused = {one.key: one.began for one in asked if one.status == 401}
    accepted = {one.key: one.began for one in asked if one.status == 200}
    assert refused.keys() == accepted.keys() == {"lent", "leaked"}
    assert outcome.calm.statuses[401] == sum(one.status == 401 for one in asked)
    first = min(one.began for one in asked if one.status == 401)
    assert max(accepted.values()) > first


def test_a_limit_holds_over_all_workers_that_come_and_go(outcome: Outcome) -> None:
    assert outcome.excess <= 0
    assert outcome.admitted >= 50, "of 60 that are allowed in a minute"
    assert outcome.calm.statuses[429] > 0
