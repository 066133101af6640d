"""What pydantic found wrong with a document, in the words of the document's author."""

from __future__ import annotations

import re
import types
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, is_dataclass
from dataclasses import fields as fields_of
from difflib import get_close_matches
from typing import Annotated, Any, Literal, Union, cast, get_args, get_origin, get_type_hints

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

Path = tuple[str | int, ...]
"""Where something stands in a document: keys and list positions."""

_MISSING = {"missing", "missing_argument"}
_UNKNOWN = {"extra_forbidden", "unexpected_keyword_argument"}
_QUOTED = re.compile(r"'([^']*)'")
_MOST_LISTED = 12


@dataclass(frozen=True, slots=True)
class Explained:
    """One problem: where, whether the key itself is at fault, and a sentence about it."""

    path: Path
    about_key: bool
    text: str


def explain(
    error: ValidationError, model: type[BaseModel], content: Any, raw: Mapping[Path, str]
) -> list[Explained]:
    """Say what is wrong with `content`, one entry for each place.

    `raw` holds how unquoted scalars were spelt, for values that only need quotes.
    """
    found: dict[tuple[Path, bool], list[tuple[_Place, ErrorDetails]]] = {}
    for details in error.errors(include_url=False):
        place = _locate(details, model, content)
        found.setdefault((place.path, place.about_key), []).append((place, details))
    return [
        Explained(path, about_key, _sentence(same, raw))
        for (path, about_key), same in found.items()
        if not (same[0][1]["type"] == "too_short" and _has_deeper(path, found))
    ]


def _has_deeper(path: Path, found: Iterable[tuple[Path, bool]]) -> bool:
    """Whether an item is at fault: pydantic then also counts it as lacking."""
    return any(len(other) > len(path) and other[: len(path)] == path for other, _ in found)


def nearest(word: str, known: Iterable[str]) -> str:
    """`; did you mean 'artifacts'?`, or else `; known are …`, for a word that is not known."""
    names = list(known)
    folded = {name.lower(): name for name in names}
    if close := get_close_matches(word.lower(), folded, n=1, cutoff=0.6):
        return f"; did you mean {folded[close[0]]!r}?"
    if not names:
        return "; remove it"
    listed = ", ".join(names[:_MOST_LISTED]) + (", …" if len(names) > _MOST_LISTED else "")
    return f"; known are {listed}"


def show_path(path: Path) -> str:
    """`artifacts[0].format`."""
    text = ""
    for part in path:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
    return text


# --- where ----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Place:
    """A path that the document has (or lacks, at its end), and the type expected around it."""

    path: Path
    around: Any
    value: Any
    about_key: bool


class _Lacking:
    """Stands for a value that the document does not have."""


_LACKING = _Lacking()


def _locate(details: ErrorDetails, model: type[BaseModel], content: Any) -> _Place:
    """Translate pydantic's location, which also names members of unions, to one of the document."""
    path: Path = ()
    around: Any = None
    annotation: Any = model
    value: Any = content
    for part in details["loc"]:
        if part == "[key]":
            return _Place(path, around, path[-1] if path else None, about_key=True)
        annotation = _strip(annotation)
        members = _members(annotation)
        if len(members) > 1:  # the part names the member, not a key
            annotation = _chosen(members, str(part))
            continue
        if not _may_hold(members[0], part, value):
            continue
        path, around = (*path, part), members[0]
        annotation = _inside(members[0], part)
        value = _item(value, part)
    return _Place(path, around, value, about_key=details["type"] in _UNKNOWN)


def _strip(annotation: Any) -> Any:
    while get_origin(annotation) is Annotated:
        annotation = get_args(annotation)[0]
    return annotation


def _members(annotation: Any) -> list[Any]:
    """What a union allows beside None; anything else is its own only member."""
    if get_origin(annotation) in {Union, types.UnionType}:
        return [_strip(one) for one in get_args(annotation) if one is not type(None)]
    return [annotation]


def _chosen(members: list[Any], label: str) -> Any:
    for member in members:
        if isinstance(member, type) and issubclass(member, BaseModel):
            tags = [get_args(info.annotation) for info in member.model_fields.values()]
            if (label,) in tags or member.__name__ == label:
                return member
    return Any


def _field_types(owner: Any) -> dict[str, Any] | None:
    """The names and types of a model's or dataclass's fields; None for anything else."""
    if isinstance(owner, type) and issubclass(owner, BaseModel):
        return {name: info.annotation for name, info in owner.model_fields.items()}
    if isinstance(owner, type) and is_dataclass(owner):
        hints = get_type_hints(owner, include_extras=True)
        return {one.name: hints[one.name] for one in fields_of(owner)}
    return None


def _may_hold(owner: Any, part: str | int, value: Any) -> bool:
    return _field_types(owner) is not None or not isinstance(_item(value, part), _Lacking)


def _inside(owner: Any, part: str | int) -> Any:
    types_ = _field_types(owner)
    if types_ is not None:
        return types_.get(str(part), Any)
    arguments = get_args(owner)
    return arguments[-1 if get_origin(owner) is dict else 0] if arguments else Any


