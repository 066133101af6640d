"""The YAML files that people write, read strictly and explained kindly.

Only plain YAML 1.2 is read: mappings, lists, text, numbers, true, false and null. `no` and `on` are
text, a date is text, a repeated key is an error, and so is every key that the model does not know.
Each problem is one line, `release.yaml:12: 'artefacts' is not a key here; did you mean
'artifacts'?`, and all of them are told at once.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field, is_dataclass
from dataclasses import fields as fields_of
from enum import Enum
from typing import Any, ClassVar, Literal, TypeVar, cast, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from shipworthy.errors import InvalidDocument
from shipworthy.protocols.document_errors import Path, explain

MAX_BYTES = 512 * 1024
"""Longest document that is read; what is larger belongs in a file of its own."""
MAX_DEPTH = 50
MAX_VALUES = 50_000
"""Most values after aliases are followed, so that no short file unfolds into a huge one."""

ModelT = TypeVar("ModelT", bound=BaseModel)

_PLAIN = "tag:shipworthy,plain"
_CORE = "tag:yaml.org,2002:"
_KNOWN_TAGS = frozenset({_PLAIN, *(_CORE + kind for kind in ("str", "map", "seq"))})
_INT = re.compile(r"[-+]?[0-9]+")
_BASED = re.compile(r"0o[0-7]+|0x[0-9a-fA-F]+")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_BREAKS = re.compile("[\r\x85\u2028\u2029\ufeff]")
"""What YAML takes for the end of a line, or drops."""
_SPECIAL = re.compile(r"(?P<sign>[-+]?)\.(inf|Inf|INF)|\.(nan|NaN|NAN)")
_WORDS: dict[str, bool | None] = {
    "": None, "~": None, "null": None, "Null": None, "NULL": None,
    "true": True, "True": True, "TRUE": True, "false": False, "False": False, "FALSE": False,
}  # fmt: skip


def read_document(
    text: str | bytes,
    source_name: str,
    model: type[ModelT],
    prepare: Callable[[dict[str, Any]], dict[str, Any]] | None = None,
) -> ModelT:
    """Read a YAML document into a pydantic model.

    Args:
        text: The file's content; bytes are read as UTF-8.
        source_name: What to call the file in messages.
        model: What the document must be.
        prepare: Changes the plain content before it is checked, for instance lays it over a preset.
            A ValueError from it becomes a problem of the document.

    Raises:
        InvalidDocument: The text is not YAML, not of that model, or too large; holds every problem.

    """
    content, lines, problems = _parse(text, source_name)
    if content is None:
        raise InvalidDocument(_told(source_name, problems))
    read: ModelT | None = None
    try:
        read = model.model_validate(prepare(content) if prepare else content)
    except ValidationError as error:
        problems += [
            _Problem(lines.of(found.path, key=found.about_key), found.text)
            for found in explain(error, model, content, lines.raw)
        ]
    except ValueError as error:
        problems.append(_Problem(1, str(error)))
    if problems or read is None:
        raise InvalidDocument(_told(source_name, problems))
    return read


@dataclass(frozen=True, slots=True)
class _Problem:
    line: int
    text: str


def _told(source_name: str, problems: list[_Problem]) -> list[str]:
    ordered = sorted(problems, key=lambda problem: problem.line)
    return list(dict.fromkeys(f"{source_name}:{one.line}: {one.text}" for one in ordered))


@dataclass(slots=True)
class _Lines:
    """Where each key and value stands, and how a number or word was spelt."""

    keys: dict[Path, int] = field(default_factory=dict[Path, int])
    values: dict[Path, int] = field(default_factory=dict[Path, int])
    raw: dict[Path, str] = field(default_factory=dict[Path, str])

    def of(self, path: Path, *, key: bool) -> int:
        """The line of a path, or of the nearest thing around it that the document has."""
        if key and path in self.keys:
            return self.keys[path]
        while path and path not in self.values:
            path = path[:-1]
        return self.keys.get(path) or self.values.get(path, 1)


# --- from text to plain values --------------------------------------------------------------------


class _StopReading(Exception):
    """Nothing further can be read; never leaves this module."""

    def __init__(self, line: int, text: str) -> None:
        super().__init__(text)
        self.problem = _Problem(line, text)


class _Loader(yaml.SafeLoader):
    """Composes nodes only, bounded in depth; plain scalars stay as they are spelt."""

    # The wildcard resolver marks what was written without quotes; YAML 1.1's own would turn `no`
    # into false and `1:30` into 90.
    yaml_implicit_resolvers: ClassVar[dict[Any, Any]] = {  # pyright: ignore[reportIncompatibleVariableOverride]
        None: [(_PLAIN, re.compile(""))]
    }
    depth = 0

    def compose_node(self, parent: Node | None, index: int) -> Node | None:
        self.depth += 1
        if self.depth > MAX_DEPTH:
            line: int = self.line + 1
            raise _StopReading(line, f"is nested more than {MAX_DEPTH} levels deep; flatten it")
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


def _parse(
    text: str | bytes, source_name: str
) -> tuple[dict[str, Any] | None, _Lines, list[_Problem]]:
    """The document as plain values with their lines; None when it can't be read at all."""
    lines = _Lines()
    try:
        node = _compose(_decoded(text), source_name)
        reader = _Reader(lines)
        content = cast("dict[str, Any]", reader.value(node, ()))
    except _StopReading as stop:
        return None, lines, [stop.problem]
    return content, lines, reader.problems


