"""The workers' own numbers: what one counts, and what any of them tells of all."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Generator
from contextlib import closing, contextmanager
from pathlib import Path

import msgspec
import pytest
from prometheus_client import CollectorRegistry, Histogram, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from shipworthy.gateway.metrics import _BUCKETS, Metrics

SECONDS = (0.0, 2**-10, 0.25, 0.375, 30.0, 31.0)  # sums of these are exact
NAME = "shipworthy_gateway_request_seconds"
PREFIX = "shipworthy_gateway_"
Told = dict[tuple[str, tuple[tuple[str, str], ...]], float]


def told(metrics: Metrics) -> Told:
    """All samples by name and labels; none is told twice."""
    samples = [
        sample
        for family in text_string_to_metric_families(metrics.exposition().decode())
        for sample in family.samples
    ]
    found = {(each.name, tuple(sorted(each.labels.items()))): each.value for each in samples}
    assert len(found) == len(samples)
    return found


def value(found: Told, name: str, **labels: str) -> float | None:
    return found.get((PREFIX + name, tuple(sorted(labels.items()))))


def use_all(metrics: Metrics) -> None:
    """Count something in each series that there is."""
    metrics.answered("digits", 200, 0.25, 100, 50)
    metrics.attempted("digits", "digits@1", "success", "")
    metrics.tokens("assistant", 7, 11, 0.5)
    metrics.stream("assistant", 0.25, 0.0625)
    metrics.stream("assistant", 0.5, None)
    metrics.mirrored("digits", "digits@2", "success", agrees=True)
    metrics.mirrored("digits", "digits@2", "failure", agrees=None)
    metrics.limited("digits", "requests_per_minute")
    metrics.redacted("assistant", "email", 3)
    metrics.hedged("digits", won=True)
    metrics.settle_dropped({"disk": 2}, 1_700_000_000.0)
    metrics.settle_spans({"full": 2})
    metrics.endpoints.set(2, "ejected")
    metrics.connections.set(5)
    metrics.streams.inc()
    metrics.snapshot_age.set(0.5)
    metrics.retries.labels("digits").inc()
    metrics.fallbacks.labels("digits", "stable").inc()
    metrics.denied.labels('a "quoted\\ \n reason').inc()
    metrics.feedback.labels("rating").inc()
    metrics.refused_snapshots.labels("torn").inc()
    metrics.bad_requests.labels("slow").inc()
    metrics.errors.inc()
    metrics.ejections.inc()


def test_latencies_counted_together_are_as_if_observed_one_by_one():
    registry = CollectorRegistry()
    timer = Histogram(NAME, "", ["plan"], buckets=_BUCKETS, registry=registry).labels("digits")
    ours = Metrics()
    for seconds in SECONDS:
        ours.answered("digits", 200 if seconds < 1 else 504, seconds, 1, 1)
        timer.observe(seconds)

    def samples(text: str) -> Told:
        return {
            (sample.name, tuple(sorted(sample.labels.items()))): sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
            if sample.name.startswith(NAME) and not sample.name.endswith("created")
        }

    expected = samples(generate_latest(registry).decode())
    assert samples(ours.exposition().decode()) == expected
    assert samples(ours.exposition().decode()) == expected  # nothing is counted twice
    assert expected[f"{NAME}_count", (("plan", "digits"),)] == len(SECONDS)
    assert len([key for key in expected if key[0].endswith("_bucket")]) == len(_BUCKETS) + 1


def test_names_and_text_are_as_prometheus_wants_them():
    metrics = Metrics()
    use_all(metrics)
    text = metrics.exposition().decode()
    types = dict(re.findall(r"^# TYPE (\S+) (\S+)$", text, re.MULTILINE))
    helps = re.findall(r"^# HELP (\S+) \S.*\.$", text, re.MULTILINE)
    assert len(types) == text.count("# TYPE") == text.count("# HELP")
    assert list(types) == helps
    for name, kind in types.items():
        assert re.fullmatch(r"(shipworthy_gateway|process)_[a-z_]+", name)
        assert (kind == "counter") == name.endswith("_total")
        assert not re.search(r"_(ms|milliseconds|kb|megabytes|minutes)\b", name)
        assert kind != "histogram" or name.endswith("_seconds")
    told(metrics)
    seen = {sample.split("{")[0].split(" ")[0] for sample in text.splitlines() if sample[0] != "#"}
    for name, kind in types.items():  # each is there, and nothing that was not announced
        parts = [name + end for end in ("_bucket", "_sum", "_count")]
        assert set(parts if kind == "histogram" else [name]) <= seen
        seen -= set(parts if kind == "histogram" else [name])
    assert not seen
    assert value(told(metrics), "tokens_total", plan="assistant", direction="out") == 11
    assert value(told(metrics), "content_gap_seconds_count", plan="assistant") == 1
    assert value(told(metrics), "first_content_seconds_count", plan="assistant") == 2


def test_no_label_can_hold_a_unit():
    metrics = Metrics()
    use_all(metrics)
    labels = {name for _, pairs in told(metrics) for name, _ in pairs}
    assert labels == {
        *("plan", "status", "release", "outcome", "reason", "direction", "agrees", "limit"),
        *("pattern", "to", "won", "why", "kind", "state", "le"),
    }


# --- several workers ------------------------------------------------------------------------------

WORKER = """
import sys
from pathlib import Path
from shipworthy.gateway.metrics import Metrics

