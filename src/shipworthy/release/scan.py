"""Which model files run code when they are loaded, and whether somebody answers for it.

A pickle of any kind needs a stated reason (`unsafe`), wherever it lies and whatever it is called.
An import that no model needs (`os.system`) is refused even then, unless the reason names it: who
writes it down has seen it. The same holds for types in a skops file that skops does not trust.
"""

from __future__ import annotations

import logging
import lzma
import sys
import zipfile
import zlib
from collections.abc import Iterable, Sequence
from io import BytesIO
from pathlib import Path
from typing import IO

from shipworthy.domain.manifest import CODE_FORMATS, ArtifactSpec
from shipworthy.errors import UnsafeArtifact
from shipworthy.release.files import SourceFile, explained
from shipworthy.release.pickles import (
    HEAD,
    Import,
    Unreadable,
    decompressed,
    imports_of,
    looks_like_pickle,
)

_DAMAGE = (
    Unreadable, EOFError, OSError, ValueError, NotImplementedError, RuntimeError,
    lzma.LZMAError, zipfile.BadZipFile, zlib.error,
)  # fmt: skip
"""What reading a damaged or misleading file raises."""
_MOST_MEMBERS = 100_000
_MOST_NESTED = 3
_MOST_SHOWN = 40

_STANDARD_LIBRARY: dict[str, frozenset[str] | None] = {
    "array": None, "collections": None, "datetime": None, "decimal": None, "enum": None,
    "fractions": None, "itertools": None, "math": None, "numbers": None, "pathlib": None,
    "random": frozenset({"Random"}), "re": frozenset({"_compile"}), "uuid": frozenset({"UUID"}),
    "copyreg": frozenset({"_reconstructor", "__newobj__", "__newobj_ex__"}),
    "builtins": frozenset({
        "bool", "bytearray", "bytes", "complex", "dict", "float", "frozenset", "int", "list",
        "object", "range", "set", "slice", "str", "tuple", "Ellipsis", "NotImplemented",
    }),
    "_codecs": frozenset({"encode"}), "types": frozenset({"SimpleNamespace"}),
}  # fmt: skip
"""What a model may import of the standard library without its author naming it; None is all."""

_LOADERS = frozenset(
    {"load", "loads", "read_pickle", "runstring", "import_module", "system", "popen"}
)
"""Functions that, of whatever library, load further pickles or run commands."""

SKLEARN_MODULES = frozenset({
    "sklearn._loss.link", "sklearn._loss.loss", "sklearn.calibration",
    "sklearn.cluster._bisect_k_means", "sklearn.cluster._kmeans",
    "sklearn.ensemble._hist_gradient_boosting.predictor",
    "sklearn.feature_selection._univariate_selection",
    "sklearn.gaussian_process._gpc", "sklearn.gaussian_process.kernels",
    "sklearn.metrics._dist_metrics", "sklearn.neighbors._ball_tree", "sklearn.neighbors._kd_tree",
    "sklearn.neural_network._stochastic_optimizers", "sklearn.tree._tree",
})  # fmt: skip
"""As in the model host, which has the last word when it loads the file."""
PLAIN_TYPES = frozenset({
    "numpy.dtype", "numpy.mean",
    "scipy.interpolate._bsplines.BSpline", "scipy.sparse._csr.csr_matrix",
})  # fmt: skip


def scan_artifact(artifact: ArtifactSpec, files: Sequence[SourceFile]) -> str | None:
    """What the artifact's files would import when loaded; None when they run no code.

    The text depends on the files alone, so that it may be part of what a digest covers.

    Raises:
        UnsafeArtifact: A file runs code and no reason is stated, it imports what the reason does
            not name, it is not of the format that it claims, or it can't be looked into.

    """
    imports: set[Import] = set()
    pickles: list[str] = []
    types: set[str] = set()
    for file in files:
        shown = artifact.path if file.inside == "." else f"{artifact.path}/{file.inside}"
        with explained(file.path), file.path.open("rb") as stream:
            found = _imports(stream, file.size, shown)
            if found is not None:
                _check_format(artifact, shown)
                pickles.append(shown)
                imports |= found
        if artifact.format == "skops":
            types |= set(_skops_types(file.path, shown))
    if artifact.format in CODE_FORMATS and not pickles:
        raise UnsafeArtifact(
            f"{artifact.path} is no pickle that can be read; correct its format, or write it again"
        )
    _check_reason(artifact, pickles, imports, types)
    return _summary(pickles, imports, types)


