"""The supervisor's loops, through faults."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path
from typing import Any, cast

import pytest

from shipworthy.app import supervisor
from shipworthy.app.processes import Child
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
    monkeypatch.setattr("shipworthy.app.processes._FIRST_WAIT", 0.001)
    start = asyncio.create_subprocess_exec
    lacks = [OSError(24, "Too many open files"), OSError(12, "Cannot allocate memory")]

    async def lacking(*words: Any, **options: Any) -> Any:
        if lacks:
            raise lacks.pop()
        return await start(*words, **options)

    monkeypatch.setattr(asyncio, "create_subprocess_exec", lacking)
    child = Child("sleeper", (sys.executable, "-c", "input()"), tmp_path / "log")
    running = asyncio.create_task(child.run())
    async with asyncio.timeout(10):
        while child.pid is None:  # noqa: ASYNC110  # it sets no event
            await asyncio.sleep(0.01)
    assert child.restarts == 2
    assert "can't be started (Too many open files)" in child.problem
    await child.stop(0.1)
    await running
