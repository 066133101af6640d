"""Backups' archives: what goes in comes out, and nothing else ever does."""

from __future__ import annotations

import io
import os
import random
import tarfile
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from shipworthy.domain.audit import AuditHead
from shipworthy.errors import IntegrityError, NotFound, Unavailable, UsageError
from shipworthy.stores.archive import FORMAT, MANIFEST, Contents, Source, open_archive
from shipworthy.stores.archive import write_archive as write
from shipworthy.stores.files import new_file, workspace

FACTS = Contents(
    shipworthy="0.1.0",
    id="backup_1",
    at=1_790_000_000.5,
    ledger="0002",
    audit=AuditHead(sequence=3, hash="sha256:" + "a" * 64),
)
FILES = {"shipworthy.yaml": b"preset: standard\n", "blobs/sha256/ab/" + "c" * 62: b"x" * 70_000}


def silent(_: int) -> None:
    """No progress is shown."""


def make(folder: Path, files: dict[str, bytes] = FILES) -> Path:
    sources = []
    for number, (name, content) in enumerate(files.items()):
        path = folder / f"source-{number}"
        path.write_bytes(content)
        path.chmod(0o440)
        sources.append(Source(name, path, len(content)))
    write(folder / "backup.tar", sources, FACTS, silent)
    return folder / "backup.tar"


def extract(archive: Path, folder: Path) -> dict[str, bytes]:
    with open_archive(archive) as opened:
        opened.extract(folder, silent)
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def members(archive: Path) -> list[tuple[tarfile.TarInfo, bytes]]:
    with tarfile.open(archive) as tar:
        return [(each, (tar.extractfile(each) or io.BytesIO()).read()) for each in tar]


def rewrite(archive: Path, content: list[tuple[tarfile.TarInfo, bytes]]) -> None:
    with tarfile.open(archive, "w") as tar:
        for info, data in content:
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def test_what_goes_in_comes_out_with_its_mode(tmp_path: Path) -> None:
    archive = make(tmp_path)
    assert archive.stat().st_mode & 0o777 == 0o600
    assert extract(archive, tmp_path / "out") == FILES
    assert {p.stat().st_mode & 0o777 for p in (tmp_path / "out").rglob("*") if p.is_file()} == {
        0o440
    }
    with open_archive(archive) as opened:
        assert opened.contents.audit == FACTS.audit
        assert opened.contents.size == sum(map(len, FILES.values()))


def test_any_tar_can_read_it(tmp_path: Path) -> None:
    assert {info.name: data for info, data in members(make(tmp_path))}.items() > FILES.items()


def test_of_a_growing_file_only_the_first_bytes_are_kept_and_it_may_have_got_shorter(
    tmp_path: Path,
) -> None:
    for name, content in (("longer", b"acknowledged, and later"), ("shorter", b"acknow")):
        (tmp_path / name).write_bytes(content)
    sources = [
        Source(name, tmp_path / name, len(b"acknowledged"), growing=True)
        for name in ("longer", "shorter")
    ]
    write(tmp_path / "a.tar", sources, FACTS, silent)
    assert extract(tmp_path / "a.tar", tmp_path / "out") == {
        "longer": b"acknowledged",
        "shorter": b"acknow",
    }


def test_a_source_that_is_gone_or_too_short_leaves_nothing_behind(tmp_path: Path) -> None:
    path = tmp_path / "source"
    for content, why in ((None, "source can't be read"), (b"short", "source got shorter")):
        if content:
            path.write_bytes(content)
        with pytest.raises(Unavailable, match=why):
            write(tmp_path / "a.tar", [Source("x", path, 100)], FACTS, silent)
        assert not list(tmp_path.glob("*.tar")) + list(tmp_path.glob(".*"))


def test_no_flipped_byte_changes_what_is_restored(tmp_path: Path) -> None:
    archive = make(tmp_path)
    whole = archive.read_bytes()
    rng = random.Random(4)
    headers = [*range(512), *range(len(whole) - 4096, len(whole), 7)]
    refused = 0
    for position in [*headers, *(rng.randrange(len(whole)) for _ in range(300))]:
        damaged = bytearray(whole)
        damaged[position] ^= 1 << rng.randrange(8)
        archive.write_bytes(damaged)
        out = tmp_path / f"out-{position}-{refused}"
        try:
            assert extract(archive, out) == FILES, position
        except IntegrityError:
            refused += 1
    assert refused > 500


def test_a_cut_off_archive_is_refused_wherever_it_ends(tmp_path: Path) -> None:
    archive = make(tmp_path)
    whole = archive.read_bytes()
    end = max(info.offset_data + info.size for info, _ in members(archive))
    for length in (0, 1, 511, 512, 600, 1024, 1536, 40_000, 71_168, end - 1):
        archive.write_bytes(whole[:length])
        with pytest.raises(IntegrityError), open_archive(archive) as opened:
            opened.verify(silent)


def _without_first(content: list[tuple[tarfile.TarInfo, bytes]]) -> None:
    del content[0]


def _with_another(content: list[tuple[tarfile.TarInfo, bytes]]) -> None:
    content.insert(0, (tarfile.TarInfo("secrets/other"), b"x"))


def _twice(content: list[tuple[tarfile.TarInfo, bytes]]) -> None:
    content.insert(0, content[0])


def _manifest_first(content: list[tuple[tarfile.TarInfo, bytes]]) -> None:
    content.insert(0, content.pop())


def _no_manifest(content: list[tuple[tarfile.TarInfo, bytes]]) -> None:
    content.pop()


def _swapped(content: list[tuple[tarfile.TarInfo, bytes]]) -> None:
    content[0][0].name, content[1][0].name = content[1][0].name, content[0][0].name


