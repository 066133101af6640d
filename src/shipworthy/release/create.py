"""From `release.yaml` and a folder to a registered release: scan, pin, store, register.

Nothing is registered until everything is stored, and the registration with its audit entry is one
transaction. What is written is a function of the files alone: the same files give the same digest,
so doing it twice changes nothing.
"""

from __future__ import annotations

import platform
import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as installed_version
from pathlib import Path
from typing import Literal, Protocol

from shipworthy.domain.contract import Contract
from shipworthy.domain.lifecycle import Release
from shipworthy.domain.manifest import (
    Artifact,
    ArtifactSpec,
    Data,
    EndpointServing,
    Environment,
    Inference,
    Manifest,
    PinnedFile,
    ReleaseSpec,
)
from shipworthy.domain.names import ReleaseReference
from shipworthy.errors import Conflict, UsageError
from shipworthy.ports import Blobs, Clock, Ledger, Progress, Transaction
from shipworthy.release.code import record_code
from shipworthy.release.files import SourceFile, artifact_files, data_files, digest_file, total
from shipworthy.release.scan import scan_artifact

Engine = Literal["sklearn", "onnx", "python", "external"]

_ENGINES: dict[str, Engine] = {
    "skops": "sklearn", "joblib": "sklearn", "pickle": "sklearn",
    "onnx": "onnx", "python": "python",
}  # fmt: skip
_PACKAGES: dict[Engine, str] = {"sklearn": "scikit-learn", "onnx": "onnxruntime"}
_MOST_LOCK_BYTES = 16 * 1024 * 1024


class InferContract(Protocol):
    """Loads the model, asks it with the sample, and says what it takes and returns.

    `sample` is a file of rows, or None. Raises UsageError or RuntimeFailed with the cure when the
    contract can't be told.
    """

    def __call__(self, spec: ReleaseSpec, folder: Path, sample: Path | None) -> Contract:
        """Find out the contract of the model in `folder`."""
        ...


@dataclass(frozen=True, slots=True)
class Sources:
    """Every file that a release is made of, as found; `size` is what a progress bar counts to."""

    artifacts: tuple[tuple[ArtifactSpec, tuple[SourceFile, ...]], ...]
    lock: SourceFile | None
    data: tuple[tuple[str, str, tuple[SourceFile, ...]], ...]

    @property
    def size(self) -> int:
        """Bytes to be read while the release is created."""
        return total(self.files())

    def files(self) -> tuple[SourceFile, ...]:
        """All of them."""
        lock = (self.lock,) if self.lock else ()
        artifacts = tuple(file for _, files in self.artifacts for file in files)
        return artifacts + lock + tuple(file for _, _, files in self.data for file in files)


@dataclass(frozen=True, slots=True)
class Creation:
    """What came of it. `created` is False when this very content was registered before.

    `inferred` says that the contract was found out; the caller may write it back to the file.
    """

    release: Release
    manifest: Manifest
    created: bool
    inferred: bool

    @property
    def sentence(self) -> str:
        """What happened, for the person who asked."""
        if self.created:
            return f"{self.release.name} is registered as {self.release.digest}."
        return f"{self.release.name} is this very content already; nothing was changed."


def find_sources(spec: ReleaseSpec, folder: Path) -> Sources:
    """Look for everything that the spec names below `folder`.

    Raises NotFound for what is missing and UsageError for what can't be pinned.
    """
    artifacts = tuple((one, tuple(artifact_files(folder, one.path))) for one in spec.artifacts)
    placed = [f"{one.path}/{file.inside}" for one, files in artifacts for file in files]
    resolved = [file.path for _, files in artifacts for file in files]
    if len(set(placed)) < len(placed) or len(set(resolved)) < len(resolved):
        raise UsageError("a file belongs to two artifacts; list each file or folder once")
    lock = artifact_files(folder, spec.environment.lock) if spec.environment.lock else []
    if len(lock) > 1 or (lock and lock[0].inside != "."):
        raise UsageError(f"environment.lock {spec.environment.lock} is a folder; name the file")
    if lock and lock[0].size > _MOST_LOCK_BYTES:
        raise UsageError(f"environment.lock {spec.environment.lock} is no requirements file")
    names = [one.name for one in spec.data]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise UsageError(f"data names {', '.join(twice)} more than once; give each its own name")
    return Sources(
        artifacts=artifacts,
        lock=lock[0] if lock else None,
        data=tuple((one.name, one.role, tuple(data_files(folder, one.path))) for one in spec.data),
    )


