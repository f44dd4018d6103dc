"""Comments beside frames, and frames that are not sent again, however the stream is cut."""

from __future__ import annotations

import itertools
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from pdserve.plugin.resume.sse import FrameDropper, IdComments, Stream, current_stream

FRAMES = [b"data: one\n\n", b"event: x\ndata: two\n\n", b"data: 3\n\n", b"data: [DONE]\n\n"]
WHOLE = b"".join(FRAMES)
EVENTS = [(b"content-type", b"text/event-stream; charset=utf-8")]


def test_dropper_leaves_what_is_behind_at_every_split() -> None:
    for number in range(len(FRAMES) + 1):
        rest = b"".join(FRAMES[number:])
        for first in range(len(WHOLE) + 1):
            for second in range(first, len(WHOLE) + 1):
                dropper = FrameDropper(number)
                pieces = (WHOLE[:first], WHOLE[first:second], WHOLE[second:])
                assert b"".join(map(dropper.feed, pieces)) == rest, (number, first, second)


def test_dropper_byte_by_byte() -> None:
    dropper = FrameDropper(2)
    assert b"".join(dropper.feed(WHOLE[i : i + 1]) for i in range(len(WHOLE))) == FRAMES[2] + FRAMES[3]


def _resumed(frames: int, created: int | None = None) -> Stream:
    stream = Stream(is_resumed=True)
    stream.has_begun = True
    stream.resume(frames, ("old1",), created)
    return stream


def test_comment_is_a_line_of_the_frame_behind_it() -> None:
    stream = Stream()
    stream.words += ["5,6;12", "7;3"]
    assert stream.pass_on(FRAMES[1]) == b": ids 5,6;12 7;3\n" + FRAMES[1]
    assert stream.pass_on(FRAMES[2]) == FRAMES[2]


def test_words_wait_for_a_frame_of_their_own() -> None:
    stream = Stream()
    stream.pass_on(b"data: o")
    stream.words.append("5;1")
    assert stream.pass_on(b"ne\n\n") == b"ne\n\n"
    assert stream.pass_on(FRAMES[2]) == b": ids 5;1\n" + FRAMES[2]


def test_first_comment_names_the_answer() -> None:
    stream = Stream()
    stream.name(("ab12",))
    assert stream.pass_on(b'data: {"created":17}\n\n').startswith(b": ids =ab12@17\n")
    assert stream.pass_on(FRAMES[0]) == FRAMES[0]


def test_resumed_stream_is_called_what_its_client_calls_it() -> None:
    stream = Stream(is_resumed=True)
    stream.has_begun = True
    stream.name(("new1",))
    stream.resume(1, ("old1",), 17)
    assert stream.pass_on(FRAMES[0]) == b""
    stream.words.append("5;1")
    frame = b'data: {"id":"new1","created":99,"text":"\\"created\\":98"}\n\n'
    assert (
        stream.pass_on(frame) == b': ids 5;1\ndata: {"id":"old1","created":17,"text":"\\"created\\":98"}\n\n'
    )
    assert stream.pass_on(b'data: {"created_at":99}\n\n') == b'data: {"created_at":17}\n\n'


def test_an_error_is_heard_in_place_of_a_dropped_frame() -> None:
    stream = _resumed(3)
    assert stream.pass_on(FRAMES[0]) == b""
    stream.hear()
    stream.words.append("~500")
    assert stream.pass_on(b'data: {"error":1}\n\n') == b': ids ~500\ndata: {"error":1}\n\n'


@given(st.lists(st.integers(1, len(WHOLE) - 1), max_size=6), st.integers(0, 4))
def test_stream_drops_whole_frames_only(cuts: list[int], number: int) -> None:
    stream = _resumed(number)
    edges = [0, *sorted(cuts), len(WHOLE)]
    pieces = (WHOLE[a:b] for a, b in itertools.pairwise(edges))
    assert b"".join(stream.pass_on(piece) for piece in pieces if piece) == b"".join(FRAMES[number:])


async def _serve(headers: list[tuple[bytes, bytes]], kind: list[tuple[bytes, bytes]]) -> list[Any]:
    sent: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if (stream := current_stream()) is not None:
            stream.words.append("5;1")
        await send({"type": "http.response.start", "status": 200, "headers": kind})
        await send({"type": "http.response.body", "body": FRAMES[0], "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def send(message: Any) -> None:
        sent.append(message)

    await IdComments(app, "inst1")({"type": "http", "headers": headers}, None, send)
    return [message.get("body") for message in sent[1:]]


def test_frames_before_the_answer_is_asked_for_wait_on_a_resumed_leg() -> None:
    """/v1/responses: ``response.created`` comes before anything is known of the former leg."""
    stream = Stream(is_resumed=True)
    assert stream.pass_on(FRAMES[0]) == stream.pass_on(FRAMES[1]) == b""
    stream.has_begun = True
    stream.resume(1, ("old1",), None)
    assert stream.pass_on(FRAMES[2]) == FRAMES[1] + FRAMES[2]
    assert stream.end() == b""


def test_frames_that_waited_for_an_answer_that_never_began_go_out_at_the_end() -> None:
    stream = Stream(is_resumed=True)
    assert stream.pass_on(FRAMES[0]) == b""
    assert stream.end() == FRAMES[0]


async def test_without_the_header_nothing_is_added() -> None:
    assert await _serve([(b"accept", b"*/*")], EVENTS) == [FRAMES[0], b""]


async def test_header_of_another_instance_is_none() -> None:
    for value in (b"1", b"1 resume", b" resume", b"inst1x"):
        assert await _serve([(b"x-pdserve-ids", value)], EVENTS) == [FRAMES[0], b""]


async def test_with_the_header_streams_have_comments() -> None:
    bodies = await _serve([(b"x-pdserve-ids", b"inst1")], EVENTS)
    assert bodies == [b": ids 5;1\n" + FRAMES[0], b""]


async def test_an_answer_that_is_no_stream_has_none() -> None:
    bodies = await _serve([(b"x-pdserve-ids", b"inst1")], [(b"content-type", b"application/json")])
    assert bodies == [FRAMES[0], b""]
    assert current_stream() is None
