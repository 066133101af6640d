"""Registering releases: the files, the contract found by asking the model, and the record."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from shipworthy.app.serving import environments
from shipworthy.app.session import Session
from shipworthy.domain.contract import Contract
from shipworthy.domain.manifest import (
    ArtifactSpec,
    EndpointServing,
    Environment,
    Manifest,
    ReleaseSpec,
)
from shipworthy.errors import NotFound, UsageError
from shipworthy.ports import Progress
from shipworthy.protocols import oip
from shipworthy.protocols.documents import read_document
from shipworthy.protocols.messages import InvalidMessage
from shipworthy.protocols.questions import read_samples
from shipworthy.release.create import Creation, Sources, create_release, find_sources
from shipworthy.runtimes.inspection import Inspection, inspect_model
from shipworthy.runtimes.samples import Sample, inputs_from

Tell = Callable[[str], None]


def read_spec(file: Path) -> ReleaseSpec:
    """Read `release.yaml`; NotFound, or InvalidDocument with every problem."""
    if not file.is_file():
        message = f"no file {file}; 'shipworthy try MODEL' writes one"
        raise NotFound(message)
    return read_document(file.read_bytes(), str(file), ReleaseSpec)


def sources_of(spec: ReleaseSpec, folder: Path) -> Sources:
    """Every file that the release will pin."""
    return find_sources(spec, folder)


def register(
    session: Session,
    spec: ReleaseSpec,
    folder: Path,
    *,
    progress: Progress | None = None,
    tell: Tell = lambda _: None,
) -> Creation:
    """Pin, store and register a release; its contract is found out when it declares none."""

    def infer(spec: ReleaseSpec, folder: Path, sample: Path | None) -> Contract:
        return look_at(spec, folder, sample, tell=tell).contract

    return create_release(
        spec,
        folder,
        blobs=session.blobs,
        ledger=session.ledger,
        clock=session.clock,
        maker=session.actor().id,
        infer=infer,
        progress=progress,
    )


def look_at(spec: ReleaseSpec, folder: Path, sample: Path | None, *, tell: Tell) -> Inspection:
    """Load the model in the interpreter that would serve it, and ask it with the sample."""
    if isinstance(spec.serving, EndpointServing):
        message = (
            "an endpoint's contract is not found out here; declare it, or use 'shipworthy try'"
        )
        raise UsageError(message)
    lock = spec.environment.lock
    content = (folder / lock).read_bytes() if lock else None
    python = Path(sys.executable)
    if content is not None or spec.environment.python:
        environment = Environment(python=spec.environment.python)
        python = environments().interpreter(environment, content, tell)
    tell(f"loading {spec.model}")
    return inspect_model(
        folder,
        _model_of(spec),
        python=python,
        sample=Sample.read(sample, python=python) if sample else None,
    )


def _model_of(spec: ReleaseSpec) -> ArtifactSpec:
    models = [artifact for artifact in spec.artifacts if artifact.format != "file"]
    chosen = [artifact for artifact in models if artifact.format == "python"] or models
    if len(chosen) != 1:
        message = (
            f"{len(chosen)} artifacts could be the model; give exactly one a model's format and the"
            " others 'format: file'"
        )
        raise UsageError(message)
    return chosen[0]


def sample_requests(session: Session, manifest: Manifest, rows: int) -> list[bytes]:
    """Requests made of the release's recorded sample; none when it has none.

    For tensors that is one, of its first rows; for a language model each that is in the file.
    """
    files = [file for data in manifest.data if data.role == "sample" for file in data.files]
    if not files:
        return []
    with tempfile.TemporaryDirectory(prefix="shipworthy-") as folder:
        copy = Path(folder) / Path(files[0].path).name
        session.blobs.copy_to(files[0], copy)
        if not manifest.contract.tensors:
            return read_requests(copy)
        sample = Sample.read(copy)
    declared = [
        {"name": tensor.name, "datatype": tensor.datatype, "shape": list(tensor.shape)}
        for tensor in manifest.contract.inputs
        if not tensor.optional
    ]
    return [oip.encode_request(inputs_from(sample, {"tensors": declared}, rows=rows).tensors)]


def read_requests(file: Path) -> list[bytes]:
    """The requests for a language model in a file; UsageError says which is none."""
    try:
        return read_samples(file.read_bytes())
    except InvalidMessage as problem:
        message = (
            f"{file.name} is no sample for a language model: {problem}; give one request's body in"
            " JSON on each line"
        )
        raise UsageError(message) from None
