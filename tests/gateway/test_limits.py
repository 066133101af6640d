"""Limits hold over all workers of a host, whatever these do, and let through what they allow."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any, Self

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shipworthy.domain.contract import Contract
from shipworthy.domain.plan import Arm, Key, Limits, Plan, Snapshot
from shipworthy.gateway.limits import Admission, Denial, LimitBook
from shipworthy.stores.limits import UsageTable

NOW = 1_900_000_830.0
NOTHING = Limits()


class Clock:
    def __init__(self) -> None:
        self.now = NOW

    def __call__(self) -> float:
        return self.now


def a_key(limits: Limits, id: str = "k") -> Key:
    return Key(id=id, hash="", role="client", limits=limits)


def a_plan(limits: Limits, name: str = "m") -> Plan:
    arm = Arm(release="m:1", digest="d", version=1, endpoints=(), served_model="m", contract=Contract())  # fmt: skip  # noqa: E501
    return Plan(name=name, model=name, revision=1, fence=1, stable=arm, limits=limits)


class Worker:
    """A worker's book on the table that it shares."""

    def __init__(self, folder: Path, clock: Clock) -> None:
        self.table = UsageTable(folder / "limits", clock)
        self.book = LimitBook(self.table, clock)

    def obey(self, of_key: Limits = NOTHING, of_plan: Limits = NOTHING) -> Worker:
        self.key, self.plan = a_key(of_key), a_plan(of_plan)
        snapshot = Snapshot(written=0, plans={"m": self.plan}, keys={"k": self.key})
        self.book.obey(snapshot)
        return self

    def ask(self, tokens: int = 0, cost: float = 0.0) -> Admission | Denial:
        return self.book.admit(self.key, self.plan, tokens=tokens, cost=cost)

    def admitted(self, tokens: int = 0, cost: float = 0.0) -> Admission:
        answer = self.ask(tokens, cost)
        assert isinstance(answer, Admission)
        return answer

    def denied(self, tokens: int = 0, cost: float = 0.0) -> Denial:
        answer = self.ask(tokens, cost)
        assert isinstance(answer, Denial)
        assert answer.status == 429
        return answer


@pytest.fixture
def clock() -> Clock:
    return Clock()


def test_without_limits_everything_is_admitted_and_nothing_told(tmp_path: Path, clock: Clock):
    worker = Worker(tmp_path, clock).obey()
    admission = worker.admitted(10**9, 1e9)
    admission.settle(10**9, 1e9)
    assert admission.lines == b""
    assert worker.admitted() is admission  # at no cost


def test_requests_are_limited_over_all_workers(tmp_path: Path, clock: Clock):
    workers = [Worker(tmp_path, clock).obey(Limits(requests_per_minute=5)) for _ in range(3)]
    admitted = [workers[number % 3].admitted() for number in range(5)]
    denial = workers[2].denied()
    assert (denial.code, denial.limit, denial.side) == ("rate_limit_exceeded", "requests", "key")
    assert denial.message == "the key k has used its 5 requests per minute; ask again in 31 s"
    headers = dict(denial.headers)
    assert headers[b"retry-after"] == b"31"
    assert headers[b"x-ratelimit-remaining-requests"] == b"0"
    for admission in admitted:
        admission.settle(0, 0)  # what was asked stays asked
    workers[0].denied()
    clock.now += 31
    workers[0].admitted()
    workers[1].denied()
    clock.now += 120
    assert told(workers[1].admitted())[b"x-ratelimit-remaining-requests"] == b"4"


def test_tokens_are_reserved_and_settled_on_what_was_used(tmp_path: Path, clock: Clock):
    one, other = (Worker(tmp_path, clock).obey(Limits(tokens_per_minute=100)) for _ in range(2))
    reserved = one.admitted(80)
    assert told(reserved)[b"x-ratelimit-remaining-tokens"] == b"20"
    denial = other.denied(30)
    assert (denial.code, denial.limit) == ("rate_limit_exceeded", "tokens")
    reserved.settle(50, 0.0)
    more = other.admitted(30)
    more.settle(45, 0.0)  # more than was reserved counts too
    more.settle(0, 0.0)  # and only once
    assert "100 tokens per minute" in one.denied(6).message
    one.admitted(5)


