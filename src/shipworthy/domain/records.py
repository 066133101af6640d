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

    `protocol` is the client's, `operation` what it asked for. Tokens are the server's count, or
    ours where it gave none (`tokens_estimated`). Of a stream, `first_content_seconds` is the time
    to the first content, `gap_seconds` the mean and `longest_gap_seconds` the longest time between
    two pieces of it. `finish` is why a language model ended. `features` are numbers and words in
    which drift is looked for. A body that is cut has its SHA-256 in `request_digest` or
    `response_digest`; `redacted` counts what was replaced in both.
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
    protocol: Literal["oip-v2", "mlflow", "openai"] = "oip-v2"
    operation: str = "infer"
    stream: bool = False
    input_tokens: int | None = None
    output_tokens: int | None = None
    cached_tokens: int | None = None
    tokens_estimated: bool = False
    cost: float | None = None
    first_content_seconds: float | None = None
    gap_seconds: float | None = None
    longest_gap_seconds: float | None = None
    finish: str = ""
    features: dict[str, float | str] = {}
    request_digest: str | None = None
    response_digest: str | None = None
    redacted: int = 0


class MirrorRecord(msgspec.Struct, frozen=True, kw_only=True, tag="mirror", omit_defaults=True):
    """What a mirrored release made of a copy of one request, whose answer nobody got.

    `agrees` is whether it says the same as the answer that the client got, None where they can't be
    compared; `difference` is the first field in which they differ. `request` is in the record of
    the `inference`, whose Unix time is `asked_at`, from its id.
    """

    id: str
    at: float
    inference: str
    plan: str
    model: str
    release: str
    compared_with: str | None = None
    outcome: Outcome
    reason: str = ""
    status: int = 0
    seconds: float = 0.0
    agrees: bool | None = None
    difference: str = ""
    input_tokens: int | None = None
    output_tokens: int | None = None
    cost: float | None = None
    response_bytes: int = 0
    response: bytes | None = None
    response_digest: str | None = None
    unit: str | None = None
    redacted: int = 0
    asked_at: float | None = None


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


Record = InferenceRecord | FeedbackRecord | MirrorRecord
