"""Counters, gauges and histograms of one worker, added up over all workers of a host.

Counting is adding to a dictionary. Once a second a worker writes all its numbers into a file of its
own, and any of them can answer for all by reading the files of the others. A worker that starts
takes over the file of one that has ended, and counts on from there: no restart makes a series go
back, count twice or leave another file behind. Who lives holds a lock on its file's name, which
the system drops with the process, however that ends; gauges of the dead are not read.

What a disk refuses is not written, and tried again a second later: the numbers of this worker then
reach the others late. (The multi-process mode of `prometheus_client` maps sparse files into memory,
so that a full disk ends the process, and leaves files behind for each process that there ever was.)
"""

from __future__ import annotations

import fcntl
import os
from bisect import bisect_left
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from string import ascii_lowercase
from typing import Final, Literal

import msgspec
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)

Labels = tuple[str, ...]
Merge = Literal["sum", "max", "min"]

_SUFFIX: Final = ".numbers"
_LOCK: Final = ".lock"


class Distribution(msgspec.Struct, array_like=True):
    """How many observations fell into each bucket, and their sum."""

    buckets: list[int]
    sum: float = 0.0

    def add(self, other: Distribution) -> None:
        """Take over the observations of another one with the same buckets."""
        self.sum += other.sum
        self.buckets = [a + b for a, b in zip(self.buckets, other.buckets, strict=True)]


class _Written(msgspec.Struct, frozen=True):
    """A worker's file: for each series' name its values by labels."""

    counters: dict[str, list[tuple[Labels, float]]] = {}
    gauges: dict[str, list[tuple[Labels, float]]] = {}
    histograms: dict[str, list[tuple[Labels, Distribution]]] = {}


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(_Written)


class Series:
    """What all kinds have: a name, a sentence about it, and the names of its labels."""

    def __init__(self, name: str, help: str, labels: Labels) -> None:  # noqa: A002
        self.name = name
        self.help = help
        self.label_names = labels


class _Count:
    """A counter's value under some labels."""

    __slots__ = ("_counts", "_key")

    def __init__(self, counts: dict[Labels, float], key: Labels) -> None:
        self._counts = counts
        self._key = key

    def inc(self, by: float = 1.0) -> None:
        """Count."""
        self._counts[self._key] = self._counts.get(self._key, 0.0) + by


class Counter(Series):
    """A number that only grows, for each combination of labels."""

    def __init__(self, name: str, help: str, labels: Labels = ()) -> None:  # noqa: A002
        super().__init__(name, help, labels)
        self.values: dict[Labels, float] = {} if labels else {(): 0.0}

    def labels(self, *labels: str) -> _Count:
        """The one with these labels."""
        return _Count(self.values, labels)

    def inc(self, by: float = 1.0) -> None:
        """Count, where there are no labels."""
        self.values[()] += by


class Gauge(Series):
    """A number that goes up and down. `lasting` ones are also read of workers that have ended."""

    def __init__(
        self,
        name: str,
        help: str,  # noqa: A002
        merge: Merge,
        labels: Labels = (),
        *,
        lasting: bool = False,
    ) -> None:
        super().__init__(name, help, labels)
        self.merge: Merge = merge
        self.lasting = lasting
        self.values: dict[Labels, float] = {} if labels else {(): 0.0}

    def set(self, value: float, *labels: str) -> None:
        """Say what it is now."""
        self.values[labels] = value

    def inc(self, by: float = 1.0, *labels: str) -> None:
        """Raise it, or with a negative number lower it."""
        self.values[labels] = self.values.get(labels, 0.0) + by


