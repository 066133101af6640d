import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import joblib
import numpy as np
import pytest
import sklearn
import skops.io

from shipworthy.domain.contract import Tensor
from shipworthy.domain.manifest import ArtifactSpec
from shipworthy.errors import RuntimeFailed, Unavailable, UsageError
from shipworthy.ports import HttpResponse
from shipworthy.protocols import oip
from shipworthy.runtimes import model_host
from shipworthy.runtimes.inspection import inspect_endpoint, inspect_model
from shipworthy.runtimes.samples import Sample


def spec(path: str, **more: Any) -> ArtifactSpec:
    suffix = path.rpartition(".")[2]
    formats = {"pkl": "pickle", "py": "python"}
    return ArtifactSpec.model_validate({"path": path, "format": formats.get(suffix, suffix)} | more)


def failure(folder: Path, model: ArtifactSpec, **options) -> str:
    with pytest.raises(RuntimeFailed) as caught:
        inspect_model(folder, model, **options)
    return one_sentence(caught.value)


def one_sentence(error: Exception) -> str:
    message = str(error)
    assert "\n" not in message
    assert ";" in message
    assert "Traceback" not in message
    return message


def load_failure(folder: Path, model: ArtifactSpec) -> str:
    """As `failure`, without a process for what needs none."""
    with pytest.raises(model_host.Problem) as caught:
        model_host.load({"folder": str(folder), **model.model_dump()})
    return one_sentence(caught.value)


def test_a_classifier_on_a_matrix(models):
    found = inspect_model(models, spec("digits.skops"))
    assert found.contract.inputs == (Tensor("input", "FP64", (-1, 64)),)
    assert found.contract.outputs == (
        Tensor("predict", "INT64", (-1,)),
        Tensor("predict_proba", "FP64", (-1, 10), optional=True),
    )
    assert found.contract.side_effects == "none"
    assert (found.engine, found.precision) == ("sklearn", "float64")
    assert found.engine_version.startswith("1.")
    assert found.classes == tuple(range(10))
    assert found.notes == ()
    assert found.sample_request is not None
    request = oip.decode_request(found.sample_request)
    oip.ContractChecker(found.contract).check_request(request)


def test_the_answers_are_the_model_s_own(models, tmp_path):
    rows = np.random.default_rng(1).random((5, 64)).round(3)
    np.savetxt(tmp_path / "rows.csv", rows, delimiter=",", fmt="%.3f")
    found = inspect_model(models, spec("digits.skops"), sample=Sample.read(tmp_path / "rows.csv"))
    model = joblib.load(models / "digits.joblib")
    predicted, probable = found.sample_outputs
    assert list(predicted.data) == model.predict(rows).tolist()
    assert probable.shape == (5, 10)
    assert list(probable.data) == model.predict_proba(rows).ravel().tolist()


def test_classes_can_be_words(models):
    found = inspect_model(models, spec("words.skops"))
    assert found.contract.outputs[0] == Tensor("predict", "BYTES", (-1,))
    assert found.classes == ("even", "odd")


@pytest.mark.parametrize(
    ("path", "output"),
    [
        ("forest.skops", Tensor("predict", "FP64", (-1,))),
        ("both.skops", Tensor("predict", "FP64", (-1, 2))),
    ],
)
def test_regressors(models, path, output):
    found = inspect_model(models, spec(path))
    assert found.contract.outputs == (output,)
    assert found.classes is None


def test_a_pipeline_on_named_columns(models):
    found = inspect_model(models, spec("loan.skops"), sample=Sample.read(models / "loan.csv"))
    assert found.contract.inputs == (
        Tensor("age", "FP64", (-1, 1)),
        Tensor("member", "BOOL", (-1, 1)),
        Tensor("postcode", "BYTES", (-1, 1)),
    )
    assert found.contract.outputs[0] == Tensor("predict", "BYTES", (-1,))
    assert found.notes == ("the model does not take label",)
    assert list(found.sample_outputs[0].data)[:4] == ["no", "yes", "no", "yes"]


def test_a_column_with_text_categories_is_text_however_it_looks(models, tmp_path):
    (tmp_path / "rows.csv").write_text("age,member,postcode\n25,true,10115\n")
    found = inspect_model(models, spec("loan.skops"), sample=Sample.read(tmp_path / "rows.csv"))
    assert found.contract.inputs[2].datatype == "BYTES"


def test_missing_columns_are_named(models, tmp_path):
    (tmp_path / "rows.csv").write_text("age,city\n25,Berlin\n")
    message = failure(models, spec("loan.skops"), sample=Sample.read(tmp_path / "rows.csv"))
    assert "member, postcode" in message


