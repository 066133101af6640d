"""Whoever saw a candidate keeps it while it grows, and shares are what the plan says."""

import json
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shipworthy.domain.contract import Contract
from shipworthy.domain.plan import BUCKETS, Arm, Plan
from shipworthy.domain.routing import bucket_of, choose, fnv1a32

VECTORS = Path(__file__).parents[3] / "shared" / "data" / "growthbook" / "hash-cases.json"

ARM = Arm(
    release="digits@1", digest="sha256:a", version=1, endpoints=(), served_model="digits",
    contract=Contract(inputs=(), outputs=()),
)  # fmt: skip


def plan(weight, seed="rol_1", lease=None):
    return Plan(
        name="digits", model="digits", revision=1, fence=1, stable=ARM,
        candidate=msgspec.structs.replace(ARM, release="digits@2", version=2), weight=weight,
        rollout=seed, lease=lease,
    )  # fmt: skip


def chosen(made, unit, uniform=0.5, now=0.0):
    return choose(made, unit, now=now, uniform=uniform).arm


UNITS = st.text(min_size=1, max_size=20)


@given(UNITS, st.integers(1, 9_500), st.floats(0, 1, exclude_max=True))
def test_a_unit_always_gets_the_same_arm(unit, weight, uniform) -> None:
    made = plan(weight)
    assert chosen(made, unit) == chosen(made, unit, uniform=uniform, now=1e9)


@given(UNITS, st.integers(1, 9_500), st.integers(1, 9_500))
def test_growing_a_candidate_takes_it_from_nobody(unit, one, other) -> None:
    small, large = sorted((one, other))
    if chosen(plan(small), unit) == "candidate":
        assert chosen(plan(large), unit) == "candidate"


@pytest.mark.parametrize("weight", [100, 500, 2_500, 5_000])
@pytest.mark.parametrize("seed", ["rol_1", "rol_2", "rol_3"])
def test_shares_of_units_are_the_weight(weight, seed) -> None:
    units = 20_000
    made = plan(weight, seed)
    share = sum(chosen(made, f"user-{i}") == "candidate" for i in range(units)) / units
    w = weight / BUCKETS
    assert abs(share - w) < 4.5 * (w * (1 - w) / units) ** 0.5


def test_rollouts_split_independently() -> None:
    first = {i for i in range(5_000) if bucket_of("rol_1", f"u{i}") < 5_000}
    both = sum(bucket_of("rol_2", f"u{i}") < 5_000 for i in first)
    assert 0.46 < both / len(first) < 0.54


@given(st.integers(1, 9_500), st.floats(0, 1, exclude_max=True))
def test_without_a_unit_the_split_is_by_request(weight, uniform) -> None:
    choice = choose(plan(weight), None, now=0.0, uniform=uniform)
    share = weight / BUCKETS
    assert (choice.arm == "candidate") == (uniform * BUCKETS < weight)
    assert choice.probability == pytest.approx(share if choice.arm == "candidate" else 1 - share)
    assert choice.rollout == "rol_1"


@given(UNITS | st.none(), st.floats(0, 100))
def test_a_lease_that_ran_out_sends_everyone_to_stable(unit, late) -> None:
    made = plan(9_500, lease=1_000.0)
    choice = choose(made, unit, now=1_000.0 + late, uniform=0.0)
    assert (choice.arm, choice.probability, choice.rollout) == ("stable", 1.0, "")
    assert choose(made, None, now=999.9, uniform=0.0).arm == "candidate"


@given(UNITS)
def test_no_candidate_and_no_weight_mean_stable(unit) -> None:
    assert chosen(plan(0), unit) == "stable"
    assert chosen(msgspec.structs.replace(plan(5_000), candidate=None), unit) == "stable"


@given(UNITS, UNITS)
def test_buckets_are_in_range(seed, unit) -> None:
    assert 0 <= bucket_of(seed, unit) < BUCKETS
    assert 0 <= fnv1a32(seed) < 2**32


@pytest.mark.skipif(not VECTORS.exists(), reason="the published vectors are not on this machine")
def test_the_published_vectors_hold() -> None:
    cases = json.loads(VECTORS.read_text())["hash"]
    checked = 0
    for seed, unit, version, expected in cases:
        if version == 2:
            assert bucket_of(seed, unit) / BUCKETS == pytest.approx(expected)
            checked += 1
    assert checked >= 7


def test_vectors_known_by_heart() -> None:
    assert bucket_of("seed", "a") == 505
    assert bucket_of("foo", "ab") == 2575
    assert fnv1a32("") == 0x811C9DC5
    assert fnv1a32("a") == 0xE40C292C