def create_release(
    spec: ReleaseSpec,
    folder: Path,
    *,
    blobs: Blobs,
    ledger: Ledger,
    clock: Clock,
    maker: str,
    infer: InferContract | None = None,
    progress: Progress | None = None,
) -> Creation:
    """Pin, store and register a release.

    Args:
        spec: `release.yaml`.
        folder: What its paths are relative to.
        blobs: Where artifacts, the lock and samples are stored; other data is only hashed.
        ledger: Where the release is registered.
        clock: Gives the time of registration.
        maker: The id of the principal who makes the release.
        infer: Finds out the contract when the spec has none.
        progress: Called with bytes read; `find_sources(…).size` is the sum.

    Raises:
        UsageError: The spec can't be met; NotFound when a file is missing.
        UnsafeArtifact: A file runs code when loaded and nobody answers for it.
        Conflict: The version exists with other content, or this content under another version, or
            a file changed meanwhile.

    """
    sources = find_sources(spec, folder)
    scans = [scan_artifact(artifact, files) for artifact, files in sources.artifacts]
    contract = spec.contract or _inferred(spec, folder, sources, infer)
    manifest = Manifest(
        model=spec.model,
        description=spec.description,
        owner=spec.owner,
        base=spec.base,
        behaviour=spec.behaviour and spec.behaviour.model_dump(mode="json", exclude_defaults=True),
        training=spec.training,
        serving=spec.serving,
        metrics=spec.metrics,
        cost=spec.cost,
        code=record_code(spec.code, folder) if spec.code else None,
        contract=contract,
        inference=_inference(spec, sources.lock),
        artifacts=_stored_artifacts(sources, scans, blobs, progress),
        environment=_stored_environment(spec, sources, blobs, progress),
        data=_pinned_data(sources, blobs, progress),
    )
    for file in sources.files():
        file.check_unchanged()
    with ledger.write() as tx:
        release, created = _register(tx, manifest, spec.version, maker=maker, now=clock())
    return Creation(release, manifest, created, inferred=spec.contract is None)


# --- what is found out ----------------------------------------------------------------------------


def _inferred(
    spec: ReleaseSpec, folder: Path, sources: Sources, infer: InferContract | None
) -> Contract:
    samples = [files for _, role, files in sources.data if role == "sample"]
    if infer is None:
        raise UsageError(
            "the release has no contract; declare its inputs and outputs under `contract`, or give"
            " a data entry with `role: sample` from which they are found out"
        )
    return infer(spec, folder, samples[0][0].path if samples else None)


def _inference(spec: ReleaseSpec, lock: SourceFile | None) -> Inference:
    given = spec.inference
    engine = given.engine or _engine(spec)
    version = given.engine_version
    if version == "auto":
        version = _engine_version(engine, spec, lock)
    return Inference(
        engine=engine, engine_version=version, precision=given.precision, sampling=given.sampling
    )


def _engine(spec: ReleaseSpec) -> Engine:
    if isinstance(spec.serving, EndpointServing):
        return "external"
    found: set[Engine] = {_ENGINES[one.format] for one in spec.artifacts if one.format in _ENGINES}
    if "python" in found:  # it may load the others as it likes
        return "python"
    if len(found) == 1:
        return found.pop()
    raise UsageError(
        "what runs the model can't be told from the artifacts' formats; give inference.engine"
    )


def _engine_version(engine: Engine, spec: ReleaseSpec, lock: SourceFile | None) -> str:
    """The version that will serve: from the lock when there is one, else the one installed here."""
    if engine == "external":
        return "unknown"
    if engine == "python":
        return spec.environment.python or platform.python_version()
    package = _PACKAGES[engine]
    if lock is not None:
        return _locked(package, lock, spec.environment.lock or "")
    try:
        return installed_version(package)
    except PackageNotFoundError:
        raise UsageError(
            f"{package} is not installed here; install it, or give environment.lock or"
            " inference.engine_version"
        ) from None


