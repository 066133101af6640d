"""Keys as text."""

import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shipworthy.domain.keys import hash_key, key_id, new_key
from shipworthy.errors import UsageError


@given(st.from_regex(r"[A-Za-z0-9-]{1,64}", fullmatch=True), st.binary(min_size=24, max_size=64))
def test_a_key_carries_its_id_and_only_its_hash_is_kept(name, randomness):
    text = new_key(name, randomness)
    assert text.startswith("sw_")
    assert key_id(text) == name
    assert hash_key(text) == hashlib.sha256(text.encode()).hexdigest()
    assert randomness.hex() not in hash_key(text)


@pytest.mark.parametrize("name", ["", "a_b", "a b", "é", "x" * 65])
def test_an_id_that_would_not_read_back_is_refused(name):
    with pytest.raises(UsageError, match="is not a key id"):
        new_key(name, bytes(32))


def test_too_little_randomness_is_refused():
    with pytest.raises(UsageError, match="24 random bytes"):
        new_key("a", bytes(8))


@pytest.mark.parametrize("text", ["", "sw", "sw_", "sw_a", "sw_a_", "sw__x", "xx_a_b", "sw_é_b"])
def test_what_is_no_key_has_no_id(text):
    assert key_id(text) is None
