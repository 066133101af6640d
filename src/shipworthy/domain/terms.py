"""Terms: who may decide now, and the number that fences off whoever decided before."""

from __future__ import annotations

import msgspec


class Term(msgspec.Struct, frozen=True, kw_only=True):
    """One keeper's time in office; the first has number 1.

    `until` is the Unix time at which its lease runs out unless it is renewed before; 0 once it was
    given up in order.
    """

    number: int = 0
    holder: str = ""
    until: float = 0.0


def held_by_another(term: Term, holder: str, now: float, lease: float) -> bool:
    """Whether somebody else's lease still runs.

    One that reaches further than a lease can (`lease` seconds) was written by a clock that ran
    ahead, and binds nobody. Taking over too early does no harm: the number fences the other off.
    """
    return term.holder != holder and now < term.until <= now + lease


def keeper_at(place: str, name: str) -> str:
    """The holder's name of a keeper at a place: a folder of a machine."""
    return f"{place}#{name}"


def held_elsewhere(term: Term, place: str, now: float, lease: float) -> str:
    """The other place whose keeper's lease still runs; empty when there is none."""
    other, known, _ = term.holder.rpartition("#")
    runs = held_by_another(term, "", now, lease)
    return other if known and runs and other != place else ""


def renewal_is_due(term: Term, now: float, lease: float) -> bool:
    """Whether less than two thirds of the lease are left, or more than a lease can have.

    Two thirds, so that a renewal may come late by two thirds of the lease as well.
    """
    return not now + lease * 2 / 3 <= term.until <= now + lease


def renewed(term: Term, now: float, lease: float) -> Term:
    """The same term, for a whole lease from now on."""
    return Term(number=term.number, holder=term.holder, until=now + lease)


def following(term: Term, holder: str, now: float, lease: float) -> Term:
    """The next term, for `holder`."""
    return Term(number=term.number + 1, holder=holder, until=now + lease)


def given_up(term: Term) -> Term:
    """The same term, bound by nobody any more."""
    return Term(number=term.number, holder=term.holder)
