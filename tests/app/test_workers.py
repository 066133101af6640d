"""A real `shipworthy up` with several workers on its port, killed and replaced under load."""

from __future__ import annotations

import http.client
import json
import os
import re
import signal
import socket
import ssl
import sys
import threading
import time
from collections import Counter
from collections.abc import Generator, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Self

import msgspec
import pytest
from tests.app.conftest import Town, found, request_body, wait_for

from shipworthy.app.children import Processes, Renewal, read_processes
from shipworthy.settings import load_project
from shipworthy.stores.journal import JournalReader

pytestmark = [pytest.mark.timeout(300)]

CERTIFICATES = Path(__file__).parent / "certificates"


def set_gateway(town: Town, **settings: object) -> None:
    """Write the gateway's settings into the project."""
    lines = (town.root / "shipworthy.yaml").read_text().splitlines()
    kept = [line for line in lines if not line.startswith("gateway:")]
    gateway = json.dumps({"port": 0, "workers": 3} | settings)
    (town.root / "shipworthy.yaml").write_text("\n".join([*kept, f"gateway: {gateway}", ""]))


def all_ready(town: Town, count: int = 3) -> dict[str, int]:
    """The workers' ids once all say that they live."""
    text = rf"^shipworthy_gateway_workers {count}\.0$"
    wait_for(lambda: re.search(text, metrics(town), re.MULTILINE))
    return wait_for(lambda: len(found := town.workers()) == count and found)


def metrics(town: Town) -> str:
    answer = town.call("/metrics", key=None)
    return answer.body.decode() if answer.status == 200 else ""


def total(town: Town, name: str) -> float:
    """A counter over all its labels."""
    values = re.findall(
        rf"^shipworthy_gateway_{name}(?:{{.*}})? (\S+)$", metrics(town), re.MULTILINE
    )
    return sum(map(float, values))


def settled(town: Town, name: str) -> float:
    """The same, once no worker has anything left to tell the others."""
    before = -1.0
    while (now := total(town, name)) != before:
        before = now
        time.sleep(1.5)  # more than the second in which they do
    return now


def renewal(town: Town) -> Renewal:
    """How the last restart went; also where the settings can't be read."""
    try:
        told = (town.root / ".shipworthy" / "processes.json").read_bytes()
    except OSError:
        return Renewal()
    return msgspec.json.decode(told, type=Processes).renewal or Renewal()


@pytest.fixture(scope="module")
def busy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Town]:
    """Three workers before one release in production."""
    made = found(tmp_path_factory.mktemp("busy") / "project")
    set_gateway(made)
    made.start()
    made.to_production("first", 1)
    wait_for(lambda: made.infer().status == 200)
    yield made
    made.end()


class Clients:
    """Threads that each keep a connection and ask again and again."""

    def __init__(self, town: Town, count: int) -> None:
        address = town.address()
        assert address
        self.port, self.key = address["port"], town.keys["shop"]
        self.answered: list[str] = []
        self.statuses = Counter[int]()
        self.broken: list[str] = []
        self.refused: list[str] = []
        self._end = threading.Event()
        self._threads = [threading.Thread(target=self._ask, args=(n,)) for n in range(count)]

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        for thread in self._threads:
            thread.join()

    def more(self, count: int = 100) -> None:
        """Wait until so many more have been answered."""
        before = len(self.answered)
        wait_for(lambda: len(self.answered) >= before + count)

    def _ask(self, number: int) -> None:
        headers = {"Authorization": f"Bearer {self.key}", "X-Shipworthy-Unit": f"u{number}"}
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        while not self._end.is_set():
            try:
                if connection.sock is None:
                    connection.connect()
            except OSError as error:
                self.refused.append(repr(error))
                time.sleep(0.05)
                continue
            try:
                connection.request("POST", "/v2/models/digits/infer", request_body(), headers)
                answer = connection.getresponse()
                answer.read()
            except (OSError, http.client.HTTPException) as error:
                self.broken.append(repr(error))
                connection.close()
                continue
            self.statuses[answer.status] += 1
            self.answered.append(answer.headers["X-Shipworthy-Inference"])
        connection.close()


