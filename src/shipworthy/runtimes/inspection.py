"""Looks at a model before it is registered: loads it as it would be served, and asks it.

What is found becomes the release's frozen contract, so a person need not write one.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Final, TypeVar, cast, get_args
from urllib.parse import quote

import msgspec

from shipworthy.domain.contract import ANY, Contract, Datatype, Tensor
from shipworthy.errors import RuntimeFailed, UsageError
from shipworthy.ports import HttpClient
from shipworthy.protocols import oip
from shipworthy.protocols.oip import TensorValues
from shipworthy.runtimes.folder import ModelFile
from shipworthy.runtimes.hosts import (
    PredictFailed,
    answer_of,
    ending,
    host_command,
    request_frame,
    tensors_of,
)
from shipworthy.runtimes.samples import Inputs, Sample, inputs_from


@dataclass(frozen=True, kw_only=True)
class Inspection:
    """What a model is and how to ask it.

    `sample_request` is a body for `/v2/models/{model}/infer` (None when nothing could be asked
    without a sample) and `sample_outputs` what the model answered, optional outputs included.
    `classes` are the labels behind `predict_proba`'s columns. `notes` are sentences for a person.
    """

    contract: Contract
    engine: str
    engine_version: str
    precision: str | None
    sample_request: bytes | None
    sample_outputs: tuple[TensorValues, ...]
    classes: tuple[Any, ...] | None
    notes: tuple[str, ...]


def inspect_model(
    folder: Path,
    model: ModelFile,
    *,
    python: Path = Path(sys.executable),
    sample: Sample | None = None,
    rows: int = 8,
    timeout: float = 120.0,
) -> Inspection:
    """Load the model at `folder / model.path` with `python` and see what it takes and returns.

    The request is made of the first `rows` complete rows of `sample`. Blocks for at most `timeout`
    seconds. RuntimeFailed is one sentence with its cure: the model does not load, a module is
    missing, the rows do not fit.
    """
    with _session(python, folder, model, timeout) as session:
        loaded = session.ask(None)[0]
        about = session.ask(request_frame("describe"))[0]
        takes: dict[str, Any] = about["takes"]
        inputs = inputs_from(sample, takes, rows=rows) if sample else _without_sample(model, takes)
        outputs = session.predict(inputs.tensors, None) if inputs.tensors else []
        promised = _promised(outputs, inputs.tensors)
        optional: list[TensorValues] = []
        for name in about.get("optional", ()):
            optional += session.predict(inputs.tensors, [name])
        promised += _promised(optional, inputs.tensors, optional=True)
    declared = [_tensor(tensor) for tensor in about.get("outputs", ())]
    contract = Contract(
        inputs=tuple(_tensor(tensor) for tensor in takes.get("tensors", ()))
        or tuple(_batched(tensor) for tensor in inputs.tensors),
        outputs=tuple(declared or promised),
        side_effects=about["side_effects"],
    )
    return Inspection(
        contract=contract,
        engine=loaded["engine"],
        engine_version=loaded["engine_version"],
        precision=_precision(contract, loaded["engine"]),
        sample_request=oip.encode_request(inputs.tensors) if inputs.tensors else None,
        sample_outputs=(*outputs, *optional),
        classes=None if about.get("classes") is None else tuple(about["classes"]),
        notes=(*about["notes"], *inputs.notes),
    )


def _without_sample(model: ModelFile, takes: dict[str, Any]) -> Inputs:
    """Inputs that any such model accepts, to see what it answers."""
    if "tensors" in takes:
        return Inputs([])
    if "features" in takes:
        features: int | None = takes["features"]
        if features is None:
            return Inputs([TensorValues("input", "BYTES", (1,), ["text"])])
        return Inputs([TensorValues("input", "FP64", (1, features), [0.0] * features)])
    if "columns" in takes and not takes["chooses"]:
        names: list[str] = takes["columns"]
        return Inputs([TensorValues(name, "FP64", (1, 1), [0.0]) for name in names])
    raise RuntimeFailed(
        f"{model.path} does not tell what it takes; give a few rows of its data with --sample"
    )


def _batched(tensor: TensorValues) -> Tensor:
    return Tensor(tensor.name, tensor.datatype, (ANY, *tensor.shape[1:]))


def _promised(
    outputs: Sequence[TensorValues], inputs: Sequence[TensorValues], *, optional: bool = False
) -> list[Tensor]:
    """The outputs as a contract's; a first dimension as long as the batch is the batch."""
    rows = {tensor.shape[0] for tensor in inputs if tensor.shape}
    return [
        Tensor(
            output.name,
            output.datatype,
            (ANY, *output.shape[1:]) if set(output.shape[:1]) & rows else output.shape,
            optional,
        )
        for output in outputs
    ]


