"""A snapshot is read whole or not at all, and a key opens only what it names."""

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shipworthy.domain.contract import Contract, Tensor
from shipworthy.domain.plan import (
    Arm,
    Endpoint,
    Key,
    Plan,
    Snapshot,
    decode_snapshot,
    encode_snapshot,
)

ARM = Arm(
    release="digits@1",
    digest="sha256:a",
    version=1,
    endpoints=(Endpoint(url="http://127.0.0.1:1", credential="env:KEY"),),
    served_model="digits",
    contract=Contract(inputs=(Tensor("x", "FP32", (-1, 2), optional=True),), outputs=()),
)
SNAPSHOT = Snapshot(
    written=1.5,
    plans={
        "digits": Plan(
            name="digits", model="digits", revision=3, fence=2, stable=ARM, candidate=ARM,
            weight=500, rollout="rol_1", lease=9.0,
        )
    },
    keys={"k1": Key(id="k1", hash="abc", role="client", models=("digits",), expires=5.0)},
    max_stale=60.0,
)  # fmt: skip


def test_a_snapshot_survives() -> None:
    assert decode_snapshot(encode_snapshot(SNAPSHOT)) == SNAPSHOT


@given(st.data())
def test_a_torn_or_altered_snapshot_is_refused(data) -> None:
    whole = encode_snapshot(SNAPSHOT)
    place = data.draw(st.integers(0, len(whole) - 1))
    byte = data.draw(st.integers(0, 255).filter(lambda value: value != whole[place]))
    for broken in (whole[:place], whole[:place] + bytes([byte]) + whole[place + 1 :], whole + b" "):
        with pytest.raises(ValueError, match="checksum"):
            decode_snapshot(broken)


def test_another_format_is_refused() -> None:
    later = encode_snapshot(msgspec.structs.replace(SNAPSHOT, format=2))
    with pytest.raises(ValueError, match="format 2"):
        decode_snapshot(later)


@pytest.mark.parametrize(
    ("role", "models", "name", "may"),
    [
        ("client", ("*",), "digits", True),
        ("client", ("*",), "digits@staging", False),
        ("client", ("digits",), "digits", True),
        ("client", ("digits",), "fraud", False),
        ("client", ("digits@staging",), "digits@staging", True),
        ("client", ("digits",), "digits@staging", False),
        ("client", (), "digits", False),
        ("trusted", ("*",), "digits@staging", False),
        ("admin", (), "digits@staging", True),
    ],
)
def test_a_key_opens_what_it_names(role, models, name, may) -> None:
    assert Key(id="k", hash="h", role=role, models=models).may_call(name) is may
