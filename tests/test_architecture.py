"""The floors of the house, from pyproject.toml, and what import contracts can't see."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import grimp
import pytest

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "shipworthy"


def test_each_floor_imports_only_what_is_below_it() -> None:
    run = subprocess.run(
        [Path(sys.executable).with_name("lint-imports"), "--no-cache"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if run.returncode:
        pytest.fail(run.stdout + run.stderr, pytrace=False)


def test_no_product_code_imports_the_public_fakes() -> None:
    graph = grimp.build_graph("shipworthy", cache_dir=None)
    fakes = {name for name in graph.modules if name.startswith("shipworthy.testing")}
    users = {user for fake in fakes for user in graph.find_modules_that_directly_import(fake)}
    assert not users - fakes


@pytest.mark.parametrize(
    "module",
    [
        name
        for name in ("shipworthy.domain.routing", "shipworthy.gateway")
        if find_spec(name) is not None
    ],
)
def test_a_gateway_worker_loads_no_heavy_package(module: str) -> None:
    """As the contract in pyproject.toml, but by running it: third parties import things too."""
    heavy = {"numpy", "scipy", "sklearn", "pandas", "sqlalchemy", "pydantic", "rich", "typer"}
    program = f"import sys, {module}; print(*sorted({heavy!r} & sys.modules.keys()))"
    loaded = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert not loaded.stdout.split()


def test_a_command_starts_without_what_only_the_lake_needs() -> None:
    program = "import sys, shipworthy.cli; print({'deltalake', 'duckdb'} & sys.modules.keys())"
    loaded = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert loaded.stdout.strip() == "set()"


# What reads the clock, draws randomness or does I/O without an import that would show it.
IMPURE = {
    "now", "utcnow", "today", "getenv", "read_text", "read_bytes", "write_text", "write_bytes",
    "unlink", "mkdir", "rmdir", "touch", "iterdir", "rglob", "exists", "is_file", "is_dir", "stat",
    "resolve", "expanduser", "cwd", "home", "default_rng", "RandomState",
}  # fmt: skip
IMPURE_BUILTINS = {"open", "input", "print", "__import__", "exec", "eval"}


def impure_calls(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        called = node.func
        if isinstance(called, ast.Name) and called.id in IMPURE_BUILTINS:
            yield f"line {node.lineno}: {called.id}()"
        if isinstance(called, ast.Attribute) and called.attr in IMPURE:
            yield f"line {node.lineno}: .{called.attr}()"


def test_the_domain_calls_nothing_impure() -> None:
    found = {
        str(path.relative_to(ROOT)): calls
        for path in sorted((SOURCE / "domain").rglob("*.py"))
        if (calls := list(impure_calls(ast.parse(path.read_text()))))
    }
    assert not found


def test_impure_calls_are_seen() -> None:
    tree = ast.parse("datetime.now()\nopen('x')\npath.read_text()\nlen('x')")
    assert list(impure_calls(tree)) == ["line 1: .now()", "line 2: open()", "line 3: .read_text()"]


def lengths(folder: Path) -> dict[str, int]:
    return {
        str(path.relative_to(ROOT)): len(path.read_text().splitlines())
        for path in folder.rglob("*.py")
    }


def test_no_file_is_over_1000_lines() -> None:
    every = lengths(ROOT / "src") | lengths(ROOT / "tests") | lengths(ROOT / "bench")
    assert not {path: lines for path, lines in every.items() if lines > 1_000}


def test_nine_files_in_ten_are_under_600_lines() -> None:
    sizes = lengths(ROOT / "src")
    long = {path: lines for path, lines in sizes.items() if lines >= 600}
    assert len(long) <= len(sizes) / 10, long
