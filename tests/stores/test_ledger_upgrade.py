"""A live ledger of an earlier revision, brought to this one while others use it."""

from __future__ import annotations

import base64
import json
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from postgres import wait_for
from sqlalchemy import column, insert, select, table, text

from shipworthy.domain import audit
from shipworthy.domain.names import Stage, parse_reference
from shipworthy.domain.plan import Limits
from shipworthy.errors import LedgerUnavailable
from shipworthy.stores.ledger import SqlLedger, ledger, open_ledger, schema

SAMPLES = Path(__file__).with_name("samples")
"""Rows as the code of their time wrote them; written once and never changed."""

_MIGRATE = """
import sys
from shipworthy.stores.ledger import migrate
migrate(sys.argv[1], timeout=20)
"""


def sample(revision: str) -> tuple[str, dict[str, list[dict[str, Any]]]]:
    """The newest one that is not newer than the revision, and its own revision."""
    found = {path.stem.removeprefix("ledger-"): path for path in SAMPLES.glob("ledger-*.json")}
    known = max(each for each in found if each <= revision)

    def plain(value: dict[str, Any]) -> Any:
        return base64.b64decode(value["base64"]) if value.keys() == {"base64"} else value

    return known, json.loads(found[known].read_text(), object_hook=plain)


def make(url: str, revision: str) -> dict[str, list[dict[str, Any]]]:
    """Make a ledger of that revision, with rows in every table that its sample knows."""
    known, rows = sample(revision)
    database = ledger.database_at(url)
    database.create()
    database.prepare(5)
    migrator = database.open_migrator(5)
    with migrator.begin() as connection:
        ledger._upgrade(connection, known)
    with migrator.begin() as connection:
        for name in ("audit_head", "keeper_term"):  # which have their one row from the beginning
            with database.unguarded(connection, name):
                connection.exec_driver_sql(f"DELETE FROM {name}")
        for name, content in rows.items():
            columns = [column(each) for each in content[0]]
            connection.execute(insert(table(name, *columns)), content)
            of_now = schema.metadata.tables[name]
            if of_now.autoincrement_column is not None and "sequence" in of_now.c:
                database.continue_sequence(connection, of_now)
        ledger._upgrade(connection, revision)
    migrator.dispose()
    return rows


def read(opened: SqlLedger, rows: dict[str, list[dict[str, Any]]]) -> dict[str, list]:
    """What the sample's tables and columns hold now."""
    with opened.reading() as connection:
        found = {}
        for name, content in rows.items():
            query = select(table(name, *map(column, content[0])))
            found[name] = [dict(row) for row in connection.execute(query).mappings()]
    return found


def in_order(rows: dict[str, list]) -> dict[str, list]:
    return {name: sorted(content, key=repr) for name, content in rows.items()}


class Writer(threading.Thread):
    """A process of the old version that writes until it is refused."""

    def __init__(self, opened: SqlLedger) -> None:
        super().__init__()
        self.opened = opened
        self.written: list[dict[str, str]] = []
        self.refused: LedgerUnavailable | None = None

    def run(self) -> None:
        principals = table("principals", column("id"), column("name"), column("kind"))
        while self.refused is None:
            row = {"id": f"w{len(self.written)}", "name": f"{len(self.written)}", "kind": "person"}
            try:
                with self.opened.writing() as connection:
                    connection.execute(insert(principals), [row])
            except LedgerUnavailable as error:
                if "locked" not in str(error):
                    self.refused = error
            else:
                self.written.append(row)


@pytest.mark.parametrize("revision", schema.REVISIONS[:-1])
def test_a_live_ledger_is_brought_up_to_date(
    empty_url: str, revision: str, monkeypatch: pytest.MonkeyPatch
):
    before = make(empty_url, revision)
    known = schema.REVISIONS[: schema.REVISIONS.index(revision) + 1]
    with monkeypatch.context() as old_code:
        old_code.setattr("shipworthy.stores.ledger.ledger.REVISIONS", known)
        old = open_ledger(empty_url, timeout=20)
        assert in_order(read(old, before)) == in_order(before)
        writer = Writer(old)
        with old.reading() as connection:
            names = text("SELECT count(*) FROM principals")
            seen = connection.execute(names).scalar_one()
            writer.start()
            wait_for(lambda: len(writer.written) > 3)
            command = [sys.executable, "-W", "error", "-c", _MIGRATE, empty_url]
            migration = subprocess.Popen(command)
            wait_for(lambda: migration.poll() is not None or waits_for_readers(empty_url))
            # Whichever way: the old reader still sees all, and as it was.
            assert connection.execute(names).scalar_one() == seen
            assert connection.execute(text("SELECT number FROM keeper_term")).scalar_one() == 4
        assert migration.wait(60) == 0
        writer.join(60)
        assert "upgrade Shipworthy" in str(writer.refused)
        for transaction in (old.read, old.write):
            with pytest.raises(LedgerUnavailable, match="upgrade Shipworthy"), transaction():
                pass
        with pytest.raises(LedgerUnavailable, match="upgrade Shipworthy"):
            open_ledger(empty_url)
        old.close()

    with open_ledger(empty_url) as opened:
        after = read(opened, before)
        before["principals"] += writer.written
        assert in_order(after) == in_order(before)
        check_content(opened)


def waits_for_readers(url: str) -> bool:
    if url.startswith("sqlite"):
        return False
    engine = ledger.database_at(url).open_reader(5)
    with engine.begin() as connection:
        waiting = "SELECT count(*) FROM pg_locks WHERE NOT granted AND mode = 'AccessExclusiveLock'"
        found = connection.execute(text(waiting)).scalar_one()
    engine.dispose()
    return bool(found)


def check_content(opened: SqlLedger) -> None:
    """This version understands what that one wrote, and goes on from it."""
    with opened.write() as tx:
        assert audit.verify(tx.audit.entries(), head=tx.audit.head()) == []
        at_stage = tx.releases.find(parse_reference("digits@production"))
        assert at_stage is not None
        assert at_stage.version == 1
        assert at_stage.manifest["nested"] == [1, 2.0, None, {"é": True}]
        assert tx.policies.current("digits") is not None
        assert [each.key.id for each in tx.keys.list()] == ["k1", "k2"]
        assert {each.key.limits for each in tx.keys.list()} == {Limits()}
        assert len(tx.evidence.findings(at_stage.digest)) == 1
        assert len(tx.evidence.approvals(at_stage.digest, Stage.PRODUCTION)) == 1
        assert len(tx.evidence.waivers()) == 2
        assert [each.id for each in tx.deployments.list()] == ["d1"]
        assert [each.id for each in tx.intents.open()] == ["i1"]
        (state,) = tx.rollouts.active()
        assert set(tx.rollouts.units(state.id)) == {"u0", "u1"}
        assert [each.id for each in tx.decisions.list()] == ["d2", "d1"]
        assert tx.plans.all()["digits"].revision == 3
        assert tx.traffic.since("digits", 0)[0].served == 2
        assert tx.cursors.load() == {"worker-0.1": 2**40, "worker-1.1": 17}
        assert tx.terms.current().number == 4
        tx.rollouts.save(state)
        tx.audit.append(at=2e9, actor="p", act="upgrade", subject="ledger")
        assert audit.verify(tx.audit.entries(), head=tx.audit.head()) == []


def test_every_table_of_the_sample_has_rows():
    for path in SAMPLES.glob("ledger-*.json"):
        _, rows = sample(path.stem.removeprefix("ledger-"))
        assert all(rows.values())
