"""Whether a mirrored release's answer says the same as the one that the client got.

- Tensors and predictions: the same names, shapes, kinds and values; numbers with a fraction agree
  within `RELATIVE` of the larger one or within `ABSOLUTE`, and NaN agrees with NaN.
- Chat and completions: the first choice's text, with each run of spaces and line breaks taken as
  one space, and its tool calls, whose arguments are compared as JSON where they are.
- Embeddings: each has a cosine similarity of at least `COSINE`.

What says nothing about the model's mind is passed over: names, ids, times and usage.
"""

from __future__ import annotations

import base64
import binascii
import math
import struct
from collections.abc import Callable, Iterable
from itertools import chain
from operator import mul
from typing import Any, Final, cast

import msgspec

from shipworthy.domain.contract import Protocol
from shipworthy.domain.framing import end_of_json

RELATIVE: Final = 1e-3
ABSOLUTE: Final = 1e-5
COSINE: Final = 0.999

Verdict = tuple[bool | None, str]

_UNKNOWN: Final[Verdict] = (None, "")
_CODES: Final = {
    "BOOL": "?", "UINT8": "B", "UINT16": "H", "UINT32": "I", "UINT64": "Q",
    "INT8": "b", "INT16": "h", "INT32": "i", "INT64": "q", "FP16": "e", "FP32": "f", "FP64": "d",
}  # fmt: skip


def agreement(protocol: Protocol, ours: bytes, theirs: bytes) -> Verdict:
    """Whether two answers say the same, and the first field in which they differ.

    None where that can't be told: one of them is an error, is broken or of another kind.
    """
    try:
        return _COMPARE[protocol](ours, theirs)
    except (
        msgspec.MsgspecError, binascii.Error, struct.error,
        ValueError, TypeError, KeyError, IndexError, AttributeError, OverflowError, RecursionError,
    ):  # fmt: skip
        # Upstreams send what they like: of a form that no answer has nothing can be said.
        return _UNKNOWN


# --- tensors and predictions ----------------------------------------------------------------------


def _tensors(ours: bytes, theirs: bytes) -> Verdict:
    mine, others = _outputs(ours), _outputs(theirs)
    for name, (shape, kind, data) in mine.items():
        field = f"outputs.{name}"
        if name not in others:
            return False, field
        their_shape, their_kind, their_data = others[name]
        if kind != their_kind:
            return False, f"{field}.datatype"
        if shape != their_shape:
            return False, f"{field}.shape"
        for at, (one, other) in enumerate(zip(data, their_data, strict=True)):
            if one != other and not _same_number(one, other):
                return False, f"{field}.data[{at}]"
    more = [name for name in others if name not in mine]
    return (False, f"outputs.{more[0]}") if more else (True, "")


def _outputs(body: bytes) -> dict[str, tuple[list[int], str, list[Any]]]:
    """Shape, kind (`FP` for all numbers with a fraction) and flat data by name."""
    end = end_of_json(body)
    message, binary = msgspec.json.decode(body[:end]), body[end:]
    found: dict[str, tuple[list[int], str, list[Any]]] = {}
    for tensor in message["outputs"]:
        datatype: str = tensor["datatype"]
        parameters: dict[str, Any] = tensor.get("parameters") or {}
        size: int | None = parameters.get("binary_data_size")
        if size is None:
            data = _flattened(tensor["data"])
        else:
            data, binary = _unpacked(datatype, binary[:size]), binary[size:]
        kind = "FP" if datatype.startswith("FP") else datatype
        found[tensor["name"]] = tensor["shape"], kind, data
    return found


def _unpacked(datatype: str, data: bytes) -> list[Any]:
    if datatype != "BYTES":
        code = _CODES[datatype]
        return list(struct.unpack(f"<{len(data) // struct.calcsize('<' + code)}{code}", data))
    texts: list[str] = []
    at = 0
    while at < len(data):
        (length,) = struct.unpack_from("<I", data, at)
        texts.append(data[at + 4 : at + 4 + length].decode("utf-8", "replace"))
        at += 4 + length
    return texts


def _flattened(data: list[Any]) -> list[Any]:
    while data and isinstance(data[0], list):
        data = list(chain.from_iterable(cast("list[list[Any]]", data)))
    return data


def _predictions(ours: bytes, theirs: bytes) -> Verdict:
    mine, others = msgspec.json.decode(ours), msgspec.json.decode(theirs)
    where = _difference(mine["predictions"], others["predictions"], "predictions")
    return where is None, where or ""


def _difference(one: Any, other: Any, field: str) -> str | None:
    if isinstance(one, dict) and isinstance(other, dict):
        mine, others = cast("dict[str, Any]", one), cast("dict[str, Any]", other)
        return _first(
            f"{field}.{name}"
            if name not in mine or name not in others
            else _difference(mine[name], others[name], f"{field}.{name}")
            for name in {**mine, **others}
        )
    if isinstance(one, list) and isinstance(other, list):
        items, others_items = cast("list[Any]", one), cast("list[Any]", other)
        if len(items) != len(others_items):
            return field
        pairs = enumerate(zip(items, others_items, strict=True))
        return _first(_difference(mine, their, f"{field}[{at}]") for at, (mine, their) in pairs)
    if isinstance(one, bool) is isinstance(other, bool) and one == other:
        return None
    return None if _same_number(one, other) else field


