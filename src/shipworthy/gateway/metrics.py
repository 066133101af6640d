"""The gateway's numbers, under Prometheus names. Labels hold plans and releases, never units."""

from __future__ import annotations

import os
import resource
import time
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Final

from shipworthy.gateway.numbers import Counter, Gauge, Numbers

CONTENT_TYPE: Final = b"text/plain; version=0.0.4; charset=utf-8"
_BUCKETS: Final = (
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0,
)  # fmt: skip
_GAP_BUCKETS: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)
_FIELDS: Final = Path("/proc/self/statm")
_PAGE: Final = resource.getpagesize()


class _Calls:
    """Calls of one plan that got one status, and in which latency buckets they fell."""

    __slots__ = ("buckets", "count", "received", "seconds", "sent")

    def __init__(self) -> None:
        self.count = self.received = self.sent = 0
        self.seconds = 0.0
        self.buckets = [0] * (len(_BUCKETS) + 1)


class Metrics:
    """All series of the gateway, as one worker counts them and any worker shows them for all.

    Each method is called for each request, or for each event of one, and costs less than a
    microsecond; `settle` is called every second, and `close` when the worker ends.

    Args:
        folder: Where the workers of this host share their numbers; None for a worker on its own.
        worker: This worker's name.

    """

    def __init__(self, folder: Path | None = None, worker: str = "worker-0") -> None:
        self._numbers = Numbers(folder, worker)
        self._requests = self._counter("requests", "Requests by plan and status.", "plan", "status")
        self._seconds = self._numbers.histogram(
            "shipworthy_gateway_request_seconds",
            "Time from a request's last byte to its answer.",
            "plan",
            bounds=_BUCKETS,
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
        self._make_language_series()
        self._make_upstream_series()
        self.limits = self._counter("limited", "Requests refused by a limit.", "plan", "limit")
        self.denied = self._counter("denied", "Requests without a right to what they asked.", "why")
        self.dropped = self._counter("records_dropped", "Records that were not written.", "why")
        self.last_drop = self._gauge(
            "last_drop_timestamp_seconds", "When a record was last not written."
        )
        self._dropped_before: defaultdict[str, int] = defaultdict(int)
        self._spans = self._counter(
            "spans_dropped", "Requests whose spans were not sent to the collector.", "why"
        )
        self._spans_before: defaultdict[str, int] = defaultdict(int)
        self.redactions = self._counter(
            "redactions", "What was replaced before records were written.", "plan", "pattern"
        )
        self.feedback = self._counter("feedback", "Feedback that was taken.", "kind")
        self.refused_snapshots = self._counter(
            "snapshots_refused", "Snapshot files that were not obeyed.", "why"
        )
        self.errors = self._counter("unhandled_errors", "Faults of the gateway itself.")
        self.bad_requests = self._counter(
            "bad_connections", "Connections ended for what they sent or did not send.", "why"
        )
        self.connections = self._numbers.gauge(
            "shipworthy_gateway_connections", "Open client connections."
        )
        self.snapshot_age = self._numbers.gauge(
            "shipworthy_gateway_snapshot_age_seconds",
            "Age of the obeyed snapshot, of the worker with the oldest.",
            merge="max",
        )
        self._workers = self._numbers.gauge("shipworthy_gateway_workers", "Workers that live.")
        self._workers.set(1.0)
        self._process = _Process(self._numbers)
        # Counted here while serving, and in the series once a second: that costs a tenth.
        self._calls: defaultdict[tuple[str, int], _Calls] = defaultdict(_Calls)

    def _make_language_series(self) -> None:
        self._tokens = self._counter("tokens", "Tokens by direction.", "plan", "direction")
        self._cost = self._counter("cost", "What calls cost, in the team's currency.", "plan")
        self._first_content = self._numbers.histogram(
            "shipworthy_gateway_first_content_seconds",
            "Time from a request's last byte to the first content of its stream.",
            "plan",
            bounds=_BUCKETS,
        )
        self._gaps = self._numbers.histogram(
            "shipworthy_gateway_content_gap_seconds",
            "Mean time between two events with content, by stream.",
            "plan",
            bounds=_GAP_BUCKETS,
        )
        self.streams = self._numbers.gauge(
            "shipworthy_gateway_open_streams", "Streams that are being answered."
        )

    def _make_upstream_series(self) -> None:
        self.fallbacks = self._counter(
            "fallbacks", "Requests that another arm or the fallback message answered.", "plan", "to"
        )
        self.retries = self._counter("retries", "Further attempts at the same arm.", "plan")
        self.hedges = self._counter(
            "hedges", "Second attempts beside a slow first one, by which answered.", "plan", "won"
        )
        self._mirrors = self._counter(
            "mirrors",
            "Copied requests by outcome, and whether the answer agreed with the client's.",
            *("plan", "release", "outcome", "agrees"),
        )
        self.ejections = self._counter("ejections", "Times an endpoint was set aside.")
        self.endpoints = self._numbers.gauge(
            "shipworthy_gateway_endpoints",
            "Endpoints by state, each as often as workers see it so.",
            "state",
        )

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
        key = plan, release, outcome, reason
        values = self._attempts.values
        values[key] = values.get(key, 0.0) + 1.0

    def tokens(self, plan: str, received: int, sent: int, cost: float) -> None:
        """Count a call's tokens, in and out, and what it cost."""
        values = self._tokens.values
        for key, count in (((plan, "in"), received), ((plan, "out"), sent)):
            values[key] = values.get(key, 0.0) + count
        if cost:
            self._cost.labels(plan).inc(cost)

    def stream(self, plan: str, first: float, gap: float | None) -> None:
        """Count a stream: seconds to its first content, and between two events with content.

        `gap` is None when there was no second one.
        """
        self._first_content.observe(first, plan)
        if gap is not None:
            self._gaps.observe(gap, plan)

    def mirrored(self, plan: str, release: str, outcome: str, agrees: bool | None) -> None:  # noqa: FBT001  # a fact, not a switch
        """Count a mirrored request; `agrees` is None where nothing can be compared."""
        word = "unknown" if agrees is None else "yes" if agrees else "no"
        self._mirrors.labels(plan, release, outcome, word).inc()

    def limited(self, plan: str, limit: str) -> None:
        """Count a request that a limit refused."""
        self.limits.labels(plan, limit).inc()

    def redacted(self, plan: str, pattern: str, count: int = 1) -> None:
        """Count what was replaced in a record."""
        self.redactions.labels(plan, pattern).inc(count)

    def hedged(self, plan: str, *, won: bool) -> None:
        """Count a second attempt; whether it answered before the first."""
        self.hedges.labels(plan, "second" if won else "first").inc()

    def settle_dropped(self, counts: Mapping[str, int], now: float) -> None:
        """Take over how many records the journal has dropped so far, by reason."""
        for why, count in counts.items():
            if count > self._dropped_before[why]:
                self.last_drop.set(now)
            self.dropped.labels(why).inc(count - self._dropped_before[why])
            self._dropped_before[why] = count

    def settle_spans(self, counts: Mapping[str, int]) -> None:
        """Take over for how many requests no spans were sent so far, by reason."""
        for why, count in counts.items():
            self._spans.labels(why).inc(count - self._spans_before[why])
            self._spans_before[why] = count

    def settle(self) -> None:
        """Let the other workers know what was counted; to be called every second."""
        self._settle()
        self._process.look()
        self._numbers.share()

    def close(self) -> None:
        """Leave what was counted to the other workers, and to the next one of this name."""
        self._settle()
        self._numbers.close()

    def exposition(self) -> bytes:
        """What `/metrics` answers: this worker's numbers of now and the others' of a second ago.

        What it tells is shared first: were it killed now, no series would go back.
        """
        self.settle()
        return self._numbers.exposition()

    def _settle(self) -> None:
        """Move what was counted since the last time into the series."""
        for (plan, status), calls in self._calls.items():
            self._requests.labels(plan, str(status)).inc(calls.count)
            self._body_bytes.labels(plan, "in").inc(calls.received)
            self._body_bytes.labels(plan, "out").inc(calls.sent)
            timer = self._seconds.at((plan,))
            timer.sum += calls.seconds
            timer.buckets = [a + b for a, b in zip(timer.buckets, calls.buckets, strict=True)]
        self._calls.clear()

    def _counter(self, name: str, help: str, *labels: str) -> Counter:  # noqa: A002
        return self._numbers.counter(f"shipworthy_gateway_{name}", help, *labels)

    def _gauge(self, name: str, help: str) -> Gauge:  # noqa: A002
        """One of which the largest counts, also behind a worker's end."""
        return self._numbers.gauge(f"shipworthy_gateway_{name}", help, merge="max", lasting=True)


class _Process:
    """What the system says of this process, under the names that all exporters use."""

    def __init__(self, numbers: Numbers) -> None:
        self._cpu = numbers.counter("process_cpu_seconds", "CPU time of all workers.")
        self._memory = numbers.gauge(
            "process_resident_memory_bytes", "Resident memory of all workers."
        )
        self._files = numbers.gauge("process_open_fds", "Open files of all workers.")
        self._most_files = numbers.gauge(
            "process_max_fds", "Files that a worker may open.", merge="min"
        )
        started = numbers.gauge(
            "process_start_time_seconds", "When the oldest worker started.", merge="min"
        )
        started.set(time.time())
        self._counted = 0.0
        self.look()

    def look(self) -> None:
        """Take over what it says now."""
        spent = time.process_time()
        self._cpu.inc(spent - self._counted)
        self._counted = spent
        with suppress(OSError, ValueError, IndexError):  # not everywhere
            self._memory.set(int(_FIELDS.read_bytes().split()[1]) * _PAGE)
            self._files.set(len(os.listdir("/proc/self/fd")))  # noqa: PTH208  # only how many
        self._most_files.set(resource.getrlimit(resource.RLIMIT_NOFILE)[0])
