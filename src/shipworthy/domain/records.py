"""What a gateway worker writes to its journal: one record for each request and each feedback.

Records are read for as long as journals exist, so fields are only ever added, with a default.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Literal

import msgspec

from shipworthy.domain.routing import ArmName

FeedbackKind = Literal["rating", "label", "reward", "correction", "preference", "outcome"]


class Outcome(StrEnum):
    """How an attempt ended, in the four classes that evidence is made of."""

    SUCCESS = "success"
    FAILURE = "failure"
    CLIENT_FAULT = "client_fault"
    CENSORED = "censored"


class InferenceRecord(
    msgspec.Struct, frozen=True, kw_only=True, tag="inference", omit_defaults=True
):
    """One request that reached a plan.

    `outcome` and `reason` are the first attempt's and belong to the `assigned` arm, whoever
    answered in the end (`serving`; None when nobody did). `unit` is a pseudonym. `at` is the Unix
    time of the answer; `seconds` the time from the request's last byte to it; `attempt_seconds`
    the first attempt's. `sent` is the Unix time at which the candidate was called, if it was.
    """

    id: str
    at: float
    plan: str
    model: str
    revision: int
    key: str
    assigned: ArmName
    probability: float
    outcome: Outcome
    status: int
    release: str
    rollout: str = ""
    unit: str | None = None
    serving: ArmName | Literal["fallback_message"] | None = None
    serving_release: str | None = None
    reason: str = ""
    seconds: float = 0.0
    attempt_seconds: float | None = None
    sent: float | None = None
    attempts: int = 1
    slices: dict[str, str] = {}
    traceparent: str | None = None
    request_bytes: int = 0
    response_bytes: int = 0
    request: bytes | None = None
    response: bytes | None = None


class FeedbackRecord(msgspec.Struct, frozen=True, kw_only=True, tag="feedback", omit_defaults=True):
    """What somebody said later about one inference. The newest of a unit's ratings counts.

    `assigned` is the inference's arm and `asked_at` its Unix time, both from its signed id.
    """

    id: str
    at: float
    inference: str
    key: str
    kind: FeedbackKind
    name: str
    value: float | str | bool | dict[str, object] | list[object] | None
    unit: str | None = None
    trusted: bool = False
    assigned: ArmName | None = None
    asked_at: float | None = None


Record = InferenceRecord | FeedbackRecord
