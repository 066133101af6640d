"""Killing whatever there is under load loses nothing; and the eye that says so misses nothing."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import duckdb
import msgspec
import pytest
import sqlalchemy
from aftermath import Acknowledged, examine
from deltalake import DeltaTable, write_deltalake
from postgres import Missing, programs

from shipworthy.domain import rollout as machine
from shipworthy.domain.lifecycle import Decision
from shipworthy.domain.policy import Policy
from shipworthy.domain.records import InferenceRecord, Outcome
from shipworthy.settings import Project, load_project
from shipworthy.stores.journal import JournalWriter
from shipworthy.stores.ledger import open_ledger

CHAOS = Path(__file__).parents[2] / "bench" / "chaos.py"


def storm(folder: Path, kills: int, *options: str, seconds: float) -> dict[str, int]:
    """Run a storm that must leave nothing out of line; its figures."""
    figures = folder / "figures.json"
    command = [sys.executable, str(CHAOS), "--kills", str(kills), "--json", str(figures)]
    done = subprocess.run(
        [*command, "--keep", str(folder), *options],
        capture_output=True,
        text=True,
        timeout=seconds,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    told = json.loads(figures.read_bytes())["figures"]
    assert told["kills"] == kills
    assert told["lost"] == told["doubled"] == told["problems"] == 0
    return told


@pytest.fixture(scope="module")
def survived(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a project that was stopped behind a short storm."""
    folder = tmp_path_factory.mktemp("storm")
    # This seed strikes every kind of process within a few seconds, and `up` last of all.
    told = storm(folder, 9, "--seed", "19176", "--rate", "40", seconds=270)
    assert told["acknowledged"] > 100
    struck = {name.removeprefix("kills_") for name in told if name.startswith("kills_")}
    assert struck == {
        *("gateway", "keeper", "standby", "lake_writer", "model_server", "model_host", "up")
    }
    return folder


Plant = Callable[[Project, Acknowledged], object]


def lose_an_inference(project: Project, acknowledged: Acknowledged) -> None:
    DeltaTable(project.lake / "inferences").delete(f"id = '{min(acknowledged.inferences)}'")


def lose_a_feedback(project: Project, acknowledged: Acknowledged) -> None:
    DeltaTable(project.lake / "feedback").delete(f"id = '{min(acknowledged.feedback)}'")


def acknowledge_what_was_never_written(_: Project, acknowledged: Acknowledged) -> None:
    acknowledged.inferences.add("inf_never")


def leave_one_in_the_journal(project: Project, _: Acknowledged) -> None:
    writer = JournalWriter(project.journals, "late", 1 << 20)
    assert writer.append(
        InferenceRecord(
            id="inf_late",
            at=1.0,
            plan="digits",
            model="digits",
            revision=1,
            key="key",
            assigned="stable",
            probability=1.0,
            outcome=Outcome.SUCCESS,
            status=200,
            release="digits@1",
        )
    )
    writer.close()


def double(table: str) -> Plant:
    def plant(project: Project, _: Acknowledged) -> None:
        rows = DeltaTable(project.lake / table)
        with duckdb.connect() as database:
            found = database.read_parquet(
                rows.file_uris(), union_by_name=True, hive_partitioning=True
            )
            write_deltalake(rows, found.limit(1), mode="append")

    return plant


def in_the_ledger(*statements: str) -> Plant:
    def plant(project: Project, _: Acknowledged) -> None:
        with sqlalchemy.create_engine(project.ledger_url).begin() as connection:
            # The database itself guards the audit log; who owns the file can take the guard away.
            triggers = "SELECT name FROM sqlite_master WHERE type = 'trigger'"
            for (name,) in connection.exec_driver_sql(triggers).all():
                connection.exec_driver_sql(f'DROP TRIGGER "{name}"')
            for statement in statements:
                done = connection.exec_driver_sql(statement)
                assert done.rowcount, f"{statement} changed nothing"

    return plant


LAST_ENTRY = "(SELECT max(sequence) FROM audit_entries)"
PLANTED: dict[str, tuple[Plant, str, str]] = {
    "a lost inference": (lose_an_inference, "lost", "1 acknowledged inferences not in the lake"),
    "a lost feedback": (lose_a_feedback, "lost", "1 acknowledged feedback not in the lake"),
    "one never written": (acknowledge_what_was_never_written, "lost", "inf_never"),
    "one left behind": (leave_one_in_the_journal, "left", "1 inferences of the journals"),
    "a doubled inference": (double("inferences"), "doubled", "1 inferences in the lake more"),
    "a doubled feedback": (double("feedback"), "doubled", "1 feedback in the lake more"),
    "a doubled decision": (double("decisions"), "doubled", "1 decisions in the lake that"),
    "a doubled minute": (double("minutes"), "minutes", "cells of minutes"),
    "a decision that is not in the lake": (
        in_the_ledger(
            "INSERT INTO decisions (id, at, model, kind, text, numbers)"
            " VALUES ('dec_new', 1, 'digits', 'gate passed', '', '{}')"
        ),
        "lost",
        "1 decisions not in the lake",
    ),
    "evidence counted twice": (
        in_the_ledger("UPDATE traffic_counts SET assigned = assigned + 1 WHERE assigned > 0"),
        "traffic",
        "the keeper counted otherwise",
    ),
    "a release that came back from nowhere": (
        in_the_ledger(
            "UPDATE stage_entries SET rollback = 1 WHERE stage = 'staging'"
            " AND sequence = (SELECT min(sequence) FROM stage_entries WHERE stage = 'staging')"
        ),
        "stages",
        "which was not before",
    ),
    "a stage without its rollout": (
        in_the_ledger(
            "INSERT INTO stage_entries (model, stage, release, at, rollback)"
            " SELECT model, 'production', digest, 1, 0 FROM releases ORDER BY version DESC LIMIT 1"
        ),
        "stages",
        "took production over",
    ),
    "a term that came back": (
        in_the_ledger("UPDATE keeper_term SET number = number - 1"),
        "terms",
        "the last that was begun",
    ),
    "an altered entry of the audit log": (
        in_the_ledger("UPDATE audit_entries SET actor = 'nobody' WHERE sequence = 3"),
        "audit",
        "entry 3 was altered",
    ),
    "an audit log cut short": (
        in_the_ledger(f"DELETE FROM audit_entries WHERE sequence = {LAST_ENTRY}"),
        "audit",
        "the chain ends at",
    ),
}