def _locked(package: str, lock: SourceFile, shown: str) -> str:
    name = re.escape(package).replace(r"\-", "[-_.]")
    pin = re.compile(
        rf"^\s*{name}\s*(?:\[[^\]]*\])?\s*==\s*([\w.!+]+)", re.IGNORECASE | re.MULTILINE
    )
    found = set(pin.findall(lock.path.read_text(encoding="utf-8", errors="replace")))
    if len(found) != 1:
        what = "more than one version" if found else "no version"
        raise UsageError(
            f"{shown} pins {what} of {package}, which runs the model; pin it once, with ==, or give"
            " inference.engine_version"
        )
    return found.pop()


# --- what is stored -------------------------------------------------------------------------------


def _stored_artifacts(
    sources: Sources, scans: Sequence[str | None], blobs: Blobs, progress: Progress | None
) -> tuple[Artifact, ...]:
    return tuple(
        Artifact(
            path=spec.path,
            format=spec.format,
            files=tuple(_store(file, blobs, progress) for file in files),
            unsafe=spec.unsafe,
            entry=spec.entry,
            scan=scan,
        )
        for (spec, files), scan in zip(sources.artifacts, scans, strict=True)
    )


def _stored_environment(
    spec: ReleaseSpec, sources: Sources, blobs: Blobs, progress: Progress | None
) -> Environment:
    lock = _store(sources.lock, blobs, progress) if sources.lock else None
    return Environment(
        lock=lock.model_copy(update={"path": spec.environment.lock}) if lock else None,
        python=spec.environment.python,
        image=spec.environment.image,
    )


def _pinned_data(sources: Sources, blobs: Blobs, progress: Progress | None) -> tuple[Data, ...]:
    """Samples are stored, because probes need them; the rest may be huge and personal."""

    def pin(file: SourceFile, role: str) -> PinnedFile:
        sample = role == "sample"
        pinned = _store(file, blobs, progress) if sample else digest_file(file, progress)
        # A single file keeps its name, whose ending says how to read it.
        alone = file.inside == "."
        return pinned.model_copy(update={"path": file.path.name}) if alone else pinned

    return tuple(
        Data(name=name, role=role, files=tuple(pin(file, role) for file in files))
        for name, role, files in sources.data
    )


def _store(file: SourceFile, blobs: Blobs, progress: Progress | None) -> PinnedFile:
    return blobs.put(file.path, progress).model_copy(update={"path": file.inside})


# --- registration ---------------------------------------------------------------------------------


def _register(
    tx: Transaction, manifest: Manifest, version: int | None, *, maker: str, now: float
) -> tuple[Release, bool]:
    digest = manifest.digest()
    same = tx.releases.find(ReleaseReference(manifest.model, digest=digest))
    if same is not None and version in {None, same.version}:
        return same, False
    if same is not None:
        raise Conflict(
            f"this content is {same.name} already ({digest}), and one content has one version; use"
            f" {same.name}, or leave `version` out"
        )
    content = manifest.content()
    if version is not None:
        taken = tx.releases.find(ReleaseReference(manifest.model, version=version))
        if taken is not None:
            raise Conflict(_other_content(taken, digest, content))
    release = Release(
        model=manifest.model,
        version=version or tx.releases.next_version(manifest.model),
        digest=digest,
        manifest=content,
        created_at=now,
        created_by=maker,
    )
    tx.releases.add(release)
    tx.audit.append(
        at=now,
        actor=maker,
        act="register release",
        subject=release.name,
        detail={"digest": digest, "unsafe": [a.path for a in manifest.artifacts if a.unsafe]},
    )
    return release, True


def _other_content(taken: Release, digest: str, content: dict[str, object]) -> str:
    keys = sorted(taken.manifest.keys() | content.keys())
    differ = [key for key in keys if taken.manifest.get(key) != content.get(key)]
    return (
        f"{taken.name} is registered as {taken.digest}, and this is {digest} (different in"
        f" {', '.join(differ)}); a release never changes, so leave `version` out to register this"
        " as the next one"
    )
