"""A real `shipworthy up` whose processes are killed and stopped: all comes back, nothing stays."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import textwrap
import time
from contextlib import suppress
from pathlib import Path

import pytest
from tests.app.conftest import Town, wait_for

from shipworthy.app.children import Child, ChildState, read_processes
from shipworthy.app.session import open_session
from shipworthy.domain.audit import verify
from shipworthy.domain.terms import Term
from shipworthy.settings import load_project
from shipworthy.stores.snapshots import newest_fence

pytestmark = [pytest.mark.timeout(300)]


def children(town: Town) -> dict[str, ChildState]:
    """By name, those that run."""
    known = read_processes(load_project(town.root))
    found = {child.name: child for child in known.children} if known else {}
    return {name: child for name, child in found.items() if child.pid is not None}


def all_children(town: Town) -> dict[str, ChildState]:
    """By name, once all run."""
    return wait_for(lambda: (found := children(town)) and len(found) == 5 and found)


def pid(child: ChildState) -> int:
    assert child.pid is not None
    return child.pid


def alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


def fence(town: Town) -> int:
    return newest_fence(load_project(town.root).snapshots)


def term(town: Town) -> Term:
    with open_session(town.root).ledger.read() as tx:
        return tx.terms.current()


def replaced(town: Town, before: ChildState) -> bool:
    now = children(town).get(before.name)
    return now is not None and now.pid != before.pid and not alive(pid(before))


def test_whatever_is_killed_or_stopped_comes_back_and_keepers_take_over(town: Town) -> None:
    town.start()
    for number in (signal.SIGKILL, signal.SIGSTOP):
        before, fenced = all_children(town), wait_for(lambda: fence(town))
        for child in before.values():  # both keepers, the lake's writer and the gateway's workers
            os.kill(pid(child), number)
        for child in before.values():
            wait_for(lambda child=child: replaced(town, child))
        wait_for(lambda fenced=fenced: fence(town) > fenced)
        wait_for(lambda: town.call("/readyz", key=None).status in {200, 503})
    assert all(child.restarts >= 2 for child in all_children(town).values())
    assert "said nothing for" in (town.root / "up.log").read_text()
    assert town.stop() == 0
    assert read_processes(load_project(town.root)) is None
    assert term(town).until == 0.0, "the office was given up in order"
    with open_session(town.root).ledger.read() as tx:
        numbers = [int(e.subject) for e in tx.audit.entries() if e.act == "begin term"]
        assert numbers == list(range(1, len(numbers) + 1))


def test_no_child_outlives_a_killed_supervisor_also_when_it_is_stopped(town: Town) -> None:
    town.start()
    found = all_children(town)
    for child in found.values():
        os.kill(pid(child), signal.SIGSTOP)
    town.stop(signal.SIGKILL)
    wait_for(lambda: not any(alive(pid(child)) for child in found.values()))


def test_a_second_ctrl_c_ends_at_once(town: Town) -> None:
    town.start()
    found = all_children(town)
    assert town.up is not None
    for child in found.values():
        os.kill(pid(child), signal.SIGSTOP)  # the first has much to wait for
    town.up.send_signal(signal.SIGINT)
    time.sleep(0.5)
    assert town.up.poll() is None
    assert town.stop(signal.SIGINT) == 130
    assert not any(alive(pid(child)) for child in found.values())
    assert "Stopped at once." in (town.root / "up.log").read_text()


def test_a_child_that_can_not_start_is_told_on_the_terminal_and_hinders_nobody(town: Town) -> None:
    settings = town.root / "shipworthy.yaml"
    settings.write_text(settings.read_text() + "lake: {url: 's3://somewhere'}\n")
    town.start()
    said = "the lake writer ended (exit code 3) and last said: lake.url: s3 is no kind of lake"
    wait_for(lambda: said in (town.root / "up.log").read_text())
    wait_for(lambda: fence(town))
    assert town.stop() == 0


def test_one_keeper_alone_will_do(town: Town) -> None:
    settings = town.root / "shipworthy.yaml"
    settings.write_text(settings.read_text() + "keeper: {standby: false}\n")
    town.start()
    found = wait_for(lambda: (found := children(town)) and len(found) == 4 and found)
    fenced = wait_for(lambda: fence(town))
    os.kill(pid(found["keeper"]), signal.SIGKILL)
    wait_for(lambda: fence(town) > fenced)


# --- a keeper that stops itself at the worst moment ------------------------------------------

STOPS_ITSELF = """
    import os, signal, sys
    from pathlib import Path
    from shipworthy.app import keeping
    from shipworthy.stores import files, snapshots

    replace = files.replace_file
    armed = Path(sys.argv[2])

    def replace_late(path, content):
        fresh = path.with_name(f".{path.name}.late")
        fresh.write_bytes(content)
        if armed.exists():
            armed.unlink()
            os.kill(os.getpid(), signal.SIGSTOP)  # behind the commit, before the rename
        replace(path, content)
        fresh.unlink(missing_ok=True)

    snapshots.replace_file = replace_late
    sys.exit(keeping.main(Path(sys.argv[1])))
