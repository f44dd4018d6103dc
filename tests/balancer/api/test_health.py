"""Health as load balancers, Kubernetes and SageMaker ask for it."""

from __future__ import annotations

import asyncio

import pytest

from tests.support.control_worker import control_site
from tests.support.sglang_server import until

READY = ("/health", "/readiness", "/ready", "/ping", "/health_generate")


async def test_a_ready_pair_is_health() -> None:
    async with control_site(is_ready=True) as site:
        for path in (*READY, "/liveness"):
            assert (await site.ask("GET", path)).status == 200, path


@pytest.mark.parametrize("path", READY)
async def test_no_pair_is_503_with_the_reason(path: str) -> None:
    async with control_site(prefill=0, decode=0) as site:
        reply = await site.ask("GET", path)
        assert (reply.status, (await site.ask("GET", "/liveness")).status) == (503, 200)
        assert "no prefill and no decode server" in reply.json["error"]["message"]


async def test_only_health_generate_asks_the_workers() -> None:
    async with control_site(is_ready=True) as site:
        for path in READY:
            await site.ask("GET", path)
        assert [worker.targets for worker in site.workers] == [["GET /health_generate"]] * 2


async def test_health_generate_needs_one_whole_pair_that_generates() -> None:
    async with control_site(prefill=1, decode=2, is_ready=True) as site:
        site.decodes[0].tell("/health_generate", b"", 503)
        assert (await site.ask("GET", "/health_generate")).status == 200
        site.decodes[1].tell("/health_generate", b"", 503)
        reply = await site.ask("GET", "/health_generate")
        assert reply.status == 503
        assert f"{site.decodes[0].url}: HTTP 503" in reply.json["error"]["message"]


async def test_those_who_ask_at_once_share_one_round() -> None:
    async with control_site(is_ready=True) as site:
        gate = site.prefills[0].gate = asyncio.Event()
        asking = [asyncio.create_task(site.ask("GET", "/health_generate")) for _ in range(5)]
        await until(lambda: site.prefills[0].seen)
        gate.set()
        assert [(await asked).status for asked in asking] == [200] * 5
        assert len(site.decodes[0].seen) < 5


async def test_a_pause_shows_in_ready_alone() -> None:
    async with control_site(is_ready=True) as site:
        assert (await site.ask("POST", "/pause_generation", {"mode": "retract"})).status == 200
        assert (await site.ask("GET", "/ready")).status == 503
        assert (await site.ask("GET", "/ping")).status == 200
        assert (await site.ask("POST", "/continue_generation", {})).status == 200
        assert (await site.ask("GET", "/ready")).status == 200
        await site.ask("POST", "/pause_generation?worker=decode-0", {})
        assert (await site.ask("GET", "/ready")).status == 503, "nobody else decodes"


async def test_head_is_get_without_a_body() -> None:
    async with control_site(prefill=0, decode=0) as site:
        assert (await site.ask("HEAD", "/liveness")).body == b""
