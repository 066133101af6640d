"""The page says everything, and nothing that was observed can change the page."""

import json
from html.parser import HTMLParser

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shipworthy.domain.checklist import ATTESTED_BY, ItemStatus
from shipworthy.domain.findings import Finding, Verdict
from shipworthy.domain.gates import judge
from shipworthy.domain.lifecycle import Approval, Release, StageFinding, Waiver
from shipworthy.domain.names import Stage
from shipworthy.domain.policy import StageGate
from shipworthy.release.catalogue import built_in
from shipworthy.release.page import to_html
from shipworthy.release.report import build_report, to_json, to_markdown

NOW = 1_700_000_000.0
EVIL = "<script>alert(1)</script><img src=x onerror=alert(1)>\n| a | `b` [x](javascript:y) \"'&"


def found(check, verdict=Verdict.PASS, observed="3 of 3 files", at=NOW - 60, **more):
    finding = Finding(
        check=check, verdict=verdict, observed=observed, threshold="all", at=at, **more
    )
    return StageFinding(release="sha256:a", stage=Stage.STAGING, finding=finding)


def page(findings=(), waivers=(), approvals=(), text="a classifier"):
    release = Release(
        model="digits", version=3, digest="sha256:a", created_at=NOW - 9_999, created_by="p1",
        manifest={"description": text, "owner": {"name": text, "email": "a@team.org"}},
    )  # fmt: skip
    gate = judge(
        Stage.PRODUCTION, StageGate(checks=("assets.stored",)), release=release, maker="p1",
        claims={}, findings=findings, approvals=(), waivers=waivers, checklist=built_in(),
        now=NOW, first=True,
    )  # fmt: skip
    return build_report(
        release, built_in(), findings=findings, approvals=approvals, waivers=waivers,
        gates=[gate], names={"p1": "Ann", "p2": "Ben"}, now=NOW,
    )  # fmt: skip


FULL = page(
    findings=[
        found("assets.stored", expires=NOW + 86_400, evidence={"bytes": 12}),
        found("assets.described", Verdict.FAIL, "no training data"),
        found("owner.contact", expires=NOW - 1),
        found("docs.card", evidence={ATTESTED_BY: "p2"}),
        found("auth.required", Verdict.ERROR, "no answer"),
    ],
    waivers=[Waiver(what="assets.described", by="p2", at=0, reason="old data", until=NOW + 9e4)],
    approvals=[Approval(release="sha256:a", stage=Stage.PRODUCTION, by="p2", at=NOW, reason="ok")],
)


def line(report, check):
    return next(one for _, lines in report.groups for one in lines if one.id == check)


def test_each_item_has_a_line_and_a_status() -> None:
    assert sum(len(lines) for _, lines in FULL.groups) == len(built_in().items)
    statuses = {
        "assets.stored": ItemStatus.PASS, "assets.described": ItemStatus.WAIVED,
        "owner.contact": ItemStatus.STALE, "docs.card": ItemStatus.ATTESTED,
        "auth.required": ItemStatus.ERROR, "parity.version": ItemStatus.INCONCLUSIVE,
    }  # fmt: skip
    assert {check: line(FULL, check).status for check in statuses} == statuses
    assert sum(FULL.counts.values()) == len(built_in().items)
    assert line(FULL, "assets.described").by.startswith("waived by Ben until 2023-11-15: old data")
    assert line(FULL, "docs.card").by == "attested by Ben"


def test_evidence_about_another_release_is_no_evidence() -> None:
    foreign = found("assets.stored")
    other = StageFinding(release="sha256:b", stage=Stage.STAGING, finding=foreign.finding)
    assert line(page([other]), "assets.stored").status is ItemStatus.INCONCLUSIVE


def test_the_newest_finding_is_shown() -> None:
    old = found("assets.stored", Verdict.FAIL, "broken", at=NOW - 900)
    assert line(page([found("assets.stored"), old]), "assets.stored").status is ItemStatus.PASS


SAID = (
    "digits@3", "sha256:a", "Ann", "waived", "attested", "stale", "2023-11-14 22:12 UTC",
    "old data", "3 of 3 files", "passes the gate", "approv", "not yet measured",
)  # fmt: skip


@pytest.mark.parametrize("write", [to_markdown, to_html])
def test_the_page_says_it_all(write) -> None:
    text = write(FULL)
    for said in SAID:
        assert said in text.replace("\\", ""), said


def test_json_is_the_whole_value() -> None:
    content = json.loads(to_json(FULL))
    assert content["release"] == "digits@3"
    assert content["gates"][0]["verdict"] == "pass"


class Reader(HTMLParser):
    """Collects tags and attributes, and that every tag is closed."""

    def __init__(self):
        super().__init__()
        self.tags, self.attributes, self.open = set(), set(), []

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}
        if tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


TAGS = {
    "html", "head", "meta", "title", "style", "body", "main", "h1", "h2", "p", "dl", "dt", "dd",
    "div", "span", "code", "section", "b", "i", "details", "summary", "pre",
}  # fmt: skip


@given(st.text(max_size=60) | st.just(EVIL))
def test_nothing_that_was_observed_becomes_markup(text) -> None:
    report = page(
        findings=[found("assets.stored", observed=text, evidence={text: [text]})],
        waivers=[Waiver(what="auth.required", by=text, at=0, reason=text)],
        approvals=[
            Approval(release="sha256:a", stage=Stage.PRODUCTION, by=text, at=NOW, reason=text)
        ],
        text=text,
    )
    reader = Reader()
    reader.feed(to_html(report))
    assert reader.tags <= TAGS
    assert reader.attributes <= {"lang", "charset", "name", "content", "http-equiv", "class"}
    assert not reader.open
    rows = [one for one in to_markdown(report).split("\n") if one.startswith("| ")]
    assert all(one.replace("\\|", "").count("|") == 6 for one in rows if not one.startswith("| |"))
    assert "<script" not in to_markdown(report).replace("\\<", "")


def test_the_page_is_bounded_and_fetches_nothing() -> None:
    huge = page([found("assets.stored", observed="x" * 10**6, evidence={"all": "y" * 10**6})])
    assert len(to_html(huge)) < 100_000
    assert len(to_markdown(huge)) < 100_000
    html = to_html(FULL)
    for fetches in ("<script", "<link", "url(", "@import", "<img", "src=", "href="):
        assert fetches not in html
    assert "default-src 'none'" in html


def test_times_beyond_the_calendar_do_not_break_the_page() -> None:
    assert to_html(page([found("assets.stored", expires=1e300)]))
