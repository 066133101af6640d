"""Server-sent events: cut as they come, byte for byte."""

import json
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from shipworthy.protocols.events import (
    DONE,
    EventSplitter,
    EventTooLarge,
    data_of,
    error_event,
    event,
    parsed,
)

ENDS = ("\n", "\r\n", "\r")
STREAM = st.lists(
    st.sampled_from([b"\n", b"\r", b"\r\n", b"data: x", b": note", b"event: e", b"id", b" ", b":"]),
    max_size=40,
).map(b"".join)


def fed(stream, cuts=(), max_event=1 << 20):
    """The events and what is left over, with the stream fed in pieces."""
    splitter, events, start = EventSplitter(max_event), [], 0
    for cut in [*sorted(cut for cut in cuts if cut < len(stream)), len(stream)]:
        events += splitter.feed(stream[start:cut])
        start = cut
    return events, splitter.rest


def standards_reading(stream):
    """Name and data of each event, by the letter of the HTML standard, one line after the other."""
    events, name, data = [], b"", []
    lines = stream.replace(b"\r\n", b"\n").replace(b"\r", b"\n").split(b"\n")
    for line in lines[:-1]:
        field, _, value = line.partition(b":")
        value = value.removeprefix(b" ")
        if not line:
            if data:
                events.append((name, b"\n".join(data)))
            name, data = b"", []
        elif field == b"data":
            data.append(value)
        elif field == b"event":
            name = value
    return events


# --- cutting ----------------------------------------------------------------------------------


@pytest.mark.parametrize("end", ENDS)
def test_an_event_ends_with_a_blank_line_however_lines_end(end):
    text = "data: a{0}{0}: a note{0}{0}event: e{0}data: b{0}{0}data: begun".replace("{0}", end)
    events, rest = fed(text.encode())
    assert events == [
        f"data: a{end}{end}".encode(),
        f": a note{end}{end}".encode(),
        f"event: e{end}data: b{end}{end}".encode(),
    ]
    assert rest == b"data: begun"


@pytest.mark.parametrize("end", ENDS)
def test_an_event_is_given_out_as_soon_as_its_last_byte_is_there(end):
    whole = f"data: a{end}data: b{end}{end}".encode()
    splitter = EventSplitter(100)
    given_out = [splitter.feed(whole[place : place + 1]) for place in range(len(whole))]
    assert given_out == [*[[]] * (len(whole) - 1), [whole]]


def test_a_cr_that_may_be_half_a_line_end_waits_for_its_lf():
    splitter = EventSplitter(100)
    assert splitter.feed(b"data: a\r\n\r") == []
    assert splitter.feed(b"\ndata: b\n\r") == [b"data: a\r\n\r\n"]
    assert splitter.feed(b"data") == [b"data: b\n\r"]
    assert splitter.rest == b"data"


def test_an_lf_behind_two_crs_means_nothing_to_the_next_event():
    splitter = EventSplitter(100)
    assert splitter.feed(b"data: a\r\r") == [b"data: a\r\r"]
    (second,) = splitter.feed(b"\ndata: b\r\r")
    assert data_of(second) == b"b"


@given(STREAM, st.lists(st.integers(0, 200)))
@example(b"a\r\n\r\nb", [4])
@example(b"a\n\r\r\nb", [2, 3])
@example(b"a\r\r\n\n", [2, 3])
def test_it_makes_no_difference_how_a_stream_arrives(stream, cuts):
    events, rest = fed(stream, cuts)
    assert (events, rest) == fed(stream)
    assert b"".join(events) + rest == stream


@given(STREAM)
def test_the_events_say_what_the_whole_stream_says(stream):
    events, rest = fed(stream)
    ours = [(name, data) for name, data in map(parsed, events) if data is not None]
    theirs = standards_reading(stream)
    if rest.endswith(b"\n\r"):  # over, unless an LF is still to come
        theirs = standards_reading(stream[: len(stream) - len(rest)])
    assert ours == theirs


@given(st.binary(max_size=60), st.lists(st.integers(0, 60)), st.integers(1, 30))
def test_of_any_bytes_all_come_out_again_or_are_too_large(stream, cuts, limit):
    try:
        events, rest = fed(stream, cuts, limit)
    except EventTooLarge:
        assert len(stream) > limit
    else:
        assert b"".join(events) + rest == stream
        assert max(map(len, [*events, rest])) <= limit


