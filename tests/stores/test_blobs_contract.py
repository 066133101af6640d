"""What a store of blobs promises, over every adapter; and what the local one does on disk."""

from __future__ import annotations

import hashlib
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from shipworthy.domain.manifest import PinnedFile
from shipworthy.errors import IntegrityError, NotFound, Unavailable, UsageError
from shipworthy.ports import Blobs
from shipworthy.stores.blobs import CHUNK, LocalBlobs

LARGE = os.urandom(2 * CHUNK) + b"tail"


def pinned(content: bytes, path: str = "model.bin") -> PinnedFile:
    digest = f"sha256:{hashlib.sha256(content).hexdigest()}"
    return PinnedFile(path=path, digest=digest, size=len(content))


@pytest.fixture(params=[b"", b"small", LARGE], ids=["empty", "small", "several chunks"])
def content(request: pytest.FixtureRequest) -> bytes:
    return request.param


class TestContract:
    def test_put_and_get_back(self, blobs: Blobs, tmp_path: Path, content: bytes):
        source = tmp_path / "model.bin"
        source.write_bytes(content)
        done: list[int] = []
        file = blobs.put(source, done.append)
        assert file == pinned(content)
        assert sum(done) == len(content)
        assert blobs.has(file.digest)
        blobs.verify(file, done.append)
        assert sum(done) == 2 * len(content)
        blobs.copy_to(file, tmp_path / "new" / "copy", done.append)
        assert sum(done) == 3 * len(content)
        assert (tmp_path / "new" / "copy").read_bytes() == content
        with blobs.open(file.digest) as handle:
            assert handle.read() == content
        assert blobs.put_bytes(content, "other.name") == pinned(content, "other.name")

    def test_what_is_not_there(self, blobs: Blobs, tmp_path: Path):
        missing = pinned(b"never stored")
        assert not blobs.has(missing.digest)
        for act in (
            lambda: blobs.verify(missing),
            lambda: blobs.open(missing.digest),
            lambda: blobs.copy_to(missing, tmp_path / "copy"),
            lambda: blobs.put(tmp_path / "nowhere"),
        ):
            with pytest.raises(NotFound, match=";"):
                act()
        assert not (tmp_path / "copy").exists()

    def test_what_is_no_file(self, blobs: Blobs, tmp_path: Path):
        with pytest.raises(UsageError, match="no plain file"):
            blobs.put(tmp_path)

    @pytest.mark.parametrize("digest", ["", "sha256:../../etc/passwd", "md5:" + "a" * 32])
    def test_what_is_no_digest(self, blobs: Blobs, digest: str):
        with pytest.raises(UsageError, match="no digest"):
            blobs.has(digest)
        with pytest.raises(UsageError, match="no digest"):
            blobs.open(digest)


@pytest.fixture
def local(tmp_path: Path) -> LocalBlobs:
    return LocalBlobs(tmp_path / "blobs")


def stored(tmp_path: Path) -> list[Path]:
    return [path for path in (tmp_path / "blobs").rglob("*") if path.is_file()]


