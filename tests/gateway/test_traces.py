"""W3C trace context: what is accepted, what is passed on, and who decides about spans.

The vectors are those of the Recommendation and of its own test suite.
"""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shipworthy.gateway.traces import Sampler, TraceContext, context_of

TRACE = "12345678901234567890123456789012"
PARENT = "1234567890123456"
SENT = f"00-{TRACE}-{PARENT}-01".encode()


def context(parent: bytes = SENT, state: bytes | None = None) -> TraceContext | None:
    headers = {b"traceparent": parent}
    if state is not None:
        headers[b"tracestate"] = state
    return context_of(headers)


def state_of(state: bytes) -> bytes:
    found = context(state=state)
    assert found is not None, "a tracestate must not cost the traceparent"
    assert found.trace_id == TRACE
    return dict(found.outgoing()).get(b"tracestate", b"")


def sampler(ratio: float = 1.0, seed: int = 1) -> Sampler:
    drawn = random.Random(seed)
    return Sampler(ratio, uniform=drawn.random, bits=drawn.getrandbits)


# --- traceparent --------------------------------------------------------------------------------


def test_the_clients_context_is_read() -> None:
    found = context()
    assert found is not None
    assert (found.trace_id, found.parent_id, found.sampled) == (TRACE, PARENT, True)
    assert not found.recorded
    assert found.traceparent == SENT.decode()


@pytest.mark.parametrize(
    "parent",
    [
        f"ff-{TRACE}-{PARENT}-01",
        f"00-{TRACE}-{PARENT}-01.",
        f"00-{TRACE}-{PARENT}-01-",
        f"00-{TRACE}-{PARENT}-01-what-the-future-will-be-like",
        f"cc-{TRACE}-{PARENT}-01.what-the-future-will-be-like",
        f".0-{TRACE}-{PARENT}-01",
        f"0.-{TRACE}-{PARENT}-01",
        f"000-{TRACE}-{PARENT}-01",
        f"0-{TRACE}-{PARENT}-01",
        f"00-{'0' * 32}-{PARENT}-01",
        f"00-.{TRACE[1:]}-{PARENT}-01",
        f"00-{TRACE[:-1]}.-{PARENT}-01",
        f"00-{TRACE[:-2]}AB-{PARENT}-01",
        f"00-{TRACE}3-{PARENT}-01",
        f"00-{TRACE[:-1]}-{PARENT}-01",
        f"00-{TRACE}-{'0' * 16}-01",
        f"00-{TRACE}-.{PARENT[1:]}-01",
        f"00-{TRACE}-{PARENT}7-01",
        f"00-{TRACE}-{PARENT[:-1]}-01",
        f"00-{TRACE}-{PARENT}-.0",
        f"00-{TRACE}-{PARENT}-0.",
        f"00-{TRACE}-{PARENT}-001",
        f"00-{TRACE}-{PARENT}-1",
        f"00-{TRACE}-{PARENT}-",
        f"00-{TRACE}-{PARENT}",
        f"01-{TRACE}-{PARENT}-0",
        f"00-{TRACE}-{PARENT}-01, 00-{TRACE}-{PARENT}-01",
        f"01-{TRACE}-{PARENT}-01-{'x' * 500}",
        f"00-{TRACE}-{PARENT}-01\n",
        "",
    ],
)
def test_what_breaks_the_rules_is_no_context(parent: str) -> None:
    assert context(parent.encode(), b"foo=1") is None


@pytest.mark.parametrize("parent", [f"cc-{TRACE}-{PARENT}-01", f"cc-{TRACE}-{PARENT}-01-x.y z"])
def test_a_later_version_is_read_as_far_as_this_one_goes(parent: str) -> None:
    found = context(parent.encode())
    assert found is not None
    assert (found.trace_id, found.parent_id, found.sampled) == (TRACE, PARENT, True)


def test_a_later_version_passes_unchanged_and_becomes_this_one_where_we_take_part() -> None:
    later = f"cc-{TRACE}-{PARENT}-09-more".encode()
    found = context(later)
    assert found is not None
    assert found.outgoing() == [(b"traceparent", later)]
    [(_, header)] = sampler().context({b"traceparent": later}).outgoing()
    assert header.startswith(f"00-{TRACE}-".encode())
    assert header.endswith(b"-01")


@pytest.mark.parametrize(("flags", "sampled"), [("00", False), ("02", False), ("09", True)])
def test_only_the_lowest_bit_says_sampled(flags: str, sampled: bool) -> None:
    found = context(f"00-{TRACE}-{PARENT}-{flags}".encode())
    assert found is not None
    assert found.sampled is sampled


def test_white_space_around_is_no_part_of_it() -> None:
    found = context(b" \t" + SENT + b"\t ")
    assert found is not None
    assert found.outgoing() == [(b"traceparent", SENT)]


@given(st.binary(max_size=80) | st.from_regex(rb"[0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-..(-.*)?"))
def test_no_header_is_an_error(parent: bytes) -> None:
    found = context(parent, parent)
    if found is not None:
        assert found.outgoing() == [(b"traceparent", parent.strip(b" \t"))]


# --- tracestate ---------------------------------------------------------------------------------

_ALL_KEY = b"abcdefghijklmnopqrstuvwxyz0123456789_-*/"
_ALL_VALUE = bytes(c for c in range(0x20, 0x7F) if c not in b",=")


