"""Another server at a static worker's address is asked who it is before it serves under the old name."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager

import pytest

from pdserve.scheduling.policy.pair_cost import PairCost
from pdserve.types import Role
from tests.support.balancer_client import Site, running_site
from tests.support.sglang_server import FakeSGLang, until

PLAIN = {"text": "a long prompt " * 100}


async def another(
    stack: AsyncExitStack, old: FakeSGLang, *, model: str = "", role: Role | None = None
) -> FakeSGLang:
    """Another process on the same port, perhaps with another model or role."""
    if not old.is_dead:
        await old.stop()
    new = FakeSGLang(role or old.role, name=old.name)
    new.weights.path = model or new.weights.path
    await new.start(old.port)
    stack.push_async_callback(new.stop)
    return new


@asynccontextmanager
async def site_of(decode: int) -> AsyncIterator[tuple[Site, AsyncExitStack]]:
    async with running_site(decode=decode, load_poll_s=0.02) as site, AsyncExitStack() as stack:
        yield site, stack


async def killed(site: Site, fake: FakeSGLang) -> None:
    fake.kill()
    await until(lambda: site.state(fake.name) == "suspect", "it is noticed")


def why_out(site: Site, name: str) -> str:
    return next(w.mismatch for w in site.balancer.fleet.workers() if w.worker_id == name)


async def test_another_model_is_named_and_stays_out_until_the_right_one_is_back() -> None:
    async with site_of(decode=2) as (site, stack):
        await killed(site, site.decode)
        wrong = await another(stack, site.decode, model="other-model")
        await until(lambda: "serves other-model now; fake-model was there" in why_out(site, "decode-0"))
        assert [(await site.generate(PLAIN)).status for _ in range(4)] == [200] * 4
        assert wrong.requests == []
        entry = (await site.ask("GET", "/pdserve/state")).json["workers"][1]
        assert (entry["state"], "other-model" in entry["mismatch"]) == ("suspect", True)
        await another(stack, wrong)
        await until(lambda: site.state("decode-0") == "ready", "the right one")
        assert why_out(site, "decode-0") == ""


async def test_another_role_is_named_and_stays_out() -> None:
    async with site_of(decode=2) as (site, stack):
        await killed(site, site.decode)
        wrong = await another(stack, site.decode, role=Role.PREFILL)
        await until(lambda: "a decode server was expected there" in why_out(site, "decode-0"))
        assert [(await site.generate(PLAIN)).status for _ in range(4)] == [200] * 4
        assert wrong.requests == []


async def test_a_whole_fleet_may_be_restarted_with_another_model() -> None:
    async with site_of(decode=1) as (site, stack):
        for fake in site.fakes:
            await killed(site, fake)
        for fake in site.fakes:
            await another(stack, fake, model="next-model")
        await until(lambda: {site.state(fake.name) for fake in site.fakes} == {"ready"}, "all agree")
        assert {w.info.model for w in site.balancer.fleet.workers()} == {"next-model"}


@pytest.mark.parametrize("is_noticed", [True, False], ids=["noticed", "between two polls"])
async def test_the_prompt_tree_forgets_what_a_dead_process_had_cached(is_noticed: bool) -> None:
    async with site_of(decode=1) as (site, stack):
        prefill = site.prefill
        prefill.load = {"total_prefill_uncached_tokens": 5000}
        await site.generate(PLAIN)
        policy = site.balancer.fleet.scheduler.policy
        assert isinstance(policy, PairCost)
        worker = site.balancer.fleet.workers()[0]
        polled = len(prefill.calls)
        await until(lambda: len(prefill.calls) > polled + 4, "its counters are known")
        assert policy.tree.size_bytes(worker.instance_id) > 0
        if is_noticed:
            await killed(site, prefill)
        await another(stack, prefill)
        await until(lambda: policy.tree.size_bytes(worker.instance_id) == 0, "forgotten")
        await until(lambda: site.state("prefill-0") == "ready", "it serves again")
        assert (await site.generate(PLAIN)).status == 200


async def test_the_same_process_keeps_its_prefixes_after_a_hiccup() -> None:
    async with site_of(decode=1) as (site, _):
        await site.generate(PLAIN)
        policy, worker = site.balancer.fleet.scheduler.policy, site.balancer.fleet.workers()[0]
        assert isinstance(policy, PairCost)
        site.balancer.fleet.health.worker_silent(worker, "a lost packet")
        await until(lambda: site.state("prefill-0") == "ready", "it serves again")
        assert policy.tree.size_bytes(worker.instance_id) > 0
