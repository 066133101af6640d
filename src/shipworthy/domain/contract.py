"""What a release accepts and returns, tensor by tensor, as the Open Inference Protocol puts it.

Plain frozen dataclasses, so that pydantic reads them from `release.yaml` and msgspec carries them
in the gateway's snapshot without a second set of types.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

Datatype = Literal[
    "BOOL", "UINT8", "UINT16", "UINT32", "UINT64", "INT8", "INT16", "INT32", "INT64",
    "FP16", "FP32", "FP64", "BYTES",
]  # fmt: skip
SideEffects = Literal["none", "unknown"]

ANY = -1
"""A dimension of any size, as OIP writes it."""


@dataclass(frozen=True, slots=True)
class Tensor:
    """One named input or output.

    `shape` holds one entry per dimension, `ANY` (-1) where any size is accepted; the first is the
    batch. An `optional` input may be left out of a request; an `optional` output is only returned
    when it is asked for.
    """

    __pydantic_config__: ClassVar = {"extra": "forbid"}

    name: str
    datatype: Datatype
    shape: tuple[int, ...]
    optional: bool = False


@dataclass(frozen=True, slots=True)
class Contract:
    """The declared inputs and outputs of a release.

    `side_effects: none` says that asking twice changes nothing in the world: only then may the
    gateway retry or mirror a request.
    """

    __pydantic_config__: ClassVar = {"extra": "forbid"}

    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    protocol: Literal["oip-v2"] = "oip-v2"
    side_effects: SideEffects = "unknown"


def incompatibilities(new: Contract, serving: Contract) -> list[str]:
    """Why a client of `serving` would break on `new`; empty when it would not.

    The new contract must accept all that the serving one accepts and return all that it returned.
    """
    problems: list[str] = []
    if new.protocol != serving.protocol:
        problems.append(f"protocol changes from {serving.protocol} to {new.protocol}")
    accepted = {tensor.name: tensor for tensor in new.inputs}
    sent = {tensor.name: tensor for tensor in serving.inputs}
    returned = {tensor.name: tensor for tensor in new.outputs}
    for old in serving.inputs:
        now = accepted.get(old.name)
        if now is None:
            problems.append(f"input {old.name!r} is no longer accepted")
            continue
        problems += _narrowed("input", old, now)
        if old.optional and not now.optional:
            problems.append(f"input {old.name!r} was optional and is now required")
    problems += [
        f"input {tensor.name!r} is new and required"
        for tensor in new.inputs
        if tensor.name not in sent and not tensor.optional
    ]
    for old in serving.outputs:
        now = returned.get(old.name)
        if now is None:
            problems.append(f"output {old.name!r} is no longer returned")
            continue
        # An output narrows the other way round: the old must cover the new.
        problems += _narrowed("output", now, old, before=old, after=now)
        if now.optional and not old.optional:
            problems.append(f"output {old.name!r} was always returned and is now optional")
    return problems


def _narrowed(
    kind: str,
    narrow: Tensor,
    wide: Tensor,
    *,
    before: Tensor | None = None,
    after: Tensor | None = None,
) -> list[str]:
    """Where `wide` does not cover `narrow`; `before` and `after` are only for the wording."""
    old, new = before or narrow, after or wide
    problems: list[str] = []
    if narrow.datatype != wide.datatype:
        problems.append(f"{kind} {old.name!r} changes from {old.datatype} to {new.datatype}")
    if len(narrow.shape) != len(wide.shape) or any(
        theirs not in (ANY, ours) for ours, theirs in zip(narrow.shape, wide.shape, strict=False)
    ):
        problems.append(
            f"{kind} {old.name!r} changes shape from {list(old.shape)} to {list(new.shape)}"
        )
    return problems
