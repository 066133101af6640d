"""Which arm answers a request: sticky by unit, and nobody changes sides as a rollout grows.

The bucket of a unit is `fnv1a32(str(fnv1a32(seed + unit))) mod 10,000`, the second version of
GrowthBook's published hashing scheme, so its test vectors hold here. No numpy in this module: every
gateway worker imports it.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Literal

import msgspec

from shipworthy.domain.plan import BUCKETS, Plan

ArmName = Literal["stable", "candidate"]

_OFFSET = 0x811C9DC5
_PRIME = 0x01000193
_MASK = 0xFFFFFFFF


class Choice(msgspec.Struct, frozen=True):
    """The assigned arm and how likely this assignment was; `rollout` is empty outside a split."""

    arm: ArmName
    probability: float
    rollout: str


_STABLE = Choice("stable", 1.0, "")


def fnv1a32(text: str) -> int:
    """The 32-bit FNV-1a hash of the text's UTF-8 bytes."""
    value = _OFFSET
    for byte in text.encode():
        value = ((value ^ byte) * _PRIME) & _MASK
    return value


@lru_cache(maxsize=8192)  # a session asks more than once
def bucket_of(seed: str, unit: str) -> int:
    """The unit's place in the split named by `seed`: 0 to 9,999."""
    return fnv1a32(str(fnv1a32(seed + unit))) % BUCKETS


def choose(plan: Plan, unit: str | None, *, now: float, uniform: float) -> Choice:
    """Assign a request to an arm.

    The candidate owns the buckets below its weight, so a unit that saw it at 5% keeps it at 25%.
    Without a unit the split is per request, by `uniform` in [0, 1). A candidate whose lease ran out
    gets nothing: with nobody watching, everyone is on stable.
    """
    if plan.candidate is None or not plan.weight or (plan.lease is not None and now >= plan.lease):
        return _STABLE
    bucket = uniform * BUCKETS if unit is None else bucket_of(plan.rollout, unit)
    share = plan.weight / BUCKETS
    if bucket < plan.weight:
        return Choice("candidate", share, plan.rollout)
    return Choice("stable", 1.0 - share, plan.rollout)
