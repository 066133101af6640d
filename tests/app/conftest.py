"""A project on this machine with a real `shipworthy up`, and the command line to drive it."""

from __future__ import annotations

import io
import json
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import skops.io
from sklearn.datasets import load_digits
from sklearn.linear_model import RidgeClassifier

from shipworthy.app.access import create_key
from shipworthy.app.founding import apply_policies, make_project
from shipworthy.cli import main

POLICY = """
model: digits
preset: prototype
promotion:
  staging: {checks: [assets.stored]}
  production:
    checks: [assets.stored, contract.enforced, auth.required, parity.version, contract.compatible]
    rules: [{metric: heldout.accuracy, at_least: 0.8}]
    approvals: 1
rollout:
  steps: [{weight: 20%, requests: 20}, {weight: 50%, requests: 20}]
  margin: 10%
  lease: 3s
deadlines: {attempt: 3s, total: 10s}
"""


def release_yaml(description: str, **changes: Any) -> dict[str, Any]:
    return {
        "model": "digits",
        "description": description,
        "owner": {"name": "Vision team", "email": "vision@shipworthy.dev"},
        "artifacts": [{"path": "model.skops", "format": "skops"}],
        "data": [{"name": "sample", "path": "rows.csv", "role": "sample"}],
        "metrics": {"heldout": {"accuracy": {"value": 0.93, "n": 500}}},
        **changes,
    }


def wait_for(what: Callable[[], Any], seconds: float = 60.0) -> Any:
    """What `what` gives once it gives something true."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        found = what()
        if found:
            return found
        time.sleep(0.05)
    pytest.fail(f"waited {seconds:.0f} s in vain for {what}")


@dataclass
class Answer:
    status: int
    body: Any
    headers: dict[str, str]


@dataclass
class Done:
    """A command that has ended."""

    code: int
    stdout: str
    stderr: str

    @property
    def output(self) -> str:
        return self.stdout + self.stderr


def stream_text(stream: io.TextIOWrapper) -> str:
    stream.flush()
    stream.seek(0)
    return stream.read()


@dataclass
class Town:
    """A project folder, its processes and its people."""

    root: Path
    up: subprocess.Popen[bytes] | None = None
    keys: dict[str, str] = field(default_factory=dict)

    def sw(self, *arguments: str, key: str | None = None) -> str:
        """Run a command in the project that must end well; what it printed."""
        done = self.run(*arguments, key=key)
        assert done.code == 0, done.output
        return done.output

    def run(self, *arguments: str, key: str | None = None) -> Done:
        """Run a command in the project, in this very process: a hundred of them need no hundred
        interpreters. Nothing that it prints is a traceback."""
        printed, said = (io.TextIOWrapper(io.BytesIO(), "utf-8") for _ in range(2))
        code = 0
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(self.root)
            patch.setattr(sys, "argv", ["shipworthy", *arguments])
            patch.setattr(sys, "stdout", printed)
            patch.setattr(sys, "stderr", said)
            patch.setenv("COLUMNS", "200")
            if key is not None:
                patch.setenv("SHIPWORTHY_KEY", self.keys[key])
            try:
                main()
            except SystemExit as end:
                code = end.code if isinstance(end.code, int) else int(end.code is not None)
        done = Done(code, *(stream_text(stream) for stream in (printed, said)))
        assert "Traceback" not in done.output, done.output
        return done

    def key(self, holder: str, *options: str) -> str:
        made = self.run("keys", "create", holder, *options)
        assert made.code == 0, made.stderr
        self.keys[holder] = made.stdout.strip()
        return self.keys[holder]

    def start(self) -> None:
        log = (self.root / "up.log").open("ab")
        with log:
            self.up = subprocess.Popen(
                [sys.executable, "-m", "shipworthy", "up"],
                cwd=self.root,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        wait_for(lambda: self.address() is not None or self.up_ended())

    def up_ended(self) -> bool:
        assert self.up is not None
        assert self.up.poll() is None, (self.root / "up.log").read_text()
        return False

    def stop(self, number: signal.Signals = signal.SIGINT) -> int:
        assert self.up is not None
        self.up.send_signal(number)
        code = self.up.wait(timeout=60)
        self.up = None
        return code

    def end(self) -> None:
        """Leave nothing behind."""
        if self.up is not None and self.up.poll() is None:
            self.stop()

    def address(self) -> dict[str, Any] | None:
        try:
            return json.loads((self.root / ".shipworthy" / "gateway.json").read_bytes())
        except (OSError, ValueError):
            return None

    def workers(self) -> dict[str, int]:
        """The ids of the gateway's processes that count, by name."""
        try:
            told = json.loads((self.root / ".shipworthy" / "processes.json").read_bytes())
        except (OSError, ValueError):
            return {}
        pids = {child["name"]: child["pid"] for child in told["children"] if child["pid"]}
        return {name: pid for name, pid in pids.items() if name.startswith("worker-")}

    def process(self, module: str) -> int | None:
        """The id of this project's process that runs a module."""
        for folder in Path("/proc").iterdir():
            if not folder.name.isdigit():
                continue
            try:
                words = (folder / "cmdline").read_bytes().decode().split("\0")
            except OSError:
                continue
            if module in words and any(str(self.root) in word for word in words):
                return int(folder.name)
        return None

    def call(
        self,
        path: str = "/v2/models/digits/infer",
        body: bytes | None = None,
        key: str | None = "shop",
        **headers: str,
    ) -> Answer:
        address = self.address()
        if address is None:
            return Answer(0, "no gateway", {})
        request = urllib.request.Request(f"http://127.0.0.1:{address['port']}{path}", data=body)
        if key is not None:
            request.add_header("Authorization", f"Bearer {self.keys.get(key, key)}")
        for name, value in headers.items():
            request.add_header(name.replace("_", "-"), value)
        try:
            with urllib.request.urlopen(request, timeout=15) as answer:
                return Answer(answer.status, answer.read(), dict(answer.headers))
        except urllib.error.HTTPError as error:
            with error:
                return Answer(error.code, error.read(), dict(error.headers))
        except OSError as error:
            return Answer(0, str(error), {})

    def infer(self, unit: str = "u", row: int = 0, scale: int = 1, **options: Any) -> Answer:
        return self.call(body=request_body(row, scale), X_Shipworthy_Unit=unit, **options)

    def write_release(self, name: str, **changes: Any) -> Path:
        folder = self.root / name
        folder.mkdir()
        model, features = trained()
        skops.io.dump(model, folder / "model.skops")
        header = ",".join(f"p{index}" for index in range(64))
        np.savetxt(folder / "rows.csv", features[:8], delimiter=",", header=header, comments="")
        (folder / "release.yaml").write_text(json.dumps(release_yaml(name, **changes)))
        return folder / "release.yaml"

    def to_production(self, name: str, version: int, **changes: Any) -> None:
        self.sw("release", "create", "-f", str(self.write_release(name, **changes)))
        self.sw("promote", f"digits@{version}", "--to", "staging")
        self.sw("approve", f"digits@{version}", key="bob")
        self.sw("promote", f"digits@{version}", "--to", "production")


