"""What a request costs through our gateway and through others, side by side in one run.

On loopback, before an nginx that answers at once: CPU a request of all processes of a gateway,
latency and throughput under wrk; latency at a fixed rate, whatever is still under way; how much
later the first word of a stream comes; memory with idle streams and over many requests. Ours runs
with all on that production has, the others with the least that they can do. Rounds take turns.

    python bench/gateway.py --install
    python bench/gateway.py [--only NAME] [--quick] [--json FILE]

The others are tensorzero, envoy, vllm, portkey and litellm, from their packages. Exit code 1 when
one of them or a measurement is missing.
"""

from __future__ import annotations

import os
import signal
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import median

import msgspec
from open_loop import Open, open_loop, percentile
from own import INFER_REQUEST, check_own, infer_service, own_gateway, tidy
from peers import PEERS, Peer, Service
from report import Report, argument_parser
from streams import first_words, held, post
from upstreams import Unusable, nginx, streaming
from wrk import UNIT_HEADER, Closed, Wrk

RATE = 2000
_SLOWER = (1000, 500, 200, 100, 50, 20, 10, 5)  # for those that can't do that
_SHARE = 0.75  # of the throughput at 32 connections that a rate may be
_UNITS = 200
STREAMS = 1000
MARKS = (50_000, 100_000, 150_000, 200_000)
_SYSTEM = "You answer questions about our kitchen appliances, in a friendly tone and short."
_QUESTION = "How long is the warranty of the blue kettle, and can I extend it after a year?"
_TURN = "It boils a litre in two minutes and switches itself off; descale it once a month, please. "


@dataclass(frozen=True)
class Cell:
    """One way to load: how many connections, and how large a body in bytes."""

    name: str
    connections: int
    size: int


CELLS = (
    Cell("c1_small", 1, 300),
    Cell("c1_large", 1, 8192),
    Cell("c32_small", 32, 300),
    Cell("c32_large", 32, 8192),
)
FIRST, BUSY = CELLS[0], CELLS[2]
OIP = Cell("oip", 1, len(INFER_REQUEST))


@dataclass(frozen=True)
class Pace:
    """How long each part takes."""

    rounds: int = 3
    seconds: float = 4.0
    open_seconds: float = 5.0
    warm_up: float = 3.0
    turns: int = 300
    streams: int = STREAMS
    marks: tuple[int, ...] = MARKS


