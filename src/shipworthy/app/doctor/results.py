"""What one look gave, and what every look is given."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from enum import StrEnum

import msgspec

from shipworthy.app.doctor.machine import Machine
from shipworthy.app.status import is_held, up_for
from shipworthy.errors import ShipworthyError
from shipworthy.ports import Clock
from shipworthy.settings import Project
from shipworthy.stores.ledger import SqlLedger, open_ledger

LEDGER_PATIENCE = 1.0
"""Seconds to wait for a lock of the ledger."""
Progress = Callable[[str, int], AbstractContextManager[Callable[[int], None]]]


class Verdict(StrEnum):
    """How one look ended, in the order of urgency.

    A check's finding has no `warn`: a gate opens or stays shut. Advice has: what works today and
    will not for ever. `error` is not measured, as there.
    """

    FAIL = "fail"
    ERROR = "error"
    WARN = "warn"
    PASS = "pass"  # noqa: S105  # a verdict, not a password


class Result(msgspec.Struct, frozen=True, kw_only=True):
    """What was looked at, what was seen there, and the cure where one is needed."""

    name: str
    verdict: Verdict
    seen: str
    cure: str = ""


def good(name: str, seen: str) -> Result:
    """All is well."""
    return Result(name=name, verdict=Verdict.PASS, seen=seen)


def warn(name: str, seen: str, cure: str) -> Result:
    """It works, and will not for ever."""
    return Result(name=name, verdict=Verdict.WARN, seen=seen, cure=cure)


def bad(name: str, seen: str, cure: str) -> Result:
    """It is wrong now."""
    return Result(name=name, verdict=Verdict.FAIL, seen=seen, cure=cure)


def unseen(name: str, seen: str, cure: str) -> Result:
    """It could not be looked at."""
    return Result(name=name, verdict=Verdict.ERROR, seen=seen, cure=cure)


def told(name: str, error: ShipworthyError, verdict: Verdict = Verdict.FAIL) -> Result:
    """An error of ours: one sentence with the cure behind its last semicolon."""
    seen, _, cure = str(error).rpartition("; ")
    return Result(name=name, verdict=verdict, seen=seen or cure, cure=cure if seen else "")


class NeedsLedger(Exception):  # a state of affairs, which the ledger's own examination explains
    """An examination that can't be made while the ledger can't be read."""


def no_bar(_what: str, _total: int) -> AbstractContextManager[Callable[[int], None]]:
    """Long work without a bar."""
    return nullcontext(_ignore)


def _ignore(_count: int) -> None:
    pass


@dataclass(slots=True)
class Case:
    """A project as it lies there, whatever is wrong with it.

    `settings_problem` says why the settings in use are not (all) those of the file. `monotonic`
    counts seconds that nobody sets. `progress` makes a bar for so many bytes of long work.
    """

    project: Project
    clock: Clock
    monotonic: Clock
    machine: Machine = field(default_factory=Machine)
    deep: bool = False
    settings_problem: ShipworthyError | None = None
    progress: Progress = no_bar

    @property
    def running(self) -> bool:
        """Whether a `shipworthy up` holds the project."""
        return is_held(self.project)

    @property
    def up_for(self) -> float:
        """Seconds since `up` took the lock."""
        return up_for(self.project, self.clock())

    @contextmanager
    def ledger(self) -> Generator[SqlLedger]:
        """The ledger, for reading; raises NeedsLedger when it can't be opened or read."""
        try:
            with open_ledger(self.project.ledger_url, timeout=LEDGER_PATIENCE) as ledger:
                yield ledger
        except ShipworthyError as error:
            raise NeedsLedger(str(error)) from error
