"""The story: three versions on their way to production, told while it happens."""

from __future__ import annotations

import json
import shutil
import signal
import socket
import sys
import time
from collections.abc import Generator, Sequence
from contextlib import ExitStack, chdir, contextmanager
from pathlib import Path
from typing import Any

import typer
from threadpoolctl import threadpool_limits

from shipworthy.app.session import Session, open_session
from shipworthy.app.status import LOCK, RolloutStatusLine, is_running, rollout_of
from shipworthy.cli.demo import files, models
from shipworthy.cli.demo.commands import (
    INTERRUPTED,
    CommandLine,
    DemoFailed,
    Person,
    UpProcess,
    write_secret,
)
from shipworthy.cli.demo.models import MODEL, Split, Trained
from shipworthy.cli.demo.results import Figures, decisions_of, read_records
from shipworthy.cli.demo.screen import Screen
from shipworthy.cli.demo.traffic import BUSY, CALM, QUIET, Traffic, encode_request
from shipworthy.cli.output import out
from shipworthy.domain.names import Stage
from shipworthy.domain.rollout import RolloutStatus
from shipworthy.errors import Conflict
from shipworthy.settings import FILE, STATE, load_project

MARK = "made-by-shipworthy-demo"
_PORT = 8080
_ACCOUNT = Person("you")
_ROLLOUT_SECONDS = 150.0
_FIRST_TRAFFIC_SECONDS, _LAST_TRAFFIC_SECONDS = 3.0, 4.0
_LOOK_SECONDS = 0.25


def tell(
    context: typer.Context, *, folder: Path, port: int | None, json_file: Path | None, leave: bool
) -> int:
    """Tell it; the exit code. Whatever happens, no process is left behind."""
    target = json_file.resolve() if json_file else None
    screen = Screen(out)
    began = time.monotonic()
    root = clean_folder(folder)
    try:
        with _interruptible(), chdir(root), ExitStack() as stack:
            story = _Story(context, screen, root, stack)
            figures = story.run(port if port is not None else _free_port(), began)
            code = _conclude(screen, figures, target)
            if not leave:
                story.stay_up()
    except (KeyboardInterrupt, typer.Abort):
        screen.say("Interrupted; everything that ran is stopped.")
        return INTERRUPTED
    except DemoFailed as error:
        screen.say(f"The demo did not get through: {error}", "red")
        if target is not None:
            write_json(target, {"passed": False, "broken_promises": [str(error)]})
        return DemoFailed.exit_code
    return code


def clean_folder(folder: Path) -> Path:
    """An empty folder for the demo; Conflict when there is something that no demo made."""
    root = folder.resolve()
    if root.exists() and any(root.iterdir() if root.is_dir() else [root]):
        if not (root / MARK).is_file():
            message = f"{folder} holds something that no demo made; name another with --folder"
            raise Conflict(message)
        if (root / FILE).is_file() and (root / STATE).is_dir() and is_running(open_session(root)):
            process = (root / STATE / LOCK).read_text().strip()
            message = f"an earlier demo still runs in {folder}; end it first ('kill {process}')"
            raise Conflict(message)
        shutil.rmtree(root)
    root.mkdir(parents=True, exist_ok=True)
    (root / MARK).write_text("The next demo replaces this folder.\n", encoding="utf-8")
    (root / ".gitignore").write_text("*\n", encoding="utf-8")
    return root


def _free_port() -> int:
    """8080, as documented everywhere, or any free one when it is taken."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", _PORT))
        except OSError:
            return 0
    return _PORT


@contextmanager
def _interruptible() -> Generator[None]:
    """Let SIGTERM end the demo as Ctrl-C does."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def _uninterrupted() -> Generator[None]:
    """Let impatient second Ctrl-Cs not keep us from ending what we started."""
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(number, signal.SIG_IGN) for number in numbers]
    try:
        yield
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


