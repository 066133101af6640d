"""Asking the keeper for something, and waiting for its answer."""

from __future__ import annotations

import time
from collections.abc import Callable

from shipworthy.app.session import Session, new_id
from shipworthy.domain.lifecycle import Intent, IntentKind, IntentStatus, Principal, Release
from shipworthy.domain.names import Stage
from shipworthy.errors import Unavailable

_POLL_SECONDS = 0.1
_ANSWERED = {IntentStatus.DONE, IntentStatus.REFUSED}


def ask(
    session: Session,
    kind: IntentKind,
    model: str,
    *,
    actor: Principal,
    release: Release | None = None,
    stage: Stage | None = None,
    reason: str = "",
) -> Intent:
    """Leave a request for the keeper."""
    now = session.clock()
    intent = Intent(
        id=new_id("int"),
        at=now,
        actor=actor.id,
        kind=kind,
        model=model,
        release=release.digest if release else None,
        stage=stage,
        reason=reason,
    )
    with session.ledger.write() as tx:
        tx.intents.put(intent)
        tx.audit.append(
            at=now,
            actor=actor.id,
            act=f"ask to {kind}",
            subject=release.name if release else model,
            detail={"intent": intent.id, **({"stage": stage.value} if stage else {})},
        )
    return intent


def await_answer(
    session: Session,
    intent: Intent,
    *,
    timeout: float,
    on_change: Callable[[Intent], object] = lambda _: None,
    given_up: Callable[[], bool] = lambda: False,
) -> Intent:
    """The intent once it is done or refused, or as it stands when the caller has `given_up`.

    Raises Unavailable when the keeper says nothing for `timeout` seconds; the request stays in
    line then. `on_change` hears what it waits for meanwhile.
    """
    last, deadline = intent, time.monotonic() + timeout
    while time.monotonic() < deadline:
        with session.ledger.read() as tx:
            current = tx.intents.get(intent.id)
        if current is not None and current != last:
            if current.status in _ANSWERED:
                return current
            last = current
            on_change(current)
        if given_up():
            return last
        time.sleep(_POLL_SECONDS)
    waiting = f": {last.answer}" if last.answer else "; is 'shipworthy up' running?"
    message = f"no answer within {timeout:.0f} s, the request stays in line{waiting}"
    raise Unavailable(message)
