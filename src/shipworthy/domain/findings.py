"""What a check observed. `fail` is measured bad; `error` and `inconclusive` are not measured."""

from __future__ import annotations

from enum import StrEnum
from typing import Any

import msgspec


class Verdict(StrEnum):
    """How one look ended."""

    PASS = "pass"  # noqa: S105  # a verdict, not a password
    FAIL = "fail"
    INCONCLUSIVE = "inconclusive"
    ERROR = "error"


class Finding(msgspec.Struct, frozen=True, kw_only=True):
    """One check's result on one release.

    `at` and `expires` are Unix seconds; an expired finding is stale and counts as not measured.
    `evidence` holds what was looked at: digests, counts, addresses, sample answers.
    """

    check: str
    verdict: Verdict
    observed: str
    threshold: str
    at: float
    expires: float | None = None
    evidence: dict[str, Any] = {}

    def stale(self, now: float) -> bool:
        """Whether the evidence has expired."""
        return self.expires is not None and now >= self.expires
