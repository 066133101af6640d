"""Kills whatever a project consists of, under load, and sees that nothing acknowledged is lost.

Clients write down each inference and each feedback that was acknowledged, people promote good and
bad candidates, and gateway, keepers, lake writer, replicas, `up` itself and the database are
killed, stopped for a while or restarted. Afterwards each acknowledged record has to be in the lake
exactly once, the lake has to agree with the ledger, each rollout to have gone a legal way, and the
audit chain to hold. Exit code 1 when anything is off.

    python bench/chaos.py [--kills 100] [--seed 2026] [--ledger sqlite|postgres] [--json FILE]
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Generator
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import msgspec
from aftermath import Acknowledged, Problem, examine, left_running
from postgres import PostgresServer
from report import Report, argument_parser
from storm import Blow, Database, Load, Promoter, Tormentor, Town, found

SETTLE_SECONDS = 120.0
_FIRST_ANSWER_SECONDS = 90.0


@dataclass(slots=True)
class Outcome:
    """What a storm did, and what was wrong behind it."""

    acknowledged: Acknowledged
    seen: Counter[str]
    user_errors: int
    blows: list[Blow]
    takeovers: list[float]
    rollouts: Counter[str] = field(default_factory=Counter[str])
    problems: list[Problem] = field(default_factory=list[Problem])
    settled: float = 0.0
    lasted: float = 0.0

    def count(self, kind: str) -> int:
        """How many records problems of a kind are about."""
        return sum(problem.times for problem in self.problems if problem.kind == kind)


async def storm(
    town: Town, *, kills: int, seed: int, rate: float, database: Database | None
) -> Outcome:
    """Let it blow, let it settle, stop everything and look."""
    rng = random.Random(seed)
    this = asyncio.current_task()
    assert this is not None
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, this.cancel)
    load = Load(town, random.Random(rng.random()), rate=rate)
    promoter = Promoter(town, random.Random(rng.random()))
    tormentor = Tormentor(town, random.Random(rng.random()), database)
    await town.start()
    try:
        await promoter.begin(ahead=kills // 20)
        began = time.monotonic()
        at_work = [asyncio.create_task(load.run())]
        await _answering(load)
        load.seen.clear()
        at_work.append(asyncio.create_task(promoter.run()))
        await _until_done(asyncio.create_task(tormentor.run(kills, _tell)), at_work)
        lasted = time.monotonic() - began
        outcome = Outcome(
            load.acknowledged,
            load.seen,
            load.user_errors,
            tormentor.blows,
            tormentor.takeovers,
            lasted=lasted,
        )
        outcome.settled = await _settle(town, load.acknowledged)
        code = await town.end(signal.SIGTERM)
        if code != 0:
            outcome.problems.append(Problem("up", f"'shipworthy up' ended with {code}"))
    finally:
        if town.up is not None and town.up.returncode is None:
            await town.end(signal.SIGKILL)
    outcome.problems += examine(town.session.project, load.acknowledged)
    outcome.problems += await _nobody_left(town)
    if await town.sw("audit", "verify") != 0:
        outcome.problems.append(Problem("audit", "'shipworthy audit verify' says no"))
    outcome.rollouts = town.rollouts()
    return outcome


async def _answering(load: Load) -> None:
    deadline = time.monotonic() + _FIRST_ANSWER_SECONDS
    while load.seen["answered"] < 20:
        if time.monotonic() > deadline:
            raise TimeoutError(f"nothing answers: {dict(load.seen)}")
        await asyncio.sleep(0.1)


async def _until_done(strikes: asyncio.Task[None], at_work: list[asyncio.Task[None]]) -> None:
    """Wait for the tormentor, and pass on what breaks in the others meanwhile."""
    tasks = [strikes, *at_work]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _settle(town: Town, acknowledged: Acknowledged) -> float:
    """Wait until keeper and lake writer have caught up, or long enough; the seconds that took."""
    began = time.monotonic()
    while time.monotonic() < began + SETTLE_SECONDS:
        with contextlib.suppress(Exception):  # the lake is being compacted meanwhile
            if not await asyncio.to_thread(examine, town.session.project, acknowledged):
                break
        await asyncio.sleep(0.5)
    return time.monotonic() - began


async def _nobody_left(town: Town) -> list[Problem]:
    deadline = time.monotonic() + 20.0
    while True:
        left = left_running(town.session.project)
        if not left or time.monotonic() > deadline:
            return left
        await asyncio.sleep(0.1)


def _tell(blow: Blow) -> None:
    if sys.stdout.isatty():
        print(f"{blow.at:7.1f} s  {blow.target:<13} {blow.what}")


# --- reporting ------------------------------------------------------------------------------------


def report_on(outcome: Outcome, report: Report) -> None:
    """Fill in rows and figures."""
    struck = Counter((blow.target, blow.what.split(" for ")[0]) for blow in outcome.blows)
    for (target, what), count in sorted(struck.items()):
        report.row(target, what, f"{count}")
    report.section()
    acknowledged, seen = outcome.acknowledged, outcome.seen
    asked = seen["answered"] + seen["nonsense"] + seen["feedback"] + outcome.user_errors
    refused = seen["refused"] + seen["feedback refused"]
    figures = {
        "kills": len(outcome.blows),
        "seconds": outcome.lasted,
        "requests": asked,
        "acknowledged": len(acknowledged.inferences) + len(acknowledged.feedback),
        "lost": outcome.count("lost"),
        "doubled": outcome.count("doubled"),
        "problems": len(outcome.problems),
        "user_errors": outcome.user_errors,
        "user_errors_refused": refused,
        "user_errors_broken": seen["broken"] + seen["feedback broken"],
        "user_errors_5xx": seen["5xx"],
        "user_errors_late": seen["late"],
        "settle_seconds": outcome.settled,
        "takeover_seconds_median": median(outcome.takeovers) if outcome.takeovers else None,
        "takeover_seconds_longest": max(outcome.takeovers, default=None),
    }
    for target, count in sorted(Counter(blow.target for blow in outcome.blows).items()):
        figures[f"kills_{target.replace(' ', '_')}"] = count
    for status, count in sorted(outcome.rollouts.items()):
        figures[f"rollouts_{status}"] = count
    for name, value in figures.items():
        report.figure(name, value)
        report.row(name.replace("_", " "), "", f"{report.figures[name]:,}" if value else f"{value}")
    by_status = [f"{count} × {kind}" for kind, count in sorted(seen.items()) if "status" in kind]
    if by_status:
        report.note(f"answers other than 200, 202 and 400: {', '.join(by_status)}")
    for problem in outcome.problems:
        report.note(f"{problem.kind}: {problem.text}")
    if not outcome.problems:
        report.note("Nothing is lost, doubled or out of line.")


@contextlib.contextmanager
def _folder(keep: Path | None) -> Generator[Path]:
    if keep is not None:
        yield keep
        return
    folder = Path(tempfile.mkdtemp(prefix="chaos-"))
    yield folder
    shutil.rmtree(folder)  # what failed stays to be looked at


@dataclass(frozen=True, slots=True)
class Server:
    """The PostgreSQL server of a storm, as the tormentor sees it."""

    server: PostgresServer

    def crash(self, seconds: float) -> None:
        """Stop it at once, as a crash would, and start it again so much later."""
        self.server.stop(signal.SIGQUIT)
        time.sleep(seconds)
        self.server.start()

    def cut_off(self) -> None:
        """End all connections to it."""
        self.server.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = 'ledger'"
        )


@contextlib.contextmanager
def _database(ledger: str) -> Generator[tuple[str | None, Database | None]]:
    if ledger == "sqlite":
        yield None, None
        return
    with PostgresServer(fsync=True) as server:
        yield server.create("ledger"), Server(server)


def main() -> int:
    parser = argument_parser(__doc__)
    parser.add_argument("--kills", type=int, default=100, help="how many times to strike")
    parser.add_argument("--ledger", choices=("sqlite", "postgres"), default="sqlite")
    parser.add_argument("--rate", type=float, default=60.0, help="requests a second")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="keep the project here")
    options = parser.parse_args()
    report = Report(
        f"{options.kills} kills on {options.ledger}, seed {options.seed}",
        ("what", "how", "count"),
        *("deltalake", "duckdb", "sqlalchemy"),
    )
    os.environ.pop("SHIPWORTHY_KEY", None)
    with _folder(options.keep) as folder, _database(options.ledger) as (url, database):
        town = found(folder / "project", url)
        outcome = asyncio.run(
            storm(
                town, kills=options.kills, seed=options.seed, rate=options.rate, database=database
            )
        )
        (folder / "acknowledged.json").write_bytes(msgspec.json.encode(outcome.acknowledged))
        report_on(outcome, report)
        report.finish(options.json)
        if outcome.problems:
            print(f"what is left of it: {folder}")
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
