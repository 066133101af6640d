"""The supervisor's loops and children, through faults."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, cast

import pytest

from shipworthy.app import supervisor
from shipworthy.app.children import Child, next_wait
from shipworthy.errors import Unavailable


async def test_replicas_follow_the_ledger_again_behind_any_fault(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(supervisor, "RECONCILE_SECONDS", 0.001)
    stop = asyncio.Event()
    turns: list[Exception | None] = [
        RuntimeError("x"),
        RuntimeError("x"),
        Unavailable("away"),
        None,
    ]

    class Faulty:
        async def reconcile(self) -> None:
            fault = turns.pop(0)
            if fault is None:
                stop.set()
            else:
                raise fault

    await supervisor._reconcile(cast("Any", Faulty()), stop)
    assert not turns
    assert caplog.text.count("a fault of ours") == 1
    assert "away; what runs goes on running" in caplog.text


async def test_a_child_that_can_not_be_started_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shipworthy.app.children._FIRST_WAIT", 0.001)
    start = asyncio.create_subprocess_exec
    lacks = [OSError(24, "Too many open files"), OSError(12, "Cannot allocate memory")]

    async def lacking(*words: Any, **options: Any) -> Any:
        if lacks:
            raise lacks.pop()
        return await start(*words, **options)

    monkeypatch.setattr(asyncio, "create_subprocess_exec", lacking)
    child = child_of(tmp_path, "input()")
    async with kept(child):
        await until(lambda: child.pid is not None)
        assert child.restarts == 2
        assert "can't be started (Too many open files)" in child.problem


BEATING = """
import sys, time
from shipworthy.app.processes import Worker
worker = Worker()
print("begun", flush=True)
worker.stop.wait()
"""


def child_of(folder: Path, program: str, silence: float = 1.0) -> Child:
    command = (sys.executable, "-c", program)
    return Child("sleeper", command, folder / "log", silence, time.time)


@asynccontextmanager
async def kept(child: Child) -> AsyncGenerator[None]:
    """Kept running meanwhile; it ends with the test."""
    running = asyncio.create_task(child.run())
    try:
        async with asyncio.timeout(60):
            yield
    finally:
        child.kill()
        await running


async def until(what: Callable[[], object]) -> None:
    while not what():  # noqa: ASYNC110  # other processes set no event
        await asyncio.sleep(0.02)


def begun(child: Child) -> bool:
    return child.log_file.exists() and "begun" in child.log_file.read_text()


async def test_a_child_that_is_stopped_is_killed_and_started_again(tmp_path: Path) -> None:
    child = child_of(tmp_path, BEATING, silence=2.0)
    async with kept(child):
        await until(lambda: begun(child))
        await asyncio.sleep(1.5)  # its first words are heard
        first = child.pid
        assert first is not None
        os.kill(first, signal.SIGSTOP)
        await until(lambda: child.restarts == 1 and child.pid not in {None, first})
        assert child.problem.startswith("the sleeper said nothing for 2 s and was killed")
        assert child.state.problem_at > 0


async def test_a_child_whose_turn_never_ends_is_killed(tmp_path: Path) -> None:
    program = BEATING.replace("Worker()", "Worker(patience=1.0)").replace(
        "worker.stop.wait()", "worker.turn(lambda: time.sleep(1000))()"
    )
    child = child_of(tmp_path, program)
    async with kept(child):
        await until(lambda: child.restarts == 1)
        assert "said nothing for 1 s" in child.problem


async def test_a_supervisor_that_was_stopped_itself_kills_nobody(tmp_path: Path) -> None:
    """What was said while it stood still is heard before silence is counted."""
    child = child_of(tmp_path, BEATING, silence=2.0)
    async with kept(child):
        await until(lambda: begun(child))
        await asyncio.sleep(1.5)
        first = child.pid
        for _ in range(3):
            time.sleep(3.0)  # noqa: ASYNC251  # the loop itself stands still
            await asyncio.sleep(0.2)
        assert (child.pid, child.restarts) == (first, 0)


async def test_why_a_child_can_not_live_is_one_sentence(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    child = Child("lake writer", (sys.executable, "-m", "no.such"), tmp_path / "log", 1, time.time)
    async with kept(child):
        await until(lambda: child.restarts == 2)
    assert child.problem.startswith("the lake writer ended (exit code 1) and last said: ")
    assert "No module named" in child.problem
    assert child.problem in caplog.text
    assert (tmp_path / "log").stat().st_size > 0


async def test_a_child_that_is_being_started_can_be_told_to_stop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = asyncio.create_subprocess_exec
    starting = asyncio.Event()

    async def slow(*words: Any, **options: Any) -> Any:
        starting.set()
        await asyncio.sleep(0.2)
        return await start(*words, **options)

    monkeypatch.setattr(asyncio, "create_subprocess_exec", slow)
    child = child_of(tmp_path, BEATING)
    running = asyncio.create_task(child.run())
    await starting.wait()
    await child.stop(1.0)
    await asyncio.wait_for(running, 30)
    assert child.pid is None


async def test_a_child_that_waits_for_its_next_start_stops_at_once(tmp_path: Path) -> None:
    child = child_of(tmp_path, "raise SystemExit('no')")
    running = asyncio.create_task(child.run())
    async with asyncio.timeout(60):
        await until(lambda: child.restarts == 4)  # it now waits for 1.6 s, then 3.2 s
        await child.stop(1.0)
        await running
    assert child.restarts == 4
    assert "last said: no" in child.problem


def test_waits_grow_only_with_deaths_in_quick_succession() -> None:
    wait = 0.0
    crashing = [wait := next_wait(wait, 1.0) for _ in range(8)]
    assert crashing == [0.2, 0.4, 0.8, 1.6, 3.2, 6.4, 10.0, 10.0]
    assert next_wait(wait, 5.0) == 5.0
    assert next_wait(wait, 30.0) == 0.2
    assert next_wait(wait, 1e6) == 0.2
    killed = 0.0
    for _ in range(100):
        killed = next_wait(killed, 6.0)
    assert killed == 0.2
