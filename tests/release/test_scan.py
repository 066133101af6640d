"""No file that runs code when loaded gets by unseen, however it is called and packed."""

import ast
import functools
import gzip
import io
import os
import pickle
import random
import zipfile
from contextlib import suppress
from pathlib import Path

import joblib
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sklearn.ensemble import RandomForestClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer

import shipworthy
from shipworthy.domain.manifest import ArtifactSpec
from shipworthy.errors import UnsafeArtifact
from shipworthy.release import scan
from shipworthy.release.files import artifact_files
from shipworthy.release.pickles import Unreadable, imports_of, looks_like_pickle
from shipworthy.release.scan import scan_artifact

REASON = "made by our own training job"


class Attack:
    """Runs a command when unpickled."""

    def __reduce__(self):
        return os.system, ("echo attacked >&2",)  # pyright: ignore[reportDeprecated]


def attack(protocol=4):
    return pickle.dumps(Attack(), protocol)


def looked_at(folder, name, kind="file", unsafe=None):
    spec = ArtifactSpec.model_validate({"path": name, "format": kind, "unsafe": unsafe})
    return scan_artifact(spec, artifact_files(folder, name))


def refused(folder, name, kind="file", unsafe=None):
    with pytest.raises(UnsafeArtifact) as caught:
        looked_at(folder, name, kind, unsafe)
    return str(caught.value)


def zipped(**members):
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return packed.getvalue()


def npy(array):
    packed = io.BytesIO()
    np.save(packed, array, allow_pickle=True)
    return packed.getvalue()


def joblibbed(value, compress: int | tuple[str, int] = 0):
    packed = io.BytesIO()
    joblib.dump(value, packed, compress=compress)  # pyright: ignore[reportArgumentType]
    return packed.getvalue()


BEHIND_ARRAYS = [np.ones((300, 40)), np.array(["a", None], dtype=object), Attack()]
HIDDEN = {
    "protocol 0": attack(0),
    "protocol 1": attack(1),
    "protocol 2": attack(2),
    "protocol 5": attack(5),
    "python 2 name": b"ccommands\ngetoutput\n(S'ls'\ntR.",
    "in a zip": zipped(weights=b"12", deep=attack()),
    "in a zip in a zip": zipped(inner=zipped(x=attack())),
    "in a zip, compressed": zipped(x=gzip.compress(attack())),
    "in an array of objects": npy(np.array([Attack(), 1], dtype=object)),
    "in an npz": zipped(arr=npy(np.array([Attack()], dtype=object))),
    "behind arrays in joblib": joblibbed(BEHIND_ARRAYS),
    "in zlib": joblibbed(BEHIND_ARRAYS, ("zlib", 3)),
    "in gzip": joblibbed(BEHIND_ARRAYS, ("gzip", 3)),
    "in bz2": joblibbed(BEHIND_ARRAYS, ("bz2", 3)),
    "in xz": joblibbed(BEHIND_ARRAYS, ("xz", 1)),
    "in lzma": joblibbed(BEHIND_ARRAYS, ("lzma", 1)),
    "in the second of two": pickle.dumps([1]) + attack(),
    "broken off": attack()[:-1],
    "after a state": pickle.dumps({"a": [1, 2], "b": Attack()}),
}


@pytest.mark.parametrize("content", HIDDEN.values(), ids=HIDDEN)
@pytest.mark.parametrize("unsafe", [None, REASON])
def test_an_attack_is_found_wherever_it_hides(tmp_path, capfd, content, unsafe) -> None:
    (tmp_path / "weights.bin").write_bytes(content)
    refused(tmp_path, "weights.bin", unsafe=unsafe)
    assert "attacked" not in capfd.readouterr().err


@pytest.mark.parametrize("kind", ["skops", "onnx", "file", "python", "joblib", "pickle"])
def test_an_attack_is_found_whatever_it_claims_to_be(tmp_path, kind) -> None:
    (tmp_path / "model.bin").write_bytes(attack())
    told = refused(tmp_path, "model.bin", kind, REASON)
    assert "posix.system" in told or f"claims to be {kind}" in told


