"""An answer over two legs, cut at every byte: what its client has is the undisturbed stream."""

from __future__ import annotations

import json

import pytest

from pdserve.balancer.proxy.client_answer import ClientAnswer
from pdserve.balancer.request.parse import parse_request
from pdserve.balancer.request.request import Route
from tests.support.dialects import DIALECTS, request_to
from tests.support.resumable import error_frames, frames_of, rendered, rest_of


def resumable(path: str, *, may_resume: bool = True) -> tuple[ClientAnswer, list[float]]:
    body = json.dumps(request_to(path, stream=True)).encode()
    gaps: list[float] = []
    request = parse_request(Route(path), body, wants_prompt=False)
    answer = ClientAnswer(
        request, None, may_resume=lambda: may_resume, may_leave=lambda: False, went_on=gaps.append
    )
    answer.begin(request, b"", None, None)
    return answer, gaps


@pytest.mark.parametrize("path", DIALECTS)
@pytest.mark.parametrize("size", [1, 7, 10**6], ids=["bytes", "pieces", "whole"])
def test_a_leg_cut_at_every_byte(path: str, size: int) -> None:
    frames = [f for f in frames_of(path, ["r" * 32], 2) if len(f[1]) < 5000]
    whole, first = b"".join(f for _, f in frames), b"".join(map(rendered, frames))
    for cut in range(0, len(first) + 1, {1: 17, 7: 3}.get(size, 1)):
        answer, gaps = resumable(path)
        sent: list[bytes] = []
        pour = answer.open_leg(lambda data: sent.append(data) or True, lambda: None)  # noqa: B023
        for start in range(0, cut, size):
            pour(first[start : min(cut, start + size)])
        if b"".join(sent) == whole:
            continue
        assert whole.startswith(b"".join(sent)) and answer.log is not None
        field = json.loads(b"{" + answer.log.resume_field()[1:] + b"}")["pdserve_resume"]
        rest = rest_of(frames, field)
        assert rest is not None
        answer.heard_s = 1.0
        answer.go_on(1.5)
        pour = answer.open_leg(lambda data: sent.append(data) or True, lambda: None)  # noqa: B023
        pour(b"".join(map(rendered, rest)))
        assert b"".join(sent) == whole and gaps == [0.5]


@pytest.mark.parametrize("path", DIALECTS)
def test_an_error_is_held_back_while_another_may_go_on_and_sent_if_none_may(path: str) -> None:
    frames = frames_of(path, ["r" * 32], 2)[:3]
    raw = b"".join(map(rendered, [*frames, *error_frames(path, 500)]))
    for may_resume in (True, False):
        answer, _ = resumable(path, may_resume=may_resume)
        sent: list[bytes] = []
        woken: list[bool] = []
        pour = answer.open_leg(
            lambda data: sent.append(data) or True,  # noqa: B023
            lambda: woken.append(True),  # noqa: B023
        )
        pour(raw)
        errors = [] if may_resume else error_frames(path, 500)
        assert b"".join(sent) == b"".join(f for _, f in [*frames, *errors])
        assert (bool(woken), answer.is_given_up) == (may_resume, may_resume)


def test_what_has_changed_the_ends_of_lines_makes_an_answer_final() -> None:
    answer, _ = resumable("/generate")
    sent: list[bytes] = []
    pour = answer.open_leg(lambda data: sent.append(data) or True, lambda: None)
    pour(b": ids 5;3\r\ndata: one\r\n\r\n: ids 6;3\r\ndata: two\r\n\r\n")
    assert b"".join(sent) == b"data: one\r\n\r\ndata: two\r\n\r\n"
    assert answer.log is not None and not answer.log.is_resumable