def test_columns_of_unknown_type_need_a_sample(models):
    assert "--sample" in failure(models, spec("loan.skops"))


def test_a_model_of_texts(models):
    found = inspect_model(models, spec("mail.skops"))
    assert found.contract.inputs == (Tensor("input", "BYTES", (-1,)),)


def test_a_python_function(models):
    sample = Sample.read(models / "x.json")
    found = inspect_model(models / "code", spec("predictor.py"), sample=sample)
    assert found.contract.inputs == (Tensor("x", "FP64", (-1, 1)),)
    assert found.contract.outputs == (Tensor("y", "FP64", (-1, 1)), Tensor("who", "BYTES", (-1,)))
    assert found.contract.side_effects == "unknown"
    assert list(found.sample_outputs[0].data) == [2.5, 5.0]
    assert found.engine == "python"


def test_a_request_as_the_sample(models, tmp_path):
    tensor = {"name": "x", "datatype": "FP64", "shape": [2, 2, 1], "data": [1, 2, 3, 4]}
    (tmp_path / "r.json").write_text(json.dumps({"inputs": [tensor]}))
    found = inspect_model(
        models / "code", spec("predictor.py"), sample=Sample.read(tmp_path / "r.json")
    )
    assert found.contract.inputs == (Tensor("x", "FP64", (-1, 2, 1)),)


def test_onnx_graphs(onnx_models, tmp_path):
    found = inspect_model(onnx_models, spec("plain.onnx"))
    assert found.contract.inputs == (Tensor("X", "FP32", (-1, 64)),)
    assert [output.name for output in found.contract.outputs] == ["label", "probabilities"]
    assert (found.engine, found.precision) == ("onnx", "float32")
    assert found.sample_request is None
    np.savetxt(tmp_path / "rows.csv", np.eye(3, 64), delimiter=",", fmt="%.1f")
    found = inspect_model(onnx_models, spec("maps.onnx"), sample=Sample.read(tmp_path / "rows.csv"))
    label, probabilities = found.sample_outputs
    assert (label.datatype, label.shape) == ("INT64", (3,))
    assert (probabilities.datatype, probabilities.shape) == ("FP32", (3, 10))
    assert sum(probabilities.data) == pytest.approx(3.0, abs=1e-4)


@pytest.mark.parametrize("path", ["digits.pkl", "digits.joblib"])
def test_a_pickle_needs_a_stated_reason(models, path):
    assert "`unsafe`" in load_failure(models, spec(path))
    stated = spec(path, unsafe="trained by our own job").model_dump()
    engine = model_host.load({"folder": str(models), **stated})
    (answer,) = engine.predict({"input": np.zeros((2, 64))}, None).values()
    assert answer.shape == (2,)


def test_types_that_skops_does_not_know_must_be_named(models, tmp_path):
    (tmp_path / "ours.py").write_text(
        "class Ours:\n    n_features_in_ = 2\n    def predict(self, x): return x.sum(axis=1)\n"
    )
    sys.path.insert(0, str(tmp_path))
    try:
        import ours  # pyright: ignore[reportMissingImports]

        skops.io.dump(ours.Ours(), tmp_path / "ours.skops")
    finally:
        sys.path.remove(str(tmp_path))
        sys.modules.pop("ours", None)
    assert "ours.Ours" in load_failure(tmp_path, spec("ours.skops"))
    found = inspect_model(tmp_path, spec("ours.skops", unsafe="ours.Ours is our own code"))
    assert found.contract.inputs == (Tensor("input", "FP64", (-1, 2)),)


def test_what_is_no_model_is_said_to_be_none(models, tmp_path):
    assert "StandardScaler, which has no predict()" in load_failure(models, spec("scaler.skops"))
    (tmp_path / "broken.skops").write_text("not a zip")
    assert "can't be read as skops" in load_failure(tmp_path, spec("broken.skops"))
    assert "no model" in load_failure(models, spec("loan.csv", format="file"))
    (tmp_path / "broken.onnx").write_text("not a graph")
    assert "can't be read as onnx" in load_failure(tmp_path, spec("broken.onnx"))


