"""Faults of requests that are more than one prompt, of two legs at once, and of what surrounds a request."""

from __future__ import annotations

import asyncio
import itertools
import json
import random
from typing import Any

import pytest

from pdserve.types import Role
from tests.faults.site import Site, running_site
from tests.support.sglang_pairing import Point, Way
from tests.support.sglang_run import PROBE_IDS
from tests.support.sglang_server import FakeSGLang, until
from tests.support.wire import Wire, WireReply

PLAIN = {"text": "hi"}
BATCH = {"text": ["a", "b", "c"]}
SAMPLES = {"text": "a", "sampling_params": {"n": 3}}
CHAT = {"messages": [{"role": "user", "content": "hi"}], "n": 3}
PROMPTS = {"prompt": ["a", "b"], "n": 2}
MANY = {
    "batch": ("/generate", BATCH, 3),
    "samples": ("/generate", SAMPLES, 3),
    "prompts": ("/v1/completions", PROMPTS, 4),
    "chat": ("/v1/chat/completions", CHAT, 3),
}
"""Path, body, and how many rooms it takes."""
LEG_ENDS = (
    Way.STATUS_500, Way.RESET_BEFORE_HEAD, Way.RESET_MID_BODY, Way.FIN_BEFORE_HEAD, Way.FIN_MID_BODY,
    Way.GARBAGE, Way.KILLED,
)  # fmt: skip


async def ask(site: Site, path: str, body: object) -> WireReply:
    """One request on a connection of its own."""
    async with Wire.open(site.url) as wire:
        wire.send_json(path, body)
        return await wire.reply()


def rooms_sent(fake: FakeSGLang) -> list[int]:
    """Every room the worker was sent, probes left out."""
    rooms = [r["bootstrap_room"] for r in fake.requests if r.get("input_ids") != PROBE_IDS]
    return [room for item in rooms for room in (item if isinstance(item, list) else [item])]


def num_choices(path: str, reply: WireReply) -> int:
    """Answers in the answer."""
    return len(reply.json if path == "/generate" else reply.json["choices"])


# -- several prompts, several samples ----------------------------------------------------------------


@pytest.mark.parametrize("role", list(Role))
@pytest.mark.parametrize("way", [Way.STATUS_500, Way.RESET_MID_BODY, Way.SILENCE], ids=lambda way: way.value)
@pytest.mark.parametrize("kind", MANY)
async def test_many_prompts_are_tried_again_with_new_rooms(kind: str, way: Way, role: Role) -> None:
    path, body, size = MANY[kind]
    settings = {"request_s": 0.3} if way is Way.SILENCE else {}
    async with running_site(2, 2, **settings) as site:
        await site.drop_kept()
        hold = site.hold(role, Point.ADMITTED)
        hold.release(way)
        reply = await ask(site, path, body)
        assert (reply.status, num_choices(path, reply)) == (200, size)
        await site.check_clean()
        sent = [room for fake in site.of(role) for room in rooms_sent(fake)]
        again = size if kind != "chat" else 1  # a chat's samples are requests of their own
        assert len(sent) == len(set(sent)) == size + again
        assert site.counts["retried"] == 1


@pytest.mark.parametrize("kind", MANY)
async def test_many_prompts_that_are_refused_leave_nothing(kind: str) -> None:
    path, body, _ = MANY[kind]
    async with running_site(2, 2) as site:
        hold = site.hold(Role.DECODE, Point.ADMITTED)
        hold.release(Way.STATUS_400)
        reply = await ask(site, path, body)
        assert (reply.status, reply.json["error"]["message"]) == (400, "the fake was told to fail")
        await site.check_clean()
        await site.check_blame([{}])
        assert site.counts["retried"] == 0


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("kind", MANY)
async def test_client_leaving_many_prompts_frees_every_room(kind: str, stream: bool) -> None:
    path, body, size = MANY[kind]
    async with running_site() as site:
        hold = site.hold(Role.DECODE, Point.RECEIVED)
        async with Wire.open(site.url) as wire:
            wire.send_json(path, {**body, "stream": stream})
            await until(
                lambda: hold.is_reached and len(rooms_sent(site.decode)) == size, "all rooms on decode"
            )
            wire.leave()
            await site.check_clean()
        await site.check_blame([{}])
        assert site.counts["aborted"] == 1