def _conclude(screen: Screen, figures: Figures, target: Path | None) -> int:
    """Show and keep the figures; 0 when all promises came true."""
    screen.heading("What happened")
    screen.table(figures)
    if target is not None:
        write_json(target, figures.report())
        screen.say(f"The figures are in {target}.")
    broken = figures.broken_promises()
    for sentence in broken:
        screen.say(f"Not as promised: {sentence}.", "red")
    return DemoFailed.exit_code if broken else 0


def write_json(file: Path, content: dict[str, Any]) -> None:
    """Write figures for machines."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


class _Story:
    def __init__(
        self, context: typer.Context, screen: Screen, root: Path, stack: ExitStack
    ) -> None:
        self._screen = screen
        self._root = root
        self._stack = stack
        self._commands = CommandLine(context, screen.command)
        self._told: set[str] = set()
        self._url = ""
        self._session: Session
        self._up: UpProcess
        self._traffic: Traffic
        self._maker: Person
        self._approver: Person

    def run(self, port: int, began: float) -> Figures:
        """From nothing to the figures."""
        split, trained = self._train()
        self._found(port)
        first, second, third = trained
        self._screen.heading(f"4. {first.name}: the first release takes production at its gate")
        self._promote(first)
        self._begin_traffic(split)
        self._screen.heading(f"5. {second.name}: better, so it gets all traffic, step by step")
        self._roll_out(second, RolloutStatus.COMPLETED)
        self._screen.heading(f"6. {third.name}: passes every test, and fails on live inputs")
        self._roll_out(third, RolloutStatus.ROLLED_BACK)
        self._traffic.enter("after")
        self._watch_for(_LAST_TRAFFIC_SECONDS)
        self._traffic.limit(CALM)
        return Figures(
            trained=trained,
            tallies=self._traffic.tallies,
            journalled=read_records(self._session.project, until=time.time()),
            decisions=decisions_of(self._session),
            seconds=time.monotonic() - began,
        )

    def _train(self) -> tuple[Split, Sequence[Trained]]:
        self._screen.heading("1. Three models for scikit-learn's handwritten digits")
        split = models.split_digits()
        models.write_data(split, self._root / "data")
        trainers = (models.train_first, models.train_second, models.train_third)
        trained: list[Trained] = []
        # On few cores the threads of linear algebra only wait for each other.
        with threadpool_limits(1):
            for version, train in enumerate(trainers, start=1):
                folder = self._root / f"v{version}"
                made = train(split, folder)
                files.write_release(folder / "release.yaml", made)
                self._screen.say(made.sentence() + ".")
                if trained:
                    self._screen.say(f"  {made.against(trained[-1])}")
                trained.append(made)
        self._screen.say(
            "Users will send other images than these, from three apps: most as in the tests, some"
            " with 8-bit pixels, some photographed on greyish paper."
        )
        return split, trained

    def _found(self, port: int) -> None:
        run = self._run
        self._screen.heading("2. A project, its policy, and people with keys of their own")
        run("init", _ACCOUNT)
        with (self._root / FILE).open("a", encoding="utf-8") as settings:
            settings.write(f"gateway: {{port: {port}}}\n")
        files.write_policy(self._root / "policy.yaml")
        run("apply -f policy.yaml", _ACCOUNT)
        self._maker = self._person("ada")
        self._approver = self._person("grace")
        key = self._commands.run(
            f"keys create app --service --model {MODEL}", _ACCOUNT, secret=True
        )
        write_secret(self._key_file, key)
        self._screen.heading("3. Gateway, keeper and replicas, as processes of their own")
        self._session = open_session(self._root)
        self._up = UpProcess(load_project(self._root))
        self._stack.callback(self._stop)
        self._screen.command(_ACCOUNT, "up")
        self._url = self._up.start()
        self._screen.say(f"The gateway listens on {self._url} (process {self._up.pid}).")

    @property
    def _key_file(self) -> Path:
        return self._root / "keys" / "app"

    def _person(self, name: str) -> Person:
        return Person(name, self._commands.run(f"keys create {name}", _ACCOUNT, secret=True))

    def _run(self, line: str, by: Person) -> None:
        self._screen.say(self._commands.run(line, by), "dim")

    def _promote(self, trained: Trained) -> None:
        """Register, check, approve by a second person, promote: as the policy asks for."""
        run, name = self._run, trained.name
        run(f"release create -f v{trained.version}/release.yaml", self._maker)
        run(f"promote {name} --to staging", self._maker)
        run(f"approve {name} -m 'looked at its worst errors'", self._approver)
        run(f"promote {name} --to production", self._maker)
        self._up.check()

    def _begin_traffic(self, split: Split) -> None:
        key = self._key_file.read_text().strip()
        self._traffic = Traffic(self._url, key, split.live, seed=models.SEED)
        self._traffic.start(f"{MODEL}@1")
        (self._root / "request.json").write_bytes(encode_request(split.live.pixels[0].tolist()))
        self._screen.say("Users come: thousands of them, over HTTP, each with a name of its own.")
        self._watch_for(_FIRST_TRAFFIC_SECONDS)

    def _roll_out(self, trained: Trained, expected: RolloutStatus) -> None:
        """Promote to production and watch until the rollout ends, as expected or not."""
        self._traffic.enter(trained.name)
        self._promote(trained)
        deadline, busy = time.monotonic() + _ROLLOUT_SECONDS, False
        with self._screen.watching():
            while True:
                line = rollout_of(self._session, MODEL)
                if line is not None and line.weight and not busy:
                    busy = True
                    self._traffic.limit(BUSY)
                self._look(line)
                if line is not None and line.candidate == trained.name and line.ended:
                    break
                if time.monotonic() > deadline or (line and line.status == RolloutStatus.HELD):
                    message = f"{trained.name} is undecided: {_where(line)}"
                    raise DemoFailed(message)
                time.sleep(_LOOK_SECONDS)
        self._traffic.limit(QUIET)
        if line.status != expected:
            message = f"{trained.name} should be {expected.replace('_', ' ')}, but {_where(line)}"
            raise DemoFailed(message)

    def _watch_for(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        with self._screen.watching():
            while time.monotonic() < end:
                self._look(None)
                time.sleep(_LOOK_SECONDS)

    def _look(self, line: RolloutStatusLine | None) -> None:
        """Show how it goes, and each decision of a rollout once."""
        self._up.check()
        if not self._traffic.alive:
            message = f"no users come any more: {'; '.join(self._traffic.problems)}"
            raise DemoFailed(message)
        for decision in decisions_of(self._session):
            if decision.rollout is not None and decision.id not in self._told:
                self._told.add(decision.id)
                self._screen.decision(decision)
        self._screen.show(line, self._traffic)

    def stay_up(self) -> None:
        """Keep everything running, with a few users, until Ctrl-C."""
        screen = self._screen
        screen.heading("It stays up for a look around until Ctrl-C")
        screen.say(f"In another terminal: cd {self._root}")
        program = shutil.which("shipworthy") or Path(sys.argv[0]).resolve()
        screen.say(f"A few users keep coming to {self._url}. Try, for example:")
        for line in (
            "status",
            f"rollout status {MODEL}",
            f"check {MODEL}@{Stage.PRODUCTION}",
            f"release show {MODEL}@3",
            "audit log",
            f"rollback {MODEL} -m 'just trying'",
        ):
            screen.say(f"  {program} {line}")
        screen.say(
            f"  curl -s {self._url}/v2/models/{MODEL}/infer -d @request.json"
            ' -H "Authorization: Bearer $(cat keys/app)"'
        )
        try:
            while True:
                self._up.check()
                time.sleep(1)
        except KeyboardInterrupt:
            return

    def _stop(self) -> None:
        self._screen.say("Stopping everything …", "dim")
        with _uninterrupted():
            if hasattr(self, "_traffic"):
                self._traffic.stop()
            self._up.stop()


def _where(line: RolloutStatusLine | None) -> str:
    if line is None:
        return "no rollout has begun"
    missing = "; ".join(line.missing) or line.reason or "nothing is missing"
    return f"{line.candidate} is {line.status.replace('_', ' ')} at {line.weight:.0%} ({missing})"
