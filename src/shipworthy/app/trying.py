"""`shipworthy try`: from a model file or a URL to an answer through the gateway, in one step."""

from __future__ import annotations

import asyncio
import math
import os
import re
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from shipworthy.app import checks
from shipworthy.app.asking import ask, await_answer
from shipworthy.app.founding import apply_policies, make_project
from shipworthy.app.gateway_address import gateway_url
from shipworthy.app.http import AiohttpClient
from shipworthy.app.releasing import look_at, read_requests, register
from shipworthy.app.session import PROJECT_VARIABLE, Session, open_session
from shipworthy.app.status import is_running
from shipworthy.app.supervisor import Up, run
from shipworthy.domain.contract import Contract
from shipworthy.domain.lifecycle import IntentKind, IntentStatus, Release
from shipworthy.domain.manifest import ArtifactFormat, EndpointServing, ReleaseSpec
from shipworthy.domain.names import MODEL, Stage, plan_name
from shipworthy.errors import Conflict, NotFound, RuntimeFailed, UnsafeArtifact, UsageError
from shipworthy.protocols import oip
from shipworthy.protocols.documents import read_document, write_document
from shipworthy.protocols.oip import TensorValues
from shipworthy.protocols.questions import PATHS, addressed, operation_of, write_samples
from shipworthy.runtimes.endpoint import read_credential
from shipworthy.runtimes.servers import Asking, ServerInspection, inspect_server

