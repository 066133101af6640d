"""What keeping every request costs, from the gateway's journal to the dashboard's answer.

Real processes over a real project: this one writes journals as a gateway worker does, the keeper
follows them with a rollout under way, the lake's writer moves them into Delta tables. CPU and
memory of both are the kernel's figures. Then the dashboard's questions are asked of the lake.

    python bench/journal.py [--records 10000000] [--payload 512]
"""

from __future__ import annotations

import argparse
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Generator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import cast

import msgspec
from report import Report, argument_parser

from shipworthy.app.founding import make_project
from shipworthy.app.session import Session
from shipworthy.domain import rollout as machine
from shipworthy.domain.contract import Contract, Tensor
from shipworthy.domain.names import Stage
from shipworthy.domain.plan import Arm, Capture, Endpoint, Key, Plan, Snapshot
from shipworthy.domain.policy import Policy, with_preset
from shipworthy.domain.records import InferenceRecord, Outcome
from shipworthy.domain.routing import choose
from shipworthy.gateway.call import Call
from shipworthy.gateway.capture import Capture as Writes
from shipworthy.gateway.http import Client, Request
from shipworthy.gateway.metrics import Metrics
from shipworthy.gateway.options import GatewayOptions
from shipworthy.gateway.parts import Outside, assemble
from shipworthy.gateway.tickets import TicketOffice
from shipworthy.gateway.upstream import Upstream
from shipworthy.protocols.outcomes import Reason
from shipworthy.stores.journal import JournalWriter
from shipworthy.stores.lake import questions as asked
from shipworthy.stores.lake.inventory import current_files
from shipworthy.stores.lake.query import Lake
from shipworthy.stores.lake.questions import Span
from shipworthy.stores.lake.state import load_condition

MODEL, ROLLOUT, CANDIDATE, STABLE = (
    "digits",
    "rol_bench",
    "sha256:" + "c" * 64,
    "sha256:" + "a" * 64,
)
DAYS = 7
UNITS = 300_000
COUNTRIES = ("DE", "FR", "US", "JP", "BR")
BACKLOG = 192 * 1024 * 1024  # bytes of journal at which this process waits for the writer
TICKS = os.sysconf("SC_CLK_TCK")
PAGE = os.sysconf("SC_PAGE_SIZE")
DIGITS = [b"%d.0" % (value % 17) for value in range(256)]


# --- records ------------------------------------------------------------------------------------


