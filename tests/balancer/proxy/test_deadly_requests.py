"""A request that was running when two servers died is not given a third one to kill."""

from __future__ import annotations

import asyncio

import pytest

from tests.support.balancer_client import Site, running_site
from tests.support.sglang_server import FakeSGLang, until

POISON = "poison"
DEADLY = {"text": POISON}


async def without_kept_connections(fakes: list[FakeSGLang]) -> None:
    for fake in fakes:
        fake.drop_idle()
    await until(lambda: not any(fake.num_connections for fake in fakes))


def running(site: Site) -> list[FakeSGLang]:
    return [fake for fake in site.decodes if fake.requests and not fake.is_dead]


def dead(site: Site) -> list[str]:
    return [fake.name for fake in site.fakes if fake.is_dead]


@pytest.mark.parametrize("kept", [True, False], ids=["kept connections", "fresh connections"])
@pytest.mark.parametrize(
    ("role", "path", "body"),
    [
        ("decodes", "/generate", {**DEADLY, "rid": "mine"}),
        ("decodes", "/v1/chat/completions", {"messages": [{"role": "user", "content": POISON}]}),
        ("decodes", "/generate", {**DEADLY, "stream": True}),
        ("prefills", "/generate", DEADLY),
    ],
    ids=["decode", "chat", "stream", "prefill"],
)
async def test_a_request_that_killed_two_servers_spares_the_third(
    role: str, path: str, body: dict[str, object], kept: bool
) -> None:
    async with running_site(prefill=3, decode=3, max_retries=5) as site:
        if not kept:
            await without_kept_connections(site.fakes)
        fakes: list[FakeSGLang] = getattr(site, role)
        for fake in fakes:
            fake.poison = POISON
        if role == "prefills":
            for fake in site.decodes:
                fake.behaviour.hang = True  # as decode waits for the KV
        reply = await site.ask("POST", path, body)
        assert len(dead(site)) == 2
        assert reply.status == 500
        message = reply.json["message"] if path.startswith("/v1") else reply.json["error"]["message"]
        for name in dead(site):
            assert name in message
        assert str(body.get("rid") or site.last["rid"]) in message
        assert not [fake for fake in fakes if not fake.is_dead and fake.requests]
        assert site.counts["failed"] == 1


async def test_a_request_that_shared_two_dying_servers_is_not_tried_a_third_time_either() -> None:
    async with running_site(prefill=1, decode=3) as site:
        gate = asyncio.Event()
        for fake in site.fakes:
            fake.behaviour.gate = gate
        asked = asyncio.create_task(site.generate({"text": "innocent"}))
        for number in (1, 2):
            await until(lambda: running(site))
            running(site)[0].kill()
            await until(lambda number=number: len(dead(site)) == number)
        reply = await asked
        assert (reply.status, len(dead(site))) == (500, 2)


async def test_both_servers_of_a_pair_may_die_together() -> None:
    """As when their machine goes down."""
    async with running_site(prefill=2, decode=2) as site:
        gate = asyncio.Event()
        for fake in site.fakes:
            fake.behaviour.gate = gate
        asked = asyncio.create_task(site.generate({"text": "innocent"}))
        await until(lambda: sum(bool(fake.requests) for fake in site.fakes) == 2)
        for fake in [fake for fake in site.fakes if fake.requests]:
            fake.kill()
        await until(lambda: sum(bool(fake.requests) for fake in site.fakes) == 4)
        gate.set()
        reply = await asked
        assert (reply.status, len(dead(site))) == (200, 2)


async def test_a_death_in_each_role_is_not_the_requests_doing() -> None:
    """What kills prefill servers never comes to decode; what kills decode servers prefill passes on."""
    async with running_site(prefill=2, decode=3, max_retries=5) as site:
        for fake in site.decodes:
            fake.behaviour.hang = True  # as decode waits for the KV
        gate = site.prefill.behaviour.gate = site.prefills[1].behaviour.gate = asyncio.Event()
        first, second = site.prefills
        asked = asyncio.create_task(site.generate(DEADLY))
        await until(lambda: bool(first.requests or second.requests))
        (first if first.requests else second).kill()

        def its_decode() -> list[FakeSGLang]:
            rids = [r["rid"] for fake in site.prefills if not fake.is_dead for r in fake.requests]
            return [fake for fake in site.decodes if any(r["rid"] in rids for r in fake.requests)]

        await until(lambda: bool(its_decode()))
        for fake in site.decodes:
            fake.behaviour.hang = False
        its_decode()[0].kill()
        gate.set()
        reply = await asked
        assert (reply.status, len(dead(site))) == (200, 2)


async def test_one_death_is_retried_and_a_server_that_was_dead_before_counts_for_nobody() -> None:
    async with running_site(prefill=1, decode=4, max_retries=5) as site:
        site.decodes[0].kill()
        site.decodes[1].kill()
        site.decodes[2].poison = POISON
        reply = await site.generate(DEADLY)
        assert (reply.status, len(dead(site))) == (200, 3)


async def test_servers_that_only_reset_connections_have_not_died() -> None:
    async with running_site(prefill=1, decode=3, max_retries=5) as site:
        await without_kept_connections(site.fakes)
        for fake in site.decodes[:2]:
            fake.behaviour.reset_before_head = True
        reply = await site.generate({"text": "hi"})
        assert reply.status == 200
