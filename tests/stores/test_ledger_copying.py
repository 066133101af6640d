"""Copies of a ledger: from any kind of database to any, while others write."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from postgres import Databases
from sqlalchemy import select, text

from shipworthy.domain import audit
from shipworthy.domain.erasure import Tombstone
from shipworthy.domain.lifecycle import Decision
from shipworthy.domain.policy import Policy
from shipworthy.domain.rollout import UnitHistory, begin
from shipworthy.domain.terms import Term
from shipworthy.errors import Conflict, IntegrityError, LedgerUnavailable
from shipworthy.stores.ledger import SqlTransaction, copy_ledger, migrate, open_ledger, schema


@pytest.fixture(params=["sqlite", "postgresql"])
def target_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'new' / 'target.db'}"
    databases: Databases = request.getfixturevalue("databases")
    return databases.make()


def fill(tx: SqlTransaction, first: int = 0, count: int = 1_200) -> None:
    if first == 0:
        state = begin(
            id="r1",
            model="digits",
            candidate=("sha256:" + "b" * 64, "digits@2"),
            stable=("sha256:" + "a" * 64, "digits@1"),
            policy=Policy(model="digits"),
            now=5.0,
        )
        tx.rollouts.save(state)
        tx.rollouts.save_units("r1", {f"u{n}": UnitHistory(n % 3) for n in range(count)})
        tx.terms.put(Term(number=7, holder="k", until=3.5))
        tx.cursors.save({"a": 2**40})
    for number in range(first, first + count):
        tx.audit.append(at=number, actor="p", act="a", subject="s", detail={"é": [1, 2.0, None]})
    tx.decisions.add(
        Decision(id=f"d{first}", at=1.0, model="m", kind="k", text="t", numbers={"n": 1e-300})
    )
    tx.tombstones.add(Tombstone(unit=f"u{first}", at=1.0, by="p"))


def content(url: str) -> dict[str, list]:
    with open_ledger(url) as ledger, ledger.reading() as connection:
        return {
            table.name: list(connection.execute(select(table).order_by(*table.primary_key)).all())
            for table in schema.metadata.sorted_tables
        }


def test_a_copy_holds_the_same_and_goes_on(ledger_url: str, target_url: str):
    with open_ledger(ledger_url) as ledger, ledger.write() as tx:
        fill(tx)
    done: list[int] = []
    head = copy_ledger(ledger_url, target_url, done.append)
    before = content(ledger_url)
    assert content(target_url) == before
    assert sum(done) == sum(len(rows) for rows in before.values())
    assert head.sequence == 1_200
    with open_ledger(target_url) as ledger:
        with ledger.write() as tx:
            fill(tx, 1_200, 3)
            assert tx.tombstones.after(1)[0].sequence == 2
            assert [sequence for sequence, _ in tx.decisions.after(1, 9)] == [2]
            entries = list(tx.audit.entries())
            assert audit.verify(entries, head=tx.audit.head(), exported=head) == []
        for change in (
            "UPDATE audit_head SET sequence = 0",
            "DELETE FROM audit_head",
            "DELETE FROM audit_entries",
        ):
            with pytest.raises(Conflict), ledger.writing() as connection:
                connection.execute(text(change))


def test_an_empty_ledger_is_copied(ledger_url: str, target_url: str):
    assert copy_ledger(ledger_url, target_url).sequence == 0
    assert content(target_url) == content(ledger_url)


def test_a_writer_goes_on_meanwhile(ledger_url: str, target_url: str):
    stop, wrote = threading.Event(), threading.Event()

    def write() -> None:
        with open_ledger(ledger_url) as ledger:
            first = 700
            while not stop.is_set():
                with ledger.write() as tx:
                    fill(tx, first, 5)
                first += 5
                wrote.set()

    with open_ledger(ledger_url) as ledger, ledger.write() as tx:
        fill(tx, count=700)
    writer = threading.Thread(target=write)
    writer.start()

    def wait_for_writes(_: int) -> None:
        wrote.clear()
        assert wrote.wait(30)

    try:
        assert wrote.wait(30)
        head = copy_ledger(ledger_url, target_url, wait_for_writes)
    finally:
        stop.set()
        writer.join()
    with open_ledger(target_url) as ledger, ledger.read() as tx:
        # One moment for all tables: each write added five entries, a decision and a tombstone.
        numbers = [sequence for sequence, _ in tx.decisions.after(0, 10_000)]
        assert head.sequence == 700 + 5 * (len(numbers) - 1)
        assert len(tx.tombstones.after(0)) == len(numbers)
    assert content(ledger_url)["decisions"][: len(numbers)] == content(target_url)["decisions"]


@pytest.mark.parametrize(
    "add",
    [
        lambda tx: tx.principals.ensure("ada"),
        lambda tx: tx.terms.put(Term(number=1)),
        lambda tx: tx.audit.append(at=1.0, actor="p", act="a", subject="s"),
    ],
    ids=["row", "term", "entry"],
)
def test_a_target_with_rows_is_left_alone(
    ledger_url: str, target_url: str, add: Callable[[SqlTransaction], object]
):
    with open_ledger(ledger_url) as ledger, ledger.write() as tx:
        tx.principals.ensure("grace")
    migrate(target_url)
    with open_ledger(target_url) as ledger, ledger.write() as tx:
        add(tx)
    before = content(target_url)
    with pytest.raises(Conflict, match="rows already"):
        copy_ledger(ledger_url, target_url)
    assert content(target_url) == before


def test_a_broken_chain_is_not_copied(ledger_url: str, target_url: str):
    with open_ledger(ledger_url) as ledger:
        with ledger.write() as tx:
            fill(tx, count=5)
        with (
            ledger.writing() as connection,
            ledger._database.unguarded(connection, "audit_entries"),
        ):
            connection.execute(text("UPDATE audit_entries SET actor = 'x' WHERE sequence = 3"))
    with pytest.raises(IntegrityError, match="entry 3 was altered"):
        copy_ledger(ledger_url, target_url)
    with open_ledger(target_url) as ledger, ledger.read() as tx:
        assert tx.audit.head().sequence == 0
        assert tx.rollouts.active() == []


def test_a_source_that_is_missing_makes_no_target(tmp_path: Path):
    with pytest.raises(LedgerUnavailable):
        copy_ledger(f"sqlite:///{tmp_path}/none.db", f"sqlite:///{tmp_path}/target.db")
    assert list(tmp_path.iterdir()) == []
