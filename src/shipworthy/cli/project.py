"""A project as a whole: `init`, `try`, `up`, `apply`, `status`."""

from __future__ import annotations

import shlex
import time
from pathlib import Path
from typing import Annotated

import typer

from shipworthy.app import supervisor, trying
from shipworthy.app.founding import Applied, apply_policies, make_project
from shipworthy.app.session import open_session
from shipworthy.app.status import ModelStatus, RolloutStatusLine, Serving, Status, status_of
from shipworthy.app.supervisor import Up
from shipworthy.cli.output import ago, out, say, say_json, say_table, styled, waiting
from shipworthy.domain.names import check_model_name
from shipworthy.errors import NotFound

_STALE_KEEPER_SECONDS = 60.0
_MOST_WHOLE = 8  # models that are shown with all their stages

Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def init(
    folder: Annotated[Path, typer.Argument(help="Where; made when it isn't there.")] = Path(),
    preset: Annotated[
        str, typer.Option(help="How strict new policies are: prototype, standard or critical.")
    ] = "standard",
    *,
    solo: Annotated[
        bool, typer.Option("--solo", help="One person works here: waive four-eyes, on record.")
    ] = False,
) -> None:
    """Make a project that works.

    Example: shipworthy init --solo --preset prototype
    """
    session = make_project(folder, preset=preset, solo=solo)
    say(f"Made a project in {session.project.root}: settings in shipworthy.yaml, state below it.")
    say("Next: 'shipworthy try MODEL --sample ROWS.csv' serves a model; 'shipworthy up' all of it.")


def try_model(
    target: Annotated[
        str, typer.Argument(help="A model file, or a server's URL (OpenAI, OIP v2, MLflow).")
    ],
    sample: Annotated[
        Path | None,
        typer.Option(help="What it takes: rows as CSV with a header or JSON; or requests."),
    ] = None,
    name: Annotated[
        str | None, typer.Option(help="What to call the model; without: after its file or URL.")
    ] = None,
    unsafe: Annotated[
        str | None,
        typer.Option(help="Why a pickle or joblib file may run its code; kept with the release."),
    ] = None,
    credential: Annotated[
        str | None, typer.Option(help="For a URL: env:NAME or file:PATH of its token.")
    ] = None,
    served_model: Annotated[
        str | None,
        typer.Option(help="For a URL that serves several: the model's or adapter's name there."),
    ] = None,
) -> None:
    """Look at a model, register it, serve it behind the gateway and say what is missing.

    A language model's server is asked one request of each kind; the release does what it answered.

    Example: shipworthy try http://localhost:8000/v1 --name assistant
    """
    session = trying.session_here()
    wanted = trying.Wanted(
        target=target,
        sample=sample,
        name=check_model_name(name) if name else None,
        unsafe=unsafe,
        credential=credential,
        served_model=served_model,
    )
    with waiting(f"looking at {target}"):
        tried = trying.look_and_register(session, wanted)
    for note in tried.notes:
        say(note)
    code = trying.serve_it(session, tried, tell=say, show=_show_tried)
    if code:
        raise typer.Exit(code)


def _show_tried(tried: trying.Tried, url: str, key_file: Path, missing: list[str]) -> None:
    say(f"\n{tried.release.name} answers behind the gateway:\n")
    key = f'"Authorization: Bearer $(cat {shlex.quote(str(key_file))})"'
    kind = "" if tried.path.startswith("/v2/") else '-H "Content-Type: application/json" '
    say(f"  curl -s {url}{tried.path} -H {key} {kind}-d {shlex.quote(tried.sample_request)}\n")
    say("Still missing for production:")
    for line in missing:
        say(f"  - {line}")
    files = ", ".join(str(file) for file in tried.written)
    say(f"\nWritten: {files}. Next: see to these points there, then")
    say(f"  shipworthy release create -f {tried.release_file}")
    say(f"  shipworthy promote {tried.release.model}@VERSION --to staging")


