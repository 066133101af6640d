"""The commit is found, changes are noticed, and what is missing is said with its cure."""

import subprocess

import pytest

from shipworthy.domain.manifest import CodeSpec
from shipworthy.errors import Unavailable, UsageError
from shipworthy.release.code import record_code


def git(folder, *arguments):
    subprocess.run(
        ["git", "-c", "user.name=a", "-c", "user.email=a@b.org", *arguments],
        cwd=folder, check=True, capture_output=True,
    )  # fmt: skip


@pytest.fixture
def repository(tmp_path, monkeypatch):
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", "/dev/null")
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path))
    folder = tmp_path / "repo"
    folder.mkdir()
    git(folder, "init", "-q")
    (folder / "train.py").write_text("print(1)\n")
    (folder / "release.yaml").write_text("model: digits\n")
    git(folder, "add", ".")
    git(folder, "commit", "-qm", "one")
    return folder


def test_a_clean_commit(repository) -> None:
    code = record_code(CodeSpec(), repository)
    assert len(code.commit) == 40
    assert code.uncommitted is None
    assert record_code(CodeSpec(dirty="refuse"), repository) == code
    assert record_code(CodeSpec(commit=code.commit[:10]), repository).commit == code.commit
    assert record_code(CodeSpec(commit=code.commit), repository.parent).commit == code.commit


def test_changes_have_a_digest_or_are_refused(repository) -> None:
    (repository / "train.py").write_text("print(2)\n")
    two = record_code(CodeSpec(), repository)
    assert two.uncommitted is not None
    assert record_code(CodeSpec(), repository) == two
    (repository / "train.py").write_text("print(3)\n")
    assert record_code(CodeSpec(), repository).uncommitted != two.uncommitted
    git(repository, "add", "train.py")
    assert record_code(CodeSpec(), repository).uncommitted is not None
    with pytest.raises(UsageError, match=r"1 files have changes .*train\.py.*`dirty: record`"):
        record_code(CodeSpec(dirty="refuse"), repository)


def test_untracked_files_and_the_release_file_itself_do_not_count(repository) -> None:
    before = record_code(CodeSpec(), repository)
    (repository / "ledger.db").write_text("grows")
    (repository / "release.yaml").write_text("model: digits\ncontract: {}\n")
    assert record_code(CodeSpec(dirty="refuse"), repository) == before


def test_a_subfolder_counts_as_its_repository(repository) -> None:
    (repository / "sub").mkdir()
    (repository / "train.py").write_text("print(2)\n")
    assert record_code(CodeSpec(), repository / "sub") == record_code(CodeSpec(), repository)


def test_a_repository_can_not_make_us_run_its_programs(repository, tmp_path) -> None:
    ran = tmp_path / "ran"
    program = tmp_path / "program"
    program.write_text(f"#!/bin/sh\ntouch {ran}\n")
    program.chmod(0o755)
    git(repository, "config", "core.fsmonitor", str(program))
    git(repository, "config", "diff.external", str(program))
    (repository / "train.py").write_text("print(2)\n")
    record_code(CodeSpec(), repository)
    assert not ran.exists()


def test_what_is_missing_is_said(repository, tmp_path, monkeypatch) -> None:
    (tmp_path / "plain").mkdir()
    with pytest.raises(UsageError, match="not in a git repository; run 'git init'"):
        record_code(CodeSpec(), tmp_path / "plain")
    with pytest.raises(UsageError, match="there is no folder"):
        record_code(CodeSpec(repository="nowhere"), tmp_path)
    with pytest.raises(UsageError, match="has no commit 'v9'"):
        record_code(CodeSpec(commit="v9"), repository)
    with pytest.raises(UsageError, match="has no commit '--help'"):
        record_code(CodeSpec(commit="--help"), repository)
    git(tmp_path / "plain", "init", "-q")
    with pytest.raises(UsageError, match="has no commit yet"):
        record_code(CodeSpec(), tmp_path / "plain")
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(Unavailable, match="git is not installed"):
        record_code(CodeSpec(), repository)
