"""Several samples of one chat: a room each, one answer, one end."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from pdserve.balancer.proxy.samples import sum_usage
from tests.support.balancer_client import Site, running_site
from tests.support.sglang_server import until

CHAT = "/v1/chat/completions"


def chat(n: int, **more: object) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": "hi"}], "n": n, **more}


def everything_is_given_back(site: Site) -> bool:
    return (
        site.counts["inflight"] == 0
        and site.balancer.dispatcher.num_rooms == 0
        and all(worker.num_inflight == 0 for worker in site.balancer.fleet.workers())
    )


@pytest.mark.parametrize("path", [CHAT, "/invocations"])
async def test_samples_get_a_room_each_and_one_answer(path: str) -> None:
    async with running_site(decode=2) as site:
        reply = await site.ask("POST", path, chat(3))
        assert reply.status == 200
        assert [choice["index"] for choice in reply.json["choices"]] == [0, 1, 2]
        assert reply.json["usage"] == {"prompt_tokens": 4, "completion_tokens": 9, "total_tokens": 13}
        sent = site.prefill.requests
        assert [request["n"] for request in sent] == [1, 1, 1]
        assert len({request["bootstrap_room"] for request in sent}) == len({r["rid"] for r in sent}) == 3
        assert reply.json["id"] == reply.headers["x-request-id"] == sent[0]["rid"]
        assert sum(len(fake.requests) for fake in site.decodes) == 3
        assert site.counts["total"] == site.counts["completed"] == 1
        assert (site.last["prompt_tokens"], site.last["completion_tokens"]) == (4, 9)
        assert everything_is_given_back(site)


async def test_streamed_samples_are_numbered_and_end_once() -> None:
    async with running_site(decode=2) as site:
        reply = await site.ask("POST", CHAT, chat(3, stream=True))
        *events, done = reply.events
        documents = [json.loads(event) for event in events]
        assert done == "[DONE]" and "[DONE]" not in events
        texts: dict[int, str] = {}
        for document in documents:
            for choice in document["choices"]:
                texts[choice["index"]] = choice["delta"]["content"]
        assert texts == {0: " tok tok tok", 1: " tok tok tok", 2: " tok tok tok"}
        assert len({document["id"] for document in documents}) == 1
        assert everything_is_given_back(site)


async def test_streamed_samples_began_at_one_time() -> None:
    """Their requests may begin in different seconds."""
    event = '{"id":"x","created":%d,"choices":[{"index":0,"delta":{"content":"a"},"finish_reason":"stop"}]}'
    async with running_site(decode=2) as site:
        for second, decode in enumerate(site.decodes):
            text = f"data: {event % (1764525600 + second)}\n\ndata: [DONE]\n\n"
            decode.behaviour.segments = (text.encode(),)
        reply = await site.ask("POST", CHAT, chat(4, stream=True))
        assert all(decode.requests for decode in site.decodes)
        assert len({json.loads(event)["created"] for event in reply.events[:-1]}) == 1


async def test_other_samples_wait_until_the_first_ones_prompt_is_computed() -> None:
    async with running_site() as site:
        site.prefill.behaviour.gate = asyncio.Event()
        asking = asyncio.create_task(site.ask("POST", CHAT, chat(2)))
        await until(lambda: site.prefill.requests and site.decode.requests)
        await asyncio.sleep(0.05)
        assert len(site.prefill.requests) == 1
        site.prefill.behaviour.gate.set()
        assert (await asking).status == 200
        assert len(site.prefill.requests) == 2


@pytest.mark.parametrize("stream", [False, True])
async def test_a_sample_that_fails_for_good_ends_them_all(stream: bool) -> None:
    async with running_site(decode=2, max_retries=0) as site:
        good, bad = site.decodes
        bad.behaviour.status = 500
        good.behaviour.token_delay_s = 0.05
        reply = await site.ask("POST", CHAT, chat(6, stream=stream))
        if reply.status == 200:  # streamed, and a sample had begun
            assert stream and json.loads(reply.events[-1])["error"]["code"] == 502
        else:
            assert (reply.status, reply.json["code"]) == (502, 502)
        await until(lambda: everything_is_given_back(site))
        assert site.counts["failed"] == 1


async def test_a_failed_sample_is_retried_alone() -> None:
    async with running_site(decode=2) as site:
        site.decodes[1].behaviour.status = 500
        reply = await site.ask("POST", CHAT, chat(4))
        assert reply.status == 200 and len(reply.json["choices"]) == 4
        assert len(site.decodes[0].requests) == 4


async def test_a_client_that_leaves_ends_every_sample() -> None:
    async with running_site() as site:
        site.decode.behaviour.hang_after = 1
        async with site.exchange("POST", CHAT, chat(3, stream=True)) as exchange:
            await until(lambda: len(site.decode.requests) == 3)
            exchange.leave()
            await until(lambda: everything_is_given_back(site))
        rids = {request["rid"] for request in site.decode.requests}
        await until(lambda: rids <= set(site.decode.aborts))


def test_usage_counts_the_prompt_once() -> None:
    one = {"prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 10, "reasoning_tokens": 1}
    two = {"prompt_tokens": 7, "completion_tokens": 5, "total_tokens": 12, "reasoning_tokens": None}
    whole = {"prompt_tokens": 7, "completion_tokens": 8, "total_tokens": 15, "reasoning_tokens": 1}
    assert sum_usage([one, two]) == whole
