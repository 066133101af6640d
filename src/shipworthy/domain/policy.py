"""`policy.yaml`: what must hold for a model to be promoted, to stay, and to be rolled back."""

from __future__ import annotations

import re
from itertools import pairwise
from typing import Annotated, Any, Literal, Self, cast

from pydantic import BeforeValidator, Field, field_validator, model_validator

from shipworthy.domain.canonical import digest_of
from shipworthy.domain.manifest import Document, ModelName, matching
from shipworthy.domain.names import Stage
from shipworthy.errors import UsageError

_DURATION = re.compile(r"(\d+(?:\.\d+)?)\s*(ms|s|m|h|d)")
_SECONDS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86_400.0}
_PERCENT = re.compile(r"(\d+(?:\.\d+)?)\s*%")


def _seconds(value: Any) -> Any:
    if isinstance(value, str):
        match = _DURATION.fullmatch(value.strip())
        if not match:
            message = "is not a duration; write for example 30s, 5m, 2h or 7d"
            raise ValueError(message)
        return float(match[1]) * _SECONDS[match[2]]
    return value


def read_duration(text: str) -> float:
    """Seconds, from text such as `30s`, `5m`, `2h` or `7d`; UsageError when it is none of these."""
    try:
        return float(_seconds(text))
    except ValueError as error:
        message = f"{text!r} {error}"
        raise UsageError(message) from error


def _fraction(value: Any) -> Any:
    if isinstance(value, str):
        match = _PERCENT.fullmatch(value.strip())
        if not match:
            message = "is not a share; write for example 5% or 0.05"
            raise ValueError(message)
        return float(match[1]) / 100
    return value


Duration = Annotated[float, BeforeValidator(_seconds), Field(ge=0)]
"""Seconds; a file may say `30s`, `5m`, `2h`, `7d`."""
Fraction = Annotated[float, BeforeValidator(_fraction), Field(ge=0, le=1)]
"""A share between 0 and 1; a file may say `5%`."""


class Rule(Document):
    """A bound on a metric that the release claims, judged on its confidence interval.

    `metric` is `suite.name`. With `at_least` the interval's lower end must reach it, with `at_most`
    its upper end must stay below.
    """

    metric: Annotated[
        str,
        matching(
            r"[A-Za-z0-9][\w-]*\.[A-Za-z0-9][\w.-]*", "suite.metric, such as heldout.accuracy"
        ),
    ]
    at_least: float | None = None
    at_most: float | None = None

    @model_validator(mode="after")
    def _bounded(self) -> Self:
        if (self.at_least is None) == (self.at_most is None):
            message = "has no condition, or two; give exactly one of at_least and at_most"
            raise ValueError(message)
        return self


class StageGate(Document):
    """What must hold to enter a stage: checks by id or group, rules, and approvals by people.

    `approvals` counts persons other than the release's maker.
    """

    checks: tuple[str, ...] = ()
    rules: tuple[Rule, ...] = ()
    approvals: Annotated[int, Field(ge=0, le=10)] = 0
    approval_max_age: Duration = 14 * 86_400.0


class Confirm(Document):
    """What is observed after the move."""

    checks: tuple[str, ...] = ()


class Promotion(Document):
    """The gates, stage by stage."""

    staging: StageGate = StageGate()
    production: StageGate = StageGate()
    confirm: Confirm = Confirm()

    def gate(self, stage: Stage) -> StageGate:
        """The gate to enter `stage`; development has none."""
        gates = {Stage.STAGING: self.staging, Stage.PRODUCTION: self.production}
        return gates.get(stage, StageGate())


class CanaryStep(Document):
    """One step: the candidate's share, and the least that must be seen before the next."""

    weight: Annotated[float, BeforeValidator(_fraction), Field(gt=0, le=0.95)]
    requests: Annotated[int, Field(ge=1)] = 100
    units: Annotated[int, Field(ge=0)] = 0
    duration: Duration = 0.0


