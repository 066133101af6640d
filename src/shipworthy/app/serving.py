"""What serves a release: the runtimes of this machine, and `shipworthy serve` for one by hand."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable, Generator, Iterable
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

from shipworthy.app.session import Session
from shipworthy.domain.lifecycle import Deployment, Release, manifest_of
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
        remote = isinstance(manifest_of(release).serving, EndpointServing)
        if remote:
            return await self.endpoint.start(release, deployment)
        return await self.process.start(release, deployment)


def make_runtimes(session: Session, http: HttpClient, replicas: Path | None = None) -> Runtimes:
    """The runtimes of a project on this machine; `replicas` is where their files go."""
    process = ProcessRuntime(
        replicas or session.project.replicas,
        blobs=session.blobs,
        environments=environments(),
        http=http,
        rng=random.SystemRandom(),
    )
    return Runtimes(process, EndpointRuntime(http))


def prepare(
    session: Session, release: Release, progress: Progress, *, tell: Callable[[str], None]
) -> AbstractContextManager[model_server.ServeOptions]:
    """Copy a release's files into a fresh folder, every byte verified, and build its interpreter.

    The folder goes when the context ends. UsageError when the release is served elsewhere.
    """
    manifest = manifest_of(release)
    if isinstance(manifest.serving, EndpointServing):
        message = f"{release.name} is served elsewhere, at {manifest.serving.urls[0]}"
        raise UsageError(message)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(TemporaryDirectory(prefix="shipworthy-")))
        materialise(manifest, session.blobs, folder / "artifacts", progress)
        manifest_file = folder / "manifest.json"
        manifest_file.write_text(json.dumps(release.manifest), encoding="utf-8")
        options = model_server.ServeOptions(
            folder=folder / "artifacts",
            manifest=manifest_file,
            release=release.name,
            interpreter=environments().interpreter(
                manifest.environment, lock_of(session, manifest), tell
            ),
        )
        kept = stack.pop_all()
    return _kept(kept, options)


@contextmanager
def _kept(
    stack: ExitStack, options: model_server.ServeOptions
) -> Generator[model_server.ServeOptions]:
    with stack:
        yield options


def serve(
    options: model_server.ServeOptions,
    release: Release,
    *,
    host: str,
    port: int,
    tell: Callable[[str], None],
) -> int:
    """Serve a prepared release in this process until it is told to stop; its exit code."""
    tell(f"{release.name} on http://{host}:{port}/v2/models/{release.model}; Ctrl-C ends it.")
    return model_server.run(replace(options, host=host, port=port))


def lock_of(session: Session, manifest: Manifest) -> bytes | None:
    """The content of a release's lock, verified; None when it runs in our own interpreter."""
    file = manifest.environment.lock
    if file is None:
        return None
    session.blobs.verify(file)
    with session.blobs.open(file.digest) as handle:
        return handle.read()
