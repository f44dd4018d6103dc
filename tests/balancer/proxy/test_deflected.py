"""A request that a decode server serves alone: what it is sent, what the client gets, who is blamed."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import msgspec
import pytest

from pdserve.types import LOCAL_HOST, Role
from tests.balancer.proxy.test_failover import check_whole
from tests.support.balancer_client import Site, running_site
from tests.support.dialects import GENERATE, request_to
from tests.support.resumable import Break
from tests.support.sglang_server import until

AUTO = {"deflect": "auto", "queue_timeout_s": 30.0}
SLO = {"slo_ttft_s": 2.0, "slo_tpot_s": 0.1}
LONG = {"text": "x" * 16_000}
"""As many tokens as a prefill server computes in 0.4 s, as the balancer believes: others still fit behind."""


@asynccontextmanager
async def site_of(**settings: Any) -> AsyncIterator[Site]:
    """A site whose decode servers say that they prefill requests themselves."""
    async with running_site(**{**AUTO, **settings}) as site:
        fleet = site.balancer.fleet
        for worker in fleet.workers():
            if worker.role is Role.DECODE:
                able = msgspec.structs.replace(worker.info, prefills_locally=True)
                fleet.health.worker_learned(worker, able)
        yield site


@asynccontextmanager
async def behind_a_long_prompt(**settings: Any) -> AsyncIterator[Site]:
    """The prefill server is at a long prompt until the test ends."""
    async with site_of(**SLO, **settings) as site:
        gate = site.prefill.behaviour.gate = asyncio.Event()
        async with site.exchange("POST", "/generate", {**LONG, "stream": True}):
            await until(lambda: site.prefill.requests, "the long prompt is there")
            yield site
        gate.set()


@pytest.mark.parametrize("path", ["/generate", "/v1/chat/completions", "/v1/completions"])
@pytest.mark.parametrize("stream", [False, True])
async def test_decode_alone_has_the_request_and_the_client_its_answer(path: str, stream: bool) -> None:
    async with behind_a_long_prompt() as site:
        body = {"prompt": "hi", "text": "hi", "messages": [{"role": "user", "content": "hi"}]}
        reply = await site.ask("POST", path, {**body, "stream": stream})
        assert reply.status == 200
        sent = site.decode.requests[-1]
        assert (sent["bootstrap_host"], sent["bootstrap_port"]) == (LOCAL_HOST, 90)
        assert len(site.prefill.requests) == 1, "only the long prompt"
        assert site.counts["deflected"] == 1
        assert site.last["pair"] == "decode-0"
        assert site.last["prefill_s"] is None, "no prefill server took part"
        assert site.decode.aborts == []
        text = reply.body.decode()
        assert sent["rid"] in text or json.loads(reply.events[0] if stream else text)


async def test_a_server_named_by_hand_is_asked_whether_it_can() -> None:
    async with running_site(resumes=True) as site:
        told = {worker.worker_id: worker.info.prefills_locally for worker in site.balancer.fleet.workers()}
        assert told == {"prefill-0": False, "decode-0": True}


async def test_no_client_can_ask_for_it() -> None:
    async with site_of() as site:
        reply = await site.generate({"text": "hi", "bootstrap_host": LOCAL_HOST, "bootstrap_port": 90})
        assert reply.status == 200
        assert {fake.requests[0]["bootstrap_host"] for fake in site.fakes} == {"127.0.0.1"}


async def test_without_prefill_servers_decode_goes_on_alone() -> None:
    async with site_of() as site:
        site.prefill.kill()
        replies = [await site.generate({"text": "hi"}) for _ in range(3)]
        assert [reply.status for reply in replies] == [200] * 3
        assert site.decode.requests[-1]["bootstrap_host"] == LOCAL_HOST
        assert (await site.ask("GET", "/ready")).status == 200


async def test_switched_off_it_does_not() -> None:
    async with site_of(deflect="off", queue_timeout_s=0.05) as site:
        site.prefill.kill()
        await site.generate({"text": "hi"})
        assert (await site.generate({"text": "hi"})).status == 503
        assert (await site.ask("GET", "/ready")).status == 503


async def test_logprobs_of_the_prompt_wait_for_a_prefill_server() -> None:
    async with site_of(queue_timeout_s=0.05) as site:
        site.prefill.kill()
        assert (await site.generate({"text": "hi"})).status == 200
        asked = {"text": "hi", "return_logprob": True, "logprob_start_len": 0}
        assert (await site.generate(asked)).status == 503


async def test_what_the_server_cannot_do_alone_a_pair_does_and_nobody_is_blamed() -> None:
    async with behind_a_long_prompt(max_retries=0) as site:
        site.decode.prefills_locally = False
        async with site.exchange("POST", "/generate", {"text": "hi"}) as exchange:
            await until(lambda: len(site.prefill.requests) == 2, "a pair has it")
            site.prefill.behaviour.gate.set()  # type: ignore[union-attr]
            assert (await exchange.reply()).status == 200
        first, second = (request["bootstrap_host"] for request in site.decode.requests[-2:])
        assert (first, second) == (LOCAL_HOST, "127.0.0.1")
        assert not any(sum(worker.failures.values()) for worker in site.balancer.fleet.workers())


async def test_a_client_that_leaves_ends_it_once() -> None:
    async with behind_a_long_prompt() as site:
        site.decode.behaviour.gate = asyncio.Event()
        async with site.exchange("POST", "/generate", {"text": "hi"}) as exchange:
            await until(lambda: site.decode.requests[-1].get("text") == "hi", "decode has it")
            exchange.leave()
            rid = site.decode.requests[-1]["rid"]
            await until(lambda: rid in site.decode.aborts, "its end is told")
        assert site.decode.aborts.count(rid) == 1
        assert rid not in site.prefill.aborts
        await until(lambda: site.balancer.fleet.workers()[1].num_inflight == 1, "its place is free")


async def test_decode_that_dies_under_it_is_blamed_and_another_serves() -> None:
    async with site_of(decode=2) as site:
        site.prefill.kill()
        await site.generate({"text": "hi"})
        site.decodes[0].kill()
        replies = [await site.generate({"text": "hi"}) for _ in range(4)]
        assert [reply.status for reply in replies] == [200] * 4
        assert site.state("decode-0") == "suspect"


async def test_a_stream_that_breaks_goes_on_over_a_pair() -> None:
    async with behind_a_long_prompt(decode=2, resumes=True) as site:
        await until(lambda: hosts(site) and not any(fake.num_exchanges for fake in site.decodes))
        site.decode.breaks.append(Break(3))
        async with site.exchange("POST", GENERATE, request_to(GENERATE, stream=True)) as exchange:
            await until(lambda: LOCAL_HOST in hosts(site), "a decode server has it alone")
            site.prefill.behaviour.gate.set()  # type: ignore[union-attr]
            reply = await exchange.reply()
        check_whole(reply, GENERATE)
        assert sorted(hosts(site)) == ["127.0.0.1", "127.0.0.1", LOCAL_HOST]
        assert site.counts["resumed"] == 1


def hosts(site: Site) -> list[str]:
    """Where the decode servers were to find the prompts' KV."""
    return [request["bootstrap_host"] for fake in site.decodes for request in fake.requests]
