"""Where decisions on a ledger are made: in one folder of one machine, however many can reach it.

Journals, replicas and snapshots lie in the folder, so keepers and fleets of two would undo each
other's work. The lock of `up` tells about a folder alone, the keeper's term about all of them.
"""

from __future__ import annotations

import os
import secrets
import socket

from shipworthy.domain.terms import Term, held_elsewhere, keeper_at
from shipworthy.errors import Conflict
from shipworthy.rollout.keeper import LEASE_SECONDS
from shipworthy.settings import Project


def keeper_name(project: Project) -> str:
    """A name that no other keeper has; it tells people where and which process it is."""
    return keeper_at(_place(project), f"{os.getpid()}-{secrets.token_hex(6)}")


def elsewhere(project: Project, term: Term, now: float) -> str:
    """In a sentence, that another folder's keepers decide now; empty when they don't."""
    other = held_elsewhere(term, _place(project), now, LEASE_SECONDS)
    if not other:
        return ""
    return (
        f"the keepers of {other} decide on this ledger (term {term.number}); stop 'shipworthy up'"
        " there, or give this project a ledger of its own"
    )


def check_here(project: Project, term: Term, now: float) -> None:
    """Conflict when another folder's keepers decide now."""
    if problem := elsewhere(project, term, now):
        raise Conflict(problem)


def _place(project: Project) -> str:
    return f"{socket.gethostname()}:{project.root}"
