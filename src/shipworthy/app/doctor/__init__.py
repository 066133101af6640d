"""`shipworthy doctor`: finds common faults and names their cures.

Each examination is a function of a `Case` that gives `Result`s. None of them changes anything, none
relies on another one's having gone well, and one that fails says so as a result of its own: a
project is examined because something about it is broken.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import yaml

from shipworthy.app.doctor import decisions, files, installation, records, running
from shipworthy.app.doctor.results import (
    Case,
    NeedsLedger,
    Progress,
    Result,
    Verdict,
    no_bar,
    told,
    unseen,
)
from shipworthy.errors import NotFound, ShipworthyError, UsageError
from shipworthy.ports import Clock
from shipworthy.settings import FILE, Project, Settings, find_project

__all__ = ["EXAMINATIONS", "Case", "Result", "Verdict", "case_of", "examine", "exit_code"]

Examination = Callable[[Case], Iterator[Result]]

EXAMINATIONS: dict[str, Examination] = {
    "settings": files.settings,
    "owner": files.owners,
    "state folder": files.state_folders,
    "privacy": files.modes,
    "writable": files.writable,
    "file system": files.file_system,
    "disk space": files.room,
    "leftovers": files.leftovers,
    "ledger": decisions.ledger,
    "clock": decisions.clock,
    "port": running.port,
    "certificate": running.certificate,
    "gateway": running.gateway,
    "processes": running.children,
    "orphans": running.orphans,
    "locks": running.locks,
    "limits": running.limits,
    "keeper": decisions.term,
    "snapshot": decisions.snapshot,
    "replicas": running.replicas,
    "journals": records.journals,
    "journal records": records.readable,
    "dropped records": records.drops,
    "lake": records.lake,
    "lake tables": records.tables,
    "blobs": decisions.blobs,
    "audit log": decisions.audit,
    "packages": installation.packages,
    "extras": installation.extras,
}


def case_of(
    start: Path,
    *,
    deep: bool = False,
    progress: Progress = no_bar,
    clock: Clock = time.time,
    monotonic: Clock = time.monotonic,
) -> Case:
    """The project around `start`, with as much of its settings as can be understood.

    Raises NotFound where there is none.
    """
    problem: ShipworthyError | None = None
    try:
        project = find_project(start)
    except NotFound:
        raise
    except UsageError as error:
        project, problem = _salvaged(start, error), error
    except OSError as error:
        message = f"{FILE} can't be read ({error.strerror}); check its modes and its owner"
        problem = UsageError(message)
        project = _salvaged(start, problem)
    return Case(
        project=project,
        clock=clock,
        monotonic=monotonic,
        deep=deep,
        progress=progress,
        settings_problem=problem,
    )


def _salvaged(start: Path, problem: ShipworthyError) -> Project:
    """The project with those of its settings that are understood one by one, the rest default."""
    for root in (start.resolve(), *start.resolve().parents):
        if (root / FILE).is_file():
            return Project(root, _understood(root / FILE))
    raise problem


def _understood(file: Path) -> Settings:
    kept: dict[str, Any] = {}
    try:
        content = yaml.safe_load(file.read_bytes())
    except (OSError, yaml.YAMLError, ValueError, RecursionError):
        return Settings()
    plain = cast("dict[str, Any]", content) if isinstance(content, dict) else {}
    for key, value in plain.items():
        try:
            Settings.model_validate({key: value})
        except (ValueError, TypeError):
            continue
        kept[key] = value
    return Settings.model_validate(kept)


def examine(case: Case) -> list[Result]:
    """Make every examination; the most urgent results first."""
    wall, monotonic = case.clock(), case.monotonic()
    found: list[Result] = []
    without_ledger: list[str] = []
    forbidden: list[str] = []
    for name, examination in EXAMINATIONS.items():
        try:
            found += examination(case)
        except NeedsLedger:
            without_ledger.append(name)
        except PermissionError:
            forbidden.append(name)
        except ShipworthyError as error:
            found.append(told(name, error, Verdict.ERROR))
        except Exception as fault:  # noqa: BLE001  # one that fails must not hide the others
            cause = getattr(fault, "strerror", None) or f"{type(fault).__name__}: {fault}"
            cure = f"look at {case.project.state} yourself"
            found.append(unseen(name, f"could not be looked at ({cause})", cure))
    found += decisions.drift(case, wall, monotonic)
    if without_ledger:
        seen = f"not looked at without the ledger: {', '.join(without_ledger)}"
        found.append(unseen("the rest", seen, "cure the ledger first, then ask again"))
    if forbidden:
        seen = f"this account may not look at: {', '.join(forbidden)}"
        cure = f"ask again as the owner of {case.project.state}"
        found.append(unseen("the rest", seen, cure))
    urgency = list(Verdict)
    return sorted(found, key=lambda result: urgency.index(result.verdict))


def exit_code(results: list[Result]) -> int:
    """1 when something is wrong, else 3 when something could not be looked at, else 0."""
    verdicts = {result.verdict for result in results}
    if Verdict.FAIL in verdicts:
        return 1
    return 3 if Verdict.ERROR in verdicts else 0
