"""What the gateway obeys: one plan for each name that clients call, and the keys that may call it.

These records are the snapshot file's content, so they hold no secret: keys as hashes, credentials
as references. Weights are in basis points (1/10,000), the unit in which a lane is cut.
"""

from __future__ import annotations

import hashlib
from typing import Any, Literal

import msgspec

from shipworthy.domain.contract import Contract

BUCKETS = 10_000
"""A split is cut in this many buckets; a weight of 500 is 5%."""

SNAPSHOT_FORMAT = 1

Role = Literal["client", "trusted", "admin"]
"""`client` calls models; `trusted` may also send feedback on anybody's inferences; `admin` may
call every plan, those before production included."""


class Endpoint(msgspec.Struct, frozen=True, kw_only=True):
    """One server of a release; `credential` is a reference such as `env:UPSTREAM_KEY`.

    `concurrency` bounds the calls under way to it, over all workers of a host.
    """

    url: str
    credential: str | None = None
    concurrency: int | None = None


class Behaviour(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What a prompt release adds to each request for a language model.

    `system` goes before the client's messages, or before the prompt of a completion.
    `chat_template` is passed to the server, for those that take one. `tools` are offered unless the
    client brings its own. `sampling` holds request fields such as `temperature`: with `pinned` they
    replace what the client sends, else they fill in what it leaves out.
    """

    system: str | None = None
    chat_template: str | None = None
    tools: tuple[dict[str, Any], ...] = ()
    tool_choice: str | dict[str, Any] | None = None
    sampling: dict[str, Any] = {}
    pinned: bool = False


class Price(msgspec.Struct, frozen=True, kw_only=True):
    """What a call costs, in the team's currency: for each thousand tokens, and for each call."""

    per_1k_input: float = 0.0
    per_1k_output: float = 0.0
    per_call: float = 0.0

    def of(self, input_tokens: float, output_tokens: float) -> float:
        """The cost of one call."""
        tokens = input_tokens * self.per_1k_input + output_tokens * self.per_1k_output
        return self.per_call + tokens / 1000


class Arm(msgspec.Struct, frozen=True, kw_only=True):
    """A release as the gateway reaches it. `served_model` is its name on its own endpoints."""

    release: str
    digest: str
    version: int
    endpoints: tuple[Endpoint, ...]
    served_model: str
    contract: Contract
    behaviour: Behaviour | None = None
    price: Price | None = None


class Deadlines(msgspec.Struct, frozen=True, kw_only=True):
    """Upper limits in seconds.

    `connect` and `attempt` are for one attempt at one endpoint, `total` for the whole request; of
    a stream they count up to its first content. After that `idle` bounds the silence between two
    events, and `stream` the whole of it.
    """

    connect: float = 1.0
    attempt: float = 5.0
    total: float = 15.0
    idle: float = 30.0
    stream: float = 3600.0


class Limits(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What a key or a model may use on this host; None is without limit.

    Requests and tokens (in and out) are per minute, `concurrency` counts calls under way,
    `budget_per_day` is money, counted from midnight UTC.
    """

    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    concurrency: int | None = None
    budget_per_day: float | None = None


class Hedge(msgspec.Struct, frozen=True, kw_only=True):
    """A second attempt elsewhere when the first has said nothing for `after` seconds.

    Only where asking twice changes nothing; `ratio` bounds them per request.
    """

    after: float
    ratio: float = 0.05


class Mirror(msgspec.Struct, frozen=True, kw_only=True):
    """A release that sees a copy of some requests, and whose answers nobody gets.

    `share` of the requests is copied, at most `concurrency` at a time in a worker; `budget_per_day`
    bounds what they may cost on this host.
    """

    arm: Arm
    share: float
    concurrency: int = 8
    budget_per_day: float | None = None


class Shield(msgspec.Struct, frozen=True, kw_only=True):
    """How far the gateway goes to answer in spite of a failing upstream.

    `fallback_ratio`: fallbacks to stable allowed per candidate request, beyond a burst of
    `fallback_burst`. `retry_ratio`, `retry_burst`: the same for retries on another endpoint.
    `breaker_window`, `breaker_failures`: a worker stops calling a candidate that failed this many
    of its last attempts, and tries it again after `breaker_seconds`.
    """

    fallback_ratio: float = 1.0
    fallback_burst: int = 100
    retry_ratio: float = 0.1
    retry_burst: int = 10
    breaker_window: int = 20
    breaker_failures: int = 10
    breaker_seconds: float = 5.0


class Capture(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What is written of a request: its metadata, and as `payloads` says its bodies too.

    With `sampled`, bodies of a `sample` of the requests are kept. They are cut at `max_bytes` each.
    `redact` names the patterns whose finds are replaced before anything is written, and
    `redact_fields` the fields of the bodies that are. `features` says whether the numbers that
    drift is looked for in are written too.
    """

    payloads: Literal["none", "sampled", "full"] = "none"
    max_bytes: int = 16_384
    sample: float = 1.0
    redact: tuple[str, ...] = ()
    redact_fields: tuple[str, ...] = ()
    features: bool = True


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """How requests for one name are answered.

    `rollout` is the rollout's id and the seed of its split; empty when nothing is being rolled out.
    `weight` is the candidate's, in basis points. `lease` is the Unix time up to which a plan with a
    candidate may be obeyed, `lease_seconds` for how long it is given; past it the gateway sends
    everything to stable. `revision` grows with
    every change; `fence` is the number of the keeper's term that wrote it.
    """

    name: str
    model: str
    revision: int
    fence: int
    stable: Arm
    candidate: Arm | None = None
    weight: int = 0
    rollout: str = ""
    lease: float | None = None
    lease_seconds: float = 15.0
    deadlines: Deadlines = Deadlines()
    shield: Shield = Shield()
    capture: Capture = Capture()
    fallback_message: str | None = None
    limits: Limits = Limits()
    hedge: Hedge | None = None
    mirror: Mirror | None = None


class Key(msgspec.Struct, frozen=True, kw_only=True):
    """A gateway key. `models` names the plans that it may call; `*` is every production model."""

    id: str
    hash: str
    role: Role
    models: tuple[str, ...] = ("*",)
    expires: float | None = None
    limits: Limits = Limits()

    def may_call(self, name: str) -> bool:
        """Whether this key opens the plan of that name."""
        if self.role == "admin" or name in self.models:
            return True
        return "*" in self.models and "@" not in name


class Snapshot(msgspec.Struct, frozen=True, kw_only=True):
    """All that a gateway worker knows.

    `max_stale` bounds in seconds how long keys are honoured when no keeper refreshes `written`;
    None means for as long as it takes.
    """

    written: float
    plans: dict[str, Plan]
    keys: dict[str, Key]
    max_stale: float | None = None
    format: int = SNAPSHOT_FORMAT
    fence: int = 0


_encoder = msgspec.json.Encoder()
_decoder = msgspec.json.Decoder(Snapshot)


def encode_snapshot(snapshot: Snapshot) -> bytes:
    """One line with the SHA-256 of the rest, then the snapshot as JSON."""
    body = _encoder.encode(snapshot)
    return hashlib.sha256(body).hexdigest().encode() + b"\n" + body


def decode_snapshot(content: bytes) -> Snapshot:
    """The snapshot, or ValueError when it is torn, altered or of a format that we can't read."""
    checksum, _, body = content.partition(b"\n")
    if hashlib.sha256(body).hexdigest().encode() != checksum:
        message = "the snapshot's checksum does not match its content"
        raise ValueError(message)
    snapshot = _decoder.decode(body)
    if snapshot.format != SNAPSHOT_FORMAT:
        message = f"the snapshot has format {snapshot.format}; this worker reads {SNAPSHOT_FORMAT}"
        raise ValueError(message)
    return snapshot
