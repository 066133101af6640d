"""The documentation is true: links lead somewhere, commands and options exist, examples parse."""

import ast
import inspect
import re
import shlex
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import pytest
import typer
import yaml
from pydantic import BaseModel

from shipworthy.app.checks import PROBES
from shipworthy.app.founding import read_policy
from shipworthy.domain.manifest import ReleaseSpec
from shipworthy.domain.policy import PRESETS, Policy
from shipworthy.protocols.documents import read_document
from shipworthy.protocols.outcomes import OUTCOMES
from shipworthy.release.catalogue import built_in
from shipworthy.settings import Settings

ROOT = Path(__file__).parents[1]
DOCUMENTS = [("release-yaml", ReleaseSpec), ("policy-yaml", Policy), ("settings", Settings)]
STAGES = ("staging", "production")
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


# --- the reference pages --------------------------------------------------------------------------


def parameters(command: Any) -> Iterator[tuple[str, str]]:
    """Each argument and option of a command, as it is written, with its meaning."""
    for one in command.params:
        if "--help" in one.opts or "--version" in one.opts:
            continue
        names = ", ".join([*one.opts, *one.secondary_opts])
        if one.param_type_name == "argument":
            names = one.name.upper()
        default = one.default if isinstance(one.default, str | int | Path) else None
        shown = "" if default in {None, False, ""} else f" (default `{default}`)"
        yield f"`{names}`", f"{(getattr(one, 'help', None) or '').rstrip('.')}{shown}"


def described(command: Any, name: str) -> Iterator[str]:
    """The reference of a command or of a group of them, as Markdown."""
    if hasattr(command, "commands"):
        if name:
            yield f"## {name}\n\n{command.help}\n"
        for inner, one in command.commands.items():
            yield from described(one, f"{name} {inner}".strip())
        return
    text, _, example = str(command.help).partition("Example: ")
    yield f"## {name}\n\n{inspect.cleandoc(text).strip()}\n"
    rows = [f"| {names} | {meaning} |" for names, meaning in parameters(command)]
    if rows:
        yield "\n".join(["| | |", "| --- | --- |", *rows, ""])
    if example:
        lines = re.sub(r",? and [a-z ]+ (?=shipworthy )", "\n", " ".join(example.split()))
        yield f"```sh\n{lines}\n```\n"


def reference() -> str:
    """`docs/cli.md`, all of it."""
    head = """\
# Commands

Made from the commands' own help by `.venv/bin/python tests/test_docs.py`.

A release is named `digits@3`, `digits@sha256:…`, or by stage `digits@staging`. Listings take
`--json`. An error is one sentence with its cure. Exit codes: 0 pass, 1 fail or refused, 2 usage,
3 inconclusive or error.
"""
    return "\n".join([head, *described(command_line(), "")])


def test_every_command_and_option_is_documented() -> None:
    assert (ROOT / "docs/cli.md").read_text() == reference(), (
        "docs/cli.md is not what the commands say; .venv/bin/python tests/test_docs.py renews it"
    )


def inside(annotation: Any) -> Iterator[tuple[str, Any]]:
    """The documents and records that a field may hold, each with what a key path says of it."""
    if isinstance(annotation, type) and (
        issubclass(annotation, BaseModel) or is_dataclass(annotation)
    ):
        yield "", annotation
    origin, arguments = get_origin(annotation), get_args(annotation)
    mark = {tuple: "[]", dict: ".*"}.get(origin, "") if isinstance(origin, type) else ""
    for one in arguments:
        for deeper, found in inside(one):
            yield mark + deeper, found


def keys_of(model: Any, prefix: str = "") -> Iterator[str]:
    """Every key of a document, such as `serving.replicas.min` and `data[].role`."""
    hints = get_type_hints(model, include_extras=True)
    names = model.model_fields if issubclass(model, BaseModel) else [f.name for f in fields(model)]
    for name in names:
        yield f"{prefix}{name}"
        for mark, found in inside(hints[name]):
            yield from keys_of(found, f"{prefix}{name}{mark}.")


@pytest.mark.parametrize(
    ("page", "document"),
    DOCUMENTS,
)
def test_every_key_is_documented(page: str, document: Any) -> None:
    told = set(CODE.findall((ROOT / f"docs/{page}.md").read_text()))
    told |= {one.replace("promotion.*", f"promotion.{stage}") for one in told for stage in STAGES}
    told |= {one[: dot.start()] for one in told for dot in re.finditer(r"\[\]\.|\.", one)}
    assert [key for key in dict.fromkeys(keys_of(document)) if key not in told] == []


def test_keys_that_are_told_exist() -> None:
    """The first cell of a row names keys; each of them can be written."""
    for page, document in DOCUMENTS:
        known = {
            key.replace(f"promotion.{stage}", "promotion.*")
            for key in keys_of(document)
            for stage in STAGES
        }
        known |= set(keys_of(document)) | {"SHIPWORTHY_PROJECT", "SHIPWORTHY_KEY", "XDG_CACHE_HOME"}
        for row in table_rows(f"docs/{page}.md"):
            if not re.match(r"`(pass|fail|inconclusive|error)`", row[0]):
                assert set(CODE.findall(row[0])) <= known, row[0]


@every_page
def test_yaml_examples_are_what_they_say(page: Path, tmp_path: Path) -> None:
    """A block whose first line is a comment with a file's name is read as that file."""
    for block in blocks(page, "yaml", "yml"):
        name = block.partition("\n")[0].removeprefix("# ").strip()
        if name == "release.yaml":
            read_document(block.encode(), name, ReleaseSpec)
        elif name == "shipworthy.yaml":
            read_document(block.encode(), name, Settings)
        else:
            assert name == "policy.yaml", f"say in the first line which file this is: {name}"
            (tmp_path / name).write_text(block)
            read_policy(tmp_path / name)


def table_rows(page: str) -> Iterator[list[str]]:
    for line in (ROOT / page).read_text().splitlines():
        if line.startswith("| `"):
            yield [cell.strip() for cell in line.strip("|").split(" | ")]


def test_the_checklist_page_is_the_checklist() -> None:
    moments = dict(
        zip("RSPCL", ("registration", "staging", "production", "confirm", "live"), strict=True)
    )
    told = {row[0].strip("`"): row[2:4] for row in table_rows("docs/checklist.md")}
    assert told == {
        item.id: [
            ", ".join(moments[moment.value] for moment in item.when),
            "yes" if item.id in PROBES else "not yet",
        ]
        for item in built_in().items
    }


def test_every_outcome_reason_is_in_its_class() -> None:
    text = (ROOT / "docs/gateway.md").read_text()
    titles = {"failure": "failure", "client_fault": "client's fault", "censored": "censored"}
    for reason, outcome in OUTCOMES.items():
        if reason:
            title = titles[outcome.value]
            row = next(line for line in text.splitlines() if line.startswith(f"| {title}"))
            assert f"`{reason}`" in row, f"{reason} is not told as {title}"


def test_presets_are_told_as_they_are() -> None:
    text = (ROOT / "docs/policy-yaml.md").read_text()
    for preset in PRESETS.values():
        promotion = preset["promotion"]
        for checks in (gate["checks"] for gate in promotion.values()):
            assert ", ".join(f"`{check}`" for check in checks) in text


if __name__ == "__main__":
    (ROOT / "docs/cli.md").write_text(reference())