def test_what_a_long_call_used_beyond_its_reservation_counts_when_it_ends(
    tmp_path: Path, clock: Clock
):
    worker = Worker(tmp_path, clock).obey(Limits(tokens_per_minute=100, budget_per_day=1.0))
    call = worker.admitted(50, 0.5)
    clock.now += 600
    call.settle(150, 0.9)
    worker.denied(1)
    clock.now += 120
    assert told(worker.admitted(1))[b"x-shipworthy-budget-remaining"] == b"0.100000"


def test_places_are_taken_and_freed(tmp_path: Path, clock: Clock):
    one, other = (Worker(tmp_path, clock).obey(Limits(concurrency=2)) for _ in range(2))
    first, _second = one.admitted(), other.admitted()
    denial = one.denied()
    assert (denial.code, denial.limit) == ("concurrency_exceeded", "concurrency")
    assert dict(denial.headers)[b"retry-after"] == b"1"
    first.settle(0, 0)
    other.admitted()
    one.denied()


def test_a_budget_lasts_until_midnight(tmp_path: Path, clock: Clock):
    one, other = (Worker(tmp_path, clock).obey(Limits(budget_per_day=1.0)) for _ in range(2))
    one.admitted(0, 0.6).settle(0, 0.5)
    denial = other.denied(0, 0.6)
    assert (denial.code, denial.limit) == ("budget_exceeded", "budget")
    assert denial.message.startswith("the key k has not enough left of its budget of 1 a day")
    admission = other.admitted(0, 0.4)
    assert told(admission) == {b"x-shipworthy-budget-remaining": b"0.100000"}
    clock.now += int(dict(denial.headers)[b"retry-after"])
    one.admitted(0, 1.0)
    other.denied(0, 0.1)


def test_costs_below_the_smallest_unit_add_up(tmp_path: Path, clock: Clock):
    worker = Worker(tmp_path, clock).obey(Limits(budget_per_day=1.0))
    for _ in range(1_000):
        worker.admitted(0, 2.5e-7).settle(0, 2.5e-7)
    left = told(worker.admitted())[b"x-shipworthy-budget-remaining"]
    assert left == b"0.999750"


def test_the_tighter_of_key_and_model_counts_and_is_told(tmp_path: Path, clock: Clock):
    worker = Worker(tmp_path, clock).obey(
        Limits(requests_per_minute=10, tokens_per_minute=50, budget_per_day=5),
        Limits(requests_per_minute=3, tokens_per_minute=500, budget_per_day=9),
    )
    headers = told(worker.admitted(20, 1.0))
    assert headers[b"x-ratelimit-limit-requests"] == b"3"
    assert headers[b"x-ratelimit-limit-tokens"] == b"50"
    assert headers[b"x-ratelimit-remaining-tokens"] == b"30"
    assert headers[b"x-shipworthy-budget-remaining"] == b"4.000000"
    worker.admitted(20)
    assert worker.denied(20).side == "key"
    worker.admitted(1)
    denial = worker.denied(1)
    assert (denial.side, denial.limit) == ("model", "requests")
    # Who is refused by one has used nothing of the other.
    assert dict(denial.headers)[b"x-ratelimit-remaining-tokens"] == b"9"


def test_a_request_above_a_whole_limit_is_told_so(tmp_path: Path, clock: Clock):
    worker = Worker(tmp_path, clock).obey(Limits(tokens_per_minute=100))
    denial = worker.denied(101)
    assert denial.code == "request_too_large"
    assert "send a shorter one" in denial.message
    assert (b"x-should-retry", b"false") in denial.headers
    worker.admitted(100)


