"""A release as people look at it: what it is made of, what it claims, and what it lacks."""

from __future__ import annotations

import msgspec

from shipworthy.domain.lifecycle import Release, manifest_of
from shipworthy.domain.manifest import Artifact, EndpointServing, Manifest, Metric
from shipworthy.domain.statistics.intervals import normal_interval, wilson_interval

_PROMPT = 60


class ShownPart(msgspec.Struct, frozen=True, kw_only=True):
    """An artifact or data set: how many files and bytes, and a note such as what it imports."""

    name: str
    kind: str
    files: int
    size: int
    digest: str
    note: str = ""


class ShownMetric(msgspec.Struct, frozen=True, kw_only=True):
    """A claimed metric with its 95% interval, where it says enough for one."""

    name: str
    value: float
    n: int | None
    low: float | None
    high: float | None


class ShownRelease(msgspec.Struct, frozen=True, kw_only=True):
    """Everything that the command line and the console show of a release.

    `gaps` are sentences about what is not pinned or not said.
    """

    name: str
    model: str
    version: int
    digest: str
    created_at: float
    created_by: str
    description: str
    owner: str
    engine: str
    environment: str
    code: str
    serving: str
    artifacts: tuple[ShownPart, ...]
    data: tuple[ShownPart, ...]
    speaks: str
    adds: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    metrics: tuple[ShownMetric, ...]
    gaps: tuple[str, ...]


def show_release(release: Release, maker: str) -> ShownRelease:
    """Lay a release out; `maker` is the name of who made it."""
    manifest = manifest_of(release)
    contract = manifest.contract
    return ShownRelease(
        name=release.name,
        model=release.model,
        version=release.version,
        digest=release.digest,
        created_at=release.created_at,
        created_by=maker,
        description=manifest.description,
        owner=f"{manifest.owner.name} <{manifest.owner.email}>" if manifest.owner else "",
        engine=f"{manifest.inference.engine} {manifest.inference.engine_version}",
        environment=_environment(manifest),
        code=_code(manifest),
        serving=_serving(manifest),
        artifacts=tuple(_artifact(artifact) for artifact in manifest.artifacts),
        data=tuple(
            ShownPart(
                name=data.name,
                kind=data.role,
                files=len(data.files),
                size=sum(file.size for file in data.files),
                digest=data.files[0].digest if len(data.files) == 1 else "",
            )
            for data in manifest.data
        ),
        speaks=", ".join((contract.protocol, *contract.operations)),
        adds=_added(manifest),
        inputs=tuple(f"{one.name}: {one.datatype} {list(one.shape)}" for one in contract.inputs),
        outputs=tuple(f"{one.name}: {one.datatype} {list(one.shape)}" for one in contract.outputs),
        metrics=tuple(
            _metric(f"{suite}.{name}", metric)
            for suite, metrics in manifest.metrics.items()
            for name, metric in metrics.items()
        ),
        gaps=tuple(_gaps(manifest)),
    )


def _added(manifest: Manifest) -> str:
    """What the gateway adds to requests for a language model; a prompt by its beginning."""
    if manifest.contract.tensors:
        return ""
    said = manifest.behaviour or {}
    sampling = manifest.inference.sampling
    system = str(said.get("system", ""))
    shown = system if len(system) <= _PROMPT else f"{system[:_PROMPT]}…"
    parts = {
        f"prompt {shown!r}": bool(system),
        "a chat template": "chat_template" in said,
        f"{len(said.get('tools', ()))} tools": bool(said.get("tools")),
        ", ".join(f"{name} {value}" for name, value in sampling.items()): bool(sampling),
        "in place of what clients say of sampling": bool(said.get("pin_sampling")),
    }
    return "; ".join(part for part, there in parts.items() if there)


def _artifact(artifact: Artifact) -> ShownPart:
    notes = [f"trusted: {artifact.unsafe}" if artifact.unsafe else "", artifact.scan or ""]
    return ShownPart(
        name=artifact.path,
        kind=artifact.format,
        files=len(artifact.files),
        size=sum(file.size for file in artifact.files),
        digest=artifact.files[0].digest if len(artifact.files) == 1 else "",
        note="; ".join(note for note in notes if note),
    )


def _metric(name: str, metric: Metric) -> ShownMetric:
    interval = None
    if metric.std_error:
        interval = normal_interval(metric.value, metric.std_error)
    elif metric.n is not None and 0.0 <= metric.value <= 1.0:
        interval = wilson_interval(metric.value, metric.n)
    return ShownMetric(
        name=name,
        value=metric.value,
        n=metric.n,
        low=interval.low if interval else None,
        high=interval.high if interval else None,
    )


def _environment(manifest: Manifest) -> str:
    environment = manifest.environment
    python = f"Python {environment.python}" if environment.python else "Python"
    if environment.image:
        return f"image {environment.image}"
    return f"{python}, {environment.lock.path}" if environment.lock else "Shipworthy's own Python"


def _code(manifest: Manifest) -> str:
    if manifest.code is None:
        return ""
    dirty = " with uncommitted changes" if manifest.code.uncommitted else ""
    return f"{manifest.code.commit[:12]}{dirty}"


def _serving(manifest: Manifest) -> str:
    serving = manifest.serving
    if isinstance(serving, EndpointServing):
        return f"{serving.served_model} at {', '.join(serving.urls)}"
    replicas = serving.replicas
    return f"{replicas.min} to {replicas.max} local processes"


def _gaps(manifest: Manifest) -> list[str]:
    external = isinstance(manifest.serving, EndpointServing)
    lacking = {
        "no owner: nobody is named who answers for it": manifest.owner is None,
        "no code commit: it can't be said what made it": manifest.code is None,
        "uncommitted changes: the commit alone does not make it again": bool(
            manifest.code and manifest.code.uncommitted
        ),
        "no lock: it is served by Shipworthy's own interpreter, whose versions may change": (
            not external and manifest.environment.lock is None and not manifest.environment.image
        ),
        "no training data is recorded": not any(data.role == "train" for data in manifest.data),
        "no sample: its contract can't be tried": not any(
            data.role == "sample" for data in manifest.data
        ),
        "no metrics: no rule can be judged": not manifest.metrics,
        "side effects are unknown: it is not retried or mirrored": (
            manifest.contract.side_effects != "none"
        ),
    }
    return [sentence for sentence, lacks in lacking.items() if lacks]
