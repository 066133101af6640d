"""A worker as a process of its own: its port, its signals, its journal, its second life."""

import asyncio
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import aiohttp
import msgspec
import pytest

from shipworthy.domain.plan import decode_snapshot
from shipworthy.errors import Unavailable

PROGRAM = """
import random, sys, time
from pathlib import Path
from shipworthy.errors import ShipworthyError
from shipworthy.gateway import GatewayOptions, Outside, run
from shipworthy.stores.journal import JournalWriter

folder = Path(sys.argv[1])
journal = JournalWriter(folder / "journals", worker="w1", max_bytes=10_000_000)
try:
    run(
        GatewayOptions(port=int(sys.argv[2]), ready_file=folder / "ready", drain_seconds=2.0),
        Outside(
            journal=journal, newest_snapshot=lambda: folder / "snapshot", signing_secret=bytes(32),
            pseudonym_secret=bytes(32), clock=time.time, uniform=random.random,
        ),
    )
except ShipworthyError as error:
    sys.exit(str(error))
finally:
    journal.close()
"""


class Process:
    """A worker's process, in the folder of the `worker` fixture."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.ready = folder / "ready"
        self.started: list[asyncio.subprocess.Process] = []

    async def start(self, port: int = 0) -> asyncio.subprocess.Process:
        self.ready.unlink(missing_ok=True)
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-c", PROGRAM, self.folder, str(port),
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
        self.started.append(process)
        return process

    async def listening(self) -> int:
        async with asyncio.timeout(15):
            while not self.ready.exists():  # noqa: ASYNC110  # another process makes it
                await asyncio.sleep(0.01)
        content = msgspec.json.decode(self.ready.read_bytes())
        assert content["pid"] == self.started[-1].pid
        assert content["host"] == "127.0.0.1"
        return content["port"]


@pytest.fixture
async def process(worker):
    made = Process(worker.folder)
    worker.publish()
    yield made
    for one in made.started:
        if one.returncode is None:
            one.kill()
        await one.communicate()


def records(folder: Path):
    reader = pytest.importorskip("shipworthy.stores.journal").JournalReader(folder / "journals")
    return reader.read({}, 1_000)[0]


async def test_a_worker_drains_on_sigterm_and_leaves_no_traceback(worker, process, model):
    release = asyncio.Event()

    async def held(writer):
        await release.wait()
        await model.responding(model.answer_of())(writer)

    worker.model.behave = held
    one = await process.start()
    worker.port = await process.listening()
    async with aiohttp.ClientSession() as worker.client:
        under_way = asyncio.create_task(worker.infer())
        await worker.until(lambda: worker.model.open == 1)
        one.send_signal(signal.SIGTERM)
        await asyncio.sleep(0.1)
        with pytest.raises(aiohttp.ClientConnectorError):
            async with aiohttp.ClientSession() as other, other.get(worker.url + "/readyz"):
                pass
        release.set()
        reply = await under_way
    assert reply.status == 200
    assert reply.headers["connection"] == "close"
    output, errors = await asyncio.wait_for(one.communicate(), 5)
    assert (one.returncode, output, errors) == (0, b"", b"")
    [record] = records(worker.folder)
    assert record.id == reply.headers["x-shipworthy-inference"]


async def test_these_tests_run_on_the_workers_loop():
    assert type(asyncio.get_running_loop()).__module__.startswith("uvloop")


async def test_draining_is_bounded_and_whoever_waits_is_told(worker, model):
    worker.model.behave = model.hanging
    await worker.start(
        worker.plan(deadlines=model.Deadlines(attempt=20, total=20)), drain_seconds=0.2
    )
    under_way = asyncio.create_task(worker.infer())
    await worker.until(lambda: worker.model.open == 1)
    worker.begin_stop()
    reply = await under_way
    assert (reply.status, reply.headers["retry-after"]) == (503, "1")
    assert "the gateway is ending" in reply.error
    assert worker.journal.last.reason == "shutdown"


async def test_a_worker_that_ends_says_so_while_it_still_listens(worker):
    await worker.start(unready_seconds=0.3)
    worker.begin_stop()
    await asyncio.sleep(0.05)
    assert (await worker.ask("GET", "/readyz", key=None)).status == 503
    assert (await worker.ask("GET", "/healthz", key=None)).status == 200
    assert (await worker.infer()).status == 200


async def test_a_killed_worker_has_journalled_all_that_it_answered(worker, process):
    one = await process.start()
    worker.port = await process.listening()
    async with aiohttp.ClientSession() as worker.client:
        answered = {(await worker.infer()).headers["x-shipworthy-inference"] for _ in range(20)}
    one.kill()
    await one.wait()
    assert {record.id for record in records(worker.folder)} == answered


async def test_a_worker_comes_back_with_the_old_snapshot_and_nobody_else(worker, process):
    """No keeper, no ledger: there has only ever been the file."""
    for _ in range(2):
        one = await process.start()
        worker.port = await process.listening()
        async with aiohttp.ClientSession() as worker.client:
            assert (await worker.infer()).status == 200
        one.terminate()
        await asyncio.wait_for(one.wait(), 5)
    assert decode_snapshot(worker.path.read_bytes()) == worker.snapshot


async def test_a_port_in_use_is_one_clear_sentence(worker, process):
    await worker.start()
    one = await process.start(worker.port)
    _, errors = await asyncio.wait_for(one.communicate(), 15)
    assert errors.decode().strip() == (
        f"port {worker.port} on 127.0.0.1 is in use; stop what listens there or set another port"
    )
    assert one.returncode == 1


async def test_an_address_that_is_not_ours_is_one_clear_sentence(worker):
    with pytest.raises(Unavailable, match=r"can't be opened .*; set another one"):
        await worker.start(host="192.0.2.1")
    with pytest.raises(Unavailable, match="is no address to listen on"):
        await worker.start(host="no such host")


async def test_two_workers_can_share_a_socket(worker, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as listening:
        await worker.start(sockets=(os.dup(listening.fileno()),))
        other = type(worker)(tmp_path / "other", worker.model, worker.candidate_model)
        other.folder.mkdir()
        await other.start(sockets=(os.dup(listening.fileno()),))
        assert other.port == worker.port == listening.getsockname()[1]
        await all_answered(worker.url)
        await other.stop()
        await all_answered(worker.url)


async def all_answered(url):
    for _ in range(10):
        async with aiohttp.ClientSession() as session, session.get(url + "/healthz") as got:
            assert got.status == 200


def test_a_worker_loads_neither_numbers_nor_databases():
    program = "import sys, shipworthy.gateway, shipworthy.gateway.probes; print(*sys.modules)"
    loaded = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    ).stdout.split()
    assert not {"numpy", "sklearn", "sqlalchemy", "pydantic", "scipy", "pandas"} & set(loaded)


async def test_a_worker_under_load_keeps_nothing(worker):
    """Bodies, endpoints and gates are all given back."""
    await worker.start(max_in_flight=4, max_queued=100)
    replies = await asyncio.gather(*(worker.infer(unit=f"u{n}") for n in range(60)))
    assert {reply.status for reply in replies} == {200}
    assert len(worker.journal.calls) == len({record.id for record in worker.journal.calls}) == 60
    assert worker.model.open == 0


async def test_a_worker_serves_though_it_can_not_say_where(worker, caplog):
    """As on a full disk: it knows its port from its options."""
    await worker.start(ready_file=worker.folder / "nowhere" / "ready")
    assert (await worker.infer()).status == 200
    assert "can't say so" in caplog.text
