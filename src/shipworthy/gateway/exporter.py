"""Sends the spans of finished requests, and is in no answer's way.

What is to be sent waits in a queue of bounded length for a thread of its own; what can't be sent is
counted and forgotten.
"""

from __future__ import annotations

import contextlib
import logging
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Final, Protocol

from shipworthy.domain.records import InferenceRecord
from shipworthy.errors import UsageError
from shipworthy.gateway.spans import Attempt, Span, Told, spans_of, told
from shipworthy.gateway.traces import Sampler, TraceContext

_log = logging.getLogger("shipworthy.gateway")

NO_EXTRA: Final = (
    "gateway.otlp needs packages that are not installed; install shipworthy[otlp], or take"
    " gateway.otlp out of shipworthy.yaml"
)

_MAX_QUEUED: Final = 4096
_BATCH: Final = 64
_FLUSH_SECONDS: Final = 0.5
_SEND_SECONDS: Final = 5.0
_CLOSE_SECONDS: Final = 2.0
_CALM_SECONDS: Final = 10.0
_SWITCH_SECONDS: Final = 0.0005

_Item = tuple[Told, TraceContext, Sequence[Attempt]]


class Collector(Protocol):
    """Where spans go."""

    def send(self, spans: Sequence[Span]) -> str | None:
        """What went wrong, None if they were taken. It may take seconds."""
        ...

    def close(self) -> None:
        """End what is under way."""
        ...


class SpanExporter:
    """Decides which requests have a span, and sends those.

    `dropped` counts requests whose spans were not sent, by reason: `queue_full`, `not_taken` by the
    collector, `shutdown`, or `fault` of our own.
    """

    def __init__(
        self,
        collector: Collector,
        sampler: Sampler,
        *,
        max_queued: int = _MAX_QUEUED,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self.context = sampler.context
        self.dropped = {"queue_full": 0, "not_taken": 0, "shutdown": 0, "fault": 0}
        self._collector = collector
        self._max_queued = max_queued
        self._monotonic = monotonic
        self._queue: deque[_Item] = deque()
        self._wake = threading.Event()
        self._closing = False
        self._failed_at: float | None = None
        self._thread = threading.Thread(target=self._run, name="spans", daemon=True)
        # While it computes, whoever answers waits for so long: the usual 5 ms would be felt.
        sys.setswitchinterval(min(sys.getswitchinterval(), _SWITCH_SECONDS))
        self._thread.start()

    def emit(
        self, record: InferenceRecord, context: TraceContext, attempts: Sequence[Attempt] = ()
    ) -> None:
        """Have a request's span sent, if its context has one, and those of its calls upstream."""
        if not context.span_id:
            return
        waiting = len(self._queue)
        if waiting >= self._max_queued:
            self.dropped["queue_full"] += 1
            return
        self._queue.append((told(record), context, attempts))
        if waiting + 1 == _BATCH:
            self._wake.set()

    def close(self, seconds: float = _CLOSE_SECONDS) -> None:
        """Send what waits, for so long at most; forget the rest."""
        self._closing = True
        self._wake.set()
        self._thread.join(seconds)
        left = len(self._next(len(self._queue)))
        if left:
            self.dropped["shutdown"] += left
            _log.warning("the spans of %d requests could not be sent before the end", left)
        self._collector.close()

    def _run(self) -> None:
        while not self._closing:
            self._wake.wait(_FLUSH_SECONDS)
            self._wake.clear()
            while batch := self._next(_BATCH):
                self._send(batch)

    def _next(self, count: int) -> list[_Item]:
        batch: list[_Item] = []
        with contextlib.suppress(IndexError):  # that was the last one
            for _ in range(count):
                batch.append(self._queue.popleft())  # noqa: PERF401  # others append and take
        return batch

    def _send(self, batch: list[_Item]) -> None:
        try:
            problem = self._collector.send([span for item in batch for span in spans_of(*item)])
        except Exception:  # noqa: BLE001  # the thread outlives whatever a record holds
            self.dropped["fault"] += len(batch)
            if self.dropped["fault"] == len(batch):
                _log.exception("spans can't be made; further faults like it are only counted")
            return
        if problem is not None:
            self.dropped["not_taken"] += len(batch)
        self._tell(problem)

    def _tell(self, problem: str | None) -> None:
        """Say once that it begins, and once that it is over."""
        now = self._monotonic()
        if problem is not None:
            if self._failed_at is None:
                _log.warning("the collector takes no spans, so they are dropped: %s", problem)
            self._failed_at = now
        elif self._failed_at is not None and now - self._failed_at >= _CALM_SECONDS:
            _log.warning("the collector takes spans again")
            self._failed_at = None


def export_spans(
    endpoint: str,
    headers: Mapping[str, str],
    *,
    sampler: Sampler,
    worker: str,
    seconds: float = _SEND_SECONDS,
) -> SpanExporter:
    """Begin to send spans to the collector at `endpoint`, with these headers.

    UsageError when the packages of the extra `otlp` are not installed.
    """
    try:
        from shipworthy.gateway.otlp import OtlpCollector
    except ImportError as error:
        raise UsageError(NO_EXTRA) from error
    return SpanExporter(OtlpCollector(endpoint, headers, worker=worker, seconds=seconds), sampler)
