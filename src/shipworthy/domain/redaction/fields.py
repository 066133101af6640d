"""Replacing the values of fields by name, in the JSON of every protocol that we speak.

A path such as `messages.content` is walked through lists as if they weren't there; `*` is any name.
After `inputs` and `outputs` a name may also be a tensor's, or a column's of MLflow. Only what lies
on a path is parsed.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Final

import msgspec

from shipworthy.domain.framing import end_of_json

REDACTED: Final = "[redacted]"

_Tree = dict[str, "_Tree | None"]  # what is asked for below a name; None is all of it
_ANY = "*"
_DEEPEST = 16
_REPLACED = b'"[redacted]"'
_NOTHING = frozenset({b"null", _REPLACED})
_OPENING = frozenset({b"{", b"["})
_IN_STREAMS = {"message": "delta"}
_ROOTS = {
    "inputs": ("dataframe_records", "dataframe_split", "instances"),
    "outputs": ("predictions",),
}
_TENSORS = frozenset(_ROOTS)

_object = msgspec.json.Decoder(dict[str, msgspec.Raw])
_list = msgspec.json.Decoder(list[msgspec.Raw])
_encode = msgspec.json.encode
_decode = msgspec.json.decode


class Fields:
    """Dotted paths, made ready for many bodies."""

    def __init__(self, paths: Iterable[str]) -> None:
        self._tree: _Tree = {}
        for path in paths:
            first, *rest = path.split(".")
            for root in (first, *_ROOTS.get(first, ())):
                _plant(self._tree, [root, *rest])
            if "message" in rest:  # which is in pieces in a stream
                _plant(self._tree, [first, *(_IN_STREAMS.get(name, name) for name in rest)])

    def redact(self, body: bytes) -> tuple[bytes, int]:
        """The body with these fields replaced, and how many were.

        JSON that is broken may hold a field anywhere, so it goes as a whole; and so do the bytes
        behind JSON, the tensors of OIP's binary extension, where anything in it was replaced.
        """
        if body.lstrip()[:1] not in _OPENING or not _may_hold(body, self._tree):
            return body, 0
        walk = _Walk()
        try:
            end = end_of_json(body)
            found = bytes(walk.value(body[:end], self._tree))
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
            return REDACTED.encode(), 1
        return (found if walk.count else found + body[end:]), walk.count


def _plant(tree: _Tree, path: Sequence[str]) -> None:
    for name in path[:-1]:
        below = tree.setdefault(name, {})
        if below is None:  # all of it is asked for already
            return
        tree = below
    tree[path[-1]] = None


def _may_hold(content: bytes, tree: _Tree) -> bool:
    """Whether a name that the paths go on with stands in it; quick, and never wrongly no."""
    if _ANY in tree or b"\\u" in content or b"\\/" in content:
        return True
    return any(name.encode() in content for name in tree)


class _Walk:
    """One body's way along the paths; counts what it replaces."""

    def __init__(self) -> None:
        self.count = 0

    def value(
        self, content: bytes | msgspec.Raw, tree: _Tree, root: str = "", depth: int = 0
    ) -> bytes:
        """The value with what is asked for below it replaced."""
        content = bytes(content).strip()
        kind = content[:1]
        if (kind not in _OPENING and kind != b'"') or not _may_hold(content, tree):
            return content
        if depth > _DEEPEST:
            return self._replaced()
        if kind == b"{":
            return self._object(content, tree, root, depth)
        if kind == b"[":
            items = _list.decode(content)
            return _joined(b"[", (self.value(each, tree, root, depth + 1) for each in items), b"]")
        return self._string(content, tree, root, depth)

    def _object(self, content: bytes, tree: _Tree, root: str, depth: int) -> bytes:
        found = {name: bytes(value) for name, value in _object.decode(content).items()}
        if root in _TENSORS and {"name", "datatype"} <= found.keys():
            self._tensor(found, tree)
            tree = {name: below for name, below in tree.items() if name != _ANY}
        elif root == "dataframe_split" and {"columns", "data"} <= found.keys():
            self._columns(found, tree)
        for name, value in found.items():
            for key in (name, _ANY):
                if key in tree:
                    found[name] = self._below(value, tree[key], root or name, depth)
        members = (_encode(name) + b":" + value for name, value in found.items())
        return _joined(b"{", members, b"}")

    def _below(self, value: bytes, tree: _Tree | None, root: str, depth: int) -> bytes:
        if tree is None:
            return self._replaced() if value not in _NOTHING else value
        return self.value(value, tree, root, depth + 1)

    def _string(self, content: bytes, tree: _Tree, root: str, depth: int) -> bytes:
        """A string, which may hold JSON, as a tool call's arguments do."""
        text = msgspec.json.decode(content, type=str).encode()
        if text.lstrip()[:1] not in _OPENING:
            return content
        try:
            return _encode(self.value(text, tree, root, depth + 1).decode())
        except msgspec.MsgspecError:
            return self._replaced()

    def _tensor(self, tensor: dict[str, bytes], tree: _Tree) -> None:
        """Replace a tensor's data where its name is asked for, however it is sent."""
        name = _decode(tensor["name"])
        if tree.get(str(name), tree) is None or _ANY in tree:
            tensor["data"] = self._replaced()
            tensor.pop("parameters", None)  # they would say how many bytes follow

    def _columns(self, frame: dict[str, bytes], tree: _Tree) -> None:
        """Replace the columns of MLflow's split form that are asked for."""
        names: Any = _decode(frame["columns"])
        wanted = {
            at for at, name in enumerate(names) if tree.get(str(name), tree) is None or _ANY in tree
        }
        if not wanted or frame["data"][:1] != b"[":
            return
        rows: list[bytes] = []
        for row in map(bytes, _list.decode(frame["data"])):
            cells = _list.decode(row) if row.lstrip()[:1] == b"[" else [msgspec.Raw(row)]
            rows.append(
                _joined(
                    b"[",
                    (
                        self._replaced() if at in wanted else bytes(cell)
                        for at, cell in enumerate(cells)
                    ),
                    b"]",
                )
            )
        frame["data"] = _joined(b"[", rows, b"]")

    def _replaced(self) -> bytes:
        self.count += 1
        return _REPLACED


def _joined(opening: bytes, parts: Iterable[bytes], closing: bytes) -> bytes:
    return opening + b",".join(parts) + closing
