"""The whole story, as `make demo` tells it: real models, processes and traffic."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

# Both take whole cores; the group keeps them in one worker, one after the other.
pytestmark = [pytest.mark.timeout(300), pytest.mark.xdist_group("demo")]


def start(folder: Path, *options: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "shipworthy", "demo", "--port", "0", "--folder", str(folder)]
    return subprocess.Popen(
        [*command, *options], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def processes_of(folder: Path) -> list[str]:
    """Command lines and working folders of processes that belong to a project; Linux only."""
    found: list[str] = []
    for process in Path("/proc").glob("[0-9]*"):
        if process.name == str(os.getpid()):
            continue
        try:
            words = (process / "cmdline").read_bytes().replace(b"\0", b" ").decode()
            where = str((process / "cwd").readlink())
        except OSError:
            continue
        if str(folder) in words or where.startswith(str(folder)):
            found.append(words)
    return found


def end(demo: subprocess.Popen[str]) -> None:
    """Let a demo that is still running end what it started."""
    if demo.poll() is None:
        demo.send_signal(signal.SIGINT)
        demo.wait(100)


def test_the_demo_keeps_all_that_it_promises(tmp_path: Path) -> None:
    folder, figures = tmp_path / "demo", tmp_path / "figures.json"
    demo = start(folder, "--exit", "--json", str(figures))
    try:
        said, _ = demo.communicate(timeout=280)
    finally:
        end(demo)
    assert demo.returncode == 0, said
    found = json.loads(figures.read_text())
    assert [one["name"] for one in found["models"]] == ["digits@1", "digits@2", "digits@3"]
    first, second, third = (one["accuracy"] for one in found["models"])
    assert 0.9 < first < second < third
    assert found["promoted"] == ["digits@1", "digits@2"]
    assert found["rolled_back"] == ["digits@3"]
    assert found["requests"] > 1_000
    assert found["user_errors"] == 0
    assert found["exposed_requests"] >= found["failures_shielded"] >= 4
    assert 0 <= found["seconds_to_rollback"] <= 1
    assert found["rule"] == "errors"
    assert "fails more often than stable" in found["reason"]
    assert not processes_of(folder)


def test_ctrl_c_leaves_no_process_behind(tmp_path: Path) -> None:
    folder = tmp_path / "demo"
    demo = start(folder)
    try:
        assert demo.stdout is not None
        for line in demo.stdout:
            if "promote digits@1 --to staging" in line:
                break
        assert len(processes_of(folder)) >= 3
        time.sleep(1.0)  # amid the promotion, while replicas start
        demo.send_signal(signal.SIGINT)
        said, _ = demo.communicate(timeout=100)
    finally:
        end(demo)
    assert demo.returncode == 130, said
    assert "everything that ran is stopped" in said
    deadline = time.monotonic() + 10
    while processes_of(folder) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not processes_of(folder)
