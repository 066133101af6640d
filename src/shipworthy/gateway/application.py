"""The gateway as an ASGI application: which door, with which key."""

from __future__ import annotations

import asyncio
import hmac
import logging
import re
import time
from collections.abc import Awaitable, Callable
from typing import Any, Final

import msgspec

from shipworthy import __version__
from shipworthy.domain.keys import hash_key, key_id
from shipworthy.domain.plan import Key
from shipworthy.gateway.feedback import FeedbackDoor
from shipworthy.gateway.http import (
    CLOSE,
    RETRY,
    Answer,
    ClientGone,
    Receive,
    Refusal,
    Request,
    Scope,
    Send,
    send_answer,
)
from shipworthy.gateway.inference import InferenceDoor
from shipworthy.gateway.live import LiveArm, LivePlan
from shipworthy.gateway.metrics import CONTENT_TYPE
from shipworthy.gateway.parts import Parts
from shipworthy.protocols import oip

_log = logging.getLogger("shipworthy.gateway")
_access = logging.getLogger("shipworthy.gateway.access")

_MODEL: Final = re.compile(
    r"/v2/models/(?P<name>[^/]+)(?:/versions/(?P<version>[^/]+))?(?P<rest>/ready|/infer)?"
)
_NO_KEY: Final = "0" * 64
_UNAUTHENTICATED: Final = (
    "no valid key; send `Authorization: Bearer sw_…` with a key that exists,"
    " is not revoked and has not expired"
)
_MAX_KEY: Final = 512


class Application:
    """Routes requests.

    `draining` is set while the worker ends: it is not ready any more. `connections` counts the open
    ones, for the metrics.
    """

    def __init__(self, parts: Parts, *, connections: Callable[[], int]) -> None:
        self.draining = False
        self._follower = parts.follower
        self._fleet = parts.fleet
        self._metrics = parts.metrics
        self._clock = parts.outside.clock
        self._access_log = parts.options.access_log
        self._connections = connections
        self._inference = InferenceDoor(parts)
        self._feedback = FeedbackDoor(parts)
        self._faults: set[tuple[str, int]] = set()
        self._open_doors: dict[str, Callable[[], Answer]] = {
            "/healthz": _liveness,
            "/v2/health/live": _liveness,
            "/readyz": self._readiness,
            "/v2/health/ready": self._readiness,
            "/metrics": self._exposition,
        }

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request; nothing that a client sends raises out of here."""
        if scope["type"] != "http":
            return
        began = time.monotonic() if self._access_log else 0.0
        request = Request(scope, receive)
        try:
            answer = await self._answer(request)
            if self._access_log:
                self._log_access(request, answer, time.monotonic() - began)
            await send_answer(send, answer, close=request.leaves_body())
        except ClientGone:
            return
        except asyncio.CancelledError:
            if request.gone():
                return
            await send_answer(send, _ending())

    async def _answer(self, request: Request) -> Answer:
        try:
            return await self._route(request)
        except Refusal as refusal:
            return refusal.answer()
        except ClientGone:
            raise
        except Exception as fault:  # noqa: BLE001  # the client gets an answer, whatever it is
            self._note_fault(fault)
            return Answer(500, oip.error_body("the gateway has a fault; it is in its log"), [CLOSE])

    def _route(self, request: Request) -> Awaitable[Answer]:
        path = request.path
        opened = self._open_doors.get(path)
        if opened is not None:
            _only(request, "GET", "HEAD")
            return _done(opened())
        key = self._authenticate(request)
        model = _MODEL.fullmatch(path)
        if model is not None:
            return self._model(request, key, model)
        if path == "/v1/feedback":
            _only(request, "POST")
            return self._feedback.take(request, key)
        if path == "/v2":
            _only(request, "GET", "HEAD")
            return _done(Answer(200, oip.server_metadata("shipworthy", __version__)))
        raise Refusal(404, "there is nothing here; models are under /v2/models/")

    def _model(self, request: Request, key: Key, match: re.Match[str]) -> Awaitable[Answer]:
        live = self._plan(match["name"], key)
        pinned = self._pinned(live, key, match["version"])
        if match["rest"] == "/infer":
            _only(request, "POST")
            return self._inference.infer(request, key, live, pinned)
        _only(request, "GET", "HEAD")
        name = live.plan.name
        arm = pinned or live.stable
        if match["rest"] == "/ready":
            return _done(Answer(200 if arm.ready else 503, oip.model_ready(name, ready=arm.ready)))
        arms = [pinned] if pinned else [live.stable, *filter(None, [live.candidate])]
        if key.role == "client":
            arms = [live.stable]  # who is being tried out is nobody's business
        versions = [str(one.arm.version) for one in arms]
        document = oip.model_metadata(
            name, arm.arm.contract, versions=versions, platform="shipworthy"
        )
        return _done(Answer(200, document, arm.headers))

    def _authenticate(self, request: Request) -> Key:
        """The key that was sent; 401 in the same words whatever is wrong with it."""
        if not self._follower.keys_honoured():
            raise Refusal(
                503, "the gateway has no keys fresh enough to tell who may call", headers=[RETRY]
            )
        raw = request.headers.get(b"authorization", b"")
        scheme, _, credentials = raw.partition(b" ")
        text = credentials.strip().decode("latin-1")
        snapshot = self._follower.current
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

    def _readiness(self) -> Answer:
        ready = not self.draining and self._follower.keys_honoured()
        return Answer(200 if ready else 503, oip.server_ready(ready=ready))

    def _exposition(self) -> Answer:
        self._metrics.snapshot_age.set(self._follower.age())
        self._metrics.connections.set(self._connections())
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

    def _log_access(self, request: Request, answer: Answer, seconds: float) -> None:
        line: dict[str, Any] = {
            "at": self._clock(),
            "method": request.method,
            "path": request.path[:200],
            "status": answer.status,
            "seconds": round(seconds, 6),
            "inference": dict(answer.headers).get(b"x-shipworthy-inference", b"").decode(),
        }
        _access.info(msgspec.json.encode(line).decode())


def _liveness() -> Answer:
    return Answer(200, oip.server_live(live=True))


def _ending() -> Answer:
    return Answer(503, oip.error_body("the gateway is ending; ask again"), [RETRY, CLOSE])


def _only(request: Request, *methods: str) -> None:
    if request.method not in methods:
        allow = ", ".join(methods)
        raise Refusal(405, f"use {allow} here", headers=[(b"allow", allow.encode())])


async def _done(answer: Answer) -> Answer:
    return answer