metrics = Metrics(Path(sys.argv[1]), sys.argv[2])
for line in sys.stdin:
    for _ in range(int(line)):
        metrics.answered("digits", 200, 0.25, 3, 5)
        metrics.attempted("digits", "digits@1", "success", "")
        metrics.tokens("digits", 2, 7, 0.5)
        metrics.connections.inc()
    metrics.snapshot_age.set(float(line))
    metrics.settle()
    print("settled", flush=True)
metrics.close()
"""


class Worker:
    """A process that counts so many requests when told, and settles."""

    def __init__(self, folder: Path, name: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", WORKER, str(folder), name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def serve(self, count: int) -> None:
        assert self.process.stdin
        assert self.process.stdout
        self.process.stdin.write(f"{count}\n")
        self.process.stdin.flush()
        assert self.process.stdout.readline() == "settled\n"

    def end(self, number: signal.Signals | None = None) -> None:
        if number is not None:
            self.process.send_signal(number)
        self.process.communicate()


@contextmanager
def workers(folder: Path, *names: str) -> Generator[list[Worker]]:
    made = [Worker(folder, name) for name in names]
    try:
        yield made
    finally:
        for each in made:
            each.process.kill()
            each.process.communicate()


def check(found: Told, requests: int, live: int) -> None:
    """Exactly so many requests over all workers, `live` of them by those that live."""
    assert value(found, "requests_total", plan="digits", status="200") == requests
    assert value(found, "body_bytes_total", plan="digits", direction="in") == 3 * requests
    assert value(found, "tokens_total", plan="digits", direction="out") == 7 * requests
    assert value(found, "cost_total", plan="digits") == requests / 2
    assert value(found, "request_seconds_sum", plan="digits") == requests / 4
    assert value(found, "request_seconds_count", plan="digits") == requests
    assert value(found, "request_seconds_bucket", plan="digits", le="0.1") == 0
    assert value(found, "request_seconds_bucket", plan="digits", le="0.25") == requests
    assert value(found, "connections") == live


def test_any_worker_tells_the_sums_over_three_processes(tmp_path):
    folder = tmp_path / "numbers"
    with closing(Metrics(folder, "observer")) as observer:
        observer.settle()
        with workers(folder, "worker-0", "worker-1", "worker-2") as three:
            for each, count in zip(three, (1, 20, 300), strict=True):
                each.serve(count)
            found = told(observer)
            check(found, 321, 321)
            assert value(found, "workers") == 4
            assert value(found, "snapshot_age_seconds") == 300
            three[2].serve(4000)
            check(told(observer), 4321, 4321)
            cpu = told(observer)["process_cpu_seconds_total", ()]
            assert cpu > 0
            memory = told(observer)["process_resident_memory_bytes", ()]
            assert memory > 4 * 10_000_000

            three[1].end(signal.SIGKILL)
            three[2].end()
            found = told(observer)
            check(found, 4321, 1)
            assert value(found, "workers") == 2
            assert found["process_cpu_seconds_total", ()] >= cpu
            assert found["process_resident_memory_bytes", ()] < memory


@pytest.mark.parametrize("number", [signal.SIGKILL, None])
def test_a_worker_counts_on_from_where_the_one_before_it_ended(tmp_path, number):
    with closing(Metrics(tmp_path, "observer")) as observer:
        for life in range(1, 5):
            with workers(tmp_path, "worker-0") as (one,):
                one.serve(10)
                check(told(observer), 10 * life, 10)
                one.end(number)
            check(told(observer), 10 * life, 0)
        assert len(list(tmp_path.glob("*.numbers"))) == 2


def test_two_workers_of_one_name_are_both_counted(tmp_path):
    """As while one takes the place of the other."""
    with closing(Metrics(tmp_path, "observer")) as observer:
        for _ in range(3):
            with workers(tmp_path, "worker-0", "worker-0") as (old, new):
                old.serve(1)
                new.serve(2)
                old.serve(4)
                old.end()
                new.serve(8)
                new.end()
        check(told(observer), 45, 0)
        assert len(list(tmp_path.glob("*.numbers"))) == 3


def test_what_a_worker_told_is_not_taken_back_when_it_is_killed(tmp_path):
    """A counter that goes back is taken for one that began anew, and counted again as a whole."""
    tells = "import os; m.errors.inc(); print(m.exposition().count(b'x')); os.kill(os.getpid(), 9)"
    program = (
        "import sys; from pathlib import Path; from shipworthy.gateway.metrics import Metrics;"
        f"m = Metrics(Path(sys.argv[1]), 'worker-0'); {tells}"
    )
    ended = subprocess.run([sys.executable, "-c", program, str(tmp_path)], check=False)
    assert ended.returncode == -signal.SIGKILL
    assert value(told(Metrics(tmp_path, "other")), "unhandled_errors_total") == 1


def test_the_last_drop_is_remembered_beyond_its_worker(tmp_path):
    first = Metrics(tmp_path)
    first.settle_dropped({"disk": 3}, 1000.0)
    first.close()
    with closing(Metrics(tmp_path, "worker-1")) as other:
        assert value(told(other), "last_drop_timestamp_seconds") == 1000
        other.settle_dropped({"disk": 1}, 900.0)
        assert value(told(other), "last_drop_timestamp_seconds") == 1000
        assert value(told(other), "records_dropped_total", why="disk") == 4


def test_garbage_and_numbers_of_another_version_are_passed_over(tmp_path):
    with closing(Metrics(tmp_path, "worker-1")) as other:
        use_all(other)
        other.settle()
        content = (tmp_path / "worker-1.numbers").read_bytes()
    for index in range(0, len(content), 7):
        (tmp_path / "worker-2.numbers").write_bytes(content[:index])
        (tmp_path / "worker-3.numbers").write_bytes(content[:index] + b"\xc1" + content[index:])
        with closing(Metrics(tmp_path, "observer")) as observer:
            told(observer)
    for changed in (
        {"counters": {"shipworthy_gateway_requests": [[["digits"], 1.0]]}},
        {"histograms": {NAME: [[["digits"], [[1, 2], 0.5]]]}},
        {"gauges": {"shipworthy_gateway_connections": [[["x"], 1.0]]}, "later": 1},
    ):
        (tmp_path / "worker-2.numbers").write_bytes(msgspec.msgpack.encode(changed))
        (tmp_path / "worker-3.numbers").unlink(missing_ok=True)
        with closing(Metrics(tmp_path, "worker-2")) as observer:
            found = told(observer)
            assert value(found, "requests_total", plan="digits", status="200") == 1


def test_numbers_are_told_where_they_can_not_be_shared(tmp_path):
    """As on a disk that is full, or behind a folder that somebody removed."""
    (tmp_path / "file").touch()
    with closing(Metrics(tmp_path / "file" / "numbers")) as metrics:
        use_all(metrics)
        metrics.settle()
        assert value(told(metrics), "requests_total", plan="digits", status="200") == 1
    folder = tmp_path / "folder"
    with closing(Metrics(folder)) as metrics:
        metrics.settle()
        for file in folder.iterdir():
            file.unlink()
        folder.rmdir()
        use_all(metrics)
        metrics.settle()
        assert value(told(metrics), "requests_total", plan="digits", status="200") == 1


def test_a_scrape_while_all_write_is_never_torn(tmp_path):
    """Each file is whole at any time, so each worker's numbers are those of one moment."""
    with (
        closing(Metrics(tmp_path, "observer")) as observer,
        workers(tmp_path, "worker-0") as (one,),
    ):
        assert one.process.stdin
        one.process.stdin.write("7\n" * 500)
        one.process.stdin.flush()
        seen = Counter[float]()
        while (requests := _requests(observer)) < 3500:
            assert requests % 7 == 0
            seen[requests] += 1
        assert len(seen) > 1


def _requests(observer: Metrics) -> float:
    found = told(observer)
    requests = value(found, "requests_total", plan="digits", status="200") or 0.0
    assert (value(found, "request_seconds_count", plan="digits") or 0.0) == requests
    return requests


def test_the_numbers_are_private(tmp_path):
    with closing(Metrics(tmp_path / "numbers")) as metrics:
        metrics.settle()
        assert (tmp_path / "numbers").stat().st_mode & 0o777 == 0o700
