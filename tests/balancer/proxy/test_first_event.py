"""A failure before the first token is not the client's to see: another pair is tried, the leg blamed."""

from __future__ import annotations

import asyncio

import pytest

from tests.support.balancer_client import Site, running_site
from tests.support.dialects import CHAT, DIALECTS, RESPONSES, deltas, failure, preamble, request_to, stream
from tests.support.sglang_server import until

FAILED = "the decode server has lost its cache"


def errors_of(site: Site, worker_id: str) -> int:
    return next(w.breaker.errors for w in site.balancer.fleet.workers() if w.worker_id == worker_id)


@pytest.mark.parametrize("comments", [[], [b": ping\n\n"], [b": ping\r\n\r\n"]], ids=["", "comment", "crlf"])
@pytest.mark.parametrize("path", DIALECTS)
async def test_another_pair_is_tried_and_the_leg_is_blamed(path: str, comments: list[bytes]) -> None:
    async with running_site(decode=2) as site:
        bad, good = site.decodes
        bad.behaviour.segments = (*comments, *preamble(path), *failure(path, FAILED))
        good.behaviour.segments = tuple(stream(path))
        for _ in range(4):
            reply = await site.ask("POST", path, request_to(path, stream=True))
            assert (reply.status, reply.body) == (200, b"".join(stream(path)))
            if bad.requests:
                break
        assert len(bad.requests) == 1
        assert (site.counts["retried"], site.counts["completed"]) == (1, site.counts["total"])
        assert [errors_of(site, name) for name in ("prefill-0", "decode-0", "decode-1")] == [0, 1, 0]


@pytest.mark.parametrize("path", DIALECTS)
async def test_prefills_failure_is_found_behind_what_precedes_it(path: str) -> None:
    async with running_site(prefill=2) as site:
        bad, good = site.prefills
        site.decode.behaviour.gate = asyncio.Event()  # decode waits for KV that comes from the good one only
        bad.behaviour.segments = (b": ping\n\n", *preamble(path), *failure(path, FAILED))
        good.behaviour.segments = tuple(stream(path))
        site.decode.behaviour.segments = tuple(stream(path))

        async def let_go() -> None:
            await until(lambda: good.requests)
            assert site.decode.behaviour.gate is not None
            site.decode.behaviour.gate.set()

        going = asyncio.create_task(let_go())
        for _ in range(4):
            reply = await site.ask("POST", path, request_to(path, stream=True))
            assert reply.body == b"".join(stream(path))
            if bad.requests:
                break
            site.decode.behaviour.gate = asyncio.Event()
            good.requests.clear()
            going = asyncio.create_task(let_go())
        await going
        assert len(bad.requests) == 1
        assert [errors_of(site, name) for name in ("prefill-0", "prefill-1", "decode-0")] == [1, 0, 0]


@pytest.mark.parametrize("path", DIALECTS)
async def test_a_failure_that_blames_the_request_goes_to_the_client(path: str) -> None:
    async with running_site(decode=2) as site:
        segments = (*preamble(path), *failure(path, "no such token", 400))
        for decode in site.decodes:
            decode.behaviour.segments = segments
        reply = await site.ask("POST", path, request_to(path, stream=True))
        assert (reply.status, reply.body) == (200, b"".join(segments))
        assert (site.last["status"], site.last["error"], site.counts["failed"]) == (400, "no such token", 1)
        assert site.counts["retried"] == 0
        assert all(worker.breaker.errors == 0 for worker in site.balancer.fleet.workers())


@pytest.mark.parametrize("path", DIALECTS)
async def test_a_stream_that_ends_without_an_answer_is_tried_again(path: str) -> None:
    async with running_site(decode=2) as site:
        bad, good = site.decodes
        bad.behaviour.segments = (b": ping\n\n", *preamble(path))
        good.behaviour.segments = tuple(stream(path))
        for _ in range(4):
            reply = await site.ask("POST", path, request_to(path, stream=True))
            assert reply.body == b"".join(stream(path))
            if bad.requests:
                break
        assert bad.requests[0]["stream"] and site.counts["retried"] == 1


async def test_the_first_token_is_content_not_what_precedes_it() -> None:
    """``/v1/responses`` says that it has begun as soon as it has the request."""
    async with running_site() as site:
        path = RESPONSES
        site.decode.behaviour.segments = tuple(stream(path))
        site.decode.behaviour.hang_after = len(preamble(path))
        async with site.exchange("POST", path, request_to(path, stream=True)) as exchange:
            await until(lambda: site.prefill.requests and site.decode.requests)
            await until(lambda: not site.prefill.num_exchanges)
            await asyncio.sleep(0.02)
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.02):
                    await exchange.read_until(b"\r\n")
            assert site.balancer.dispatcher.ledger.inflight == 1


async def test_a_first_event_without_an_end_is_content_when_the_stream_ends() -> None:
    async with running_site() as site:
        last = deltas(CHAT)[-1].rstrip()
        site.decode.behaviour.segments = (last,)
        reply = await site.ask("POST", CHAT, request_to(CHAT, stream=True))
        assert (reply.status, reply.body) == (200, last)
