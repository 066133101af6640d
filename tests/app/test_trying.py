"""What `try` writes, and what it leaves as people wrote it."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import skops.io
from tests.app.conftest import trained

from shipworthy.app import trying
from shipworthy.app.founding import make_project
from shipworthy.domain.contract import Contract, Tensor
from shipworthy.protocols.documents import read_document

CONTRACT = Contract(
    inputs=(Tensor("input", "FP64", (-1, 64)),), outputs=(Tensor("predict", "INT64", (-1,)),)
)
OWNED = """
owner: {name: Vision team, email: vision@shipworthy.dev}  # they know it best
metrics: {heldout: {accuracy: {value: 0.9, n: 500}}}
"""


def test_trying_again_keeps_what_a_person_added(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked: list[Path | None] = []

    def look_at(_spec: Any, _folder: Path, sample: Path | None, **_: Any) -> SimpleNamespace:
        looked.append(sample)
        return SimpleNamespace(contract=CONTRACT, sample_request=None, notes=())

    monkeypatch.setattr(trying, "look_at", look_at)
    session = make_project(tmp_path, preset="standard", solo=False)
    model, rows, file = tmp_path / "m.skops", tmp_path / "rows.csv", tmp_path / "release.yaml"
    skops.io.dump(trained()[0], model)
    rows.write_text("a,b\n1,2\n")
    first = trying.look_and_register(session, trying.Wanted(target=str(model), sample=rows))
    file.write_text(file.read_text() + OWNED)
    written = file.read_text()
    second = trying.look_and_register(session, trying.Wanted(target=str(model)))
    assert looked == [rows, rows], "the recorded sample is asked again"
    assert file.read_text() == written, "comments and all"
    assert (first.release.name, second.release.name) == ("m@1", "m@2")
    assert second.release.manifest["owner"]["name"] == "Vision team"
    other = tmp_path / "other.csv"
    other.write_text("a,b\n3,4\n")
    third = trying.look_and_register(session, trying.Wanted(target=str(model), sample=other))
    assert third.release.name == "m@3"
    spec = read_document(file.read_bytes(), str(file), trying.ReleaseSpec)
    assert spec.owner is not None
    assert [data.path for data in spec.data] == ["other.csv"]
