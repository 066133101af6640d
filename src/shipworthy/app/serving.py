"""What serves a release: the runtimes of this machine, and `shipworthy serve` for one by hand."""

from __future__ import annotations

import json
import os
import random
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from shipworthy.app.session import Session
from shipworthy.domain.lifecycle import Deployment, Release
from shipworthy.domain.manifest import EndpointServing, Manifest
from shipworthy.errors import UsageError
from shipworthy.ports import HttpClient, Progress, RunningReplica
from shipworthy.runtimes import model_server
from shipworthy.runtimes.endpoint import EndpointRuntime
from shipworthy.runtimes.environments import Environments
from shipworthy.runtimes.folder import materialise
from shipworthy.runtimes.process import ProcessRuntime


def environments() -> Environments:
    """Interpreters built from locks: a cache of the user's, shared by all projects."""
    cache = os.environ.get("XDG_CACHE_HOME")
    root = Path(cache) if cache else Path.home() / ".cache"
    return Environments(root / "shipworthy" / "environments")


@dataclass(frozen=True, slots=True)
class Runtimes:
    """Starts a release with the runtime that its manifest names."""

    process: ProcessRuntime
    endpoint: EndpointRuntime

    async def start(self, release: Release, deployment: Deployment) -> Iterable[RunningReplica]:
        """Start its replicas, or watch its endpoints."""
        remote = isinstance(Manifest.model_validate(release.manifest).serving, EndpointServing)
        if remote:
            return await self.endpoint.start(release, deployment)
        return await self.process.start(release, deployment)


def make_runtimes(session: Session, http: HttpClient) -> Runtimes:
    """The runtimes of a project on this machine."""
    process = ProcessRuntime(
        session.project.replicas,
        blobs=session.blobs,
        environments=environments(),
        http=http,
        rng=random.SystemRandom(),
    )
    return Runtimes(process, EndpointRuntime(http))


def serve_release(
    session: Session,
    release: Release,
    *,
    host: str,
    port: int,
    progress: Progress,
    tell: Callable[[str], None],
) -> int:
    """Serve one release in this process until it is told to stop; its exit code.

    Every byte is verified on the way out of the blob store.
    """
    manifest = Manifest.model_validate(release.manifest)
    if isinstance(manifest.serving, EndpointServing):
        message = f"{release.name} is served elsewhere, at {manifest.serving.urls[0]}"
        raise UsageError(message)
    with tempfile.TemporaryDirectory(prefix="shipworthy-") as name:
        folder = Path(name)
        materialise(manifest, session.blobs, folder / "artifacts", progress)
        manifest_file = folder / "manifest.json"
        manifest_file.write_text(json.dumps(release.manifest), encoding="utf-8")
        interpreter = environments().interpreter(
            manifest.environment, lock_of(session, manifest), tell
        )
        tell(f"{release.name} on http://{host}:{port}/v2/models/{release.model}")
        return model_server.run(
            model_server.ServeOptions(
                folder=folder / "artifacts",
                manifest=manifest_file,
                release=release.name,
                interpreter=interpreter,
                host=host,
                port=port,
            )
        )


def lock_of(session: Session, manifest: Manifest) -> bytes | None:
    """The content of a release's lock, verified; None when it runs in our own interpreter."""
    file = manifest.environment.lock
    if file is None:
        return None
    session.blobs.verify(file)
    with session.blobs.open(file.digest) as handle:
        return handle.read()
