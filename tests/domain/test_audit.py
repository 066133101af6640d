"""A chain of acts can't be changed, shortened or extended in the middle without being seen."""

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shipworthy.domain.audit import GENESIS, AuditEntry, AuditHead, seal, verify


def chain(acts):
    entries, previous = [], GENESIS
    for number, (act, detail) in enumerate(acts, 1):
        entry = seal(
            AuditEntry(
                sequence=number, at=float(number), actor="p1", act=act, subject="digits@1",
                detail={"value": detail}, previous=previous,
            )
        )  # fmt: skip
        entries.append(entry)
        previous = entry.hash
    return entries


ACTS = st.lists(st.tuples(st.text(max_size=5), st.integers()), min_size=2, max_size=8)
CHAINS = ACTS.map(chain)


def head_of(entries):
    return AuditHead(sequence=entries[-1].sequence, hash=entries[-1].hash)


@given(CHAINS)
def test_an_untouched_chain_holds(entries) -> None:
    assert verify(entries) == []
    for entry in entries:
        assert verify(entries, exported=AuditHead(sequence=entry.sequence, hash=entry.hash)) == []


CHANGES = {
    "sequence": 99, "at": 0.5, "actor": "p2", "act": "another", "subject": "x", "detail": {"a": 1},
    "previous": "sha256:x", "hash": "sha256:y",
}  # fmt: skip


@pytest.mark.parametrize("field", CHANGES)
@given(CHAINS, st.data())
def test_any_change_is_seen(field, entries, data) -> None:
    place = data.draw(st.integers(0, len(entries) - 1))
    altered = msgspec.structs.replace(entries[place], **{field: CHANGES[field]})
    touched = [*entries[:place], altered, *entries[place + 1 :]]
    assert verify(touched)
    if field != "hash":  # resealed by one who knows how: the next entry, or the head, gives it away
        resealed = [*entries[:place], seal(altered), *entries[place + 1 :]]
        assert verify(resealed, exported=head_of(entries))


@given(CHAINS, st.data())
def test_removal_insertion_and_exchange_are_seen(entries, data) -> None:
    place = data.draw(st.integers(0, len(entries) - 1))
    removed = [*entries[:place], *entries[place + 1 :]]
    assert verify(removed, exported=head_of(entries))
    doubled = [*entries[: place + 1], *entries[place:]]
    assert verify(doubled, exported=head_of(entries))
    if place:
        swapped = entries.copy()
        swapped[place - 1], swapped[place] = swapped[place], swapped[place - 1]
        assert verify(swapped)


@given(CHAINS, st.integers(1, 8))
def test_a_chain_cut_at_its_end_is_seen_against_an_exported_head(entries, kept) -> None:
    short = entries[: min(kept, len(entries) - 1)]
    assert verify(short) == []  # it is a chain in itself
    assert any(
        "before the exported head" in one for one in verify(short, exported=head_of(entries))
    )


def test_nothing_is_a_chain_unless_something_was_exported() -> None:
    assert verify([]) == []
    assert verify([], exported=AuditHead(sequence=0, hash=GENESIS)) == []
    assert verify([], exported=AuditHead(sequence=1, hash="sha256:x"))


@given(CHAINS)
def test_what_is_taken_off_the_end_is_missed_by_the_head(entries) -> None:
    assert verify(entries, head=head_of(entries)) == []
    assert verify(entries[:-1], head=head_of(entries))
    assert verify([], head=head_of(entries))