START_SECONDS = 900.0
LEAST_REASON = 8
_FORMATS: dict[str, ArtifactFormat] = {
    ".skops": "skops", ".joblib": "joblib", ".pkl": "pickle", ".pickle": "pickle",
    ".onnx": "onnx", ".py": "python",
}  # fmt: skip
_ZERO: dict[str, Any] = {"BOOL": False, "BYTES": "text"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """What to try.

    `unsafe` is the reason for loading a file that can run code. `served_model` is its name on a
    server that serves several, an adapter's (LoRA) too.
    """

    target: str
    sample: Path | None = None
    name: str | None = None
    unsafe: str | None = None
    credential: str | None = None
    served_model: str | None = None


@dataclass(frozen=True, slots=True)
class Tried:
    """A release that was made, a request that it takes, and the files written on the way.

    `path` is where the gateway takes that request.
    """

    release: Release
    path: str
    sample_request: str
    release_file: Path
    written: tuple[Path, ...]
    notes: tuple[str, ...] = field(default=())


Show = Callable[[Tried, str, Path, list[str]], None]
"""Shows what was tried, given the gateway's URL, the admin key's file and what is missing."""


def session_here() -> Session:
    """The project around the working folder, or a new one in it."""
    try:
        return open_session(prepare=True)
    except NotFound:
        if os.environ.get(PROJECT_VARIABLE):
            raise
        return make_project(Path.cwd(), preset="standard", solo=False)


def look_and_register(session: Session, wanted: Wanted) -> Tried:
    """Look at a model, write its `release.yaml` and `policy.yaml`, and register it."""
    if re.match(r"https?://", wanted.target):
        return asyncio.run(_try_endpoint(session, wanted))
    if "://" in wanted.target or wanted.target.startswith("models:"):
        message = f"{wanted.target} can't be read; give a model file, or the URL of a server"
        raise UsageError(message)
    return _try_file(session, wanted)


# --- a file -----------------------------------------------------------------------------------


def _try_file(session: Session, wanted: Wanted) -> Tried:
    file = Path(wanted.target)
    if not file.is_file():
        message = f"no file {file}; give a model file, or the URL of a server"
        raise NotFound(message)
    folder = file.parent
    release_file, spec = _described(folder, _spec_of(file, wanted))
    samples = [data.path for data in spec.data if data.role == "sample"]
    sample = folder / samples[0] if samples else None
    seen = look_at(spec, folder, sample, tell=lambda _: None)
    spec = spec.model_copy(update={"contract": seen.contract})
    made = register(session, spec, folder)
    written = [_write(release_file, spec)]
    written += _ensure_policy(session, folder, spec.model)
    request = _one_row(seen.sample_request, seen.contract)
    notes = (*(f"Note: {note}." for note in seen.notes), made.sentence)
    return Tried(made.release, _infer(spec.model), request, release_file, tuple(written), notes)


def _infer(model: str) -> str:
    return f"/v2/models/{plan_name(model, Stage.DEVELOPMENT)}/infer"


def _spec_of(file: Path, wanted: Wanted) -> ReleaseSpec:
    kind = _FORMATS.get(file.suffix.lower())
    if kind is None:
        message = f"{file.name} has no ending that tells its format; one of {', '.join(_FORMATS)}"
        raise UsageError(message)
    if wanted.unsafe is not None and len(wanted.unsafe) < LEAST_REASON:
        message = f"--unsafe takes a reason of at least {LEAST_REASON} characters"
        raise UsageError(message)
    if kind in {"joblib", "pickle"} and not wanted.unsafe:
        message = (
            f"{file.name} is a {kind} file: loading it runs whatever code is inside; save the model"
            ' with skops instead, or say why you trust it: --unsafe "made by our own training job"'
        )
        raise UnsafeArtifact(message)
    artifact = {"path": file.name, "format": kind, "unsafe": wanted.unsafe}
    content: dict[str, Any] = {
        "model": wanted.name or _name(file.stem),
        "artifacts": [artifact],
        "data": _sample(wanted, file.parent),
    }
    return read_document(msgspec.json.encode(content), str(file), ReleaseSpec)


def _sample(wanted: Wanted, folder: Path) -> list[dict[str, str]]:
    if wanted.sample is None:
        return []
    return [{"name": "sample", "path": _near(wanted.sample, folder), "role": "sample"}]


def _near(path: Path, folder: Path) -> str:
    """A path as `release.yaml` should say it: relative where it lies beside the model."""
    if not path.is_file():
        message = f"no file {path}; --sample takes a CSV with a header, or JSON"
        raise NotFound(message)
    resolved, root = path.resolve(), folder.resolve()
    return str(resolved.relative_to(root)) if resolved.is_relative_to(root) else str(resolved)


def _name(text: str) -> str:
    name = re.sub(r"[^a-z0-9._-]+", "-", text.lower()).strip("-._")[:63]
    if not MODEL.fullmatch(name):
        message = f"no model name can be made of {text!r}; give one with --name"
        raise UsageError(message)
    return name


def _described(folder: Path, spec: ReleaseSpec) -> tuple[Path, ReleaseSpec]:
    """Where the description goes, and all that it says: what a person added to it is kept.

    Conflict when it would replace one that a person wrote, or that of another model.
    """
    file = folder / "release.yaml"
    if not file.exists():
        return file, spec
    other = read_document(file.read_bytes(), str(file), ReleaseSpec)
    same = other.model == spec.model and other.artifacts == spec.artifacts
    if not same or other.contract is None:
        message = (
            f"{file} describes another model or was written by hand; register what it says with"
            f" 'shipworthy release create -f {file}', or move it away"
        )
        raise Conflict(message)
    replaced = {"sample"} if spec.data else set[str]()
    kept = tuple(data for data in other.data if data.role not in replaced)
    remote = isinstance(spec.serving, EndpointServing)
    serving = spec.serving if remote else other.serving
    return file, other.model_copy(update={"data": (*spec.data, *kept), "serving": serving})


def _write(file: Path, spec: ReleaseSpec) -> Path:
    """Write the description, unless it says this already: a person's comments are kept then."""
    if not file.exists() or read_document(file.read_bytes(), str(file), ReleaseSpec) != spec:
        file.write_text(write_document(spec), encoding="utf-8")
    return file


def _ensure_policy(session: Session, folder: Path, model: str) -> list[Path]:
    """Put the project's preset in force for a model that has no policy yet."""
    with session.ledger.read() as tx:
        if tx.policies.current(model) is not None:
            return []
    file = folder / "policy.yaml"
    if file.exists():
        file = folder / f"{model}.policy.yaml"
    if not file.exists():
        text = f"model: {model}\npreset: {session.project.settings.preset}\n"
        file.write_text(text, encoding="utf-8")
    apply_policies(session, file, dry_run=False)
    return [file]


def _one_row(request: bytes | None, contract: Contract) -> str:
    """A request of one row for a person to copy; zeros where the model gave no sample."""
    tensors: list[TensorValues] = []
    if request is not None:
        declared = {tensor.name: tensor for tensor in contract.inputs}
        for tensor in oip.decode_request(request).inputs:
            flat: list[Any] = msgspec.json.decode(tensor.data)
            shape = (1, *tensor.shape[1:])
            datatype = declared[tensor.name].datatype
            tensors.append(TensorValues(tensor.name, datatype, shape, flat[: math.prod(shape)]))
    else:
        for tensor in contract.inputs:
            shape = tuple(1 if size < 0 else size for size in tensor.shape)
            zeros = [_ZERO.get(tensor.datatype, 0)] * math.prod(shape)
            tensors.append(TensorValues(tensor.name, tensor.datatype, shape, zeros))
    return oip.encode_request(tensors).decode()


# --- a URL ------------------------------------------------------------------------------------


async def _try_endpoint(session: Session, wanted: Wanted) -> Tried:
    asking = Asking(
        url=wanted.target,
        model=wanted.served_model,
        name=wanted.name,
        credential=read_credential(wanted.credential) if wanted.credential else None,
        rows=wanted.sample,
        requests=_own_requests(wanted),
    )
    async with AiohttpClient() as http:
        seen = await inspect_server(asking, http)
    if wanted.sample is not None and not seen.contract.tensors:
        read_requests(wanted.sample)  # one that holds none is told, not passed over
    if seen.model is None:
        message = f"{seen.base_url} does not tell what its model is called; name it with --name"
        raise UsageError(message)
    model = wanted.name or _name(seen.model.rpartition("/")[2])
    folder = session.project.root / model
    folder.mkdir(exist_ok=True)
    serving = {
        "runtime": "endpoint",
        "urls": [seen.base_url],
        "served_model": seen.model,
        "credential": wanted.credential,
    }
    written = _keep_requests(folder, seen, wanted)
    data = [{"name": "sample", "path": file.name, "role": "sample"} for file in written]
    content = {"model": model, "serving": serving, "data": data or _sample(wanted, folder)}
    spec = read_document(msgspec.json.encode(content), wanted.target, ReleaseSpec)
    release_file, spec = _described(folder, spec)
    spec = spec.model_copy(update={"contract": seen.contract})
    made = register(session, spec, folder)
    written += [_write(release_file, spec), *_ensure_policy(session, folder, model)]
    path, request = _request_for(plan_name(model, Stage.DEVELOPMENT), seen)
    notes = (seen.seen, made.sentence)
    return Tried(made.release, path, request, release_file, tuple(written), notes)


def _own_requests(wanted: Wanted) -> list[bytes]:
    """The requests in the sample, if it is one for a language model."""
    sample = wanted.sample
    if sample is None or sample.suffix.lower() not in {".json", ".jsonl", ".ndjson"}:
        return []
    _near(sample, sample.parent)
    with suppress(UsageError):
        return read_requests(sample)
    return []


def _keep_requests(folder: Path, seen: ServerInspection, wanted: Wanted) -> list[Path]:
    """Keep what a language model was asked, unless there is a sample already."""
    file = folder / "sample.jsonl"
    if seen.contract.tensors or wanted.sample is not None or (folder / "release.yaml").exists():
        return []
    file.write_bytes(write_samples(seen.requests))
    return [file]


def _request_for(name: str, seen: ServerInspection) -> tuple[str, str]:
    """A request that clients may copy, and the door where it is put."""
    contract = seen.contract
    if not contract.tensors:
        request = seen.requests[0]
        return f"/v1{PATHS[operation_of(request)]}", addressed(request, name).decode()
    if contract.protocol == "mlflow":
        return f"/models/{name}/invocations", seen.requests[0].decode()
    return f"/v2/models/{name}/infer", _one_row(None, contract)


# --- serving it -------------------------------------------------------------------------------


def serve_it(session: Session, tried: Tried, *, tell: Callable[[str], None], show: Show) -> int:
    """Have the release served in development and show it; the exit code.

    Without a `shipworthy up` in this project everything is started here, until Ctrl-C.
    """
    if is_running(session):
        _await_answering(session, tried)
        _show(session, tried, gateway_url(session.project), show)
        return 0

    async def ready(running: Up) -> None:
        await asyncio.to_thread(_await_answering, session, tried, running.stopping)
        if not running.stopping():
            await asyncio.to_thread(_show, session, tried, running.url, show)
        tell("\nIt serves until Ctrl-C; 'shipworthy up' brings it back.")

    return run(session, ready)


def _await_answering(
    session: Session, tried: Tried, given_up: Callable[[], bool] = lambda: False
) -> None:
    intent = ask(
        session,
        IntentKind.PROMOTE,
        tried.release.model,
        actor=session.actor(),
        release=tried.release,
        stage=Stage.DEVELOPMENT,
    )
    answer = await_answer(session, intent, timeout=START_SECONDS, given_up=given_up)
    if answer.status is IntentStatus.REFUSED:
        raise RuntimeFailed(answer.answer)


def _show(session: Session, tried: Tried, url: str, show: Show) -> None:
    missing = checks.missing_for_production(session, tried.release)
    show(tried, url, session.project.secrets / "admin-key", missing)
