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
Protocol = Literal["oip-v2", "mlflow", "openai"]
"""What a release's servers speak. `oip-v2` and `mlflow` are translated into one another."""
Operation = Literal["chat", "completions", "embeddings"]
OPERATIONS: tuple[Operation, ...] = ("chat", "completions", "embeddings")

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

    With tensor protocols `inputs` and `outputs` are checked. With `openai` there are none: its
    `operations` say what may be asked; none named means all of them.
    """

    __pydantic_config__: ClassVar = {"extra": "forbid"}

    inputs: tuple[Tensor, ...] = ()
    outputs: tuple[Tensor, ...] = ()
    protocol: Protocol = "oip-v2"
    side_effects: SideEffects = "unknown"
    operations: tuple[Operation, ...] = ()

    @property
    def tensors(self) -> bool:
        """Whether requests and answers are named tensors."""
        return self.protocol != "openai"


def incompatibilities(new: Contract, serving: Contract) -> list[str]:
    """Why a client of `serving` would break on `new`; empty when it would not.

    The new contract must accept all that the serving one accepts and return all that it returned.
    """
    problems: list[str] = []
    if new.tensors != serving.tensors:
        problems.append(f"protocol changes from {serving.protocol} to {new.protocol}")
    problems += [
        f"operation {operation!r} is no longer accepted"
        for operation in serving.operations or (OPERATIONS if new.operations else ())
        if new.operations and operation not in new.operations
    ]
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