def test_a_killed_worker_breaks_only_what_was_under_way_in_it(busy: Town) -> None:
    before = all_ready(busy)
    with Clients(busy, 6) as clients:
        clients.more()
        for name in ("worker-1", "worker-2", "worker-1"):
            victim = busy.workers()[name]
            os.kill(victim, signal.SIGKILL)
            clients.more()
            wait_for(lambda name=name, old=victim: busy.workers().get(name, old) != old)
            all_ready(busy)
    assert clients.refused == []
    assert set(clients.statuses) == {200}
    assert len(clients.broken) <= 3 * 6
    now = busy.workers()
    assert now["worker-0"] == before["worker-0"]
    assert {now["worker-1"], now["worker-2"]}.isdisjoint(before.values())
    known = read_processes(load_project(busy.root))
    assert known
    restarts = {child.name: child.restarts for child in known.children}
    assert (restarts["worker-0"], restarts["worker-1"], restarts["worker-2"]) == (0, 2, 1)


def test_workers_are_replaced_under_load_without_a_failed_request(busy: Town) -> None:
    before, address, asked = all_ready(busy), busy.address(), settled(busy, "requests_total")
    with Clients(busy, 6) as clients:
        clients.more()
        assert "All 3 workers were restarted." in busy.sw("gateway", "restart")
        clients.more()
        busy.sw("gateway", "restart")
        clients.more()
    assert clients.refused == clients.broken == []
    assert set(clients.statuses) == {200}
    assert set(all_ready(busy).values()).isdisjoint(before.values())
    assert busy.address() == address, "the port stays the same, and who holds it"
    # Nothing is counted twice or lost, although all who counted it have ended.
    assert settled(busy, "requests_total") == asked + len(clients.answered)
    assert len(set(clients.answered)) == len(clients.answered)
    folder = busy.root / ".shipworthy" / "metrics"
    assert len(list(folder.glob("*/*.numbers"))) <= 6


def test_what_two_processes_of_one_place_wrote_is_in_the_lake_once(busy: Town) -> None:
    """While one takes the other's place, both write journals under one name."""
    all_ready(busy)
    with Clients(busy, 4) as clients:
        clients.more()
        busy.sw("gateway", "restart")
        clients.more()
    assert JournalReader(busy.root / ".shipworthy" / "journals").skipped == Counter()

    def lacking() -> set[str]:
        query = "SELECT id, count(*) AS times FROM inferences GROUP BY id"
        rows = json.loads(busy.sw("query", query, "--format", "json", "--limit", "100000"))
        rows = rows["rows"] if isinstance(rows, dict) else rows
        times = {row["id"]: row["times"] for row in rows}
        assert set(times.values()) <= {1}
        return set(clients.answered) - times.keys()

    wait_for(lambda: not lacking())


def test_sighup_replaces_the_workers(busy: Town) -> None:
    before, number = all_ready(busy), renewal(busy).number
    assert busy.up
    busy.up.send_signal(signal.SIGHUP)
    wait_for(lambda: renewal(busy).number == number + 1 and not renewal(busy).running)
    assert renewal(busy) == Renewal(number=number + 1, done=3, of=3)
    assert set(all_ready(busy).values()).isdisjoint(before.values())
    assert busy.infer().status == 200


def test_new_settings_are_followed_and_what_can_not_be_is_said(busy: Town) -> None:
    all_ready(busy)
    port = wait_for(busy.address)["port"]
    try:
        set_gateway(busy, workers=2, max_body_bytes=1024, host="127.0.0.2")
        said = busy.sw("gateway", "restart")
        assert "Note: gateway.host changed: end 'shipworthy up' and start it again for that" in said
        assert "All 2 workers were restarted." in said
        assert set(all_ready(busy, 2)) == {"worker-0", "worker-1"}
        assert busy.call(body=bytes(2000)).status == 413
        set_gateway(busy, workers=4)
        assert "All 4 workers" in busy.sw("gateway", "restart")
        all_ready(busy, 4)
        assert busy.infer().status == 200
    finally:
        set_gateway(busy)
        busy.sw("gateway", "restart")
    all_ready(busy)
    assert wait_for(busy.address)["port"] == port


