"""The worker's own numbers, under Prometheus names. Labels hold plans and releases, never units."""

from __future__ import annotations

import os
from typing import Final

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
        self.dropped = self._counter("records_dropped", "Records that could not be written.")
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
        self._children: dict[tuple[str, ...], Counter] = {}
        self._timers: dict[str, Histogram] = {}

    def answered(self, plan: str, status: int, seconds: float, received: int, sent: int) -> None:
        """Count a request that reached a plan."""
        self._child(self._requests, "requests", plan, str(status)).inc()
        self._child(self._body_bytes, "bytes", plan, "in").inc(received)
        self._child(self._body_bytes, "bytes", plan, "out").inc(sent)
        timer = self._timers.get(plan)
        if timer is None:
            timer = self._timers[plan] = self._seconds.labels(plan)
        timer.observe(seconds)

    def attempted(self, plan: str, release: str, outcome: str, reason: str) -> None:
        """Count a first attempt."""
        self._child(self._attempts, "attempts", plan, release, outcome, reason).inc()

    def exposition(self) -> bytes:
        """What `/metrics` answers."""
        if "PROMETHEUS_MULTIPROC_DIR" in os.environ:
            merged = CollectorRegistry()
            multiprocess.MultiProcessCollector(merged)
            return generate_latest(merged)
        return generate_latest(self.registry)

    def _child(self, family: Counter, *labels: str) -> Counter:
        """`family.labels()`, remembered: looking a series up costs more than counting in it."""
        child = self._children.get(labels)
        if child is None:
            child = self._children[labels] = family.labels(*labels[1:])
        return child

    def _counter(self, name: str, help: str, *labels: str) -> Counter:  # noqa: A002
        return Counter(f"shipworthy_gateway_{name}", help, labels, registry=self.registry)

    def _gauge(self, name: str, help: str) -> Gauge:  # noqa: A002
        return Gauge(
            f"shipworthy_gateway_{name}", help, registry=self.registry, multiprocess_mode="livesum"
        )
