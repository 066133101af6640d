"""Compatibility is a partial order: a client that may move on never has to move back."""

from hypothesis import given
from hypothesis import strategies as st

from shipworthy.domain.contract import ANY, Contract, Tensor, incompatibilities

TENSORS = st.builds(
    Tensor,
    name=st.sampled_from(["a", "b"]),
    datatype=st.sampled_from(["FP32", "INT64"]),
    shape=st.sampled_from([(ANY, 2), (ANY, ANY), (ANY,), (1, 2)]),
    optional=st.booleans(),
)
SIDES = st.lists(TENSORS, max_size=2, unique_by=lambda tensor: tensor.name).map(
    lambda tensors: tuple(sorted(tensors, key=lambda tensor: tensor.name))
)
CONTRACTS = st.builds(Contract, inputs=SIDES, outputs=SIDES)
X = Tensor("x", "FP32", (ANY, 4))
Y = Tensor("y", "INT64", (ANY,))
BASE = Contract(inputs=(X,), outputs=(Y,))


def replaces(new, old):
    return not incompatibilities(new, old)


@given(CONTRACTS)
def test_a_contract_can_replace_itself(contract) -> None:
    assert replaces(contract, contract)


@given(CONTRACTS, CONTRACTS, CONTRACTS)
def test_two_steps_make_one(first, second, third) -> None:
    if replaces(second, first) and replaces(third, second):
        assert replaces(third, first)


@given(CONTRACTS, CONTRACTS)
def test_both_ways_means_equal(one, other) -> None:
    if replaces(one, other) and replaces(other, one):
        assert one == other


def told(new):
    return "; ".join(incompatibilities(new, BASE))


def test_what_breaks_clients_is_named() -> None:
    assert "'x' is no longer accepted" in told(Contract(inputs=(), outputs=(Y,)))
    assert "'y' is no longer returned" in told(Contract(inputs=(X,), outputs=()))
    more = (X, Tensor("z", "FP32", (ANY,)))
    assert "'z' is new and required" in told(Contract(inputs=more, outputs=(Y,)))
    narrow = (Tensor("x", "FP32", (1, 4)),)
    assert "changes shape from [-1, 4] to [1, 4]" in told(Contract(inputs=narrow, outputs=(Y,)))
    wide = (Tensor("y", "FP32", (ANY,)),)
    assert "changes from INT64 to FP32" in told(Contract(inputs=(X,), outputs=wide))


def test_what_does_not_break_clients() -> None:
    wider = Contract(
        inputs=(Tensor("x", "FP32", (ANY, ANY)), Tensor("z", "FP32", (ANY,), optional=True)),
        outputs=(Y, Tensor("score", "FP64", (ANY,))),
    )
    assert replaces(wider, BASE)
    assert not replaces(BASE, wider)


def test_an_optional_output_is_no_promise() -> None:
    promised = Contract(inputs=(X,), outputs=(Y,))
    maybe = Contract(inputs=(X,), outputs=(Tensor("y", "INT64", (ANY,), optional=True),))
    assert replaces(promised, maybe)
    assert not replaces(maybe, promised)
