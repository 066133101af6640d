"""The table of outcomes."""

import pytest

from shipworthy.domain.records import Outcome
from shipworthy.protocols.outcomes import OUTCOMES, Reason, reason_of_status


def test_every_reason_has_a_class():
    assert set(OUTCOMES) == set(Reason)


@pytest.mark.parametrize(
    ("status", "reason"),
    [
        (200, Reason.ANSWERED), (500, Reason.SERVER_ERROR), (503, Reason.SERVER_ERROR),
        (599, Reason.SERVER_ERROR), (429, Reason.OVERLOADED), (400, Reason.REFUSED),
        (404, Reason.REFUSED), (422, Reason.REFUSED), (302, Reason.UNEXPECTED_STATUS),
        (204, Reason.UNEXPECTED_STATUS), (201, Reason.UNEXPECTED_STATUS),
    ],
)  # fmt: skip
def test_an_upstreams_status_says_why(status, reason):
    assert reason_of_status(status) is reason


def test_only_an_answer_is_a_success():
    assert [reason for reason, outcome in OUTCOMES.items() if outcome is Outcome.SUCCESS] == [
        Reason.ANSWERED
    ]


def test_no_other_status_is_anything_but_the_releases_failure():
    others = [*range(100, 200), *range(201, 600)]
    assert {OUTCOMES[reason_of_status(status)] for status in others} == {Outcome.FAILURE}
