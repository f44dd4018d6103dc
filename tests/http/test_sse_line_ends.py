"""Server-sent events with each of the three line ends, cut anywhere."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from pdserve.http.sse import EventSplitter, event_data, events_end, split_events

LINE_ENDS = [b"\n", b"\r\n", b"\r"]
LINES = st.sampled_from([b"data: {}", b"data:x", b": ping", b"event: a", b"id: 3", b"data", b""])
STREAMS = st.lists(st.tuples(LINES, st.sampled_from(LINE_ENDS)), max_size=12).map(
    lambda lines: b"".join(line + end for line, end in lines)
)


def pieces(stream: bytes, cuts: list[int]) -> list[bytes]:
    """``stream`` cut at some places."""
    places = sorted({0, len(stream), *(cut % (len(stream) + 1) for cut in cuts)})
    return [stream[start:end] for start, end in pairwise(places)]


def lines_of(stream: bytes) -> list[bytes]:
    """By the rules of the standard, byte by byte; the last one may lack its end."""
    lines, line, at = [], b"", 0
    while at < len(stream):
        if stream[at : at + 1] in (b"\r", b"\n"):
            at += 2 if stream.startswith(b"\r\n", at) else 1
            lines.append(line)
            line = b""
        else:
            line += stream[at : at + 1]
            at += 1
    return lines


def data_by_the_standard(stream: bytes) -> list[bytes]:
    """What a client is told: the data of each event that has any."""
    told, data = [], []
    for line in lines_of(stream):
        if not line and data:
            told.append(b"\n".join(data))
            data = []
        elif line.startswith(b"data:"):
            data.append(line[5:].removeprefix(b" "))
    return told


@given(STREAMS, st.lists(st.integers(0, 200), max_size=12))
def test_wherever_a_stream_is_cut_its_bytes_stay_and_whole_events_go_on(
    stream: bytes, cuts: list[int]
) -> None:
    splitter = EventSplitter()
    parts = [splitter.feed(piece) for piece in pieces(stream, cuts)]
    assert b"".join(parts) + splitter.tail == stream
    assert events_end(splitter.tail) == 0
    assert all(events_end(part) == len(part) for part in parts)


@given(STREAMS, st.lists(st.integers(0, 200), max_size=12))
def test_the_data_of_events_are_those_of_the_standard(stream: bytes, cuts: list[int]) -> None:
    splitter = EventSplitter()
    events = [event for piece in pieces(stream, cuts) for event in split_events(splitter.feed(piece))]
    told = [data for event in events if (data := event_data(event))]
    assert told == [data.strip() for data in data_by_the_standard(stream) if data.strip()]


def test_an_event_is_whole_as_soon_as_its_empty_line_has_begun() -> None:
    """The second byte of its end may be long in coming; it then stands before the next event."""
    splitter = EventSplitter()
    assert splitter.feed(b"data: 1\r\n\r") == b"data: 1\r\n\r"
    assert splitter.feed(b"\ndata: 2\r\n\r\n") == b"\ndata: 2\r\n\r\n"
    assert splitter.tail == b""
    assert [event_data(event) for event in split_events(b"\ndata: 2\r\n\r\n")] == [b"2"]


def test_a_line_end_of_two_bytes_is_no_empty_line() -> None:
    assert events_end(b"data: 1\r\n") == events_end(b"data: 1\r") == events_end(b"\r\n") == 0
    assert split_events(b"event: a\r\ndata: 1\r\n\r\n") == [b"event: a\r\ndata: 1"]
    assert event_data(b"event: a\rdata: 1\rid: 2") == b"1"
    assert event_data(b"data: {\r\ndata:  1}\r\n") == b"{\n 1}"