@pytest.mark.parametrize("way", [Way.RESET_MID_BODY, Way.FIN_MID_BODY, Way.KILLED], ids=lambda way: way.value)
@pytest.mark.parametrize("kind", MANY)
async def test_many_prompts_broken_in_mid_stream_end_with_one_error(kind: str, way: Way) -> None:
    path, body, _ = MANY[kind]
    async with running_site() as site:
        hold = site.hold(Role.DECODE, Point.STREAMING)
        async with Wire.open(site.url) as wire:
            wire.send_json(path, {**body, "stream": True})
            await wire.until_sight_of(b"\n\n")
            hold.release(way)
            reply = await wire.reply()
        events = [json.loads(event) for event in reply.events]
        assert events[-1]["error"]["code"] == 502
        assert not any("error" in event for event in events[:-1])
        await site.check_clean()


async def test_sample_that_cannot_be_served_ends_its_siblings() -> None:
    """One of three requests of a chat fails for good while the others stream."""
    async with running_site(max_retries=0) as site:
        holds = [site.hold(Role.DECODE, Point.STREAMING) for _ in range(2)]
        last = site.hold(Role.DECODE, Point.RECEIVED)
        async with Wire.open(site.url) as wire:
            wire.send_json("/v1/chat/completions", {**CHAT, "stream": True})
            await until(lambda: last.is_reached, "the first sample at decode")
            last.release()
            await until(lambda: all(hold.is_reached for hold in holds), "two samples streaming")
            holds[0].release(Way.RESET_MID_BODY)
            reply = await wire.reply()
        assert json.loads(reply.events[-1])["error"]["code"] == 502
        await site.check_clean()


@pytest.mark.parametrize("way", LEG_ENDS, ids=lambda way: way.value)
async def test_answer_that_needs_prefills_waits_for_it_or_is_tried_again(way: Way) -> None:
    """Prompt logprobs are prefill's: decode's complete answer is worth nothing without them."""
    async with running_site(2, 1) as site:
        await site.drop_kept()
        hold = site.hold(Role.PREFILL, Point.ANSWERING)
        async with Wire.open(site.url) as wire:
            wire.send_json("/generate", {**PLAIN, "return_logprob": True, "logprob_start_len": 0})
            await until(lambda: hold.is_reached, "prefill about to answer")
            await until(lambda: not site.decode.num_exchanges, "decode's answer complete")
            assert not wire.seen
            hold.release(way)
            reply = await wire.reply()
        assert reply.status == 200
        assert len(reply.json["meta_info"]["input_token_logprobs"]) == 2
        await site.check_clean()
        assert site.counts["retried"] == 1


# -- kept connections --------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("way", [Way.RESET_BEFORE_HEAD, Way.FIN_BEFORE_HEAD], ids=lambda way: way.value)
@pytest.mark.parametrize("role", list(Role))
async def test_kept_connection_that_breaks_is_nobodys_fault_and_the_room_is_not_used_again(
    role: Role, way: Way, stream: bool
) -> None:
    """Whether the worker had closed it unused or at work cannot be told: so the room is given up."""
    async with running_site() as site:
        hold = site.hold(role, Point.ADMITTED)
        hold.release(way)
        reply = await ask(site, "/generate", {**PLAIN, "stream": stream})
        assert reply.status == 200
        await site.check_clean()
        await site.check_blame([{}])
        assert len(set(rooms_sent(site.prefill))) == len(rooms_sent(site.prefill)) == 2


