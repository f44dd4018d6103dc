"""Merging prefill's and decode's answers, held against what a plain server answered to the same requests.

``merge_recordings.json`` was recorded from real servers of the tiny model: one
plain, one prefill, one decode, with and without ``--incremental-streaming-output``.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from pdserve.balancer.request.merge import merge_whole, needs_prefill_answer, stream_merger
from pdserve.balancer.request.parse import parse_request
from pdserve.balancer.request.request import ParsedRequest, Route
from pdserve.http.sse import EVENT_END, split_events
from tests.engine.conformance import EVENT_STREAM, differences, read_reply

RECORDINGS: list[dict[str, Any]] = json.loads((Path(__file__).parent / "merge_recordings.json").read_text())
WHOLE = [recording for recording in RECORDINGS if not recording["plain"].startswith("data: ")]
STREAMS = [recording for recording in RECORDINGS if recording["plain"].startswith("data: ")]


def _request(recording: dict[str, Any]) -> ParsedRequest:
    return parse_request(Route(recording["path"]), json.dumps(recording["request"]).encode())


def _merger(recording: dict[str, Any]) -> Callable[[bytes], bytes]:
    merge = stream_merger(_request(recording), recording["prefill"].encode())
    assert merge is not None
    return merge


def _misses(recording: dict[str, Any], ours: bytes, content_type: str) -> list[str]:
    plain = recording["plain"]
    found = differences(read_reply(200, content_type, plain), read_reply(200, content_type, ours.decode()))
    # Samples of a plain server find their prompt in the cache: it computes the prompt once before them.
    return [f"{recording['name']}: {line}" for line in found if "cached_tokens" not in line]


def test_whole_answers_are_the_plain_servers() -> None:
    misses = []
    for recording in WHOLE:
        decode = recording["decode"].encode()
        merged = merge_whole(_request(recording), decode, recording["prefill"].encode())
        if merged == decode:
            misses.append(f"{recording['name']}: not merged at all")
        misses += _misses(recording, merged, "application/json")
    assert not misses


def test_streams_are_the_plain_servers_at_once_and_event_by_event() -> None:
    misses = []
    for recording in STREAMS:
        stream = recording["decode"].encode()
        merged = _merger(recording)(stream)
        misses += _misses(recording, merged, EVENT_STREAM)
        merge = _merger(recording)
        if b"".join(merge(event + EVENT_END) for event in split_events(stream)) != merged:
            misses.append(f"{recording['name']}: event by event it is merged in another way")
    assert not misses


def test_text_that_looks_like_an_event_is_text() -> None:
    recording = next(r for r in STREAMS if r["name"] == "generate: streamed")
    merge, text = _merger(recording), r"data: {\"a\":1} \n\ndata: {"
    plain = recording["decode"].encode().partition(b"\n\n")[0]
    event = plain.replace(b'{"text":"', b'{"text":"' + text.encode(), 1)
    merged = merge(b"event: named\n" + event + b"\n\n")
    assert merged.startswith(b'event: named\ndata: {"text":"' + text.encode())
    assert b'"input_token_logprobs":[[' in merged


def test_numbers_keep_every_digit() -> None:
    recording = next(r for r in WHOLE if r["name"] == "generate: prompt from 0, top 2")
    prefill = recording["prefill"].replace("null,65", "-0.10000000149011612345,65")
    merged = merge_whole(_request(recording), recording["decode"].encode(), prefill.encode())
    assert b"[-0.10000000149011612345,65,null]" in merged


NEEDS_PREFILL: list[tuple[Route, dict[str, Any], bool]] = [
    (Route.GENERATE, {}, False),
    (Route.GENERATE, {"return_logprob": False, "logprob_start_len": 0}, False),
    (Route.GENERATE, {"return_logprob": True}, False),
    (Route.GENERATE, {"return_logprob": True, "logprob_start_len": -1, "top_logprobs_num": 5}, False),
    (Route.GENERATE, {"return_logprob": True, "logprob_start_len": 0}, True),
    (Route.GENERATE, {"return_logprob": [False, True], "logprob_start_len": [-1, 3]}, True),
    (Route.GENERATE, {"return_logprob": [False, False], "logprob_start_len": [0, 3]}, False),
    (Route.GENERATE, {"return_logprob": True, "token_ids_logprob": [1]}, True),
    (Route.GENERATE, {"return_logprob": True, "token_ids_logprob": []}, False),
    (Route.GENERATE, {"return_logprob": True, "sampling_params": {"max_new_tokens": 0}}, True),
    (Route.GENERATE, {"sampling_params": {"max_new_tokens": 0}}, False),
    (Route.GENERATE, {"return_routed_experts": True}, True),
    (Route.VERTEX, {"return_logprob": True, "logprob_start_len": 0}, True),
    (Route.COMPLETIONS, {"echo": True}, False),
    (Route.COMPLETIONS, {"logprobs": 3}, False),
    (Route.COMPLETIONS, {"echo": True, "logprobs": 0}, False),
    (Route.COMPLETIONS, {"echo": True, "logprobs": 1}, True),
    (Route.COMPLETIONS, {"return_routed_experts": True}, True),
    (Route.CHAT, {"logprobs": True, "top_logprobs": 5, "echo": True}, False),
    (Route.CHAT, {"return_routed_experts": True}, True),
    (Route.RESPONSES, {"top_logprobs": 5}, False),
    (Route.MESSAGES, {"logprobs": True}, False),
]


def test_prefill_is_awaited_only_where_it_knows_more() -> None:
    assert not [row for row in NEEDS_PREFILL if needs_prefill_answer(*row[:2]) is not row[2]]


def _echo(stream: bool = False) -> ParsedRequest:
    body = {"prompt": "ab", "echo": True, "logprobs": 1, "stream": stream}
    return parse_request(Route.COMPLETIONS, json.dumps(body).encode())


def test_what_cannot_be_read_is_left_as_it_is() -> None:
    native = parse_request(Route.GENERATE, b'{"text":"a","return_logprob":true,"logprob_start_len":0}')
    prefills = [b"", b"not json", b"{}", b'{"choices":3}', b'{"choices":[{}]}', b"[]", b"\xff"]
    decodes = [b"", b"not json", b"{}", b'{"choices":[{"index":0}]}', b"[1]", b"\xff"]
    for prefill, decode in product(prefills, decodes):
        for request in (_echo(), native):
            assert merge_whole(request, decode, prefill) == decode, (prefill, decode)
        for request in (_echo(stream=True), native):
            merge = stream_merger(request, prefill)
            event = b"data: " + decode + b"\n\n"
            assert merge is None or merge(event) == event, (prefill, decode)


def test_a_request_that_both_legs_refuse_passes_untouched() -> None:
    refusal = (
        b'data: {"error":{"message":"no","type":"invalid_request_error","code":400}}\n\ndata: [DONE]\n\n'
    )
    body = b'{"text":"a","return_logprob":true,"logprob_start_len":9,"stream":true}'
    assert stream_merger(parse_request(Route.GENERATE, body), refusal) is None


def test_an_unfinished_prefill_answer_is_not_read() -> None:
    """Samples need merging but nobody waited for prefill: its answer may be cut off anywhere."""
    request = parse_request(Route.GENERATE, b'{"text":"a","sampling_params":{"n":2}}')
    decode = b'[{"text":"b","meta_info":{}},{"text":"c","meta_info":{}}]'
    assert merge_whole(request, decode, b'[{"te') == decode


def _experts(*rows: int) -> str:
    return base64.b64encode(b"".join(row.to_bytes(4, "little") for row in rows)).decode()


@pytest.mark.parametrize("place", ["sglext", "meta_info"])
def test_experts_of_the_prompt_are_prefills(place: str) -> None:
    """Decode's rows for the prompt are whatever its buffers held."""
    decode = {place: {"routed_experts": _experts(0, 0, 0, 4, 5)}}
    prefill = {place: {"routed_experts": _experts(1, 2, 3)}}
    route = Route.GENERATE if place == "meta_info" else Route.CHAT
    body = {"text": "abc", "messages": [{"role": "user", "content": "a"}], "return_routed_experts": True}
    request = parse_request(route, json.dumps(body).encode())
    merged = merge_whole(request, json.dumps(decode).encode(), json.dumps(prefill).encode())
    assert json.loads(merged) == {place: {"routed_experts": _experts(1, 2, 3, 4, 5)}}


def test_cached_tokens_of_samples_count_once() -> None:
    usage = {
        "prompt_tokens": 60, "completion_tokens": 9, "total_tokens": 69, "reasoning_tokens": 3,
        "prompt_tokens_details": {"cached_tokens": 48},
    }  # fmt: skip
    request = parse_request(Route.COMPLETIONS, b'{"prompt":"ab","n":3}')
    merged = json.loads(merge_whole(request, json.dumps({"choices": [], "usage": usage}).encode(), b""))
    assert merged["usage"] == {
        "prompt_tokens": 20, "completion_tokens": 9, "total_tokens": 29, "reasoning_tokens": 3,
        "prompt_tokens_details": {"cached_tokens": 16},
    }  # fmt: skip