@cache
def trained() -> tuple[RidgeClassifier, Any]:
    features, labels = load_digits(return_X_y=True)
    return RidgeClassifier().fit(features, labels), features


@cache
def request_body(row: int = 0, scale: int = 1) -> bytes:
    features, _ = load_digits(return_X_y=True)
    tensor = {
        "name": "input",
        "shape": [1, 64],
        "datatype": "FP64",
        "data": (features[row] * scale).tolist(),
    }
    return json.dumps({"inputs": [tensor]}).encode()


def found(root: Path) -> Town:
    """A founded project with a second person and a client, not yet running."""
    made = Town(root)
    session = make_project(made.root, preset="prototype", solo=False)
    settings = made.root / "shipworthy.yaml"
    settings.write_text(settings.read_text() + "gateway: {port: 0}\n")
    (made.root / "policy.yaml").write_text(POLICY)
    apply_policies(session, made.root, dry_run=False)
    made.keys["bob"] = create_key(session, "bob")
    made.keys["shop"] = create_key(session, "shop", models=("digits",), kind="service")
    return made


@pytest.fixture
def town(tmp_path: Path) -> Iterator[Town]:
    """A project of the test's own, not yet running."""
    made = found(tmp_path / "project")
    yield made
    made.end()


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Town]:
    """A running project with one release in production, for tests that leave it so."""
    made = found(tmp_path_factory.mktemp("shared") / "project")
    made.start()
    made.to_production("first", 1)
    wait_for(lambda: made.infer().status == 200)
    yield made
    made.end()
