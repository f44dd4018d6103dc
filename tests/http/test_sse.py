"""Server-sent events: whole ones however the stream is cut, and what one event carries."""

from __future__ import annotations

from itertools import combinations, pairwise

from pdserve.http.sse import (
    DONE_EVENT,
    EventSplitter,
    event_data,
    render_event,
    split_data,
    split_events,
)

STREAM = b'data: {"a":"\\n\\n"}\n\nevent: x\ndata:{}\n\n: ping\n\n' + DONE_EVENT


def test_every_way_to_cut_a_stream_gives_the_same_whole_events() -> None:
    """Also what breaks off: the last bytes of ``STREAM`` are then the tail."""
    for stream in (STREAM, STREAM[:-1], STREAM + b"data: {"):
        for inner in combinations(range(1, len(stream)), 2):
            splitter = EventSplitter()
            parts = [splitter.feed(stream[start:end]) for start, end in pairwise((0, *inner, len(stream)))]
            assert all(part == b"" or part.endswith(b"\n\n") for part in parts), inner
            assert b"".join(parts) + splitter.tail == stream, inner
            assert b"".join(parts) == b"".join(event + b"\n\n" for event in split_events(stream)), inner
    splitter = EventSplitter()
    assert b"".join(splitter.feed(bytes([byte])) for byte in STREAM) == STREAM
    assert splitter.tail == b""


def test_an_event_is_read_by_its_data() -> None:
    first, named, comment, done = split_events(STREAM)
    assert event_data(first) == b'{"a":"\\n\\n"}'
    assert split_data(named) == (b"event: x\ndata:", b"{}")
    assert split_data(comment) == (comment, b"")
    assert event_data(done) == b"[DONE]"
    assert event_data(b"") == event_data(b"\ndata") == b""
    assert render_event(b"[DONE]") == DONE_EVENT
