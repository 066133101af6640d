"""What the demo shows: steps, the commands behind them, a calm live line, a table at last."""

from __future__ import annotations

import time
from collections.abc import Generator
from contextlib import contextmanager

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.markup import escape
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from shipworthy.app.status import RolloutStatusLine
from shipworthy.cli.demo.commands import Person
from shipworthy.cli.demo.results import Exposure, Figures
from shipworthy.cli.demo.traffic import Traffic
from shipworthy.domain.lifecycle import Decision

_PLAIN_SECONDS = 5.0  # between lines where there is no terminal to draw on
_PLAIN_WIDTH = 140
_BAR = 24
_COLOURS = {"complete": "green", "go up": "green", "roll back": "red", "hold": "yellow"}


class Screen:
    """Prints to a console; draws on it only when it is a terminal."""

    def __init__(self, console: Console) -> None:
        self._console = console
        if not console.is_terminal:
            console.width = _PLAIN_WIDTH
        self._live: Live | None = None
        self._print_at = 0.0
        self._began = time.monotonic()
        self._counted = (self._began, 0)
        self._rate = 0.0

    def heading(self, text: str) -> None:
        """A new part of the story."""
        seconds = time.monotonic() - self._began
        self._console.print(f"\n[bold]{escape(text)}[/] [dim]({seconds:.0f} s)[/]")
        self._print_at = time.monotonic() + 1.0

    def say(self, text: str, style: str = "") -> None:
        """A paragraph."""
        self._console.print(
            Padding(Text(text, style=style), (0, 0, 0, 2), expand=False), soft_wrap=False
        )

    def command(self, by: Person, line: str) -> None:
        """A command, as that person would type it."""
        self._console.print(f"  [cyan]{escape(by.name)} $ shipworthy {escape(line)}[/]")

    def decision(self, decision: Decision) -> None:
        """A decision of the keeper, when it was made."""
        at = time.strftime("%H:%M:%S", time.localtime(decision.at))
        colour = _COLOURS.get(decision.kind, "bold")
        head = Text.assemble((f"{at} {decision.kind}: ", colour), decision.text)
        self._console.print(Padding(head, (0, 0, 0, 2), expand=False), soft_wrap=False)

    @contextmanager
    def watching(self) -> Generator[None]:
        """While this is open, `show` draws; decisions may still be printed above it."""
        if not self._console.is_terminal:
            yield
            return
        with Live(console=self._console, refresh_per_second=4, transient=True) as live:
            self._live = live
            try:
                yield
            finally:
                self._live = None

    def show(self, rollout: RolloutStatusLine | None, traffic: Traffic) -> None:
        """The rollout and the traffic as they are now."""
        self._measure(traffic)
        if self._live is not None:
            self._live.update(self._drawn(rollout, traffic))
        elif self._rate and time.monotonic() >= self._print_at:
            self._print_at = time.monotonic() + _PLAIN_SECONDS
            self.say(self._plain(rollout, traffic), "dim")

    def _measure(self, traffic: Traffic) -> None:
        now, (then, before) = time.monotonic(), self._counted
        if now - then >= 1.0:
            self._rate = (traffic.requests - before) / (now - then)
            self._counted = (now, traffic.requests)

    def _plain(self, rollout: RolloutStatusLine | None, traffic: Traffic) -> str:
        parts = [_rollout_words(rollout)] if rollout is not None else []
        return "; ".join([*parts, self._traffic_words(traffic)])

    def _traffic_words(self, traffic: Traffic) -> str:
        return (
            f"{self._rate:.0f} requests/s, median {traffic.median() * 1000:.0f} ms,"
            f" {traffic.requests:,} so far, {traffic.errors} user errors"
        )

    def _drawn(self, rollout: RolloutStatusLine | None, traffic: Traffic) -> RenderableType:
        lines: list[RenderableType] = []
        if rollout is not None:
            filled = round(rollout.weight * _BAR)
            bar = Text.assemble(("  " + "█" * filled, "green"), ("░" * (_BAR - filled), "dim"), " ")
            lines.append(bar.append(_rollout_words(rollout)))
            missing = [phrase.partition(" (")[0] for phrase in rollout.missing]
            lines += [Text(f"  still missing: {phrase}", "dim") for phrase in missing]
        lines.append(Text(f"  {self._traffic_words(traffic)}"))
        return Group(*lines)

    # --- the end ------------------------------------------------------------------------------

    def table(self, figures: Figures) -> None:
        """Each release: what it promised, what became of it, and what users had of it."""
        table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
        for column in ("release", "held-out", "live, by labels", "answers", "what happened"):
            table.add_column(column, overflow="fold")
        for one in figures.trained:
            table.add_row(
                one.name,
                f"{one.accuracy:.1%} (n = {len(one.correct)})",
                _live_words(figures, one.name),
                f"{figures.journalled.answers[one.name]:,}",
                _ending(figures, one.name),
            )
        self._console.print(Padding(table, (1, 0, 0, 2), expand=False), soft_wrap=False)
        self._totals(figures)

    def _totals(self, figures: Figures) -> None:
        report = figures.report()
        seconds = report["seconds_to_rollback"]
        self._console.print()
        self.say(
            f"{report['requests']:,} requests, {report['user_errors']} errors seen by users,"
            f" {report['failures_shielded']} failures of the rolled-back release answered by"
            " stable instead."
        )
        if seconds is not None:
            self.say(
                f"The last request went to it {seconds:.2f} s after the answer that decided;"
                f" {report['exposed_requests']} requests were exposed to it in all."
            )


def _rollout_words(rollout: RolloutStatusLine) -> str:
    return (
        f"{rollout.candidate}: {rollout.status.replace('_', ' ')} at {rollout.weight:.0%},"
        f" {rollout.exposed_requests:,} requests, e-value {rollout.e_value:.3g}"
        f" (back at {rollout.alarm_at:g})"
    )


def _reasons(exposure: Exposure) -> str:
    words = {"status_5xx": "error", "timeout": "too slow", "ejected": "no longer called"}
    return ", ".join(
        f"{words.get(reason, reason)} {count}" for reason, count in exposure.reasons.most_common()
    )


def _live_words(figures: Figures, name: str) -> str:
    live = figures.live_accuracy(name)
    if live is None:
        return "no label came back"
    return f"{live['value']:.1%} ({live['low']:.1%} to {live['high']:.1%}, n = {live['n']})"


def _ending(figures: Figures, name: str) -> str:
    decision = figures.rolled_back
    if decision is not None and name in decision.text.split(" is rolled back", maxsplit=1)[0]:
        exposure: Exposure = figures.exposure(decision)
        return (
            f"[red]rolled back[/] after {exposure.requests} requests; {exposure.failures} failed"
            f" ({_reasons(exposure)}), {exposure.shielded} of them answered by stable"
        )
    completed = [one for one in figures.completed if name in one.text.split(" takes all")[0]]
    if completed:
        return "[green]to 100% by canary[/]; serves now"
    return "first release: took production through its gate"