def _check_format(artifact: ArtifactSpec, shown: str) -> None:
    if artifact.format in {"skops", "onnx"}:
        raise UnsafeArtifact(
            f"{shown} claims to be {artifact.format} and holds a pickle, which runs code when"
            " loaded; don't load it, and find out who made it"
        )


def _check_reason(
    artifact: ArtifactSpec, pickles: list[str], imports: set[Import], types: set[str]
) -> None:
    reason = artifact.unsafe or ""
    if pickles and not artifact.unsafe:
        raise UnsafeArtifact(
            f"{_some(pickles)} {'is a pickle' if len(pickles) == 1 else 'are pickles'}, which runs"
            " code when loaded; save the model with skops or as ONNX, or say under `unsafe` why"
            f" it is trusted (it imports {_some(_dotted(imports))})"
        )
    unnamed = [name for name in _dotted(_dangerous(imports)) if name not in reason]
    if unnamed:
        raise UnsafeArtifact(
            f"{_some(pickles)} imports {_some(unnamed)}, which models don't need and attacks do;"
            " don't load it, or name each one under `unsafe` and say why it is there"
        )
    strange = sorted(name for name in types if name not in reason)
    if strange:
        raise UnsafeArtifact(
            f"{artifact.path} holds types that skops does not trust ({_some(strange)}); if they are"
            " yours, name each one under `unsafe` and say why"
        )


def _summary(pickles: list[str], imports: set[Import], types: set[str]) -> str | None:
    parts: list[str] = []
    if pickles:
        count = "a pickle" if len(pickles) == 1 else f"{len(pickles)} pickles"
        parts.append(f"{count}; imports {_some(_dotted(imports))}")
        if dangerous := _dotted(_dangerous(imports)):
            parts.append(f"dangerous, and named in the reason: {_some(dangerous)}")
    if types:
        parts.append(f"types named in the reason: {_some(sorted(types))}")
    return "; ".join(parts) or None


def _dotted(imports: Iterable[Import]) -> list[str]:
    return sorted({f"{module}.{name}" for module, name in imports})


def _some(names: Sequence[str]) -> str:
    if not names:
        return "nothing"
    more = len(names) - _MOST_SHOWN
    return ", ".join(names[:_MOST_SHOWN]) + (f" and {more} more" if more > 0 else "")


# --- what a file holds ----------------------------------------------------------------------------


def _imports(stream: IO[bytes], size: int, shown: str, nested: int = 0) -> set[Import] | None:
    """What pickles in a file import; None when there is none.

    `size` is what the file takes on disk: a member of an archive may unfold only so far.
    """
    head = stream.read(HEAD)
    stream.seek(0)
    try:
        found = _pickled(stream, head, size, folded=nested > 0)
        stream.seek(0)
        inside = _zipped(stream, shown, nested) if zipfile.is_zipfile(stream) else None
    except _DAMAGE as error:
        raise UnsafeArtifact(
            f"{shown} may run code when loaded and can't be looked into: {error}; write it again"
        ) from error
    return found if inside is None else inside | (found or set())


def _pickled(stream: IO[bytes], head: bytes, size: int, *, folded: bool) -> set[Import] | None:
    if looks_like_pickle(head):
        return imports_of(stream, size, compressed=folded)
    if head.startswith(b"\x93NUMPY"):
        return _numpy(stream, size, folded=folded)
    try:
        unfolded = decompressed(stream, head)
        inner = unfolded.read(HEAD) if unfolded else b""
    except _DAMAGE:
        return _not_unfolded(head)
    if not unfolded or not looks_like_pickle(inner):
        return None
    stream.seek(0)
    again = decompressed(stream, head)
    return imports_of(again, size, compressed=True) if again else None


def _not_unfolded(head: bytes) -> set[Import] | None:
    """A two-byte mark may be chance; a joblib file that can't be unfolded is none."""
    if head.startswith((b"\x04\x22\x4d\x18", b"ZF0x")):
        message = "it is compressed in a way that can't be undone here; use zlib or none"
        raise Unreadable(message)
    return None


def _numpy(stream: IO[bytes], size: int, *, folded: bool) -> set[Import] | None:
    """An array of objects is a header and a pickle."""
    from numpy.lib import format as npy

    try:
        version = npy.read_magic(stream)
        read = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
        _, _, dtype = read(stream)
    except Exception as error:  # numpy parses the header as Python, and raises what that raises
        message = f"its array header can't be read ({type(error).__name__})"
        raise Unreadable(message) from error
    return imports_of(stream, size, compressed=folded) if dtype.hasobject else None