@pytest.mark.parametrize("role", list(Role))
async def test_worker_that_dies_at_a_kept_connection_is_found_out(role: Role) -> None:
    async with running_site(2, 2) as site:
        for fake in site.of(role)[:1]:
            fake.kill_at_request = True
        for _ in range(6):
            assert (await ask(site, "/generate", PLAIN)).status == 200
        dead = [fake for fake in site.of(role) if fake.is_dead]
        assert dead, "never chosen"
        await until(lambda: not site.breaker(dead[0]).is_closed, "the dead worker's breaker open")
        await site.check_clean()


# -- two faults at once --------------------------------------------------------------------------------


ENDS = (Way.STATUS_400, *LEG_ENDS)


def two_ways() -> list[object]:
    """Every pair; each end once on either leg with ``make test``, the others with ``make test-all``."""
    covering = [(Way.STATUS_400, Way.STATUS_400), *zip(ENDS, ENDS[1:] + ENDS[:1], strict=True)]
    return [
        pytest.param(
            ways,
            id="-and-".join(way.value for way in ways),
            marks=pytest.mark.slow if ways in covering else pytest.mark.exhaustive,
        )
        for ways in itertools.product(ENDS, repeat=2)
    ]


@pytest.mark.parametrize("ways", two_ways())
async def test_two_faults_at_once_leave_nothing(ways: tuple[Way, Way]) -> None:
    async with running_site(2, 2) as site:
        await site.drop_kept()
        holds = [site.hold(Role.PREFILL, Point.ADMITTED), site.hold(Role.DECODE, Point.ADMITTED)]
        async with Wire.open(site.url) as wire:
            wire.send_json("/generate", {**PLAIN, "stream": True})
            await until(lambda: all(hold.is_reached for hold in holds), "both legs admitted")
            for hold, way in zip(holds, ways, strict=True):
                hold.release(way)
            reply = await wire.reply()
        if ways == (Way.KILLED, Way.KILLED):
            assert reply.status == 500, "two servers died under it: not tried on a third"
        elif Way.STATUS_400 in ways:
            assert reply.status in (200, 400)
        else:
            assert reply.status == 200
        await site.check_clean()
        if ways == (Way.STATUS_400, Way.STATUS_400):
            await site.check_blame([{}])
        assert sum(site.errors().values()) <= 2


@pytest.mark.parametrize("role", list(Role))
async def test_client_gone_at_the_moment_a_leg_fails_leaves_nothing(role: Role) -> None:
    async with running_site(2, 2) as site:
        for _ in range(20):
            hold = site.hold(role, Point.ADMITTED)
            async with Wire.open(site.url) as wire:
                wire.send_json("/generate", PLAIN)
                await until(lambda hold=hold: hold.is_reached, "the request admitted")
                hold.release(Way.STATUS_500)
                wire.leave()
        await site.check_clean()


# -- what surrounds a request --------------------------------------------------------------------------


async def test_retries_are_bounded_by_the_budget() -> None:
    """Ten, and a tenth of the requests: an outage must not double the load."""
    num_requests = 60
    async with running_site(3, 3, retry_ratio=0.1, max_retries=2, breaker_failures=1000) as site:
        for fake in site.of(Role.DECODE):
            fake.behaviour.status = 500
        statuses = [(await ask(site, "/generate", PLAIN)).status for _ in range(num_requests)]
        assert set(statuses) <= {500, 502}  # 500: a second worker said so too
        assert 10 <= site.counts["retried"] <= 10 + 0.1 * num_requests + 1
        await site.check_clean()


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
async def test_aborted_request_is_not_tried_again(stream: bool) -> None:
    """Its servers report the transfer that was broken off as a failure of theirs."""
    async with running_site(2, 2) as site:
        holds = [site.hold(Role.PREFILL, Point.ADMITTED), site.hold(Role.DECODE, Point.ADMITTED)]
        async with Wire.open(site.url) as wire:
            wire.send_json("/generate", {**PLAIN, "stream": stream}, headers="x-request-id: mine\r\n")
            await until(lambda: all(hold.is_reached for hold in holds), "both legs admitted")
            assert (await ask(site, "/abort_request", {"rid": "mine"})).status == 200
            reply = await wire.reply()
        assert b" tok tok tok" not in reply.body
        assert len(rooms_sent(site.prefill)) + len(rooms_sent(site.of(Role.PREFILL)[1])) == 1
        await site.check_clean()
        await site.check_blame([{}])
        assert site.counts["retried"] == 0


