"""Whatever a person writes, the answer is a model or a list of problems with lines."""

# ruff: noqa: E501  # a table reads best with what is written and what is told side by side

import re

import pytest
import yaml
from hypothesis import example, given
from hypothesis import strategies as st
from pydantic import BaseModel

from shipworthy.domain.contract import Contract, Tensor
from shipworthy.domain.manifest import (
    ArtifactSpec,
    EndpointServing,
    Metric,
    Owner,
    ProcessServing,
    ReleaseSpec,
    Replicas,
)
from shipworthy.domain.policy import Policy, with_preset
from shipworthy.errors import InvalidDocument
from shipworthy.protocols.documents import MAX_BYTES, plain_value, read_document, write_document

GOOD = """\
model: digits
artifacts: [{path: model.skops, format: skops}]
"""


def problems(text, model: type[BaseModel] = ReleaseSpec, **more):
    with pytest.raises(InvalidDocument) as caught:
        read_document(text, "release.yaml", model, **more)
    assert caught.value.exit_code == 2
    return caught.value.problems


def test_reads_what_is_right() -> None:
    spec = read_document(GOOD, "release.yaml", ReleaseSpec)
    assert spec.model == "digits"
    assert spec.artifacts[0].format == "skops"
    assert read_document(b"\xef\xbb\xbf" + GOOD.encode(), "x", ReleaseSpec) == spec


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("model: d\nartefacts: []\n", "release.yaml:2: 'artefacts' is not a key here; did you mean 'artifacts'?"),
        (GOOD + "owner:\n  name: Ann\n  emial: a@b.org\n", "release.yaml:5: 'emial' is not a key here in owner; did you mean 'email'?"),
        (GOOD + "owner:\n  name: Ann\n", "release.yaml:3: 'email' is missing in owner; add it"),
        (GOOD + "environment: {python: 3.10}\n", 'release.yaml:3: environment.python must be text, not 3.10; put it in quotes: "3.10"'),
        (GOOD + "version: x\n", "release.yaml:3: version must be a whole number, not 'x'"),
        (GOOD + "code: yes\n", "release.yaml:3: code must be made of `key: value` lines, not 'yes'"),
        (GOOD + "data:\n  - {name: a, path: b, role: trian}\n", "release.yaml:4: data[0].role is 'trian', not one of train, validation, test, sample, reference; did you mean 'train'?"),
        (GOOD + "serving:\n  runtime: endpont\n", "release.yaml:3: serving runtime is 'endpont', not one of process, endpoint; did you mean 'endpoint'?"),
        (GOOD + "serving:\n  command: x\n", "release.yaml:3: serving lacks 'runtime'; add one of process, endpoint"),
        (GOOD + "serving:\n  runtime: endpoint\n  served_modle: x\n  urls: ['http://a']\n", "release.yaml:5: 'served_modle' is not a key here in serving; did you mean 'served_model'?"),
        (GOOD + "contract:\n  inputs:\n    - {name: x, datatype: FP3, shape: [1]}\n  outputs: []\n", "release.yaml:5: contract.inputs[0].datatype is 'FP3', not one of BOOL,"),
        (GOOD + "contract:\n  inputs: [{name: x, datatype: FP32, shape: [1], dim: 2}]\n  outputs: []\n", "release.yaml:4: 'dim' is not a key here in contract.inputs[0]; known are name, datatype, shape, optional"),
        (GOOD + "metrics:\n  heldout:\n    'a b': {value: 1}\n", "release.yaml:5: metrics.heldout.a b must be 1 to 63 letters"),
        (GOOD + "metrics: {heldout: {accuracy: {value: .nan}}}\n", "release.yaml:3: metrics.heldout.accuracy.value must be a finite number, not .nan"),
        (GOOD + "serving: {runtime: process, replicas: {min: 3, max: 2}}\n", "release.yaml:3: serving.replicas max (2) is below min (3)"),
        (GOOD + "base: {model: a, adapter: {rank: [1]}}\n", "release.yaml:3: base.adapter.rank must be text or a whole number or a number or true or false, not a list"),
        (GOOD + "model: again\n", "release.yaml:3: 'model' is given twice, first in line 1; keep one"),
        ("model: d\n", "release.yaml:1: nothing to serve"),
        ("", "release.yaml:1: is empty"),
        ("# only this\n", "release.yaml:1: is empty"),
        ("- a\n- b\n", "release.yaml:1: holds a list"),
        ("just words", "release.yaml:1: holds a single value"),
        ("a: 1\n\tb: 2", "release.yaml:2: is indented with a tab"),
        ("model: d\nx: [1, 2\n", "release.yaml:3: is not valid YAML"),
        ("a: b: c", "release.yaml:1: is not valid YAML"),
        ("a: 1\n---\nb: 2\n", "release.yaml:2: a second document begins"),
        ("a: *nobody", "release.yaml:1: is not valid YAML: found undefined alias 'nobody'"),
        ("a: &a [*a]", "release.yaml:1: an alias holds itself"),
        ("a: !!python/object/apply:os.system [x]", "release.yaml:1: the tag !!python/object/apply:os.system is not read here"),
        ("? [a, b]\n: 1\n", "release.yaml:1: a key must be plain text"),
        ("a: 1\n<<: {b: 2}\n", "release.yaml:2: merge keys"),
        ('a: "\\ud800"\n', "release.yaml:1: holds a NUL or half a character"),
        ("a: \x01", "release.yaml:1: holds the control character"),
        (b"a: 1\nb: \xff\n", "release.yaml:2: is not UTF-8 text"),
        ("[" * 5_000, "is nested more than 50 levels deep"),
        ("a: " + "x" * MAX_BYTES, "KiB are read"),
    ],
)  # fmt: skip
def test_each_problem_names_its_line_and_the_cure(text, told) -> None:
    assert any(told in one for one in problems(text)), problems(text)


