"""How models and releases are named: `digits`, `digits@3`, `digits@sha256:…`, `digits@staging`."""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import StrEnum

from shipworthy.errors import UsageError

MODEL = re.compile(r"[a-z0-9](?:[a-z0-9._-]{0,61}[a-z0-9])?")
_DIGEST = re.compile(r"sha256:[0-9a-f]{8,64}")


class Stage(StrEnum):
    """Where a release runs, in the order of promotion."""

    DEVELOPMENT = "development"
    STAGING = "staging"
    PRODUCTION = "production"


@dataclass(frozen=True, slots=True)
class ReleaseReference:
    """A release as a person names it: one of version, digest (may be a prefix) and stage."""

    model: str
    version: int | None = None
    digest: str | None = None
    stage: Stage | None = None


def check_model_name(name: str) -> str:
    """The name itself, or a UsageError that says what a model may be called."""
    if not MODEL.fullmatch(name):
        raise UsageError(
            f"{name!r} is not a model name; use 1 to 63 of a-z, 0-9, '.', '_' and '-',"
            " beginning and ending with a letter or digit"
        )
    return name


def parse_reference(text: str) -> ReleaseReference:
    """Read `model@version`, `model@sha256:…` or `model@stage`.

    Raises UsageError for anything else, with the forms that are accepted.
    """
    model, separator, what = text.partition("@")
    check_model_name(model)
    if separator and what.isascii() and what.isdigit() and int(what) > 0:
        return ReleaseReference(model, version=int(what))
    if separator and _DIGEST.fullmatch(what):
        return ReleaseReference(model, digest=what)
    if what in tuple(Stage):
        return ReleaseReference(model, stage=Stage(what))
    raise UsageError(
        f"{text!r} names no release; write {model}@3, {model}@production or {model}@sha256:…"
    )


def plan_name(model: str, stage: Stage) -> str:
    """What clients call: the bare model in production, `model@stage` before it."""
    return model if stage is Stage.PRODUCTION else f"{model}@{stage}"
