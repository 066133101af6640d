"""Keys and the people behind them."""

from __future__ import annotations

import secrets

from shipworthy.app.session import Session
from shipworthy.domain.keys import hash_key, key_id, new_key
from shipworthy.domain.plan import Key, Role
from shipworthy.errors import Conflict, NotFound, UsageError
from shipworthy.ports import StoredKey, Transaction
from shipworthy.stores.files import replace_file

ADMIN_KEY = "admin-key"
_RANDOM_BYTES = 32


def create_key(
    session: Session,
    holder: str,
    *,
    role: Role = "client",
    models: tuple[str, ...] = ("*",),
    expires: float | None = None,
    kind: str = "person",
    by: str | None = None,
) -> str:
    """Make a key for a holder and return its text, which is shown this once and never stored.

    `by` is the principal who made it; absent, the holder itself. Raises UsageError for a holder
    without a name, and Conflict for one who is known as the other kind: a person's key must not
    act as one of our own services.
    """
    holder = holder.strip()
    if not holder or not holder.isprintable():
        message = "a key needs a holder: name the person or service, in printable characters"
        raise UsageError(message)
    with session.ledger.write() as tx:
        return _create(session, tx, holder, role, models, expires, kind, by)


def _create(  # one row's values
    session: Session,
    tx: Transaction,
    holder: str,
    role: Role,
    models: tuple[str, ...],
    expires: float | None,
    kind: str,
    by: str | None,
) -> str:
    principal = tx.principals.ensure(holder, kind)
    if principal.kind != kind:
        message = f"{holder} is a {principal.kind} here; give the {kind} another name"
        raise Conflict(message)
    id = secrets.token_hex(6)
    text = new_key(id, secrets.token_bytes(_RANDOM_BYTES))
    now = session.clock()
    key = Key(id=id, hash=hash_key(text), role=role, models=models, expires=expires)
    tx.keys.add(StoredKey(key=key, principal=principal.id, created_at=now))
    detail = {"role": role, "models": list(models), "holder": principal.id}
    tx.audit.append(at=now, actor=by or principal.id, act="create key", subject=id, detail=detail)
    return text


def revoke_key(session: Session, id: str, *, by: str) -> None:
    """Revoke a key; every gateway worker refuses it within half a second."""
    with session.ledger.write() as tx:
        now = session.clock()
        if not tx.keys.revoke(id, now):
            message = f"no key {id} is in force; 'shipworthy keys list' shows which are"
            raise NotFound(message)
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
