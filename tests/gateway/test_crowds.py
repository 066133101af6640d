"""Crowds of streams that are broken off on both sides: nothing of them is left afterwards."""

import asyncio
import contextlib
import gc
import random
import resource
from collections import Counter
from typing import Any

import msgspec
import pytest

from shipworthy.domain.plan import Capture, Endpoint, Hedge, Limits, Mirror, Price
from shipworthy.domain.records import InferenceRecord
from shipworthy.gateway.connection import Connections
from shipworthy.gateway.http import BodyMemory
from shipworthy.gateway.shield import Gate
from shipworthy.gateway.upstream import EndpointState
from shipworthy.gateway.wire import Wire
from shipworthy.stores.limits import UsageTable


def changed(it, **changes: Any):
    return msgspec.structs.replace(it, **changes)


def all_of(kind: type) -> list[Any]:
    return [one for one in gc.get_objects() if isinstance(one, kind)]


def wires() -> int:
    """How many connections to servers there are, or are remembered."""
    gc.collect()
    return len(all_of(Wire))


class Crowd:
    """Servers and clients that do all kinds of things, by chance of a fixed seed."""

    def __init__(self, worker, model, seed: int) -> None:
        self.worker = worker
        self.model = model
        self.chance = random.Random(seed)
        self.ends: Counter[str] = Counter()

    async def serve(self, writer: asyncio.StreamWriter) -> None:
        model, draw = self.model, self.chance.random()
        pieces: list[bytes | float] = [model.chunk()]
        for _ in range(self.chance.randrange(8)):
            pieces += [model.chunk("x" * self.chance.randrange(2000)), self.chance.random() * 0.05]
        then = None
        if draw < 0.1:
            then = model.resetting
        elif draw < 0.2:
            then = model.closing
        elif draw < 0.25:
            then = model.hanging
        elif draw < 0.3:
            return await model.responding(b"", "500 No")(writer)
        elif draw < 0.33:
            return await model.garbage(writer)
        elif draw < 0.36:
            return await model.responding(model.chat_answer())(writer)
        elif draw < 0.4:
            pieces.append(model.event_of({"error": {"message": "boom"}}))
        else:
            pieces += [model.LAST, model.DONE]
        return await model.streaming(*pieces, then=then)(writer)

    async def call(self, number: int) -> None:
        body = msgspec.json.encode(self.model.chat_of(stream=True, user=f"u{number}"))
        head = (
            f"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\n"
            f"authorization: Bearer {self.worker.keys['client']}\r\nconnection: close\r\n\r\n"
        ).encode()
        draw = self.chance.random()
        await asyncio.sleep(self.chance.random() * 0.5)
        reader, writer = await asyncio.open_connection("127.0.0.1", self.worker.port)
        try:
            if draw < 0.05:  # leaves within its request
                writer.write((head + body)[: self.chance.randrange(len(head + body))])
                self.ends["half"] += 1
            elif draw < 0.3:  # leaves amid the answer
                writer.write(head + body)
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(self.chance.random()):
                        await reader.read(self.chance.randrange(1, 4000))
                self.ends["left"] += 1
            else:
                writer.write(head + body)
                async with asyncio.timeout(60):
                    answer = await reader.read()
                status, _, rest = answer.partition(b"\r\n\r\n")
                ended = b"chunked" not in status or rest.endswith(b"\r\n0\r\n\r\n")
                self.ends["whole" if ended and rest else "broken"] += 1
        except (ConnectionError, TimeoutError) as error:
            self.ends[type(error).__name__] += 1
        finally:
            writer.transport.abort()