class Histogram(Series):
    """Observations in buckets with these upper bounds, and one beyond them."""

    def __init__(self, name: str, help: str, labels: Labels, bounds: Sequence[float]) -> None:  # noqa: A002
        super().__init__(name, help, labels)
        self.bounds = tuple(bounds)
        self.values: dict[Labels, Distribution] = {}

    def observe(self, value: float, *labels: str) -> None:
        """Count one observation."""
        found = self.at(labels)
        found.sum += value
        found.buckets[bisect_left(self.bounds, value)] += 1

    def at(self, labels: Labels) -> Distribution:
        """The observations with these labels."""
        found = self.values.get(labels)
        if found is None:
            found = self.values[labels] = Distribution([0] * (len(self.bounds) + 1))
        return found


class Numbers:
    """All series of a worker, and those of the others that write into the same folder.

    Args:
        folder: Where the workers of a host write; None for a worker on its own.
        worker: This worker's name, which no more than one or two at a time bear.

    """

    def __init__(self, folder: Path | None = None, worker: str = "worker-0") -> None:
        self._counters: dict[str, Counter] = {}
        self._gauges: dict[str, Gauge] = {}
        self._histograms: dict[str, Histogram] = {}
        self._folder = folder
        self._worker = worker
        self._file: Path | None = None
        self._lock = -1
        self._registry = CollectorRegistry()
        self._registry.register(self)

    def counter(self, name: str, help: str, *labels: str) -> Counter:  # noqa: A002
        """Make a counter; `_total` is added to its name where it is shown."""
        made = self._counters[name] = Counter(name, help, labels)
        return made

    def gauge(
        self,
        name: str,
        help: str,  # noqa: A002
        *labels: str,
        merge: Merge = "sum",
        lasting: bool = False,
    ) -> Gauge:
        """Make a gauge, of which all workers' values are merged."""
        made = self._gauges[name] = Gauge(name, help, merge, labels, lasting=lasting)
        return made

    def histogram(self, name: str, help: str, *labels: str, bounds: Sequence[float]) -> Histogram:  # noqa: A002
        """Make a histogram."""
        made = self._histograms[name] = Histogram(name, help, labels, bounds)
        return made

    def share(self) -> None:
        """Let the other workers know these numbers, as far as the disk takes them."""
        with suppress(OSError):
            if self._claimed():
                self._write()

    def close(self) -> None:
        """Share them for the last time; another worker may count on from them."""
        self.share()
        if self._lock >= 0:
            os.close(self._lock)
        self._lock, self._file = -1, None

    def exposition(self) -> bytes:
        """All workers' numbers, in Prometheus' text format."""
        return generate_latest(self._registry)

    def collect(self) -> Iterator[Metric]:
        """All workers' numbers as `prometheus_client` has them, which knows how to write them."""
        others = list(self._others())
        for counter in self._counters.values():
            yield _counter_family(counter, others)
        for gauge in self._gauges.values():
            yield _gauge_family(gauge, others)
        for histogram in self._histograms.values():
            yield _histogram_family(histogram, others)

    def _claimed(self) -> bool:
        """Whether a file is ours; if not, take the first that no living worker writes."""
        if self._file is not None:
            return True
        if self._folder is None:
            return False
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        for letter in ("", *ascii_lowercase[1:]):  # its predecessor may still be at work
            name = self._worker + letter
            lock = os.open(self._folder / (name + _LOCK), os.O_RDWR | os.O_CREAT, 0o600)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                os.close(lock)
                continue
            self._lock, self._file = lock, self._folder / (name + _SUFFIX)
            self._count_on(_read(self._file))
            return True
        return False

    def _count_on(self, before: _Written | None) -> None:
        """Add what a worker that has ended left behind."""
        left = [(before, False)] if before else []
        for counter in self._counters.values():
            counter.values = _summed(counter, left)
        for gauge in self._gauges.values():
            if gauge.lasting:
                gauge.values = _merged(gauge, left)
        for histogram in self._histograms.values():
            histogram.values = _joined(histogram, left)

    def _write(self) -> None:
        written = _Written(
            counters={name: list(each.values.items()) for name, each in self._counters.items()},
            gauges={name: list(each.values.items()) for name, each in self._gauges.items()},
            histograms={name: list(each.values.items()) for name, each in self._histograms.items()},
        )
        assert self._file is not None  # noqa: S101  # it was claimed
        partial = self._file.with_suffix(".partial")
        partial.write_bytes(_encoder.encode(written))
        partial.replace(self._file)

    def _others(self) -> Iterator[tuple[_Written, bool]]:
        """What the other workers wrote last, and whether they live."""
        if self._folder is None:
            return
        for file in sorted(self._folder.glob(f"*{_SUFFIX}")):
            if file != self._file and (written := _read(file)) is not None:
                yield written, _is_held(file.with_suffix(_LOCK))


