"""`shipworthy keys …` and `shipworthy audit …`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import msgspec
import typer

from shipworthy.app.access import create_key, limit_key, revoke_key
from shipworthy.app.session import open_session
from shipworthy.cli.output import ago, err, out, say, say_json, say_table
from shipworthy.domain.audit import AuditHead, verify
from shipworthy.domain.plan import Limits, Role
from shipworthy.domain.policy import read_duration
from shipworthy.errors import IntegrityError, UsageError

keys = typer.Typer(
    no_args_is_help=True,
    help="Who may call the gateway. Keys are shown once and stored hashed.",
)
audit = typer.Typer(
    no_args_is_help=True, help="The append-only log of every act, as a chain of hashes."
)

Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@keys.command("create")
def create(
    holder: Annotated[str, typer.Argument(help="The person or service that will hold the key.")],
    role: Annotated[
        str,
        typer.Option(help="client: calls models; trusted: any feedback too; admin: everything."),
    ] = "client",
    model: Annotated[
        list[str] | None,
        typer.Option(help="A model that it may call (repeatable); without: all in production."),
    ] = None,
    expires: Annotated[str | None, typer.Option(help="For how long, such as 90d.")] = None,
    requests_per_minute: Annotated[
        int | None, typer.Option(help="Most requests that it may send in a minute.")
    ] = None,
    tokens_per_minute: Annotated[
        int | None, typer.Option(help="Most tokens, in and out, that it may use in a minute.")
    ] = None,
    concurrency: Annotated[
        int | None, typer.Option(help="Most requests that it may have under way at once.")
    ] = None,
    budget_per_day: Annotated[
        float | None, typer.Option(help="Most money that its calls may cost from midnight UTC on.")
    ] = None,
    *,
    service: Annotated[bool, typer.Option("--service", help="A program holds it.")] = False,
) -> None:
    """Make a key and print it, this once.

    Example: shipworthy keys create web-shop --service --model digits --expires 90d
    """
    session = open_session()
    roles: dict[str, Role] = {"client": "client", "trusted": "trusted", "admin": "admin"}
    if role not in roles:
        message = f"no role {role!r}; roles are {', '.join(roles)}"
        raise UsageError(message)
    text = create_key(
        session,
        holder,
        role=roles[role],
        models=tuple(model) if model else ("*",),
        expires=session.clock() + _lifetime(expires) if expires is not None else None,
        kind="service" if service else "person",
        by=session.actor().id,
        limits=Limits(
            requests_per_minute=requests_per_minute,
            tokens_per_minute=tokens_per_minute,
            concurrency=concurrency,
            budget_per_day=budget_per_day,
        ),
    )
    err.print(f"Key of {holder}; it is not shown again:", markup=False)
    out.print(text, markup=False)


def _lifetime(text: str) -> float:
    """Seconds that a key is to live; one that is dead when it is made is a mistake."""
    seconds = read_duration(text)
    if seconds <= 0:
        message = f"--expires {text} makes a key that is dead already; give a duration above 0"
        raise UsageError(message)
    return seconds


@keys.command("list")
def list_keys(
    *,
    every: Annotated[bool, typer.Option("--all", help="Those revoked or expired too.")] = False,
    json: Json = False,
) -> None:
    """List the keys in force, newest last; never their secrets.

    Example: shipworthy keys list --all
    """
    session = open_session()
    now = session.clock()
    with session.ledger.read() as tx:
        stored = [s for s in tx.keys.list() if every or s.in_force(now)]
        names = {s.principal: p.name for s in stored if (p := tx.principals.get(s.principal))}
    if json:
        say_json(
            [
                {
                    "id": s.key.id,
                    "holder": names.get(s.principal, s.principal),
                    "role": s.key.role,
                    "models": s.key.models,
                    "limits": s.key.limits,
                    "created_at": s.created_at,
                    "expires": s.key.expires,
                    "revoked_at": s.revoked_at,
                }
                for s in stored
            ]
        )
        return
    say_table(
        ("id", "holder", "role", "models", "limits", "created", "state"),
        (
            (
                s.key.id,
                names.get(s.principal, s.principal),
                s.key.role,
                " ".join(s.key.models),
                _limits_text(s.key.limits),
                ago(s.created_at),
                _state(s.revoked_at, s.key.expires, now),
            )
            for s in stored
        ),
        empty="No keys yet; make one with 'shipworthy keys create NAME'.",
    )


def _state(revoked_at: float | None, expires: float | None, now: float) -> str:
    if revoked_at is not None:
        return f"revoked {ago(revoked_at)}"
    return "expired" if expires is not None and now >= expires else "in force"


def _limits_text(limits: Limits) -> str:
    """Such as "60 requests/min, 2 at once"; a dash for none."""
    parts = [
        (limits.requests_per_minute, "{:,} requests/min"),
        (limits.tokens_per_minute, "{:,} tokens/min"),
        (limits.concurrency, "{:,} at once"),
        (limits.budget_per_day, "{:.12g} a day"),
    ]
    return ", ".join(text.format(value) for value, text in parts if value is not None) or "–"


@keys.command("limit")
def limit(
    key: Annotated[str, typer.Argument(help="The key's id, from 'keys list'.")],
    requests_per_minute: Annotated[
        str | None, typer.Option(help="Most requests in a minute, or none for no limit.")
    ] = None,
    tokens_per_minute: Annotated[
        str | None, typer.Option(help="Most tokens, in and out, in a minute, or none.")
    ] = None,
    concurrency: Annotated[
        str | None, typer.Option(help="Most requests under way at once, or none.")
    ] = None,
    budget_per_day: Annotated[
        str | None, typer.Option(help="Most money from midnight UTC on, or none.")
    ] = None,
) -> None:
    """Change limits of a key, those that are named; the gateway keeps to them within half a second.

    Example: shipworthy keys limit 3f9c1d20ab77 --requests-per-minute 60 --budget-per-day none
    """
    given: dict[str, tuple[str | None, type[int | float]]] = {
        "requests_per_minute": (requests_per_minute, int),
        "tokens_per_minute": (tokens_per_minute, int),
        "concurrency": (concurrency, int),
        "budget_per_day": (budget_per_day, float),
    }
    changes = {
        name: _limit_of(name, text, kind)
        for name, (text, kind) in given.items()
        if text is not None
    }
    if not changes:
        message = "nothing to change; name a limit, such as --requests-per-minute 60"
        raise UsageError(message)
    session = open_session()
    limits = limit_key(session, key, changes, by=session.actor().id)
    say(f"Key {key} now has limits: {_limits_text(limits)}.")


def _limit_of(name: str, text: str, kind: type[int | float]) -> float | None:
    if text == "none":
        return None
    try:
        return kind(text)
    except ValueError as error:
        option = f"--{name.replace('_', '-')}"
        message = f"{option} {text} is no limit; give a number, or none for no limit"
        raise UsageError(message) from error


@keys.command("revoke")
def revoke(key: Annotated[str, typer.Argument(help="The key's id, from 'keys list'.")]) -> None:
    """Revoke a key; the gateway refuses it within half a second.

    Example: shipworthy keys revoke 3f9c1d20ab77
    """
    session = open_session()
    revoke_key(session, key, by=session.actor().id)
    say(f"Key {key} is revoked.")


@audit.command("log")
def log(
    limit: Annotated[int, typer.Option(min=1, help="How many entries, counted from the end.")] = 20,
    *,
    json: Json = False,
) -> None:
    """Show who did what, newest last.

    Example: shipworthy audit log --limit 50
    """
    session = open_session()
    with session.ledger.read() as tx:
        entries = list(tx.audit.entries())[-limit:]
        actors = {entry.actor for entry in entries}
        names = {actor: p.name for actor in actors if (p := tx.principals.get(actor))}
    if json:
        say_json([{**msgspec.to_builtins(e), "name": names.get(e.actor)} for e in entries])
        return
    say_table(
        ("#", "when", "who", "did", "what"),
        (
            (str(e.sequence), ago(e.at), names.get(e.actor, e.actor), e.act, e.subject)
            for e in entries
        ),
        empty="Nothing has been done yet.",
    )


@audit.command("verify")
def verify_chain(
    head: Annotated[
        Path | None,
        typer.Option(help="A head exported earlier; the chain must still contain it."),
    ] = None,
    export: Annotated[
        Path | None, typer.Option(help="Write the present head to this file, to check by later.")
    ] = None,
) -> None:
    """Check that no entry of the log was changed, dropped or slipped in.

    Example: shipworthy audit verify --export head.json, and a month later
    shipworthy audit verify --head head.json
    """
    session = open_session()
    exported = None
    if head is not None:
        try:
            exported = msgspec.json.decode(head.read_bytes(), type=AuditHead)
        except (OSError, msgspec.MsgspecError) as error:
            message = f"{head} is no exported head ({error}); make one with --export"
            raise UsageError(message) from error
    with session.ledger.read() as tx:
        now = tx.audit.head()
        problems = verify(tx.audit.entries(), head=now, exported=exported)
    if problems:
        message = "the audit log does not hold: " + "; ".join(problems[:5])
        raise IntegrityError(message)
    if export is not None:
        export.write_bytes(msgspec.json.encode(now))
    say(f"All {now.sequence:,} entries hold; the head is {now.hash}.")
