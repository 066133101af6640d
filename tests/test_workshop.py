"""What CI must refuse: lint, types, and locks that don't install everywhere or grow too big."""

import os
import re
import subprocess
import sys
import tomllib
from importlib.metadata import distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
RUNTIME, DEVELOPMENT = ROOT / "requirements.lock", ROOT / "requirements-dev.lock"
LIMIT_MB = 600


def locked(lock: Path) -> list[Requirement]:
    return [
        Requirement(line.removesuffix(" \\"))
        for line in lock.read_text().splitlines()
        if not line.startswith(" ")
    ]


@pytest.mark.parametrize(
    "command",
    ["ruff check --no-cache .", "ruff format --no-cache --check .", "pyright"],
)
@pytest.mark.timeout(300)
def test_the_tree_is_clean(command: str) -> None:
    tool, *arguments = command.split()
    run = subprocess.run(
        [Path(sys.executable).with_name(tool), *arguments],
        cwd=ROOT,
        env=os.environ | {"PYRIGHT_PYTHON_IGNORE_WARNINGS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    if run.returncode:
        pytest.fail(run.stdout + run.stderr, pytrace=False)


@pytest.mark.parametrize("lock", [RUNTIME, DEVELOPMENT], ids=lambda lock: lock.name)
def test_a_lock_is_versions_and_hashes_only(lock: Path) -> None:
    """No address of an index and no path: it installs on any machine, from any mirror."""
    version = re.compile(r"[a-z0-9-]+==[\w.!+]+( ; [\w '!<>=.]+)? \\")
    digest = re.compile(r"    --hash=sha256:[0-9a-f]{64}( \\)?")
    for line in lock.read_text().splitlines():
        assert version.fullmatch(line) or digest.fullmatch(line), line


def test_the_locks_agree() -> None:
    assert {str(one) for one in locked(RUNTIME)} <= {str(one) for one in locked(DEVELOPMENT)}


@pytest.mark.parametrize("lock", [RUNTIME, DEVELOPMENT], ids=lambda lock: lock.name)
def test_a_lock_holds_what_pyproject_asks_for(lock: Path) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    asked = project["project"]["dependencies"] + project["build-system"]["requires"]
    if lock == DEVELOPMENT:
        extras = project["project"]["optional-dependencies"]
        asked += [one for extra in extras.values() for one in extra]
        asked += [one for one in project["dependency-groups"]["dev"] if isinstance(one, str)]
    for one in map(Requirement, asked):
        pins = [pin for pin in locked(lock) if pin.name == canonicalize_name(one.name)]
        assert pins, f"{one.name} is not in {lock.name}"
        for pin in pins:
            assert all(one.specifier.contains(exact.version) for exact in pin.specifier), one


def test_the_build_group_is_the_build_system() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert project["dependency-groups"]["build"] == project["build-system"]["requires"]


def test_the_default_install_stays_small() -> None:
    here = [one for one in locked(RUNTIME) if one.marker is None or one.marker.evaluate()]
    assert not {"pandas", "pyarrow", "torch", "polars"} & {one.name for one in here}
    files = [file for one in here for file in distribution(one.name).files or []]
    size = sum(path.stat().st_size for file in files if (path := Path(file.locate())).exists())
    assert 100 < size / 1e6 < LIMIT_MB