def _decoded(text: str | bytes) -> str:
    size = len(text) if isinstance(text, bytes) else len(text.encode(errors="replace"))
    if size > MAX_BYTES:
        raise _StopReading(
            1,
            f"is {size / 1024:,.0f} KiB long, and at most {MAX_BYTES // 1024} KiB are read; keep"
            " large content in files of its own",
        )
    if isinstance(text, str):
        return text.removeprefix("\ufeff")
    try:
        return text.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = text.count(b"\n", 0, error.start) + 1
        raise _StopReading(line, "is not UTF-8 text; save the file as UTF-8") from None


def _compose(text: str, source_name: str) -> MappingNode:
    try:
        loader = _Loader(text)
        try:
            node = loader.get_single_node()
        finally:
            loader.dispose()  # pyright: ignore[reportUnknownMemberType]
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise _StopReading(
            line, f"holds the control character {error.character!r}; remove it"
        ) from None
    except yaml.MarkedYAMLError as error:
        raise _broken(error) from None
    except (ValueError, OverflowError, RecursionError):  # such as the escape "\U7fffffff"
        raise _StopReading(1, "is not valid YAML") from None
    if node is None:
        raise _StopReading(1, "is empty; write `key: value` lines")
    if not isinstance(node, MappingNode):
        kind = "a list" if isinstance(node, SequenceNode) else "a single value"
        line = node.start_mark.line + 1
        raise _StopReading(line, f"holds {kind}; {source_name} is made of `key: value` lines")
    return node


def _broken(error: yaml.MarkedYAMLError) -> _StopReading:
    mark = error.problem_mark or error.context_mark
    line = mark.line + 1 if mark else 1
    problem = error.problem or error.context or "it can't be parsed"
    if "'\\t'" in problem:
        return _StopReading(line, "is indented with a tab; indent with spaces")
    if "expected a single document" in (error.context or ""):
        return _StopReading(line, "a second document begins; keep one document in each file")
    if "undefined alias" in problem:
        return _StopReading(line, f"is not valid YAML: {problem}; put text with a '*' in quotes")
    context = f" {error.context}" if error.context else ""
    return _StopReading(
        line, f"is not valid YAML: {problem}{context}; check indentation, quotes and colons"
    )