@pytest.mark.parametrize(
    "stream", [b"data: 1234567\n\n", b"data: 12345", b"a\n\ndata: 1234567\r\n\r\n"]
)
@pytest.mark.parametrize("cuts", [(), range(99)])
def test_an_event_larger_than_allowed_is_an_error(stream, cuts):
    with pytest.raises(EventTooLarge, match="longer than 10 bytes"):
        fed(stream, cuts, 10)


def test_what_was_over_before_an_event_that_is_too_large_is_told():
    with pytest.raises(EventTooLarge) as raised:
        fed(b"data: a\n\ndata: b\n\ndata: 1234567\n\ndata: c\n\n", max_event=10)
    assert raised.value.before == [b"data: a\n\n", b"data: b\n\n"]


def test_many_small_events_may_together_be_larger_than_one():
    events, rest = fed(b"data: a\n\n" * 9 + b"dat", max_event=10)
    assert (len(events), rest) == (9, b"dat")


class Counting(bytearray):
    """Counts the bytes that are looked at."""

    looked_at = 0

    def find(self, *wanted: Any):
        found = super().find(*wanted)
        self.looked_at += (found if found >= 0 else len(self)) - wanted[1]
        return found


@pytest.mark.parametrize("piece", [b"x" * 100, b"data: x\r", b"data: x\n", b"data: x\r\n"])
def test_a_long_event_in_many_pieces_is_not_looked_through_again_and_again(piece):
    splitter = EventSplitter(1 << 20)
    splitter._buffer = buffer = Counting(b"\r")
    for _ in range(1_000):
        assert splitter.feed(piece) == []
    assert len(splitter.feed(b"\n\n")) == 1
    assert buffer.looked_at < 4 * 1_000 * len(piece)


@pytest.mark.parametrize("events", [b"\r\r" * 5_000, b"\n\n" * 5_000, b"\n\n\r\r" * 2_500])
def test_many_events_at_once_are_not_looked_through_again_and_again(events):
    splitter = EventSplitter(1 << 20)
    splitter._buffer = buffer = Counting(b"x")
    assert len(splitter.feed(events)) == 5_000
    assert buffer.looked_at < 4 * len(events)


# --- reading ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("raw", "name", "data"),
    [
        (b"data: a\n\n", b"", b"a"),
        (b"data:a\n\n", b"", b"a"),
        (b"data:  a \r\n\r\n", b"", b" a "),
        (b"data: a\ndata\ndata: b\n\n", b"", b"a\n\nb"),
        (b"data: a\rdata: b\r\r", b"", b"a\nb"),
        (b": note\n\n", b"", None),
        (b"\n\n", b"", None),
        (b"id: 1\nretry: 5\n\n", b"", None),
        (b"event: error\ndata: {}\n\n", b"error", b"{}"),
        (b"data: {}\nevent:error\n\n", b"error", b"{}"),
        (b"\ndata: a\n\n", b"", b"a"),
        (b"data: a\x0bb\xe2\x80\xa8c\n\n", b"", b"a\x0bb\xe2\x80\xa8c"),
        (b"database: a\n\n", b"", None),
        (b"data: a", b"", b"a"),
        (b"data: a\n", b"", b"a"),
        (b"", b"", None),
        (DONE, b"", b"[DONE]"),
    ],
)
def test_the_fields_of_an_event(raw, name, data):
    assert parsed(raw) == (name, data)
    assert data_of(raw) == data


# --- writing ----------------------------------------------------------------------------------


@given(st.binary(max_size=30), st.sampled_from([None, b"error"]))
def test_what_is_written_reads_back(data, name):
    written = event(data, name)
    assert parsed(written) == (name or b"", data.replace(b"\r\n", b"\n").replace(b"\r", b"\n"))
    assert fed(written) == ([written], b"")


def test_an_error_event_is_what_openais_clients_look_for():
    (one,), rest = fed(error_event("the model's answer broke off", "server_error", "broken"))
    assert rest == b""
    assert json.loads(data_of(one) or b"") == {
        "error": {
            "message": "the model's answer broke off",
            "type": "server_error",
            "param": None,
            "code": "broken",
        }
    }
