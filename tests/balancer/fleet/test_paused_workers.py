"""A paused worker, whoever paused it, keeps its requests and gets new ones only if nobody else can serve."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from tests.support.balancer_client import Site, running_site
from tests.support.sglang_server import FakeSGLang, until

PLAIN = {"text": "hi"}
WEDGE_S = 0.1
MANY_POLLS = 40


async def running(site: Site) -> tuple[FakeSGLang, asyncio.Task[Any]]:
    """A request in decode's hands, and where it is; that worker's counters stand still from now on."""
    for fake in site.decodes:
        fake.behaviour.gate = asyncio.Event()
    task = asyncio.create_task(site.generate(PLAIN))
    await until(lambda: any(fake.requests for fake in site.decodes), "request in flight")
    holder = next(fake for fake in site.decodes if fake.requests)
    holder.load = {"num_running_reqs": 1}
    for fake in site.decodes:
        if fake is not holder:
            fake.behaviour.gate = None
    for worker in site.balancer.fleet.workers():
        worker.view.step_base_s = worker.view.step_slope_s = 0.0  # no more patience than WEDGE_S
    return holder, task


async def polled(fake: FakeSGLang) -> None:
    """Far longer than WEDGE_S, by the worker's own count of polls."""
    num_before = len(fake.calls)
    await until(lambda: len(fake.calls) >= num_before + MANY_POLLS, "many polls")


def paused(site: Site) -> list[str]:
    return [worker.worker_id for worker in site.balancer.fleet.workers() if worker.is_paused]


@pytest.mark.parametrize("by", ["balancer", "engine"])
async def test_requests_of_a_paused_worker_wait_and_are_not_killed(by: str) -> None:
    async with running_site(decode=2, load_poll_s=0.01, wedge_s=WEDGE_S) as site:
        holder, task = await running(site)
        if by == "engine":
            holder.moving.clear()
        else:
            path = f"/pause_generation?worker={holder.name}"
            assert (await site.ask("POST", path, {"mode": "in_place"})).status == 200
        await polled(holder)
        assert (site.state(holder.name), task.done()) == ("ready", False)
        assert not [event for event in site.balancer.fleet.events if event.event == "wedged"]
        holder.moving.set()
        assert holder.behaviour.gate is not None
        holder.behaviour.gate.set()
        assert (await task).status == 200
        await until(lambda: not paused(site), "it goes on")


async def test_a_worker_that_stands_still_after_its_pause_is_still_found_out() -> None:
    async with running_site(decode=2, load_poll_s=0.01, wedge_s=WEDGE_S) as site:
        holder, task = await running(site)
        holder.moving.clear()
        await until(lambda: paused(site) == [holder.name])
        holder.moving.set()
        assert (await task).status == 200, "on the other one"
        assert "wedged" in [event.event for event in site.balancer.fleet.events]


async def test_no_request_goes_to_a_paused_worker_while_another_can_serve() -> None:
    async with running_site(decode=2, load_poll_s=0.01) as site:
        site.decode.moving.clear()
        await until(lambda: paused(site) == ["decode-0"], "known from the engine")
        assert [(await site.generate(PLAIN)).status for _ in range(4)] == [200] * 4
        assert (len(site.decode.requests), len(site.decodes[1].requests)) == (0, 4)
        assert (await site.ask("GET", "/ready")).status == 200
        row = (await site.ask("GET", "/pdserve/state")).json["workers"][1]
        assert (row["worker_id"], row["paused"]) == ("decode-0", True)
        site.decode.moving.set()
        await until(lambda: not paused(site), "it goes on")


async def test_with_everyone_paused_requests_wait_for_the_end_of_it() -> None:
    async with running_site(decode=2, load_poll_s=0.01) as site:
        assert (await site.ask("POST", "/pause_generation", {"mode": "in_place"})).status == 200
        assert paused(site) == ["prefill-0", "decode-0", "decode-1"]
        reply = await site.ask("GET", "/ready")
        assert reply.status == 503
        assert "prefill-0, decode-0, decode-1" in reply.json["error"]["message"]
        assert (await site.ask("GET", "/health")).status == 200
        task = asyncio.create_task(site.generate(PLAIN))
        await until(lambda: site.prefill.requests, "handed on, to wait in the engine as on one server")
        assert (await site.ask("POST", "/continue_generation", {})).status == 200
        assert (await task).status == 200
        assert (await site.ask("GET", "/ready")).status == 200


async def test_going_on_for_one_worker_does_not_unpause_the_others() -> None:
    async with running_site(decode=2, load_poll_s=60.0) as site:
        await site.ask("POST", "/pause_generation", {"mode": "in_place"})
        await site.ask("POST", "/continue_generation?worker=decode-1", {})
        assert paused(site) == ["prefill-0", "decode-0"]
        assert (await site.ask("GET", "/ready")).status == 503
        await site.ask("POST", "/continue_generation?worker=prefill-0", {})
        assert (await site.ask("GET", "/ready")).status == 200


async def test_a_server_that_is_only_unwell_is_not_paused() -> None:
    """SGLang's /ready is 503 for both; its /ping tells them apart."""
    async with running_site(decode=2, load_poll_s=0.01) as site:
        answer = site.decode.answer

        async def unwell(connection: Any, method: str, path: str, body: bytes) -> None:
            if path in ("/ready", "/ping"):
                connection.respond(503, b"")
            else:
                await answer(connection, method, path, body)

        site.decode.answer = unwell  # type: ignore[method-assign]
        await polled(site.decode)
        assert paused(site) == []