@pytest.mark.parametrize(
    ("clients", "seed"), [(300, 1), pytest.param(2000, 2, marks=pytest.mark.long)]
)
@pytest.mark.timeout(300)
async def test_nothing_is_left_of_a_crowd(worker, model, tmp_path, caplog, clients, seed):
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    before = wires()
    table = UsageTable(tmp_path / "limits", worker.clock)
    worker.outside["limits"] = table
    keys = dict(worker.snapshot.keys)
    limits = Limits(concurrency=100_000, tokens_per_minute=10**9)
    keys["client"] = changed(keys["client"], limits=limits)
    worker.snapshot = changed(worker.snapshot, keys=keys)
    crowd = Crowd(worker, model, seed)
    worker.model.behave = worker.candidate_model.behave = crowd.serve
    plan = worker.plan(
        candidate=True,
        weight=5_000,
        contract=model.language,
        limits=Limits(concurrency=100_000, budget_per_day=10**6),
        capture=Capture(payloads="full"),
        deadlines=model.Deadlines(connect=20.0, attempt=5.0, total=30.0, idle=3.0),
    )
    arm = changed(
        plan.stable,
        price=Price(per_call=1.0),
        endpoints=(
            Endpoint(url=worker.candidate_model.url, concurrency=200),
            *plan.stable.endpoints,
        ),
    )
    plan = changed(plan, stable=arm, mirror=Mirror(arm=arm, share=0.3))
    await worker.start(plan, max_connections=5000, max_in_flight=5000, max_queued=5000)
    await asyncio.gather(*[crowd.call(number) for number in range(clients)])

    assert crowd.ends["broken"] == 0
    assert crowd.ends["whole"] > clients / 2
    assert sum(crowd.ends.values()) == clients
    [connections] = [one for one in all_of(Connections) if one.options.max_connections == 5000]
    states = [one for one in all_of(EndpointState) if one.url in (worker.model.url, worker.candidate_model.url)]  # fmt: skip  # noqa: E501
    await worker.until(lambda: not connections.open and not connections.tasks, 30)
    await worker.until(lambda: not any(one.outstanding for one in states), 30)
    await worker.until(lambda: worker.model.open == worker.candidate_model.open == 0, 30)
    assert {gate.inside for gate in all_of(Gate)} == {0}
    assert {memory.held for memory in all_of(BodyMemory)} == {0}
    minute = int(worker.clock() // 60)
    rows = table.rows(["key client", "plan digits", "plan digits mirror"])
    for row in rows.values():
        assert row.usage(minute, minute // 1440)[5] == 0  # calls under way
    calls = [one for one in worker.journal.records if isinstance(one, InferenceRecord)]
    assert len({one.id for one in calls}) == len(calls)
    assert clients * 0.9 < len(calls) <= clients
    assert await worker.metric("shipworthy_gateway_errors_total") == 0
    assert [one.message for one in caplog.records if one.levelname == "ERROR"] == []
    # What is kept of connections goes too, and no task waits for any of them.
    await worker.until(lambda: wires() == before, 30)
    await worker.stop()
    ours = ("ClientConnection", "Mirrors", "Upstream", "Attempts")
    tasks = [repr(task.get_coro()) for task in asyncio.all_tasks()]
    assert not [task for task in tasks if any(name in task for name in ours)]


async def test_nothing_is_left_of_second_attempts(worker, model):
    chance = random.Random(3)
    good = model.responding(model.answer_of(1))

    async def serve(writer: asyncio.StreamWriter) -> None:
        await asyncio.sleep(chance.random() * 0.1)
        draw = chance.random()
        if draw < 0.1:
            await model.resetting(writer)
        elif draw < 0.15:
            await model.hanging(writer)
        else:
            await good(writer)

    worker.model.behave = worker.candidate_model.behave = serve
    plan = worker.plan(deadlines=model.Deadlines(connect=20.0, attempt=3.0, total=10.0))
    urls = (worker.model.url, worker.candidate_model.url)
    endpoints = tuple(Endpoint(url=url, concurrency=30) for url in urls)
    arm = changed(plan.stable, endpoints=endpoints)
    await worker.start(changed(plan, stable=arm, hedge=Hedge(after=0.05, ratio=1.0)))
    ends: Counter[str] = Counter()

    async def call() -> None:
        await asyncio.sleep(chance.random())
        try:
            async with asyncio.timeout(chance.random() * 0.1 if chance.random() < 0.3 else 30):
                ends[str((await worker.infer()).status)] += 1
        except TimeoutError:
            ends["left"] += 1

    await asyncio.gather(*[call() for _ in range(300)])
    assert ends["200"] > 150
    assert ends["left"] > 20
    states = [one for one in all_of(EndpointState) if one.url in urls]
    assert states
    await worker.until(lambda: not any(one.outstanding for one in states), 10)
    assert {gate.inside for gate in all_of(Gate)} == {0}
    await worker.until(lambda: worker.model.open == worker.candidate_model.open == 0, 10)
    assert {memory.held for memory in all_of(BodyMemory)} == {0}
    assert {one.attempts for one in worker.journal.calls} >= {1, 2}
    assert await worker.metric("shipworthy_gateway_errors_total") == 0
