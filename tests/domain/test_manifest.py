"""A digest means the content: not its spelling, and no other content."""

import copy
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from shipworthy.domain.canonical import canonical_json, digest_of
from shipworthy.domain.manifest import ArtifactSpec, Manifest, Owner, PinnedFile, ReleaseSpec


def pinned(path="model.skops", fill="a"):
    return PinnedFile(path=path, digest=f"sha256:{fill * 64}", size=3)


MANIFEST = Manifest.model_validate(
    {
        "model": "digits",
        "description": "a classifier",
        "owner": {"name": "Ann", "email": "ann@team.org"},
        "base": {"model": "org/base", "revision": "main", "adapter": {"rank": 16}},
        "behaviour": {"system": "be brief", "tools": [{"name": "search"}]},
        "training": {"command": "python train.py", "seed": 7, "parameters": {"C": 10}},
        "metrics": {"heldout": {"accuracy": {"value": 0.985, "n": 540}}},
        "cost": {"per_hour": 0.12},
        "artifacts": [
            {"path": "model", "format": "file", "files": [pinned("a/b.bin").model_dump()]},
            {
                "path": "m.pkl",
                "format": "pickle",
                "files": [pinned(".").model_dump()],
                "unsafe": "we made it",
            },
        ],
        "code": {"commit": "c0ffee", "uncommitted": None},
        "environment": {"lock": pinned("requirements.lock", "b").model_dump(), "python": "3.11"},
        "data": [
            {"name": "train", "role": "train", "files": [pinned(".", "c").model_dump()]},
            {"name": "some", "role": "sample", "files": [pinned(".", "d").model_dump()]},
        ],
        "contract": {
            "inputs": [{"name": "x", "datatype": "FP32", "shape": [-1, 64]}],
            "outputs": [{"name": "y", "datatype": "INT64", "shape": [-1]}],
        },
        "inference": {"engine": "sklearn", "engine_version": "1.7.1"},
    }
)  # fmt: skip


