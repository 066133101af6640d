import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from shipworthy.domain.manifest import ArtifactSpec, Environment
from shipworthy.errors import RuntimeFailed
from shipworthy.runtimes.environments import Environments
from shipworthy.runtimes.inspection import inspect_model
from shipworthy.runtimes.samples import Sample

OURS = f"3.{sys.version_info.minor}"


@pytest.fixture
def environments(tmp_path: Path) -> Environments:
    return Environments(tmp_path / "environments")


def package(folder: Path, name: str, version: str) -> Path:
    """A wheel made by hand, so that pip needs no index."""
    import zipfile

    info = f"{name}-{version}.dist-info"
    wheel = folder / f"{name}-{version}-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(f"{name}.py", f"version = {version!r}\n")
        archive.writestr(
            f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
        )
        archive.writestr(
            f"{info}/WHEEL",
            "Wheel-Version: 1.0\nGenerator: hand\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        )
        archive.writestr(
            f"{info}/RECORD", f"{name}.py,,\n{info}/METADATA,,\n{info}/WHEEL,,\n{info}/RECORD,,\n"
        )
    return wheel


def test_without_a_lock_it_is_our_own(environments):
    assert environments.interpreter(Environment(), None) == Path(sys.executable)
    assert environments.interpreter(Environment(python=OURS), None) == Path(sys.executable)
    with pytest.raises(RuntimeFailed, match="has no lock"):
        environments.interpreter(Environment(python="3.99"), None)


def test_a_python_that_is_not_installed(environments):
    with pytest.raises(RuntimeFailed, match=r"Python 3\.99, which is not installed here"):
        environments.interpreter(Environment(python="3.99"), b"")


def test_a_lock_is_installed_once_by_one_of_many(environments, tmp_path):
    lock = str(package(tmp_path, "tinything", "1.2")).encode() + b"\n"
    steps: list[str] = []

    def build(_: int) -> Path:
        return environments.interpreter(Environment(python=OURS), lock, steps.append)

    with ThreadPoolExecutor(3) as pool:
        built = set(pool.map(build, range(3)))
    (python,) = built
    assert steps.count("making a virtual environment") == 1
    program = "import tinything; print(tinything.version)"
    run = subprocess.run([python, "-c", program], capture_output=True, text=True, check=True)
    assert run.stdout == "1.2\n"
    steps.clear()
    assert build(0) == python
    assert steps == []
    (tmp_path / "predictor.py").write_text("def predict(inputs): return inputs\n")
    with pytest.raises(RuntimeFailed, match="no numpy; add it to"):
        inspect_model(tmp_path, ArtifactSpec(path="predictor.py", format="python"), python=python)


def test_a_lock_that_can_t_be_installed_leaves_nothing(environments, tmp_path):
    lock = b"/nowhere/at-all-1.0-py3-none-any.whl\n"
    with pytest.raises(RuntimeFailed, match=r"at-all-1\.0") as caught:
        environments.interpreter(Environment(), lock)
    assert "\n" not in str(caught.value)
    assert [path for path in (tmp_path / "environments").iterdir() if path.is_dir()] == []


@pytest.mark.long
def test_other_bytes_than_the_lock_s_hashes_are_refused(environments, tmp_path):
    wheel = package(tmp_path, "tinything", "1.2")
    lock = f"{wheel} --hash=sha256:{'0' * 64}\n".encode()
    with pytest.raises(RuntimeFailed, match="can't be built"):
        environments.interpreter(Environment(), lock)


def test_a_build_has_a_time_limit(tmp_path):
    with pytest.raises(RuntimeFailed, match="longer than"):
        Environments(tmp_path / "environments", timeout=0.05).interpreter(Environment(), b"x\n")


def test_a_build_can_be_given_up(environments, tmp_path):
    class Enough(Exception):
        pass

    def stop(_: str) -> None:
        raise Enough

    with pytest.raises(Enough):
        environments.interpreter(Environment(), b"x\n", stop)
    assert [path for path in (tmp_path / "environments").iterdir() if path.is_dir()] == []


@pytest.mark.long
def test_a_model_runs_with_the_versions_of_its_lock(environments, tmp_path):
    wanted = "2.3.5" if np.__version__ != "2.3.5" else "2.3.4"
    python = environments.interpreter(Environment(), f"numpy=={wanted}\n".encode())
    (tmp_path / "predictor.py").write_text(
        "import numpy\n"
        "def predict(inputs): return {'version': numpy.array([numpy.__version__], dtype=object)}\n"
    )
    (tmp_path / "x.json").write_text(json.dumps([{"x": 1}]))
    model = ArtifactSpec(path="predictor.py", format="python")
    sample = Sample.read(tmp_path / "x.json")
    found = inspect_model(tmp_path, model, python=python, sample=sample)
    assert list(found.sample_outputs[0].data) == [wanted]
    (tmp_path / "model.skops").write_bytes(b"")
    with pytest.raises(RuntimeFailed, match="needs skops, which the interpreter does not have"):
        inspect_model(tmp_path, ArtifactSpec(path="model.skops", format="skops"), python=python)
