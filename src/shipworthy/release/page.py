"""The checklist page as HTML: one file, no script, nothing fetched, light and dark, printable."""

from __future__ import annotations

from html import escape

import msgspec

from shipworthy.domain.checklist import ItemStatus
from shipworthy.domain.gates import GateVerdict
from shipworthy.release.report import (
    MOST_EVIDENCE,
    Report,
    ReportLine,
    cut,
    moment,
    when,
)

_GATE_STATUS = {
    GateVerdict.PASS: ItemStatus.PASS,
    GateVerdict.FAIL: ItemStatus.FAIL,
    GateVerdict.HOLD: ItemStatus.INCONCLUSIVE,
}

_STYLE = """
:root{color-scheme:light dark;
--ink:#1c2024;--dim:#60646c;--paper:#fff;--line:#e4e4e9;--soft:#f7f7f9;
--pass:#18794e;--fail:#c62a2f;--inconclusive:#8a6100;--error:#b4470e;--stale:#60646c;
--waived:#0b61b0;--attested:#7a3cb8}
@media (prefers-color-scheme:dark){:root{--ink:#ececee;--dim:#a1a4ab;--paper:#151718;--line:#2f3336;
--soft:#1c1f21;--pass:#4cc38a;--fail:#ff7b7f;--inconclusive:#f0c000;--error:#ff9a5c;--stale:#a1a4ab;
--waived:#6cb6ff;--attested:#c49bff}}
*{box-sizing:border-box}
body{margin:0;background:var(--paper);color:var(--ink);
font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
main{max-width:66rem;margin:0 auto;padding:2rem 1.25rem 4rem}
h1{font-size:1.7rem;margin:0 0 .25rem;letter-spacing:-.01em}
h2{font-size:1.05rem;margin:2.25rem 0 .25rem;text-transform:capitalize}
p{margin:.35rem 0}
code{font:.85em ui-monospace,SFMono-Regular,Menlo,monospace;overflow-wrap:anywhere}
dl{display:grid;grid-template-columns:max-content 1fr;gap:.15rem 1rem;margin:1rem 0}
dt,.dim{color:var(--dim)}dd{margin:0;overflow-wrap:anywhere}
.counts{display:flex;flex-wrap:wrap;gap:.4rem;margin:1rem 0}
.v{display:inline-block;font-weight:600;font-size:.8rem;color:var(--c);white-space:nowrap}
.v::before{content:"";display:inline-block;width:.6rem;height:.6rem;margin-right:.4rem;
border-radius:50%;background:var(--c)}
.counts .v{border:1px solid var(--line);border-radius:1rem;padding:.15rem .7rem}
.gate{border:1px solid var(--line);border-left:4px solid var(--c);background:var(--soft);
border-radius:6px;padding:.7rem 1rem;margin:.75rem 0;overflow-wrap:anywhere}
.item{display:grid;grid-template-columns:7.5rem minmax(0,1fr) 13.5rem;gap:.1rem 1rem;
padding:.55rem 0;border-top:1px solid var(--line);overflow-wrap:anywhere}
.item .when{color:var(--dim);font-size:.82rem;text-align:right}
.item b{font-weight:600}.item .dim{font-size:.88rem}
details{font-size:.85rem;color:var(--dim)}summary{cursor:pointer;width:max-content}
pre{white-space:pre-wrap;overflow-wrap:anywhere;background:var(--soft);border-radius:6px;
padding:.6rem;margin:.3rem 0;font:.8rem ui-monospace,SFMono-Regular,Menlo,monospace}
.pass{--c:var(--pass)}.fail{--c:var(--fail)}.inconclusive{--c:var(--inconclusive)}
.error{--c:var(--error)}.stale{--c:var(--stale)}.waived{--c:var(--waived)}
.attested{--c:var(--attested)}
@media (max-width:44rem){.item{grid-template-columns:1fr}.item .when{text-align:left}
dl{grid-template-columns:1fr}dt{margin-top:.4rem}}
@media print{:root{color-scheme:light}body{font-size:10pt}main{max-width:none;padding:0}
details{display:none}.item,.gate{break-inside:avoid}h2{break-after:avoid}
*{print-color-adjust:exact;-webkit-print-color-adjust:exact}}
"""


def to_html(report: Report) -> str:
    """The page as one self-contained file. Everything that was observed is escaped and bounded."""
    body = "\n".join([_head(report), *_gates(report), *_groups(report), *_approvals(report)])
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width,initial-scale=1">\n'
        '<meta http-equiv="Content-Security-Policy"'
        " content=\"default-src 'none';style-src 'unsafe-inline'\">\n"
        f"<title>{escape(report.release)} checklist</title>\n"
        f"<style>{_STYLE}</style></head>\n<body><main>\n{body}\n</main></body></html>\n"
    )


def _head(report: Report) -> str:
    facts = {
        "Digest": f"<code>{escape(report.digest)}</code>",
        "Owner": _text(report.owner) or "nobody is named",
        "Registered": f"{moment(report.registered_at)} by {_text(report.registered_by)}",
        "This page": moment(report.written_at),
    }
    listed = "".join(f"<dt>{name}</dt><dd>{value}</dd>" for name, value in facts.items())
    counts = "".join(
        f'<span class="v {escape(status)}">{count} {escape(status)}</span>'
        for status, count in report.counts.items()
        if count
    )
    return (
        f"<h1>{escape(report.release)}</h1><p>{_text(report.description)}</p>"
        f'<dl>{listed}</dl><div class="counts">{counts}</div>'
    )


def _gates(report: Report) -> list[str]:
    return [
        f'<div class="gate {_GATE_STATUS[gate.verdict].value}"><span class="v">'
        f"Gate to {escape(gate.stage.value)}: {escape(gate.verdict.value)}</span>"
        f"<p>{_text(gate.paragraph, 4 * MOST_EVIDENCE)}</p></div>"
        for gate in report.gates
    ]


def _groups(report: Report) -> list[str]:
    return [
        f"<section><h2>{escape(group)}</h2>{''.join(_item(line) for line in lines)}</section>"
        for group, lines in report.groups
    ]


def _item(line: ReportLine) -> str:
    by = f" <i>({_text(line.by)})</i>" if line.by else ""
    evidence = ""
    if line.evidence:
        shown = msgspec.json.format(msgspec.json.encode(line.evidence), indent=1).decode()
        if len(shown) > MOST_EVIDENCE:
            shown = f"{shown[:MOST_EVIDENCE]}\n… (the JSON report has all of it)"
        evidence = f"<details><summary>evidence</summary><pre>{escape(shown)}</pre></details>"
    return (
        f'<div class="item {line.status.value}"><span class="v">{line.status.value}</span>'
        f"<div><b>{_text(line.title)}</b> <code>{escape(line.id)}</code>"
        f"<div>{_text(line.observed)}{by}</div>"
        f'<div class="dim">Wanted: {_text(line.threshold)}</div>{evidence}</div>'
        f'<div class="when">{escape(when(line))}</div></div>'
    )


def _approvals(report: Report) -> list[str]:
    if not report.approvals:
        return []
    rows = "".join(
        f'<div class="item attested"><span class="v">approved</span>'
        f"<div><b>{_text(one.by)}</b> for {escape(one.stage)}<div>{_text(one.reason)}</div></div>"
        f'<div class="when">{moment(one.at)}</div></div>'
        for one in report.approvals
    )
    return [f"<section><h2>approvals</h2>{rows}</section>"]


def _text(text: str, most: int = 400) -> str:
    return escape(cut(text, most))
