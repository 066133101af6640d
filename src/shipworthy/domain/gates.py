"""Whether a release may enter a stage: every condition of the gate, judged on evidence.

A gate passes only when something was observed and nothing is bad or unknown. What was measured and
is bad fails; what was not measured (missing, expired, undecided, in error) holds. Without any
condition, or with every condition waived, nothing was observed, so it holds too.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from difflib import get_close_matches
from enum import StrEnum
from typing import assert_never

import msgspec

from shipworthy.domain.checklist import Checklist, ChecklistItem, ItemStatus, status_of
from shipworthy.domain.findings import Finding
from shipworthy.domain.lifecycle import FOUR_EYES, Approval, Release, StageFinding, Waiver
from shipworthy.domain.manifest import Metric
from shipworthy.domain.names import Stage
from shipworthy.domain.policy import Confirm, Promotion, Rule, StageGate
from shipworthy.domain.statistics.intervals import Interval, normal_interval, wilson_interval
from shipworthy.errors import UsageError

Claims = Mapping[str, Mapping[str, Metric]]
"""The metrics that a release claims, by suite and name."""

_MOST_ITEMS = 10_000_000
"""No more items than this are suggested for deciding a rule."""
_NO_NAMES: Mapping[str, str] = {}


class GateVerdict(StrEnum):
    """What a gate says: `hold` is not a no, it is a lack of evidence."""

    PASS = "pass"  # noqa: S105  # a verdict, not a password
    FAIL = "fail"
    HOLD = "hold"


class GateItem(msgspec.Struct, frozen=True, kw_only=True):
    """One condition and how it stands; `cure` is empty when nothing is to be done."""

    what: str
    verdict: ItemStatus
    observed: str
    threshold: str
    explanation: str
    cure: str = ""


class GateJudgement(msgspec.Struct, frozen=True, kw_only=True):
    """The whole judgement; `paragraph` says it to a person, numbers and cures included."""

    stage: Stage
    release: str
    verdict: GateVerdict
    items: tuple[GateItem, ...]
    paragraph: str

    @property
    def passed(self) -> bool:
        """Whether the release may go on."""
        return self.verdict is GateVerdict.PASS


def judge(  # noqa: PLR0913  # each is a different kind of evidence
    stage: Stage,
    gate: StageGate,
    *,
    release: Release,
    maker: str,
    claims: Claims,
    findings: Iterable[StageFinding],
    approvals: Iterable[Approval],
    waivers: Iterable[Waiver],
    checklist: Checklist,
    now: float,
    first: bool,
    names: Mapping[str, str] = _NO_NAMES,
) -> GateJudgement:
    """Judge whether a release may enter a stage.

    Args:
        stage: The stage to enter.
        gate: What the policy asks for.
        release: The release; evidence about any other is ignored.
        maker: The id of the principal who made it, whose approval does not count.
        claims: The metrics that rules are judged on.
        findings: What probes observed, at any stage.
        approvals: What people said, for any stage.
        waivers: Conditions set aside: check ids, metrics, and `four-eyes`.
        checklist: What the names in `gate.checks` mean, and when each can be known.
        now: Unix time in seconds; evidence past its age is stale.
        first: Whether nothing is in production yet: `next` items then don't apply.
        names: People's names by principal id, for the explanations.

    """
    facts = _Facts(
        release=release,
        findings=tuple(one for one in findings if one.release == release.digest),
        waivers=tuple(one for one in waivers if _in_force(one, release.model, now)),
        checklist=checklist,
        now=now,
        names=names,
    )
    items = list(_checks(gate.checks, stage, facts, first=first))
    items += [_rule(rule, claims, facts) for rule in gate.rules]
    if gate.approvals:
        counted = _counted(approvals, release.digest, stage, maker, now - gate.approval_max_age)
        items.append(_approvals(gate.approvals, counted, facts))
    return _conclude(stage, f"promotion.{stage.value}", items, facts)


def judge_confirmation(
    confirm: Confirm,
    *,
    release: Release,
    findings: Iterable[StageFinding],
    waivers: Iterable[Waiver],
    checklist: Checklist,
    now: float,
    first: bool,
) -> GateJudgement:
    """Judge, after the move to production, whether the release has arrived.

    `first` says that nothing was in production before it. Arguments are those of `judge`.
    """
    facts = _Facts(
        release=release,
        findings=tuple(one for one in findings if one.release == release.digest),
        waivers=tuple(one for one in waivers if _in_force(one, release.model, now)),
        checklist=checklist,
        now=now,
        names=_NO_NAMES,
        confirming=True,
    )
    items = list(_checks(confirm.checks, Stage.PRODUCTION, facts, first=first))
    return _conclude(Stage.PRODUCTION, "promotion.confirm", items, facts)


def unmeetable(promotion: Promotion, checklist: Checklist) -> list[str]:
    """What a policy asks for that can't exist by then, one sentence each; empty when all can."""
    asked = [
        (f"promotion.{stage.value}", name, item, item.observed_at(stage))
        for stage in (Stage.STAGING, Stage.PRODUCTION)
        for name in promotion.gate(stage).checks
        for item in _meant(name, checklist)
    ]
    asked += [
        ("promotion.confirm", name, item, item.confirmed_at())
        for name in promotion.confirm.checks
        for item in _meant(name, checklist)
    ]
    every = [*promotion.staging.checks, *promotion.production.checks, *promotion.confirm.checks]
    possible = {(where, name) for where, name, _, stages in asked if stages}
    return checklist.unknown(dict.fromkeys(every)) + [
        f"{name} can't be known at {where}; move it to where it can be, or take it out"
        for where, name in dict.fromkeys((where, name) for where, name, _, _ in asked)
        if (where, name) not in possible
    ]