@pytest.mark.parametrize(
    "used", [(-5, -1.0), (10**30, 1e300), (3, float("nan")), (3, float("inf"))]
)
def test_usage_that_can_t_be_true_ends_nobody(
    used: tuple[int, float], tmp_path: Path, clock: Clock
):
    worker = Worker(tmp_path, clock).obey(
        Limits(requests_per_minute=10, tokens_per_minute=100, concurrency=1, budget_per_day=1.0)
    )
    worker.admitted(10, 0.1).settle(*used)
    clock.now += 86_400
    worker.admitted(10, 0.1)
    worker.denied(*used)  # the one place is taken


def test_limits_that_change_go_on_from_what_was_used(tmp_path: Path, clock: Clock):
    worker = Worker(tmp_path, clock).obey(Limits(requests_per_minute=5, concurrency=9))
    calls = [worker.admitted() for _ in range(5)]
    worker.obey(Limits(requests_per_minute=7, concurrency=6))
    worker.admitted()
    assert worker.denied().limit == "concurrency"
    calls[0].settle(0, 0)
    worker.admitted()
    worker.obey()
    for call in calls:
        call.settle(0, 0)
    worker.obey(Limits(concurrency=3))
    worker.admitted()
    worker.denied()


def test_a_restart_keeps_what_was_used(tmp_path: Path, clock: Clock):
    limits = Limits(requests_per_minute=2, budget_per_day=1.0, concurrency=1)
    before = Worker(tmp_path, clock).obey(limits)
    before.admitted(0, 0.7)  # which is never settled
    before.table.close()
    after = Worker(tmp_path, clock).obey(limits)
    assert after.denied(0, 0.4).limit == "budget"
    after.admitted(0, 0.3).settle(0, 0.3)
    assert after.denied().limit == "requests"


def test_a_clock_set_back_locks_nobody_out(tmp_path: Path, clock: Clock):
    limits = Limits(requests_per_minute=2, budget_per_day=1.0)
    one, other = (Worker(tmp_path, clock).obey(limits) for _ in range(2))
    clock.now += 10 * 86_400
    for _ in range(2):
        one.admitted(0, 0.5)
    other.denied()
    clock.now -= 10 * 86_400
    other.admitted(0, 0.5)
    one.admitted(0, 0.5)
    one.denied()


