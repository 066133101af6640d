"""Which door a request knocks at, with which key, and who answers there."""

from __future__ import annotations

import hmac
import logging
import re
from collections.abc import Callable
from functools import partial
from typing import Final

from shipworthy import __version__
from shipworthy.domain.contract import Operation
from shipworthy.domain.keys import hash_key, key_id
from shipworthy.domain.plan import Key, Snapshot
from shipworthy.gateway.access_log import plain_line
from shipworthy.gateway.connection import Connections
from shipworthy.gateway.dialects import (
    LanguageAsk,
    ScoringAsk,
    TensorAsk,
    language_error,
    scoring_error,
)
from shipworthy.gateway.feedback import FeedbackDoor
from shipworthy.gateway.http import CLOSE, RETRY, Answer, Handler, Refusal, Request, plain_error
from shipworthy.gateway.inference import InferenceDoor
from shipworthy.gateway.live import LiveArm, LivePlan
from shipworthy.gateway.metrics import CONTENT_TYPE
from shipworthy.gateway.parts import Parts
from shipworthy.protocols import oip, openai
from shipworthy.protocols.messages import InvalidMessage

_log = logging.getLogger("shipworthy.gateway")
_access = logging.getLogger("shipworthy.gateway.access")

_TENSORS: Final = re.compile(
    r"/v2/models/(?P<name>[^/]+)(?:/versions/(?P<version>[^/]+))?(?P<rest>/ready|/infer)?"
)
_SCORING: Final = re.compile(r"/models/(?P<name>[^/]+)/invocations")
_LANGUAGE: Final[dict[str, Operation]] = {
    "/v1/chat/completions": "chat",
    "/v1/completions": "completions",
    "/v1/embeddings": "embeddings",
}
_MODELS: Final = "/v1/models"
_FEEDBACK: Final = "/v1/feedback"
_NO_KEY: Final = "0" * 64
_UNAUTHENTICATED: Final = (
    "no valid key; send `Authorization: Bearer sw_…` with a key that exists,"
    " is not revoked and has not expired"
)
_MAX_KEY: Final = 512
_MAX_KNOWN: Final = 10_000


