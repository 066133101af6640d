"""What limits allow, by simulation: never more than they say, and never less to who keeps them."""

from __future__ import annotations

from collections import Counter

from hypothesis import assume, given
from hypothesis import strategies as st

from shipworthy.domain.limits import (
    Usage,
    bounds_of,
    carried,
    excess_of,
    fits,
    micros_of,
    rate_headers,
    refusal_text,
    retry_headers,
    wait_seconds,
)
from shipworthy.domain.plan import Limits

USED = st.tuples(*[st.integers(0, most) for most in (100, 100, 900, 900)])
NOON = 1_900_000_800.0 // 86_400 * 86_400 + 43_200


class Minutes:
    """What was counted, as the workers' table keeps it."""

    def __init__(self) -> None:
        self.requests: Counter[int] = Counter()
        self.tokens: Counter[int] = Counter()

    def usage(self, now: float, requests: int = 0, tokens: int = 0) -> Usage:
        minute = int(now // 60)
        return (
            self.requests[minute - 1],
            self.requests[minute] + requests,
            self.tokens[minute - 1],
            self.tokens[minute] + tokens,
            0,
            0,
        )

    def admit(self, limits: Limits, now: float, tokens: int) -> bool:
        fitting = fits(bounds_of(limits), self.usage(now, 1, tokens), carried(now))
        if fitting:
            self.requests[int(now // 60)] += 1
            self.tokens[int(now // 60)] += tokens
        return fitting


@given(
    st.integers(1, 30),
    st.integers(1, 200),
    st.lists(st.tuples(st.floats(0, 20), st.integers(1, 60)), max_size=200),
    st.floats(0, 60),
)
def test_no_stretch_of_time_admits_more_than_the_limit_and_what_it_grants_meanwhile(
    per_minute: int, tokens_per_minute: int, asked: list[tuple[float, int]], start: float
):
    limits = Limits(requests_per_minute=per_minute, tokens_per_minute=tokens_per_minute)
    minutes, now, admitted = Minutes(), NOON + start, []
    for wait, tokens in asked:
        now += wait
        if minutes.admit(limits, now, tokens):
            admitted.append((now, tokens))
    for first, (begin, _) in enumerate(admitted):
        requests = total = 0
        for at, tokens in admitted[first:]:
            if at - begin > 60:
                break
            requests, total = requests + 1, total + tokens
            share = 1 + (at - begin) / 60
            assert requests < per_minute * share + 1
            assert total < tokens_per_minute * share + 1


@given(st.integers(2, 500), st.floats(1.0, 4.0), st.floats(0, 60))
def test_who_keeps_below_the_limit_is_never_refused(per_minute: int, slower: float, start: float):
    limits = Limits(requests_per_minute=per_minute)
    spacing = 60 / (per_minute - 1) * slower
    minutes = Minutes()
    for number in range(int(200 / spacing) + 1):
        assert minutes.admit(limits, NOON + start + number * spacing, 1)


@given(USED, st.integers(1, 40), st.integers(1, 400), st.integers(0, 400), st.floats(0, 59.99))
def test_a_refused_request_fits_after_the_time_that_is_told_and_not_long_before(
    used: tuple[int, ...], per_minute: int, most: int, tokens: int, second: float
):
    assume(tokens <= most)
    bounds = bounds_of(Limits(requests_per_minute=per_minute, tokens_per_minute=most))
    now = NOON + second

    def fitting(at: float) -> bool:
        minutes = Minutes()
        minute = int(NOON // 60)
        minutes.requests.update({minute - 1: used[0], minute: used[1]})
        minutes.tokens.update({minute - 1: used[2], minute: used[3]})
        return fits(bounds, minutes.usage(at, 1, tokens), carried(at))

    usage = (used[0], used[1], used[2], used[3], 0, 0)
    excess = excess_of(bounds, usage, tokens=tokens, micros=0, now=now)
    assert (excess is None) == fitting(now)
    if excess is not None:
        assert excess.wait is not None
        assert fitting(now + wait_seconds(excess))
        assert excess.wait < 0.01 or not fitting(now + excess.wait * 0.999)


def test_a_request_above_a_whole_limit_is_never_let_through_and_told_so():
    limits = Limits(tokens_per_minute=100, budget_per_day=2.0)
    bounds, nothing = bounds_of(limits), (0, 0, 0, 0, 0, 0)
    excess = excess_of(bounds, nothing, tokens=101, micros=0, now=NOON)
    assert excess is not None
    assert excess == ("tokens", None)
    text = refusal_text("the key k", limits, excess, tokens=101, cost=0)
    assert "101 tokens" in text
    assert "100 tokens per minute" in text
    assert "send a shorter one" in text
    assert retry_headers(excess) == [(b"x-should-retry", b"false")]
    excess = excess_of(bounds, nothing, tokens=1, micros=micros_of(2.5), now=NOON)
    assert excess is not None
    assert excess == ("budget", None)
    assert "2.5" in refusal_text("the key k", limits, excess, tokens=1, cost=2.5)


def test_a_limit_of_nothing_lets_nothing_through():
    limits = Limits(requests_per_minute=0, concurrency=0)
    excess = excess_of(bounds_of(limits), (0, 0, 0, 0, 0, 0), tokens=0, micros=0, now=NOON)
    assert excess is not None
    assert excess.wait is None
    assert "ask its owner" in refusal_text("the key k", limits, excess, tokens=0, cost=0)


def test_a_budget_begins_anew_at_midnight():
    limits = Limits(budget_per_day=2.0)
    usage = (0, 0, 0, 0, 1_900_000, 0)
    excess = excess_of(bounds_of(limits), usage, tokens=0, micros=200_000, now=NOON + 60)
    assert excess is not None
    assert excess == ("budget", 43_140)
    text = refusal_text("the key k", limits, excess, tokens=0, cost=0.2)
    assert "budget of 2 a day" in text
    assert "in 12 h 0 min" in text
    assert dict(retry_headers(excess)) == {b"retry-after": b"43141", b"x-should-retry": b"false"}
    assert excess_of(bounds_of(limits), usage, tokens=0, micros=100_000, now=NOON) is None


def test_a_place_may_come_free_at_any_time():
    limits = Limits(concurrency=3, requests_per_minute=100)
    excess = excess_of(bounds_of(limits), (0, 5, 0, 0, 0, 3), tokens=0, micros=0, now=NOON)
    assert excess is not None
    assert wait_seconds(excess) == 1
    assert "3 concurrent" in refusal_text("the key k", limits, excess, tokens=0, cost=0)


def test_of_several_limits_the_one_that_lasts_is_told():
    bounds = bounds_of(Limits(requests_per_minute=2, concurrency=1, tokens_per_minute=10))
    excess = excess_of(bounds, (0, 2, 0, 0, 0, 1), tokens=1, micros=0, now=NOON)
    assert excess is not None
    assert excess.what == "requests"
    excess = excess_of(bounds, (0, 2, 0, 0, 0, 1), tokens=11, micros=0, now=NOON)
    assert excess == ("tokens", None)


def test_headers_say_what_is_left():
    bounds = bounds_of(Limits(requests_per_minute=60, tokens_per_minute=600))
    usage = (30, 10, 0, 0, 0, 0)
    loose = bounds_of(Limits(requests_per_minute=61, budget_per_day=0.002))
    sides = [(bounds, usage), (loose, (0, 0, 0, 0, 750, 0))]
    assert rate_headers(sides, NOON + 20.5) == [
        (b"x-ratelimit-limit-requests", b"60"),
        (b"x-ratelimit-remaining-requests", b"31"),
        (b"x-ratelimit-reset-requests", b"1m40s"),
        (b"x-ratelimit-limit-tokens", b"600"),
        (b"x-ratelimit-remaining-tokens", b"600"),
        (b"x-ratelimit-reset-tokens", b"0s"),
        (b"x-shipworthy-budget-remaining", b"0.001250"),
    ]
    over = dict(rate_headers([(bounds, (60, 61, 0, 0, 0, 0))], NOON))
    assert over[b"x-ratelimit-remaining-requests"] == b"0"
    spent = dict(rate_headers([(loose, (0, 0, 0, 0, 2_001, 0))], NOON))
    assert spent[b"x-shipworthy-budget-remaining"] == b"0.000000"


@given(st.floats(0, 4e9), st.booleans(), st.booleans())
def test_any_moment_has_a_time_to_tell(now: float, before: bool, used: bool):
    bounds = bounds_of(Limits(requests_per_minute=60))
    headers = rate_headers([(bounds, (int(before), int(used), 0, 0, 0, 0))], now)
    assert headers[2][1].endswith(b"s")


@given(st.floats())
def test_any_number_is_an_amount_of_money(cost: float):
    micros = micros_of(cost)
    assert 0 <= micros < 1 << 40
    if 0 < cost < 1e5:
        assert 0 <= micros - cost * 1e6 < 1.01
