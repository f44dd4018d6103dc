"""An answer that was begun with one version of the weights does not go on on a server with another one."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from pdserve.balancer.fleet.weights import Change, Weights
from tests.balancer.proxy.test_failover import check_whole, nothing_left
from tests.support.balancer_client import Exchange, Reply, Site, running_site
from tests.support.dialects import CHAT, request_to
from tests.support.resumable import Break
from tests.support.sglang_server import FakeSGLang, until

DISK, VERSION = "/update_weights_from_disk", "/update_weight_version"
LOAD = "/load_lora_adapter"
NEW = {"model_path": "new-model", "weight_version": "v2"}
LORA = {"lora_name": "poet", "lora_path": "/adapters/poet"}
ADAPTER = Change(LOAD, "poet", "/adapters/poet")


async def begun(site: Site, exchange: Exchange) -> tuple[bytes, FakeSGLang]:
    """The first event of the stream, and the server that stands still in it."""
    head = await exchange.read_until(b"\n\n")
    (server,) = [fake for fake in site.decodes if any(request.get("stream") for request in fake.requests)]
    return head, server


async def update(site: Site, path: str, body: dict[str, Any]) -> None:
    """All servers are told; the one with the stream carries it out too, as SGLang does in a pause."""
    assert (await site.ask("POST", path, body)).status == 200
    await until(lambda: all(site.state(fake.name) == "ready" for fake in site.fakes), "all serve")


@pytest.mark.parametrize(
    ("path", "body"),
    [(DISK, NEW), (VERSION, {"new_version": "v2", "abort_all_requests": False})],
    ids=["other weights", "another version"],
)
async def test_a_stream_of_the_old_weights_breaks_rather_than_to_go_on_with_new_ones(
    path: str, body: dict[str, Any]
) -> None:
    async with running_site(prefill=2, decode=3, resumes=True) as site:
        site.decode.breaks.append(Break(2, how="hang"))
        async with site.exchange("POST", CHAT, request_to(CHAT, stream=True)) as exchange:
            head, server = await begun(site, exchange)
            await update(site, path, body)
            server.kill()
            reply = Reply.of(head + await exchange.read_until(b"0\r\n\r\n"))
        assert b'"error"' in reply.body and site.counts["failed"] == 1 and site.counts["resumed"] == 0
        assert not any("pdserve_resume" in request for fake in site.fakes for request in fake.requests)
        await nothing_left(site)


async def test_servers_that_an_operator_has_told_ahead_of_the_others_do_not_get_it() -> None:
    async with running_site(prefill=2, decode=3, resumes=True) as site:
        site.decode.breaks.append(Break(2, how="hang"))
        async with site.exchange("POST", CHAT, request_to(CHAT, stream=True)) as exchange:
            head, server = await begun(site, exchange)
            other, told = [fake for fake in site.decodes if fake is not server]
            assert (await site.ask("POST", f"{DISK}?worker={told.name}", NEW)).status == 200
            server.kill()
            reply = Reply.of(head + await exchange.read_until(b"0\r\n\r\n"))
        check_whole(reply, CHAT)
        assert any("pdserve_resume" in request for request in other.requests)
        assert not any("pdserve_resume" in request for request in told.requests)


async def test_an_update_while_it_waits_for_a_pair() -> None:
    """Its server is down, and the only other one has no room: when it has, it has new weights too."""
    async with running_site(prefill=2, decode=2, resumes=True) as site:
        site.decode.breaks.append(Break(2, how="hang"))
        async with site.exchange("POST", CHAT, request_to(CHAT, stream=True)) as exchange:
            head, server = await begun(site, exchange)
            scheduler, tries = site.balancer.fleet.scheduler, []
            placement = scheduler.admission.placement
            place = placement.place
            placement.place = lambda *args: tries.append(args)  # type: ignore[method-assign, func-returns-value]
            server.kill()
            await until(lambda: tries, "it waits")
            placement.place = place  # type: ignore[method-assign]
            updates, change = site.balancer.fleet.updates, Change(DISK, "new-model", "v2")
            workers = [w for w in site.balancer.fleet.workers() if w.url != server.url]
            with updates.update(change, workers, is_whole=True) as update_:
                for worker in workers:
                    update_.told(worker, is_done=True)
            scheduler.serve()
            reply = Reply.of(head + await exchange.read_until(b"0\r\n\r\n"))
        assert b'"error"' in reply.body and site.counts["resumed"] == 0
        assert not any("pdserve_resume" in request for fake in site.fakes for request in fake.requests)
        await nothing_left(site)


async def test_it_is_not_moved_there_either() -> None:
    async with running_site(prefill=2, decode=2, resumes=True) as site:
        go_on = asyncio.Event()
        for fake in site.decodes:
            fake.behaviour.go_on = go_on
        site.decode.breaks.append(Break(2, how="hang"))
        async with site.exchange("POST", CHAT, request_to(CHAT, stream=True)) as exchange:
            head, server = await begun(site, exchange)
            await update(site, DISK, NEW)
            await site.ask("PUT", f"/workers/{server.name}", {"draining": True, "move": True})
            assert site.balancer.dispatcher.mover.look(), "its server still has it"
            assert site.counts["moved"] == 0
            go_on.set()
            reply = Reply.of(head + await exchange.read_until(b"0\r\n\r\n"))
        check_whole(reply, CHAT)
        assert site.counts["moved"] == site.counts["resumed"] == 0


async def test_an_adapter_that_came_since_is_no_reason_and_one_that_went_is() -> None:
    async with running_site(prefill=2, decode=2, resumes=True) as site:
        site.decode.breaks.append(Break(2, how="hang"))
        async with site.exchange("POST", CHAT, request_to(CHAT, stream=True)) as exchange:
            head, server = await begun(site, exchange)
            await update(site, LOAD, LORA)
            server.kill()
            check_whole(Reply.of(head + await exchange.read_until(b"0\r\n\r\n")), CHAT)
        assert site.counts["resumed"] == 1


@pytest.mark.parametrize(
    ("begun_with", "now", "is_same"),
    [
        (Weights(), Weights(), True),
        (Weights(), Weights(adapters=(ADAPTER,)), True),
        (Weights(adapters=(ADAPTER,)), Weights(), False),
        (Weights(adapters=(ADAPTER,)), Weights(adapters=(Change(LOAD, "poet", "/adapters/other"),)), False),
        (Weights(), Weights(version="v2"), False),
        (Weights(), Weights(is_pushed=True, count=1), False),
        (Weights(base=Change(DISK, "a")), Weights(base=Change(DISK, "b")), False),
        (Weights(base=Change(DISK, "a"), count=1), Weights(base=Change(DISK, "a"), count=2), False),
    ],
)
def test_which_weights_go_on_with_which(begun_with: Weights, now: Weights, is_same: bool) -> None:
    assert now.continues(begun_with) is is_same
