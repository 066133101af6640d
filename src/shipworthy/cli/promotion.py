"""Checks, gates and traffic: `check`, `promote`, `approve`, `rollout …`, `rollback`."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import msgspec
import typer
from rich.markup import escape

from shipworthy.app import checks
from shipworthy.app.asking import ask, await_answer
from shipworthy.app.session import Session, open_session
from shipworthy.app.status import RolloutStatusLine, is_running, rollout_of
from shipworthy.cli.output import ago, out, say, say_json, say_table, styled, waiting
from shipworthy.domain.checklist import ItemStatus
from shipworthy.domain.gates import GateVerdict
from shipworthy.domain.lifecycle import Approval, Intent, IntentKind, IntentStatus, Release
from shipworthy.domain.names import ReleaseReference, Stage, check_model_name
from shipworthy.errors import NotAllowed, NotFound, NotMeasured, Refused, Unavailable, UsageError
from shipworthy.release.page import to_html
from shipworthy.release.report import Report, ReportLine, to_json, to_markdown
from shipworthy.rollout.intents import GATE_DECISIONS

START_SECONDS = 900.0
"""How long a promotion may wait for the release to start, its interpreter being built included."""
ANSWER_SECONDS = 20.0
_LOOK_BACK = 200  # decisions of the model among which those of the rollout are looked for

ReleaseName = Annotated[str, typer.Argument(help="digits@3, digits@staging or digits@sha256:…")]
ModelName = Annotated[str, typer.Argument(help="The model's name.")]
Reason = Annotated[str, typer.Option("--reason", "-m", help="Why; kept with the decision.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]

rollout = typer.Typer(
    no_args_is_help=True, help="Move production traffic to a candidate, and watch it go."
)


def _stage(text: str) -> Stage:
    try:
        return Stage(text)
    except ValueError:
        message = f"no stage {text!r}; stages are {', '.join(Stage)}"
        raise UsageError(message) from None


# --- check ------------------------------------------------------------------------------------


def check(
    release: ReleaseName,
    stage: Annotated[
        str | None,
        typer.Option(help="Only what can be observed at this stage; without: wherever it runs."),
    ] = None,
    only: Annotated[
        list[str] | None, typer.Option(help="A check or group of them (repeatable).")
    ] = None,
    form: Annotated[str, typer.Option("--format", help="table, md, html or json.")] = "table",
    output: Annotated[Path | None, typer.Option(help="Write to this file.")] = None,
    *,
    json: Json = False,
) -> None:
    """Observe every check that can be observed now, and show the release's checklist.

    Exit code 0: all pass; 1: one fails; 3: one is inconclusive or could not be measured, as
    traffic.moved is until whole minutes have passed since the move.

    Example: shipworthy check digits@3 --format html --output digits-3.html
    """
    kind = "json" if json else form
    if kind not in _FORMS and kind != "table":
        message = f"no format {kind!r}; formats are table, {', '.join(_FORMS)}"
        raise UsageError(message)
    session = open_session()
    found = session.release(release)
    chosen = _stage(stage) if stage else None
    with waiting(f"checking {found.name}") as tell:
        asyncio.run(checks.run_checks(session, found, stage=chosen, only=only or (), tell=tell))
    report = checks.report_of(session, found)
    if kind == "table":
        _print_lines(checks.observed_lines(report, only or ()))
    elif output is not None:
        output.write_text(_FORMS[kind](report), encoding="utf-8")
        say(f"Written to {output}.")
    else:
        typer.echo(_FORMS[kind](report))
    statuses = {line.status for line in checks.observed_lines(report, only or ())}
    if ItemStatus.FAIL in statuses:
        raise typer.Exit(Refused.exit_code)
    if not statuses or any(status.holds for status in statuses):
        raise typer.Exit(NotMeasured.exit_code)


_FORMS: dict[str, Callable[[Report], str]] = {
    "md": to_markdown,
    "html": to_html,
    "json": lambda report: to_json(report).decode(),
}


def _print_lines(lines: list[ReportLine]) -> None:
    say_table(
        ("check", "verdict", "stage", "observed"),
        ((line.id, styled(line.status), line.stage, escape(line.observed)) for line in lines),
        empty="Nothing was observed.",
    )


# --- promote ----------------------------------------------------------------------------------


def promote(
    release: ReleaseName,
    to: Annotated[str, typer.Option("--to", help="staging or production.")],
    reason: Reason = "",
    *,
    wait: Annotated[
        bool, typer.Option("--wait", help="Follow the rollout until it has ended.")
    ] = False,
) -> None:
    """Let a release enter a stage: its checks are observed, its gate is judged, and it moves.

    The first release of a model takes production at once; every later one by a rollout.
    Exit code 0: it entered (with --wait: it holds production); 1: refused; 3: held for want of
    evidence.

    Example: shipworthy promote digits@3 --to production --wait
    """
    session = open_session()
    found, stage = session.release(release), _stage(to)
    if stage is Stage.DEVELOPMENT:
        message = "a release is in development from its registration on; promote it to staging"
        raise UsageError(message)
    with waiting(f"observing what the gate to {stage} asks for") as tell:
        asyncio.run(checks.run_gate_checks(session, found, stage, tell=tell))
    answer = _ask_and_wait(session, IntentKind.PROMOTE, found.model, found, stage, reason)
    say(answer.answer)
    if answer.status is IntentStatus.REFUSED:
        raise typer.Exit(checks.refusal_code(session, found, stage))
    if stage is Stage.PRODUCTION and (wait or _holds_production(session, found)):
        _follow(session, found)
        _confirm(session, found)


def start(release: ReleaseName, reason: Reason = "") -> None:
    """Start moving production traffic to a release; the same as promote --to production.

    Example: shipworthy rollout start digits@3
    """
    promote(release, to=Stage.PRODUCTION, reason=reason)


def _ask_and_wait(
    session: Session,
    kind: IntentKind,
    model: str,
    release: Release | None,
    stage: Stage | None,
    reason: str,
) -> Intent:
    if not is_running(session):
        message = f"nothing runs here that could {kind}; start it with 'shipworthy up'"
        raise Unavailable(message)
    intent = ask(
        session, kind, model, actor=session.actor(), release=release, stage=stage, reason=reason
    )
    slow = kind in {IntentKind.PROMOTE, IntentKind.ROLLBACK}
    with waiting("waiting for the keeper") as tell:
        return await_answer(
            session,
            intent,
            timeout=START_SECONDS if slow else ANSWER_SECONDS,
            on_change=lambda current: tell(current.answer or "waiting for the keeper"),
        )


def _follow(session: Session, release: Release) -> None:
    """Wait for the end of the rollout of this very release, telling how it goes."""
    with waiting(f"rolling out {release.name}") as tell:
        while True:
            line = rollout_of(session, release.model)
            if line is None or line.candidate != release.name:
                return
            if line.ended:
                break
            tell(f"{line.candidate}: {line.status} at {line.weight:.0%}; {_missing(line)}")
            time.sleep(0.5)
    _say_decision(session, release.model)
    if line.status != "completed":
        raise typer.Exit(Refused.exit_code)


def _holds_production(session: Session, release: Release) -> bool:
    with session.ledger.read() as tx:
        holder = tx.releases.find(ReleaseReference(release.model, stage=Stage.PRODUCTION))
    return holder is not None and holder.digest == release.digest


def _confirm(session: Session, release: Release) -> None:
    """Look behind the move whether it is so; what needs more traffic is named, not awaited."""
    with waiting(f"confirming {release.name} in production") as tell:
        judged = asyncio.run(checks.confirm(session, release, tell=tell))
    if judged is not None:
        say(judged.paragraph)
        if judged.verdict is GateVerdict.FAIL:
            raise typer.Exit(Refused.exit_code)


def _missing(line: RolloutStatusLine) -> str:
    return f"still missing: {'; '.join(line.missing)}" if line.missing else "nothing missing"


def _say_decision(session: Session, model: str) -> None:
    with session.ledger.read() as tx:
        decisions = tx.decisions.list(model, limit=1)
    for decision in decisions:
        say(decision.text)


def approve(
    release: ReleaseName,
    stage: Annotated[str, typer.Option("--for", help="staging or production.")] = "production",
    reason: Reason = "",
) -> None:
    """Say yes, by name, to a release entering a stage.

    Who approves is the holder of the key in SHIPWORTHY_KEY, else the account that runs this. The
    release's maker does not count.

    Example: SHIPWORTHY_KEY=sw_… shipworthy approve digits@3 -m "looked at the worst errors"
    """
    session = open_session()
    found, chosen, actor = session.release(release), _stage(stage), session.actor()
    if chosen is Stage.DEVELOPMENT:
        message = "development has no gate to approve for; name staging or production"
        raise UsageError(message)
    if actor.kind != "person":
        message = f"{actor.name} is a service, and only people approve; use a person's key"
        raise NotAllowed(message)
    now = session.clock()
    with session.ledger.write() as tx:
        tx.evidence.add_approval(
            Approval(release=found.digest, stage=chosen, by=actor.id, at=now, reason=reason)
        )
        tx.audit.append(
            at=now,
            actor=actor.id,
            act="approve",
            subject=found.name,
            detail={"stage": chosen.value, "digest": found.digest},
        )
    own = " It does not count towards the gate: they made the release." * (
        actor.id == found.created_by
    )
    say(f"{actor.name} approves {found.name} for {chosen}.{own}")


def rollback(model: ModelName, reason: Reason = "") -> None:
    """Go back now: out of the rollout that runs, else to the production release before.

    No gate, approval or freeze stands in the way.

    Example: shipworthy rollback digits -m "customers report wrong answers"
    """
    session = open_session()
    _act(session, IntentKind.ROLLBACK, model, reason)


def _act(session: Session, kind: IntentKind, model: str, reason: str) -> None:
    check_model_name(model)
    answer = _ask_and_wait(session, kind, model, None, None, reason)
    say(answer.answer)
    if answer.status is IntentStatus.REFUSED:
        raise typer.Exit(Refused.exit_code)


@rollout.command("pause")
def pause(model: ModelName, reason: Reason = "") -> None:
    """Stop going up; the weight stays and the guardrails stay armed.

    Example: shipworthy rollout pause digits -m "a sale begins"
    """
    _act(open_session(), IntentKind.PAUSE, model, reason)


@rollout.command("resume")
def resume(model: ModelName, reason: Reason = "") -> None:
    """Go on after a pause or a hold.

    Example: shipworthy rollout resume digits
    """
    _act(open_session(), IntentKind.RESUME, model, reason)


@rollout.command("abort")
def abort(model: ModelName, reason: Reason = "") -> None:
    """End the rollout; stable takes everything.

    Example: shipworthy rollout abort digits -m "wrong threshold"
    """
    _act(open_session(), IntentKind.ABORT, model, reason)


rollout.command("start")(start)


@rollout.command("status")
def status(
    model: ModelName,
    decisions: Annotated[int, typer.Option(min=0, help="How many of its decisions to show.")] = 5,
    *,
    gates: Annotated[bool, typer.Option("--gates", help="Also what gates decided.")] = False,
    json: Json = False,
) -> None:
    """Show the rollout that runs, or the newest one, with its evidence and decisions.

    Example: shipworthy rollout status digits
    """
    session = open_session()
    line = rollout_of(session, check_model_name(model))
    with session.ledger.read() as tx:
        known = tx.releases.list(model)
        told = tx.decisions.list(model, limit=_LOOK_BACK)
    told = [one for one in told if gates or one.kind not in GATE_DECISIONS][:decisions]
    if not known:
        message = f"no model {model}; 'shipworthy release list' shows what there is"
        raise NotFound(message)
    if json:
        say_json({"rollout": line, "decisions": [msgspec.to_builtins(d) for d in told]})
        return
    if line is None:
        say(f"{model} has had no rollout yet.")
    else:
        _say_rollout(line)
    for decision in reversed(told):
        out.print(f"\n{ago(decision.at)}: {decision.kind}", style="bold", markup=False)
        say(decision.text)


def _say_rollout(line: RolloutStatusLine) -> None:
    out.print(
        f"{line.candidate} beside {line.stable}: {styled(line.status)} at {line.weight:.0%}"
        f" (step {line.step} of {line.steps}), {line.exposed_requests:,} requests exposed;"
        f" e-value {line.e_value:.3g}, alarm at {line.alarm_at:g}"
    )
    for phrase in line.missing:
        say(f"  still missing: {phrase}")
    if line.reason:
        say(f"  {line.reason}")
