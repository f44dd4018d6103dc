"""A prefill server that dies while it sends KV costs no answer: it is tried again, or resumed again."""

from __future__ import annotations

import asyncio

import pytest

from tests.balancer.proxy.test_failover import check_whole, nothing_left, num_frames
from tests.support.balancer_client import Site, running_site
from tests.support.dialects import CHAT, DIALECTS, request_to
from tests.support.resumable import Break
from tests.support.sglang_pairing import Hold, Point, Rendezvous, Way
from tests.support.sglang_server import FakeSGLang, until


def meet(site: Site) -> None:
    """From now on decode waits for its KV."""
    rendezvous = Rendezvous()
    for fake in site.fakes:
        fake.rendezvous = rendezvous


def hold_next(site: Site) -> Hold:
    """Stop the next request that comes to a prefill server before its KV travels."""
    hold = Hold(Point.ADMITTED)
    for fake in site.prefills:
        fake.holds = [hold]
    return hold


def killed(site: Site) -> list[FakeSGLang]:
    return [fake for fake in site.fakes if fake.is_dead]


@pytest.mark.parametrize("path", DIALECTS)
@pytest.mark.parametrize("is_stream", [True, False], ids=["stream", "whole"])
async def test_before_the_first_frame_the_whole_is_tried_again(path: str, is_stream: bool) -> None:
    async with running_site(prefill=2, resumes=True) as site:
        meet(site)
        hold = hold_next(site)
        asked = asyncio.create_task(site.ask("POST", path, request_to(path, stream=is_stream)))
        await until(lambda: hold.is_reached and site.decode.requests, "decode waits for the KV")
        hold.release(Way.KILLED)
        reply = await asked
        assert reply.status == 200
        if is_stream:
            check_whole(reply, path)
        assert (site.counts["retried"], site.counts["resumed"], site.counts["failed"]) == (1, 0, 0)
        first, second = site.decode.requests
        assert first["bootstrap_room"] != second["bootstrap_room"] and "pdserve_resume" not in second
        assert [site.state(fake.name) for fake in site.prefills if fake not in killed(site)] == ["ready"]
        assert site.state("decode-0") == "ready"
        await nothing_left(site)


@pytest.mark.parametrize("path", DIALECTS)
async def test_in_a_resume_it_is_resumed_once_more_from_the_same_frame(path: str) -> None:
    async with running_site(prefill=3, decode=2, resumes=True) as site:
        meet(site)
        first = hold_next(site)
        site.decode.breaks.append(Break(num_frames(path) - 3, how="503"))
        asked = asyncio.create_task(site.ask("POST", path, request_to(path, stream=True)))
        await until(lambda: first.is_reached)
        second = hold_next(site)
        first.release()
        await until(lambda: second.is_reached, "the resumed leg's KV is to travel")
        second.release(Way.KILLED)
        check_whole(await asked, path)
        assert [fake.role for fake in killed(site)] == ["prefill"]
        assert (site.counts["resumed"], site.counts["failed"]) == (1, 0)
        fields = [r["pdserve_resume"] for d in site.decodes for r in d.requests if "pdserve_resume" in r]
        assert len(fields) == 2 and fields[0] == fields[1]
        await nothing_left(site)


async def test_in_a_move_it_is_resumed() -> None:
    async with running_site(prefill=3, decode=3, resumes=True) as site:
        meet(site)
        site.decode.breaks.append(Break(3, how="hang"))
        async with site.exchange("POST", CHAT, request_to(CHAT, stream=True)) as exchange:
            await exchange.read_until(b"\n\n")
            (server,) = [fake for fake in site.decodes if fake.requests]
            hold = hold_next(site)
            await site.ask("PUT", f"/workers/{server.name}", {"draining": True, "move": True})
            await until(lambda: hold.is_reached, "the KV is to travel to another decode server")
            hold.release(Way.KILLED)
            rest = await exchange.read_until(b"0\r\n\r\n")
        assert rest.rstrip().endswith(b"data: [DONE]\n\n\r\n0")
        assert (site.counts["moved"], site.counts["resumed"], site.counts["failed"]) == (0, 1, 0)
        await nothing_left(site)
