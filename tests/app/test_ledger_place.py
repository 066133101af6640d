"""A project whose ledger is anywhere: it is made, found again, and missed when it is gone."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path

import pytest
from postgres import Databases

from shipworthy.app import supervisor
from shipworthy.app.place import keeper_name
from shipworthy.app.session import open_session, prepare_state
from shipworthy.domain.terms import Term
from shipworthy.errors import Conflict, LedgerUnavailable
from shipworthy.settings import Project, Settings, load_project
from shipworthy.stores.ledger import SqlLedger, database_at


@pytest.fixture(params=["default", "file", "postgresql"])
def project(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    line = "{}"
    if request.param == "file":
        line = "ledger: sqlite:///elsewhere/decisions.db"
    elif request.param == "postgresql":
        databases: Databases = request.getfixturevalue("databases")
        line = f"ledger: {databases.make()}"
    (tmp_path / "shipworthy.yaml").write_text(line + "\n")
    return tmp_path


def test_what_is_written_is_found_again(project: Path):
    actors = []
    for _ in range(2):
        session = open_session(project, prepare=True)
        assert isinstance(session.ledger, SqlLedger)
        with session.ledger:
            actors.append(session.actor())
    assert actors[0] == actors[1]


def test_a_ledger_that_is_gone_is_not_replaced_by_an_empty_one(
    project: Path, request: pytest.FixtureRequest
):
    opened = load_project(project)
    prepare_state(opened)
    (opened.state / "snapshot").write_bytes(b"what the gateway obeys")
    prepare_state(opened)
    (opened.state / "snapshot").write_bytes(b"what the gateway obeys")
    if opened.ledger_url.startswith("sqlite"):
        Path(opened.ledger_url.removeprefix("sqlite:///")).unlink()
    else:
        databases: Databases = request.getfixturevalue("databases")
        name = opened.ledger_url.rpartition("/")[2]
        databases.server.drop(name)
        with pytest.raises(LedgerUnavailable, match="createdb"):
            prepare_state(opened)
        databases.server.create(name)
    with pytest.raises(LedgerUnavailable, match="is gone"):
        prepare_state(opened)


def test_where_another_folder_s_keepers_decide_nothing_is_started(
    project: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(supervisor, "LEASE_SECONDS", 0.2)
    session = replace(open_session(project, prepare=True), clock=lambda: 100.0)
    there = Project(project / "there", Settings())
    with session.ledger.write() as tx:
        tx.terms.put(Term(number=3, holder=keeper_name(there), until=102.0))

    async def fail(_: object) -> None:
        pytest.fail("it runs")

    async def up() -> None:
        await supervisor.supervise(
            session, on_ready=fail, bell=supervisor.Bell(asyncio.Event(), asyncio.Event())
        )

    assert isinstance(session.ledger, SqlLedger)
    with session.ledger, pytest.raises(Conflict, match="/there decide on this ledger"):
        asyncio.run(up())
    assert not any(session.project.logs.iterdir())


@pytest.mark.parametrize("line", ["{}", "ledger: sqlite:///own.db"])
def test_a_ledger_lies_in_its_project_whatever_that_folder_s_name_is(tmp_path: Path, line: str):
    root = tmp_path / "50%41 why? #1 \u00fc 'q'"
    root.mkdir()
    (root / "shipworthy.yaml").write_text(line + "\n")
    project = load_project(root)
    prepare_state(project)
    file = root / "own.db" if "own" in line else project.state / "ledger.db"
    assert database_at(project.ledger_url).name == str(file)
    assert file.is_file()
    assert [path.name for path in tmp_path.iterdir()] == [root.name]


@pytest.mark.parametrize(
    "url",
    ["postgresql:///ledger", "postgresql:///ledger?host=/run/postgresql", "postgresql://a@b/c"],
)
def test_a_url_of_a_server_is_left_as_it_is(tmp_path: Path, url: str):
    (tmp_path / "shipworthy.yaml").write_text(f"ledger: {url}\n")
    assert load_project(tmp_path).ledger_url == url
