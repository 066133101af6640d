"""One command's or process's view of a project: its adapters, and who acts."""

from __future__ import annotations

import hmac
import os
import pwd
import secrets
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from shipworthy.domain.keys import hash_key, key_id
from shipworthy.domain.lifecycle import Principal, Release
from shipworthy.domain.names import ReleaseReference, parse_reference
from shipworthy.errors import LedgerUnavailable, NotAllowed, NotFound
from shipworthy.ports import Blobs, Clock, Ledger
from shipworthy.settings import Project, find_project
from shipworthy.stores.blobs import LocalBlobs
from shipworthy.stores.files import replace_file
from shipworthy.stores.ledger import database_at, is_ledger, migrate, open_ledger
from shipworthy.stores.snapshots import newest_fence

KEY_VARIABLE = "SHIPWORTHY_KEY"
PROJECT_VARIABLE = "SHIPWORTHY_PROJECT"


@dataclass(frozen=True, slots=True)
class Session:
    """What every command starts from."""

    project: Project
    ledger: Ledger
    blobs: Blobs
    clock: Clock

    def actor(self) -> Principal:
        """Who acts: the holder of the key in SHIPWORTHY_KEY, else the account that runs this.

        The account's name comes from the operating system, not from a variable that anyone can set.
        """
        text = os.environ.get(KEY_VARIABLE)
        if text:
            return self._holder(text)
        with self.ledger.write() as tx:
            return tx.principals.ensure(_account())

    def _holder(self, text: str) -> Principal:
        now = self.clock()
        with self.ledger.read() as tx:
            for stored in tx.keys.list():
                key = stored.key
                if key.id != key_id(text) or not hmac.compare_digest(key.hash, hash_key(text)):
                    continue
                holder = tx.principals.get(stored.principal)
                if holder is not None and stored.in_force(now):
                    return holder
        message = f"the key in {KEY_VARIABLE} is not valid here; ask for a new one or unset it"
        raise NotAllowed(message)

    def release(self, text: str) -> Release:
        """The release that a person named, by version, digest or stage."""
        reference = parse_reference(text)
        with self.ledger.read() as tx:
            found = tx.releases.find(reference)
            known = [release.name for release in tx.releases.list(reference.model)]
        if found is None:
            message = f"no release {text}; {_suggest(reference, known)}"
            raise NotFound(message)
        return found


def _account() -> str:
    """The name of the account that runs this; a container may run as one that has none."""
    try:
        return pwd.getpwuid(os.getuid()).pw_name
    except KeyError:
        return f"uid {os.getuid()}"


def _suggest(reference: ReleaseReference, known: list[str]) -> str:
    if known:
        return f"{reference.model} has {', '.join(known[:5])}"
    return "register it with 'shipworthy release create -f release.yaml'"


def start_here() -> Path:
    """Where a command looks for its project: SHIPWORTHY_PROJECT, else the working folder."""
    return Path(os.environ.get(PROJECT_VARIABLE) or ".")


def open_session(start: Path | None = None, *, prepare: bool = False) -> Session:
    """Open the project around `start` (default: SHIPWORTHY_PROJECT, else the working folder).

    With `prepare` the ledger is made or brought to this version first.
    """
    project = find_project(start or start_here())
    if prepare:
        prepare_state(project)
    return Session(project, open_ledger(project.ledger_url), LocalBlobs(project.blobs), time.time)


def prepare_state(project: Project) -> None:
    """Make what a project's processes need: private folders, secrets, and the ledger's tables."""
    _check_not_lost(project)
    for folder in (
        project.state,
        project.secrets,
        project.journals,
        project.logs,
        project.snapshots,
    ):
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    for name in ("signing", "pseudonyms"):
        _make_secret(project.secrets / name)
    migrate(project.ledger_url)
    _old_snapshot(project).unlink(missing_ok=True)


def _check_not_lost(project: Project) -> None:
    """Refuse to begin anew beside a gateway that still obeys the past."""
    if not newest_fence(project.snapshots) and not _old_snapshot(project).exists():
        return
    if not is_ledger(project.ledger_url):
        message = (
            f"the ledger {database_at(project.ledger_url).name} is gone, and with it every"
            f" decision; put it back, or remove {project.state} to begin anew"
        )
        raise LedgerUnavailable(message)


def _old_snapshot(project: Project) -> Path:
    """Where earlier versions kept the one that the gateway obeyed."""
    return project.state / "snapshot"


def _make_secret(file: Path) -> None:
    """Make a random secret once; several processes may try at the same time.

    It appears whole or not at all: one that is empty could be guessed.
    """
    if file.exists():
        return
    fresh = file.with_name(f".{file.name}.{secrets.token_hex(4)}")
    replace_file(fresh, secrets.token_bytes(32))
    with suppress(FileExistsError):
        os.link(fresh, file)
    fresh.unlink()


def new_id(prefix: str) -> str:
    """An id that nothing else has: the prefix, the time (so that ids sort) and random letters."""
    return f"{prefix}_{int(time.time() * 1000):011x}{secrets.token_hex(5)}"