def leaves(value, path=()):
    """Every value in a document that is no container."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from leaves(inner, (*path, key))
    elif isinstance(value, list):
        for position, inner in enumerate(value):
            yield from leaves(inner, (*path, position))
    else:
        yield path


LEAVES = list(leaves(MANIFEST.content()))


@st.composite
def shuffled(draw, value=None):
    """The same content with its keys in another order, at every depth."""
    value = MANIFEST.content() if value is None else value
    if isinstance(value, dict):
        keys = draw(st.permutations(list(value)))
        return {key: draw(shuffled(value[key])) if value[key] is not None else None for key in keys}
    return [draw(shuffled(one)) for one in value] if isinstance(value, list) else value


@settings(max_examples=25)
@given(shuffled())
def test_the_order_of_keys_means_nothing(content) -> None:
    assert Manifest.model_validate(content).digest() == MANIFEST.digest()


@pytest.mark.parametrize("path", LEAVES, ids=lambda path: ".".join(map(str, path)))
def test_any_change_of_a_pinned_value_changes_the_digest(path) -> None:
    content = MANIFEST.content()
    changed = copy.deepcopy(content)
    inner = changed
    for part in path[:-1]:
        inner = inner[part]
    inner[path[-1]] = f"{inner[path[-1]]}x"
    assert digest_of(changed) != digest_of(content)


@pytest.mark.parametrize("path", [leaf for leaf in LEAVES if len(leaf) > 1], ids=str)
def test_leaving_out_a_pinned_value_changes_the_digest(path) -> None:
    changed = MANIFEST.content()
    inner = changed
    for part in path[:-1]:
        inner = inner[part]
    del inner[path[-1]]
    assert digest_of(changed) != MANIFEST.digest()


def test_the_content_survives_json() -> None:
    content = json.loads(json.dumps(MANIFEST.content()))
    assert digest_of(content) == MANIFEST.digest()
    assert Manifest.model_validate(content) == MANIFEST


def test_the_version_is_a_name_and_not_content() -> None:
    assert "version" not in Manifest.model_fields


@given(st.recursive(st.none() | st.booleans() | st.integers() | st.text(), st.lists, max_leaves=5))
def test_canonical_json_is_json(value) -> None:
    if "\\ud" not in ascii(value):
        assert json.loads(canonical_json(value)) == value


def test_what_is_no_number_has_no_canonical_form() -> None:
    with pytest.raises(ValueError, match="Out of range"):
        canonical_json(float("nan"))


def test_files_are_found_for_starting_and_for_keeping() -> None:
    start = [file.digest[7] for file in MANIFEST.pinned_files()]
    kept = [file.digest[7] for file in MANIFEST.stored_files()]
    assert start == ["a", "a", "b"]
    assert kept == ["a", "a", "b", "d"]  # training data is pinned, and not kept


def test_a_file_that_is_the_artifact_lies_at_its_path() -> None:
    folder, single = MANIFEST.artifacts
    assert [path for path, _ in folder.placed()] == ["model/a/b.bin"]
    assert [path for path, _ in single.placed()] == ["m.pkl"]


@pytest.mark.parametrize("path", ["/etc/passwd", "../up", "a/../../up", "", ".."])
def test_artifacts_stay_inside_the_folder(path) -> None:
    with pytest.raises(ValidationError, match="inside the release's folder"):
        ArtifactSpec(path=path)


ENDPOINT = {"runtime": "endpoint", "urls": ["http://a"], "served_model": "m"}


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"artifacts": []}, "nothing to serve"),
        ({"serving": {"runtime": "process", "replicas": {"min": 2, "max": 1}}}, "below min"),
        ({"serving": ENDPOINT | {"urls": ["ftp://a"]}}, "http://"),
        ({"serving": ENDPOINT | {"urls": ["http://me:secret@a/v1"]}}, "credential: env:NAME"),
        ({"serving": ENDPOINT | {"credential": "s3cret"}}, "never the secret"),
        ({"environment": {"python": "2.7"}}, "Python version"),
        ({"model": "Digits"}, "1 to 63"),
        ({"unknown": 1}, "Extra inputs"),
    ],
)
def test_a_spec_refuses(changes, told) -> None:
    content = {"model": "digits", "artifacts": [{"path": "m.skops", "format": "skops"}]}
    with pytest.raises(ValidationError, match=told):
        ReleaseSpec.model_validate(content | changes)


def test_a_release_that_was_registered_with_a_password_in_a_url_can_still_be_read() -> None:
    serving = ENDPOINT | {"urls": ["http://me:secret@a/v1"]}
    content = MANIFEST.model_dump(mode="json") | {"serving": serving}
    assert Manifest.model_validate(content).model_dump(mode="json")["serving"]["urls"] == [
        "http://me:secret@a/v1"
    ]


def test_parts_are_frozen() -> None:
    for part in (MANIFEST, Owner(name="a", email="a@b"), pinned()):
        with pytest.raises(ValidationError, match="frozen"):
            setattr(part, next(iter(type(part).model_fields)), "other")


ELSEWHERE = {"runtime": "endpoint", "urls": ["http://there/v1"], "served_model": "org/m"}
OPENAI = {"protocol": "openai", "operations": ["chat"]}
TENSOR = {"name": "x", "datatype": "FP64", "shape": [-1]}


def language(**changes):
    return ReleaseSpec.model_validate(
        {"model": "assistant", "serving": ELSEWHERE, "contract": OPENAI, **changes}
    )


def test_a_prompt_release_is_a_release():
    spec = language(
        behaviour={"system": "Be brief.", "pin_sampling": True},
        inference={
            "sampling": {"temperature": 0.2, "max_tokens": 64, "stop": ["\n"], "mirostat": 2}
        },
    )
    assert spec.inference.sampling["stop"] == ("\n",)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"contract": None, "behaviour": {"system": "x"}}, "behaviour is for language models"),
        (
            {"contract": {"inputs": [TENSOR], "outputs": [TENSOR]}, "behaviour": {"system": "x"}},
            "behaviour is for language models",
        ),
        ({"contract": {"inputs": [TENSOR], "operations": ["chat"]}}, "are an openai contract's"),
        ({"contract": {**OPENAI, "inputs": [TENSOR]}}, "has no inputs and outputs"),
        ({"contract": {**OPENAI, "operations": ["chat", "chat"]}}, "names one twice"),
        ({"contract": {**OPENAI, "operations": ["sing"]}}, "sing|'chat'"),
        (
            {"serving": {"runtime": "process"}, "artifacts": [{"path": "m"}]},
            "'shipworthy serve' does not speak openai",
        ),
        ({"serving": {**ELSEWHERE, "concurrency": 0}}, "greater than 0"),
        ({"inference": {"sampling": {"temperature": "hot"}}}, "temperature must be a number"),
        ({"inference": {"sampling": {"temperature": True}}}, "temperature must be a number"),
        ({"inference": {"sampling": {"max_tokens": 1.5}}}, "max_tokens must be a whole number"),
        ({"inference": {"sampling": {"model": "x"}}}, "model is no sampling"),
        ({"inference": {"sampling": {"stop": [["x"]]}}}, "sampling.stop"),
    ],
)
def test_what_a_language_release_can_not_say(changes, said):
    with pytest.raises(ValidationError, match=said):
        language(**changes)


def test_another_server_in_a_process_may_speak_openai():
    vllm = "vllm serve {folder} --port {port} --served-model-name assistant"
    spec = language(serving={"runtime": "process", "command": vllm}, artifacts=[{"path": "m"}])
    assert spec.contract is not None
