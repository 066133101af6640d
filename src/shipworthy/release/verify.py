"""Whether a release is still what was registered: every byte read again, every digest compared."""

from __future__ import annotations

import msgspec
from pydantic import ValidationError

from shipworthy.domain.canonical import digest_of
from shipworthy.domain.findings import Verdict
from shipworthy.domain.lifecycle import Release
from shipworthy.domain.manifest import Manifest, PinnedFile
from shipworthy.errors import IntegrityError, NotFound, ShipworthyError
from shipworthy.ports import Blobs, Progress


class FileCheck(msgspec.Struct, frozen=True, kw_only=True):
    """One stored file as found; `problem` is empty when it is intact."""

    path: str
    digest: str
    size: int
    verdict: Verdict
    problem: str = ""


class Verification(msgspec.Struct, frozen=True, kw_only=True):
    """What a verification found.

    A file's `error` means that it could not be read, not that it differs.
    """

    release: str
    digest: str
    at: float
    files: tuple[FileCheck, ...]
    problems: tuple[str, ...]

    @property
    def verdict(self) -> Verdict:
        """`fail` for any difference, `error` when something could not be read, else `pass`."""
        verdicts = {file.verdict for file in self.files}
        if self.problems or Verdict.FAIL in verdicts:
            return Verdict.FAIL
        return Verdict.ERROR if Verdict.ERROR in verdicts else Verdict.PASS

    @property
    def bytes(self) -> int:
        """Bytes of the files that are intact."""
        return sum(file.size for file in self.files if file.verdict is Verdict.PASS)

    @property
    def sentence(self) -> str:
        """The result in one sentence."""
        bad = [file for file in self.files if file.verdict is not Verdict.PASS]
        if not bad and not self.problems:
            return (
                f"{len(self.files)} files ({self.bytes:,} bytes) re-read, every digest equal, and"
                " so is the manifest's"
            )
        return "; ".join([*self.problems, *(f"{file.path}: {file.problem}" for file in bad)])


def stored_size(release: Release) -> int:
    """Bytes that `verify_release` will read, for a progress bar; 0 for a damaged manifest."""
    manifest, _ = _manifest(release)
    return sum(file.size for _, file in _stored(manifest)) if manifest else 0


def verify_release(
    release: Release, blobs: Blobs, *, now: float, progress: Progress | None = None
) -> Verification:
    """Re-read everything that the release keeps in the blob store. Never raises for what it finds.

    Data that is only pinned by digest is not here and not read.
    """
    manifest, problems = _manifest(release)
    files = tuple(_check(shown, file, blobs, progress) for shown, file in _stored(manifest))
    return Verification(
        release=release.name,
        digest=release.digest,
        at=now,
        files=files,
        problems=tuple(problems),
    )


def _manifest(release: Release) -> tuple[Manifest | None, list[str]]:
    problems: list[str] = []
    digest = digest_of(release.manifest)
    if digest != release.digest:
        problems.append(f"the manifest in the ledger is {digest} and not the registered one")
    try:
        return Manifest.model_validate(release.manifest), problems
    except ValidationError:
        return None, [*problems, "the manifest in the ledger can't be read"]


def _stored(manifest: Manifest | None) -> list[tuple[str, PinnedFile]]:
    """The stored files with the paths that people know them by."""
    if manifest is None:
        return []
    files = [placed for artifact in manifest.artifacts for placed in artifact.placed()]
    if manifest.environment.lock:
        files.append((manifest.environment.lock.path, manifest.environment.lock))
    for data in manifest.data:
        if data.role == "sample":
            files += [(f"{data.name}/{file.path}", file) for file in data.files]
    return files


def _check(shown: str, file: PinnedFile, blobs: Blobs, progress: Progress | None) -> FileCheck:
    verdict, problem = Verdict.PASS, ""
    try:
        blobs.verify(file.model_copy(update={"path": shown}), progress)
    except (IntegrityError, NotFound) as error:
        verdict, problem = Verdict.FAIL, str(error)
    except ShipworthyError as error:
        verdict, problem = Verdict.ERROR, str(error)
    return FileCheck(
        path=shown, digest=file.digest, size=file.size, verdict=verdict, problem=problem
    )
