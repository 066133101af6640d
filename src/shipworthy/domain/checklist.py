"""The checklist as data: what must be observed about a release, when, and how each item stands.

The items come from a catalogue file that teams extend; their observations come from probes. An item
without a probe is an item not measured, so it can never be ticked by anyone's good intentions.
"""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches
from enum import StrEnum
from typing import Self

from pydantic import Field, PrivateAttr, field_validator, model_validator

from shipworthy.domain.findings import Finding, Verdict
from shipworthy.domain.manifest import Document
from shipworthy.domain.names import Stage
from shipworthy.errors import UsageError

ATTESTED_BY = "attested_by"
"""The key in a finding's evidence that names the person or endpoint whose word it is."""


class Moment(StrEnum):
    """When an item can be known."""

    REGISTRATION = "R"
    STAGING = "S"
    PRODUCTION = "P"
    CONFIRM = "C"
    LIVE = "L"


class ItemStatus(StrEnum):
    """How an item stands; only `fail` was measured bad, the three after it were not measured."""

    PASS = "pass"  # noqa: S105  # a status, not a password
    FAIL = "fail"
    INCONCLUSIVE = "inconclusive"
    ERROR = "error"
    STALE = "stale"
    WAIVED = "waived"
    ATTESTED = "attested"

    @property
    def measured(self) -> bool:
        """Whether there is evidence, good or bad, or a person's word."""
        return self in {self.PASS, self.FAIL, self.ATTESTED}

    @property
    def holds(self) -> bool:
        """Whether a gate may not pass because of it."""
        return self in {self.FAIL, self.INCONCLUSIVE, self.ERROR, self.STALE}


class ChecklistItem(Document):
    """One item: its name, when it can be known, and what its probe must observe.

    `next` items compare with an earlier release, so a first release is judged without them.
    """

    id: str = Field(pattern=r"^[a-z0-9-]+\.[a-z0-9-]+$")
    group: str = Field(pattern=r"^[a-z0-9-]+$")
    when: tuple[Moment, ...] = Field(min_length=1)
    next: bool = False
    title: str = Field(min_length=1, max_length=120)
    observes: str = Field(min_length=1, max_length=600)

    @field_validator("when")
    @classmethod
    def _once(cls, when: tuple[Moment, ...]) -> tuple[Moment, ...]:
        if len(set(when)) < len(when):
            message = "names a moment twice"
            raise ValueError(message)
        return when

    @property
    def family(self) -> str:
        """The id up to its dot: `assets` of `assets.stored`."""
        return self.id.partition(".")[0]

    def observed_at(self, entering: Stage) -> frozenset[Stage]:
        """The stages at which a finding counts when the release is to enter `entering`.

        What is known at registration stays true of the same bytes, so a later look counts too.
        Empty when the item can't be known by then.
        """
        if entering is Stage.DEVELOPMENT:
            return frozenset()
        early = {Moment.REGISTRATION, Moment.STAGING} & set(self.when)
        if entering is Stage.STAGING:
            return frozenset({Stage.DEVELOPMENT}) if early else frozenset()
        stages = {Stage.STAGING} if early or Moment.PRODUCTION in self.when else set[Stage]()
        return frozenset(stages | ({Stage.DEVELOPMENT} if early else set()))

    def confirmed_at(self) -> frozenset[Stage]:
        """The stages at which a finding counts after the move; empty for other items."""
        return frozenset({Stage.PRODUCTION}) if Moment.CONFIRM in self.when else frozenset()


class Checklist(Document):
    """A catalogue of items, looked up by id or by group."""

    items: tuple[ChecklistItem, ...]
    _by_id: dict[str, ChecklistItem] = PrivateAttr(default_factory=dict[str, ChecklistItem])

    @model_validator(mode="after")
    def _unique(self) -> Self:
        for item in self.items:
            if item.id in self._by_id:
                message = f"{item.id!r} is listed twice; keep one"
                raise ValueError(message)
            self._by_id[item.id] = item
        return self

    def get(self, id: str) -> ChecklistItem:  # it is an id
        """The item of that id; UsageError with the nearest one when there is none."""
        if id not in self._by_id:
            raise UsageError(f"there is no check {id!r}; {_nearest(id, self._by_id)}")
        return self._by_id[id]

    def select(self, name: str) -> tuple[ChecklistItem, ...]:
        """The items that a policy means by `name`.

        An id means itself; a group, or what ids have before their dot, means all of these. Raises
        UsageError with the nearest name for anything else.
        """
        if name in self._by_id:
            return (self._by_id[name],)
        found = tuple(item for item in self.items if item.group == name)
        found = found or tuple(item for item in self.items if item.family == name)
        if not found:
            raise UsageError(f"there is no check or group {name!r}; {_nearest(name, self.names())}")
        return found

    def names(self) -> tuple[str, ...]:
        """Every id, group and family, each once."""
        ids = [item.id for item in self.items]
        groups = [item.group for item in self.items]
        families = [item.family for item in self.items]
        return tuple(dict.fromkeys([*groups, *families, *ids]))

    def unknown(self, names: Iterable[str]) -> list[str]:
        """One sentence for each name that means nothing here; empty when all do."""
        problems: list[str] = []
        for name in names:
            try:
                self.select(name)
            except UsageError as error:
                problems.append(str(error))
        return problems

    def extended(self, more: Checklist) -> Checklist:
        """This catalogue with a team's own items; one of the same id takes the place of ours."""
        theirs = {item.id: item for item in more.items}
        kept = [theirs.pop(item.id, item) for item in self.items]
        return Checklist(items=(*kept, *theirs.values()))


def _nearest(name: str, known: Iterable[str]) -> str:
    names = list(known)
    close = get_close_matches(name, names, n=1, cutoff=0.5)
    groups = dict.fromkeys(name.partition(".")[0] for name in names)
    return f"did you mean {close[0]!r}?" if close else f"there are {', '.join(groups)}"


def status_of(finding: Finding | None, now: float) -> ItemStatus:
    """How an item with that finding stands at `now` (Unix seconds)."""
    if finding is None:
        return ItemStatus.INCONCLUSIVE
    if finding.stale(now):
        return ItemStatus.STALE
    if finding.verdict is Verdict.PASS and finding.evidence.get(ATTESTED_BY):
        return ItemStatus.ATTESTED
    return ItemStatus(finding.verdict.value)
