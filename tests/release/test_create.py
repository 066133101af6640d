"""From files to a registered release: the same content once, other content never under its name."""

import os
import resource
import subprocess
import sys
import threading

import pytest

from shipworthy.domain.contract import Contract, Tensor
from shipworthy.domain.manifest import Manifest, PinnedFile, ReleaseSpec
from shipworthy.domain.names import ReleaseReference
from shipworthy.errors import Conflict, NotFound, UnsafeArtifact, UsageError
from shipworthy.release.create import find_sources
from shipworthy.release.files import digest_file


def test_a_release_is_pinned_stored_and_registered(create, ledger, blobs, maker, project) -> None:
    made = create()
    release, manifest = made.release, made.manifest
    assert made.created
    assert (release.name, release.created_by, release.created_at) == ("digits@1", maker, 1_000.0)
    assert release.digest == manifest.digest()
    assert release.digest in made.sentence
    assert manifest.metrics["heldout"]["accuracy"].n == 540
    assert manifest.inference.engine == "sklearn"
    train, sample = manifest.data
    assert not blobs.has(train.files[0].digest)  # pinned, not copied
    assert blobs.has(sample.files[0].digest)
    assert train.files[0].size == len((project / "train.csv").read_bytes())
    for file in manifest.stored_files():
        blobs.verify(file)
    with ledger.read() as tx:
        assert tx.releases.find(ReleaseReference("digits", version=1)) == release
        entry = list(tx.audit.entries())[-1]
    assert (entry.act, entry.subject, entry.actor) == ("register release", "digits@1", maker)
    assert entry.detail["digest"] == release.digest


def test_nothing_of_this_machine_is_in_the_manifest(create, tmp_path) -> None:
    assert str(tmp_path) not in str(create().release.manifest)


def test_the_same_content_again_changes_nothing(create, ledger) -> None:
    first = create()
    again = create(version=1)
    assert not again.created
    assert again.release == first.release
    assert "already" in again.sentence
    with ledger.read() as tx:
        assert len(tx.releases.list()) == 1
        assert sum(entry.act == "register release" for entry in tx.audit.entries()) == 1


def test_other_content_is_the_next_version(create, project) -> None:
    first = create()
    (project / "train.csv").write_text("other")
    second = create()
    assert second.release.version == 2
    assert second.release.digest != first.release.digest
    assert create(version=7, description="x").release.version == 7
    assert create(description="y").release.version == 8


def test_other_content_under_the_same_version_is_a_conflict(create, project) -> None:
    first = create(version=3)
    (project / "train.csv").write_text("other")
    with pytest.raises(Conflict) as caught:
        create(version=3)
    told = str(caught.value)
    assert first.release.digest in told
    assert told.count("sha256:") == 2
    assert "different in data" in told
    assert "leave `version` out" in told


def test_the_same_content_under_another_version_is_a_conflict(create) -> None:
    create()
    with pytest.raises(Conflict, match=r"digits@1 already"):
        create(version=2)


