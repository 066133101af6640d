"""The worker's own numbers, under Prometheus names. Labels hold plans and releases, never units."""

from __future__ import annotations

import os
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Mapping
from typing import Any, Final, Literal

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    generate_latest,
    multiprocess,
)

CONTENT_TYPE: Final = b"text/plain; version=0.0.4; charset=utf-8"
_BUCKETS: Final = (
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0,
)  # fmt: skip


class _Calls:
    """Calls of one plan that got one status, and in which latency buckets they fell."""

    __slots__ = ("buckets", "count", "received", "seconds", "sent")

    def __init__(self) -> None:
        self.count = self.received = self.sent = 0
        self.seconds = 0.0
        self.buckets = [0] * (len(_BUCKETS) + 1)


class Metrics:
    """All series of one gateway worker.

    With PROMETHEUS_MULTIPROC_DIR set before Python starts, workers of one host share a folder and
    each of them answers for all.
    """

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._requests = self._counter("requests", "Requests by plan and status.", "plan", "status")
        self._seconds = Histogram(
            "shipworthy_gateway_request_seconds",
            "Time from a request's last byte to its answer.",
            ["plan"],
            buckets=_BUCKETS,
            registry=self.registry,
        )
        self._attempts = self._counter(
            "attempts",
            "First attempts by assigned release and outcome.",
            "plan",
            "release",
            "outcome",
            "reason",
        )
        self._body_bytes = self._counter(
            "body_bytes", "Bytes of bodies received and sent.", "plan", "direction"
        )
        self.fallbacks = self._counter(
            "fallbacks", "Requests that another arm or the fallback message answered.", "plan", "to"
        )
        self.retries = self._counter("retries", "Further attempts at the same arm.", "plan")
        self.denied = self._counter("denied", "Requests without a right to what they asked.", "why")
        self.dropped = self._counter("records_dropped", "Records that were not written.", "why")
        self.last_drop = self._gauge(
            "last_drop_timestamp_seconds", "When a record was last not written.", merge="max"
        )
        self._dropped_before: defaultdict[str, int] = defaultdict(int)
        self.feedback = self._counter("feedback", "Feedback that was taken.", "kind")
        self.refused_snapshots = self._counter(
            "snapshots_refused", "Snapshot files that were not obeyed.", "why"
        )
        self.ejections = self._counter("ejections", "Times an endpoint was set aside.")
        self.errors = self._counter("unhandled_errors", "Faults of the gateway itself.")
        self.bad_requests = self._counter(
            "bad_connections", "Connections ended for what they sent or did not send.", "why"
        )
        self.connections = self._gauge("connections", "Open client connections.")
        self.snapshot_age = self._gauge("snapshot_age_seconds", "Age of the obeyed snapshot.")
        # Counted here while serving, and in the series once a second: that costs a tenth.
        self._calls: defaultdict[tuple[str, int], _Calls] = defaultdict(_Calls)
        self._ends: defaultdict[tuple[str, str, str, str], int] = defaultdict(int)

    def answered(self, plan: str, status: int, seconds: float, received: int, sent: int) -> None:
        """Count a request that reached a plan."""
        calls = self._calls[plan, status]
        calls.count += 1
        calls.received += received
        calls.sent += sent
        calls.seconds += seconds
        calls.buckets[bisect_left(_BUCKETS, seconds)] += 1

    def attempted(self, plan: str, release: str, outcome: str, reason: str) -> None:
        """Count a first attempt."""
        self._ends[plan, release, outcome, reason] += 1

    def settle_dropped(self, counts: Mapping[str, int], now: float) -> None:
        """Take over how many records the journal has dropped so far, by reason."""
        for why, count in counts.items():
            if count > self._dropped_before[why]:
                self.last_drop.set(now)
            self.dropped.labels(why).inc(count - self._dropped_before[why])
            self._dropped_before[why] = count

    def settle(self) -> None:
        """Move what was counted since the last time into the series."""
        for (plan, status), calls in self._calls.items():
            self._requests.labels(plan, str(status)).inc(calls.count)
            self._body_bytes.labels(plan, "in").inc(calls.received)
            self._body_bytes.labels(plan, "out").inc(calls.sent)
            _observe(self._seconds.labels(plan), calls)
        self._calls.clear()
        for labels, count in self._ends.items():
            self._attempts.labels(*labels).inc(count)
        self._ends.clear()

    def exposition(self) -> bytes:
        """What `/metrics` answers."""
        self.settle()
        if "PROMETHEUS_MULTIPROC_DIR" in os.environ:
            merged = CollectorRegistry()
            multiprocess.MultiProcessCollector(merged)
            return generate_latest(merged)
        return generate_latest(self.registry)

    def _counter(self, name: str, help: str, *labels: str) -> Counter:  # noqa: A002
        return Counter(f"shipworthy_gateway_{name}", help, labels, registry=self.registry)

    def _gauge(
        self,
        name: str,
        help: str,  # noqa: A002
        merge: Literal["livesum", "max"] = "livesum",
    ) -> Gauge:
        return Gauge(
            f"shipworthy_gateway_{name}", help, registry=self.registry, multiprocess_mode=merge
        )


def _observe(timer: Any, calls: _Calls) -> None:
    """Add many observations to a histogram, which the library can only do one at a time."""
    timer._sum.inc(calls.seconds)  # noqa: SLF001
    for bucket, count in zip(timer._buckets, calls.buckets, strict=True):  # noqa: SLF001
        bucket.inc(count)