def _read(file: Path) -> _Written | None:
    """What is in a worker's file; None where there is nothing of ours."""
    with suppress(OSError, ValueError, msgspec.MsgspecError):  # no UTF-8 is a ValueError
        return _decoder.decode(file.read_bytes())
    return None


def _is_held(lock: Path) -> bool:
    try:
        descriptor = os.open(lock, os.O_RDONLY)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(descriptor)
    return False


# --- merging ----------------------------------------------------------------------------------

_Others = Iterable[tuple[_Written, bool]]


def _told(
    series: Series, values: Iterable[tuple[Mapping[str, list[tuple[Labels, float]]], bool]]
) -> Generator[tuple[Labels, float]]:
    """What others wrote about a series; not that of another version with other labels."""
    width = len(series.label_names)
    for names, read in values:
        if read:
            yield from (told for told in names.get(series.name, ()) if len(told[0]) == width)


def _summed(counter: Counter, others: _Others) -> dict[Labels, float]:
    total = dict(counter.values)
    for labels, value in _told(counter, ((written.counters, True) for written, _ in others)):
        total[labels] = total.get(labels, 0.0) + value
    return total


def _merged(gauge: Gauge, others: _Others) -> dict[Labels, float]:
    merged = dict(gauge.values)
    told = _told(gauge, ((written.gauges, lives or gauge.lasting) for written, lives in others))
    for labels, value in told:
        if labels not in merged:
            merged[labels] = value
        elif gauge.merge == "sum":
            merged[labels] += value
        else:
            choose = max if gauge.merge == "max" else min
            merged[labels] = choose(merged[labels], value)
    return merged


def _joined(histogram: Histogram, others: _Others) -> dict[Labels, Distribution]:
    joined = Histogram(histogram.name, histogram.help, histogram.label_names, histogram.bounds)
    width, size = len(histogram.label_names), len(histogram.bounds) + 1
    for labels, found in histogram.values.items():
        joined.at(labels).add(found)
    for written, _ in others:
        for labels, found in written.histograms.get(histogram.name, ()):
            if len(labels) == width and len(found.buckets) == size:
                joined.at(labels).add(found)
    return joined.values


# --- showing ----------------------------------------------------------------------------------


def _counter_family(counter: Counter, others: _Others) -> Metric:
    family = CounterMetricFamily(counter.name, counter.help, labels=counter.label_names)
    for labels, value in _summed(counter, others).items():
        family.add_metric(labels, value)
    return family


def _gauge_family(gauge: Gauge, others: _Others) -> Metric:
    family = GaugeMetricFamily(gauge.name, gauge.help, labels=gauge.label_names)
    for labels, value in _merged(gauge, others).items():
        family.add_metric(labels, value)
    return family


def _histogram_family(histogram: Histogram, others: _Others) -> Metric:
    family = HistogramMetricFamily(histogram.name, histogram.help, labels=histogram.label_names)
    bounds = [*map(str, histogram.bounds), "+Inf"]
    for labels, found in _joined(histogram, others).items():
        shown, below = list[tuple[str, float]](), 0
        for bound, count in zip(bounds, found.buckets, strict=True):
            below += count
            shown.append((bound, below))
        family.add_metric(labels, shown, found.sum)
    return family
