"""Every byte is read again, and every difference has a name."""

import msgspec
import pytest

from shipworthy.domain.findings import Verdict
from shipworthy.errors import Unavailable
from shipworthy.release.show import show_release
from shipworthy.release.verify import stored_size, verify_release


@pytest.fixture
def made(create, project):
    (project / "more").mkdir()
    (project / "more" / "a.bin").write_bytes(b"a" * 100)
    return create(artifacts=[{"path": "model.skops", "format": "skops"}, {"path": "more"}])


def test_an_intact_release(made, blobs) -> None:
    read = []
    out = verify_release(made.release, blobs, now=5.0, progress=read.append)
    assert out.verdict is Verdict.PASS
    assert [file.path for file in out.files] == ["model.skops", "more/a.bin", "some/sample.csv"]
    assert sum(read) == stored_size(made.release) == out.bytes
    assert "3 files" in out.sentence


def test_a_changed_byte_and_a_lost_file_are_named(made, blobs, tmp_path) -> None:
    weights = made.manifest.artifacts[1].files[0]
    path = tmp_path / "blobs" / "sha256" / weights.digest[7:9] / weights.digest[7:]
    path.chmod(0o600)
    path.write_bytes(b"b" * 100)
    out = verify_release(made.release, blobs, now=5.0)
    assert out.verdict is Verdict.FAIL
    assert "more/a.bin" in out.sentence
    path.unlink()
    out = verify_release(made.release, blobs, now=5.0)
    assert [file.verdict for file in out.files] == ["pass", "fail", "pass"]


def test_a_changed_manifest_is_named(made, blobs) -> None:
    altered = msgspec.structs.replace(
        made.release, manifest=made.release.manifest | {"description": "another"}
    )
    out = verify_release(altered, blobs, now=5.0)
    assert out.verdict is Verdict.FAIL
    assert "the manifest in the ledger is sha256:" in out.sentence
    broken = msgspec.structs.replace(made.release, manifest={"model": 5})
    assert verify_release(broken, blobs, now=5.0).verdict is Verdict.FAIL
    assert stored_size(broken) == 0


def test_a_store_that_does_not_answer_is_no_difference(made) -> None:
    class Gone:
        def verify(self, file, progress=None):
            message = "the disk is away"
            raise Unavailable(message)

    out = verify_release(made.release, Gone(), now=5.0)  # pyright: ignore[reportArgumentType]
    assert out.verdict is Verdict.ERROR


def test_a_release_is_shown_with_what_it_lacks(made) -> None:
    shown = show_release(made.release, "Ann")
    assert shown.name == "digits@1"
    assert [(part.name, part.kind, part.files) for part in shown.artifacts] == [
        ("model.skops", "skops", 1), ("more", "file", 1),
    ]  # fmt: skip
    accuracy = shown.metrics[0]
    assert accuracy.low is not None
    assert accuracy.high is not None
    assert accuracy.low < 0.985 < accuracy.high
    assert shown.inputs == ("x: FP64 [-1, 2]",)
    assert any("no lock" in gap for gap in shown.gaps)
    assert any("no code commit" in gap for gap in shown.gaps)
    assert not any("owner" in gap for gap in shown.gaps)