def test_old_workers_serve_on_where_no_new_ones_can_be_started(busy: Town) -> None:
    before = all_ready(busy)
    try:
        set_gateway(busy, wokers=3)
        assert "did you mean 'workers'?" in busy.run("gateway", "restart").output
        number = renewal(busy).number
        assert busy.up
        busy.up.send_signal(signal.SIGHUP)
        wait_for(lambda: renewal(busy).number == number + 1 and not renewal(busy).running)
        assert "did you mean 'workers'?" in renewal(busy).problem
        set_gateway(busy, tls={"certificate": "no.pem", "key": "no.key"})
        assert "no.pem can't be read" in busy.run("gateway", "restart").output
        set_gateway(busy)
        # What the new ones need to start is gone.
        secret = busy.root / ".shipworthy" / "secrets" / "signing"
        secret.rename(secret.with_name("away"))
        try:
            refused = busy.run("gateway", "restart")
        finally:
            secret.with_name("away").rename(secret)
        assert refused.code == 3
        assert "the worker-0 ended (exit code 1) and last said" in refused.output
        assert "the old one serves on" in refused.output
    finally:
        set_gateway(busy)
    assert all_ready(busy) == before
    assert busy.infer().status == 200
    assert "All 3 workers" in busy.sw("gateway", "restart"), "it can be asked again"


def test_a_worker_that_can_not_live_hinders_no_other(town: Town) -> None:
    """It is tried ever more rarely, and the rest answers."""
    set_gateway(town)
    town.start()
    all_ready(town)
    secret = town.root / ".shipworthy" / "secrets" / "signing"
    secret.rename(secret.with_name("away"))
    pids = town.workers()
    os.kill(pids["worker-1"], signal.SIGKILL)

    def restarts() -> int:
        known = read_processes(load_project(town.root))
        assert known
        return next(child.restarts for child in known.children if child.name == "worker-1")

    wait_for(lambda: restarts() >= 3)
    assert "the worker-1 was restarted" in town.sw("status")
    for _ in range(20):
        assert town.call("/healthz", key=None).status == 200
    assert {name: pid for name, pid in town.workers().items() if name != "worker-1"} == {
        name: pid for name, pid in pids.items() if name != "worker-1"
    }
    secret.with_name("away").rename(secret)
    all_ready(town)


def test_restarting_without_an_up_is_one_clear_sentence(town: Town) -> None:
    refused = town.run("gateway", "restart")
    assert refused.code == 3
    assert refused.output.strip() == (
        "error: nothing is running here; start it with 'shipworthy up'"
    )


def test_a_stopped_worker_keeps_nobody_waiting_for_long(busy: Town) -> None:
    """The others accept; it is ended when it says nothing for too long."""
    pids = all_ready(busy)
    os.kill(pids["worker-2"], signal.SIGSTOP)
    for _ in range(30):
        assert busy.infer().status == 200
    wait_for(lambda: busy.workers().get("worker-2", pids["worker-2"]) != pids["worker-2"])
    all_ready(busy)


# --- TLS and a Unix socket ------------------------------------------------------------------------


