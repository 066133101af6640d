"""Who acts and what is asked for, with no process running."""

from __future__ import annotations

import os
import pwd
from pathlib import Path

import pytest
from tests.rollout.conftest import manifest

from shipworthy.app.access import create_key
from shipworthy.app.asking import ask
from shipworthy.app.founding import make_project
from shipworthy.app.session import Session, open_session
from shipworthy.domain.lifecycle import IntentKind, Release, StageEntry
from shipworthy.domain.manifest import Manifest
from shipworthy.domain.names import Stage
from shipworthy.domain.policy import Policy
from shipworthy.domain.rollout import begin
from shipworthy.errors import Conflict, NotFound, UsageError


@pytest.fixture
def session(tmp_path: Path) -> Session:
    return make_project(tmp_path / "project", preset="standard", solo=False)


def register(session: Session, version: int) -> Release:
    content = manifest(description=f"version {version}")
    digest = Manifest.model_validate(content).digest()
    release = Release(
        model="digits", version=version, digest=digest, manifest=content, created_at=1.0,
        created_by=session.actor().id,
    )  # fmt: skip
    with session.ledger.write() as tx:
        tx.releases.add(release)
    return release


def test_a_rollback_notes_what_it_takes_away(session: Session) -> None:
    first, second = register(session, 1), register(session, 2)
    entry = StageEntry(
        model="digits", stage=Stage.PRODUCTION, release=first.digest, policy=None, at=1.0
    )
    with session.ledger.write() as tx:
        tx.stages.enter(entry)
    actor = session.actor()
    assert ask(session, IntentKind.ROLLBACK, "digits", actor=actor).release == first.digest
    state = begin(
        id="rol_1",
        model="digits",
        candidate=(second.digest, second.name),
        stable=(first.digest, first.name),
        policy=Policy(model="digits"),
        now=2.0,
    )
    with session.ledger.write() as tx:
        tx.rollouts.save(state)
    assert ask(session, IntentKind.ROLLBACK, "digits", actor=actor).release == second.digest
    assert ask(session, IntentKind.PAUSE, "digits", actor=actor).release is None


def test_nothing_is_asked_of_a_model_that_is_not_there(session: Session) -> None:
    with pytest.raises(NotFound, match="no model digitz"):
        ask(session, IntentKind.ROLLBACK, "digitz", actor=session.actor())
    with session.ledger.read() as tx:
        assert tx.intents.open() == []


def test_an_account_without_a_name_acts_by_its_number(
    session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unknown(_: int) -> None:
        raise KeyError("getpwuid(): uid not found")

    monkeypatch.setattr(pwd, "getpwuid", unknown)
    assert session.actor().name == f"uid {os.getuid()}"


def test_secrets_are_whole_and_made_once(session: Session) -> None:
    folder = session.project.secrets
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    assert {len(content) for content in before.values()} == {32}
    assert {file.stat().st_mode & 0o777 for file in folder.iterdir()} == {0o600}
    open_session(session.project.root, prepare=True)
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before


def test_a_relative_ledger_lies_in_the_project_wherever_one_stands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "shipworthy.yaml").write_text("ledger: sqlite:///decisions.db\n")
    open_session(tmp_path, prepare=True)
    assert (tmp_path / "decisions.db").is_file()
    (tmp_path / "models").mkdir()
    monkeypatch.chdir(tmp_path / "models")
    with open_session().ledger.read() as tx:
        assert tx.releases.list() == []
    assert open_session().project.ledger_url == f"sqlite:///{tmp_path / 'decisions.db'}"
    (tmp_path / "shipworthy.yaml").write_text(f"ledger: sqlite:///{tmp_path}/decisions.db\n")
    assert open_session().project.ledger_url == f"sqlite:///{tmp_path / 'decisions.db'}"


@pytest.mark.parametrize("holder", ["", "  ", "a\nb"])
def test_a_key_has_a_holder_with_a_name(session: Session, holder: str) -> None:
    with pytest.raises(UsageError, match="needs a holder"):
        create_key(session, holder)


def test_nobody_gets_a_key_of_our_own_services(session: Session) -> None:
    with session.ledger.write() as tx:
        tx.principals.ensure("keeper", "service")
    with pytest.raises(Conflict, match="keeper is a service here"):
        create_key(session, "keeper")
    with session.ledger.read() as tx:
        assert tx.keys.list() == []
