"""Workers are replaced and killed while plans and keys change, under load: `bench/churn.py`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest
from churn import Options, Outcome, churn
from crowd import Asked
from reckoning import History, reckon
from shifts import SERVERS, Publisher

from shipworthy.domain import records
from shipworthy.domain.plan import Limits
from shipworthy.domain.records import InferenceRecord

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


# --- the eye ----------------------------------------------------------------------------------


@pytest.fixture
def publisher(tmp_path: Path) -> Publisher:
    """Two snapshots, the first of which has no candidates yet; the second lacks a key."""
    made = Publisher(tmp_path, list(range(SERVERS)), 1, Limits())
    made.revoke()
    made.publish()
    return made


def told(publisher: Publisher, **changes: Any) -> tuple[Asked, InferenceRecord]:
    """A request that was answered in line with the second snapshot."""
    seen = publisher.history[1]
    arm = seen.plans["digits"].stable
    place = int(arm.endpoints[0].url.rpartition(":")[2])
    said = (arm.version, place, 7)
    one = Asked(7, "digits", "infer", "shop", "u", seen.done, "kept", seen.done, seen.done + 1.0)
    one.status, one.inference, one.release, one.said = 200, "inf_1", arm.release, said
    record = InferenceRecord(
        id="inf_1", at=0.0, plan="digits", model="digits", revision=2, key="shop",
        assigned="stable", probability=1.0, outcome=records.Outcome.SUCCESS, status=200,
        release=arm.release, serving="stable", serving_release=arm.release,
    )  # fmt: skip
    for name, value in changes.items():
        if hasattr(one, name):
            setattr(one, name, value)
        else:
            record = msgspec.structs.replace(record, **{name.removeprefix("its_"): value})
    return one, record


def found(publisher: Publisher, *written: InferenceRecord, one: Asked) -> set[str]:
    history = History(publisher.history, publisher.ports, obeyed=0.5)
    return set(reckon([one], written, history).wrong)


def test_the_eye_finds_nothing_where_nothing_is_wrong(publisher: Publisher) -> None:
    one, record = told(publisher)
    assert found(publisher, record, one=one) == set()


@pytest.mark.parametrize(
    ("changes", "kind"),
    [
        ({"said": (9, 3, 7)}, "answered by another release than the one that was told"),
        ({"said": (1, 11, 7)}, "answered by a server that the plan does not name"),
        ({"said": (1, 3, 8)}, "got the answer to another request"),
        ({"release": "digits@9"}, "told of another release than the plan's"),
        ({"assigned": "candidate"}, "on another arm than its unit's"),
        ({"probability": 0.5}, "recorded with another split than the plan's"),
        ({"revision": 3}, "answered by a plan that was not there yet"),
        ({"serving": "fallback_message"}, "served by another arm than the assigned one"),
        ({"its_id": "inf_2"}, "answered, and not once in the journal"),
        ({"status": 0, "fault": "broken"}, "dropped"),
        ({"status": 503}, "refused with 503"),
    ],
)
def test_the_eye_misses_nothing(publisher: Publisher, changes: dict[str, Any], kind: str) -> None:
    one, record = told(publisher, **changes)
    assert kind in found(publisher, record, one=one)


def test_the_eye_sees_keys_and_plans_that_are_out_of_date(publisher: Publisher) -> None:
    one, record = told(publisher, key="lent")
    one.began, one.ended = one.began + 0.6, one.ended + 0.6
    assert found(publisher, record, one=one) == {"accepted long after its key was revoked"}
    one, record = told(publisher, revision=1)
    one.began += 0.6
    assert "answered by a plan that had been replaced long ago" in found(publisher, record, one=one)
    one, record = told(publisher, status=401)
    one.began += 0.6
    assert found(publisher, one=one) == {"refused although its key was good"}
    one, record = told(publisher)
    assert found(publisher, record, record, one=one) == {"answered, and not once in the journal"}
