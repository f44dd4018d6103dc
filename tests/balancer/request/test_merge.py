"""Merging prefill's and decode's answers, held against what a plain server answered to the same requests.

``merge_recordings.json`` was recorded from real servers of the tiny model: one
plain, one prefill, one decode, with and without ``--incremental-streaming-output``.
"""

from __future__ import annotations

import base64
import json
import random
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from pdserve.balancer.request.merge import StreamMerger, merge_whole, needs_prefill_answer, stream_merger
from pdserve.balancer.request.parse import parse_request
from pdserve.balancer.request.request import ParsedRequest, Route
from tests.engine.conformance import EVENT_STREAM, differences, read_reply

RECORDINGS: list[dict[str, Any]] = json.loads((Path(__file__).parent / "merge_recordings.json").read_text())
WHOLE = [recording for recording in RECORDINGS if not recording["plain"].startswith("data: ")]
STREAMS = [recording for recording in RECORDINGS if recording["plain"].startswith("data: ")]


def _names(recordings: list[dict[str, Any]]) -> list[str]:
    return [recording["name"] for recording in recordings]


def _request(recording: dict[str, Any]) -> ParsedRequest:
    return parse_request(Route(recording["path"]), json.dumps(recording["request"]).encode())


def _merger(recording: dict[str, Any]) -> StreamMerger:
    merger = stream_merger(_request(recording), recording["prefill"].encode())
    assert merger is not None
    return merger


def _merged_stream(recording: dict[str, Any], cuts: list[int] | None = None) -> bytes:
    merger, stream = _merger(recording), recording["decode"].encode()
    edges = [0, *(cuts or []), len(stream)]
    parts = [merger.feed(stream[start:end]) for start, end in pairwise(edges)]
    return b"".join(parts) + merger.finish()


def _assert_same(plain: str, ours: str, content_type: str) -> None:
    found = differences(read_reply(200, content_type, plain), read_reply(200, content_type, ours))
    # Samples of a plain server find their prompt in the cache: it computes the prompt once before them.
    assert not [line for line in found if "cached_tokens" not in line], found


@pytest.mark.parametrize("recording", WHOLE, ids=_names(WHOLE))
def test_whole_answer_is_the_plain_servers(recording: dict[str, Any]) -> None:
    decode = recording["decode"].encode()
    merged = merge_whole(_request(recording), decode, recording["prefill"].encode())
    assert merged != decode
    _assert_same(recording["plain"], merged.decode(), "application/json")


@pytest.mark.parametrize("recording", STREAMS, ids=_names(STREAMS))
def test_stream_is_the_plain_servers(recording: dict[str, Any]) -> None:
    _assert_same(recording["plain"], _merged_stream(recording).decode(), EVENT_STREAM)


@pytest.mark.parametrize("recording", STREAMS, ids=_names(STREAMS))
def test_stream_does_not_depend_on_how_it_is_cut(recording: dict[str, Any]) -> None:
    whole, length = _merged_stream(recording), len(recording["decode"].encode())
    assert _merged_stream(recording, list(range(1, length))) == whole
    rng = random.Random(recording["name"])
    for _ in range(20):
        cuts = sorted(rng.sample(range(1, length), rng.randrange(1, 9)))
        assert _merged_stream(recording, cuts) == whole


@pytest.mark.parametrize("recording", STREAMS, ids=_names(STREAMS))
def test_only_whole_events_leave(recording: dict[str, Any]) -> None:
    merger, stream = _merger(recording), recording["decode"].encode()
    for byte in stream:
        out = merger.feed(bytes([byte]))
        assert out == b"" or out.endswith(b"\n\n")
    assert merger.finish() == b""


def test_a_stream_that_breaks_off_keeps_its_last_bytes() -> None:
    merger = _merger(STREAMS[0])
    assert merger.feed(b'data: {"text":"cut o') == b""
    assert merger.finish() == b'data: {"text":"cut o'


def test_text_that_looks_like_an_event_is_text() -> None:
    recording = next(r for r in STREAMS if r["name"] == "generate: streamed")
    merger, text = _merger(recording), r"data: {\"a\":1} \n\ndata: {"
    plain = recording["decode"].encode().partition(b"\n\n")[0]
    event = plain.replace(b'{"text":"', b'{"text":"' + text.encode(), 1)
    merged = merger.feed(b"event: named\n" + event + b"\n\n")
    assert merged.startswith(b'event: named\ndata: {"text":"' + text.encode())
    assert b'"input_token_logprobs":[[' in merged


def test_numbers_keep_every_digit() -> None:
    recording = next(r for r in WHOLE if r["name"] == "generate: prompt from 0, top 2")
    prefill = recording["prefill"].replace("null,65", "-0.10000000149011612345,65")
    merged = merge_whole(_request(recording), recording["decode"].encode(), prefill.encode())
    assert b"[-0.10000000149011612345,65,null]" in merged


@pytest.mark.parametrize(
    ("route", "fields", "needed"),
    [
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
    ],
)
def test_prefill_is_awaited_only_where_it_knows_more(
    route: Route, fields: dict[str, Any], needed: bool
) -> None:
    assert needs_prefill_answer(route, fields) is needed


def _echo(stream: bool = False) -> ParsedRequest:
    body = {"prompt": "ab", "echo": True, "logprobs": 1, "stream": stream}
    return parse_request(Route.COMPLETIONS, json.dumps(body).encode())


@pytest.mark.parametrize(
    "prefill", [b"", b"not json", b"{}", b'{"choices":3}', b'{"choices":[{}]}', b"[]", b"\xff"]
)
@pytest.mark.parametrize("decode", [b"", b"not json", b"{}", b'{"choices":[{"index":0}]}', b"[1]", b"\xff"])
def test_what_cannot_be_read_is_left_as_it_is(prefill: bytes, decode: bytes) -> None:
    native = parse_request(Route.GENERATE, b'{"text":"a","return_logprob":true,"logprob_start_len":0}')
    for request in (_echo(), native):
        assert merge_whole(request, decode, prefill) == decode
    for request in (_echo(stream=True), native):
        merger = stream_merger(request, prefill)
        event = b"data: " + decode + b"\n\n"
        assert merger is None or merger.feed(event) == event


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
