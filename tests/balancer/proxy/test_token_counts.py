"""Tokens and finish reasons as each dialect says them, whole and streamed, in the books and as lengths."""

from __future__ import annotations

import json

import pytest

from pdserve.balancer.request.parse import parse_request
from pdserve.balancer.request.request import Route
from pdserve.scheduling.lengths import MIN_LEARNED
from tests.support.balancer_client import running_site
from tests.support.dialects import (
    CHAT,
    COMPLETIONS,
    DIALECTS,
    DONE,
    GENERATE,
    MESSAGES,
    NUM_PROMPT,
    NUM_TOKENS,
    deltas,
    end,
    event,
    preamble,
    request_to,
    stream,
    whole,
)

FINISHES = ("stop", "length", "tool_calls")


@pytest.mark.parametrize("finish", FINISHES)
@pytest.mark.parametrize("path", DIALECTS)
@pytest.mark.parametrize("is_stream", [False, True], ids=["whole", "stream"])
async def test_books_have_the_answers_own_counts(path: str, is_stream: bool, finish: str) -> None:
    async with running_site() as site:
        site.decode.behaviour.segments = tuple(stream(path, finish))
        site.decode.behaviour.body = json.dumps(whole(path, finish)).encode()
        reply = await site.ask("POST", path, request_to(path, stream=is_stream))
        assert reply.status == 200
        assert reply.body == (b"".join(stream(path, finish)) if is_stream else site.decode.behaviour.body)
        last = site.last
        if path.endswith("responses") and finish == "tool_calls":
            finish = "stop"  # its status is completed either way
        assert (last["prompt_tokens"], last["completion_tokens"], last["finish"]) == (
            NUM_PROMPT,
            NUM_TOKENS,
            finish,
        )
        assert site.counts["completed"] == 1


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
async def test_without_usage_each_event_of_a_stream_counts_as_a_token(path: str) -> None:
    """A chat has two events more: of the role, and of the finish reason."""
    async with running_site() as site:
        segments = [
            b": ping\n\n",
            *stream(path, usage=False)[:5],
            b": ping\n\n",
            *stream(path, usage=False)[5:],
        ]
        site.decode.behaviour.segments = tuple(segments)
        reply = await site.ask("POST", path, request_to(path, stream=True))
        assert reply.body == b"".join(segments)
        assert site.last["completion_tokens"] == NUM_TOKENS + (2 if path == CHAT else 1)
        assert site.last["finish"] == "length"


@pytest.mark.parametrize("path", DIALECTS)
async def test_a_large_last_segment_does_not_hide_how_the_answer_ended(path: str) -> None:
    """SGLang's extras (output ids, hidden states) come between the finish reason and the usage."""
    async with running_site() as site:
        *ends, last = end(path, "stop")
        extra = [event({"id": "1", "choices": [], "sglext": {"output_ids": list(range(4000))}})]
        segments = [*preamble(path), *deltas(path)]
        segments += [ends[0], *extra, *ends[1:], last] if path in (CHAT, COMPLETIONS) else [*ends, last]
        site.decode.behaviour.segments = tuple(segments)
        await site.ask("POST", path, request_to(path, stream=True))
        assert (site.last["completion_tokens"], site.last["finish"]) == (NUM_TOKENS, "stop")


async def test_a_streamed_batch_counts_every_prompt() -> None:
    async with running_site() as site:
        segments = []
        for index, tokens in enumerate((40, 2)):
            *_, last, done = end(GENERATE, "stop", num_tokens=tokens)
            document = json.loads(last.removeprefix(b"data: "))
            segments.append(event({**document, "index": index}))
        segments += [event({"index": 2, "meta_info": {"finish_reason": None}})] * 100
        *_, last, done = end(GENERATE, "length", num_tokens=100)
        segments += [event({**json.loads(last.removeprefix(b"data: ")), "index": 2}), done]
        assert done == DONE
        site.decode.behaviour.segments = tuple(segments)
        reply = await site.generate({"text": ["a", "b", "c"], "stream": True})
        assert reply.body == b"".join(segments)
        assert (site.last["prompt_tokens"], site.last["completion_tokens"]) == (3 * NUM_PROMPT, 142)


async def test_vertex_predictions_are_counted() -> None:
    async with running_site() as site:
        body = {"predictions": [whole(GENERATE, "stop"), whole(GENERATE, "length")]}
        site.decode.behaviour.body = json.dumps(body).encode()
        await site.ask("POST", "/vertex_generate", {"instances": [{"text": "a"}, {"text": "b"}]})
        last = site.last
        assert (last["prompt_tokens"], last["completion_tokens"]) == (2 * NUM_PROMPT, 2 * NUM_TOKENS)


@pytest.mark.parametrize("path", [MESSAGES, "/v1/responses"])
@pytest.mark.parametrize("is_stream", [False, True], ids=["whole", "stream"])
async def test_lengths_are_learned_of_these_counts(path: str, is_stream: bool) -> None:
    async with running_site() as site:
        site.decode.behaviour.segments = tuple(stream(path, "stop"))
        site.decode.behaviour.body = json.dumps(whole(path, "stop")).encode()
        body = request_to(path, stream=is_stream, max_tokens=500, max_output_tokens=500)
        for _ in range(MIN_LEARNED):
            await site.ask("POST", path, body)
        shape = parse_request(Route(path), json.dumps(body).encode()).shape
        forecast = site.balancer.fleet.scheduler.foresee(shape).forecast
        assert forecast is not None and forecast.is_learned
        assert forecast.mean == pytest.approx(NUM_TOKENS, rel=0.04)
