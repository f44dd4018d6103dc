"""Servers that should be there and are not: health, state document and the list of problems say so."""

from __future__ import annotations

import msgspec

from pdserve.state.document import StateDocument
from pdserve.state.problems import find_problems
from tests.support.balancer_client import Site, running_site
from tests.support.sglang_server import until


async def capacity(site: Site) -> dict[str, tuple[int, int, int]]:
    document = (await site.ask("GET", "/pdserve/state")).json
    return {row["role"]: (row["expected"], row["present"], row["ready"]) for row in document["capacity"]}


async def problems(site: Site) -> list[str]:
    body = (await site.ask("GET", "/pdserve/state")).body
    return [problem.what for problem in find_problems(msgspec.json.decode(body, type=StateDocument))]


async def test_all_that_is_expected_is_there() -> None:
    async with running_site(prefill=1, decode=2) as site:
        assert await capacity(site) == {"prefill": (1, 1, 1), "decode": (2, 2, 2)}
        assert (await site.ask("GET", "/health")).json == {"status": "ready"}
        assert await problems(site) == []


async def test_a_dead_server_is_missing_and_the_service_is_still_ready() -> None:
    async with running_site(prefill=1, decode=2) as site:
        site.decode.kill()
        await site.generate({"text": "hi"})
        await site.generate({"text": "hi"})
        await until(lambda: site.state("decode-0") == "suspect")
        assert await capacity(site) == {"prefill": (1, 1, 1), "decode": (2, 2, 1)}
        for path in ("/health", "/readiness"):
            reply = await site.ask("GET", path)
            assert reply.status == 200
            assert reply.json == {"status": "ready", "missing": "1 of 2 decode workers"}


async def test_servers_that_never_came_are_named_by_number() -> None:
    async with running_site(prefill=1, decode=1, expect_prefill=3, expect_decode=2) as site:
        assert await capacity(site) == {"prefill": (3, 1, 1), "decode": (2, 1, 1)}
        reply = await site.ask("GET", "/health")
        assert reply.json["missing"] == "2 of 3 prefill workers, 1 of 2 decode workers"
        named = ["2 of 3 prefill workers are missing", "1 of 2 decode workers is missing"]
        assert await problems(site) == named