def test_a_model_of_another_scikit_learn_is_noted(models, tmp_path):
    pickled = (models / "digits.pkl").read_bytes()
    version = sklearn.__version__.encode()
    assert pickled.count(version) == 1
    other = b"0." + b"9" * (len(version) - 2)  # as long, so that the pickle stays whole
    (tmp_path / "old.pkl").write_bytes(pickled.replace(version, other))
    old = spec("old.pkl", unsafe="made by this test").model_dump()
    engine = model_host.load({"folder": str(tmp_path), **old})
    assert f"saved with scikit-learn {other.decode()}" in engine.notes[0]


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("import nowhere_at_all", "the module 'nowhere_at_all'"),
        ("def predict(inputs", "SyntaxError"),
        ("x = 1", "no function predict(inputs)"),
        ("raise RuntimeError('no weights')", "RuntimeError: no weights"),
        ("import os; print('bye'); os._exit(3)", "exit code 3"),
    ],
)
def test_code_that_does_not_load(tmp_path, code, said):
    (tmp_path / "predictor.py").write_text(code)
    assert said in failure(tmp_path, spec("predictor.py"))


def test_an_entry_in_a_module_beside(tmp_path):
    (tmp_path / "predictor.py").write_text("raise RuntimeError")
    (tmp_path / "other.py").write_text("def answer(inputs): return {'y': inputs['x'] + 1}")
    (tmp_path / "x.csv").write_text("x\n1\n")
    found = inspect_model(
        tmp_path, spec("predictor.py", entry="other:answer"), sample=Sample.read(tmp_path / "x.csv")
    )
    assert list(found.sample_outputs[0].data) == [2.0]


def test_rows_that_the_model_rejects(models, tmp_path):
    (tmp_path / "x.json").write_text('[{"x": -1}]')
    message = failure(
        models / "code", spec("predictor.py"), sample=Sample.read(tmp_path / "x.json")
    )
    assert "negative is not for me" in message


def test_a_model_that_takes_too_long(tmp_path):
    (tmp_path / "predictor.py").write_text("import time; time.sleep(60)")
    assert "longer than 1 s" in failure(tmp_path, spec("predictor.py"), timeout=1.0)


def test_an_interpreter_that_is_none(models):
    assert "does not start" in failure(models, spec("digits.skops"), python=Path("/nowhere"))


# --- endpoints ----------------------------------------------------------------------------------

METADATA = {
    "name": "fraud",
    "versions": ["1", "2"],
    "platform": "triton",
    "inputs": [{"name": "x", "datatype": "FP32", "shape": [-1, 3]}],
    "outputs": [{"name": "y", "datatype": "FP32", "shape": [-1]}],
}


class FakeHttp:
    def __init__(self, answers: Mapping[str, Any]) -> None:
        self.answers = answers
        self.headers: list[dict] = []

    async def request(self, method, url, *, headers=None, body=None, timeout=10.0):  # noqa: ASYNC109
        self.headers.append(dict(headers or {}))
        path = url.removeprefix("http://there")
        if path not in self.answers:
            return HttpResponse(status=404, headers={}, body=b"")
        return HttpResponse(status=200, headers={}, body=json.dumps(self.answers[path]).encode())


ANSWERS = {
    "/v2": {"name": "triton", "version": "2.5", "extensions": []},
    "/v2/health/ready": {},
    "/v2/models/fraud": METADATA,
}


async def test_an_endpoint_tells_its_contract():
    http = FakeHttp(ANSWERS)
    found = await inspect_endpoint("http://there/v2/models/fraud", http, credential="s3cret")
    assert found.contract.inputs == (Tensor("x", "FP32", (-1, 3)),)
    assert (found.platform, found.version, found.server) == ("triton", "2", "triton 2.5")
    assert found.digest is None
    assert all(headers == {"authorization": "Bearer s3cret"} for headers in http.headers)
    assert await inspect_endpoint("http://there", http, model="fraud") == found


async def test_an_endpoint_without_a_model_s_name():
    with pytest.raises(UsageError, match="/v2/models/NAME"):
        await inspect_endpoint("http://there", FakeHttp(ANSWERS))


@pytest.mark.parametrize(
    ("without", "said"),
    [("/v2/health/ready", "not ready"), ("/v2/models/fraud", "no model 'fraud'")],
)
async def test_an_endpoint_that_lacks_something(without, said):
    answers = {path: answer for path, answer in ANSWERS.items() if path != without}
    with pytest.raises(Unavailable, match=said):
        await inspect_endpoint("http://there", FakeHttp(answers), model="fraud")


async def test_an_endpoint_that_speaks_something_else():
    with pytest.raises(RuntimeFailed, match="Open Inference Protocol"):
        await inspect_endpoint(
            "http://there", FakeHttp(ANSWERS | {"/v2/models/fraud": ["?"]}), model="fraud"
        )
