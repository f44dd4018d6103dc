"""A 500 that follows the request from worker to worker is the request's fault, not theirs."""

from __future__ import annotations

import json

from tests.support.balancer_client import Site, running_site
from tests.support.sglang_server import FakeSGLang

SAID = json.dumps({"error": {"message": "list index out of range"}}).encode()
PLAIN = {"text": "hi"}


def broken(*fakes: FakeSGLang) -> None:
    for fake in fakes:
        fake.behaviour.status, fake.behaviour.error_body = 500, SAID


def troubled(site: Site) -> list[str]:
    return [worker.worker_id for worker in site.balancer.fleet.workers() if str(worker.state) != "ready"]


def breakers_opened(site: Site) -> int:
    return sum(worker.breaker.opened for worker in site.balancer.fleet.workers())


async def test_three_tries_of_a_client_with_a_bad_request_open_no_breaker() -> None:
    async with running_site(prefill=1, decode=1) as site:
        broken(site.decode)
        for _ in range(3):  # as the OpenAI SDK does with its two retries
            assert (await site.generate({"text": "bad"})).status >= 500
        assert (troubled(site), breakers_opened(site)) == ([], 0)
        site.decode.behaviour.status = 200
        assert (await site.generate(PLAIN)).status == 200


async def test_bad_requests_that_differ_are_no_workers_fault_where_others_say_the_same() -> None:
    async with running_site(prefill=2, decode=3) as site:
        broken(*site.decodes)
        for number in range(6):
            reply = await site.generate({"text": f"bad {number}"})
            assert (reply.status, reply.body) == (500, SAID), "as one server would answer"
        assert (troubled(site), breakers_opened(site)) == ([], 0)


async def test_a_worker_that_fails_every_request_is_out_after_three_where_there_is_no_other() -> None:
    async with running_site(prefill=1, decode=1) as site:
        broken(site.decode)
        for number in range(3):
            await site.generate({"text": f"good {number}"})
        assert breakers_opened(site) == 1


async def test_a_worker_that_fails_what_another_serves_is_out_after_three_even_of_one_request() -> None:
    async with running_site(prefill=1, decode=2, policy="round_robin") as site:
        broken(site.decode)
        num_asked = 0
        while not breakers_opened(site):
            assert (await site.generate(PLAIN)).status == 200, "served by the other"
            num_asked += 1
        assert num_asked <= 6
        assert len(site.decode.requests) == 3


async def test_two_broken_workers_of_three_are_both_taken_out() -> None:
    async with running_site(prefill=1, decode=3, policy="round_robin") as site:
        broken(site.decodes[0], site.decodes[1])
        for number in range(9):
            assert (await site.generate({"text": f"good {number}"})).status == 200
        opened = {w.worker_id: w.breaker.opened for w in site.balancer.fleet.workers()}
        assert opened == {"prefill-0": 0, "decode-0": 1, "decode-1": 1, "decode-2": 0}
