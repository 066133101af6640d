"""The checklist page of a release: one value, written as Markdown, HTML or JSON.

It travels with the release and is read by people who have nothing else, so every line says what was
seen, when, and until when that counts, and who stands behind what was not measured.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

import msgspec

from shipworthy.domain.checklist import (
    ATTESTED_BY,
    Checklist,
    ChecklistItem,
    ItemStatus,
    status_of,
)
from shipworthy.domain.gates import GateJudgement
from shipworthy.domain.lifecycle import Approval, Release, StageFinding, Waiver

MOST_TEXT = 400
"""Characters of an observation on the page; evidence beyond `MOST_EVIDENCE` is cut as well."""
MOST_EVIDENCE = 2_000

_MARKS = {
    ItemStatus.PASS: "🟢", ItemStatus.FAIL: "🔴", ItemStatus.INCONCLUSIVE: "🟡",
    ItemStatus.ERROR: "🟠", ItemStatus.STALE: "⚪", ItemStatus.WAIVED: "🔵",
    ItemStatus.ATTESTED: "🟣",
}  # fmt: skip
_MARKDOWN = re.compile(r"([\\`*_{}\[\]<>|#~&!])")


class ReportLine(msgspec.Struct, frozen=True, kw_only=True):
    """One item. Times are Unix seconds; `by` says who waived or attested it, and why."""

    id: str
    title: str
    status: ItemStatus
    observed: str
    threshold: str
    stage: str = ""
    at: float | None = None
    expires: float | None = None
    by: str = ""
    evidence: dict[str, Any] = {}


class ReportApproval(msgspec.Struct, frozen=True, kw_only=True):
    """A person's yes."""

    by: str
    stage: str
    at: float
    reason: str


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """The page's content, lines by group in the checklist's order."""

    release: str
    digest: str
    model: str
    description: str
    owner: str
    registered_at: float
    registered_by: str
    written_at: float
    counts: dict[str, int]
    groups: tuple[tuple[str, tuple[ReportLine, ...]], ...]
    gates: tuple[GateJudgement, ...]
    approvals: tuple[ReportApproval, ...]


def build_report(
    release: Release,
    checklist: Checklist,
    *,
    findings: Iterable[StageFinding],
    approvals: Iterable[Approval],
    waivers: Iterable[Waiver],
    gates: Sequence[GateJudgement],
    names: Mapping[str, str],
    now: float,
) -> Report:
    """Gather the page of a release.

    Args:
        release: Whose page it is; evidence about others is ignored.
        checklist: Its items, in order.
        findings: What probes observed; the newest of each item is shown.
        approvals: What people said.
        waivers: What was set aside, by item.
        gates: Judgements to open the page with.
        names: People's names by principal id; an id without one is shown as it is.
        now: Unix time in seconds.

    """
    newest: dict[str, StageFinding] = {}
    for one in findings:
        before = newest.get(one.finding.check)
        if one.release == release.digest and (before is None or one.finding.at > before.finding.at):
            newest[one.finding.check] = one
    waived = {
        one.what: one
        for one in waivers
        if one.model in {None, release.model} and (one.until is None or now < one.until)
    }
    groups: dict[str, list[ReportLine]] = {}
    for item in checklist.items:
        line = _line(item, newest.get(item.id), waived.get(item.id), names, now)
        groups.setdefault(item.group, []).append(line)
    lines = [line for group in groups.values() for line in group]
    owner: dict[str, str] = release.manifest.get("owner") or {}
    return Report(
        release=release.name,
        digest=release.digest,
        model=release.model,
        description=str(release.manifest.get("description", "")),
        owner=" ".join(f"{owner.get('name', '')} {owner.get('email', '')}".split()),
        registered_at=release.created_at,
        registered_by=names.get(release.created_by, release.created_by),
        written_at=now,
        counts={one.value: sum(line.status is one for line in lines) for one in ItemStatus},
        groups=tuple((group, tuple(own)) for group, own in groups.items()),
        gates=tuple(gates),
        approvals=tuple(
            ReportApproval(
                by=names.get(one.by, one.by), stage=one.stage.value, at=one.at, reason=one.reason
            )
            for one in approvals
            if one.release == release.digest
        ),
    )