def test_of_two_at_once_one_registers(create, ledger) -> None:
    results = []
    threads = [threading.Thread(target=lambda: results.append(create())) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(result.created for result in results) == [False, False, False, True]


def test_progress_counts_every_byte(create, project, spec) -> None:
    seen = []
    create(progress=seen.append)
    assert sum(seen) == find_sources(spec(), project).size


def test_folders_are_stored_file_by_file_in_order(create, project) -> None:
    for name in ("weights/b.bin", "weights/a.bin", "weights/deep/c.bin"):
        (project / name).parent.mkdir(parents=True, exist_ok=True)
        (project / name).write_bytes(name.encode())
    (project / "weights" / "__pycache__").mkdir()
    (project / "weights" / "__pycache__" / "x.pyc").write_bytes(b"1")
    files = [{"path": "model.skops", "format": "skops"}, {"path": "weights"}]
    made = create(artifacts=files)
    artifact = made.manifest.artifacts[1]
    assert [file.path for file in artifact.files] == ["a.bin", "b.bin", "deep/c.bin"]
    assert artifact.placed()[0][0] == "weights/a.bin"
    (project / "weights" / "__pycache__" / "x.pyc").write_bytes(b"2")
    assert not create(artifacts=files).created


@pytest.mark.parametrize(
    ("changes", "error", "told"),
    [
        ({"artifacts": [{"path": "modle.skops"}]}, NotFound, "did you mean 'model.skops'"),
        ({"artifacts": [{"path": "empty"}]}, UsageError, "holds no file"),
        ({"artifacts": [{"path": "outside.bin"}]}, UsageError, "leaves the release's folder"),
        ({"artifacts": [{"path": "linked"}]}, UsageError, "symbolic link to a folder"),
        ({"artifacts": [{"path": "pipe"}]}, UsageError, "no plain file"),
        (
            {"artifacts": [{"path": "train.csv"}, {"path": "train.csv"}]},
            UsageError,
            "two artifacts",
        ),
        ({"data": [{"name": "a", "path": "s3://b/c", "role": "train"}]}, UsageError, "is a URL"),
        ({"data": [{"name": "a", "path": "nowhere", "role": "train"}]}, NotFound, "no nowhere"),
        (
            {"data": [{"name": "a", "path": "train.csv", "role": "test"}] * 2},
            UsageError,
            "own name",
        ),
        ({"environment": {"lock": "empty"}}, UsageError, "holds no file"),
        ({"environment": {"lock": "train.csv"}}, UsageError, "no version of scikit-learn"),
        ({"contract": None}, UsageError, "no contract"),
    ],
)
def test_what_can_not_be_pinned(create, project, ledger, changes, error, told) -> None:
    (project / "empty").mkdir()
    (project.parent / "secret").write_text("x")
    (project / "outside.bin").symlink_to(project.parent / "secret")
    (project / "linked").mkdir()
    (project / "linked" / "up").symlink_to(project.parent)
    os.mkfifo(project / "pipe")
    with pytest.raises(error, match=told):
        create(**changes)
    with ledger.read() as tx:
        assert tx.releases.list() == []


def test_a_link_inside_the_folder_is_its_target(create, project) -> None:
    (project / "latest.skops").symlink_to("model.skops")
    linked = create(artifacts=[{"path": "latest.skops", "format": "skops"}])
    assert linked.manifest.artifacts[0].files[0].size == (project / "model.skops").stat().st_size


def test_data_may_lie_elsewhere(create, tmp_path) -> None:
    (tmp_path / "shared").mkdir()
    (tmp_path / "shared" / "part-0.csv").write_text("1")
    (tmp_path / "link").symlink_to(tmp_path / "shared")
    data = [{"name": "train", "path": str(tmp_path / "link"), "role": "train"}]
    assert [file.path for file in create(data=data).manifest.data[0].files] == ["part-0.csv"]


def test_a_file_that_changes_meanwhile_is_refused(create, project, ledger) -> None:
    def meddle(_: int) -> None:
        (project / "train.csv").write_text("changed meanwhile")

    with pytest.raises(Conflict, match="changed while it was read"):
        create(progress=meddle)
    with ledger.read() as tx:
        assert tx.releases.list() == []


def test_the_lock_decides_the_engine_version(create, project, blobs) -> None:
    (project / "requirements.lock").write_text(
        "numpy==2.2.0 \\\n    --hash=sha256:00\nscikit-learn==1.5.2 \\\n    --hash=sha256:00\n"
    )
    made = create(environment={"lock": "requirements.lock", "python": "3.11"})
    assert made.manifest.inference.engine_version == "1.5.2"
    lock = made.manifest.environment.lock
    assert lock is not None
    assert lock.path == "requirements.lock"
    assert blobs.has(lock.digest)


@pytest.mark.parametrize(
    ("artifacts", "engine"),
    [
        ([{"path": "m.onnx", "format": "onnx"}], "onnx"),
        ([{"path": "m.onnx", "format": "onnx"}, {"path": "m.py", "format": "python"}], "python"),
        ([{"path": "m.onnx"}], None),
    ],
)
def test_the_engine_follows_from_the_formats(create, project, artifacts, engine) -> None:
    (project / "m.onnx").write_bytes(b"\x08\x07\x12\x04onnx")
    (project / "m.py").write_text("def predict(x):\n    return x\n")
    if engine is None:
        with pytest.raises(UsageError, match=r"inference\.engine"):
            create(artifacts=artifacts)
    else:
        assert create(artifacts=artifacts).manifest.inference.engine == engine


def test_a_remote_endpoint_needs_no_files(create) -> None:
    serving = {"runtime": "endpoint", "urls": ["https://llm.team.org/v1"], "served_model": "org/m"}
    made = create(artifacts=[], serving=serving, data=[])
    assert made.manifest.inference.engine == "external"
    assert made.manifest.stored_files() == ()


def test_a_missing_contract_is_inferred_from_the_sample_and_frozen(create, project) -> None:
    inferred = Contract(inputs=(Tensor("x", "FP64", (-1, 2)),), outputs=())
    asked = []

    def infer(spec: ReleaseSpec, folder, sample):
        asked.append((spec.model, folder, sample.name))
        return inferred

    made = create(contract=None, infer=infer)
    assert asked == [("digits", project, "sample.csv")]
    assert made.inferred
    assert made.manifest.contract == inferred
    assert Manifest.model_validate(made.release.manifest).contract == inferred
    frozen = {"inputs": [{"name": "x", "datatype": "FP64", "shape": [-1, 2]}], "outputs": []}
    written_back = create(contract=frozen)
    assert not written_back.created  # the file with the contract in it is the same release


def test_a_model_is_not_loaded_before_it_was_scanned(create, project) -> None:
    (project / "model.skops").write_bytes(b"cos\nsystem\n(S'true'\ntR.")

    def infer(spec, folder, sample):
        pytest.fail("it was loaded")

    with pytest.raises(UnsafeArtifact):
        create(contract=None, infer=infer)


def sparse(path, size):
    with path.open("wb") as file:
        file.truncate(size)


@pytest.mark.long
def test_a_large_file_is_hashed_in_flat_memory(project) -> None:
    sparse(project / "weights.bin", 1_500_000_000)
    spec = ReleaseSpec.model_validate(
        {"model": "big", "artifacts": [{"path": "weights.bin"}], "inference": {"engine": "python"}}
    )
    source = find_sources(spec, project).artifacts[0][1][0]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    pinned = digest_file(source)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert isinstance(pinned, PinnedFile)
    assert pinned.size == 1_500_000_000
    assert grown < 16_000  # KiB


@pytest.mark.long
def test_a_large_artifact_is_created_in_flat_memory(project, tmp_path, empty_ledger) -> None:
    """In a process of its own, whose largest size is that of this one release."""
    sparse(project / "weights.bin", 1_000_000_000)
    program = """
import resource, sys
from pathlib import Path
from shipworthy.domain.manifest import ReleaseSpec
from shipworthy.release.create import create_release
from shipworthy.stores.blobs import LocalBlobs
from shipworthy.stores.ledger import open_ledger
spec = ReleaseSpec.model_validate({"model": "big", "artifacts": [{"path": "weights.bin"}],
    "inference": {"engine": "python"}, "contract": {"inputs": [], "outputs": []}})
folder, blobs, url = sys.argv[1:]
with open_ledger(url) as ledger:
    with ledger.write() as tx:
        maker = tx.principals.ensure("Ann").id
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    create_release(spec, Path(folder), blobs=LocalBlobs(Path(blobs)), ledger=ledger,
        clock=lambda: 1.0, maker=maker)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    url = f"sqlite:///{empty_ledger}"
    run = subprocess.run(
        [sys.executable, "-c", program, project, tmp_path / "b", url],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert int(run.stdout) < 32_000  # KiB