def shown_certificate(port: int, trusted: str) -> str:
    """Whose certificate is shown to a client that trusts this one."""
    context = ssl.create_default_context(cafile=CERTIFICATES / trusted)
    with (
        socket.create_connection(("127.0.0.1", port), 10) as raw,
        context.wrap_socket(raw, server_hostname="localhost") as secure,
    ):
        secure.sendall(b"GET /healthz HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        assert b"200 OK" in secure.recv(4096)
        certificate = secure.getpeercert()
    assert certificate
    return str(certificate["subject"])


def put_certificate(town: Town, name: str) -> None:
    for kind in ("pem", "key"):
        fresh = town.root / f"fresh.{kind}"
        fresh.write_bytes((CERTIFICATES / f"{name}.{kind}").read_bytes())
        fresh.replace(town.root / f"own.{kind}")


@contextmanager
def no_proxies() -> Generator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
            patch.delenv(name, raising=False)
        yield


def test_tls_is_served_renewed_and_known_to_our_own_commands(town: Town) -> None:
    put_certificate(town, "first")
    set_gateway(
        town, tls={"certificate": "own.pem", "key": "own.key"}, unix_socket="gw.sock", workers=2
    )
    town.start()
    address = wait_for(town.address)
    assert "first test" in shown_certificate(address["port"], "first.pem")
    with pytest.raises(ssl.SSLCertVerificationError):
        shown_certificate(address["port"], "second.pem")
    # Plain HTTP is not answered on the port, but is on the Unix socket.
    with socket.create_connection(("127.0.0.1", address["port"]), 10) as plain:
        plain.sendall(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
        with suppress(ConnectionError):
            assert b"HTTP/1.1" not in plain.recv(4096)
    assert by_path(town.root / "gw.sock", "/healthz") == 200
    wait_for(lambda: town.sw("status").startswith("Nothing needs a person"))
    answers = "the gateway answers at https://127.0.0.1"
    wait_for(lambda: examined(town)["gateway"]["seen"].startswith(answers))
    assert examined(town)["certificate"]["verdict"] == "pass"
    with no_proxies():
        town.to_production("first", 1)  # its checks go through the door

    put_certificate(town, "second")
    wait_for(lambda: _shows(address["port"], "second"))
    for _ in range(20):
        wait_for(lambda: _shows(address["port"], "second"))
    town.sw("gateway", "restart")
    assert "second test" in shown_certificate(address["port"], "second.pem")
    wait_for(lambda: town.sw("status").startswith("Nothing needs a person"))
    assert town.stop() == 0
    assert not (town.root / "gw.sock").exists()


def examined(town: Town) -> dict[str, dict[str, str]]:
    """What the doctor says, by name."""
    return {each["name"]: each for each in json.loads(town.run("doctor", "--json").stdout)}


def _shows(port: int, name: str) -> bool:
    try:
        return f"{name} test" in shown_certificate(port, f"{name}.pem")
    except ssl.SSLCertVerificationError:
        return False


def by_path(path: Path, target: str) -> int:
    """The status of an answer that comes through a Unix socket."""
    connection = http.client.HTTPConnection("localhost", timeout=10)
    connection.sock = socket.socket(socket.AF_UNIX)
    connection.sock.connect(str(path))
    connection.request("GET", target)
    status = connection.getresponse().status
    connection.close()
    return status


def test_a_certificate_of_no_use_is_told_before_anything_is_started(town: Town) -> None:
    set_gateway(
        town,
        tls={"certificate": f"{CERTIFICATES}/first.pem", "key": f"{CERTIFICATES}/second.key"},
    )
    refused = town.run("up")
    assert refused.code == 2
    assert "second.key is not the key of" in refused.output
    assert "certificate" in town.run("doctor").output
    assert not (town.root / ".shipworthy" / "processes.json").exists()


def test_up_ends_when_its_terminal_is_closed(town: Town) -> None:
    """And does not go on as a process that nobody sees."""
    set_gateway(town, workers=1)
    pid, terminal = os.forkpty()
    if pid == 0:
        os.chdir(town.root)
        os.execvp(sys.executable, [sys.executable, "-m", "shipworthy", "up"])
    try:
        wait_for(town.address)
        number = renewal(town).number
        os.kill(pid, signal.SIGHUP)  # its terminal is there: it restarts workers
        wait_for(lambda: renewal(town).number == number + 1)
        os.close(terminal)
        wait_for(lambda: os.waitpid(pid, os.WNOHANG)[0] == pid)
    finally:
        with suppress(ProcessLookupError, ChildProcessError):
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
    assert not (town.root / ".shipworthy" / "processes.json").exists(), "in order"
