"""Budgets, breakers and gates by themselves."""

import asyncio

from hypothesis import given
from hypothesis import strategies as st

from shipworthy.gateway.options import GatewayOptions
from shipworthy.gateway.shield import Breaker, Budget, Gate
from shipworthy.gateway.upstream import EndpointState, pick
from shipworthy.protocols.outcomes import Reason


@given(
    ratio=st.floats(0, 2),
    burst=st.integers(0, 20),
    steps=st.lists(st.booleans(), max_size=200),
)
def test_a_budget_allows_a_share_of_traffic_and_a_burst(ratio, burst, steps):
    budget = Budget(ratio, burst)
    spent = earned = 0
    for earn in steps:
        if earn:
            budget.earn()
            earned += 1
        else:
            spent += budget.spend()
    assert spent <= burst + ratio * earned + 1e-6


def test_a_budget_refills_with_traffic():
    budget = Budget(0.5, 1)
    assert budget.spend()
    assert not budget.spend()
    budget.earn()
    assert not budget.spend()
    budget.earn()
    assert budget.spend()


def test_a_breaker_counts_only_its_window():
    breaker = Breaker(window=4, failures=3, seconds=10)
    for failed in (True, True, False, False, False, True, True):
        breaker.note(failed=failed, now=0)
        assert breaker.allows(0)
    breaker.note(failed=True, now=0)
    assert breaker.open
    assert not breaker.allows(9.9)


def test_an_open_breaker_lets_one_trial_through_at_a_time():
    breaker = Breaker(window=1, failures=1, seconds=10)
    breaker.note(failed=True, now=0)
    breaker.note(failed=False, now=1)  # a call from before it opened changes nothing
    assert breaker.open
    assert breaker.allows(10)
    assert not breaker.allows(11)
    assert breaker.allows(20)  # the first trial never came back
    breaker.note(failed=True, now=21)
    assert not breaker.allows(30)
    assert breaker.allows(31)
    breaker.note(failed=False, now=32)
    assert not breaker.open
    assert breaker.allows(32)


async def test_a_gate_lets_in_as_many_as_allowed_in_order():
    gate = Gate(limit=1, waiting=2)
    assert await gate.enter(1)
    order: list[int] = []

    async def visit(number: int) -> None:
        assert await gate.enter(1)
        order.append(number)
        gate.leave()

    visits = [asyncio.create_task(visit(number)) for number in range(2)]
    await asyncio.sleep(0)
    assert not await gate.enter(1)  # the line is full
    gate.leave()
    await asyncio.gather(*visits)
    assert order == [0, 1]
    assert gate.inside == 0


async def test_a_gate_forgets_who_gave_up():
    gate = Gate(limit=1, waiting=5)
    assert await gate.enter(1)
    assert not await gate.enter(0.01)
    leaver = asyncio.create_task(gate.enter(5))
    await asyncio.sleep(0)
    leaver.cancel()
    await asyncio.gather(leaver, return_exceptions=True)
    gate.leave()
    assert gate.inside == 0
    assert await gate.enter(0)
    assert not await gate.enter(0)


async def test_a_place_given_in_the_moment_of_leaving_is_not_lost():
    gate = Gate(limit=1, waiting=5)
    assert await gate.enter(1)
    leaver = asyncio.create_task(gate.enter(5))
    await asyncio.sleep(0)
    gate.leave()
    leaver.cancel()
    await asyncio.gather(leaver, return_exceptions=True)
    assert gate.inside == 0


def endpoint(outstanding=0, *, ejected=False):
    state = EndpointState("http://x", None, GatewayOptions(eject_after=2, eject_seconds=1.0))
    state.outstanding, state.ejected = outstanding, ejected
    return state


def test_the_least_busy_endpoint_is_picked_and_ties_go_round():
    a, b, c = endpoint(1), endpoint(0), endpoint(0)
    assert {pick((a, b, c), turn) for turn in range(4)} == {b, c}
    assert pick((a, b, c), 0, avoid=b) is c
    assert pick((a,), 0, avoid=a) is a
    b.ejected = True
    assert pick((a, b), 0) is a
    a.ejected = True
    assert pick((a, b), 0) is b  # all are doubtful: the least busy


def test_an_endpoint_is_set_aside_for_longer_each_time():
    state = endpoint()
    pauses = []
    for _ in range(3):
        while (pause := state.note(Reason.BROKEN)) is None:
            pass
        pauses.append(pause)
        state.readmit()
    assert pauses == [1.0, 2.0, 4.0]
    state.note(Reason.ANSWERED)
    assert state.note(Reason.TIMEOUT) is None
    assert state.note(Reason.OVERLOADED) is None
    assert state.note(Reason.REFUSED) is None
    assert state.note(Reason.TIMEOUT) is None
    assert state.note(Reason.TIMEOUT) == 1.0
    assert state.note(Reason.TIMEOUT) is None  # it is aside already