def _meant(name: str, checklist: Checklist) -> tuple[ChecklistItem, ...]:
    return () if checklist.unknown([name]) else checklist.select(name)


class _Facts(msgspec.Struct, frozen=True, kw_only=True):
    """What every condition is judged on."""

    release: Release
    findings: tuple[StageFinding, ...]
    waivers: tuple[Waiver, ...]
    checklist: Checklist
    now: float
    names: Mapping[str, str]
    confirming: bool = False

    def name(self, principal: str) -> str:
        return self.names.get(principal, principal)

    def waiver(self, what: str) -> Waiver | None:
        return next((one for one in self.waivers if one.what == what), None)

    def stages(self, item: ChecklistItem, entering: Stage) -> frozenset[Stage]:
        return item.confirmed_at() if self.confirming else item.observed_at(entering)


def _in_force(waiver: Waiver, model: str, now: float) -> bool:
    return waiver.model in {None, model} and (waiver.until is None or now < waiver.until)


# --- checks ---------------------------------------------------------------------------------------


def _checks(
    names: Sequence[str], stage: Stage, facts: _Facts, *, first: bool
) -> Iterator[GateItem]:
    seen: set[str] = set()
    for name in names:
        try:
            selected = facts.checklist.select(name)
        except UsageError as error:
            yield _unusable(
                name, str(error), "correct the name in the policy, or extend the checklist"
            )
            continue
        possible = [item for item in selected if facts.stages(item, stage)]
        if not possible:
            yield _unusable(
                name, f"{name} can't be known at this point", f"take {name} out of this gate"
            )
        for item in possible:
            if item.id not in seen and not (first and item.next):
                seen.add(item.id)
                yield _check(item, facts.stages(item, stage), facts)


def _unusable(what: str, explanation: str, cure: str) -> GateItem:
    return GateItem(
        what=what,
        verdict=ItemStatus.ERROR,
        observed="nothing",
        threshold="a condition that can be met",
        explanation=explanation,
        cure=cure,
    )