def test_all_problems_are_told_at_once_in_order() -> None:
    text = "model: Bad Name\nversion: none\nowner: {name: 5}\nartifacts: [{path: ../x}, {path: y, formt: onnx}]\nmodle: a\n"
    told = problems(text)
    assert [int(one.split(":")[1]) for one in told] == [1, 2, 3, 3, 4, 4, 5]


def test_a_bomb_of_aliases_is_refused_quickly() -> None:
    bomb = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
        f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12)
    )
    assert any("unfolds into too much" in one for one in problems(bomb))


def test_unquoted_words_mean_what_they_look_like() -> None:
    assert [plain_value(text) for text in ("no", "on", "1:30", "2026-01-01", "1_000", "0x1F")] == [
        "no", "on", "1:30", "2026-01-01", "1_000", 31,
    ]  # fmt: skip
    assert plain_value("1e3") == 1000.0
    assert plain_value("~") is None
    assert plain_value("9" * 5_000) == "9" * 5_000


def test_a_policy_is_laid_over_its_preset() -> None:
    read = read_document(
        "model: digits\npreset: critical\nrollout: {margin: 2%}\n", "p", Policy, with_preset
    )
    assert read.rollout.margin == 0.02
    assert read.rollout.steps[0].weight == 0.01
    assert problems("model: d\npreset: standrd\n", Policy, prepare=with_preset) == [
        "release.yaml:2: preset must be one of prototype, standard, critical (it is 'standrd')"
    ]


def test_a_problem_in_a_preset_points_at_the_nearest_line() -> None:
    def broken(document):
        return document | {"rollout": {"margin": "lots"}}

    assert problems("model: d\n", Policy, prepare=broken)[0].startswith(
        "release.yaml:1: rollout.margin"
    )


def test_what_prepare_refuses_is_a_problem() -> None:
    def refuse(document):
        message = "it is not the time"
        raise ValueError(message)

    assert problems(GOOD, prepare=refuse) == ["release.yaml:1: it is not the time"]


SPECS = st.builds(
    ReleaseSpec,
    model=st.just("digits"),
    description=st.text(max_size=40).filter(lambda text: "\0" not in text),
    owner=st.none() | st.builds(Owner, name=st.text(min_size=1, max_size=9).filter(lambda text: "\0" not in text), email=st.sampled_from(["off", "1e3", "a@b.org", "null", "0x10", "1:30"])),
    artifacts=st.just((ArtifactSpec(path="m.skops", format="skops"),)),
    contract=st.none() | st.just(Contract(inputs=(Tensor("x", "FP32", (-1, 3), optional=True),), outputs=())),
    serving=st.sampled_from([ProcessServing(), ProcessServing(replicas=Replicas(max=4)), EndpointServing(runtime="endpoint", urls=("http://a",), served_model="m")]),
    metrics=st.dictionaries(st.sampled_from(["heldout", "a.b"]), st.dictionaries(st.sampled_from(["acc", "f1"]), st.builds(Metric, value=st.floats(allow_nan=False, allow_infinity=False), n=st.none() | st.integers(1, 10**9)))),
)  # fmt: skip


@given(SPECS)
def test_what_is_written_reads_back_equal(spec) -> None:
    assert read_document(write_document(spec), "x", ReleaseSpec) == spec


TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=8)
PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=8,
)  # fmt: skip


class Open(BaseModel, extra="allow"):
    """Accepts anything, so that only reading and writing are at work."""


@given(st.dictionaries(TEXT, PLAIN, max_size=4))
def test_any_plain_content_survives(content) -> None:
    text = write_document({"x": content})
    assert read_document(text, "x", Open).model_extra == {"x": content}


def test_generated_files_are_short_and_ordered() -> None:
    spec = ReleaseSpec(model="digits", artifacts=(ArtifactSpec(path="m.onnx", format="onnx"),))
    assert write_document(spec) == "model: digits\nartifacts:\n  - {path: m.onnx, format: onnx}\n"


WORDS = st.sampled_from(
    ["model", "artifacts", "path", "format", "serving", "runtime", "endpoint", "contract", "metrics",
     "data", "[key]", "inputs", "version", "name", "str", "base", "adapter", "process", "\t", "&a",
     "*a", "!!str", "<<", "- ", ": ", "\n", "  ", "{", "}", "[", "]", ",", "'", '"', "|", "#", "%",
     "\ufeff", "\x85", "\ud7ff", "~", ".inf", "1", "? "]
)  # fmt: skip


def told_about(text, model: type[BaseModel], prepare=None) -> list[str]:
    try:
        read_document(text, "release.yaml", model, prepare)
    except InvalidDocument as error:
        return error.problems
    return []


@given(st.lists(WORDS, max_size=40).map("".join) | st.text(max_size=60) | st.binary(max_size=60))
@example("serving: {runtime: endpoint, endpoint: {urls: 1}}")
@example("metrics: {'[key]': {'[key]': 5}}")
def test_never_a_traceback(text) -> None:
    for model in (ReleaseSpec, Policy):
        told = told_about(text, model, with_preset)
        assert all(re.match(r"release\.yaml:[1-9]\d*: \S", one) for one in told)


@given(PLAIN)
def test_never_a_traceback_for_well_formed_nonsense(value) -> None:
    for name in ReleaseSpec.model_fields:
        text = yaml.safe_dump({"model": "d", name: value}, allow_unicode=True)
        assert all(one.startswith("release.yaml:") for one in told_about(text, ReleaseSpec))
