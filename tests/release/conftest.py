"""A project folder with a small trained model, and the real stores."""

import shutil
from collections.abc import Generator
from pathlib import Path

import pytest
import skops.io
from sklearn.linear_model import LogisticRegression

from shipworthy.domain.manifest import ReleaseSpec
from shipworthy.release.create import create_release
from shipworthy.stores.blobs import LocalBlobs
from shipworthy.stores.ledger import SqlLedger, migrate, open_ledger

CONTRACT = {
    "inputs": [{"name": "x", "datatype": "FP64", "shape": [-1, 2]}],
    "outputs": [{"name": "y", "datatype": "INT64", "shape": [-1]}],
}


@pytest.fixture(scope="session")
def model() -> LogisticRegression:
    return LogisticRegression().fit([[0, 0], [1, 1], [0, 1], [2, 2]], [0, 1, 0, 1])


@pytest.fixture(scope="session")
def empty_ledger(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("ledger") / "empty.db"
    migrate(f"sqlite:///{file}")
    return file


@pytest.fixture
def ledger(empty_ledger: Path, tmp_path: Path) -> Generator[SqlLedger]:
    file = tmp_path / "ledger.db"
    shutil.copyfile(empty_ledger, file)
    with open_ledger(f"sqlite:///{file}") as opened:
        yield opened


@pytest.fixture
def maker(ledger) -> str:
    with ledger.write() as tx:
        return tx.principals.ensure("Ann").id


@pytest.fixture
def blobs(tmp_path) -> LocalBlobs:
    return LocalBlobs(tmp_path / "blobs")


@pytest.fixture
def project(tmp_path, model) -> Path:
    folder = tmp_path / "project"
    folder.mkdir()
    skops.io.dump(model, folder / "model.skops")
    (folder / "train.csv").write_text("a,b,y\n0,0,0\n1,1,1\n")
    (folder / "sample.csv").write_text("a,b\n0,1\n")
    return folder


@pytest.fixture
def spec():
    """`release.yaml` as a value, with some of it changed."""

    def make(**changes) -> ReleaseSpec:
        content = {
            "model": "digits",
            "owner": {"name": "Vision team", "email": "vision@team.org"},
            "artifacts": [{"path": "model.skops", "format": "skops"}],
            "data": [
                {"name": "train", "path": "train.csv", "role": "train"},
                {"name": "some", "path": "sample.csv", "role": "sample"},
            ],
            "contract": CONTRACT,
            "metrics": {"heldout": {"accuracy": {"value": 0.985, "n": 540}}},
        }
        return ReleaseSpec.model_validate(content | changes)

    return make


@pytest.fixture
def create(project, blobs, ledger, maker, spec):
    """Create a release of the project from a changed spec."""

    def make(_spec=None, /, folder=project, infer=None, progress=None, **changes):
        return create_release(
            _spec or spec(**changes), folder, blobs=blobs, ledger=ledger, clock=lambda: 1_000.0,
            maker=maker, infer=infer, progress=progress,
        )  # fmt: skip

    return make