"""


def test_a_keeper_stopped_between_commit_and_publication_can_undo_nothing(town: Town) -> None:
    armed = town.root / "armed"
    command = [sys.executable, "-c", textwrap.dedent(STOPS_ITSELF), str(town.root), str(armed)]
    log = (town.root / "keepers.log").open("ab")
    with log:
        pair = [subprocess.Popen(command, stdin=subprocess.PIPE, stderr=log) for _ in range(2)]
    try:
        wait_for(lambda: fence(town))
        for _ in range(3):
            paused = int(term(town).holder.rpartition("#")[2].split("-")[0])
            before = fence(town)
            armed.touch()
            wait_for(lambda paused=paused: stopped(paused) and not armed.exists())
            wait_for(lambda before=before: fence(town) > before)
            obeyed = fence(town)
            os.kill(paused, signal.SIGCONT)
            # It finishes its publication, which nobody obeys, and stands by.
            late = f"another keeper began term {obeyed} after term {before}"
            wait_for(lambda late=late: late in (town.root / "keepers.log").read_text())
            assert fence(town) == obeyed
            assert term(town).number == obeyed
        for keeper in pair:
            keeper.send_signal(signal.SIGTERM)
        assert [keeper.wait(30) for keeper in pair] == [0, 0]
        with open_session(town.root).ledger.read() as tx:
            entries = list(tx.audit.entries())
        assert verify(entries) == []
        numbers = [int(entry.subject) for entry in entries if entry.act == "begin term"]
        assert numbers == list(range(1, len(numbers) + 1))
    finally:
        for keeper in pair:
            with suppress(ProcessLookupError):
                keeper.kill()
            keeper.communicate()


STOPS_AMID_A_TRANSACTION = """
    import os, signal, sys
    from pathlib import Path
    from shipworthy.app import keeping
    from shipworthy.rollout import keeper

    handle = keeper.handle_intents
    armed = Path(sys.argv[2])

    def handle_late(turn):
        if armed.exists():
            armed.unlink()
            os.kill(os.getpid(), signal.SIGSTOP)
        handle(turn)

    keeper.handle_intents = handle_late
    sys.exit(keeping.main(Path(sys.argv[1])))
"""


async def test_a_keeper_stopped_while_nobody_can_write_is_ended_and_followed(town: Town) -> None:
    armed = town.root / "armed"
    program = textwrap.dedent(STOPS_AMID_A_TRANSACTION)
    command = (sys.executable, "-c", program, str(town.root), str(armed))
    pair = [
        Child(name, command, town.root / f"{name}.log", 5.0, time.time)
        for name in ("keeper", "standby")
    ]
    running = [asyncio.create_task(child.run()) for child in pair]
    try:
        await asyncio.to_thread(wait_for, lambda: fence(town))
        before = fence(town)
        armed.touch()
        await asyncio.to_thread(wait_for, lambda: not armed.exists())
        await asyncio.to_thread(wait_for, lambda: fence(town) > before)
        assert [child.restarts for child in pair].count(1) == 1
        town.sw("keys", "create", "somebody")  # who writes too
    finally:
        for child in pair:
            await child.stop(30.0)
        await asyncio.gather(*running)
    assert term(town).until == 0.0


def stopped(pid: int) -> bool:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"
