"""`shipworthy release …` and `shipworthy serve`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from shipworthy.app import releasing, serving
from shipworthy.app.session import open_session
from shipworthy.cli.output import ago, byte_progress, err, out, say, say_json, say_table, short
from shipworthy.domain.findings import Verdict
from shipworthy.domain.lifecycle import Release, manifest_of
from shipworthy.domain.names import check_model_name
from shipworthy.errors import IntegrityError, NotMeasured
from shipworthy.protocols.documents import write_document
from shipworthy.release.show import ShownMetric, ShownRelease, show_release
from shipworthy.release.verify import stored_size, verify_release

release = typer.Typer(
    no_args_is_help=True, help="Immutable versions of a model, each with all that it pins."
)

Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
ReleaseName = Annotated[str, typer.Argument(help="digits@3, digits@staging or digits@sha256:…")]


@release.command("create")
def create(
    file: Annotated[Path, typer.Option("--file", "-f", help="The release's description.")] = Path(
        "release.yaml"
    ),
    *,
    json: Json = False,
) -> None:
    """Register a release: scan it, pin and store all its files, freeze its contract.

    The same content again changes nothing; other content under the same version is refused.

    Example: shipworthy release create -f digits/release.yaml
    """
    session = open_session()
    spec = releasing.read_spec(file)
    size = releasing.sources_of(spec, file.parent).size
    with byte_progress(f"storing {spec.model}", size) as advance:
        made = releasing.register(session, spec, file.parent, progress=advance, tell=err.print)
    if json:
        say_json(_row(made.release) | {"created": made.created})
        return
    say(made.sentence)
    if made.created and made.inferred:
        say("Its contract was found out by asking the model, and is frozen now:")
        say(write_document({"contract": made.manifest.content()["contract"]}))


def _row(found: Release) -> dict[str, object]:
    return {
        "name": found.name,
        "model": found.model,
        "version": found.version,
        "digest": found.digest,
        "created_at": found.created_at,
        "created_by": found.created_by,
    }


@release.command("list")
def list_releases(
    model: Annotated[str | None, typer.Argument(help="Only this model's.")] = None,
    *,
    json: Json = False,
) -> None:
    """List releases, newest first.

    Example: shipworthy release list digits --json
    """
    session = open_session()
    with session.ledger.read() as tx:
        found = tx.releases.list(check_model_name(model) if model else None)
        names = {r.created_by: p.name for r in found if (p := tx.principals.get(r.created_by))}
    if json:
        say_json([_row(one) for one in found])
        return
    say_table(
        ("release", "digest", "made", "by", "description"),
        (
            (
                one.name,
                short(one.digest),
                ago(one.created_at),
                names.get(one.created_by, one.created_by),
                str(one.manifest.get("description", "")),
            )
            for one in found
        ),
        empty="No releases yet; 'shipworthy try MODEL' or 'release create' brings the first.",
    )


@release.command("show")
def show(name: ReleaseName, *, json: Json = False) -> None:
    """Show all that a release pins.

    Example: shipworthy release show digits@production --json
    """
    session = open_session()
    found = session.release(name)
    if json:
        say_json(_row(found) | {"manifest": found.manifest})
        return
    with session.ledger.read() as tx:
        maker = tx.principals.get(found.created_by)
    _say_release(show_release(found, maker.name if maker else found.created_by))


def _say_release(shown: ShownRelease) -> None:
    out.print(f"[bold]{shown.name}[/] {shown.digest}")
    facts = {
        "made": f"{ago(shown.created_at)} by {shown.created_by}",
        "what": shown.description,
        "owner": shown.owner,
        "code": shown.code,
        "runs on": f"{shown.engine}, {shown.environment}",
        "served by": shown.serving,
        "speaks": shown.speaks,
        "adds": shown.adds,
        "inputs": "; ".join(shown.inputs),
        "outputs": "; ".join(shown.outputs),
        "metrics": "; ".join(_claim(metric) for metric in shown.metrics),
    }
    for name, fact in facts.items():
        if fact:
            say(f"  {name:<10} {fact}")
    parts = [
        (part.name, part.kind, f"{part.files}", f"{part.size:,}", short(part.digest), part.note)
        for part in (*shown.artifacts, *shown.data)
    ]
    columns = ("part", "kind", "files", "bytes", "digest", "note")
    say_table(columns, [[escape(cell) for cell in part] for part in parts], empty="")
    for gap in shown.gaps:
        say(f"  - {gap}")


def _claim(metric: ShownMetric) -> str:
    n = f", n={metric.n:,}" if metric.n else ""
    if metric.low is None or metric.high is None:
        return f"{metric.name} {metric.value:g}{n}"
    return f"{metric.name} {metric.value:g} ({metric.low:.4g} to {metric.high:.4g}{n})"


@release.command("verify")
def verify(name: ReleaseName, *, json: Json = False) -> None:
    """Re-read every byte that a release pins and compare it with its digest.

    Exit code 0: all equal; 1: something differs or is gone.

    Example: shipworthy release verify digits@3
    """
    session = open_session()
    found = session.release(name)
    with byte_progress(f"reading {found.name}", stored_size(found)) as advance:
        checked = verify_release(found, session.blobs, now=session.clock(), progress=advance)
    if json:
        say_json(checked)
    else:
        remote = found.manifest.get("serving", {}).get("runtime") == "endpoint"
        told = " Its server is elsewhere, and what that serves is its own word." if remote else ""
        say(f"{found.name}: {checked.sentence}.{told}")
    if checked.verdict is Verdict.FAIL:
        raise typer.Exit(IntegrityError.exit_code)
    if checked.verdict is not Verdict.PASS:
        raise typer.Exit(NotMeasured.exit_code)


def serve(
    name: ReleaseName,
    host: Annotated[str, typer.Option(help="Where to listen.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0 takes any free one.")] = 8090,
) -> None:
    """Serve one release by itself over the Open Inference Protocol, in its own interpreter.

    Every byte is verified first. Clients should call the gateway instead: 'shipworthy up'.

    Example: shipworthy serve digits@3 --port 8090
    """
    session = open_session()
    found = session.release(name)
    manifest = manifest_of(found)
    size = sum(file.size for file in manifest.pinned_files())
    with byte_progress(f"copying {found.name}", size) as advance:
        prepared = serving.prepare(session, found, advance, tell=err.print)
    with prepared as options:
        code = serving.serve(options, found, host=host, port=port, tell=say)
    raise typer.Exit(code)
