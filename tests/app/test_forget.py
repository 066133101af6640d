"""`shipworthy forget`: what it leaves on record, and what the lake's writer makes of it."""

from __future__ import annotations

import io
import json
import os
import secrets

import pytest
from tests.app.conftest import Town
from tests.app.test_querying import inference

from shipworthy.app.erasing import held_of, is_erased, pseudonym_of
from shipworthy.app.lake_writing import make_writer
from shipworthy.app.session import Session, open_session
from shipworthy.domain.records import FeedbackRecord, MirrorRecord, Outcome
from shipworthy.gateway.tickets import Pseudonyms
from shipworthy.stores.journal import JournalWriter


@pytest.fixture
def session(town: Town) -> Session:
    return open_session(town.root)


def move(session: Session, *records) -> None:
    journal = JournalWriter(session.project.journals, secrets.token_hex(4), 10**8)
    assert all(journal.append(record) for record in records)
    journal.close()
    drain(session)


def drain(session: Session) -> None:
    writer = make_writer(session)
    while writer.cycle():
        pass


@pytest.fixture
def held(session: Session) -> str:
    """The pseudonym of u, of whom the lake holds two inferences and feedback on one."""
    unit = pseudonym_of(session.project, "u")
    rating = FeedbackRecord(
        id="f", at=1_790_000_100.0, inference="i1", key="k", kind="rating", name="stars", value=1,
        unit=unit, asked_at=1_790_000_001.0,
    )  # fmt: skip
    move(session, inference(1, unit=unit), inference(2, unit=unit), inference(3), rating)
    return unit


def test_a_pseudonym_is_what_the_gateway_writes(session: Session) -> None:
    secret = (session.project.secrets / "pseudonyms").read_bytes()
    assert pseudonym_of(session.project, "user-17") == Pseudonyms(secret).of("user-17")


@pytest.mark.parametrize("encoding", ["utf-8", "latin-1"])
def test_a_unit_is_called_what_the_gateway_calls_it(session: Session, encoding: str) -> None:
    secret = (session.project.secrets / "pseudonyms").read_bytes()
    typed = os.fsdecode("Jörg".encode(encoding))
    assert pseudonym_of(session.project, typed) == Pseudonyms(secret).of("Jörg")


def test_answers_of_mirrored_releases_are_told_too(town: Town, session: Session, held: str) -> None:
    copy = MirrorRecord(
        id="m", at=1_790_000_002.0, inference="i1", plan="digits", model="digits",
        release="digits@2", outcome=Outcome.SUCCESS, unit=held,
    )  # fmt: skip
    move(session, copy)
    said = town.sw("forget", "u", "--show")
    assert "2 inferences and 1 feedback, and 1 mirrored answer of it" in " ".join(said.split())


def test_a_unit_is_forgotten_by_the_lake(town: Town, session: Session, held: str) -> None:
    said = town.sw("forget", "u", "--yes")
    assert "2 inferences and 1 feedback" in said
    assert "once 'shipworthy up' runs" in said
    assert not is_erased(session.project, 1)
    drain(session)
    assert is_erased(session.project, 1)
    found = held_of(session.project, held, 60.0)
    assert (found.inferences, found.feedback) == (0, 0)
    rest = town.sw("query", "SELECT id FROM inferences", "--format", "json")
    assert json.loads(rest) == [{"id": "i3"}]


def test_what_arrives_late_is_left_out(town: Town, session: Session, held: str) -> None:
    town.sw("forget", "u", "--yes")
    move(session, inference(4, unit=held), inference(5))
    rest = town.sw("query", "SELECT id FROM inferences ORDER BY id", "--format", "json")
    assert [row["id"] for row in json.loads(rest)] == ["i3", "i5"]


def test_the_audit_log_says_that_and_not_whom(town: Town, session: Session, held: str) -> None:
    town.sw("forget", "u", "--yes", key="bob")
    with session.ledger.read() as tx:
        entry = list(tx.audit.entries())[-1]
        (tombstone,) = tx.tombstones.after(0)
        actor = tx.principals.get(entry.actor)
    assert (entry.act, entry.subject, entry.detail) == ("forget unit", "tombstone 1", {})
    assert actor is not None
    assert actor.name == "bob"
    assert (tombstone.unit, tombstone.by, tombstone.sequence) == (held, actor.id, 1)
    log = town.sw("audit", "log", "--json")
    assert held not in log
    town.sw("audit", "verify")


def test_it_may_be_asked_again_and_by_pseudonym(town: Town, session: Session, held: str) -> None:
    town.sw("forget", "u", "--yes")
    town.sw("forget", held, "--pseudonym", "--yes")
    with session.ledger.read() as tx:
        assert [each.unit for each in tx.tombstones.after(0)] == [held, held]


def test_it_shows_without_forgetting(town: Town, session: Session, held: str) -> None:
    said = town.sw("forget", "u", "--show")
    assert held in said
    assert "2 inferences and 1 feedback" in said
    with session.ledger.read() as tx:
        assert tx.tombstones.after(0) == []


def test_a_lake_that_cant_be_read_keeps_nobody_from_being_forgotten(
    town: Town, session: Session, held: str
) -> None:
    for log in (session.project.lake / "feedback" / "_delta_log").glob("*.json"):
        log.write_text("damaged")
    assert "can't be told now" in town.sw("forget", "u", "--yes")
    assert town.run("forget", "u", "--show").code == 3
    with session.ledger.read() as tx:
        assert [each.unit for each in tx.tombstones.after(0)] == [held]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("u",), "add --yes"),
        (("", "--yes"), "has no name"),
        (("u", "--pseudonym", "--yes"), "is no pseudonym"),
        (("u", "--yes", "--wait", "soon"), "soon"),
    ],
)
def test_what_is_wrong_is_said_and_nothing_forgotten(
    town: Town,
    session: Session,
    monkeypatch: pytest.MonkeyPatch,
    arguments: tuple[str, ...],
    said: str,
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    done = town.run("forget", *arguments)
    assert (done.code, said in done.stderr) == (2, True), done.output
    with session.ledger.read() as tx:
        assert tx.tombstones.after(0) == []


@pytest.mark.parametrize(("answer", "count"), [("n\n", 0), ("y\n", 1)])
def test_a_person_is_asked(
    town: Town, session: Session, monkeypatch: pytest.MonkeyPatch, answer: str, count: int
) -> None:
    keyboard = io.StringIO(answer)
    monkeypatch.setattr(keyboard, "isatty", lambda: True)
    monkeypatch.setattr("sys.stdin", keyboard)
    assert town.run("forget", "u").code == 1 - count
    with session.ledger.read() as tx:
        assert len(tx.tombstones.after(0)) == count


def test_a_lost_secret_is_told(town: Town, session: Session) -> None:
    (session.project.secrets / "pseudonyms").unlink()
    done = town.run("forget", "u", "--yes")
    assert done.code == 2
    assert "restore it from a backup" in done.stderr
