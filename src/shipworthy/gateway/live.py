"""Plans made ready to be obeyed, and what outlives a change of plan: endpoints and breakers."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from functools import cached_property
from typing import Any, TypeVar
from urllib.parse import quote

from shipworthy.domain.contract import Protocol
from shipworthy.domain.plan import Arm, Endpoint, Plan, Snapshot
from shipworthy.domain.redaction import Redactor
from shipworthy.domain.routing import ArmName
from shipworthy.gateway.credentials import resolve
from shipworthy.gateway.options import GatewayOptions
from shipworthy.gateway.shield import Breaker, Budget, Gate
from shipworthy.gateway.upstream import EndpointState, Speech
from shipworthy.protocols.mlflow import Scoring
from shipworthy.protocols.oip import ContractChecker

_T = TypeVar("_T")
_HEDGE_BURST = 10


class LiveArm:
    """An arm with its checker, its endpoints' state and the gate in front of them."""

    def __init__(
        self,
        name: ArmName,
        arm: Arm,
        endpoints: tuple[EndpointState, ...],
        gate: Gate,
        speech: Speech,
    ) -> None:
        self.name: ArmName = name
        self.arm = arm
        self.checker = ContractChecker(arm.contract)
        self.endpoints = endpoints
        self.gate = gate
        self.infer_path = f"/v2/models/{quote(arm.served_model, safe='')}/infer"
        self.speech = speech
        self.repeatable = arm.contract.side_effects == "none"
        self.headers = [
            (b"x-shipworthy-release", arm.release.encode()),
            (b"x-shipworthy-digest", arm.digest.encode()),
        ]
        self.lines = b"".join(b"%s: %s\r\n" % header for header in self.headers)

    @cached_property
    def scoring(self) -> Scoring:
        """The contract, made ready for MLflow's scoring."""
        return Scoring(self.arm.contract)

    @property
    def ready(self) -> bool:
        """Whether an endpoint is there that is not set aside."""
        return any(not endpoint.ejected for endpoint in self.endpoints)


class LivePlan:
    """A plan with everything that obeying it needs.

    `breaker` guards the candidate; `fallbacks` and `retries` bound extra attempts; `turn` counts
    attempts, so that equal endpoints take turns.
    """

    def __init__(  # noqa: PLR0913  # all that a plan is obeyed with
        self,
        plan: Plan,
        stable: LiveArm,
        candidate: LiveArm | None,
        mirror: LiveArm | None,
        *,
        redactor: Redactor,
        breaker: Breaker,
        fallbacks: Budget,
        retries: Budget,
        hedges: Budget,
    ) -> None:
        self.plan = plan
        self.stable = stable
        self.candidate = candidate
        self.mirror = mirror
        self.redactor = redactor
        self.same_contract = candidate is None or candidate.arm.contract == stable.arm.contract
        self.breaker = breaker
        self.fallbacks = fallbacks
        self.retries = retries
        self.hedges = hedges
        self.turn = 0

    def arm(self, name: ArmName) -> LiveArm:
        """The arm of that name; a plan without a candidate has only stable."""
        return self.candidate if name == "candidate" and self.candidate else self.stable

    def pinned(self, version: str) -> LiveArm | None:
        """The arm that runs this version now, if one does."""
        for arm in (self.stable, self.candidate):
            if arm is not None and str(arm.arm.version) == version:
                return arm
        return None


class Fleet:
    """All live plans.

    A new snapshot replaces them; what they share by name is carried over, so that a change of plan
    closes no breaker, resets no budget and readmits no endpoint.
    """

    def __init__(self, options: GatewayOptions) -> None:
        self.plans: Mapping[str, LivePlan] = {}
        self._options = options
        self._kept: dict[Hashable, Any] = {}
        self._next: dict[Hashable, Any] = {}

    def obey(self, snapshot: Snapshot) -> None:
        """Put a snapshot's plans in force; calls under way finish by the plan they began with."""
        self._next = {}
        self.plans = {name: self._live(plan) for name, plan in snapshot.plans.items()}
        for name, gone in self._kept.items():
            if name not in self._next and isinstance(gone, EndpointState):
                gone.pool.close()
        self._kept = self._next

    def _live(self, plan: Plan) -> LivePlan:
        name, shield = plan.name, plan.shield
        tried = plan.candidate.digest if plan.candidate else ""
        broken = (shield.breaker_window, shield.breaker_failures, shield.breaker_seconds)
        back = (shield.fallback_ratio, shield.fallback_burst)
        again = (shield.retry_ratio, shield.retry_burst)
        redaction = (plan.capture.redact, plan.capture.redact_fields)
        twice = (plan.hedge.ratio if plan.hedge else 0.0, _HEDGE_BURST)
        return LivePlan(
            plan,
            self._arm(plan, "stable", plan.stable),
            plan.candidate and self._arm(plan, "candidate", plan.candidate),
            plan.mirror and self._arm(plan, "candidate", plan.mirror.arm),
            redactor=self._keep(("redactor", *redaction), lambda: Redactor(*redaction)),
            breaker=self._keep(
                ("breaker", name, plan.rollout, tried, broken), lambda: Breaker(*broken)
            ),
            fallbacks=self._keep(("fallbacks", name, back), lambda: Budget(*back)),
            retries=self._keep(("retries", name, again), lambda: Budget(*again)),
            hedges=self._keep(("hedges", name, twice), lambda: Budget(*twice)),
        )

    def _arm(self, plan: Plan, name: ArmName, arm: Arm) -> LiveArm:
        protocol = arm.contract.protocol
        endpoints = tuple(self._endpoint(endpoint, protocol) for endpoint in arm.endpoints)
        limit = self._options.max_in_flight
        if endpoints and all(endpoint.most is not None for endpoint in endpoints):
            limit = min(limit, sum(endpoint.most or 0 for endpoint in endpoints))
        gate = self._keep(
            ("gate", plan.name, arm.digest, limit), lambda: Gate(limit, self._options.max_queued)
        )
        speech = self._keep(("speech", arm.digest), Speech)
        return LiveArm(name, arm, endpoints, gate, speech)

    def _endpoint(self, endpoint: Endpoint, protocol: Protocol) -> EndpointState:
        secret = resolve(endpoint.credential)
        return self._keep(
            ("endpoint", endpoint.url, secret, protocol, endpoint.concurrency),
            lambda: EndpointState(
                endpoint.url,
                secret,
                self._options,
                protocol=protocol,
                concurrency=endpoint.concurrency,
            ),
        )

    def endpoints(self) -> dict[str, int]:
        """How many endpoints are in use, and how many are set aside."""
        states = [kept.ejected for kept in self._kept.values() if isinstance(kept, EndpointState)]
        return {"in_use": states.count(False), "set_aside": states.count(True)}

    def sweep(self, now: float) -> None:
        """Close connections that nobody has used for a while; `now` is the loop's time."""
        for kept in self._kept.values():
            if isinstance(kept, EndpointState):
                kept.pool.sweep(now)

    def _keep(self, name: Hashable, make: Callable[[], _T]) -> _T:
        if name not in self._next:
            self._next[name] = self._kept[name] if name in self._kept else make()
        return self._next[name]
