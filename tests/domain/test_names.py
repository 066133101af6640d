"""How models and releases are named."""

from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shipworthy.domain.names import (
    MODEL,
    ReleaseReference,
    Stage,
    check_model_name,
    parse_reference,
    plan_name,
)
from shipworthy.errors import UsageError

NAMES = st.from_regex(MODEL, fullmatch=True)


@given(NAMES, st.integers(1, 10**9))
def test_by_version(model, version) -> None:
    assert parse_reference(f"{model}@{version}") == ReleaseReference(model, version=version)


@given(NAMES, st.sampled_from(Stage))
def test_by_stage(model, stage) -> None:
    assert parse_reference(f"{model}@{stage}") == ReleaseReference(model, stage=stage)


@given(NAMES, st.text("0123456789abcdef", min_size=8, max_size=64))
def test_by_digest(model, digits) -> None:
    digest = f"sha256:{digits}"
    assert parse_reference(f"{model}@{digest}") == ReleaseReference(model, digest=digest)


@pytest.mark.parametrize(
    "text",
    ["digits", "digits@", "digits@0", "digits@-1", "digits@prod", "digits@sha256:abc", "@3",
     "Digits@3", "digits@²", "digits@3\n", "digits\n@3", "", "@", "digits@3@4",
     "digits@sha256:ABCDEF12"],
)  # fmt: skip
def test_what_names_no_release(text) -> None:
    with pytest.raises(UsageError):
        parse_reference(text)


@given(st.text(max_size=80))
def test_any_text_is_a_name_or_a_sentence(text) -> None:
    try:
        assert check_model_name(text) == text
        assert 1 <= len(text) <= 63
    except UsageError as error:
        assert "1 to 63" in str(error)  # noqa: PT017  # both endings are fine
    with suppress(UsageError):
        parse_reference(text)


def test_stages_are_in_order_and_plans_are_named_for_them() -> None:
    assert list(Stage) == ["development", "staging", "production"]
    assert plan_name("digits", Stage.PRODUCTION) == "digits"
    assert plan_name("digits", Stage.STAGING) == "digits@staging"