def _first(found: Iterable[str | None]) -> str | None:
    return next((each for each in found if each is not None), None)


def _same_number(one: Any, other: Any) -> bool:
    """Whether two numbers, one of them with a fraction, agree; equal whole ones were found so."""
    if not (isinstance(one, float) or isinstance(other, float)):
        return False
    if not (isinstance(one, (float, int)) and isinstance(other, (float, int))):
        return False
    if isinstance(one, bool) or isinstance(other, bool):
        return False
    if math.isnan(one) or math.isnan(other):
        return math.isnan(one) and math.isnan(other)
    return math.isclose(one, other, rel_tol=RELATIVE, abs_tol=ABSOLUTE)


# --- language models ------------------------------------------------------------------------------


def _language(ours: bytes, theirs: bytes) -> Verdict:
    mine, others = _answer(ours), _answer(theirs)
    if mine is None or others is None:
        return _UNKNOWN
    kind, said = mine
    their_kind, their_said = others
    if kind != their_kind:
        return _UNKNOWN
    if kind == "embeddings":
        return _embeddings(said, their_said)
    where = _first(
        name for name in {**said, **their_said} if said.get(name) != their_said.get(name)
    )
    return where is None, where or ""


def _answer(body: bytes) -> tuple[str, Any] | None:
    """What kind of answer it is, and what it says by field; None for an error."""
    if body.lstrip()[:1] == b"{":
        message = msgspec.json.decode(body)
        if message.get("error"):
            return None
        if "choices" not in message:
            return "embeddings", message["data"]
        choice = message["choices"][0]
        if "text" in choice:
            return "completion", {"choices[0].text": _folded(choice["text"])}
        return "chat", _said(choice["message"])
    return _streamed(body)


def _streamed(body: bytes) -> tuple[str, Any] | None:
    """What the events of a stream say of the first choice, put together."""
    text: list[str] = []
    pieces: list[dict[str, Any]] = []
    for event in _events(body):
        if event.get("error"):
            return None
        for choice in event.get("choices") or ():
            if choice.get("index", 0) == 0:
                if "text" in choice:
                    text.append(choice["text"] or "")
                elif choice.get("delta"):
                    pieces.append(choice["delta"])
    if text:
        return "completion", {"choices[0].text": _folded("".join(text))}
    return ("chat", _said(_joined(pieces))) if pieces else None


def _events(body: bytes) -> Iterable[Any]:
    for line in body.splitlines():
        data = line.removeprefix(b"data:").strip()
        if line.startswith(b"data:") and data != b"[DONE]":
            yield msgspec.json.decode(data)


def _joined(pieces: list[dict[str, Any]]) -> dict[str, Any]:
    """A message from its deltas."""
    message: dict[str, Any] = {}
    calls: dict[int, dict[str, Any]] = {}
    for piece in pieces:
        for name in _TEXTS:
            if piece.get(name):
                message[name] = message.get(name, "") + piece[name]
        for call in piece.get("tool_calls") or ():
            function = calls.setdefault(call["index"], {"name": "", "arguments": ""})
            for name in function:
                function[name] += call["function"].get(name) or ""
    message["tool_calls"] = [{"function": calls[at]} for at in sorted(calls)]
    return message


def _said(message: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name in _TEXTS:
        said = message.get(name)
        if said:
            found[f"{_MESSAGE}.{name}"] = _folded(said) if isinstance(said, str) else said
    for at, call in enumerate(message.get("tool_calls") or ()):
        field = f"{_MESSAGE}.tool_calls[{at}].function"
        found[f"{field}.name"] = call["function"]["name"]
        found[f"{field}.arguments"] = _meaning(call["function"]["arguments"])
    return found


def _folded(text: str) -> str:
    return " ".join(text.split())


def _meaning(arguments: str) -> Any:
    try:
        return msgspec.json.decode(arguments)
    except msgspec.DecodeError:
        return _folded(arguments)


def _embeddings(ours: list[Any], theirs: list[Any]) -> Verdict:
    if len(ours) != len(theirs):
        return False, "data"
    for at, (one, other) in enumerate(zip(ours, theirs, strict=True)):
        mine, others = _vector(one["embedding"]), _vector(other["embedding"])
        if len(mine) != len(others) or not _parallel(mine, others):
            return False, f"data[{at}].embedding"
    return True, ""


def _vector(embedding: Any) -> list[float]:
    """As numbers, or as base64 of 32-bit ones, which clients ask for to save bytes."""
    if isinstance(embedding, str):
        return _unpacked("FP32", base64.b64decode(embedding, validate=True))
    return embedding


def _parallel(one: list[float], other: list[float]) -> bool:
    lengths = math.hypot(*one) * math.hypot(*other)
    return one == other if lengths == 0 else sum(map(mul, one, other)) / lengths >= COSINE


_MESSAGE = "choices[0].message"
_TEXTS = ("content", "refusal")
_COMPARE: Final[dict[Protocol, Callable[[bytes, bytes], Verdict]]] = {
    "oip-v2": _tensors,
    "mlflow": _predictions,
    "openai": _language,
}