def _check(item: ChecklistItem, stages: frozenset[Stage], facts: _Facts) -> GateItem:
    found = [
        one.finding
        for one in facts.findings
        if one.finding.check == item.id and one.stage in stages
    ]
    newest = max(found, key=lambda finding: finding.at, default=None)
    status = status_of(newest, facts.now)
    judged = GateItem(
        what=item.id,
        verdict=status,
        observed=newest.observed if newest else "not yet measured",
        threshold=newest.threshold if newest else item.title,
        explanation=_told(item, newest, status, facts),
        cure=_cure(status, stages, facts),
    )
    return _unless_waived(judged, facts)


def _told(item: ChecklistItem, finding: Finding | None, status: ItemStatus, facts: _Facts) -> str:
    if finding is None:
        return f"{item.id} is not yet measured"
    seen = f"{finding.observed} (wanted: {finding.threshold})"
    match status:
        case ItemStatus.STALE:
            expired = facts.now - (finding.expires or facts.now)
            return (
                f"{item.id} is stale: its finding expired {_duration(expired)} ago; it was {seen}"
            )
        case ItemStatus.ERROR:
            return f"{item.id} could not be measured: {finding.observed}"
        case ItemStatus.INCONCLUSIVE:
            return f"{item.id} is undecided: {seen}"
        case ItemStatus.FAIL:
            return f"{item.id} fails: {seen}"
        case ItemStatus.ATTESTED:
            return f"{item.id} is attested: {finding.observed}"
        case ItemStatus.PASS | ItemStatus.WAIVED:
            return f"{item.id} passes: {finding.observed}"
        case _:
            assert_never(status)


def _cure(status: ItemStatus, stages: frozenset[Stage], facts: _Facts) -> str:
    if not status.holds:
        return ""
    where = next(one for one in reversed(Stage) if one in stages)
    run = f"run 'shipworthy check {facts.release.name} --stage {where.value}'"
    return (
        f"correct it and register a new release, or {run} again"
        if status is ItemStatus.FAIL
        else run
    )


def _unless_waived(item: GateItem, facts: _Facts) -> GateItem:
    """Mark what would stop the release as waived, when somebody set it aside."""
    waiver = facts.waiver(item.what) if item.verdict.holds else None
    if waiver is None:
        return item
    return msgspec.structs.replace(
        item,
        verdict=ItemStatus.WAIVED,
        explanation=f"{item.explanation}; {_waived(waiver, facts)}",
        cure="",
    )


def _waived(waiver: Waiver, facts: _Facts) -> str:
    left = "standing" if waiver.until is None else f"for {_duration(waiver.until - facts.now)} more"
    return f"waived by {facts.name(waiver.by)}, {left}: {waiver.reason}"


# --- rules ----------------------------------------------------------------------------------------


def _rule(rule: Rule, claims: Claims, facts: _Facts) -> GateItem:
    flat = {
        f"{suite}.{name}": one for suite, metrics in claims.items() for name, one in metrics.items()
    }
    limit = (
        f"at least {rule.at_least:g}" if rule.at_least is not None else f"at most {rule.at_most:g}"
    )
    metric = flat.get(rule.metric)
    if metric is None:
        judged = _unclaimed(rule.metric, limit, flat)
    else:
        judged = _bounded(rule, metric, limit)
    return _unless_waived(judged, facts)


def _unclaimed(name: str, limit: str, claimed: Mapping[str, Metric]) -> GateItem:
    close = get_close_matches(name, list(claimed), n=1)
    known = (
        f"claimed metrics are {', '.join(sorted(claimed))}" if claimed else "it claims no metric"
    )
    nearest = f"; nearest is {close[0]}" if close else ""
    return GateItem(
        what=name,
        verdict=ItemStatus.ERROR,
        observed="not claimed",
        threshold=limit,
        explanation=f"the release does not claim {name}: {known}{nearest}",
        cure="correct the rule, or give the metric in release.yaml and register a new version",
    )


