"""Which commit made a release, asked of git."""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import tempfile
from pathlib import Path

from shipworthy.domain.manifest import Code, CodeSpec
from shipworthy.errors import Unavailable, UsageError

TIMEOUT = 60.0
"""Seconds that one question to git may take."""

_FULL = re.compile(r"[0-9a-f]{40}(?:[0-9a-f]{24})?")
_TRACKED = ("--", ":(top)", ":(top,exclude,glob)**/release.yaml")
"""All that is under version control but `release.yaml`: its content is the manifest's own, and it
is written back when a contract was inferred."""


def record_code(spec: CodeSpec, folder: Path) -> Code:
    """The commit, and the digest of uncommitted changes to files under version control.

    Files that git does not track don't count: logs and databases would change the digest with
    every run.

    Raises:
        UsageError: There is no such repository or commit, or it has changes and `dirty: refuse`.
        Unavailable: git is not installed or does not answer in time.

    """
    repository = folder / spec.repository
    if spec.commit != "auto":
        return Code(commit=_named(spec.commit, repository))
    head = _git(repository, "rev-parse", "--verify", "HEAD^{commit}")
    if head.returncode:
        raise _no_commit(repository, head)
    changed = _ask(repository, "diff", "--name-only", "-z", "HEAD", *_TRACKED)
    names = [name for name in changed.decode(errors="replace").split("\0") if name]
    if names and spec.dirty == "refuse":
        listed = ", ".join(names[:5]) + (", …" if len(names) > 5 else "")
        raise UsageError(
            f"{len(names)} files have changes that are not committed ({listed}); commit them, or"
            " write `dirty: record` under code"
        )
    return Code(
        commit=head.stdout.decode().strip(), uncommitted=_changes(repository) if names else None
    )


def _named(commit: str, repository: Path) -> str:
    if _FULL.fullmatch(commit):  # may come from elsewhere, so no repository is needed
        return commit
    found = _git(repository, "rev-parse", "--verify", "--end-of-options", f"{commit}^{{commit}}")
    if found.returncode:
        raise UsageError(
            f"{repository} has no commit {commit!r}; write `commit: auto` or the full hash"
        )
    return found.stdout.decode().strip()


def _changes(repository: Path) -> str:
    """The digest of the binary diff, which may be too large to hold in memory."""
    with tempfile.TemporaryFile() as output:
        arguments = ("diff", "--binary", "--no-ext-diff", "--no-textconv", "HEAD", *_TRACKED)
        done = _git(repository, *arguments, stdout=output.fileno())
        if done.returncode:
            raise _failed(done)
        output.seek(0)
        return f"sha256:{hashlib.file_digest(output, 'sha256').hexdigest()}"


def _ask(repository: Path, *arguments: str) -> bytes:
    done = _git(repository, *arguments)
    if done.returncode:
        raise _failed(done)
    return done.stdout


def _git(
    repository: Path, *arguments: str, stdout: int = subprocess.PIPE
) -> subprocess.CompletedProcess[bytes]:
    environment = os.environ | {
        "GIT_OPTIONAL_LOCKS": "0",
        "GIT_TERMINAL_PROMPT": "0",
        "LC_ALL": "C",
    }
    if not repository.is_dir():
        raise UsageError(f"there is no folder {repository}; correct code.repository")
    try:
        # A repository's own settings can name programs to run; the file monitor is one.
        return subprocess.run(
            ["git", "-c", "core.fsmonitor=false", "-C", str(repository), *arguments],  # noqa: S607
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            stderr=subprocess.PIPE,
            env=environment,
            timeout=TIMEOUT,
            check=False,
        )
    except FileNotFoundError as error:
        raise Unavailable(
            "git is not installed, so the commit can't be found; install it, give code.commit, or"
            " leave `code` out of release.yaml"
        ) from error
    except subprocess.TimeoutExpired as error:
        raise Unavailable(
            f"git did not answer within {TIMEOUT:.0f} seconds in {repository}; give code.commit"
        ) from error


def _no_commit(repository: Path, done: subprocess.CompletedProcess[bytes]) -> UsageError:
    said = done.stderr.decode(errors="replace")
    if "not a git repository" in said:
        return UsageError(
            f"{repository} is not in a git repository; run 'git init' and commit, correct"
            " code.repository, or leave `code` out of release.yaml"
        )
    if "dubious ownership" in said:
        return UsageError(
            f"git refuses {repository} because another user owns it; allow it with"
            f" 'git config --global --add safe.directory {repository.resolve()}'"
        )
    return UsageError(f"{repository} has no commit yet; commit the code, or leave `code` out")


def _failed(done: subprocess.CompletedProcess[bytes]) -> Unavailable:
    said = done.stderr.decode(errors="replace").strip().splitlines()
    return Unavailable(f"git failed ({said[-1] if said else 'without a word'}); give code.commit")
