"""Small real models on disk, a release made of any of them, and what the runtimes need."""

import asyncio
import json
import pickle
import shutil
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import joblib
import numpy as np
import pandas as pd
import pytest
import skops.io
from sklearn.compose import ColumnTransformer
from sklearn.datasets import load_digits
from sklearn.ensemble import RandomForestRegressor
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LinearRegression, LogisticRegression
from sklearn.naive_bayes import MultinomialNB
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import OneHotEncoder, StandardScaler

from shipworthy.domain.contract import Contract, Tensor
from shipworthy.domain.lifecycle import Deployment, DeploymentState, Release
from shipworthy.domain.manifest import (
    Artifact,
    ArtifactSpec,
    Environment,
    Inference,
    Manifest,
    ProcessServing,
)
from shipworthy.domain.names import Stage
from shipworthy.errors import Unavailable
from shipworthy.ports import HttpResponse
from shipworthy.stores.blobs import LocalBlobs

LOAN_ROWS = pd.DataFrame(
    {
        "age": [25.0, 40.0, 33.0, 58.0] * 5,
        "member": [True, False, True, True] * 5,
        "postcode": ["01234", "10115", "01234", "80331"] * 5,
    }
)

PREDICTOR = """
import os
import sys
import time

import numpy as np

state = {}


def load():
    state["factor"] = float(open("factor.txt").read())
    print("loaded the factor")


def predict(inputs):
    x = inputs["x"]
    first = x.ravel()[0]
    if first == -1:
        raise ValueError("negative is not for me")
    if first == -2:
        os._exit(7)
    if first == -3:
        time.sleep(600)
    if first == -4:
        os.abort()
    if first == -5:
        return {"y": x * np.nan}
    if first == -6:
        return {"y": x.astype("float32")}
    if first == -7:
        return [1, 2]
    if first == -8:
        time.sleep(0.5)
    return {"y": x * state["factor"], "who": np.array(["me"] * len(x), dtype=object)}
"""


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of models."""
    folder = tmp_path_factory.mktemp("models")
    x, y = load_digits(return_X_y=True)
    digits = LogisticRegression(max_iter=50, tol=0.1).fit(x[:200] / 16, y[:200])
    skops.io.dump(digits, folder / "digits.skops")
    joblib.dump(digits, folder / "digits.joblib")
    (folder / "digits.pkl").write_bytes(pickle.dumps(digits))
    words = np.array(["even", "odd"])[y[:200] % 2]
    skops.io.dump(
        LogisticRegression(max_iter=50, tol=0.1).fit(x[:200], words), folder / "words.skops"
    )
    forest = RandomForestRegressor(3, max_depth=3, random_state=0).fit(x[:200], y[:200])
    skops.io.dump(forest, folder / "forest.skops")
    both = LinearRegression().fit(x[:200], np.stack([y[:200], -y[:200]], axis=1))
    skops.io.dump(both, folder / "both.skops")
    skops.io.dump(StandardScaler().fit(x), folder / "scaler.skops")
    columns = ColumnTransformer(
        [
            ("number", StandardScaler(), ["age"]),
            ("word", OneHotEncoder(handle_unknown="ignore"), ["postcode"]),
        ],
        remainder="passthrough",
    )
    loan = make_pipeline(columns, LogisticRegression())
    loan.fit(LOAN_ROWS, ["no", "yes", "no", "yes"] * 5)
    skops.io.dump(loan, folder / "loan.skops")
    LOAN_ROWS.assign(label="no").to_csv(folder / "loan.csv", index=False)
    mail = make_pipeline(TfidfVectorizer(), MultinomialNB()).fit(["win money", "see you"], [1, 0])
    skops.io.dump(mail, folder / "mail.skops")
    code = folder / "code"
    code.mkdir()
    (code / "predictor.py").write_text(PREDICTOR)
    (code / "factor.txt").write_text("2.5")
    (folder / "x.json").write_text(json.dumps([{"x": 1.0}, {"x": 2.0}]))
    return folder


@pytest.fixture(scope="session")
def onnx_models(models: Path) -> Path:
    """The digits model as a graph, once with plain outputs and once with a list of maps."""
    from skl2onnx import to_onnx

    digits = joblib.load(models / "digits.joblib")
    row = np.zeros((1, 64), dtype=np.float32)
    for name, zipmap in (("plain.onnx", False), ("maps.onnx", True)):
        graph: Any = to_onnx(digits, row, options={"zipmap": zipmap})
        (models / name).write_bytes(graph.SerializeToString())
    return models


class Http:
    """ports.HttpClient over aiohttp."""

    def __init__(self, session: aiohttp.ClientSession) -> None:
        self._session = session

    async def request(self, method, url, *, headers=None, body=None, timeout=10.0) -> HttpResponse:  # noqa: ASYNC109
        try:
            async with self._session.request(
                method, url, headers=headers, data=body, timeout=aiohttp.ClientTimeout(timeout)
            ) as response:
                return HttpResponse(
                    status=response.status,
                    headers={name.lower(): value for name, value in response.headers.items()},
                    body=await response.read(),
                )
        except aiohttp.ClientError as error:
            raise Unavailable(f"{url} does not answer; start it") from error


@pytest.fixture
async def http() -> AsyncIterator[Http]:
    async with aiohttp.ClientSession() as session:
        yield Http(session)


@pytest.fixture
def blobs(tmp_path: Path) -> LocalBlobs:
    return LocalBlobs(tmp_path / "blobs")


CODE_CONTRACT = Contract(
    inputs=(Tensor("x", "FP64", (-1, 1)),),
    outputs=(Tensor("y", "FP64", (-1, 1)), Tensor("who", "BYTES", (-1,), optional=True)),
)
DIGITS_CONTRACT = Contract(
    inputs=(Tensor("input", "FP64", (-1, 64)),),
    outputs=(
        Tensor("predict", "INT64", (-1,)),
        Tensor("predict_proba", "FP64", (-1, 10), optional=True),
    ),
)


@dataclass
class Made:
    """A release and its files in a folder, as a server gets them."""

    release: Release
    manifest: Manifest
    folder: Path
    manifest_file: Path


@pytest.fixture
def make_release(tmp_path: Path, blobs: LocalBlobs) -> Callable[..., Made]:
    """Register files of a folder as a release of the model `tested`."""

    def make(
        source: Path,
        *artifacts: ArtifactSpec,
        contract: Contract = CODE_CONTRACT,
        serving: ProcessServing | None = None,
        lock: bytes | None = None,
    ) -> Made:
        folder = tmp_path / "release"
        pinned = []
        for spec in artifacts:
            (folder / spec.path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source / spec.path, folder / spec.path)
            files = (blobs.put(source / spec.path).model_copy(update={"path": "."}),)
            pinned.append(Artifact(**spec.model_dump(), files=files))
        manifest = Manifest(
            model="tested",
            artifacts=tuple(pinned),
            code=None,
            environment=Environment(
                lock=blobs.put_bytes(lock, "requirements.lock") if lock else None
            ),
            data=(),
            contract=contract,
            inference=Inference(engine="sklearn", engine_version="1"),
            serving=serving or ProcessServing(),
        )
        file = tmp_path / "manifest.json"
        file.write_text(manifest.model_dump_json())
        release = Release(
            model="tested",
            version=3,
            digest=manifest.digest(),
            manifest=manifest.content(),
            created_at=0.0,
            created_by="me",
        )
        return Made(release, manifest, folder, file)

    return make


CODE = (
    ArtifactSpec(path="predictor.py", format="python"),
    ArtifactSpec(path="factor.txt"),
)


@pytest.fixture
def code_release(make_release, models) -> Callable[..., Made]:
    """The python callable as a release."""
    return lambda **options: make_release(models / "code", *CODE, **options)


@pytest.fixture
def deployment() -> Deployment:
    return Deployment(
        id="d1",
        model="tested",
        release="sha256:0",
        stage=Stage.STAGING,
        wanted=True,
        state=DeploymentState.STARTING,
        since=0.0,
    )


class Served:
    """A model server in a process of its own."""

    def __init__(self, process: subprocess.Popen[bytes], ready_file: Path, log: Path) -> None:
        self.process = process
        self.ready_file = ready_file
        self.log = log
        self.url = ""

    def get(self, path: str, body: object = None, method: str | None = None) -> tuple[int, dict]:
        data = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, method=method)
        try:
            with urllib.request.urlopen(request, timeout=30) as response:
                return response.status, json.loads(response.read())
        except urllib.error.HTTPError as error:
            with error:
                return error.code, json.loads(error.read())

    def infer(self, *values: float, outputs: list[str] | None = None) -> tuple[int, dict]:
        body = code_request(*values, outputs=outputs)
        return self.get("/v2/models/tested/infer", body)

    def ready(self) -> bool:
        return self.get("/v2/health/ready")[0] == 200


def code_request(*values: float, outputs: list[str] | None = None) -> dict:
    tensor = {"name": "x", "datatype": "FP64", "shape": [len(values), 1], "data": list(values)}
    request = {"inputs": [tensor]}
    return request | ({"outputs": [{"name": name} for name in outputs]} if outputs else {})


def wait_until(holds: Callable[[], object], seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


async def wait_for(holds: Callable[[], object], seconds: float = 30.0) -> None:
    async with asyncio.timeout(seconds):
        while not holds():  # noqa: ASYNC110  # it is another process that is waited for
            await asyncio.sleep(0.02)


def hosts_of(pid: int) -> list[int]:
    """The running children of a process."""
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Callable[..., Served]]:
    """Start a model server; all are ended afterwards."""
    started: list[Served] = []

    def start(made: Made, *options: str, wait: bool = True) -> Served:
        ready_file, log = tmp_path / "ready.json", tmp_path / "server.log"
        ready_file.unlink(missing_ok=True)
        command = [
            sys.executable,
            "-m",
            "shipworthy.runtimes.model_server",
            "--release",
            "tested@3",
        ]
        command += ["--folder", str(made.folder), "--manifest", str(made.manifest_file)]
        with log.open("wb") as output:
            process = subprocess.Popen(
                [*command, "--ready-file", str(ready_file), *options],
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=output,
            )
        served = Served(process, ready_file, log)
        started.append(served)
        if wait:
            wait_until(lambda: ready_file.exists() or process.poll() is not None)
            served.url = json.loads(ready_file.read_text())["url"]
            wait_until(served.ready)
        return served

    yield start
    for served in started:
        if served.process.poll() is None:
            served.process.send_signal(signal.SIGKILL)
        served.process.communicate()


@pytest.fixture(scope="session")
def tools():
    """The helpers above, for test files: this folder is no package."""
    return sys.modules[__name__]
