"""A release's files on disk: which one is the model, laid out as the author had them, verified."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Protocol

from shipworthy.domain.manifest import Artifact, Manifest, PinnedFile
from shipworthy.errors import IntegrityError, RuntimeFailed
from shipworthy.ports import Blobs, Progress


class ModelFile(Protocol):
    """What must be known of a model to load it; a spec's artifact and a manifest's both say it."""

    @property
    def path(self) -> str:
        """Inside the release's folder."""
        ...

    @property
    def format(self) -> str:
        """As in the manifest."""
        ...

    @property
    def unsafe(self) -> str | None:
        """Why a format that runs code is trusted."""
        ...

    @property
    def entry(self) -> str | None:
        """The callable of a `python` artifact."""
        ...


def model_of(manifest: Manifest) -> Artifact:
    """The artifact that is served: the `python` one if there is one, else the only model.

    Artifacts of format `file` lie beside it. RuntimeFailed when nothing or too much could be meant.
    """
    models = [artifact for artifact in manifest.artifacts if artifact.format != "file"]
    code = [artifact for artifact in models if artifact.format == "python"]
    chosen = code or models
    if len(chosen) == 1:
        return chosen[0]
    if not chosen:
        raise RuntimeFailed(
            f"{manifest.model} has no artifact that is a model; give one its format in release.yaml"
        )
    names = ", ".join(artifact.path for artifact in chosen)
    raise RuntimeFailed(
        f"{manifest.model} has more than one model ({names}); make those that are only read by"
        " another one `format: file`"
    )


def files_of(manifest: Manifest, folder: Path) -> Iterator[tuple[PinnedFile, Path]]:
    """Each artifact's files and where they lie below `folder`."""
    for artifact in manifest.artifacts:
        for inside, file in artifact.placed():
            path = PurePosixPath(inside)
            if path.is_absolute() or ".." in path.parts:
                raise IntegrityError(
                    f"{manifest.model}: the file {inside!r} would lie outside the release's"
                    " folder; register the release again"
                )
            yield file, folder / path


def materialise(
    manifest: Manifest, blobs: Blobs, folder: Path, progress: Progress | None = None
) -> None:
    """Copy the release's artifacts out of `blobs` into a fresh folder, each byte verified.

    IntegrityError when a stored file differs from its digest, NotFound when it is gone.
    """
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    for file, target in files_of(manifest, folder):
        target.parent.mkdir(parents=True, exist_ok=True)
        blobs.copy_to(file, target, progress)


def verify(manifest: Manifest, folder: Path) -> None:
    """Re-read the artifacts in `folder`; IntegrityError for a byte that is not the pinned one."""
    for file, path in files_of(manifest, folder):
        try:
            with path.open("rb") as stream:
                found = f"sha256:{hashlib.file_digest(stream, 'sha256').hexdigest()}"
        except OSError as error:
            raise IntegrityError(
                f"{path.name} of {manifest.model} can't be read ({error.strerror});"
                " start the release from its stored files again"
            ) from error
        if found != file.digest:
            raise IntegrityError(
                f"{path.name} of {manifest.model} is {found[:19]}… and not the registered"
                f" {file.digest[:19]}…; start the release from its stored files again"
            )
