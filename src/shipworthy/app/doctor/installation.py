"""This installation: Python, packages, and what the settings ask for beyond them."""

from __future__ import annotations

import re
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

from shipworthy.app.doctor.results import Case, Result, bad, good, warn

_REQUIREMENT = re.compile(r"([A-Za-z0-9._-]+)(?:\[[^\]]*\])?\s*(?:>=\s*([0-9.]+))?([^;]*)(;.*)?")
_LOCKED = re.compile(r"^([A-Za-z0-9._-]+)==([^\s\\;]+)", re.MULTILINE)
_ROOT = Path(__file__).parents[4]
Installed = Callable[[str], str | None]


def installed_version(package: str) -> str | None:
    """The version that is installed; None without any."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def packages(_case: Case) -> Iterator[Result]:
    """Whether Python and packages are what this version asks for."""
    try:
        about = metadata.metadata("shipworthy")
    except metadata.PackageNotFoundError:
        cure = "install it: pip install shipworthy (or pip install -e . in its sources)"
        yield bad("packages", "shipworthy itself is not installed", cure)
        return
    python = (about["Requires-Python"] or "").removeprefix(">=").strip()
    if python and sys.version_info[: len(_numbers(python))] < _numbers(python):
        running = ".".join(map(str, sys.version_info[:3]))
        cure = f"install shipworthy under Python {python} or newer"
        yield bad("Python", f"this is Python {running}", cure)
    yield from compare(metadata.requires("shipworthy") or [], installed_version)
    lock = _ROOT / "requirements.lock"
    if lock.is_file() and (_ROOT / "pyproject.toml").is_file():
        yield from compare_lock(lock.read_text(encoding="utf-8"), installed_version)


def compare(requirements: Sequence[str], installed: Installed) -> Iterator[Result]:
    """What is missing or too old of a package's requirements; extras are nobody's need."""
    wrong: list[str] = []
    for requirement in requirements:
        match = _REQUIREMENT.fullmatch(requirement.strip())
        if match is None or "extra ==" in (match[4] or ""):
            continue
        name, least = match[1], match[2]
        present = installed(name)
        if present is None:
            wrong.append(f"{name} is missing")
        elif least and _numbers(present) < _numbers(least):
            wrong.append(f"{name} is {present} and must be {least} or newer")
    if wrong:
        cure = f"{sys.executable} -m pip install --upgrade shipworthy"
        yield bad("packages", "; ".join(wrong[:5]), cure)
    else:
        yield good("packages", "all are there and new enough")


def compare_lock(lock: str, installed: Installed) -> Iterator[Result]:
    """What differs from the versions that were tested together."""
    locked: defaultdict[str, list[str]] = defaultdict(list)  # several: one for each Python
    for name, version in _LOCKED.findall(lock):
        locked[name].append(version)
    different = [
        f"{name} {present} (locked: {' or '.join(versions)})"
        for name, versions in locked.items()
        if (present := installed(name)) is not None and present not in versions
    ]
    if different:
        more = f" and {len(different) - 3} more" if len(different) > 3 else ""
        seen = f"not the versions that were tested together: {', '.join(different[:3])}{more}"
        cure = f"{sys.executable} -m pip install -r {_ROOT / 'requirements.lock'}"
        yield warn("packages", seen, cure)


def extras(case: Case) -> Iterator[Result]:
    """Whether the ledger's driver is there."""
    url = case.project.settings.ledger or ""
    if url.startswith("postgres") and find_spec("psycopg") is None:
        seen = "the ledger is in PostgreSQL, and its driver is not installed"
        yield bad("packages", seen, f"{sys.executable} -m pip install 'shipworthy[postgres]'")


def _numbers(version: str) -> tuple[int, ...]:
    """The leading numbers of a version, as far as they say which one is newer."""
    return tuple(
        int(number) for number in re.findall(r"\d+", version.split("+", maxsplit=1)[0])[:4]
    )