def _tensor(declared: dict[str, Any]) -> Tensor:
    return Tensor(declared["name"], declared["datatype"], tuple(declared["shape"]))


_PRECISIONS: Final = {"FP16": "float16", "FP32": "float32", "FP64": "float64"}


def _precision(contract: Contract, engine: str) -> str | None:
    """The number format that the model computes in, as far as its tensors tell."""
    for tensor in (*contract.outputs, *contract.inputs):
        if tensor.datatype in _PRECISIONS:
            return _PRECISIONS[tensor.datatype]
    return "float64" if engine == "sklearn" else None


# --- asking a host ----------------------------------------------------------------------------


@dataclass
class _Session:
    """A host that is asked from a blocking function."""

    connection: socket.socket
    process: subprocess.Popen[bytes]
    log: BinaryIO
    model: ModelFile
    timeout: float
    deadline: float

    def ask(self, frame: bytes | None) -> tuple[dict[str, Any], bytes]:
        """Send a frame, if any, and read the answer; RuntimeFailed when the host gives none."""
        try:
            if frame is not None:
                self._in_time()
                self.connection.sendall(frame)
            header_size, body_size = struct.unpack("<II", self._exactly(8))
            header: dict[str, Any] = msgspec.json.decode(self._exactly(header_size))
            return answer_of(header), self._exactly(body_size)
        except TimeoutError:
            raise RuntimeFailed(
                f"{self.model.path} took longer than {self.timeout:g} s to load and answer;"
                " allow more time"
            ) from None
        except (ConnectionError, EOFError):
            raise RuntimeFailed(self._last_words()) from None

    def predict(
        self, inputs: Sequence[TensorValues], outputs: Sequence[str] | None
    ) -> list[TensorValues]:
        """The model's answer to the sample."""
        try:
            header, body = self.ask(request_frame("predict", inputs, outputs))
        except PredictFailed as error:
            raise RuntimeFailed(
                f"{self.model.path} loads but does not predict on the sample ({error});"
                " check that the rows are as in training"
            ) from None
        return tensors_of(header["outputs"], body)

    def _in_time(self) -> None:
        left = self.deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError
        self.connection.settimeout(left)

    def _exactly(self, size: int) -> bytes:
        content = bytearray()
        while len(content) < size:
            self._in_time()
            chunk = self.connection.recv(min(size - len(content), 1 << 20))
            if not chunk:
                raise EOFError
            content += chunk
        return bytes(content)

    def _last_words(self) -> str:
        code = self.process.wait(timeout=10)
        self.log.seek(0)
        lines = self.log.read().decode(errors="replace").strip().splitlines()
        said = f", {lines[-1].strip()}" if lines else ""
        return (
            f"the process that held {self.model.path} ended ({ending(code)}{said});"
            " load the model in that interpreter by hand to see why"
        )


@contextlib.contextmanager
def _session(
    python: Path, folder: Path, model: ModelFile, timeout: float
) -> Generator[_Session, None, None]:
    ours, theirs = socket.socketpair()
    with ours, tempfile.TemporaryFile() as log:
        with theirs:
            try:
                process = subprocess.Popen(
                    host_command(python, folder, model, theirs.fileno()),
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    pass_fds=(theirs.fileno(),),
                    start_new_session=True,
                )
            except OSError as error:
                raise RuntimeFailed(
                    f"the interpreter {python} does not start ({error.strerror}); check its path"
                ) from error
        try:
            yield _Session(ours, process, log, model, timeout, time.monotonic() + timeout)
        finally:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