class RolloutPolicy(Document):
    """How production traffic moves to a candidate.

    `margin`: the candidate may fail this much more often than stable (absolute) and still go up.
    `alpha`: the risk, per step, of going up with a candidate that is worse by more than that.
    `step_limit`: undecided for this long, the rollout holds and says so.
    `keep_warm`: how long the old deployment stays up for an instant way back.
    """

    strategy: Literal["canary"] = "canary"
    steps: tuple[CanaryStep, ...] = (
        CanaryStep(weight=0.05),
        CanaryStep(weight=0.25),
        CanaryStep(weight=0.5),
    )
    margin: Annotated[float, BeforeValidator(_fraction), Field(gt=0, lt=1)] = 0.01
    alpha: Annotated[float, Field(gt=0, lt=0.5)] = 0.05
    step_limit: Duration = 86_400.0
    ready_limit: Duration = 600.0
    keep_warm: Duration = 3600.0
    lease: Annotated[float, BeforeValidator(_seconds), Field(ge=2, le=3600)] = 15.0

    @model_validator(mode="after")
    def _growing(self) -> Self:
        weights = [step.weight for step in self.steps]
        if not weights or any(b <= a for a, b in pairwise(weights)):
            message = "steps must not be empty and each weight must be above the one before"
            raise ValueError(message)
        if max(step.duration for step in self.steps) >= self.step_limit:
            message = "step_limit must be above each step's duration, else every rollout is held"
            raise ValueError(message)
        return self


class Breaker(Document):
    """Rolls back before any statistics when this many of the last candidate units failed."""

    window: Annotated[int, Field(ge=5, le=1000)] = 20
    failures: Annotated[int, Field(ge=1, le=1000)] = 10

    @model_validator(mode="after")
    def _reachable(self) -> Self:
        if self.failures > self.window:
            message = f"failures ({self.failures}) can't exceed window ({self.window})"
            raise ValueError(message)
        return self


class RollbackPolicy(Document):
    """When a candidate is thrown out.

    `alpha`: the chance, over a whole rollout, of throwing out one that is no worse.
    `harm_floor`: a difference in failure rate below this never counts, however certain.
    """

    alpha: Annotated[float, Field(gt=0, lt=0.5)] = 0.01
    harm_floor: Fraction = 0.001
    breaker: Breaker = Breaker()


Redaction = Literal["email", "phone", "card", "iban", "ip", "secret"]
"""Patterns of personal data and secrets that can be replaced in what is kept."""


class CapturePolicy(Document):
    """What the journal keeps of requests and answers beyond their metadata.

    `payloads: sampled` keeps the bodies of a `sample` of the requests. What the patterns of
    `redact` find, and what is in `redact_fields` (`messages.content`, `inputs.age`), is replaced
    before anything is written. `features`: whether the numbers that drift is looked for in are kept
    too.
    """

    payloads: Literal["none", "sampled", "full"] = "none"
    sample: Annotated[float, BeforeValidator(_fraction), Field(gt=0, le=1)] = 0.1
    max_bytes: Annotated[int, Field(ge=0, le=1_048_576)] = 16_384
    redact: tuple[Redaction, ...] = ()
    redact_fields: tuple[Annotated[str, Field(min_length=1, max_length=200)], ...] = ()
    features: bool = True


class DeadlinePolicy(Document):
    """Upper limits for one attempt at an endpoint, and for the whole request up to its answer.

    Absent, an attempt has 5 s and the whole 15 s, or 60 s and 120 s for a language model. Of a
    stream these count up to its first content; then `idle` bounds the silence between two pieces,
    and `stream` the whole of it.
    """

    connect: Annotated[float, BeforeValidator(_seconds), Field(gt=0, le=60)] = 1.0
    attempt: Annotated[float, BeforeValidator(_seconds), Field(gt=0, le=3600)] | None = None
    total: Annotated[float, BeforeValidator(_seconds), Field(gt=0, le=3600)] | None = None
    idle: Annotated[float, BeforeValidator(_seconds), Field(gt=0, le=3600)] = 30.0
    stream: Annotated[float, BeforeValidator(_seconds), Field(gt=0, le=86_400)] = 3600.0


class LimitsPolicy(Document):
    """What all clients together may use of the model on one host; absent is without limit.

    Tokens in and out count. The budget is money, in the currency of the releases' `cost`, from
    midnight UTC.
    """

    requests_per_minute: Annotated[int, Field(ge=1)] | None = None
    tokens_per_minute: Annotated[int, Field(ge=1)] | None = None
    concurrency: Annotated[int, Field(ge=1)] | None = None
    budget_per_day: Annotated[float, Field(gt=0)] | None = None


class HedgePolicy(Document):
    """Ask a second endpoint when the first has not answered `after` so long.

    Only for releases without side effects; `ratio` bounds how many requests are asked twice.
    """

    after: Annotated[float, BeforeValidator(_seconds), Field(gt=0, le=60)]
    ratio: Annotated[float, BeforeValidator(_fraction), Field(gt=0, le=1)] = 0.05


