"""Every error that Shipworthy raises on purpose, in one tree.

Each message is one sentence that says what is wrong and, after a semicolon, how to cure it. The
command line prints the message alone; `exit_code` is what the process then ends with.

    ShipworthyError                 something we can explain
    ├── UsageError                  the caller asked for something that makes no sense (2)
    │   ├── InvalidDocument         a YAML file breaks its schema: file, line and nearest key
    │   ├── NotFound                a named release, model, file or key does not exist
    │   └── Conflict                it exists already with other content, or the state forbids it
    ├── Refused                     a rule or gate said no: measured, and not good enough (1)
    │   ├── IntegrityError          bytes differ from the digest that pins them
    │   ├── UnsafeArtifact          a model file holds code and nobody took responsibility for it
    │   └── NotAllowed              the caller's key or name has no right to do this
    ├── NotMeasured                 no evidence either way: missing, expired, undecided (3)
    └── Unavailable                 a part that is needed does not answer (3)
        ├── RuntimeFailed           a model does not load, start or become ready
        └── LedgerUnavailable       the ledger can't be opened, is locked or of another version
"""

from __future__ import annotations

from typing import ClassVar


class ShipworthyError(Exception):
    """Something we can explain to the person who caused it or has to cure it."""

    exit_code: ClassVar[int] = 3


class UsageError(ShipworthyError):
    """The caller asked for something that makes no sense."""

    exit_code: ClassVar[int] = 2


class InvalidDocument(UsageError):
    """A file that a user wrote breaks its schema.

    `problems` holds one line each, as `file:line: what is wrong; the cure`.
    """

    def __init__(self, problems: list[str]) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems


class NotFound(UsageError):
    """A named release, model, file or key does not exist."""


class Conflict(UsageError):
    """It exists already with other content, or its state forbids the act."""


class Refused(ShipworthyError):
    """A rule or a gate said no: it was measured and is not good enough."""

    exit_code: ClassVar[int] = 1


class IntegrityError(Refused):
    """Bytes differ from the digest that pins them."""


class UnsafeArtifact(Refused):
    """A model file can run code when loaded and nobody took responsibility for it."""


class NotAllowed(Refused):
    """The caller has no right to do this."""


class NotMeasured(ShipworthyError):
    """There is no evidence either way: it is missing, expired or undecided."""


class Unavailable(ShipworthyError):
    """A part that is needed does not answer."""


class RuntimeFailed(Unavailable):
    """A model does not load, start or become ready."""


class LedgerUnavailable(Unavailable):
    """The ledger can't be opened, is locked, or has another schema version."""
