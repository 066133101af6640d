"""Asking the keeper for something, and waiting for its answer."""

from __future__ import annotations

import time
from collections.abc import Callable

from shipworthy.app.session import Session, new_id
from shipworthy.domain.lifecycle import Intent, IntentKind, IntentStatus, Principal, Release
from shipworthy.domain.names import Stage
from shipworthy.errors import NotFound, Unavailable
from shipworthy.ports import Transaction

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
    """Leave a request for the keeper; NotFound when there is no such model.

    A rollback notes what is to be left, as it is now: by the time that the keeper reads it, a
    guardrail or somebody else may have been quicker.
    """
    now = session.clock()
    with session.ledger.write() as tx:
        if not tx.releases.list(model):
            message = f"no model {model}; 'shipworthy release list' shows what there is"
            raise NotFound(message)
        named = release.digest if release else None
        intent = Intent(
            id=new_id("int"),
            at=now,
            actor=actor.id,
            kind=kind,
            model=model,
            release=_exposed(tx, model) if kind is IntentKind.ROLLBACK else named,
            stage=stage,
            reason=reason,
        )
        tx.intents.put(intent)
        tx.audit.append(
            at=now,
            actor=actor.id,
            act=f"ask to {kind}",
            subject=release.name if release else model,
            detail={"intent": intent.id, **({"stage": stage.value} if stage else {})},
        )
    return intent


def _exposed(tx: Transaction, model: str) -> str | None:
    """The release that a rollback takes away: the candidate on its way, else what is stable."""
    running = next((state for state in tx.rollouts.active() if state.model == model), None)
    if running is not None:
        return running.candidate
    holder = next(iter(tx.stages.history(model, Stage.PRODUCTION)), None)
    return holder.release if holder else None


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