def test_a_pickle_deep_in_a_folder_is_found(tmp_path) -> None:
    deep = tmp_path / "model" / "a" / "b"
    deep.mkdir(parents=True)
    (tmp_path / "model" / "config.json").write_text("{}")
    (deep / "tokenizer.txt").write_bytes(pickle.dumps([1, 2]))
    told = refused(tmp_path, "model")
    assert "model/a/b/tokenizer.txt" in told
    assert "`unsafe`" in told
    assert looked_at(tmp_path, "model", unsafe=REASON) == "a pickle; imports nothing"


FOREST = make_pipeline(FunctionTransformer(), RandomForestClassifier(3, random_state=0)).fit(
    [[0, 0], [1, 1]], [0, 1]
)


@pytest.mark.parametrize(
    ("kind", "content"),
    [
        ("pickle", pickle.dumps(FOREST)),
        ("joblib", joblibbed(FOREST)),
        ("joblib", joblibbed(FOREST, 3)),
        ("joblib", joblibbed(FOREST, ("xz", 1))),
        ("pickle", pickle.dumps(FOREST, 2)),
    ],
    ids=["pickle", "joblib", "zlib", "xz", "protocol 2"],
)
def test_a_real_model_needs_a_reason_and_no_more(tmp_path, kind, content) -> None:
    (tmp_path / "m").write_bytes(content)
    told = refused(tmp_path, "m", kind)
    assert "sklearn.ensemble._forest.RandomForestClassifier" in told
    noted = looked_at(tmp_path, "m", kind, REASON)
    assert noted is not None
    assert "sklearn.tree._tree.Tree" in noted


def test_a_dangerous_import_must_be_named(tmp_path) -> None:
    (tmp_path / "m.pkl").write_bytes(pickle.dumps(functools.partial(max, 1)))
    told = refused(tmp_path, "m.pkl", "pickle", REASON)
    assert "builtins.max, functools.partial" in told
    reason = "functools.partial of builtins.max is our own post-processing"
    noted = looked_at(tmp_path, "m.pkl", "pickle", reason)
    assert noted is not None
    assert "named in the reason: builtins.max, functools.partial" in noted


@pytest.mark.parametrize(
    "content", [b"", b"not a pickle", b"{}", b"\x80\x04", b"ZF0x12345", b"\x78\x9cxx"]
)
def test_a_pickle_that_can_not_be_read_is_refused(tmp_path, content) -> None:
    (tmp_path / "m.pkl").write_bytes(content)
    refused(tmp_path, "m.pkl", "pickle", REASON)


def test_plain_files_run_nothing(tmp_path, project) -> None:
    contents = {
        "a.json": b'{"a": 1}', "b.txt": b"cat (and) dog.\n" * 500,
        "c.bin": random.Random(1).randbytes(99_999),
        "d.npy": npy(np.ones(4)), "e.zip": zipped(a=b"text", b=b"(lp0\n."), "f.csv": b"a,b\n1,2\n",
        "g.gz": gzip.compress(b"words"), "h": b"", "i.py": b"import os\nos.system('x')\n",
    }  # fmt: skip
    (tmp_path / "files").mkdir()
    for name, content in contents.items():
        (tmp_path / "files" / name).write_bytes(content)
    assert looked_at(tmp_path, "files") is None
    assert looked_at(project, "model.skops", "skops") is None


def test_a_skops_file_with_foreign_types_must_name_them(tmp_path) -> None:
    import skops.io

    skops.io.dump(FunctionTransformer(func=os.path.join), tmp_path / "m.skops")
    told = refused(tmp_path, "m.skops", "skops", REASON)
    assert "does not trust (posixpath.join)" in told
    assert looked_at(tmp_path, "m.skops", "skops", "posixpath.join is all we use of it")
    (tmp_path / "no.skops").write_bytes(b"nothing of the kind")
    assert "can't be read as skops" in refused(tmp_path, "no.skops", "skops")


