"""The demo's parts: folders, the third version's preparation, and how figures are counted."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import BaseModel

from shipworthy.app.founding import read_policy
from shipworthy.app.releasing import read_spec
from shipworthy.cli.demo import files, predictor
from shipworthy.cli.demo.models import Trained, split_digits
from shipworthy.cli.demo.results import Figures, Journalled, summarise
from shipworthy.cli.demo.story import MARK, clean_folder
from shipworthy.cli.demo.traffic import Tally
from shipworthy.domain.lifecycle import Decision
from shipworthy.domain.records import FeedbackRecord, InferenceRecord, Outcome
from shipworthy.errors import Conflict

# --- the folder -----------------------------------------------------------------------------------


def test_a_folder_that_no_demo_made_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(Conflict, match="no demo made"):
        clean_folder(tmp_path)
    assert (tmp_path / "thesis.tex").is_file()


def test_a_file_in_the_folders_place_is_left_alone(tmp_path: Path) -> None:
    file = tmp_path / "demo"
    file.write_text("mine")
    with pytest.raises(Conflict):
        clean_folder(file)


def test_an_earlier_demo_is_replaced(tmp_path: Path) -> None:
    root = clean_folder(tmp_path / "demo")
    (root / "old.txt").write_text("")
    assert clean_folder(root) == root
    assert sorted(path.name for path in root.iterdir()) == [".gitignore", MARK]


# --- files ----------------------------------------------------------------------------------------


def test_policy_and_releases_are_valid_documents(tmp_path: Path) -> None:
    files.write_policy(tmp_path / "policy.yaml")
    policy = read_policy(tmp_path / "policy.yaml")
    assert policy.promotion.production.approvals == 1
    assert policy.promotion.production.checks  # the preset's
    trained = Trained(2, "a model", np.array([True] * 9 + [False]))
    files.write_release(tmp_path / "release.yaml", trained)
    spec = read_spec(tmp_path / "release.yaml")
    assert (spec.version, spec.metrics["heldout"]["accuracy"].value) == (2, 0.9)
    assert isinstance(spec, BaseModel)


# --- the third version ----------------------------------------------------------------------------


def test_the_export_never_shows_what_the_third_version_can_not_do() -> None:
    split = split_digits()
    prepared = predictor.prepare(split.held_out.pixels)
    assert prepared.shape == split.held_out.pixels.shape
    assert prepared.min() == 0.0
    assert prepared.max() == 1.0


def test_the_third_version_raises_on_8_bit_pixels() -> None:
    image = split_digits().live.pixels[:1] * (255 / 16)
    with pytest.raises(IndexError):
        predictor.prepare(image)


def test_the_third_version_takes_thousands_of_steps_on_grey_paper(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    steps: list[float] = []
    paper = predictor._paper
    monkeypatch.setattr(predictor, "_STEP", 0.1)
    monkeypatch.setattr(predictor, "_paper", lambda image: steps.append(1) or paper(image))
    predictor.prepare(np.clip(split_digits().live.pixels[:1] + 2.0, 0, 16))
    assert len(steps) == pytest.approx(2.0 / 0.1 + 1, abs=2)


# --- figures --------------------------------------------------------------------------------------


def inference(id: str, **values: Any) -> InferenceRecord:
    usual: dict[str, Any] = {
        "at": 100.0, "plan": "digits", "model": "digits", "revision": 1, "key": "k",
        "assigned": "stable", "probability": 1.0, "outcome": Outcome.SUCCESS, "status": 200,
        "release": "digits@2", "serving_release": "digits@2",
    }  # fmt: skip
    return InferenceRecord(id=id, **usual | values)


def label(of: str, digit: int) -> FeedbackRecord:
    return FeedbackRecord(
        id=f"fb-{of}", at=101.0, inference=of, key="k", kind="label", name="digit", value=digit
    )


def answer(digit: int) -> bytes:
    return b'{"outputs":[{"name":"predict","data":[%d]}]}' % digit


def test_labels_are_held_against_the_answers_of_the_release_that_gave_them() -> None:
    found = summarise(
        [
            label("c", 5),  # before its inference, from another worker's journal
            inference("a", response=answer(3)),
            inference("b", response=answer(4)),
            inference("c", response=None),
            label("a", 3),
            label("b", 9),
            label("unknown", 1),
        ]
    )
    assert (found.labelled["digits@2"], found.right["digits@2"]) == (2, 1)


def test_only_the_plan_that_users_call_is_counted() -> None:
    found = summarise([inference("a"), inference("b", plan="digits@staging")])
    assert found.answers == {"digits@2": 1}


def exposed(id: str, sent: float, **values: Any) -> InferenceRecord:
    of_candidate = {"rollout": "r3", "assigned": "candidate", "release": "digits@3"}
    return inference(id, sent=sent, **of_candidate | values)


def figures(
    records: Sequence[InferenceRecord], *, rule: str = "errors", errors: int = 0
) -> Figures:
    trained = [Trained(n, "a model", np.array([True])) for n in (1, 2, 3)]
    complete = Decision(
        id="d1", at=50.0, model="digits", kind="complete", rollout="r2",
        text="digits@2 takes all of digits's traffic and is the stable release now; digits@1 …",
    )  # fmt: skip
    back = Decision(
        id="d2", at=100.0, model="digits", kind="roll back", rollout="r3",
        text="digits@3 is rolled back at 10% of digits's traffic; digits@2 takes everything.",
        numbers={"rule": rule, "deciding_at": 100.0},
    )  # fmt: skip
    journalled = summarise([inference("first", serving_release="digits@1"), *records])
    tallies = {"digits@3": Tally(requests=10, errors=errors)}
    return Figures(trained, tallies, journalled, [complete, back], seconds=60.0)


FAILED = {"outcome": Outcome.FAILURE, "reason": "timeout"}


def test_seconds_to_rollback_end_with_the_last_request_sent_to_the_candidate() -> None:
    # The last to be sent is not the last to be answered.
    found = figures([exposed("a", 100.4, at=101.0), exposed("b", 99.0, at=102.0, **FAILED)])
    assert found.seconds_to_rollback == pytest.approx(0.4)
    assert found.broken_promises() == []
    report = found.report()
    assert (report["exposed_requests"], report["failures_shielded"]) == (2, 1)
    assert report["promoted"] == ["digits@1", "digits@2"]
    assert report["rolled_back"] == ["digits@3"]


@pytest.mark.parametrize(
    ("found", "broken"),
    [
        (figures([exposed("a", 100.1)], errors=2), "users saw 2 errors"),
        (figures([exposed("a", 101.5)]), "for 1.50 s after the deciding answer"),
        (figures([exposed("a", 100.1)], rule="breaker"), "not on statistics"),
        (figures([]), "is not known"),
    ],
)
def test_a_promise_that_is_not_kept_is_said(found: Figures, broken: str) -> None:
    assert [sentence for sentence in found.broken_promises() if broken in sentence]
    assert found.report()["passed"] is False


def test_nothing_is_promoted_or_rolled_back_without_a_decision() -> None:
    trained = [Trained(n, "a model", np.array([True])) for n in (1, 2, 3)]
    found = Figures(trained, {}, Journalled(), [], seconds=1.0)
    report = found.report()
    assert (report["promoted"], report["rolled_back"]) == ([], [])
    assert len(report["broken_promises"]) == 3
