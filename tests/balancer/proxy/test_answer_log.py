"""Comments cut off, words kept, frames counted, however the stream arrives."""

from __future__ import annotations

import json
from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from pdserve.balancer.proxy.answer_log import AnswerLog
from pdserve.http.sse import EventSplitter

_frame = st.sampled_from(
    [
        b"data: one\n\n",
        b": ids 5,6;12\ndata: two\n\n",
        b": ids 7;1 8;2\nevent: x\ndata: 3\n\n",
        b"data: [DONE]\n\n",
    ]
)


def _field(log: AnswerLog) -> dict[str, object]:
    return dict(json.loads(b"{" + log.resume_field()[1:] + b"}")["pdserve_resume"])


@given(st.lists(_frame, max_size=8), st.data())
def test_however_it_is_cut_the_client_gets_the_frames_and_the_log_its_words(
    frames: list[bytes], data: st.DataObject
) -> None:
    whole = b"".join(frames)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(whole)), max_size=5)))
    log, splitter = AnswerLog(), EventSplitter()
    pieces = [whole[a:b] for a, b in pairwise([0, *cuts, len(whole)])]
    sent = b"".join(log.take(splitter.feed(piece)) for piece in pieces)
    lines = [line for line in whole.split(b"\n") if not line.startswith(b": ids ")]
    words = [line[6:] for line in whole.split(b"\n") if line.startswith(b": ids ")]
    assert sent == b"\n".join(lines)
    assert _field(log) == {"log": b" ".join(words).decode(), "frames": len(frames)}
    assert log.is_resumable == bool(words)


def test_error_of_a_server_that_gives_up_does_not_reach_the_client() -> None:
    log = AnswerLog()
    assert log.take(b": ids 5;1\ndata: a\n\n: ids ~503\ndata: {error}\n\ndata: [DONE]\n\n") == b"data: a\n\n"
    assert (log.aborted, log.is_resumable) == (503, True)
    assert log.take(b"data: [DONE]\n\n") == b""
    assert _field(log) == {"log": "5;1", "frames": 1}
    log.begin_leg()
    assert log.take(b": ids 6;1\ndata: b\n\n") == b"data: b\n\n"
    assert _field(log) == {"log": "5;1 6;1", "frames": 2}


def test_answer_that_cannot_be_resumed_says_why() -> None:
    log = AnswerLog()
    assert log.take(b": ids =ab@17 !beam 5;1\ndata: a\n\n") == b"data: a\n\n"
    assert (log.obstacle, log.is_resumable) == ("beam", False)


def test_stream_without_comments_is_handed_on_and_cannot_be_resumed() -> None:
    log = AnswerLog()
    stream = b"data: a\n\n: keep-alive\n\ndata: [DONE]\n\n"
    assert log.take(stream) == stream
    assert not log.is_resumable