async def test_drained_worker_finishes_what_it_has_and_gets_nothing_new() -> None:
    async with running_site(1, 2) as site:
        hold = site.hold(Role.DECODE, Point.STREAMING)
        async with Wire.open(site.url) as wire:
            wire.send_json("/generate", {**PLAIN, "stream": True})
            await wire.until_sight_of(b"\n\n")
            site.balancer.fleet.drain(hold.worker.name)
            before = len(hold.worker.requests)
            for _ in range(6):
                assert (await ask(site, "/generate", PLAIN)).status == 200
            assert len(hold.worker.requests) == before
            hold.release()
            reply = await wire.reply()
        assert reply.events[-1] == b"[DONE]"
        await site.check_clean()
        await site.check_blame([{}])


async def test_request_in_flight_on_a_drained_worker_is_tried_elsewhere_if_it_fails() -> None:
    async with running_site(1, 2) as site:
        await site.drop_kept()
        hold = site.hold(Role.DECODE, Point.RECEIVED)
        async with Wire.open(site.url) as wire:
            wire.send_json("/generate", PLAIN)
            await until(lambda: hold.is_reached, "the request at decode")
            site.balancer.fleet.drain(hold.worker.name)
            hold.release(Way.RESET_BEFORE_HEAD)
            reply = await wire.reply()
        assert reply.status == 200
        await site.check_clean()


async def test_shutdown_in_every_stage_ends_both_legs_and_tells_the_client() -> None:
    points = {Role.PREFILL: (Point.ADMITTED, Point.ANSWERING), Role.DECODE: (Point.ADMITTED, Point.RECEIVED)}
    for role, point in [(role, point) for role, found in points.items() for point in found]:
        async with running_site() as site:
            hold = site.hold(role, point)
            async with Wire.open(site.url) as wire:
                wire.send_json("/generate", {**PLAIN, "return_logprob": True, "logprob_start_len": 0})
                await until(lambda hold=hold: hold.is_reached, f"{role} at {point}")
                await site.balancer.stop()
                reply = await wire.reply()
            assert reply.status == 503, (role, point)
            for fake in site.fakes:
                assert not fake.held, (role, point, fake.name)
                await until(lambda fake=fake: not fake.num_connections, f"no connection to {fake.name}")


@pytest.mark.slow
async def test_storm_of_faults_and_leaving_clients_leaves_nothing() -> None:
    """Two hundred requests of every kind, each worker failing at random; everything is given back."""
    chance = random.Random(20261121)
    kinds: list[tuple[str, dict[str, Any]]] = [("/generate", PLAIN), *(item[:2] for item in MANY.values())]
    settings = {"request_s": 0.3, "max_retries": 1, "queue_timeout_s": 1.0, "retry_ratio": 1.0}
    async with running_site(2, 2, **settings) as site:

        async def client() -> None:
            path, body = chance.choice(kinds)
            async with Wire.open(site.url) as wire:
                wire.send_json(path, {**body, "stream": chance.random() < 0.5})
                if chance.random() < 0.3:
                    await asyncio.sleep(chance.random() * 0.05)
                    wire.leave()
                else:
                    assert (await wire.reply()).status in (200, 400, 502, 503, 504)

        for _ in range(10):
            for fake in site.fakes:
                fake.holds.clear()
            for _ in range(6):
                way = chance.choice([way for way in Way if way is not Way.KILLED])
                site.hold(chance.choice(list(Role)), chance.choice(list(Point))).release(way)
            await asyncio.gather(*(client() for _ in range(20)))
        for fake in site.fakes:
            fake.holds.clear()
        await site.check_clean()
        await site.until_healed()
        assert (await ask(site, "/generate", PLAIN)).status == 200
