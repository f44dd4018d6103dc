"""The one reader of every dialect: what an event, or a whole answer, says."""

from __future__ import annotations

import json

import pytest

from pdserve.balancer.api.errors import error_event
from pdserve.balancer.request.events import Failure, first_said, said_in
from pdserve.balancer.request.request import Route
from pdserve.http.sse import event_data
from tests.support.dialects import (
    CHAT,
    DIALECTS,
    GENERATE,
    MESSAGES,
    NUM_PROMPT,
    NUM_TOKENS,
    RESPONSES,
    deltas,
    failure,
    preamble,
    stream,
    whole,
)  # fmt: skip

ABORT = b'data: {"text":"","meta_info":{"finish_reason":{"type":"abort","message":"kv lost"%s}}}\n\n'


@pytest.mark.parametrize("path", DIALECTS)
def test_what_precedes_the_first_token_says_nothing_yet(path: str) -> None:
    before = b": ping\n\nretry: 3\n\n" + b"".join(preamble(path))
    assert first_said(Route(path), before) is None
    said = first_said(Route(path), before + deltas(path)[0])
    assert said is not None and said.is_content and said.failure is None
    assert said.prompt_tokens == (NUM_PROMPT if path == MESSAGES else None)
    assert first_said(Route(path), b"") is None


@pytest.mark.parametrize("end", [b"\n\n", b"\r\n\r\n", b"\r\r"])
@pytest.mark.parametrize("path", DIALECTS)
def test_a_failure_before_the_first_token_is_seen(path: str, end: bytes) -> None:
    events = b": ping\n\n" + b"".join([*preamble(path), *failure(path)])
    events = events.replace(b"\n", end[: len(end) // 2])
    said = first_said(Route(path), events)
    assert said is not None and said.failure == Failure(500, "KV transfer failed")


@pytest.mark.parametrize("path", DIALECTS)
@pytest.mark.parametrize("status", [400, 503])
def test_our_own_error_events_are_read_as_errors(path: str, status: int) -> None:
    said = said_in(event_data(error_event(path, status, "no", 3)))
    read = 500 if path == RESPONSES and status == 503 else status
    assert said.failure == Failure(read, "no")
    assert said.failure.is_servers == (status >= 500)


@pytest.mark.parametrize("path", DIALECTS)
def test_a_text_about_errors_is_no_error(path: str) -> None:
    said = first_said(Route(path), b"".join(deltas(path)))
    assert said is not None and (said.failure, said.finish) == (None, "")
    for event in stream(path, "stop"):
        assert said_in(event_data(event)).failure is None


def test_an_abort_with_a_status_is_a_failure_and_without_one_it_may_have_been_asked_for() -> None:
    def read(more: bytes) -> tuple[str, Failure | None]:
        said = first_said(Route.GENERATE, ABORT % more)
        assert said is not None
        return said.finish, said.failure

    assert read(b',"status_code":500') == ("abort", Failure(500, "kv lost"))
    assert read(b',"status_code":400') == ("abort", Failure(400, "kv lost"))
    assert read(b',"status_code":null') == read(b"") == ("abort", None)
    assert said_in(json.dumps(whole(RESPONSES, "abort")).encode()).finish == "abort"
    assert said_in(json.dumps(whole(RESPONSES, "abort")).encode()).failure is None


@pytest.mark.parametrize(
    ("payload", "expected"),
    [
        (b'{"error":"boom"}', Failure(500, "boom")),
        (b'{"error":{"message":"boom"}}', Failure(500, "boom")),
        (b'{"error":{"message":"boom","type":"BadRequestError","code":null}}', Failure(400, "boom")),
        (b'{"error":{"message":"boom","code":"429"}}', Failure(429, "boom")),
        (b'{"object":"error","message":"boom","type":"X","param":null,"code":503}', Failure(503, "boom")),
        (b'{"type":"error","error":{"type":"overloaded_error","message":"boom"}}', Failure(503, "boom")),
        (
            b'{"type":"error","code":"server_error","message":"boom","sequence_number":1}',
            Failure(500, "boom"),
        ),
        (b'{"error":null,"choices":[]}', None),
        (b'{"text": "cut off in "error', None),
        (b"[DONE]", None),
        (b"[]", None),
        (b"\xff", None),
    ],
)
def test_errors_of_any_shape_have_a_status(payload: bytes, expected: Failure | None) -> None:
    assert said_in(payload).failure == expected


@pytest.mark.parametrize("path", DIALECTS)
def test_a_whole_answer_says_its_counts(path: str) -> None:
    said = said_in(json.dumps(whole(path, "length")).encode())
    assert (said.finish, said.prompt_tokens, said.completion_tokens) == ("length", NUM_PROMPT, NUM_TOKENS)


def test_one_abort_among_several_answers_is_that_of_all() -> None:
    batch = [whole(GENERATE, "stop"), whole(GENERATE, "abort"), whole(GENERATE, "stop")]
    said = said_in(json.dumps(batch).encode())
    assert (said.finish, said.prompt_tokens, said.completion_tokens) == ("abort", 21, 120)
    chat = whole(CHAT, "stop")
    chat["choices"] = [{"finish_reason": "stop"}, {"finish_reason": "abort"}]
    assert said_in(json.dumps(chat).encode()).finish == "abort"