def _other_manifest(content: list[tuple[tarfile.TarInfo, bytes]]) -> None:
    content[-1] = (content[-1][0], content[-1][1].replace(b"backup_1", b"backup_2"))


def _garbage_manifest(content: list[tuple[tarfile.TarInfo, bytes]]) -> None:
    content[-1] = (content[-1][0], b'{"format": 1, "files": 3}')


@pytest.mark.parametrize(
    "tamper",
    [
        _without_first,
        _with_another,
        _twice,
        _manifest_first,
        _no_manifest,
        _swapped,
        _other_manifest,
        _garbage_manifest,
    ],
)
def test_an_archive_that_was_put_together_anew_is_refused(
    tmp_path: Path, tamper: Callable[[list], None]
) -> None:
    archive = make(tmp_path)
    content = members(archive)
    tamper(content)
    rewrite(archive, content)
    with pytest.raises(IntegrityError), open_archive(archive) as opened:
        opened.verify(silent)


@pytest.mark.parametrize(
    "name",
    ["../outside", "/etc/outside", "a/../../outside", "a//b", "./a", "a/", "", "a\x00b", "a\nb"],
)
def test_a_name_that_leads_elsewhere_is_refused_even_if_the_manifest_has_it(
    tmp_path: Path, name: str
) -> None:
    archive = make(tmp_path)
    content = members(archive)
    content[0][0].name = name
    _pin(content)
    rewrite(archive, content)
    with pytest.raises(IntegrityError):
        extract(archive, tmp_path / "out")
    assert not (tmp_path / "outside").exists()


@pytest.mark.parametrize(
    "kind",
    [
        tarfile.SYMTYPE,
        tarfile.LNKTYPE,
        tarfile.DIRTYPE,
        tarfile.FIFOTYPE,
        tarfile.CHRTYPE,
        tarfile.GNUTYPE_SPARSE,
        tarfile.CONTTYPE,
    ],
)
def test_only_plain_files_are_taken(tmp_path: Path, kind: bytes) -> None:
    archive = make(tmp_path)
    content = members(archive)
    link = tarfile.TarInfo("a-link")
    link.type, link.linkname = kind, "/etc/passwd"
    content.insert(0, (link, b""))
    _pin(content)
    rewrite(archive, content)
    with pytest.raises(IntegrityError):
        extract(archive, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_header_that_leads_backwards_ends(tmp_path: Path) -> None:
    archive = make(tmp_path)
    with tarfile.open(archive, "w", format=tarfile.PAX_FORMAT) as tar:
        info = tarfile.TarInfo("round")
        info.pax_headers = {"size": "-1024"}
        tar.addfile(info)
    with pytest.raises(IntegrityError):
        extract(archive, tmp_path / "out")


def test_what_is_no_archive_is_named(tmp_path: Path) -> None:
    for content in (b"", b"hello", os.urandom(5_000), bytes(10_240)):
        (tmp_path / "a.tar").write_bytes(content)
        with pytest.raises(IntegrityError, match=r"a\.tar"), open_archive(tmp_path / "a.tar"):
            pass
    with pytest.raises(NotFound, match="there is no file"), open_archive(tmp_path / "none.tar"):
        pass
    with pytest.raises(UsageError, match="no plain file"), open_archive(tmp_path):
        pass


def test_an_archive_of_a_newer_version_is_told_from_a_damaged_one(tmp_path: Path) -> None:
    archive = make(tmp_path)
    content = members(archive)
    newer = msgspec.json.encode({"format": FORMAT + 1, "files": "elsewhere"})
    rewrite(archive, [*content[:-1], (content[-1][0], newer)])
    with pytest.raises(UsageError, match="upgrade Shipworthy"), open_archive(archive):
        pass


def _pin(content: list[tuple[tarfile.TarInfo, bytes]]) -> None:
    """Make a manifest that fits, as somebody would who knows how."""
    import hashlib

    manifest = msgspec.json.decode(content[-1][1], type=Contents)
    files = {
        info.name: msgspec.convert(
            {"size": len(data), "digest": f"sha256:{hashlib.sha256(data).hexdigest()}"},
            type(next(iter(manifest.files.values()))),
        )
        for info, data in content
        if info.name != MANIFEST
    }
    sealed = msgspec.structs.replace(manifest, files=files).sealed()
    content[-1] = (content[-1][0], msgspec.json.encode(sealed))


def test_a_new_file_sweeps_what_killed_ones_left_but_nobody_elses(tmp_path: Path) -> None:
    left = [tmp_path / f".a[1].tar.{number:08x}.partial" for number in range(2)]
    other = tmp_path / ".b.tar.00000000.partial"
    for path in (*left, other):
        path.write_bytes(b"half")
    with new_file(tmp_path / "a[1].tar") as first:
        first.write(b"whole")
        assert not any(path.exists() for path in left)
        with new_file(tmp_path / "a[1].tar") as second:
            second.write(b"later")
    assert other.exists()
    assert (tmp_path / "a[1].tar").read_bytes() == b"whole"
    assert len(list(tmp_path.iterdir())) == 2


def test_a_workspace_is_empty_private_and_gone_afterwards(tmp_path: Path) -> None:
    folder = tmp_path / "work"
    (folder / "left" / "deep").mkdir(parents=True)
    (folder / "link").symlink_to(tmp_path)
    with workspace(folder):
        assert not list(folder.iterdir())
        (folder / "file").write_text("x")
        with pytest.raises(UsageError, match="another process works"), workspace(folder):
            pass
        assert (folder / "file").exists()
    assert not folder.exists()
    assert tmp_path.exists()
