"""A small disk that fills up under load: serving goes on, and all heals once there is room."""

from __future__ import annotations

import http.client
import json
import os
import re
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Self

import pytest
from aftermath import Acknowledged, examine
from tests.app.conftest import POLICY, Town, found, trained, wait_for

from shipworthy.settings import Project, load_project
from shipworthy.stores.files import locked

pytestmark = [pytest.mark.timeout(600), pytest.mark.xdist_group("full disk")]

DISK = 50 * 1024 * 1024
ROWS = 40  # in a request, so that records are some twenty kilobytes large
_DROPPED = re.compile(
    rb'^shipworthy_gateway_records_dropped_total\{why="([^"]*)"\} (\S+)$', re.MULTILINE
)


@contextmanager
def small_disk(folder: Path) -> Generator[None]:
    """A disk of its own at a folder; it needs root, and the right to mount."""
    if sys.platform != "linux" or os.geteuid() != 0:
        pytest.skip("only root can mount a small disk")
    folder.mkdir(parents=True)
    command = ["mount", "-t", "tmpfs", "-o", f"size={DISK},mode=700", "tmpfs", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        if os.environ.get("CI"):
            pytest.fail(f"no disk can be mounted: {done.stderr}")
        pytest.skip(f"no disk can be mounted here: {done.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.fixture
def crowded(tmp_path: Path) -> Generator[Town]:
    """A running project on a small disk, with a candidate that gets half of the traffic."""
    root = tmp_path / "project"
    with small_disk(root / ".shipworthy"):
        town = found(root)
        policy = POLICY.replace(
            "steps: [{weight: 20%, requests: 20}, {weight: 50%, requests: 20}]",
            "steps: [{weight: 50%, requests: 1000000}]",
        )
        policy = policy.replace("{attempt: 3s, total: 10s}", "{attempt: 20s, total: 30s}")
        (root / "policy.yaml").write_text(policy + "capture: {payloads: full, max_bytes: 100000}\n")
        town.sw("apply", "-f", "policy.yaml")
        try:
            town.start()
            town.to_production("first", 1)
            wait_for(lambda: town.infer().status == 200)
            town.to_production("second", 2)
            wait_for(lambda: "progressing" in town.sw("rollout", "status", "digits"), 120)
            yield town
        finally:
            town.end()


class Clients:
    """Ask and tell without a pause, and remember every answer."""

    def __init__(self, town: Town, count: int = 3) -> None:
        self.acknowledged = Acknowledged()
        self.statuses: Counter[int] = Counter()
        self.problems: list[str] = []
        self.feedback: list[tuple[int, str | None]] = []
        self.releases: list[str] = []
        self._town = town
        self._stop = threading.Event()
        features = (trained()[1][:ROWS] + 1 / 3).tolist()
        tensor = {"name": "input", "shape": [ROWS, 64], "datatype": "FP64", "data": features}
        self._body = json.dumps({"inputs": [tensor]}).encode()
        self._threads = [threading.Thread(target=self._run, args=(n,)) for n in range(count)]

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def _run(self, number: int) -> None:
        address = self._town.address()
        assert address is not None
        connection = http.client.HTTPConnection("127.0.0.1", address["port"], timeout=30)
        asked = 0
        try:
            while not self._stop.is_set():
                asked += 1
                self._ask(connection, f"user-{number}-{asked}")
                self._stop.wait(0.005)
        except Exception as error:  # a thread's end must not go unseen
            self.problems.append(repr(error))
            raise
        finally:
            connection.close()

    def _ask(self, connection: http.client.HTTPConnection, unit: str) -> None:
        headers = {
            "Authorization": f"Bearer {self._town.keys['shop']}",
            "X-Shipworthy-Unit": unit,
        }
        connection.request("POST", "/v2/models/digits/infer", self._body, headers)
        answer = connection.getresponse()
        answer.read()
        self.statuses[answer.status] += 1
        inference = answer.headers["X-Shipworthy-Inference"]
        self.acknowledged.inferences.add(inference)
        self.releases.append(answer.headers.get("X-Shipworthy-Release", ""))
        content = {"inference": inference, "kind": "rating", "name": "stars", "value": 5}
        connection.request("POST", "/v1/feedback", json.dumps(content), headers)
        answer = connection.getresponse()
        said = answer.read()
        self.feedback.append((answer.status, answer.headers["Retry-After"]))
        if answer.status == 202:
            self.acknowledged.feedback.add(json.loads(said)["feedback"])

    def served_by(self, count: int = 100) -> set[str]:
        """Which releases gave the last answers, once so many more have come."""
        before = len(self.releases)
        wait_for(lambda: len(self.releases) >= before + count)
        return set(self.releases[-count:])

    def feedback_from_now_on(self, count: int = 50) -> set[tuple[int, str | None]]:
        """How feedback is answered, once so much more has come."""
        before = len(self.feedback)
        wait_for(lambda: len(self.feedback) >= before + count)
        return set(self.feedback[-count:])


def dropped(town: Town) -> dict[str, int]:
    """What the gateway says that it dropped, by reason; a worker that died would forget."""
    answer = town.call("/metrics", key=None)
    assert answer.status == 200
    return {why.decode(): int(float(count)) for why, count in _DROPPED.findall(answer.body)}


def all_dropped(town: Town) -> int:
    """How many in all, once each worker has told the others of its last second."""
    now = sum(dropped(town).values())
    while True:
        before = now
        time.sleep(1.5)
        now = sum(dropped(town).values())
        if now == before:
            return now


def free(town: Town) -> int:
    disk = os.statvfs(town.root / ".shipworthy")
    return disk.f_bavail * disk.f_frsize


def fill(file: Path) -> None:
    """Write until the disk takes not one byte more."""
    with file.open("ab", buffering=0) as handle:
        for size in (1 << 20, 4096, 1):
            with suppress(OSError):
                while handle.write(bytes(size)) == size:
                    pass


def check_all_is_well(town: Town, clients: Clients) -> None:
    """Behind it: nobody saw an error, what was not dropped is in the lake once, and all agrees."""
    assert clients.problems == []
    assert set(clients.statuses) == {200}
    assert {status for status, _ in clients.feedback} <= {202, 503}
    assert all(after for status, after in clients.feedback if status == 503)
    lost = dropped(town)
    refused = sum(status == 503 for status, _ in clients.feedback)
    project = load_project(town.root)
    deadline = time.monotonic() + 120.0  # in vain, what is found below tells more
    while time.monotonic() < deadline:
        lost = dropped(town)  # one worker answers for all, and hears of the others each second
        if caught_up(project, clients.acknowledged, sum(lost.values()) - refused):
            break
        time.sleep(0.2)
    assert "entries hold" in town.sw("audit", "verify")
    town.stop()
    # Which of the answers were dropped nobody knows but the journal; how many, the metrics say.
    found = examine(project, clients.acknowledged)
    assert [each for each in found if each.kind != "lost"] == []
    assert sum(each.times for each in found) == sum(lost.values()) - refused
    only_feedback = Acknowledged(set(), clients.acknowledged.feedback)
    assert examine(project, only_feedback) == []


def caught_up(project: Project, acknowledged: Acknowledged, lost: int) -> bool:
    with suppress(Exception):  # tables change under us while the writer is at work
        found = examine(project, acknowledged)
        return {each.kind for each in found} <= {"lost"} and sum(e.times for e in found) == lost
    return False


def test_a_disk_filled_by_somebody_else_stops_no_answer_and_all_heals(crowded: Town) -> None:
    foreign = crowded.root / ".shipworthy" / "foreign"
    with Clients(crowded) as clients:
        assert clients.served_by() == {"digits@1", "digits@2"}
        assert clients.feedback_from_now_on() == {(202, None)}
        before = crowded.workers()
        fill(foreign)
        wait_for(lambda: fill(foreign) or dropped(crowded).get("disk"))
        assert wait_for(lambda: clients.feedback_from_now_on() == {(503, "1")})
        # Nobody can renew the candidate's lease, so all of the traffic goes to stable.
        wait_for(lambda: fill(foreign) or clients.served_by() == {"digits@1"})
        assert "disk space" in crowded.run("doctor").output
        assert "records are being dropped" in crowded.sw("status")
        foreign.unlink()
        wait_for(lambda: clients.feedback_from_now_on() == {(202, None)})
        wait_for(lambda: clients.served_by() == {"digits@1", "digits@2"}, 90)
        counted = all_dropped(crowded)
        assert clients.served_by()
        assert all_dropped(crowded) == counted
        assert crowded.workers() == before
    check_all_is_well(crowded, clients)


def test_a_disk_filled_by_our_own_journals_stops_no_answer_and_all_heals(crowded: Town) -> None:
    project = load_project(crowded.root)
    # Half of the disk is somebody else's, which only makes this quicker.
    (crowded.root / ".shipworthy" / "ballast").write_bytes(bytes(DISK // 2))
    with Clients(crowded) as clients:
        assert clients.served_by() == {"digits@1", "digits@2"}
        before = crowded.workers()
        with locked(project.lake_lock):  # the lake's writer waits, and nothing is deleted
            wait_for(lambda: sum(dropped(crowded).values()), 200)
            wait_for(lambda: (503, "1") in clients.feedback_from_now_on(20))
            # What is left keeps ledger, snapshot and lake alive, so the rollout goes on.
            assert free(crowded) > 0
            assert wait_for(lambda: clients.served_by() == {"digits@1", "digits@2"})
        wait_for(lambda: clients.feedback_from_now_on() == {(202, None)}, 120)
        assert crowded.workers() == before
    check_all_is_well(crowded, clients)