class Traffic:
    """Requests that look like the demo's, each with a body of its own."""

    def __init__(self, seed: int, payload: int) -> None:
        self._random = random.Random(seed)
        self._office = TicketOffice(b"k" * 32, worker=b"w000")
        self._features = max(1, (payload - 190) * 2 // 9)
        self._units = [f"{self._random.getrandbits(64):016x}" for _ in range(UNITS)]
        self._encode = msgspec.json.Encoder().encode

    def bodies(self) -> tuple[bytes, bytes]:
        """A request and its answer."""
        draw = self._random
        data = b",".join([DIGITS[byte] for byte in draw.randbytes(self._features)])
        request = (
            b'{"inputs":[{"name":"features","datatype":"FP64","shape":[1,%d],"data":[%s]}]}'
            % (self._features, data)
        )
        answer = (
            b'{"model_name":"digits","model_version":"1","outputs":[{"name":"label",'
            b'"datatype":"INT64","shape":[1],"data":[%d]}]}' % draw.randrange(10)
        )
        return request, answer

    def record(self, at: float) -> InferenceRecord:
        """One request of a healthy rollout at 5%, with 0.3% failures in both arms."""
        draw = self._random
        unit = draw.choice(self._units)
        candidate = int(unit[:4], 16) % 20 == 0
        arm = "candidate" if candidate else "stable"
        failed = draw.random() < 0.003
        request, answer = self.bodies()
        seconds = draw.lognormvariate(-4.0, 0.6)
        release = f"digits@{2 if candidate else 1}"
        return InferenceRecord(
            id=self._office.issue(at=at, key="shop", arm=arm, unit=unit),
            at=at,
            plan=MODEL,
            model=MODEL,
            revision=1,
            key="shop",
            assigned=arm,
            probability=0.05 if candidate else 0.95,
            outcome=Outcome.FAILURE if failed else Outcome.SUCCESS,
            status=200,
            release=release,
            rollout=ROLLOUT,
            unit=unit,
            serving="stable" if failed else arm,
            serving_release="digits@1" if failed else release,
            reason="server_error" if failed else "answered",
            seconds=seconds,
            attempt_seconds=seconds,
            sent=at if candidate else None,
            attempts=1 + failed,
            slices={"country": draw.choice(COUNTRIES)},
            request_bytes=len(request),
            response_bytes=len(answer),
            request=request,
            response=answer,
        )


# --- the gateway's share ------------------------------------------------------------------------


def capture_cost(folder: Path, traffic: Traffic, count: int) -> float:
    """CPU in microseconds that a worker spends on keeping one call: record, journal and counts."""
    contract = Contract(
        inputs=(Tensor("features", "FP64", (-1, 64)),), outputs=(), side_effects="none"
    )
    arm = Arm(
        release="digits@1",
        digest=STABLE,
        version=1,
        endpoints=(Endpoint(url="http://127.0.0.1:1"),),
        served_model=MODEL,
        contract=contract,
    )
    plan = Plan(
        name=MODEL, model=MODEL, revision=1, fence=1, stable=arm, capture=Capture(payloads="full")
    )
    options = GatewayOptions()
    journal = JournalWriter(folder, "w0", 4 * 2**30)
    outside = Outside(
        journal=journal,
        newest_snapshot=lambda: None,
        signing_secret=bytes(32),
        pseudonym_secret=bytes(32),
        clock=time.time,
        uniform=random.random,
    )
    parts = assemble(options, outside, Upstream(options, lambda _: None), Metrics(), b"0000")
    parts.fleet.obey(Snapshot(written=0.0, plans={MODEL: plan}, keys={}))
    live = parts.fleet.plans[MODEL]
    key = Key(id="shop", hash="", role="client")
    writes = Writes(parts)
    request = Request(cast("Client", None))
    request.body, answer = traffic.bodies()
    choice = choose(plan, None, now=0.0, uniform=0.5)
    call = Call(request, live, live.stable, choice, key, pinned=False)
    call.id, call.unit, call.slices = "inf_" + "A" * 62, "0123456789abcdef", {"country": "DE"}
    call.answered_by, call.serving, call.first_seconds = "stable", live.stable, 0.01
    call.judge(Reason.ANSWERED)
    started = time.process_time()
    for _ in range(count):
        writes.write(call, status=200, response=answer, seconds=0.01)
    whole = time.process_time() - started
    journal.close()
    assert not journal.dropped, journal.dropped
    return whole / count * 1e6


# --- the processes ------------------------------------------------------------------------------


class Process:
    """A process of the project's, and what the kernel says of it."""

    def __init__(self, module: str, project: Path, log: Path) -> None:
        self.rss: list[float] = []
        self._log = log.open("wb")
        self._child = subprocess.Popen(
            [sys.executable, "-m", f"shipworthy.app.{module}", str(project)],
            stdin=subprocess.PIPE,
            stdout=self._log,
            stderr=subprocess.STDOUT,
        )
        self._stat = Path(f"/proc/{self._child.pid}")

    def cpu_seconds(self) -> float:
        """CPU used so far, user and system, all threads."""
        fields = (self._stat / "stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / TICKS

    def sample(self) -> None:
        """Note the resident memory in MB."""
        self.rss.append(int((self._stat / "statm").read_text().split()[1]) * PAGE / 1e6)

    def check(self) -> None:
        """Fail when it has ended."""
        if self._child.poll() is not None:
            sys.exit(f"{self._log.name}: " + Path(self._log.name).read_text())

    def stop(self) -> None:
        """End it in order."""
        self._child.terminate()
        self._child.wait(60)
        self._log.close()


@contextmanager
def processes(session: Session) -> Generator[tuple[Process, Process]]:
    """The keeper and the lake's writer, with their memory noted every half second."""
    root = session.project.root
    keeper = Process("keeping", root, root / "keeper.log")
    writer = Process("lake_writing", root, root / "writer.log")
    done = threading.Event()

    def watch() -> None:
        while not done.wait(0.5):
            keeper.sample()
            writer.sample()

    watching = threading.Thread(target=watch)
    watching.start()
    try:
        yield keeper, writer
    finally:
        done.set()
        watching.join()
        writer.stop()
        keeper.stop()


def begin_rollout(session: Session) -> None:
    """A rollout at 5% that never has enough, so that the keeper has all its work to do."""
    steps = [{"weight": "5%", "requests": 10**9}]
    rollout = {"steps": steps, "step_limit": "300d"}
    document = {"model": MODEL, "preset": "standard", "rollout": rollout}
    policy = Policy.model_validate(with_preset(document))
    now = time.time()
    state = machine.begin(
        id=ROLLOUT,
        model=MODEL,
        candidate=(CANDIDATE, "digits@2"),
        stable=(STABLE, "digits@1"),
        policy=policy,
        now=now,
    )
    with session.ledger.write() as tx:
        tx.rollouts.save(machine.expose(state, revision=1, now=now).state)
        assert not tx.stages.history(MODEL, Stage.PRODUCTION)


def backlog(session: Session) -> int:
    """Bytes of journals that are still there."""
    total = 0
    for file in session.project.journals.glob("*.journal"):
        try:
            total += file.stat().st_size
        except FileNotFoundError:
            continue
    return total


def feed(session: Session, traffic: Traffic, count: int, writer: Process, keeper: Process) -> None:
    """Write that many records, spread over the last days."""
    journal = JournalWriter(session.project.journals, "worker-0", 2**30)
    begin = time.time() - DAYS * 86_400
    pace = DAYS * 86_400 / count
    for number in range(count):
        if number % 5_000 == 0:
            writer.check()
            keeper.check()
            while backlog(session) > BACKLOG:
                time.sleep(0.05)
                writer.check()
        if not journal.append(traffic.record(begin + number * pace)):
            sys.exit(f"the journal dropped a record: {dict(journal.dropped)}")
    journal.close()


def caught_up(session: Session, count: int, writer: Process, keeper: Process) -> None:
    """Wait until the lake has that many inferences and the keeper has read all journals."""
    while True:
        writer.check()
        keeper.check()
        condition = load_condition(session.project.lake_condition)
        if condition is not None and condition.records >= count and not backlog(session):
            return
        time.sleep(0.2)


def lag(session: Session, traffic: Traffic, rate: int, seconds: float) -> tuple[list[float], int]:
    """How far the lake is behind under a steady load, and how many records that was."""
    journal = JournalWriter(session.project.journals, "worker-1", 2**30)
    started = time.monotonic()
    written, behind, looked = 0, list[float](), 0.0
    while (passed := time.monotonic() - started) < seconds:
        while written < passed * rate:
            journal.append(traffic.record(time.time()))
            written += 1
        if passed - looked > 0.5:
            looked = passed
            condition = load_condition(session.project.lake_condition)
            if condition is not None and passed > 5:
                behind.append(time.time() - condition.complete)
        time.sleep(0.005)
    journal.close()
    return behind, written


def questions(until: float, id_: str) -> dict[str, str]:
    """What a dashboard asks: of the last hour, of the last day, and of the whole week."""
    hour, day, week = (Span(until - seconds, until, MODEL) for seconds in (3600, 86_400, 604_800))
    return {
        "traffic of the last hour": asked.traffic(hour),
        "traffic of a day, by 5 minutes": asked.traffic(day, 300),
        "traffic of all, by hour": asked.traffic(week, 3600),
        "latency of a day": asked.latency(day),
        "latency of all": asked.latency(week),
        "latency of all, by hour": asked.latency(week, 3600),
        "reasons of failure, all": asked.reasons(week),
        "by slice, all": asked.slices(week),
        "newest failures": asked.newest_failures(week),
        "one inference with its feedback": asked.one_inference(id_),
    }


def ask(session: Session, times: int) -> dict[str, list[float]]:
    """Milliseconds that each question took, each asked in turn so that none stays warm alone."""
    took: dict[str, list[float]] = {}
    with closing(Lake(session.project.lake)) as lake:
        (newest,) = lake.rows("SELECT max(time) AS time, arg_max(id, time) AS id FROM inferences")
        asking = questions(newest["time"].timestamp() + 1, newest["id"])
        for turn in range(times + 1):
            for name, sql in asking.items():
                started = time.perf_counter()
                rows = lake.rows(sql)
                passed = (time.perf_counter() - started) * 1000
                assert rows, name
                if turn:  # the first look at a file is the disk's
                    took.setdefault(name, []).append(passed)
    return took


def counted(session: Session, count: int) -> int:
    """How many records the lake has: each that was written, once; else there is no figure."""
    with closing(Lake(session.project.lake)) as lake:
        (found,) = lake.rows(
            "SELECT count(*) AS n, (SELECT sum(requests) FROM minutes WHERE slice = '') AS m"
            " FROM inferences"
        )
    if not found["n"] == found["m"] == count:
        sys.exit(f"{count} records were written; the lake has {found}")
    return count


def percentile(values: list[float], share: float) -> float:
    """The value that this share of them does not exceed."""
    return sorted(values)[min(len(values) - 1, int(len(values) * share))]


def main() -> None:
    """Run it all."""
    parser = argument_parser(__doc__)
    parser.add_argument("--records", type=int, default=10_000_000, help="default: 10 million")
    parser.add_argument("--payload", type=int, default=512, help="bytes of request and answer")
    parser.add_argument(
        "--folder", type=Path, help="where the project is made; needs 1 kB a record"
    )
    options = parser.parse_args()
    report = Report(
        f"{options.records:,} records from journal to dashboard",
        ("what", "figure", "limit", "how"),
        "deltalake",
        "duckdb",
    )
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        run(Path(name), options, report)
    report.finish(options.json)


def run(folder: Path, options: argparse.Namespace, report: Report) -> None:
    """All parts, in one project."""
    traffic, count = Traffic(options.seed, options.payload), options.records
    body = sum(map(len, traffic.bodies()))
    captured = capture_cost(folder / "capture", traffic, 200_000)
    how = "all that keeping a request costs: its record, the journal, the counts"
    report.row("gateway CPU a record", f"{captured:.1f} µs", "15 µs", how)
    report.figure("gateway_us_per_record", captured)

    session = make_project(folder / "project", preset="prototype", solo=True)
    begin_rollout(session)
    with processes(session) as (keeper, writer):
        before = writer.cpu_seconds()
        started = time.monotonic()
        feed(session, traffic, count, writer, keeper)
        caught_up(session, count, writer, keeper)
        wall, cpu = time.monotonic() - started, writer.cpu_seconds() - before
        report.row(
            "journal to lake",
            f"{count / cpu:,.0f}/s",
            "20,000/s",
            f"a core, {body} B bodies; by the clock {count / wall:,.0f}/s beside keeper and source",
        )
        report.figure("records_per_s", count / cpu)
        report.row(
            "keeper CPU a record",
            f"{keeper.cpu_seconds() / count * 1e6:.1f} µs",
            "",
            "with a rollout under way",
        )
        middle = len(keeper.rss) // 4
        steady = keeper.rss[middle:]
        report.row(
            "keeper memory",
            f"{max(steady):.0f} MB",
            "flat",
            f"{min(steady):.0f} to {max(steady):.0f} MB from the first quarter on",
        )
        report.figure("keeper_rss_mb", max(steady))
        report.figure("keeper_rss_growth_mb", max(keeper.rss[-20:]) - steady[0])
        report.row("lake writer memory", f"{max(writer.rss):.0f} MB", "", "at most")
        report.figure("lake_writer_rss_mb", max(writer.rss))
        behind, lagged = lag(session, traffic, 500, 30.0)
        report.row(
            "lag",
            f"{percentile(behind, 0.95):.1f} s",
            "",
            "p95 at 500/s; records are moved every 2 s",
        )
        report.figure("lag_p95_s", percentile(behind, 0.95))
        caught_up(session, count + lagged, writer, keeper)
    size = sum(file.stat().st_size for file in current_files(session.project.lake))
    total = counted(session, count + lagged)
    report.row(
        "disk a record", f"{size / total:.0f} B", "", f"all tables and logs; {body} B are bodies"
    )
    report.figure("bytes_per_record", size / total)
    report.section()
    took = ask(session, 20)
    for question, each in took.items():
        report.row(
            question,
            f"{percentile(each, 0.95):.0f} ms",
            "200 ms",
            f"p50 {percentile(each, 0.5):.0f} ms",
        )
    every = [one for each in took.values() for one in each]
    report.figure("query_p95_ms", percentile(every, 0.95))
    report.figure("query_slowest_p95_ms", max(percentile(each, 0.95) for each in took.values()))


if __name__ == "__main__":
    main()
