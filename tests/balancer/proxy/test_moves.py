"""Streams of a decode server drained with ``move`` go on elsewhere byte for byte; nobody is blamed."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import pytest
from msgspec import structs

from pdserve.balancer.fleet.worker import Worker
from pdserve.types import RequestShape
from tests.balancer.proxy.test_failover import BATCHES, RID, check_whole, nothing_left, num_frames
from tests.support.balancer_client import Exchange, Reply, Site, running_site
from tests.support.dialects import CHAT, DIALECTS, GENERATE, request_to
from tests.support.fleet_network import D0, D1, P0, Network, all_ready, running_fleet
from tests.support.resumable import Break
from tests.support.sglang_run import Behaviour
from tests.support.sglang_server import FakeSGLang, until


class Stream:
    """A stream that stands still on ``server`` after some events."""

    def __init__(self, exchange: Exchange, server: FakeSGLang, head: bytes) -> None:
        self._exchange = exchange
        self.leave = exchange.leave
        self.head = head
        self.server = server

    async def reply(self) -> Reply:
        """The whole of it."""
        return Reply.of(self.head + await self._exchange.read_until(b"0\r\n\r\n"))


@asynccontextmanager
async def standing(site: Site, path: str, end: Break | None = None, **more: Any) -> AsyncIterator[Stream]:
    """A stream that has come as far as ``end`` says and stands still there."""
    site.decode.breaks.append(end or Break(num_frames(path) - 3, how="hang"))
    before = {fake.name: len(fake.requests) for fake in site.decodes}
    async with site.exchange("POST", path, {**request_to(path, stream=True), **more}) as exchange:
        head = await exchange.read_until(b"\n\n")
        (server,) = [fake for fake in site.decodes if len(fake.requests) > before[fake.name]]
        yield Stream(exchange, server, head)


def member(site: Site, fake: FakeSGLang) -> Worker:
    return next(worker for worker in site.balancer.fleet.workers() if worker.url == fake.url)


async def drain(site: Site, fake: FakeSGLang, **more: object) -> None:
    body = {"draining": True, "move": True, **more}
    assert (await site.ask("PUT", f"/workers/{fake.name}", body)).status == 202


async def is_empty(site: Site, fake: FakeSGLang) -> None:
    """Nothing is left there, of ours or of its own, and nobody was blamed."""
    worker = member(site, fake)
    await until(lambda: not worker.num_inflight and not fake.held, "it is drained")
    events = [event.event for event in site.balancer.fleet.events if event.worker == fake.name]
    assert "drained" in events
    assert not worker.breaker.errors and not worker.failures


def moved(site: Site) -> tuple[int, int, int, int]:
    counts = site.counts
    return counts["moved"], counts["resumed"], counts["retried"], counts["failed"]


@pytest.mark.parametrize("path", DIALECTS)
async def test_a_stream_goes_on_elsewhere_byte_for_byte(path: str) -> None:
    async with running_site(decode=2, resumes=True) as site, standing(site, path) as stream:
        await drain(site, stream.server)
        check_whole(await stream.reply(), path)
        assert moved(site) == (1, 0, 0, 0)
        await is_empty(site, stream.server)
        await nothing_left(site)


async def test_what_is_half_a_frame_is_made_once_more() -> None:
    end = Break(2, 11, "hang")
    async with running_site(decode=2, resumes=True) as site, standing(site, CHAT, end) as stream:
        await drain(site, stream.server)
        check_whole(await stream.reply(), CHAT)
        assert moved(site) == (1, 0, 0, 0)


async def test_eight_streams_at_once() -> None:
    async with running_site(prefill=2, decode=2, resumes=True) as site, AsyncExitStack() as stack:
        streams = [await stack.enter_async_context(standing(site, CHAT)) for _ in range(8)]
        victim = streams[0].server
        there = [stream for stream in streams if stream.server is victim]
        await drain(site, victim)
        await is_empty(site, victim)
        await until(lambda: moved(site) == (len(there), 0, 0, 0), "all go on")
        for stream in there:
            check_whole(await stream.reply(), CHAT)


@pytest.mark.parametrize("kind", BATCHES)
async def test_a_batch(kind: str) -> None:
    path = GENERATE if kind == "samples" else kind
    async with running_site(decode=2, resumes=True) as site:
        whole = await site.ask("POST", path, BATCHES[kind])
        async with standing(site, path, Break(3, how="hang"), **BATCHES[kind]) as stream:
            await drain(site, stream.server)
            assert RID.sub(b"", (await stream.reply()).body) == RID.sub(b"", whole.body)
            assert moved(site) == (1, 0, 0, 0)


async def test_samples_of_a_chat() -> None:
    async with running_site(decode=2, resumes=True) as site:
        whole = await site.ask("POST", CHAT, request_to(CHAT, stream=True, n=2))
        site.decode.breaks.append(Break(2, how="hang"))
        async with standing(site, CHAT, Break(3, how="hang"), n=2) as stream:
            await until(lambda: not site.decode.breaks, "both samples run")
            for fake in site.decodes:
                await drain(site, fake)
                await is_empty(site, fake)
                await site.ask("PUT", f"/workers/{fake.name}", {"draining": False})
                await until(lambda fake=fake: site.state(fake.name) == "ready")
            reply = await stream.reply()
        parts = [sorted(RID.sub(b"", each.body).split(b"\n\n")) for each in (reply, whole)]
        assert parts[0] == parts[1]
        assert moved(site)[0] == site.last["moves"] >= 2


async def test_a_request_that_has_not_begun_is_moved_once_it_has() -> None:
    async with running_site(decode=2, resumes=True) as site:
        gate = asyncio.Event()
        for fake in site.decodes:
            fake.behaviour.gate = gate
        site.decode.breaks.append(Break(2, how="hang"))
        asked = asyncio.create_task(site.ask("POST", CHAT, request_to(CHAT, stream=True)))
        await until(lambda: any(fake.requests for fake in site.decodes), "it is sent")
        (victim,) = [fake for fake in site.decodes if fake.requests]
        await drain(site, victim)
        gate.set()
        check_whole(await asked, CHAT)
        assert moved(site) == (1, 0, 0, 0)
        await is_empty(site, victim)


async def test_moves_use_up_neither_resumes_nor_their_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pdserve.balancer.proxy.resume.MOVE_AGAIN_S", 0.005)
    async with running_site(decode=3, resumes=True, max_resumes=1, resume_ratio=0.0) as site:
        site.decode.breaks.append(Break(2, how="hang"))
        for _ in range(12):
            async with standing(site, CHAT, Break(2, how="hang")) as stream:
                victim = stream.server
                site.decode.breaks.clear()
                await drain(site, victim)
                check_whole(await stream.reply(), CHAT)
            assert (await site.ask("PUT", f"/workers/{victim.name}", {"draining": False})).status == 202
            await until(lambda victim=victim: site.state(victim.name) == "ready")
        assert moved(site) == (12, 0, 0, 0)
        async with standing(site, CHAT, Break(2, how="hang")) as stream:
            site.decode.breaks.append(Break(1, how="503"))  # the server that it is moved to fails it
            await drain(site, stream.server)
            check_whole(await stream.reply(), CHAT)
        assert moved(site) == (13, 1, 0, 0)


async def test_books() -> None:
    async with running_site(decode=2, resumes=True) as site, standing(site, CHAT) as stream:
        await drain(site, stream.server)
        await stream.reply()
        state = (await site.ask("GET", "/pdserve/state")).json
        assert (state["requests"]["moved"], state["requests"]["resumed"]) == (1, 0)
        assert (state["recent"][-1]["moves"], state["recent"][-1]["resumes"]) == (1, 0)
        gaps = state["latency"]["move_gap_s"], state["latency"]["resume_gap_s"]
        assert (gaps[0]["count"], gaps[1]["count"]) == (1, 0)
        events = {event["event"]: event for event in state["events"]}
        assert events["moved"]["worker"] != stream.server.name and "resumed" not in events
        metrics = (await site.ask("GET", "/metrics")).body
        assert b'pdserve:resumes_total{cause="moved"} 1' in metrics
        assert b'pdserve:resumes_total{cause="failed"} 0' in metrics
        assert b"pdserve:move_gap_seconds_count 1" in metrics


async def test_the_next_pair_fails_before_its_first_frame() -> None:
    async with running_site(decode=3, resumes=True) as site, standing(site, CHAT) as stream:
        site.decode.breaks.append(Break(0))
        await drain(site, stream.server)
        check_whole(await stream.reply(), CHAT)
        assert moved(site) == (0, 1, 0, 0)
        await nothing_left(site)


# -- what is waited for ------------------------------------------------------------------------


@asynccontextmanager
async def waiting(site: Site, **more: Any) -> AsyncIterator[Stream]:
    """A standing stream that can go on by itself."""
    for fake in site.decodes:
        fake.behaviour = Behaviour(go_on=asyncio.Event())
    end = Break(num_frames(CHAT) - 3, how="hang", **more)
    async with standing(site, CHAT, end) as stream:
        yield stream


async def finishes_where_it_is(
    site: Site, stream: Stream, *, move: bool = True, num_looks: int = 2, num_resumed: int = 0
) -> None:
    """So many looks at it move nothing; it ends, and the server is drained then."""
    worker, mover, looks = member(site, stream.server), site.balancer.dispatcher.mover, []
    look = mover.look
    mover.look = lambda: [looks.append(1), look()][1]  # type: ignore[method-assign]
    await drain(site, stream.server, move=move)
    await until(lambda: len(looks) >= num_looks, "it was looked at")
    assert worker.num_inflight == 1
    assert stream.server.behaviour.go_on is not None
    stream.server.behaviour.go_on.set()
    check_whole(await stream.reply(), CHAT)
    assert moved(site) == (0, num_resumed, 0, 0)
    await is_empty(site, stream.server)
    await nothing_left(site)


async def test_an_answer_that_cannot_be_resumed_is_waited_for() -> None:
    async with running_site(decode=2, resumes=True) as site, waiting(site, obstacle="beam") as stream:
        await finishes_where_it_is(site, stream)


async def test_without_another_decode_server_it_is_waited_for() -> None:
    async with running_site(prefill=2, decode=1, resumes=True) as site, waiting(site) as stream:
        await finishes_where_it_is(site, stream)


async def test_a_stock_decode_server_beside_it_takes_nothing() -> None:
    async with running_site(decode=2, resumes=True) as site, waiting(site) as stream:
        (other,) = [fake for fake in site.decodes if fake is not stream.server]
        worker = member(site, other)
        site.balancer.fleet.health.worker_learned(worker, structs.replace(worker.info, resume_id=""))
        await finishes_where_it_is(site, stream)


@pytest.mark.parametrize("told", [{"is_paused": True}, {"num_updates": 1}], ids=["paused", "loads weights"])
async def test_a_server_that_stands_still_takes_nothing(told: dict[str, Any]) -> None:
    async with running_site(decode=2, resumes=True) as site, waiting(site) as stream:
        (other,) = [fake for fake in site.decodes if fake is not stream.server]
        for name, value in told.items():
            setattr(member(site, other), name, value)
        await finishes_where_it_is(site, stream)


async def test_after_as_many_resumes_as_it_may_have_it_is_waited_for() -> None:
    async with running_site(decode=3, resumes=True, max_resumes=1) as site:
        for fake in site.decodes:
            fake.behaviour = Behaviour(go_on=asyncio.Event())
        site.decode.breaks.extend([Break(2), Break(1, how="hang")])
        async with site.exchange("POST", CHAT, request_to(CHAT, stream=True)) as exchange:
            head = await exchange.read_until(b"\n\n")
            await until(lambda: site.counts["resumed"] == 1, "it was resumed")
            (server,) = [fake for fake in site.decodes if any("pdserve_resume" in r for r in fake.requests)]
            await finishes_where_it_is(site, Stream(exchange, server, head), num_resumed=1)


async def test_it_waits_where_it_is_until_another_pair_has_room() -> None:
    async with running_site(decode=2, resumes=True) as site, standing(site, CHAT) as stream:
        placement, tries = site.balancer.fleet.scheduler.admission.placement, []
        place = placement.place

        def full_at_first(shape: RequestShape, *args: Any) -> Any:
            tries.append(shape)
            return place(shape, *args) if len(tries) > 2 else None

        placement.place = full_at_first  # type: ignore[method-assign]
        await drain(site, stream.server)
        check_whole(await stream.reply(), CHAT)
        assert len(tries) == 3 and all(shape.is_resumed for shape in tries)
        assert site.last["queued_s"] < 0.1  # it has waited nowhere
        assert moved(site) == (1, 0, 0, 0)


async def test_a_drain_without_move_and_one_that_was_ended_move_nothing() -> None:
    async with running_site(decode=2, resumes=True) as site, waiting(site, obstacle="beam") as stream:
        await drain(site, stream.server)
        await site.ask("PUT", f"/workers/{stream.server.name}", {"draining": False})
        await finishes_where_it_is(site, stream, move=False, num_looks=0)
        assert not member(site, stream.server).is_moving


# -- in the gap --------------------------------------------------------------------------------


@pytest.mark.parametrize("path", DIALECTS)
async def test_a_client_that_leaves_in_the_gap_leaves_nothing_running(path: str) -> None:
    async with running_site(decode=2, resumes=True) as site, standing(site, path) as stream:
        site.decode.breaks.append(Break(0, how="hang"))
        await drain(site, stream.server)
        await until(lambda: not site.decode.breaks, "the next leg hangs")
        stream.leave()
        await until(lambda: site.counts["aborted"] == 1)
        await nothing_left(site)


async def test_an_abort_by_the_id_that_the_client_knows() -> None:
    async with running_site(decode=2, resumes=True) as site, standing(site, CHAT) as stream:
        rid = RID.search(stream.head.partition(b"\r\n\r\n")[2])
        assert rid is not None
        site.decode.breaks.append(Break(1, how="hang"))
        await drain(site, stream.server)
        await until(lambda: site.counts["moved"] == 1)
        (other,) = [fake for fake in site.decodes if fake is not stream.server]
        assert (await site.ask("POST", "/abort_request", {"rid": rid[0].decode()})).status == 200
        await until(lambda: other.requests[-1]["rid"] in other.aborts)


async def test_a_server_that_leaves_by_itself_is_emptied() -> None:
    """SIGTERM: it ends as soon as it has nothing more, so its streams need not be waited for."""
    async with running_fleet(Network()) as fleet:
        fleet.apply([P0, D0, D1])
        await all_ready(fleet)
        fleet.apply([P0, structs.replace(D0, is_leaving=True), D1])
        (leaving,) = [worker for worker in fleet.workers() if worker.is_moving]
        assert leaving.worker_id == D0.worker_id and fleet.has_moving.is_set()