def _line(
    item: ChecklistItem,
    found: StageFinding | None,
    waiver: Waiver | None,
    names: Mapping[str, str],
    now: float,
) -> ReportLine:
    finding = found.finding if found else None
    status, by = status_of(finding, now), ""
    if status is ItemStatus.ATTESTED and finding is not None:
        attested = str(finding.evidence[ATTESTED_BY])
        by = f"attested by {names.get(attested, attested)}"
    if waiver is not None and status.holds:
        until = f" until {day(waiver.until)}" if waiver.until is not None else ", standing"
        by = f"waived by {names.get(waiver.by, waiver.by)}{until}: {waiver.reason}"
        status = ItemStatus.WAIVED
    if finding is None or found is None:
        return ReportLine(
            id=item.id,
            title=item.title,
            status=status,
            observed="not yet measured",
            threshold=item.observes,
            by=by,
        )
    return ReportLine(
        id=item.id,
        title=item.title,
        status=status,
        observed=finding.observed,
        threshold=finding.threshold,
        stage=found.stage.value,
        at=finding.at,
        expires=finding.expires,
        by=by,
        evidence=finding.evidence,
    )


def to_json(report: Report) -> bytes:
    """The whole value, evidence uncut."""
    return msgspec.json.format(msgspec.json.encode(report), indent=2)


def to_markdown(report: Report) -> str:
    """The page for a repository or a pull request. Everything that was observed is escaped."""
    parts = [f"# {_md(report.release)}", ""]
    if report.description:
        parts += [_md(report.description), ""]
    parts += [f"- Digest: `{report.digest}`"]
    if report.owner:
        parts.append(f"- Owner: {_md(report.owner)}")
    parts += [
        f"- Registered: {moment(report.registered_at)} by {_md(report.registered_by)}",
        f"- This page: {moment(report.written_at)}; {summary(report)}",
    ]
    for gate in report.gates:
        parts += [
            "",
            f"**Gate to {gate.stage.value}: {gate.verdict.value}.** {_md(gate.paragraph)}",
        ]
    for group, lines in report.groups:
        parts += ["", f"## {_md(group.capitalize())}", ""]
        parts += ["| | item | observed | wanted | when |", "| --- | --- | --- | --- | --- |"]
        parts += [_row(line) for line in lines]
    if report.approvals:
        parts += ["", "## Approvals", ""]
        parts += [
            f"- {_md(one.by)} for {_md(one.stage)}, {moment(one.at)}"
            + (f": {_md(one.reason)}" if one.reason else "")
            for one in report.approvals
        ]
    return "\n".join(parts) + "\n"


def _row(line: ReportLine) -> str:
    observed = _md(line.observed) + (f" ({_md(line.by)})" if line.by else "")
    return (
        f"| {_MARKS[line.status]} {line.status.value} | {_md(line.title)} `{line.id}` |"
        f" {observed} | {_md(line.threshold)} | {when(line)} |"
    )


def summary(report: Report) -> str:
    """`6 pass, 1 fail, 51 inconclusive`."""
    return ", ".join(f"{count} {status}" for status, count in report.counts.items() if count)


def when(line: ReportLine) -> str:
    """When and where it was observed, and until when that counts."""
    if line.at is None:
        return ""
    until = f", good until {day(line.expires)}" if line.expires is not None else ""
    return f"{moment(line.at)} in {line.stage}{until}"


def cut(text: str, most: int = MOST_TEXT) -> str:
    """The text on one line, and no longer than the page can bear."""
    flat = " ".join(text.split())
    return flat if len(flat) <= most else f"{flat[: most - 1]}…"


def moment(at: float) -> str:
    """`2026-03-01 12:30 UTC`."""
    return _date(at, "%Y-%m-%d %H:%M UTC")


def day(at: float) -> str:
    """`2026-03-01`."""
    return _date(at, "%Y-%m-%d")


def _date(at: float, form: str) -> str:
    try:
        return datetime.fromtimestamp(at, UTC).strftime(form)
    except (OverflowError, ValueError, OSError):
        return f"{at:.0f} s"


def _md(text: str, most: int = MOST_TEXT) -> str:
    return _MARKDOWN.sub(r"\\\1", cut(text, most))