@pytest.mark.xdist_group("storm")
@pytest.mark.timeout(300)
@pytest.mark.parametrize("planted", PLANTED)
def test_what_was_planted_behind_a_short_storm_is_found(
    survived: Path, tmp_path: Path, planted: str
) -> None:
    plant, kind, says = PLANTED[planted]
    shutil.copytree(survived / "project", tmp_path / "project", symlinks=True)
    project = load_project(tmp_path / "project")
    content = (survived / "acknowledged.json").read_bytes()
    acknowledged = msgspec.json.decode(content, type=Acknowledged)
    assert examine(project, acknowledged) == []
    plant(project, acknowledged)
    found = examine(project, acknowledged)
    assert [each for each in found if each.kind == kind and says in each.text], found


def roll_out(project: Project, id: str, now: float, *, exposed: int = 0) -> None:
    """A rollout that went two steps up, as the keeper would have kept it, and was aborted."""
    with open_ledger(project.ledger_url) as ledger, ledger.write() as tx:
        stored = tx.policies.current("digits")
        assert stored is not None
        policy = Policy.model_validate(stored.document)
        candidate, stable = ("sha256:" + "1" * 64, "digits@8"), ("sha256:" + "2" * 64, "digits@1")
        state = machine.begin(
            id=id, model="digits", candidate=candidate, stable=stable, policy=policy, now=now
        )
        out = machine.expose(state, revision=2, now=now + 1)
        verdicts = [*out.decisions]
        out = machine.abort(out.state, by="somebody", reason="", now=now + 2)
        verdicts += out.decisions
        tx.rollouts.save(msgspec.structs.replace(out.state, exposed_requests=exposed))
        for number, verdict in enumerate(verdicts):
            decision = Decision(
                id=f"dec_{id}_{number}",
                at=now + number,
                model="digits",
                kind=verdict.kind,
                text=verdict.text,
                rollout=id,
                numbers=verdict.numbers,
            )
            tx.decisions.add(decision)


ILLEGAL: dict[str, tuple[Plant, str]] = {
    "it is in two states": (
        in_the_ledger("UPDATE rollouts SET status = 'held' WHERE id = 'rol_a'"),
        "its row says held",
    ),
    "it was completed too early": (
        in_the_ledger("UPDATE decisions SET kind = 'complete' WHERE id = 'dec_rol_a_1'"),
        "it was completed at step 0 of 3",
    ),
    "it has no end": (
        in_the_ledger("UPDATE rollouts SET ended = NULL WHERE id = 'rol_a'"),
        "its end is None",
    ),
    "it has no decision": (
        in_the_ledger("DELETE FROM decisions WHERE rollout = 'rol_a'"),
        "its decisions make it preparing",
    ),
    "it went on behind its end": (
        in_the_ledger("UPDATE decisions SET sequence = sequence + 1000 WHERE id = 'dec_rol_a_0'"),
        "'expose' was decided while it was aborted",
    ),
    "its weight is no step": (
        in_the_ledger(
            "UPDATE decisions SET numbers = replace(numbers, '\"weight\":500', '\"weight\":501')"
            " WHERE id = 'dec_rol_a_0'"
        ),
        "led to 501",
    ),
    "nobody knows it": (
        in_the_ledger("UPDATE decisions SET rollout = 'rol_x' WHERE rollout = 'rol_a'"),
        "rol_x",
    ),
    "two at a time": (
        lambda project, _: roll_out(project, "rol_b", 1_001.0),
        "before rol_a had ended",
    ),
    "more evidence than requests": (
        lambda project, _: roll_out(project, "rol_c", 2_000.0, exposed=3),
        "decided on 3 requests",
    ),
}


@pytest.mark.xdist_group("storm")
@pytest.mark.timeout(300)
@pytest.mark.parametrize("illegal", ILLEGAL)
def test_an_illegal_way_of_a_rollout_is_found(survived: Path, tmp_path: Path, illegal: str) -> None:
    shutil.copytree(survived / "project", tmp_path / "project", symlinks=True)
    project = load_project(tmp_path / "project")
    roll_out(project, "rol_a", 1_000.0)
    told = lambda: [each for each in examine(project, Acknowledged()) if each.kind == "rollout"]
    assert told() == []
    plant, says = ILLEGAL[illegal]
    plant(project, Acknowledged())
    assert any(says in each.text for each in told()), told()


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_a_hundred_kills_on_sqlite_lose_nothing(tmp_path: Path) -> None:
    storm(tmp_path, 100, seconds=3500)


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_a_hundred_kills_on_postgresql_lose_nothing(tmp_path: Path) -> None:
    try:
        programs()
    except Missing as missing:
        if os.environ.get("CI"):
            pytest.fail(str(missing), pytrace=False)
        pytest.skip(str(missing))
    storm(tmp_path, 100, "--ledger", "postgres", seconds=3500)
