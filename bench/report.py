"""What every benchmark here reports: a table, the figures as JSON, the versions and the machine.

A benchmark fills a `Report` and ends with `finish`. The JSON is
`{"figures": {...}, "machine": {...}, "versions": {...}, "command": "..."}`; it holds no path, so
that it can be published as it is.
"""

from __future__ import annotations

import argparse
import os
import platform
import shlex
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import msgspec
from rich.console import Console
from rich.table import Table

Figure = float | int | str | bool | None


class Report:
    """Rows for people and figures for machines, gathered while a benchmark runs.

    `columns` heads the table; a row has one cell for each. `figure` names are stable: the
    documentation and CI quote them.
    """

    def __init__(self, title: str, columns: tuple[str, ...], *packages: str) -> None:
        self.console = Console()
        if not self.console.is_terminal:
            self.console.width = 160  # a file has no width of its own
        self.figures: dict[str, Figure] = {}
        self._table = Table(title=title, title_justify="left")
        for index, column in enumerate(columns):
            middle = 0 < index < len(columns) - 1
            self._table.add_column(column, justify="right" if middle else "left")
        self._packages = packages
        self._notes: list[str] = []

    def row(self, *cells: str) -> None:
        """Add a row to the table."""
        self._table.add_row(*cells)

    def section(self) -> None:
        """Draw a line below the last row."""
        self._table.add_section()

    def note(self, text: str) -> None:
        """Add a line below the table."""
        self._notes.append(text)

    def figure(self, name: str, value: Figure, digits: int = 4) -> None:
        """Record a figure, floats rounded to `digits` significant digits."""
        self.figures[name] = float(f"{value:.{digits}g}") if isinstance(value, float) else value

    def finish(self, json_file: Path | None) -> None:
        """Print the table, the machine and the versions; write the JSON when asked to."""
        machine, used = machine_facts(), versions(*self._packages)
        self.console.print(self._table)
        for note in self._notes:
            self.console.print(note, highlight=False)
        self.console.print(_line(machine), _line(used), sep="\n", style="dim", highlight=False)
        if json_file is not None:
            document = {
                "figures": self.figures,
                "machine": machine,
                "versions": used,
                "command": command(),
            }
            json_file.parent.mkdir(parents=True, exist_ok=True)
            json_file.write_bytes(msgspec.json.format(msgspec.json.encode(document)) + b"\n")


def argument_parser(description: str | None) -> argparse.ArgumentParser:
    """Give a parser with the options that all benchmarks share: `--json FILE` and `--seed`."""
    parser = argparse.ArgumentParser(description=(description or "").split("\n\n", maxsplit=1)[0])
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures to FILE")
    parser.add_argument("--seed", type=int, default=2026, help="of all pseudo-random numbers")
    return parser


def machine_facts() -> dict[str, Figure]:
    """Describe the machine: processor, cores we may use, memory in GiB, system."""
    pages, size = os.sysconf("SC_PHYS_PAGES"), os.sysconf("SC_PAGE_SIZE")
    return {
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count(),
        "memory_gib": round(pages * size / 2**30, 1),
        "system": f"{platform.system()} {platform.machine()}",
    }


def versions(*packages: str) -> dict[str, Figure]:
    """Give the versions of Python, Shipworthy and `packages`; `None` for what isn't installed."""
    found: dict[str, Figure] = {"python": platform.python_version()}
    for package in ("shipworthy", *packages):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found


def command() -> str:
    """Give the command that was run, with files by their names alone."""
    script, *arguments = sys.argv
    named = [
        Path(argument).name if Path(argument).is_absolute() else argument for argument in arguments
    ]
    return shlex.join(["python", f"bench/{Path(script).name}", *named])


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or "unknown"


def _line(facts: dict[str, Figure]) -> str:
    return ", ".join(f"{name} {value}" for name, value in facts.items())