def _bounded(rule: Rule, metric: Metric, limit: str) -> GateItem:
    n = f", n = {metric.n:,}" if metric.n else ""
    interval = _interval(metric)
    if interval is None:
        return GateItem(
            what=rule.metric,
            verdict=ItemStatus.INCONCLUSIVE,
            observed=f"{metric.value:g} without an interval",
            threshold=limit,
            explanation=f"{rule.metric} is {metric.value:g}, but nothing says how certain that is",
            cure="give its n if it is a proportion, else its std_error, and register a new version",
        )
    status = _within(rule, interval)
    observed = f"{metric.value:.4g}, 95% interval {interval.low:.4g} to {interval.high:.4g}{n}"
    end, edge = ("lower", interval.low) if rule.at_least is not None else ("upper", interval.high)
    if status is ItemStatus.FAIL:
        end, edge = ("upper", interval.high) if end == "lower" else ("lower", interval.low)
    told = {
        ItemStatus.PASS: f"{rule.metric} passes: its {end} bound {edge:.4g} is {limit}",
        ItemStatus.FAIL: f"{rule.metric} fails: even its {end} bound {edge:.4g} is not {limit}",
    }.get(status, f"{rule.metric} is undecided: its {end} bound {edge:.4g} is not {limit}")
    cure = {ItemStatus.PASS: "", ItemStatus.FAIL: "improve the model and register a new version"}
    return GateItem(
        what=rule.metric,
        verdict=status,
        observed=observed,
        threshold=limit,
        explanation=f"{told} ({observed})",
        cure=cure.get(status) or ("" if status is ItemStatus.PASS else _what_decides(rule, metric)),
    )


def _interval(metric: Metric) -> Interval | None:
    """None when the claim says nothing of its certainty; an error of 0 says nothing either."""
    if metric.std_error:
        return normal_interval(metric.value, metric.std_error)
    if metric.n is not None and 0.0 <= metric.value <= 1.0:
        return wilson_interval(metric.value, metric.n)
    return None


def _within(rule: Rule, interval: Interval) -> ItemStatus:
    if rule.at_least is not None:
        good, bad = interval.low >= rule.at_least, interval.high < rule.at_least
    else:
        limit = rule.at_most if rule.at_most is not None else -math.inf
        good, bad = interval.high <= limit, interval.low > limit
    if good:
        return ItemStatus.PASS
    return ItemStatus.FAIL if bad else ItemStatus.INCONCLUSIVE


def _what_decides(rule: Rule, metric: Metric) -> str:
    """How much more evidence would roughly decide, should the value stay as it is."""
    for magnitude in range(200):
        factor = 1.1**magnitude
        if metric.std_error:
            grown = metric.model_copy(update={"std_error": metric.std_error / math.sqrt(factor)})
        else:
            grown = metric.model_copy(update={"n": math.ceil((metric.n or 1) * factor)})
        interval = _interval(grown)
        if (grown.n or 0) > _MOST_ITEMS:
            break
        if interval and _within(rule, interval) is not ItemStatus.INCONCLUSIVE:
            return _measure_on(metric, grown, factor)
    return "it is too close to its limit to be told from it; improve the model or correct the rule"


def _measure_on(metric: Metric, grown: Metric, factor: float) -> str:
    if not metric.std_error:
        return (
            f"measure on about {_round_up(grown.n or 1):,} items, which would decide at this value"
        )
    if metric.n:
        n = _round_up(math.ceil(metric.n * factor))
        return f"measure on about {n:,} items, which would decide at this value"
    return f"measure until its std_error is about {grown.std_error:.2g}, which would decide"


def _round_up(n: int) -> int:
    """To two digits: the number is a rough one."""
    unit = 10 ** max(0, len(str(n)) - 2)
    return math.ceil(n / unit) * unit


# --- approvals ------------------------------------------------------------------------------------


def _counted(
    approvals: Iterable[Approval], release: str, stage: Stage, maker: str, since: float
) -> dict[str, Approval | None]:
    """The newest approval of each person other than the maker; None when it is too old."""
    newest: dict[str, Approval] = {}
    for one in approvals:
        if one.release == release and one.stage is stage and one.by != maker:
            before = newest.get(one.by)
            newest[one.by] = one if before is None or one.at > before.at else before
    return {by: one if one.at >= since else None for by, one in newest.items()}


