"""What `status` says first of a project that runs."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import msgspec
import pytest
from tests.app.conftest import Town, found

from shipworthy.app.children import ChildState, Processes, processes_file
from shipworthy.app.doctor import EXAMINATIONS, case_of
from shipworthy.app.session import open_session
from shipworthy.app.status import LOCK
from shipworthy.app.supervisor import only_one
from shipworthy.domain.terms import Term
from shipworthy.gateway.metrics import Metrics
from shipworthy.settings import load_project
from shipworthy.stores.lake.state import Condition


@contextmanager
def gateway(root: Path, metrics: Metrics) -> Generator[None]:
    """A project that an `up` has held for an hour, with a gateway that has these numbers."""

    class Door(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            if self.path == "/metrics":
                self.wfile.write(metrics.exposition())

        def log_request(self, code: Any = "-", size: Any = "-") -> None:
            pass

    with (
        only_one(load_project(root)),
        ThreadingHTTPServer(("127.0.0.1", 0), Door) as server,
    ):
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        address = {"host": "127.0.0.1", "port": server.server_address[1], "pid": os.getpid()}
        (root / ".shipworthy" / "gateway.json").write_text(json.dumps(address))
        os.utime(root / ".shipworthy" / LOCK, (1, time.time() - 3600))
        try:
            yield
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture
def quiet(tmp_path: Path) -> Town:
    """A project with a keeper in office."""
    town = found(tmp_path / "project")
    with open_session(town.root).ledger.write() as tx:
        tx.terms.put(Term(number=1, holder="keeper", until=time.time() + 600))
    return town


def in_office(town: Town, until: float) -> None:
    with open_session(town.root).ledger.write() as tx:
        tx.terms.put(Term(number=1, holder="keeper", until=until))


def lagging(town: Town) -> None:
    now = time.time()
    content = msgspec.json.encode(Condition(at=now, complete=now - 100))
    load_project(town.root).lake_condition.write_bytes(content)


def dying(town: Town) -> None:
    child = ChildState(
        name="keeper",
        pid=None,
        since=0.0,
        log="/logs/keeper.log",
        restarts=7,
        problem="keeper ended (exit code 3)",
        problem_at=time.time(),
    )
    content = msgspec.json.encode(Processes(pid=1, since=0.0, children=(child,)))
    processes_file(load_project(town.root)).write_bytes(content)


def test_all_is_quiet(quiet: Town) -> None:
    with gateway(quiet.root, Metrics()):
        assert "Nothing needs a person" in quiet.sw("status")


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lagging, "the lake is 100 s behind"),
        (lambda town: in_office(town, time.time() - 60), "no keeper decides"),
        (dying, "the keeper was restarted 7 times: keeper ended (exit code 3)"),
    ],
    ids=["lag", "term", "restarts"],
)
def test_what_goes_wrong_is_said_first(
    quiet: Town, spoil: Callable[[Town], None], says: str
) -> None:
    spoil(quiet)
    with gateway(quiet.root, Metrics()):
        assert quiet.sw("status").startswith(f"! {says}")
    assert says not in quiet.sw("status"), "while nothing runs, only that is said"


def test_dropped_records_are_said_by_reason_while_they_are_news(quiet: Town) -> None:
    metrics = Metrics()
    metrics.settle_dropped({"disk": 3, "full": 2}, time.time())
    with gateway(quiet.root, metrics):
        said = quiet.sw("status")
        assert said.startswith("! records are being dropped: 5 records (disk 3, full 2)")
        (result,) = EXAMINATIONS["dropped records"](case_of(quiet.root))
        assert result.verdict == "fail"
        assert "make room" in result.cure
    old = Metrics()
    old.settle_dropped({"disk": 3}, time.time() - 3600)
    old.settle_dropped({"disk": 3}, time.time())
    with gateway(quiet.root, old):
        assert "Nothing needs a person" in quiet.sw("status")
        (result,) = EXAMINATIONS["dropped records"](case_of(quiet.root))
        assert result.verdict == "warn"


def test_a_gateway_that_does_not_answer_is_said(quiet: Town) -> None:
    with gateway(quiet.root, Metrics()):
        (quiet.root / ".shipworthy" / "gateway.json").unlink()
        assert quiet.sw("status").startswith("! the gateway does not answer")
