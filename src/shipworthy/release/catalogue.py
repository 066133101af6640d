"""The built-in checklist, and a team's additions to it."""

from __future__ import annotations

from functools import cache
from importlib.resources import files
from pathlib import Path

from shipworthy.domain.checklist import Checklist
from shipworthy.errors import NotFound
from shipworthy.protocols.documents import read_document


@cache
def built_in() -> Checklist:
    """The checklist that comes with Shipworthy."""
    text = files("shipworthy.domain").joinpath("checklist.yaml").read_bytes()
    return read_document(text, "checklist.yaml", Checklist)


def load(additions: Path | None = None) -> Checklist:
    """The built-in checklist with a team's own items from a file of the same form.

    An item of the same id takes the place of ours. Raises NotFound or InvalidDocument.
    """
    if additions is None:
        return built_in()
    try:
        text = additions.read_bytes()
    except OSError as error:
        raise NotFound(
            f"the checklist {additions} can't be read ({error.strerror}); check its path"
        ) from error
    return built_in().extended(read_document(text, additions.name, Checklist))
