"""The documentation is true: links lead somewhere, commands and options exist, examples parse."""

import ast
import re
import shlex
from collections.abc import Iterator
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])

FENCE = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
CODE = re.compile(r"`([^`\n]+)`")

every_page = pytest.mark.parametrize(
    "page", PAGES, ids=lambda page: str(page.relative_to(ROOT).with_suffix(""))
)


def prose(page: Path) -> str:
    return FENCE.sub("", page.read_text())


def blocks(page: Path, *languages: str) -> list[str]:
    return [text for language, text in FENCE.findall(page.read_text()) if language in languages]


def anchors(page: Path) -> set[str]:
    """The fragments of a page's headings, in the way that forges make them."""
    headings = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    words = [re.sub(r"[^\w\- ]", "", heading.strip().lower()) for heading in headings]
    return {word.replace(" ", "-") for word in words}


@every_page
def test_links_lead_somewhere(page: Path) -> None:
    for target in LINK.findall(prose(page)):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, fragment = target.partition("#")
        there = (page.parent / path).resolve() if path else page
        assert there.exists(), f"{target} does not exist"
        assert there.is_relative_to(ROOT), f"{target} leaves the repository"
        if fragment and there.suffix == ".md":
            assert fragment in anchors(there), f"{target}: no such heading"


@every_page
def test_paths_in_code_spans_exist(page: Path) -> None:
    for span in CODE.findall(prose(page)):
        if re.fullmatch(r"(src|tests|bench|docs)/[\w./-]+", span) and span != "bench/results/":
            assert (ROOT / span).exists(), f"{span} does not exist"


def commands(page: Path, program: str) -> Iterator[list[str]]:
    """Each use of a program in the page's shell blocks and code spans, as words."""
    lines = [
        line
        for block in blocks(page, "", "sh", "shell", "bash", "console")
        for line in block.replace("\\\n", " ").splitlines()
    ]
    for line in [*lines, *CODE.findall(prose(page))]:
        for part in re.split(r"&&|\|\|?|;|\$\(", line.strip().removeprefix("$ ")):
            words = part.partition(" #")[0].split()
            while words and re.fullmatch(r"\w+=\S*", words[0]):
                words = words[1:]
            if words and words[0].rpartition("/")[2] == program:
                try:
                    yield shlex.split(" ".join(words))[1:]
                except ValueError:
                    yield words[1:]


@cache
def command_line() -> Any:
    cli = import_module("shipworthy.cli")
    app = next(value for value in vars(cli).values() if isinstance(value, typer.Typer))
    return typer.main.get_command(app)


def wrong_in(words: list[str]) -> str:
    """What does not exist in `shipworthy WORDS`, or nothing."""
    command = command_line()
    said = "shipworthy"
    while words and hasattr(command, "commands") and re.fullmatch(r"[a-z][a-z-]*", words[0]):
        if words[0] not in command.commands:
            return f"{said} has no command {words[0]}"
        command, said = command.commands[words[0]], f"{said} {words[0]}"
        words = words[1:]
    options = {
        "--help",
        *(name for one in command.params for name in one.opts + one.secondary_opts),
    }
    for word in words:
        if re.match(r"--?[a-z]", word) and word.partition("=")[0] not in options:
            return f"{said} has no option {word}"
    return ""


@pytest.mark.skipif(find_spec("shipworthy.cli") is None, reason="no command line yet")
@every_page
def test_commands_and_options_exist(page: Path) -> None:
    wrong = [wrong_in(words) for words in commands(page, "shipworthy")]
    assert not [one for one in wrong if one]


@every_page
def test_make_targets_exist(page: Path) -> None:
    targets = set(re.findall(r"^([a-z][\w-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    used = {
        word
        for words in commands(page, "make")
        for word in words
        if re.fullmatch(r"[a-z][\w-]*", word)
    }
    assert used <= targets


@every_page
def test_python_examples_compile(page: Path) -> None:
    for block in blocks(page, "python", "py"):
        ast.parse(block)


@every_page
def test_yaml_examples_parse(page: Path) -> None:
    for block in blocks(page, "yaml", "yml"):
        list(yaml.safe_load_all(block))


def test_each_make_target_is_in_its_help() -> None:
    makefile = (ROOT / "Makefile").read_text()
    phony = re.search(r"^\.PHONY: (.+)$", makefile, re.MULTILINE)
    assert phony
    for target in set(phony[1].split()) - {"help"}:
        assert f"'make {target} " in makefile, target