class Truth:
    """What was admitted, and what of it is settled, as nobody's cells could tell."""

    def __init__(self) -> None:
        self.requests: Counter[int] = Counter()
        self.tokens: Counter[int] = Counter()
        self.spent: Counter[int] = Counter()
        self.running = 0

    def within(self, limits: Limits, now: float) -> None:
        minute = int(now // 60)
        assert self.requests[minute] <= (limits.requests_per_minute or 0)
        assert self.tokens[minute] <= (limits.tokens_per_minute or 0)
        assert self.spent[minute // 1440] <= round((limits.budget_per_day or 0) * 1e6)
        assert self.running <= (limits.concurrency or 0)


_ACTS = st.one_of(
    st.tuples(st.just("ask"), st.integers(0, 2), st.integers(0, 30), st.integers(0, 200_000)),
    st.tuples(st.just("settle"), st.integers(0, 30), st.integers(0, 100), st.just(0)),
    st.tuples(st.just("wait"), st.integers(0, 40), st.just(0), st.just(0)),
    st.tuples(st.just("restart"), st.integers(0, 2), st.just(0), st.just(0)),
    st.tuples(st.just("tidy"), st.integers(0, 2), st.just(0), st.just(0)),
)


@settings(deadline=None)
@given(st.lists(_ACTS, max_size=60))
def test_whatever_workers_do_no_limit_is_exceeded(
    tmp_path_factory: pytest.TempPathFactory, acts: list[tuple[str, int, int, int]]
):
    limits = Limits(requests_per_minute=8, tokens_per_minute=60, concurrency=4, budget_per_day=1.0)
    folder, clock, truth = tmp_path_factory.mktemp("limits"), Clock(), Truth()
    workers = [Worker(folder, clock).obey(limits) for _ in range(3)]
    calls: list[tuple[Worker, Admission, float, int, int]] = []
    for act, number, share, micros in acts:
        if act == "ask":
            answer = workers[number].ask(share, micros / 1e6)
            if isinstance(answer, Admission):
                minute = int(clock.now // 60)
                truth.requests[minute] += 1
                truth.tokens[minute] += share
                truth.spent[minute // 1440] += micros
                truth.running += 1
                calls.append((workers[number], answer, clock.now, share, micros))
                truth.within(limits, clock.now)
            else:
                assert_justified(limits, truth, clock.now, share, micros)
        elif act == "settle" and calls:
            _, answer, then, tokens, cost = calls.pop(number % len(calls))
            used = tokens * share // 100
            spent = cost * share // 100
            answer.settle(used, spent / 1e6)
            minute = int(then // 60)
            truth.tokens[minute] -= tokens - used
            truth.spent[minute // 1440] -= cost - spent
            truth.running -= 1
        elif act == "wait":
            clock.now += number
        elif act == "restart":
            gone = workers[number]
            truth.running -= sum(1 for call in calls if call[0] is gone)
            calls = [call for call in calls if call[0] is not gone]
            gone.table.close()
            workers[number] = Worker(folder, clock).obey(limits)
        elif act == "tidy":
            workers[number].table.tidy()
    for worker in workers:
        worker.table.close()


def assert_justified(limits: Limits, truth: Truth, now: float, tokens: int, micros: int) -> None:
    """A refusal is no worker's whim: with the request, some limit would have been exceeded."""
    minute, left = int(now // 60), 60 - now % 60
    requests = truth.requests[minute] + 1 + truth.requests[minute - 1] * left / 60
    counted = truth.tokens[minute] + tokens + truth.tokens[minute - 1] * left / 60
    assert (
        requests > (limits.requests_per_minute or 0)
        or counted > (limits.tokens_per_minute or 0)
        or truth.running + 1 > (limits.concurrency or 0)
        # A restart forgets fractions of a millionth, and nothing else.
        or truth.spent[minute // 1440] + micros > (limits.budget_per_day or 0) * 1e6 - 100
    )


# --- processes --------------------------------------------------------------------------------

_HAMMER = """
import json, os, sys, time
from pathlib import Path
sys.path[:0] = json.loads(sys.argv[1])
from shipworthy.domain.contract import Contract
from shipworthy.domain.plan import Arm, Key, Limits, Plan, Snapshot
from shipworthy.gateway.limits import Admission, LimitBook
from shipworthy.stores.limits import UsageTable

what, at, turns = sys.argv[3], float(sys.argv[5]), int(sys.argv[6])
limits = Limits(**json.loads(sys.argv[4]))
clock = lambda: at
table = UsageTable(Path(sys.argv[2]), clock)
book = LimitBook(table, clock)
arm = Arm(release="m:1", digest="d", version=1, endpoints=(), served_model="m", contract=Contract())
plan = Plan(name="m", model="m", revision=1, fence=1, stable=arm)
key = Key(id="k", hash="", role="client", limits=limits)
book.obey(Snapshot(written=0, plans={"m": plan}, keys={"k": key}))
print("ready", flush=True)
sys.stdin.readline()
held, log = [], []
for turn in range(turns):
    answer = book.admit(key, plan, tokens=3, cost=0.000007)
    if isinstance(answer, Admission):
        if what == "hold":
            held.append(answer)
        else:
            begin = time.monotonic_ns()
            for _ in range(turn % 7 * 20):
                pass
            end = time.monotonic_ns()
            answer.settle(3, 0.000007)
            log.append((begin, end))
print(json.dumps({"held": len(held), "log": log}), flush=True)
sys.stdin.readline()
"""


class Hammers:
    """Processes that ask for the same key at once, as fast as they can."""

    def __init__(self, folder: Path, what: str, limits: dict[str, Any], turns: int, count: int = 4):
        command = [
            sys.executable,
            "-c",
            _HAMMER,
            json.dumps(sys.path),
            str(folder / "limits"),
            what,
        ]
        command += [json.dumps(limits), str(NOW), str(turns)]
        self.processes = [
            subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            for _ in range(count)
        ]
        for process in self.processes:
            assert self.line(process) == "ready"

    def line(self, process: subprocess.Popen[str]) -> str:
        assert process.stdout is not None
        return process.stdout.readline().strip()

    def tell(self, process: subprocess.Popen[str]) -> None:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()

    def results(self) -> list[dict[str, Any]]:
        for process in self.processes:
            self.tell(process)
        return [json.loads(self.line(process)) for process in self.processes]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes:
            process.kill()
            process.communicate()


@pytest.mark.parametrize(
    "limits",
    [
        {"requests_per_minute": 1_000},
        {"tokens_per_minute": 3_000},
        {"concurrency": 1_000},
        {"budget_per_day": 0.007},
    ],
    ids=lambda limits: next(iter(limits)),
)
def test_processes_that_hammer_one_key_get_its_limit_and_no_more(
    limits: dict[str, Any], tmp_path: Path
):
    with Hammers(tmp_path, "hold", limits, turns=4_000) as hammers:
        assert sum(result["held"] for result in hammers.results()) == 1_000


def test_at_no_time_more_is_under_way_than_the_limit(tmp_path: Path):
    with Hammers(tmp_path, "settle", {"concurrency": 2}, turns=5_000) as hammers:
        logs = [entry for result in hammers.results() for entry in result["log"]]
    assert len(logs) > 5_000
    events = sorted([(begin, 1) for begin, _ in logs] + [(end, -1) for _, end in logs])
    under_way = most = 0
    for _, step in events:
        under_way += step
        most = max(most, under_way)
    assert most <= 2


def test_places_of_a_killed_worker_come_back_and_a_stopped_one_blocks_nobody(
    tmp_path: Path, clock: Clock
):
    worker = Worker(tmp_path, clock).obey(Limits(concurrency=10))
    with Hammers(tmp_path, "hold", {"concurrency": 10}, turns=5, count=2) as hammers:
        assert [result["held"] for result in hammers.results()] == [5, 5]
        worker.denied()
        killed, stopped = hammers.processes
        os.kill(stopped.pid, signal.SIGSTOP)
        os.waitid(os.P_PID, stopped.pid, os.WSTOPPED)
        worker.table.tidy()
        assert worker.denied().limit == "concurrency"
        killed.kill()
        killed.wait(30)
        worker.table.tidy()
        for _ in range(5):
            worker.admitted()
        worker.denied()
        another = Worker(tmp_path, clock).obey(Limits(concurrency=12))
        another.admitted()
        another.admitted()
        another.denied()


def test_a_worker_that_is_stopped_amid_its_work_blocks_nobody(tmp_path: Path, clock: Clock):
    limits = {"requests_per_minute": 10**6, "concurrency": 2}
    worker = Worker(tmp_path, clock).obey(Limits(**limits))
    with Hammers(tmp_path, "settle", limits, turns=10**8, count=1) as hammers:
        (process,) = hammers.processes
        hammers.tell(process)
        for _ in range(20):
            os.kill(process.pid, signal.SIGSTOP)
            os.waitid(os.P_PID, process.pid, os.WSTOPPED)
            worker.admitted().settle(0, 0)
            os.kill(process.pid, signal.SIGCONT)


def told(admission):
    """What its header lines say."""
    return dict(line.split(b": ", 1) for line in admission.lines.splitlines())