def _item(value: Any, part: str | int) -> Any:
    if isinstance(value, dict):
        return cast("dict[str | int, Any]", value).get(part, _LACKING)
    if isinstance(value, list) and isinstance(part, int):
        items = cast("list[Any]", value)
        return items[part] if part < len(items) else _LACKING
    return _LACKING


# --- what -----------------------------------------------------------------------------------------


def _sentence(same: list[tuple[_Place, ErrorDetails]], raw: Mapping[Path, str]) -> str:
    place, details = same[0]
    kind = details["type"]
    name = show_path(place.path)
    key = str(place.path[-1]) if place.path else ""
    within = f" in {show_path(place.path[:-1])}" if len(place.path) > 1 else ""
    if kind in _UNKNOWN:
        return f"{key!r} is not a key here{within}{nearest(key, _field_types(place.around) or {})}"
    if kind in _MISSING:
        return f"{key!r} is missing{within}; add it"
    if len(same) > 1:  # every member of a plain union objects to one value
        kinds = dict.fromkeys(_WANTED.get(one["type"], "another kind of value") for _, one in same)
        return f"{name} must be {' or '.join(kinds)}, not {_shown(place, raw)}"
    told = _BY_TYPE.get(kind, _general)(details, place, raw)
    return f"{name} {told}" if name else told


def _general(details: ErrorDetails, place: _Place, raw: Mapping[Path, str]) -> str:
    wanted = _WANTED.get(details["type"])
    shown = _shown(place, raw)
    if wanted:
        quotes = raw.get(place.path)
        cure = f'; put it in quotes: "{quotes}"' if wanted == "text" and quotes else ""
        return f"must be {wanted}, not {shown}{cure}"
    message = details["msg"]
    if message.startswith("Input should "):
        return f"must {message.removeprefix('Input should ')}, not {shown}"
    return f"{message[0].lower()}{message[1:]} (it is {shown})"


def _from_validator(details: ErrorDetails, place: _Place, raw: Mapping[Path, str]) -> str:
    text = str(details.get("ctx", {}).get("error", details["msg"]))
    if isinstance(place.value, (dict, list, _Lacking)):
        return text
    return f"{text} (it is {_shown(place, raw)})"


def _from_literal(details: ErrorDetails, place: _Place, raw: Mapping[Path, str]) -> str:
    context = details.get("ctx", {})
    expected = _QUOTED.findall(str(context.get("expected", context.get("expected_tags", ""))))
    value = context.get("tag", place.value)
    close = get_close_matches(str(value).lower(), expected, n=1)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    shown = repr(value) if "tag" in context else _shown(place, raw)
    field = str(context.get("discriminator", "")).strip("'")
    what = f"{field} " if field else ""
    return f"{what}is {shown}, not one of {', '.join(expected)}{hint}"


def _no_tag(details: ErrorDetails, place: _Place, raw: Mapping[Path, str]) -> str:  # noqa: ARG001
    field = str(details.get("ctx", {}).get("discriminator", "")).strip("'")
    if not isinstance(place.value, dict):
        return f"must be made of `key: value` lines, {field} among them"
    tags: list[str] = []
    annotation = _inside(place.around, place.path[-1]) if place.path else None
    for member in _members(_strip(annotation)):
        info = member.model_fields.get(field) if hasattr(member, "model_fields") else None
        if info is not None and get_origin(info.annotation) is Literal:
            tags += [str(one) for one in get_args(info.annotation)]
    return f"lacks {field!r}; add one of {', '.join(tags)}"


def _shown(place: _Place, raw: Mapping[Path, str]) -> str:
    """The value as its author sees it, short."""
    value = place.value
    if isinstance(value, dict):
        return "`key: value` lines"
    if isinstance(value, list):
        return "a list"
    if isinstance(value, _Lacking):
        return "what a preset says"
    if value is None:
        return "empty"
    text = repr(value) if isinstance(value, str) else raw.get(place.path, str(value))
    return text if len(text) <= 60 else f"{text[:57]}…"


_BY_TYPE: dict[str, Callable[[ErrorDetails, _Place, Mapping[Path, str]], str]] = {
    "value_error": _from_validator,
    "literal_error": _from_literal,
    "union_tag_invalid": _from_literal,
    "union_tag_not_found": _no_tag,
}

_LINES, _LIST = "made of `key: value` lines", "a list"
_WHOLE, _NUMBER, _BOOL = "a whole number", "a number", "true or false"
_WANTED = {
    "string_type": "text",
    "int_type": _WHOLE, "int_parsing": _WHOLE, "int_from_float": _WHOLE,
    "float_type": _NUMBER, "float_parsing": _NUMBER, "finite_number": "a finite number",
    "bool_type": _BOOL, "bool_parsing": _BOOL,
    "dict_type": _LINES, "model_type": _LINES, "dataclass_type": _LINES,
    "model_attributes_type": _LINES, "mapping_type": _LINES,
    "list_type": _LIST, "tuple_type": _LIST,
}  # fmt: skip