def test_bombs_are_refused_and_do_not_go_off(tmp_path) -> None:
    huge_length = b"\x80\x04\x8e" + (2**60).to_bytes(8, "little") + b"x"
    frame = b"\x80\x04\x95" + (2**62).to_bytes(8, "little") + b"N."
    claimed = b"\x80\x04\x8e" + (400 * 2**20).to_bytes(8, "little")
    unfolding = gzip.compress(claimed + bytes(2**20))
    deep = b"(" * 500_000 + b"ccos\nsystem\n."
    for number, content in enumerate([huge_length, frame, unfolding, deep]):
        (tmp_path / f"{number}.pkl").write_bytes(content)
        refused(tmp_path, f"{number}.pkl", "pickle", REASON)


def test_a_stack_that_is_computed_is_not_followed_blindly() -> None:
    # The name of what is imported is itself the result of a call.
    computed = b"\x80\x04" + b"cbuiltins\nstr\n(S'system'\ntR" + b"\x8c\x02os\x93."
    with pytest.raises(Unreadable):
        imports_of(io.BytesIO(computed), len(computed))


@settings(suppress_health_check=[HealthCheck.too_slow])
@given(st.binary(max_size=200) | st.binary(max_size=80).map(lambda tail: b"\x80\x04" + tail))
def test_any_bytes_are_read_or_refused(content) -> None:
    looks_like_pickle(content)
    try:
        imports_of(io.BytesIO(content), len(content))
    except Unreadable as error:
        assert str(error)  # noqa: PT017  # either ending is fine


MARKS = [
    b"\x78\x9c", b"\x1f\x8b\x08", b"BZh9", b"\xfd7zXZ\x00", b"\x5d\x00\x00\x80", b"PK\x03\x04",
    b"\x93NUMPY\x01\x00", b"\x93NUMPY\x03\x00", b"\x04\x22\x4d\x18", b"\x80\x05", b"cos\n", b"",
]  # fmt: skip
WHOLE = [zipped(a=attack(), b=b"x" * 50), gzip.compress(attack()), npy(np.array([None])), attack()]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(
    st.tuples(st.sampled_from(MARKS), st.binary(max_size=90)).map(b"".join)
    | st.tuples(st.sampled_from(WHOLE), st.integers(0, 400), st.binary(max_size=9)).map(
        lambda parts: parts[0][: parts[1]] + parts[2] + parts[0][parts[1] + len(parts[2]) :]
    )
)
def test_damaged_files_are_passed_or_refused_but_never_break_the_scan(tmp_path, content) -> None:
    (tmp_path / "x.bin").write_bytes(content)
    for kind in ("file", "pickle", "skops"):
        with suppress(UnsafeArtifact):
            looked_at(tmp_path, "x.bin", kind, REASON)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary(),
    lambda inner: st.lists(inner) | st.tuples(inner, inner) | st.dictionaries(st.text(), inner),
    max_leaves=20,
)


@given(VALUES, st.integers(0, 5))
def test_whatever_is_pickled_is_followed_to_its_end(value, protocol) -> None:
    content = pickle.dumps([value, Attack()], protocol)
    assert ("posix", "system") in imports_of(io.BytesIO(content), len(content))


def test_the_model_host_trusts_the_same_types() -> None:
    """It can't import ours, so it has a copy; what it loads must be what was accepted here."""
    source = Path(shipworthy.__file__).parent / "runtimes" / "model_host.py"
    named = {}
    for node in ast.parse(source.read_text()).body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            named[node.targets[0].id] = node.value
    for name in ("SKLEARN_MODULES", "PLAIN_TYPES"):
        call = named[name]
        assert isinstance(call, ast.Call)
        assert set(ast.literal_eval(call.args[0])) == getattr(scan, name)