# --- endpoints --------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class EndpointInspection:
    """What a server elsewhere says of a model; `digest` is the release's, if the server is ours."""

    base_url: str
    model: str
    contract: Contract
    platform: str
    version: str | None
    server: str
    digest: str | None


class _Described(msgspec.Struct):
    name: str
    datatype: str
    shape: tuple[int, ...]


class _ModelMetadata(msgspec.Struct):
    name: str
    platform: str = ""
    versions: tuple[str, ...] | None = None
    inputs: tuple[_Described, ...] = ()
    outputs: tuple[_Described, ...] = ()
    parameters: dict[str, Any] | None = None


class _ServerMetadata(msgspec.Struct):
    name: str = ""
    version: str = ""


_T = TypeVar("_T")
_MODEL_URL = re.compile(
    r"(?P<base>.*?)/v2/models/(?P<model>[^/]+)(?:/versions/(?P<version>[^/]+))?"
)


async def inspect_endpoint(
    url: str, http: HttpClient, *, credential: str | None = None, model: str | None = None
) -> EndpointInspection:
    """Ask a server that speaks the Open Inference Protocol what it serves.

    `url` is the server's, or a model's (`…/v2/models/NAME`): the protocol can't list models, so
    without a name in either place that is a UsageError. `credential` is sent as a bearer token.
    Unavailable when the server does not answer, RuntimeFailed when it answers something else.
    """
    found = _MODEL_URL.fullmatch(url.rstrip("/"))
    name = found["model"] if found else model
    version = found["version"] if found else None
    base = found["base"] if found else url.rstrip("/").removesuffix("/v2")
    if name is None:
        raise UsageError(f"{url} does not say which model; add it, as in {base}/v2/models/NAME")
    headers = {"authorization": f"Bearer {credential}"} if credential else {}

    async def get(path: str) -> tuple[int, bytes]:
        response = await http.request("GET", base + path, headers=headers)
        return response.status, response.body

    status, _ = await get("/v2/health/ready")
    if status != 200:
        raise RuntimeFailed(
            f"{base} is not ready (HTTP {status}); wait for it, or check the address"
        )
    path = f"/v2/models/{quote(name, safe='')}"
    status, body = await get(f"{path}/versions/{version}" if version else path)
    if status != 200:
        raise RuntimeFailed(f"{base} has no model {name!r} (HTTP {status}); check the name")
    metadata = _read(body, _ModelMetadata, f"{base}{path}")
    status, body = await get("/v2")
    server = _read(body, _ServerMetadata, f"{base}/v2") if status == 200 else _ServerMetadata()
    versions = metadata.versions or ()
    digest = (metadata.parameters or {}).get("digest")
    return EndpointInspection(
        base_url=base,
        model=name,
        contract=Contract(
            inputs=_tensors(metadata.inputs, base), outputs=_tensors(metadata.outputs, base)
        ),
        platform=metadata.platform,
        version=version or (versions[-1] if versions else None),
        server=f"{server.name} {server.version}".strip(),
        digest=digest if isinstance(digest, str) else None,
    )


def _read(body: bytes, kind: type[_T], where: str) -> _T:
    try:
        return msgspec.json.decode(body, type=kind)
    except msgspec.DecodeError as error:
        raise RuntimeFailed(
            f"{where} does not speak the Open Inference Protocol ({error}); check the address"
        ) from None


def _tensors(described: Sequence[_Described], base: str) -> tuple[Tensor, ...]:
    for tensor in described:
        if tensor.datatype not in get_args(Datatype):
            raise RuntimeFailed(
                f"{base} declares {tensor.name!r} as {tensor.datatype}, which is not in the"
                " protocol; write the contract in release.yaml by hand"
            )
    return tuple(
        Tensor(tensor.name, cast("Datatype", tensor.datatype), tensor.shape) for tensor in described
    )