def _zipped(stream: IO[bytes], shown: str, nested: int) -> set[Import] | None:
    """What pickles in a zip archive (PyTorch, npz, Keras, skops) import."""
    if nested >= _MOST_NESTED:
        message = f"archives are nested more than {_MOST_NESTED} deep"
        raise Unreadable(message)
    found: set[Import] | None = None
    with zipfile.ZipFile(stream) as archive:
        members = archive.infolist()
        if len(members) > _MOST_MEMBERS:
            message = f"it is an archive of more than {_MOST_MEMBERS:,} files"
            raise Unreadable(message)
        for member in members:
            inside = _member(archive, member, f"{shown}/{member.filename}", nested)
            if inside is not None:
                found = inside | (found or set[Import]())
    return found


def _member(
    archive: zipfile.ZipFile, member: zipfile.ZipInfo, shown: str, nested: int
) -> set[Import] | None:
    if member.flag_bits & 1:
        message = f"{member.filename} in it is encrypted"
        raise Unreadable(message)
    try:
        with archive.open(member) as stream:
            head = stream.read(HEAD)
            if not _worth_a_look(head):
                return None
            stream.seek(0)
            return _imports(stream, member.compress_size, shown, nested + 1)
    except (NotImplementedError, RuntimeError) as error:
        message = f"{member.filename} in it can't be read ({error})"
        raise Unreadable(message) from error


def _worth_a_look(head: bytes) -> bool:
    """Whether a member may hold a pickle, seen from its beginning."""
    marks = (b"\x93NUMPY", b"PK\x03\x04", b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x78", b"\x5d\x00")
    return head.startswith(marks) or looks_like_pickle(head)


def _skops_types(path: Path, shown: str) -> list[str]:
    """The types in a skops file that neither skops nor we trust."""
    from skops.io import get_untrusted_types  # pyright: ignore[reportUnknownVariableType]

    try:
        names = [str(name) for name in get_untrusted_types(file=path)]
    except Exception as error:
        raise UnsafeArtifact(
            f"{shown} can't be read as skops ({type(error).__name__}); correct its format, or save"
            " it again with skops.io.dump"
        ) from error
    return [name for name in names if not _is_plain(name)]


def _is_plain(name: str) -> bool:
    return name in PLAIN_TYPES or name.rpartition(".")[0] in SKLEARN_MODULES


# --- what is dangerous ----------------------------------------------------------------------------


def _dangerous(imports: set[Import]) -> set[Import]:
    """The imports that picklescan knows from attacks, and most of the standard library."""
    foreign = {one for one in imports if _is_standard(one) and not _is_needed(one)}
    foreign |= {one for one in imports if one[1].rpartition(".")[2] in _LOADERS}
    return foreign | _known_from_attacks(imports - foreign)


def _is_standard(imported: Import) -> bool:
    return imported[0].partition(".")[0] in sys.stdlib_module_names | {"__builtin__", "__main__"}


def _is_needed(imported: Import) -> bool:
    module, name = imported
    if module not in _STANDARD_LIBRARY:
        return module in {"__builtin__", "copy_reg", "__main__"} or _part_of_needed(module)
    names = _STANDARD_LIBRARY[module]
    return names is None or name in names


def _part_of_needed(module: str) -> bool:
    parent = module.rpartition(".")[0]
    return parent in _STANDARD_LIBRARY and _STANDARD_LIBRARY[parent] is None


def _known_from_attacks(imports: set[Import]) -> set[Import]:
    """Ask picklescan, by way of a pickle that holds these imports and nothing else."""
    from picklescan.scanner import (
        SafetyLevel,
        scan_pickle_bytes,  # pyright: ignore[reportUnknownVariableType]
    )

    odd = {one for one in imports if not all(_is_plain_text(part) for part in one)}
    told = b"".join(f"c{module}\n{name}\n".encode() for module, name in sorted(imports - odd))
    logging.getLogger("picklescan").setLevel(logging.CRITICAL)  # it logs what we word ourselves
    result = scan_pickle_bytes(BytesIO(told + b"."), "model")
    bad = {(one.module, one.name) for one in result.globals if one.safety is SafetyLevel.Dangerous}
    return odd | (imports & bad)


def _is_plain_text(name: str) -> bool:
    return name.isascii() and name.isprintable() and " " not in name