class MirrorPolicy(Document):
    """Send a copy of production requests to another release, whose answers nobody gets.

    `to` is a stage that holds one (`staging`), or a release that runs somewhere (`digits@4`). It
    must declare `side_effects: none`.
    """

    to: Annotated[str, Field(min_length=1)]
    share: Annotated[float, BeforeValidator(_fraction), Field(gt=0, le=1)] = 0.1
    concurrency: Annotated[int, Field(ge=1, le=1000)] = 8
    budget_per_day: Annotated[float, Field(gt=0)] | None = None


class Risk(Document):
    """A feared problem: what would show it, what watches for that, what is done then."""

    problem: str
    metric: str
    monitor: str
    action: str


class Policy(Document):
    """One model's policy, complete."""

    model: ModelName
    preset: str = "standard"
    north_star: str | None = None
    risks: tuple[Risk, ...] = ()
    promotion: Promotion = Promotion()
    rollout: RolloutPolicy = RolloutPolicy()
    rollback: RollbackPolicy = RollbackPolicy()
    capture: CapturePolicy = CapturePolicy()
    deadlines: DeadlinePolicy = DeadlinePolicy()
    limits: LimitsPolicy = LimitsPolicy()
    hedge: HedgePolicy | None = None
    mirror: MirrorPolicy | None = None
    fallback_message: str | None = None

    @field_validator("preset")
    @classmethod
    def _known_preset(cls, name: str) -> str:
        if name not in PRESETS:
            message = f"must be one of {', '.join(PRESETS)}"
            raise ValueError(message)
        return name

    def nowhere(self) -> str:
        """Why its copies can never go anywhere; empty when they can.

        Asked of a policy that is to be put in force: one that was stays readable, whatever it says.
        """
        if self.mirror is None:
            return ""
        to = self.mirror.to
        if to == Stage.PRODUCTION:
            return "mirror.to is production, where the requests come from; name another stage"
        model, _, version = to.rpartition("@")
        if to in set(Stage) or (model == self.model and version.isdecimal()):
            return ""
        return (
            f"mirror.to must be staging, development or a release of {self.model}, such as"
            f" {self.model}@4; it is {to!r}"
        )

    def digest(self) -> str:
        """`sha256:…` over the whole policy, presets filled in."""
        return digest_of(self.model_dump(mode="json"))


_REGISTRATION = ("assets.stored", "assets.described", "owner.contact", "contract.declared")
_STAGING = (*_REGISTRATION, "assets.final-format")
_PRODUCTION = (
    "assets.stored",
    "contract.enforced",
    "contract.compatible",
    "parity.version",
    "auth.required",
    "rollback.restorable",
)
_CONFIRM = ("answers.returned", "traffic.moved", "parity.version")

PRESETS: dict[str, dict[str, Any]] = {
    "prototype": {
        "promotion": {
            "staging": {"checks": ["assets.stored"]},
            "production": {"checks": ["assets.stored", "auth.required"]},
            "confirm": {"checks": ["answers.returned"]},
        },
        "rollout": {
            "steps": [{"weight": 0.1, "requests": 50}, {"weight": 0.5, "requests": 50}],
            "margin": 0.05,
            "keep_warm": "15m",
        },
    },
    "standard": {
        "promotion": {
            "staging": {"checks": list(_STAGING)},
            "production": {"checks": list(_PRODUCTION), "approvals": 1},
            "confirm": {"checks": list(_CONFIRM)},
        },
    },
    "critical": {
        "promotion": {
            "staging": {"checks": list(_STAGING)},
            "production": {"checks": list(_PRODUCTION), "approvals": 2},
            "confirm": {"checks": list(_CONFIRM)},
        },
        "rollout": {
            "steps": [
                {"weight": 0.01, "requests": 300, "units": 50, "duration": "10m"},
                {"weight": 0.05, "requests": 500, "units": 100, "duration": "30m"},
                {"weight": 0.25, "requests": 1000, "units": 200, "duration": "1h"},
                {"weight": 0.5, "requests": 2000, "units": 500, "duration": "1h"},
            ],
            "margin": 0.005,
            "keep_warm": "1d",
        },
    },
}
"""How strict to be, for a start; a policy file changes whatever it names."""


def with_preset(document: dict[str, Any]) -> dict[str, Any]:
    """The document laid over its preset, section by section; lists replace lists."""
    base = PRESETS.get(str(document.get("preset", "standard")), {})
    return _overlay(base, document)


def _overlay(base: dict[str, Any], top: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in top.items():
        below = merged.get(key)
        if isinstance(below, dict) and isinstance(value, dict):
            merged[key] = _overlay(cast("dict[str, Any]", below), cast("dict[str, Any]", value))
        else:
            merged[key] = value
    return merged