def up(
    *,
    quiet: Annotated[bool, typer.Option("--quiet", help="Don't print the admin key.")] = False,
) -> None:
    """Run everything of this project on this machine: keepers, gateway, lake writer, replicas.

    It ends with Ctrl-C, in order: what is under way is answered first. A second one ends at once.

    Example: shipworthy up
    """
    session = open_session(prepare=True)

    async def ready(running: Up) -> None:
        say(f"The gateway listens on {running.url}")
        if not quiet:
            say(f"Admin key (also in {session.project.secrets / 'admin-key'}): {running.admin_key}")
        say(f"Logs are in {session.project.logs}. 'shipworthy status' tells how it goes.")

    code = supervisor.run(session, ready)
    say("Stopped." if code == 0 else "Stopped at once.")
    if code:
        raise typer.Exit(code)


def apply(
    file: Annotated[
        Path, typer.Option("--file", "-f", help="A policy file, or a folder of them.")
    ] = Path(),
    *,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would change.")] = False,
) -> None:
    """Put policies in force and say what changed.

    Example: shipworthy apply -f policies/ --dry-run
    """
    session = open_session()
    for applied in apply_policies(session, file, dry_run=dry_run):
        if not applied.changes:
            say(f"{applied.file}: the policy of {applied.model} is in force already.")
            _say_notes(applied)
            continue
        verb = "would be" if dry_run else "is"
        kind = "put in force" if applied.new else "changed"
        say(f"{applied.file}: the policy of {applied.model} {verb} {kind}.")
        if not applied.new:
            for change in applied.changes:
                say(f"  {change}")
        _say_notes(applied)


def _say_notes(applied: Applied) -> None:
    for note in applied.notes:
        say(f"  Note: {note}.")


def status(
    model: Annotated[str | None, typer.Argument(help="Only this model.")] = None,
    *,
    json: Json = False,
) -> None:
    """Show on one screen what needs a person, then each model from release to traffic.

    Example: shipworthy status digits
    """
    session = open_session()
    found = status_of(session, model)
    if model is not None and not found.models:
        message = f"no model {model}; 'shipworthy release list' shows what there is"
        raise NotFound(message)
    if json:
        say_json(found)
        return
    _say_needs(found)
    _say_models(found.models)


def _say_needs(found: Status) -> None:
    needs = list(found.needs_a_person)
    if found.running and found.keeper_seen is not None:
        silent = time.time() - found.keeper_seen
        if silent > _STALE_KEEPER_SECONDS:
            needs.insert(0, f"the keeper has said nothing for {silent:.0f} s; see its log")
    if not needs:
        out.print("[green]Nothing needs a person.[/]")
    for need in needs:
        out.print(f"! {need}", style="yellow", markup=False)


def _say_models(models: list[ModelStatus]) -> None:
    """One table for all; with many models, only the highest stage of each, to fit a screen."""
    short = len(models) > _MOST_WHOLE
    say_table(
        ("release", "stage", "state", "share", "answers/15 min", "failed", "since"),
        (row for model in models for row in _rows(model, short=short)),
        empty="No models yet; 'shipworthy try MODEL' brings the first.",
    )
    if short:
        say("The highest stage of each model; 'shipworthy status MODEL' tells the rest.")
    for model in models:
        _say_rollout(model.rollout)
        for fact in filter(None, (model.mirror, model.limits and f"at most {model.limits}")):
            say(f"{model.model}: {fact}")
        for sentence in model.unheeded:
            out.print(f"! {sentence}", style="yellow", markup=False)


def _rows(model: ModelStatus, *, short: bool) -> list[tuple[str, ...]]:
    if not model.serving:
        return [(model.newest, "registered", "runs nowhere yet", "", "", "", "")]
    highest = model.serving[0].stage
    return [_serving_row(line) for line in model.serving if not short or line.stage is highest]


def _say_rollout(rollout: RolloutStatusLine | None) -> None:
    if rollout is None or rollout.ended is not None:
        return
    out.print(
        f"Rollout of {rollout.candidate}: {styled(rollout.status)}, step {rollout.step} of"
        f" {rollout.steps}, e-value {rollout.e_value:.3g} (alarm at {rollout.alarm_at:g})"
    )
    for phrase in rollout.missing:
        say(f"  still missing: {phrase}")


def _serving_row(serving: Serving) -> tuple[str, ...]:
    failed = f"{serving.failed / serving.assigned:.2%}" if serving.assigned else "-"
    return (
        serving.release,
        serving.stage,
        styled(serving.state),
        f"{serving.weight:.0%}",
        f"{serving.answers:,}",
        failed,
        ago(serving.since),
    )
