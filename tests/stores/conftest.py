"""The adapters under test. Contract tests run over each; another adapter is one more parameter."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest
from postgres import Databases

from shipworthy.domain.records import InferenceRecord, Outcome
from shipworthy.ports import Blobs, JournalReader, JournalWriter
from shipworthy.stores import journal
from shipworthy.stores.blobs import LocalBlobs
from shipworthy.stores.ledger import SqlLedger, migrate, open_ledger


@pytest.fixture(scope="session")
def empty_sqlite(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("ledger") / "empty.db"
    migrate(f"sqlite:///{file}")
    return file


@pytest.fixture(params=["sqlite", "postgresql"])
def empty_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Where a ledger could be, and is none yet."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'ledger.db'}"
    databases: Databases = request.getfixturevalue("databases")
    return databases.make()


@pytest.fixture
def ledger_url(empty_url: str, request: pytest.FixtureRequest) -> str:
    """A ledger of its own, migrated and empty."""
    if not empty_url.startswith("sqlite"):
        databases: Databases = request.getfixturevalue("databases")
        return databases.make(migrated=True)
    shutil.copyfile(request.getfixturevalue("empty_sqlite"), empty_url.removeprefix("sqlite:///"))
    return empty_url


@pytest.fixture
def ledger(ledger_url: str) -> Generator[SqlLedger]:
    with open_ledger(ledger_url, timeout=0.3) as opened:
        yield opened


@pytest.fixture(params=["local"])
def blobs(request: pytest.FixtureRequest, tmp_path: Path) -> Blobs:
    return LocalBlobs(tmp_path / "blobs")


@pytest.fixture(params=["local"])
def journal_folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return tmp_path / "journals"


@pytest.fixture
def open_writer(journal_folder: Path) -> Generator[Callable[..., JournalWriter]]:
    writers: list[JournalWriter] = []

    def make(worker: str = "w0", max_bytes: int = 10**9, **options: int) -> JournalWriter:
        writer = journal.JournalWriter(journal_folder, worker, max_bytes, **options)
        writers.append(writer)
        return writer

    yield make
    for writer in writers:
        writer.close()


@pytest.fixture
def journal_reader(journal_folder: Path) -> JournalReader:
    return journal.JournalReader(journal_folder)


@pytest.fixture
def record() -> Callable[..., InferenceRecord]:
    def make(number: int = 0, **fields: Any) -> InferenceRecord:
        known: dict[str, Any] = {
            "id": f"inference-{number}",
            "at": 1_700_000_000.0 + number,
            "plan": "digits",
            "model": "digits",
            "revision": 1,
            "key": "k",
            "assigned": "stable",
            "probability": 0.95,
            "outcome": Outcome.SUCCESS,
            "status": 200,
            "release": "digits@1",
        }
        return InferenceRecord(**(known | fields))

    return make


@pytest.fixture
def unprivileged() -> Generator[Callable[[], AbstractContextManager[Path]]]:
    """A block as a user whom permissions bind, with a folder that this user owns."""
    folder = Path(tempfile.mkdtemp())

    @contextmanager
    def block() -> Generator[Path]:
        if os.geteuid() != 0:
            yield folder
            return
        os.chown(folder, 65534, 65534)
        os.seteuid(65534)
        try:
            yield folder
        finally:
            os.seteuid(0)

    yield block
    folder.chmod(0o700)
    shutil.rmtree(folder)