@pytest.mark.parametrize(
    "state",
    [
        b"foo=1",
        b"foo=1,bar=2",
        b"foo=1 \t , \t bar=2, \t baz=3",
        b"foo=1,",
        b",foo=1",
        b"foo=1,,bar=2",
        b"foo= leading blanks stay",
        _ALL_KEY + b"=" + _ALL_VALUE,
        _ALL_KEY + b"@a-z0-9_-*/=" + _ALL_VALUE,
        b"foo=1," + b"z" * 256 + b"=1",
        b"t" * 241 + b"@" + b"v" * 14 + b"=1",
        b"0tenant@system=1",
        b"foo=" + b"v" * 256,
        b",".join(b"bar%02d=%02d" % (i, i) for i in range(32)),
    ],
)
def test_a_valid_state_passes_unchanged(state: bytes) -> None:
    assert state_of(state) == state


@pytest.mark.parametrize(
    "state",
    [
        b"",
        b" ",
        b",,",
        b"foo",
        b"foo=",
        b"=1",
        b"foo =1",
        b"FOO=1",
        b"foo.bar=1",
        b"foo@=1,bar=2",
        b"@foo=1,bar=2",
        b"foo@@bar=1,bar=2",
        b"foo@bar@baz=1,bar=2",
        b"0foo=1",
        b"foo=1=2",
        b"foo=b\x00r",
        b"foo=b\xe9r",
        b"foo=1,foo=1",
        b"foo=1,foo=2",
        b"foo=1," + b"z" * 257 + b"=1",
        b"foo=1," + b"t" * 242 + b"@v=1",
        b"foo=1,t@" + b"v" * 15 + b"=1",
        b"foo=1,bar=" + b"v" * 257,
        b",".join(b"bar%02d=%02d" % (i, i) for i in range(33)),
        b"," * 10_000,
        b"a=" + b" " * 10_000,
    ],
)
def test_a_state_that_breaks_the_rules_is_left_out(state: bytes) -> None:
    assert state_of(state) == b""


def test_of_a_state_that_is_too_long_large_members_go_first_and_then_the_last() -> None:
    large = b"large=" + b"v" * 123
    small = [b"m%02d=%s" % (i, b"v" * 21) for i in range(20)]
    assert state_of(b",".join([large, *small])) == b",".join(small[:19])
    assert state_of(b",".join([small[0], large, *small[1:15]])) == b",".join(small[:15])


def test_of_two_large_members_the_first_stays_if_there_is_room() -> None:
    first, second = b"first=" + b"v" * 250, b"second=" + b"v" * 256
    assert state_of(b",".join([first, b"a=1", second])) == first + b",a=1"


def test_a_state_without_a_parent_is_not_looked_at() -> None:
    assert context_of({b"tracestate": b"foo=1"}) is None


@given(st.lists(st.from_regex(rb"[a-z@ ,=]{0,140}", fullmatch=True), max_size=40).map(b",".join))
def test_whatever_is_passed_on_is_within_the_limits_and_stays_valid(state: bytes) -> None:
    passed = state_of(state)
    assert len(passed) <= 512
    assert state_of(passed) == passed


# --- who decides ----------------------------------------------------------------------------------


def test_a_recorded_span_becomes_the_parent_upstream() -> None:
    found = sampler().context({b"traceparent": SENT, b"tracestate": b"foo=1"})
    assert found.recorded
    assert found.parent_id == PARENT
    headers = dict(found.outgoing())
    assert headers[b"traceparent"] == f"00-{TRACE}-{found.span_id:016x}-01".encode()
    assert headers[b"tracestate"] == b"foo=1"
    assert found.traceparent == headers[b"traceparent"].decode()


def test_each_attempt_is_a_parent_of_its_own() -> None:
    found = sampler().context({b"traceparent": SENT})
    seen = {dict(found.outgoing(attempt))[b"traceparent"] for attempt in range(4)}
    assert len(seen) == 4
    assert dict(found.outgoing(2))[b"traceparent"].split(b"-")[2] == b"%016x" % found.span_of(2)


def test_no_attempt_has_the_id_zero() -> None:
    highest = TraceContext(TRACE, PARENT, True, SENT, span_id=2**64 - 1)
    assert highest.span_of(1) == 1
    assert highest.span_of(0) == 2**64 - 1


def test_what_the_client_does_not_sample_passes_unchanged_whatever_the_ratio() -> None:
    quiet = SENT[:-1] + b"0"
    found = sampler(1.0).context({b"traceparent": quiet})
    assert not found.recorded
    assert found.outgoing(1) == [(b"traceparent", quiet)]


def test_what_the_client_samples_is_recorded_whatever_the_ratio() -> None:
    assert sampler(0.0).context({b"traceparent": SENT}).recorded


@pytest.mark.parametrize(("ratio", "recorded"), [(0.0, False), (1.0, True)])
def test_a_trace_that_begins_here_says_whether_it_is_recorded(ratio: float, recorded: bool) -> None:
    found = sampler(ratio).context({b"traceparent": b"nonsense", b"tracestate": b"foo=1"})
    assert found.recorded is recorded
    assert found.parent_id == ""
    headers = dict(found.outgoing())
    assert b"tracestate" not in headers, "a state belongs to the trace that it came with"
    again = context_of(headers)
    assert again is not None
    assert again.trace_id == found.trace_id
    assert again.sampled is recorded


def test_the_ratio_is_kept() -> None:
    quarter = sampler(0.25)
    recorded = sum(quarter.context({}).recorded for _ in range(4_000))
    assert 850 < recorded < 1_150


def test_even_unlucky_draws_make_valid_ids() -> None:
    unlucky = Sampler(1.0, uniform=lambda: 0.0, bits=lambda _: 0)
    found = unlucky.context({})
    assert context_of(dict(found.outgoing())) is not None
    assert unlucky.context({b"traceparent": SENT}).recorded
