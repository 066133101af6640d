"""What one request through the gateway costs: CPU of the worker and latency at the client.

Three processes on loopback: a trivial upstream, one worker with a journal on disk, and a client
here that keeps `--connections` requests under way. CPU is the worker's own, from the kernel.

    python bench/gateway_smoke.py [--requests 20000] [--connections 1] [--direct]
"""

import argparse
import asyncio
import multiprocessing
import os
import random
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import httptools
import msgspec
import uvloop

from shipworthy.domain.contract import Contract, Tensor
from shipworthy.domain.keys import hash_key, new_key
from shipworthy.domain.plan import Arm, Endpoint, Key, Plan, Snapshot, encode_snapshot
from shipworthy.gateway import GatewayOptions, Outside, run
from shipworthy.stores.journal import JournalWriter

ANSWER = (
    b'{"model_name":"digits","model_version":"1",'
    b'"outputs":[{"name":"label","datatype":"INT64","shape":[1],"data":[3]}]}'
)
REQUEST = msgspec.json.encode(
    {
        "inputs": [
            {
                "name": "features",
                "datatype": "FP64",
                "shape": [1, 64],
                "data": [float(n % 17) for n in range(64)],
            }
        ]
    }
)
CONTRACT = Contract(
    inputs=(Tensor("features", "FP64", (-1, 64)),),
    outputs=(Tensor("label", "INT64", (-1,)),),
    side_effects="none",
)


class Answering(asyncio.Protocol):
    """The least HTTP server that there is."""

    WHOLE = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n%s" % (
        len(ANSWER),
        ANSWER,
    )

    def connection_made(self, transport: Any):
        """Begin."""
        self.write = transport.write
        self.parser = httptools.HttpRequestParser(self)

    def data_received(self, data):
        """Parse."""
        self.parser.feed_data(data)

    def on_message_complete(self):
        """A whole message is there."""
        self.write(self.WHOLE)


class Asking(asyncio.Protocol):
    """A client that sends the next request when the last is answered."""

    def __init__(self, request, left, latencies, done):
        self.request, self.left, self.latencies, self.done = request, left, latencies, done

    def connection_made(self, transport: Any):
        """Begin."""
        self.write = transport.write
        self.parser = httptools.HttpResponseParser(self)
        self.ask()

    def ask(self):
        """Send a request."""
        self.began = time.perf_counter()
        self.write(self.request)

    def data_received(self, data):
        """Parse."""
        self.parser.feed_data(data)

    def on_message_complete(self):
        """A whole message is there."""
        assert self.parser.get_status_code() == 200, self.parser.get_status_code()
        self.latencies.append(time.perf_counter() - self.began)
        self.left[0] -= 1
        if self.left[0] > 0:
            self.ask()
        elif not self.done.done():
            self.done.set_result(None)


def upstream(pipe):
    async def main():
        loop = asyncio.get_running_loop()
        server = await loop.create_server(Answering, "127.0.0.1", 0)
        pipe.send(server.sockets[0].getsockname()[1])
        await server.serve_forever()

    uvloop.run(main())


def worker(folder):
    run(
        GatewayOptions(port=0, ready_file=folder / "ready"),
        Outside(
            journal=JournalWriter(folder / "journals", worker="bench", max_bytes=1 << 30),
            newest_snapshot=lambda: folder / "snapshot",
            signing_secret=bytes(32),
            pseudonym_secret=bytes(32),
            clock=time.time,
            uniform=random.random,
        ),
    )


def cpu_seconds(pid):
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


async def load(port, request, count, connections):
    loop = asyncio.get_running_loop()
    latencies, done, left = [], loop.create_future(), [count]
    for _ in range(connections):
        await loop.create_connection(
            lambda: Asking(request, left, latencies, done), "127.0.0.1", port
        )
    await done
    return latencies


def measure(name, pid, port, request, options):
    uvloop.run(load(port, request, 500, options.connections))
    before, began = cpu_seconds(pid), time.perf_counter()
    latencies = uvloop.run(load(port, request, options.requests, options.connections))
    spent, took = cpu_seconds(pid) - before, time.perf_counter() - began
    cuts = statistics.quantiles(latencies, n=100)
    print(
        f"{name}: {spent / len(latencies) * 1e6:.0f} µs CPU a request,"
        f" p50 {cuts[49] * 1e6:.0f} µs, p99 {cuts[98] * 1e6:.0f} µs,"
        f" {len(latencies) / took:.0f} requests/s at {options.connections} connection(s)"
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=20_000)
    parser.add_argument("--connections", type=int, default=1)
    options = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        server = context.Process(target=upstream, args=(there,), daemon=True)
        server.start()
        port = here.recv()
        arm = Arm(
            release="digits@1",
            digest="sha256:" + "0" * 64,
            version=1,
            endpoints=(Endpoint(url=f"http://127.0.0.1:{port}"),),
            served_model="digits",
            contract=CONTRACT,
        )
        candidate = msgspec.structs.replace(arm, release="digits@2", digest="sha256:" + "1" * 64)
        key = new_key("bench", bytes(32))
        plan = Plan(
            name="digits",
            model="digits",
            revision=1,
            fence=1,
            stable=arm,
            candidate=candidate,
            weight=5_000,
            rollout="r-1",
        )
        snapshot = Snapshot(
            written=time.time(),
            plans={"digits": plan},
            keys={"bench": Key(id="bench", hash=hash_key(key), role="client")},
        )
        (folder / "snapshot").write_bytes(encode_snapshot(snapshot))
        gateway = context.Process(target=worker, args=(folder,), daemon=True)
        gateway.start()
        while not (folder / "ready").exists():
            time.sleep(0.01)
        ready = msgspec.json.decode((folder / "ready").read_bytes())
        request = (
            f"POST /v2/models/digits/infer HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer"
            f" {key}\r\nX-Shipworthy-Unit: user-1234\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(REQUEST)}\r\n\r\n"
        ).encode() + REQUEST
        measure("upstream alone", server.pid, port, request, options)
        measure("through the gateway", gateway.pid, ready["port"], request, options)
        for process in (gateway, server):
            process.terminate()
            process.join()


if __name__ == "__main__":
    main()