def _approvals(needed: int, counted: Mapping[str, Approval | None], facts: _Facts) -> GateItem:
    valid = [one for one in counted.values() if one is not None]
    expired = [facts.name(by) for by, one in counted.items() if one is None]
    told = [f"{facts.name(one.by)}, {_duration(facts.now - one.at)} ago" for one in valid]
    waiver = facts.waiver(FOUR_EYES) if len(valid) < needed else None
    seats = len(valid) + (1 if waiver else 0)
    if waiver:
        told.append(f"the maker, four eyes being {_waived(waiver, facts)}")
    missing = needed - seats
    verdict = ItemStatus.WAIVED if waiver else ItemStatus.ATTESTED
    late = f"; expired: {', '.join(expired)}" if expired else ""
    by = f" ({'; '.join(told)})" if told else ""
    return GateItem(
        what="approvals",
        verdict=verdict if missing <= 0 else ItemStatus.INCONCLUSIVE,
        observed=f"{seats} of {needed}",
        threshold=f"{needed} by people other than the maker",
        explanation=f"{seats} of {needed} approvals are given{by}{late}",
        cure=f"ask {_people(missing)} other than the maker to run"
        f" 'shipworthy approve {facts.release.name}'"
        if missing > 0
        else "",
    )


def _people(count: int) -> str:
    return "one person" if count == 1 else f"{count} people"


# --- conclusion -----------------------------------------------------------------------------------


def _conclude(stage: Stage, where: str, items: list[GateItem], facts: _Facts) -> GateJudgement:
    if not items or all(item.verdict is ItemStatus.WAIVED for item in items):
        items.append(_nothing_observed(where, waived=bool(items)))
    failed = [item for item in items if item.verdict is ItemStatus.FAIL]
    unknown = [item for item in items if item.verdict.holds and item not in failed]
    if failed:
        verdict, opening = GateVerdict.FAIL, f"does not pass the gate {where}"
    elif unknown:
        verdict, opening = GateVerdict.HOLD, f"is held by the gate {where}"
    else:
        verdict, opening = GateVerdict.PASS, f"passes the gate {where}"
    sentences = [_sentence(item) for item in [*failed, *unknown]]
    fine = [item for item in items if not item.verdict.holds]
    if fine:
        sentences.append(_summary(fine))
    return GateJudgement(
        stage=stage,
        release=facts.release.name,
        verdict=verdict,
        items=tuple(items),
        paragraph=f"{facts.release.name} {opening}: {' '.join(sentences)}",
    )


def _nothing_observed(where: str, *, waived: bool) -> GateItem:
    why = "every condition is waived" if waived else "the gate has no conditions"
    return GateItem(
        what="conditions",
        verdict=ItemStatus.INCONCLUSIVE,
        observed="nothing",
        threshold="at least one condition that is met",
        explanation=f"{why}, so nothing was observed",
        cure=f"name checks, rules or approvals under {where} in the policy",
    )


def _sentence(item: GateItem) -> str:
    cure = f"; {item.cure}" if item.cure else ""
    return f"{item.explanation}{cure}."


def _summary(fine: list[GateItem]) -> str:
    plain = [item for item in fine if item.verdict is ItemStatus.PASS]
    told = [_sentence(item) for item in fine if item not in plain]
    if plain:
        count = "one condition is met" if len(plain) == 1 else f"{len(plain)} conditions are met"
        told.insert(0, f"{count} ({'; '.join(f'{item.what}: {item.observed}' for item in plain)}).")
    return " ".join(told)


def _duration(seconds: float) -> str:
    for unit, size in (("days", 86_400.0), ("hours", 3_600.0), ("minutes", 60.0)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{max(0.0, seconds):.0f} seconds"
