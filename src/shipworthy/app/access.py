"""Keys and the people behind them."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from typing import Any

import msgspec

from shipworthy.app.session import Session
from shipworthy.domain.keys import hash_key, key_id, new_key
from shipworthy.domain.lifecycle import Principal
from shipworthy.domain.plan import Key, Limits, Role
from shipworthy.errors import Conflict, NotFound, UsageError
from shipworthy.ports import StoredKey, Transaction
from shipworthy.stores.files import replace_file

ADMIN_KEY = "admin-key"
_RANDOM_BYTES = 32
_NO_LIMITS = Limits()
_HIGHEST_LIMIT = 10**12


def create_key(
    session: Session,
    holder: str,
    *,
    role: Role = "client",
    models: tuple[str, ...] = ("*",),
    expires: float | None = None,
    kind: str = "person",
    by: str | None = None,
    limits: Limits = _NO_LIMITS,
) -> str:
    """Make a key for a holder and return its text, which is shown this once and never stored.

    `by` is the principal who made it; absent, the holder itself. Raises UsageError for a holder
    without a name or limits that make no sense, and Conflict for a holder who is known as the other
    kind: a person's key must not act as one of our own services.
    """
    _check(limits)
    holder = holder.strip()
    if not holder or not holder.isprintable():
        message = "a key needs a holder: name the person or service, in printable characters"
        raise UsageError(message)
    with session.ledger.write() as tx:
        principal = _holder(tx, holder, kind)
        id = secrets.token_hex(6)
        text = new_key(id, secrets.token_bytes(_RANDOM_BYTES))
        now = session.clock()
        key = Key(
            id=id, hash=hash_key(text), role=role, models=models, expires=expires, limits=limits
        )
        tx.keys.add(StoredKey(key=key, principal=principal.id, created_at=now))
        detail: dict[str, Any] = {"role": role, "models": list(models), "holder": principal.id}
        if limits != _NO_LIMITS:
            detail["limits"] = msgspec.to_builtins(limits)
        tx.audit.append(
            at=now, actor=by or principal.id, act="create key", subject=id, detail=detail
        )
        return text


def _holder(tx: Transaction, name: str, kind: str) -> Principal:
    principal = tx.principals.ensure(name, kind)
    if principal.kind != kind:
        message = f"{name} is a {principal.kind} here; give the {kind} another name"
        raise Conflict(message)
    return principal


def limit_key(session: Session, id: str, changes: Mapping[str, float | None], *, by: str) -> Limits:
    """Change some limits of a key, by name, and give all that it has now; None takes one away.

    Every gateway worker keeps to them within half a second. Raises UsageError for limits that make
    no sense, and NotFound for a key that is revoked or was never there.
    """
    with session.ledger.write() as tx:
        stored = {s.key.id: s.key for s in tx.keys.list() if s.revoked_at is None}
        if id not in stored:
            raise _no_key(id)
        before = stored[id].limits
        limits = msgspec.structs.replace(before, **changes)
        _check(limits)
        tx.keys.limit(id, limits)
        detail = {"limits": msgspec.to_builtins(limits), "before": msgspec.to_builtins(before)}
        tx.audit.append(at=session.clock(), actor=by, act="limit key", subject=id, detail=detail)
    return limits


def _check(limits: Limits) -> None:
    for name, value in msgspec.structs.asdict(limits).items():
        if value is not None and not 0 < value <= _HIGHEST_LIMIT:
            option = f"--{name.replace('_', '-')}"
            message = f"{option} {value} is no limit; give a number above 0, and up to 10^12"
            raise UsageError(message)


def _no_key(id: str) -> NotFound:
    return NotFound(f"no key {id} is in force; 'shipworthy keys list' shows which are")


def revoke_key(session: Session, id: str, *, by: str) -> None:
    """Revoke a key; every gateway worker refuses it within half a second."""
    with session.ledger.write() as tx:
        now = session.clock()
        if not tx.keys.revoke(id, now):
            raise _no_key(id)
        tx.audit.append(at=now, actor=by, act="revoke key", subject=id)


def admin_key(session: Session) -> str:
    """The machine's own admin key, made when there is none; kept in a file of its owner alone."""
    file = session.project.secrets / ADMIN_KEY
    if file.is_file():
        text = file.read_text().strip()
        with session.ledger.read() as tx:
            known = {s.key.id: s.key.hash for s in tx.keys.list() if s.revoked_at is None}
        if known.get(key_id(text) or "") == hash_key(text):
            return text
    text = create_key(session, "shipworthy up", role="admin", kind="service")
    replace_file(file, f"{text}\n".encode())
    return text