class TestLocal:
    def test_one_read_only_file_named_by_its_content(self, local: LocalBlobs, tmp_path: Path):
        file = local.put_bytes(b"content", "a")
        hexadecimal = file.digest.removeprefix("sha256:")
        (path,) = stored(tmp_path)
        assert path == tmp_path / "blobs" / "sha256" / hexadecimal[:2] / hexadecimal
        assert path.stat().st_mode & 0o777 == 0o440

    def test_the_same_again_changes_nothing(self, local: LocalBlobs, tmp_path: Path):
        local.put_bytes(LARGE, "a")
        (path,) = stored(tmp_path)
        before = path.stat()
        local.put_bytes(LARGE, "b")
        assert stored(tmp_path) == [path]
        assert (path.stat().st_ino, path.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)

    @pytest.mark.parametrize("damage", [LARGE[:10], LARGE[:-1] + b"?"], ids=["cut", "altered"])
    def test_a_damaged_blob_is_healed(self, local: LocalBlobs, tmp_path: Path, damage: bytes):
        file = local.put_bytes(LARGE, "a")
        (path,) = stored(tmp_path)
        path.chmod(0o640)
        path.write_bytes(damage)
        local.put_bytes(LARGE, "a")
        local.verify(file)

    @pytest.mark.parametrize("damage", [b"", b"other", LARGE[:-1] + b"?"])
    def test_altered_bytes_are_named_and_never_handed_out(
        self, local: LocalBlobs, tmp_path: Path, damage: bytes
    ):
        file = local.put_bytes(LARGE, "model.bin")
        (path,) = stored(tmp_path)
        path.chmod(0o600)
        path.write_bytes(damage)
        target = tmp_path / "copy"
        for act in (lambda: local.verify(file), lambda: local.copy_to(file, target)):
            with pytest.raises(IntegrityError) as caught:
                act()
            for word in ("model.bin", file.digest, pinned(damage).digest, str(path), ";"):
                assert word in str(caught.value)
        assert [entry.name for entry in tmp_path.iterdir()] == ["blobs"]

    def test_a_size_that_does_not_match(self, local: LocalBlobs):
        file = local.put_bytes(b"content", "a")
        with pytest.raises(IntegrityError):
            local.verify(file.model_copy(update={"size": 8}))

    def test_an_interrupted_copy_leaves_nothing(self, local: LocalBlobs, tmp_path: Path):
        (tmp_path / "source").write_bytes(LARGE)
        file = local.put(tmp_path / "source")

        def interrupt(_: int) -> None:
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            local.copy_to(file, tmp_path / "out" / "copy", interrupt)
        assert list((tmp_path / "out").iterdir()) == []
        (tmp_path / "source").write_bytes(LARGE + b"more")
        with pytest.raises(KeyboardInterrupt):
            local.put(tmp_path / "source", interrupt)
        assert len(stored(tmp_path)) == 1

    def test_a_copy_replaces_what_was_there(self, local: LocalBlobs, tmp_path: Path):
        file = local.put_bytes(b"content", "a")
        (tmp_path / "copy").write_bytes(b"old")
        local.copy_to(file, tmp_path / "copy")
        assert (tmp_path / "copy").read_bytes() == b"content"

    def test_what_killed_processes_left_is_removed(self, local: LocalBlobs, tmp_path: Path):
        temporary = tmp_path / "blobs" / "tmp"
        temporary.mkdir(parents=True)
        for name, age in (("old", 25 * 3600), ("fresh", 60)):
            (temporary / name).touch()
            then = time.time() - age
            os.utime(temporary / name, (then, then))
        local.put_bytes(b"content", "a")
        assert [path.name for path in temporary.iterdir()] == ["fresh"]

    def test_a_disk_that_refuses(
        self, unprivileged: Callable[[], AbstractContextManager[Path]], tmp_path: Path
    ):
        with unprivileged() as folder:
            (folder / "secret").write_bytes(b"content")
            (folder / "secret").chmod(0)
            folder.chmod(0o500)
            with pytest.raises(Unavailable, match="permissions"):
                LocalBlobs(folder / "blobs").put_bytes(b"content", "a")
            with pytest.raises(Unavailable, match="permissions"):
                LocalBlobs(folder / "blobs").put(folder / "secret")

    def test_a_full_disk(self, local: LocalBlobs, tmp_path: Path):
        (tmp_path / "source").write_bytes(LARGE)
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (CHUNK, hard))
        try:
            with pytest.raises(Unavailable, match="free space"):
                local.put(tmp_path / "source")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert stored(tmp_path) == []

    def test_processes_may_store_the_same_at_once(self, local: LocalBlobs, tmp_path: Path):
        (tmp_path / "source").write_bytes(LARGE * 4)
        script = (
            "import sys; from pathlib import Path; from shipworthy.stores.blobs import LocalBlobs\n"
            "for _ in range(3): LocalBlobs(Path(sys.argv[1])).put(Path(sys.argv[2]))"
        )
        arguments = [str(tmp_path / "blobs"), str(tmp_path / "source")]
        command = [sys.executable, "-W", "error", "-c", script, *arguments]
        assert [each.wait(60) for each in [subprocess.Popen(command) for _ in range(3)]] == [0] * 3
        (path,) = stored(tmp_path)
        local.verify(pinned(LARGE * 4))
        assert path.stat().st_mode & 0o777 == 0o440

    def test_memory_stays_flat(self, tmp_path: Path):
        with (tmp_path / "large").open("wb") as handle:
            handle.truncate(64 * CHUNK)
        script = (
            "import resource, sys; from pathlib import Path\n"
            "from shipworthy.stores.blobs import LocalBlobs\n"
            "blobs = LocalBlobs(Path(sys.argv[1])); blobs.put_bytes(b'', 'warm')\n"
            "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
            "before = peak(); file = blobs.put(Path(sys.argv[2])); blobs.verify(file)\n"
            "sys.exit(peak() - before > 8 * 1024)"
        )
        arguments = [str(tmp_path / "blobs"), str(tmp_path / "large")]
        assert (
            subprocess.run([sys.executable, "-c", script, *arguments], check=False).returncode == 0
        )
