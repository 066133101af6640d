"""Pure statistics: states that are given evidence and judge it; no clock, no randomness, no I/O.

States are frozen and serialise to msgpack and JSON; adding evidence gives a new state. Nothing here
imports numpy, so that a process that only decides starts fast.
"""

from shipworthy.domain.statistics.breaker import (
    BreakerReading,
    BreakerRule,
    BreakerWindow,
    UnitOutcome,
    fisher_tail,
)
from shipworthy.domain.statistics.guardrail import (
    MAX_WEIGHT,
    RATIOS,
    ArmCounts,
    CountedUnit,
    ErrorGuardrail,
    GuardrailReading,
    bernoulli_kl,
    count_unit,
    counted_share,
    detection_limit,
    judge_errors,
)
from shipworthy.domain.statistics.intervals import Interval, normal_interval, wilson_interval
from shipworthy.domain.statistics.noninferiority import GRID, ArmLosses, NonInferiority

__all__ = [
    "GRID",
    "MAX_WEIGHT",
    "RATIOS",
    "ArmCounts",
    "ArmLosses",
    "BreakerReading",
    "BreakerRule",
    "BreakerWindow",
    "CountedUnit",
    "ErrorGuardrail",
    "GuardrailReading",
    "Interval",
    "NonInferiority",
    "UnitOutcome",
    "bernoulli_kl",
    "count_unit",
    "counted_share",
    "detection_limit",
    "fisher_tail",
    "judge_errors",
    "normal_interval",
    "wilson_interval",
]
