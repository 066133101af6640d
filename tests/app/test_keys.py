"""Keys with limits: made, shown and changed on the command line, and what the log says of it."""

from __future__ import annotations

import json
from typing import Any

import pytest
from tests.app.conftest import Town


def listed(town: Town, holder: str) -> dict[str, Any]:
    found = json.loads(town.sw("keys", "list", "--json"))
    return next(each for each in found if each["holder"] == holder)


def logged(town: Town, act: str) -> list[dict[str, Any]]:
    return [each for each in json.loads(town.sw("audit", "log", "--json")) if each["act"] == act]


def test_a_key_has_the_limits_that_it_was_made_with(town: Town):
    options = ["--requests-per-minute", "60", "--tokens-per-minute", "20000"]
    town.key("web", "--service", *options, "--concurrency", "4", "--budget-per-day", "2.5")
    limits = {
        "requests_per_minute": 60,
        "tokens_per_minute": 20_000,
        "concurrency": 4,
        "budget_per_day": 2.5,
    }
    assert listed(town, "web")["limits"] == limits
    assert listed(town, "bob")["limits"] == {}
    table = town.sw("keys", "list")
    assert "60 requests/min, 20,000 tokens/min, 4 at once, 2.5 a day" in table
    made = logged(town, "create key")
    assert made[-1]["detail"]["limits"] == limits
    assert "limits" not in made[0]["detail"]


def test_limits_of_a_key_change_one_by_one_and_the_log_says_from_what(town: Town):
    town.key("web", "--requests-per-minute", "60", "--concurrency", "4")
    id = listed(town, "web")["id"]
    said = town.sw("keys", "limit", id, "--concurrency", "8", "--budget-per-day", "10")
    assert f"Key {id} now has limits: 60 requests/min, 8 at once, 10 a day." in said
    town.sw("keys", "limit", id, "--requests-per-minute", "none", "--tokens-per-minute", "500")
    now = {"tokens_per_minute": 500, "concurrency": 8, "budget_per_day": 10.0}
    assert listed(town, "web")["limits"] == now
    first, second = logged(town, "limit key")
    assert first["subject"] == id
    assert first["detail"]["before"] == {"requests_per_minute": 60, "concurrency": 4}
    assert second["detail"]["limits"] == now
    town.sw("audit", "verify")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["create", "x", "--requests-per-minute", "0"], "--requests-per-minute 0 is no limit"),
        (["create", "x", "--concurrency", "-1"], "give a number above 0"),
        (["create", "x", "--tokens-per-minute", f"{10**30}"], "up to 10^12"),
        (["create", "x", "--budget-per-day", "nan"], "--budget-per-day nan is no limit"),
        (["create", "x", "--budget-per-day", "inf"], "up to 10^12"),
        (["limit", "ID"], "name a limit"),
        (["limit", "ID", "--concurrency", "many"], "or none for no limit"),
        (["limit", "ID", "--concurrency", "2.5"], "--concurrency 2.5 is no limit"),
        (["limit", "ID", "--budget-per-day", "0"], "give a number above 0"),
        (["limit", "nobody", "--concurrency", "2"], "no key nobody is in force"),
    ],
)
def test_limits_that_make_no_sense_are_refused(town: Town, arguments: list[str], says: str):
    id = listed(town, "bob")["id"]
    done = town.run("keys", *(id if each == "ID" else each for each in arguments))
    assert done.code == 2
    assert says in done.output
    assert listed(town, "bob")["limits"] == {}


def test_a_revoked_key_has_no_limits_to_change(town: Town):
    id = listed(town, "bob")["id"]
    town.sw("keys", "revoke", id)
    done = town.run("keys", "limit", id, "--concurrency", "2")
    assert done.code == 2
    assert f"no key {id} is in force" in done.output