QUICK = Pace(1, 1.0, 1.0, 1.0, 20, 100, tuple(mark // 20 for mark in MARKS))


@dataclass
class Seen:
    """What was measured of one service, a value for each round."""

    cpu: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    closed: dict[str, list[Closed]] = field(default_factory=lambda: defaultdict(list))
    open: list[Open] = field(default_factory=list[Open])
    added: list[float] = field(default_factory=list[float])
    streaming_mb: float | None = None

    def cpu_us(self, cell: Cell) -> float | None:
        """CPU in microseconds a request."""
        return median(self.cpu[cell.name]) * 1e6 if self.cpu[cell.name] else None

    def of(self, cell: Cell, figure: Callable[[Closed], float]) -> float | None:
        """The median of what wrk saw."""
        return median(map(figure, self.closed[cell.name])) if self.closed[cell.name] else None

    def opened(self, figure: Callable[[Open], float]) -> float | None:
        """The median of what came of a fixed rate."""
        return median(map(figure, self.open)) if self.open else None


class Bench:
    """One run over all services, and what went wrong in it."""

    def __init__(self, folder: Path, homes: Path, peers: Sequence[Peer], pace: Pace) -> None:
        self.folder, self.homes, self.peers, self.pace = folder, homes, peers, pace
        self.seen: dict[str, Seen] = defaultdict(Seen)
        self.problems: list[str] = []
        self.growth: list[tuple[int, float]] = []
        self.wrk = Wrk(folder / "wrk")
        self._broken: set[str] = set()

    def run(self) -> None:
        """All parts."""
        with ExitStack() as stack:
            port = stack.enter_context(nginx(self.folder / "nginx"))
            started = self._start(stack, port, "closed")
            services = [Service("direct", port), *started]
            self._warm_up(services)
            pair = self._pair(stack, port)
            for turn in range(self.pace.rounds):
                say(f"round {turn + 1} of {self.pace.rounds}")
                self._round(services)
                for service in pair:
                    body = chat(service, BUSY.size)
                    self._attempt("two workers", partial(self._closed, service, BUSY, body))
            for turn in range(self.pace.rounds):
                say(f"fixed rate, round {turn + 1} of {self.pace.rounds}")
                for service in [*services, *pair]:
                    self._attempt(f"{service.name} at a fixed rate", partial(self._open, service))
            for service in [*pair, *(one for one in started if one.name == "ours")]:
                self._attempt(service.name, partial(check_own, service))
        with ExitStack() as stack:
            port = stack.enter_context(streaming())
            say("streams")
            self._streams([Service("direct", port), *self._start(stack, port, "streams")])
        with ExitStack() as stack:
            port = stack.enter_context(nginx(self.folder / "nginx-again"))
            say("memory")
            self._attempt("memory over many requests", partial(self._memory, stack, port))

    # --- starting -----------------------------------------------------------------------------

    def _start(self, stack: ExitStack, upstream: int, part: str) -> list[Service]:
        services: list[Service] = []
        ours = partial(own_gateway, self.folder / f"ours-{part}", upstream)
        starts = {"ours": ours} | {
            peer.name: partial(peer.running, self.homes, self.folder / part / peer.name, upstream)
            for peer in self.peers
        }
        for name, start in starts.items():
            if name in self._broken:
                continue
            try:
                services.append(stack.enter_context(start()))
            except Unusable as unusable:
                self._broken.add(name)
                self._problem(str(unusable))
        return services

    def _pair(self, stack: ExitStack, upstream: int) -> list[Service]:
        """Two workers of ours on one port, once one has worked."""
        if "ours" in self._broken:
            return []
        name, folder = "ours_2_workers", self.folder / "ours-pair"
        try:
            return [stack.enter_context(own_gateway(folder, upstream, name=name, workers=2))]
        except Unusable as unusable:
            self._problem(f"two workers: {unusable}")
            return []

    def _warm_up(self, services: list[Service]) -> None:
        for service in services:
            self._attempt(
                f"{service.name}, warming up",
                partial(self._load, service, chat(service, 300), 8, self.pace.warm_up),
            )

    def _attempt(self, what: str, part: Callable[[], object]) -> None:
        """Do a part; what it can't do is a problem of the run, and no end of it."""
        try:
            part()
        except Unusable as unusable:
            self._problem(f"{what}: {unusable}")

    def _problem(self, text: str) -> None:
        say(f"! {text}")
        self.problems.append(text)

    # --- parts --------------------------------------------------------------------------------

    def _round(self, services: list[Service]) -> None:
        for cell in CELLS:
            for service in services:
                body = chat(service, cell.size)
                self._attempt(
                    f"{service.name} {cell.name}", partial(self._closed, service, cell, body)
                )
        for service in services:
            if service.name == "ours":
                asked = infer_service(service)
                self._attempt("ours oip", partial(self._closed, asked, OIP, INFER_REQUEST))

    def _load(self, service: Service, body: bytes, connections: int, seconds: float) -> Closed:
        closed = self.wrk.run(
            service.port,
            service.path,
            service.headers,
            body,
            connections=connections,
            seconds=seconds,
        )
        self._tidy()
        return closed

    def _tidy(self) -> None:
        for folder in self.folder.glob("ours-*"):
            tidy(folder)

    def _closed(self, service: Service, cell: Cell, body: bytes) -> None:
        before = service.cpu_seconds()
        closed = self._load(service, body, cell.connections, self.pace.seconds)
        spent = service.cpu_seconds() - before
        seen = self.seen[service.name]
        seen.closed[cell.name].append(closed)
        # wrk leaves as many requests unanswered as it has connections; they cost as well.
        if service.group is not None and closed.requests >= 20 * cell.connections:
            seen.cpu[cell.name].append(spent / closed.requests)

    def _open(self, service: Service) -> None:
        seen = self.seen[service.name]
        if seen.open:
            at = seen.open[0].rate
        else:
            limit = max(map(rate, seen.closed[BUSY.name]), default=0.0) * _SHARE
            can = [pace for pace in (RATE, *_SLOWER) if pace <= limit]
            own = service.name.startswith("ours")
            at = RATE if own else next(iter(can), _SLOWER[-1])
        body = chat(service, FIRST.size)
        requests = [post(service, body, **{UNIT_HEADER: f"user-{n}"}) for n in range(_UNITS)]
        opened = open_loop(service.port, requests, rate=at, seconds=self.pace.open_seconds)
        self._tidy()
        if opened.failed or opened.unanswered:
            raise Unusable(
                f"{opened.failed} errors, {opened.unanswered} unanswered at {at} requests/s"
            )
        seen.open.append(opened)

    def _streams(self, services: list[Service]) -> None:
        good = [services[0]]
        for service in services[1:]:
            try:
                first_words([service], 1)
                good.append(service)
            except Unusable as unusable:
                self._problem(str(unusable))
        self._attempt("first words", partial(self._first_words, good))
        for service in good[1:]:
            self._attempt(f"{service.name}, idle streams", partial(self._hold, service))

    def _first_words(self, services: list[Service]) -> None:
        took = first_words(services, self.pace.turns)
        for service in services[1:]:
            pairs = zip(took["direct"], took[service.name], strict=True)
            self.seen[service.name].added = sorted(there - direct for direct, there in pairs)

    def _hold(self, service: Service) -> None:
        _, self.seen[service.name].streaming_mb = held(service, self.pace.streams)

    def _memory(self, stack: ExitStack, upstream: int) -> None:
        if "ours" in self._broken:
            return
        service = stack.enter_context(own_gateway(self.folder / "ours-memory", upstream))
        body, done, speed = chat(service, FIRST.size), 0, 1000.0
        for mark in self.pace.marks:
            while done < mark:
                closed = self._load(service, body, 32, min(10.0, (mark - done) / speed))
                done, speed = done + closed.requests, closed.rate
            self.growth.append((done, service.rss_mb()))
        check_own(service)


def chat(service: Service, size: int) -> bytes:
    """A chat request of that many bytes: a question, behind as much talk as it takes."""

    def body(talk: str) -> bytes:
        messages = [{"role": "system", "content": _SYSTEM}]
        if talk:
            messages += [
                {"role": "user", "content": "Tell me all about it."},
                {"role": "assistant", "content": talk},
            ]
        messages.append({"role": "user", "content": _QUESTION})
        document = {"model": service.model, "messages": messages, "temperature": 0.2}
        return msgspec.json.encode(document)

    missing = size - len(body("-")) + 1
    if missing < len(_TURN):
        return body("")
    return body((_TURN * (missing // len(_TURN) + 1))[:missing])


def say(text: str) -> None:
    """Tell how far it is."""
    print(text, file=sys.stderr, flush=True)


# --- telling ------------------------------------------------------------------------------------


def tell(bench: Bench, report: Report) -> None:
    """Fill the table and the figures."""
    for name in ("direct", "ours", *(peer.name for peer in bench.peers)):
        seen = bench.seen[name]
        row(report, name, seen)
        figures(report, name, seen)
    ours = bench.seen["ours"]
    compare(report, ours, {peer.name: bench.seen[peer.name] for peer in bench.peers})
    if ours.cpu[OIP.name]:
        spent = ours.cpu_us(OIP)
        report.note(f"an OIP inference of 64 numbers: {number(spent)} µs CPU of ours")
    pair = bench.seen["ours_2_workers"]
    if pair.closed[BUSY.name] and pair.open:
        report.figure("rps.ours_2_workers", pair.of(BUSY, rate))
        report.figure("p99_ms.ours_2_workers", in_ms(pair.opened(most)))
        report.note(
            f"two workers of ours: {number(pair.of(BUSY, rate))} requests/s at 32 connections,"
            f" p99 {milliseconds(pair.opened(most))} ms at {RATE:,} requests/s"
        )
    for requests, megabytes in bench.growth:
        report.figure(f"rss_mb.after_{requests // 1000}k", megabytes)
    if bench.growth:
        told = ", ".join(f"{mb:.1f} MB after {requests:,}" for requests, mb in bench.growth)
        report.note(f"memory of ours: {told} requests")
        report.figure("rss_growth_mb", bench.growth[-1][1] - bench.growth[0][1])
    used = {peer.name: peer.version(bench.homes) for peer in bench.peers}
    report.note(", ".join(f"{name} {version or 'missing'}" for name, version in used.items()))
    for name, version in used.items():
        report.figure(f"version.{name}", version)
    for problem in bench.problems:
        report.note(f"! {problem}")
    report.figure("problems", len(bench.problems))


def row(report: Report, name: str, seen: Seen) -> None:
    """One line of the table."""
    at = seen.open[0].rate if seen.open else None
    opened = [milliseconds(seen.opened(figure)) for figure in (half, most)]
    report.row(
        name,
        *(number(seen.cpu_us(cell)) for cell in CELLS),
        milliseconds(seen.of(FIRST, half)),
        number(seen.of(BUSY, rate)),
        "–" if at is None else f"{' / '.join(opened)} at {at:,}",
        " / ".join(milliseconds(percentile(seen.added, share)) for share in (0.5, 0.99))
        if seen.added
        else "–",
        number(seen.streaming_mb),
    )


def figures(report: Report, name: str, seen: Seen) -> None:
    """The figures of one service: the headline by its name alone, the rest by cell."""
    for cell in (*CELLS, OIP):
        if seen.cpu[cell.name]:
            report.figure(f"cpu_us.{name}.{cell.name}", seen.cpu_us(cell))
        if seen.closed[cell.name]:
            report.figure(f"rps.{name}.{cell.name}", seen.of(cell, rate))
            report.figure(f"p50_ms.{name}.{cell.name}", in_ms(seen.of(cell, half)))
            report.figure(f"p99_ms.{name}.{cell.name}", in_ms(seen.of(cell, most)))
    at = seen.open[0].rate if seen.open else None
    headlines = {
        f"cpu_us.{name}": seen.cpu_us(FIRST),
        f"p50_ms.{name}": in_ms(seen.of(FIRST, half)),
        f"rps.{name}": seen.of(BUSY, rate),
        f"p50_ms.{name}.at_{at}": in_ms(seen.opened(half)),
        f"p99_ms.{name}.at_{at}": in_ms(seen.opened(most)),
        f"p99_ms.{name}": in_ms(seen.opened(most)) if at == RATE else None,
    }
    where = "" if name == "ours" else f".{name}"
    if seen.added:
        headlines[f"ttft_added_ms{where}.p50"] = percentile(seen.added, 0.5) * 1e3
        headlines[f"ttft_added_ms{where}.p99"] = percentile(seen.added, 0.99) * 1e3
    headlines[f"rss_mb{where}"] = seen.streaming_mb
    for figure, value in headlines.items():
        if value is not None:
            report.figure(figure, value)


def compare(report: Report, ours: Seen, peers: dict[str, Seen]) -> None:
    """What ours costs as a share of what each peer does, round by round: a noisy one hits both."""
    for name, peer in peers.items():
        pairs = {
            "cpu": (ours.cpu[FIRST.name], peer.cpu[FIRST.name]),
            "p50": tuple([half(one) for one in seen.closed[FIRST.name]] for seen in (ours, peer)),
            "rps": tuple([rate(one) for one in seen.closed[BUSY.name]] for seen in (ours, peer)),
        }
        if ours.open and peer.open and peer.open[0].rate == RATE:
            pairs["p99"] = tuple([most(one) for one in seen.open] for seen in (ours, peer))
            added = (ours.opened(most) or 0.0) - (peer.opened(most) or 0.0)
            report.figure(f"p99_added_ms.{name}", added * 1e3)
        shares: list[str] = []
        for figure, (mine, theirs) in pairs.items():
            if mine and theirs:
                share = median(one / other for one, other in zip(mine, theirs, strict=False))
                report.figure(f"ratio.{figure}.{name}", share)
                shares.append(f"{figure} {share:.2g}")
        if shares:
            report.note(f"ours / {name}: " + ", ".join(shares))


def half(seen: Closed | Open) -> float:
    """Its p50."""
    return seen.p50


def most(seen: Closed | Open) -> float:
    """Its p99."""
    return seen.p99


def rate(seen: Closed) -> float:
    """Its answers per second."""
    return seen.rate


def in_ms(seconds: float | None) -> float | None:
    """The same in milliseconds."""
    return None if seconds is None else seconds * 1e3


def milliseconds(value: float | None) -> str:
    """A latency for the table."""
    return "–" if value is None else f"{float(f'{value * 1e3:.3g}'):g}"


def number(value: float | None) -> str:
    """A number for the table."""
    return "–" if value is None else f"{value:,.0f}"


def main() -> int:
    """Run it all."""
    names = [peer.name for peer in PEERS]
    parser = argument_parser(__doc__)
    parser.add_argument(
        "--peers",
        type=Path,
        default=Path(os.environ.get("GATEWAY_PEERS", ".peers")),
        help="where the others are installed; default: $GATEWAY_PEERS or .peers",
    )
    parser.add_argument(
        "--install", action="store_true", help="install those that are missing, and end"
    )
    parser.add_argument(
        "--only", action="append", choices=names, help="compare with this one; may be repeated"
    )
    parser.add_argument("--quick", action="store_true", help="one short round, to see that it runs")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # ending all that was started
    peers = [peer for peer in PEERS if not options.only or peer.name in options.only]
    homes = options.peers.resolve()
    if options.install:
        return install(peers, homes)
    report = Report(
        "a chat completion through each gateway",
        (
            "who",
            "CPU µs: 1 conn, 0.3 kB",
            "1, 8 kB",
            "32, 0.3 kB",
            "32, 8 kB",
            "p50 ms",
            "requests/s",
            "p50 / p99 ms at a rate",
            "first word + ms",
            "MB, streams idle",
        ),
    )
    with tempfile.TemporaryDirectory() as folder:
        try:
            bench = Bench(Path(folder), homes, peers, QUICK if options.quick else Pace())
            bench.run()
        except Unusable as unusable:
            say(f"! {unusable}")
            return 1
    tell(bench, report)
    report.finish(options.json)
    return 1 if bench.problems else 0


def install(peers: Sequence[Peer], homes: Path) -> int:
    """Install what is missing; 1 when something can't be."""
    failed = 0
    for peer in peers:
        try:
            peer.install(homes)
        except Unusable as unusable:
            say(f"! {unusable}")
            failed = 1
        else:
            say(f"{peer.name} {peer.version(homes)}")
    return failed


if __name__ == "__main__":
    sys.exit(main())