class Application:
    """Routes requests by their heads.

    `draining` is set while the worker ends: it is not ready any more. `connections` is set by
    whoever accepts them.
    """

    def __init__(self, parts: Parts) -> None:
        self.draining = False
        self.connections: Connections | None = None
        self._options = parts.options
        self._follower = parts.follower
        self._fleet = parts.fleet
        self._metrics = parts.metrics
        self._clock = parts.outside.clock
        self._monotonic = parts.outside.monotonic
        self._inference = InferenceDoor(parts)
        self._feedback = FeedbackDoor(parts)
        # Keys that this snapshot's hashes have let in, by what was sent: hashing costs more than
        # all else at the door. A dictionary compares by a keyed hash first, so nobody can feel
        # their way to a key through its time.
        self._known: dict[bytes, Key] = {}
        self._known_by: Snapshot | None = None
        self._faults: set[tuple[str, int]] = set()
        self._open_doors: dict[str, Callable[[], Answer]] = {
            "/healthz": _liveness,
            "/v2/health/live": _liveness,
            "/readyz": self._readiness,
            "/v2/health/ready": self._readiness,
            "/metrics": self._exposition,
        }

    def open(self, request: Request) -> Answer | Handler:
        """Decide by the head; nothing that a client sends raises out of here."""
        try:
            opened = self._route(request)
        except Refusal as refusal:
            opened = refusal.answer(request.shape)
        return self._logged(request, opened) if isinstance(opened, Answer) else opened

    def _logged(self, request: Request, answer: Answer) -> Answer:
        """The answer to a request that reaches no plan, with its line in the log."""
        if self._options.access_log:
            _access.info(
                plain_line(self._clock(), 0.0, request.method, request.path, answer.status)
            )
        return answer

    def failed(self, fault: Exception) -> Answer:
        """Count a fault of ours, or tell what was refused; the client gets an answer, whatever."""
        if isinstance(fault, Refusal):
            return fault.answer()
        self._note_fault(fault)
        return Answer(500, plain_error(500, "the gateway has a fault; it is in its log"), [CLOSE])

    def _route(self, request: Request) -> Answer | Handler:
        path = request.path
        operation = _LANGUAGE.get(path)
        if operation is not None or (path.startswith("/v1/") and path != _FEEDBACK):
            request.shape = language_error
        elif path.startswith("/models/"):
            request.shape = scoring_error
        opened = self._open_doors.get(path)
        if opened is not None:
            _only(request, "GET", "HEAD")
            return opened()
        key = self._authenticate(request)
        if operation is not None:
            _only(request, "POST")
            request.limit = self._options.max_body
            return partial(self._ask_language, key=key, operation=operation)
        tensors = _TENSORS.fullmatch(path)
        if tensors is not None:
            return self._tensors(request, key, tensors)
        scoring = _SCORING.fullmatch(path)
        if scoring is not None:
            _only(request, "POST")
            request.limit = self._options.max_body
            return partial(self._score, key=key, live=self._plan(scoring["name"], key))
        if path == _FEEDBACK:
            _only(request, "POST")
            request.limit = self._options.max_feedback
            return partial(self._take_feedback, key=key)
        return self._document(request, key)

    def _document(self, request: Request, key: Key) -> Answer:
        """What can be read besides the models that take tensors."""
        path = request.path
        if path == _MODELS or path.startswith(_MODELS + "/"):
            _only(request, "GET", "HEAD")
            return self._models(key, path.removeprefix(_MODELS)[1:])
        if path == "/v2":
            _only(request, "GET", "HEAD")
            return Answer(200, oip.server_metadata("shipworthy", __version__))
        raise Refusal(404, "there is nothing here; models are under /v2/models/ and /v1/")

    # --- doors ------------------------------------------------------------------------------

    async def _ask_language(
        self, request: Request, *, key: Key, operation: Operation
    ) -> Answer | None:
        """OpenAI's doors: which model is meant stands in the body."""
        try:
            if request.problem is not None:
                raise request.problem
            ask = LanguageAsk(operation, request.body)
            live = self._plan(ask.said.model, key)
        except InvalidMessage as problem:
            return self._logged(request, Refusal(400, str(problem)).answer(request.shape))
        except Refusal as refusal:
            return self._logged(request, refusal.answer(request.shape))
        return await self._inference.infer(request, key, live, None, lambda _: ask)

    def _tensors(self, request: Request, key: Key, match: re.Match[str]) -> Answer | Handler:
        live = self._plan(match["name"], key)
        pinned = self._pinned(live, key, match["version"])
        if match["rest"] == "/infer":
            _only(request, "POST")
            request.limit = self._options.max_body
            return partial(self._infer, key=key, live=live, pinned=pinned)
        _only(request, "GET", "HEAD")
        name = live.plan.name
        arm = pinned or live.stable
        if match["rest"] == "/ready":
            return Answer(200 if arm.ready else 503, oip.model_ready(name, ready=arm.ready))
        arms = [pinned] if pinned else [live.stable, *filter(None, [live.candidate])]
        if key.role == "client":
            arms = [live.stable]  # who is being tried out is nobody's business
        versions = [str(one.arm.version) for one in arms]
        document = oip.model_metadata(
            name, arm.arm.contract, versions=versions, platform="shipworthy"
        )
        return Answer(200, document, arm.headers)

    async def _infer(
        self, request: Request, *, key: Key, live: LivePlan, pinned: LiveArm | None
    ) -> Answer | None:
        return await self._inference.infer(request, key, live, pinned, TensorAsk)

    async def _score(self, request: Request, *, key: Key, live: LivePlan) -> Answer | None:
        return await self._inference.infer(
            request, key, live, None, partial(ScoringAsk, public=live.stable)
        )

    async def _take_feedback(self, request: Request, *, key: Key) -> Answer:
        try:
            answer = self._feedback.take(request, key)
        except Refusal as refusal:
            answer = refusal.answer(request.shape)
        return self._logged(request, answer)

    def _models(self, key: Key, name: str) -> Answer:
        """`GET /v1/models`: those that the key may call; or one of them."""
        if name:
            live = self._plan(name, key)
            return Answer(200, openai.model_document(*_described(live)))
        callable_ = [live for live in self._fleet.plans.values() if key.may_call(live.plan.name)]
        return Answer(200, openai.models_list(map(_described, callable_)))

    def close(self) -> None:
        """Give up what nobody waits for."""
        self._inference.close()

    # --- who may ----------------------------------------------------------------------------

    def _authenticate(self, request: Request) -> Key:
        """The key that was sent; 401 in the same words whatever is wrong with it."""
        if not self._follower.keys_honoured():
            raise Refusal(
                503, "the gateway has no keys fresh enough to tell who may call", headers=[RETRY]
            )
        raw = request.headers.get(b"authorization", b"")
        snapshot = self._follower.current
        if snapshot is not self._known_by:
            self._known_by = snapshot
            self._known.clear()
        known = self._known.get(raw)
        if known is not None and (known.expires is None or self._clock() < known.expires):
            return known
        key = self._identify(raw, snapshot)
        if len(self._known) < _MAX_KNOWN and len(raw) <= _MAX_KEY:  # it may hold many spaces
            self._known[raw] = key
        return key

    def _identify(self, raw: bytes, snapshot: Snapshot | None) -> Key:
        scheme, _, credentials = raw.partition(b" ")
        text = credentials.strip().decode("latin-1")
        name = key_id(text) if scheme.lower() == b"bearer" and len(text) <= _MAX_KEY else None
        key = snapshot.keys.get(name) if snapshot and name else None
        same = hmac.compare_digest(hash_key(text), key.hash if key else _NO_KEY)
        if key is None or not same or (key.expires is not None and self._clock() >= key.expires):
            self._metrics.denied.labels("unauthenticated").inc()
            raise Refusal(401, _UNAUTHENTICATED, headers=[(b"www-authenticate", b"Bearer")])
        return key

    def _plan(self, name: str, key: Key) -> LivePlan:
        """The plan, if the key opens it; else 403, also for names that don't exist."""
        if not key.may_call(name):
            self._metrics.denied.labels("other_model").inc()
            raise Refusal(
                403,
                f"the key {key.id} may not call {name[:80]!r};"
                " ask its owner for a key that names this model",
            )
        live = self._fleet.plans.get(name)
        if live is None:
            raise Refusal(404, f"there is no model {name[:80]!r} here; look at its name and stage")
        return live

    def _pinned(self, live: LivePlan, key: Key, version: str | None) -> LiveArm | None:
        if version is None:
            return None
        if key.role == "client":
            self._metrics.denied.labels("pinned_version").inc()
            raise Refusal(
                403,
                f"the key {key.id} may not choose a version; call {live.plan.name} without one,"
                " or use a trusted key",
            )
        arm = live.pinned(version)
        if arm is None:
            raise Refusal(
                404, f"{live.plan.name} does not run version {version[:20]!r} now; see its versions"
            )
        return arm

    # --- state ------------------------------------------------------------------------------

    def _readiness(self) -> Answer:
        ready = not self.draining and self._follower.keys_honoured()
        return Answer(200 if ready else 503, oip.server_ready(ready=ready))

    def _exposition(self) -> Answer:
        self._metrics.snapshot_age.set(self._follower.age())
        self._metrics.connections.set(len(self.connections.open) if self.connections else 0)
        return Answer(200, self._metrics.exposition(), content_type=CONTENT_TYPE)

    def _note_fault(self, fault: Exception) -> None:
        """Count it; log it with its traceback the first time that it comes from there."""
        self._metrics.errors.inc()
        trace = fault.__traceback__
        while trace is not None and trace.tb_next is not None:
            trace = trace.tb_next
        where = (trace.tb_frame.f_code.co_filename, trace.tb_lineno) if trace else ("", 0)
        if where not in self._faults:
            self._faults.add(where)
            _log.error("unhandled fault; further ones like it are only counted", exc_info=fault)


def _liveness() -> Answer:
    return Answer(200, oip.server_live(live=True))


def _described(live: LivePlan) -> tuple[str, int, str]:
    return live.plan.name, 0, "shipworthy"


def _only(request: Request, *methods: str) -> None:
    if request.method not in methods:
        allow = ", ".join(methods)
        raise Refusal(405, f"use {allow} here", headers=[(b"allow", allow.encode())])
