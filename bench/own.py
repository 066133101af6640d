"""Our gateway as `bench/gateway.py` measures it: with all on that it does in production.

Callers have keys, a rollout splits them between two releases, the contract is checked, key and
model have limits of every kind, and every request is written to a journal with its whole bodies.
"""

from __future__ import annotations

import fcntl
import os
import random
import re
import socket
import subprocess
import sys
import time
from collections.abc import Generator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from urllib.request import Request, urlopen

import msgspec
from peers import Service, answering, end
from upstreams import INFER_PATH, Unusable

from shipworthy.domain.contract import Contract, Tensor
from shipworthy.domain.keys import hash_key, new_key
from shipworthy.domain.plan import (
    Arm,
    Capture,
    Endpoint,
    Key,
    Limits,
    Plan,
    Price,
    Snapshot,
    encode_snapshot,
)

CHAT = Contract(protocol="openai", operations=("chat",), side_effects="none")
INFERENCE = Contract(
    inputs=(Tensor("features", "FP64", (-1, 64)),),
    outputs=(Tensor("label", "INT64", (-1,)),),
    side_effects="none",
)
INFER_REQUEST = msgspec.json.encode(
    {
        "inputs": [
            {
                "name": "features",
                "datatype": "FP64",
                "shape": [1, 64],
                "data": [float(number % 17) for number in range(64)],
            }
        ]
    }
)
_PLENTY = Limits(
    requests_per_minute=1_000_000_000,
    tokens_per_minute=100_000_000_000,
    concurrency=1_000_000,
    budget_per_day=1e9,
)
_JOURNAL_BYTES = 32 * 2**30


@contextmanager
def own_gateway(
    folder: Path, upstream: int, *, name: str = "ours", workers: int = 1
) -> Generator[Service]:
    """Our gateway before an upstream; all its workers are one process group."""
    folder.mkdir()
    key = new_key("bench", bytes(32))
    (folder / "snapshot").write_bytes(encode_snapshot(_snapshot(key, upstream)))
    log = folder / "log"
    command = f"import pathlib, own; own.serve(pathlib.Path({str(folder)!r}), {workers})"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-c", command],
            env={**os.environ, "PYTHONPATH": str(Path(__file__).parent)},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    service = Service(
        name, 0, process.pid, model="chat", headers={"Authorization": f"Bearer {key}"}
    )
    try:
        yield answering(process, service, log, folder / "port")
    finally:
        end(process)


_NEVER = re.compile(
    r"^shipworthy_gateway_(?:records_dropped|fallbacks|retries|ejections|unhandled_errors)_total"
    r"(?:{.*})? [1-9].*$",
    re.MULTILINE,
)
_SERVED = re.compile(r'^shipworthy_gateway_attempts_total{.*release="(chat@.)"', re.MULTILINE)


def check_own(service: Service) -> None:
    """Unusable unless both releases answered, at the first attempt, and all that was written."""
    request = Request(f"http://127.0.0.1:{service.port}/metrics", headers=dict(service.headers))
    with urlopen(request, timeout=10.0) as response:
        numbers = response.read().decode()
    if found := _NEVER.findall(numbers):
        raise Unusable("our gateway had trouble: " + "; ".join(found))
    if len(served := set(_SERVED.findall(numbers))) != 2:
        raise Unusable(f"our gateway split nothing: only {served} answered")


def tidy(folder: Path) -> None:
    """Delete the journal's closed segments, as the lake's writer does when it has them."""
    for segment in (folder / "journals").glob("*.journal"):
        with suppress(OSError), segment.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            segment.unlink()


def infer_service(service: Service) -> Service:
    """The same gateway, asked for an inference by the Open Inference Protocol."""
    return replace(service, path=INFER_PATH)


def _snapshot(key: str, upstream: int) -> Snapshot:
    plans = {"chat": _plan("chat", CHAT, upstream), "digits": _plan("digits", INFERENCE, upstream)}
    hashed = Key(id="bench", hash=hash_key(key), role="client", limits=_PLENTY)
    return Snapshot(written=time.time(), plans=plans, keys={"bench": hashed})


def _plan(name: str, contract: Contract, upstream: int) -> Plan:
    stable = Arm(
        release=f"{name}@1",
        digest="sha256:" + "0" * 64,
        version=1,
        endpoints=(Endpoint(url=f"http://127.0.0.1:{upstream}"),),
        served_model="m" if name == "chat" else name,
        contract=contract,
        price=Price(per_1k_input=0.001, per_1k_output=0.002, per_call=0.0001),
    )
    candidate = msgspec.structs.replace(
        stable, release=f"{name}@2", digest="sha256:" + "1" * 64, version=2
    )
    return Plan(
        name=name,
        model=name,
        revision=1,
        fence=1,
        stable=stable,
        candidate=candidate,
        weight=5_000,
        rollout="r-1",
        capture=Capture(payloads="full"),
        limits=_PLENTY,
    )


def serve(folder: Path, workers: int) -> None:
    """Serve with that many workers on one port; called in a process of its own."""
    from shipworthy.gateway import GatewayOptions, Outside, run
    from shipworthy.stores.journal import JournalWriter
    from shipworthy.stores.limits import UsageTable

    listener = socket.create_server(("127.0.0.1", 0), backlog=2048)
    listener.settimeout(0)
    (folder / "port.new").write_text(str(listener.getsockname()[1]))
    (folder / "port.new").rename(folder / "port")
    index = 0
    while index + 1 < workers and os.fork():
        index += 1
    options = GatewayOptions(
        sockets=(listener.fileno(),),
        worker_index=index,
        workers=workers,
        max_connections=8192,
        max_in_flight=8192,
    )
    table = UsageTable(folder / "limits", clock=time.time)
    run(
        options,
        Outside(
            journal=JournalWriter(
                folder / "journals", worker=f"w{index}", max_bytes=_JOURNAL_BYTES
            ),
            newest_snapshot=lambda: folder / "snapshot",
            signing_secret=bytes(32),
            pseudonym_secret=bytes(32),
            clock=time.time,
            uniform=random.SystemRandom().random,
            limits=table,
        ),
    )