class _Reader:
    """Turns nodes into plain values, and notes each line and each problem on the way."""

    def __init__(self, lines: _Lines) -> None:
        self.lines = lines
        self.problems: list[_Problem] = []
        self._seen = 0
        self._open: set[int] = set()

    def value(self, node: Node, path: Path) -> Any:
        line = node.start_mark.line + 1
        self._seen += 1
        if self._seen > MAX_VALUES or len(path) > MAX_DEPTH:
            raise _StopReading(line, "unfolds into too much; write it without so many aliases")
        self.lines.values.setdefault(path, line)
        if id(node) in self._open:
            raise _StopReading(line, "an alias holds itself; write the value out")
        if node.tag not in _KNOWN_TAGS:
            self._problem(line, f"the tag {_short(node.tag)} is not read here; remove it")
            return None
        if isinstance(node, ScalarNode):
            return self._scalar(node, path, line)
        self._open.add(id(node))
        try:
            if isinstance(node, SequenceNode):
                return [self.value(item, (*path, i)) for i, item in enumerate(node.value)]
            return self._mapping(cast("MappingNode", node), path)
        finally:
            self._open.discard(id(node))

    def _mapping(self, node: MappingNode, path: Path) -> dict[str, Any]:
        content: dict[str, Any] = {}
        for key_node, value_node in node.value:
            line = key_node.start_mark.line + 1
            if not isinstance(key_node, ScalarNode) or key_node.tag not in _KNOWN_TAGS:
                self._problem(line, "a key must be plain text")
                continue
            key = self._text(key_node.value, line)
            here = (*path, key)
            if key_node.tag == _PLAIN and key == "<<":
                self._problem(line, "merge keys ('<<') are not read here; write the keys out")
            elif key in content:
                first = self.lines.keys[here]
                self._problem(line, f"{key!r} is given twice, first in line {first}; keep one")
            else:
                self.lines.keys[here] = line
                content[key] = self.value(value_node, here)
        return content

    def _scalar(self, node: ScalarNode, path: Path, line: int) -> Any:
        text = self._text(node.value, line)
        if node.tag != _PLAIN:
            return text
        self.lines.raw[path] = text
        return plain_value(text)

    def _text(self, text: str, line: int) -> str:
        if "\0" in text or any("\ud800" <= one <= "\udfff" for one in text):
            self._problem(line, "holds a NUL or half a character; remove the escape")
            return ""
        return text

    def _problem(self, line: int, text: str) -> None:
        self.problems.append(_Problem(line, text))


def _short(tag: str) -> str:
    return tag.replace(_CORE, "!!")


def plain_value(text: str) -> str | int | float | bool | None:
    """What an unquoted scalar means, by YAML 1.2's core schema; anything unusual is text."""
    if text in _WORDS:
        return _WORDS[text]
    try:
        if _INT.fullmatch(text):
            return int(text)
        if _BASED.fullmatch(text):
            return int(text, 0)
    except ValueError:  # more digits than Python converts
        return text
    if _FLOAT.fullmatch(text):
        return float(text)
    if special := _SPECIAL.fullmatch(text):
        return float("nan") if special["sign"] is None else float(f"{special['sign']}inf")
    return text


# --- from a model to text -------------------------------------------------------------------------


def write_document(document: BaseModel | dict[str, Any]) -> str:
    """YAML in the field order, for generated files; what equals its default is left out.

    The result reads back as an equal model. A policy that is laid over a preset when it is read
    must be given as the dict that its author would write, because its defaults are the preset's.
    """
    content = _essential(document) if isinstance(document, BaseModel) else document
    return yaml.dump(
        content,
        Dumper=_Dumper,
        sort_keys=False,
        allow_unicode=True,
        default_flow_style=None,
        width=100,
    )


def _essential(value: Any) -> Any:
    """Plain values without defaults, but with the fields that tell members of a union apart."""
    if isinstance(value, BaseModel):
        fields = type(value).model_fields
        return {
            name: _essential(getattr(value, name))
            for name, info in fields.items()
            if _is_tag(info.annotation) or not _is_default(getattr(value, name), info)
        }
    if is_dataclass(value) and not isinstance(value, type):
        return {
            one.name: _essential(getattr(value, one.name))
            for one in fields_of(value)
            if getattr(value, one.name) != one.default
        }
    if isinstance(value, dict):
        return {key: _essential(item) for key, item in cast("dict[str, Any]", value).items()}
    if isinstance(value, (list, tuple)):
        return [_essential(item) for item in cast("list[Any]", value)]
    return value.value if isinstance(value, Enum) else value


def _is_tag(annotation: Any) -> bool:
    return get_origin(annotation) is Literal and len(get_args(annotation)) == 1


def _is_default(value: Any, info: FieldInfo) -> bool:
    if info.is_required():
        return False
    default = info.get_default(call_default_factory=True, validated_data={})
    return type(value) is type(default) and value == default


class _Dumper(yaml.SafeDumper):
    def ignore_aliases(self, data: Any) -> bool:  # noqa: ARG002  # a repeated value is written out
        return True

    def increase_indent(self, flow: bool = False, indentless: bool = False) -> None:  # noqa: ARG002, FBT001, FBT002  # pyyaml's signature; list items are indented
        super().increase_indent(flow, False)  # noqa: FBT003


def _text_node(dumper: yaml.SafeDumper, text: str) -> ScalarNode:
    style = None
    if not isinstance(plain_value(text), str) or _BREAKS.search(text):
        style = '"'
    elif "\n" in text:
        style = "|"
    return dumper.represent_scalar(_CORE + "str", text, style=style)  # pyright: ignore[reportUnknownMemberType]


_Dumper.add_representer(str, _text_node)
