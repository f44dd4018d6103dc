"""Aborts reach what waits in the balancer, by whatever name; nothing of it is dispatched or tried again."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable
from contextlib import asynccontextmanager
from typing import Any

import pytest

from pdserve.types import Role
from tests.faults.site import Point, Site, running_site
from tests.support.sglang_pairing import Way
from tests.support.sglang_server import until
from tests.support.wire import Wire, WireReply

MESSAGES = {"messages": [{"role": "user", "content": "hi"}]}
BODIES: dict[str, dict[str, Any]] = {
    "/generate": {"text": "hi"},
    "/v1/chat/completions": {"model": "m", **MESSAGES},
    "/v1/completions": {"model": "m", "prompt": "hi"},
    "/v1/responses": {"model": "m", "input": "hi"},
    "/v1/messages": {"model": "m", "max_tokens": 5, **MESSAGES},
    "/vertex_generate": {"instances": [{"text": "a"}, {"text": "b"}]},
    "/invocations": MESSAGES,
}
ENDS = {"/v1/messages": b'"end_turn"', "/v1/responses": b'"failed"'}
"""What says how it ended, where SGLang does not say ``abort``."""


async def ask(site: Site, path: str, body: object, headers: str = "") -> WireReply:
    """One request on a connection of its own."""
    async with Wire.open(site.url) as wire:
        wire.send_json(path, body, headers=headers)
        return await wire.reply()


async def abort(site: Site, **fields: Any) -> None:
    """POST /abort_request, which every worker must have taken."""
    reply = await ask(site, "/abort_request", fields)
    assert reply.status == 200, reply.body


def num_sent(site: Site) -> int:
    """Requests that prefill servers were sent."""
    return sum(len(fake.requests) for fake in site.of(Role.PREFILL))


def num_waiting(site: Site) -> int:
    return site.balancer.fleet.scheduler.num_waiting


@asynccontextmanager
async def crowded(num_running: int = 1, **settings: Any) -> AsyncIterator[tuple[Site, list[Any]]]:
    """A site whose decode server keeps so many requests for ever, and no more are let in."""
    roomy = {"queue_timeout_s": 60.0, "request_s": 60.0, "max_concurrent_requests": num_running}
    async with running_site(**{**roomy, **settings}) as site:
        gate = site.decode.behaviour.gate = asyncio.Event()
        running = [
            asyncio.ensure_future(ask(site, "/generate", {"text": "long"})) for _ in range(num_running)
        ]
        await until(lambda: len(site.decode.requests) == num_running, "all running")
        try:
            yield site, running
        finally:
            gate.set()
            await asyncio.gather(*running)
            await site.check_clean()


async def waiting(site: Site, *asked: Awaitable[WireReply]) -> list[asyncio.Future[WireReply]]:
    """These requests, all of them in the balancer's queue."""
    before = num_waiting(site)
    replies = [asyncio.ensure_future(each) for each in asked]
    await until(lambda: num_waiting(site) == before + len(asked), "all wait")
    return replies


def is_aborted(reply: WireReply) -> bool:
    """True for a whole answer of /generate that ended by an abort."""
    return reply.status == 200 and reply.json["meta_info"]["finish_reason"]["type"] == "abort"


# -- all ---------------------------------------------------------------------------------------


async def test_abort_all_ends_the_running_and_the_waiting() -> None:
    async with crowded(2) as (site, running):
        replies = await waiting(site, *(ask(site, "/generate", {"text": "hi"}) for _ in range(4)))
        await abort(site, abort_all=True)
        assert all(map(is_aborted, await asyncio.gather(*running, *replies)))
        assert num_sent(site) == 2
        assert site.counts["retried"] == 0
        assert site.counts["shed"] == site.counts["failed"] == 0


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("path", BODIES)
async def test_a_waiting_request_of_any_route_ends_as_the_route_says_it(path: str, stream: bool) -> None:
    options = {"parameters": {"stream": stream}} if path == "/vertex_generate" else {"stream": stream}
    async with crowded() as (site, _):
        (reply,) = await waiting(site, ask(site, path, {**BODIES[path], **options}))
        await abort(site, abort_all=True)
        answer = await reply
        assert answer.status == 200
        assert answer.is_complete
        assert answer.is_stream is stream
        assert ENDS.get(path, b'"abort"') in answer.body
        assert num_sent(site) == 1
        assert not (site.counts["failed"] or site.counts["retried"] or site.counts["shed"])


async def test_a_request_between_two_attempts_is_not_tried_again() -> None:
    """Its first pair has failed; it waits for another, which is full."""
    async with running_site(2, 1, queue_timeout_s=60.0, request_s=60.0, max_concurrent_requests=1) as site:
        hold = site.hold(Role.PREFILL, Point.ADMITTED)
        one = asyncio.ensure_future(ask(site, "/generate", {"text": "hi", "rid": "mine"}))
        await until(lambda: hold.is_reached, "first attempt")
        # The next in line takes the place that the failure leaves.
        site.decode.behaviour.gate = asyncio.Event()
        other = (await waiting(site, ask(site, "/generate", {"text": "hi"})))[0]
        hold.release(Way.STATUS_500)
        await until(lambda: num_sent(site) == 2 and num_waiting(site) == 1, "the other was served first")
        await abort(site, rid="mine")
        assert is_aborted(await one)
        assert num_sent(site) == 2
        site.decode.behaviour.gate.set()
        assert (await other).json["meta_info"]["finish_reason"]["type"] == "length"
        await site.check_clean()


async def test_a_request_whose_prefill_has_answered_ends_on_decode() -> None:
    async with running_site(2, 2) as site:
        hold = site.hold(Role.DECODE, Point.RECEIVED)
        reply = asyncio.ensure_future(ask(site, "/generate", {"text": "hi", "rid": "mine"}))
        await until(lambda: hold.is_reached, "decode has the KV")
        await until(lambda: not any(fake.num_exchanges for fake in site.of(Role.PREFILL)), "prefill answered")
        await abort(site, rid="mine")
        assert is_aborted(await reply)
        assert num_sent(site) == 1
        await site.check_clean()


async def test_an_abort_that_overtakes_its_request_is_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    """SGLang forgets an abort of a request that it does not know yet."""
    async with running_site(request_s=60.0) as site:
        site.decode.behaviour.gate = asyncio.Event()
        hold = site.hold(Role.PREFILL, Point.ADMITTED)
        reply = asyncio.ensure_future(ask(site, "/generate", {"text": "hi", "rid": "mine"}))
        await until(lambda: hold.is_reached, "it runs")
        with monkeypatch.context() as patch:
            for fake in site.fakes:
                patch.setattr(fake, "_abort", lambda rid: None)
            await abort(site, rid="mine")
        hold.release()
        assert is_aborted(await reply)
        await site.check_clean()


async def test_what_comes_after_an_abort_of_all_is_served() -> None:
    async with running_site() as site:
        await abort(site, abort_all=True)
        assert (await ask(site, "/generate", {"text": "hi"})).json["text"]


# -- by name -----------------------------------------------------------------------------------


async def test_a_prefix_ends_all_whose_rid_begins_so_and_no_other() -> None:
    async with crowded() as (site, running):
        names = ("job7-a", "job7-b", "job8-a")
        a, b, other = await waiting(site, *(ask(site, "/generate", {"text": "hi", "rid": n}) for n in names))
        await abort(site, rid="job7-")
        assert (await a).json["meta_info"]["id"] == "job7-a"
        assert is_aborted(await a)
        assert is_aborted(await b)
        assert site.counts["aborted"] == 2
        assert num_waiting(site) == 1
        await abort(site, rid="job8-a")
        assert is_aborted(await other)
        assert not running[0].done()


async def test_an_empty_name_ends_nothing() -> None:
    async with crowded() as (site, _):
        (reply,) = await waiting(site, ask(site, "/generate", {"text": "hi", "rid": "a"}))
        await abort(site, rid="")
        assert num_waiting(site) == 1
        await abort(site, rid="a")
        assert is_aborted(await reply)


async def test_a_prefix_ends_what_runs() -> None:
    async with running_site(request_s=60.0) as site:
        site.decode.behaviour.gate = asyncio.Event()
        names = ("job7-a", "job7-b", "job8")
        replies = [asyncio.ensure_future(ask(site, "/generate", {"text": "hi", "rid": n})) for n in names]
        await until(lambda: len(site.decode.requests) == 3, "all three run")
        await abort(site, rid="job7-")
        assert all(map(is_aborted, await asyncio.gather(*replies[:2])))
        assert len(site.decode.aborts) >= 2
        site.decode.behaviour.gate.set()
        assert not is_aborted(await replies[2])


async def test_the_id_of_the_answer_is_a_name() -> None:
    async with running_site(request_s=60.0) as site:
        site.decode.behaviour.hang_after = 1
        async with Wire.open(site.url) as wire:
            wire.send_json("/v1/chat/completions", {**MESSAGES, "stream": True})
            await wire.until_sight_of(b"}\n\n")
            rid = json.loads(wire.seen.partition(b"data: ")[2].split(b"\n")[0])["id"]
            await abort(site, rid=rid)
            assert b'"abort"' in (await wire.reply()).body
        await site.check_clean()


@pytest.mark.parametrize("name", ["mine_1", ["a", "mine"]], ids=["numbered", "listed"])
async def test_one_prompt_of_a_batch_can_be_aborted(name: Any) -> None:
    rid = "mine" if isinstance(name, str) else name
    async with running_site(request_s=60.0) as site:
        site.decode.behaviour.gate = asyncio.Event()
        reply = asyncio.ensure_future(ask(site, "/generate", {"text": ["x", "y"], "rid": rid}))
        await until(lambda: len(site.decode.requests) == 1, "it runs")
        ours = site.decode.requests[0]["rid"]
        await abort(site, rid="mine_1" if isinstance(name, str) else "mine")
        assert site.decode.aborts == [ours[1]]
        await reply
        assert num_sent(site) == 1


async def test_a_prompt_of_a_batch_that_waits_is_aborted_once_the_workers_know_it() -> None:
    async with crowded() as (site, running):
        (reply,) = await waiting(site, ask(site, "/generate", {"text": ["x", "y"], "rid": ["a", "b"]}))
        await abort(site, rid="b")
        assert num_waiting(site) == 1
        site.decode.aborts.clear()
        await abort(site, rid=site.decode.requests[0]["rid"])
        await running[0]
        await until(lambda: len(site.decode.requests) == 2, "the batch was sent")
        await until(lambda: site.decode.requests[1]["rid"][1] in site.decode.aborts, "one of it aborted")
        assert site.decode.requests[1]["rid"][0] not in site.decode.aborts
        await reply


async def test_every_prompt_of_a_waiting_batch_ends_by_the_common_name() -> None:
    async with crowded() as (site, _):
        (reply,) = await waiting(site, ask(site, "/generate", {"text": ["x", "y"], "rid": "mine"}))
        await abort(site, rid="mine")
        assert [item["meta_info"]["id"] for item in (await reply).json] == ["mine_0", "mine_1"]
        assert num_sent(site) == 1


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
async def test_all_samples_of_a_chat_end_together(stream: bool) -> None:
    async with running_site(request_s=60.0) as site:
        site.decode.behaviour.gate = asyncio.Event()
        body = {**MESSAGES, "n": 3, "rid": "mine", "stream": stream}
        reply = asyncio.ensure_future(ask(site, "/v1/chat/completions", body))
        await until(lambda: len(site.decode.requests) == 3, "all samples run")
        await abort(site, rid="min")
        answer = await reply
        assert answer.status == 200
        assert set(site.decode.aborts) >= {request["rid"] for request in site.decode.requests}
        assert answer.body.count(b'"abort"') == 3
        await site.check_clean()


async def test_all_samples_of_a_waiting_chat_end_together() -> None:
    async with crowded() as (site, _):
        body = {"model": "m", **MESSAGES, "n": 3, "rid": "mine"}
        (reply,) = await waiting(site, ask(site, "/v1/chat/completions", body))
        await abort(site, rid="mine")
        choices = (await reply).json["choices"]
        assert [(choice["index"], choice["finish_reason"]) for choice in choices] == [
            (0, "abort"),
            (1, "abort"),
            (2, "abort"),
        ]
        assert num_sent(site) == 1


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
async def test_a_message_ends_by_its_x_request_id(stream: bool) -> None:
    """Workers have no name for it: its connections are closed."""
    async with running_site(request_s=60.0) as site:
        site.decode.behaviour.gate = asyncio.Event()
        body = {**BODIES["/v1/messages"], "stream": stream}
        reply = asyncio.ensure_future(ask(site, "/v1/messages", body, "x-request-id: mine-1\r\n"))
        await until(lambda: len(site.decode.requests) == 1, "it runs")
        await abort(site, rid="mine-")
        answer = await reply
        assert answer.status == 200
        assert b"end_turn" in answer.body
        await until(lambda: not site.decode.num_exchanges and not site.prefill.num_exchanges, "closed")
        assert site.counts["aborted"] == 1


async def test_a_message_whose_stream_has_begun_ends_with_an_error() -> None:
    async with running_site(request_s=60.0) as site:
        site.decode.behaviour.hang_after = 1
        async with Wire.open(site.url) as wire:
            body = {**BODIES["/v1/messages"], "stream": True}
            wire.send_json("/v1/messages", body, headers="x-request-id: mine\r\n")
            await wire.until_sight_of(b"\n\n")
            await abort(site, rid="mine")
            assert b"the request was aborted" in (await wire.reply()).body
        await until(lambda: not site.decode.num_exchanges, "closed")


async def test_many_names_are_told_to_workers_at_once() -> None:
    async with running_site(request_s=60.0) as site:
        site.decode.behaviour.gate = asyncio.Event()
        asked = [ask(site, "/generate", {"text": "hi", "rid": f"job-{index}"}) for index in range(40)]
        replies = [asyncio.ensure_future(each) for each in asked]
        await until(lambda: len(site.decode.requests) == 40, "all run")
        await abort(site, rid="job-")
        assert all(map(is_aborted, await asyncio.gather(*replies)))


@pytest.mark.parametrize("mode", ["abort", "retract", None])
async def test_a_pause_ends_what_waits_unless_it_says_otherwise(mode: str | None) -> None:
    """SGLang's default mode aborts all, its own queue included."""
    async with crowded() as (site, _):
        (reply,) = await waiting(site, ask(site, "/generate", {"text": "hi", "rid": "mine"}))
        assert (await ask(site, "/pause_generation", {"mode": mode} if mode else {})).status == 200
        assert num_waiting(site) == (mode == "retract")
        assert (await ask(site, "/continue_generation", {})).status == 200
        await abort(site, rid="mine")
        assert is_aborted(await reply)


@pytest.mark.parametrize(
    ("path", "fields", "is_over"),
    [
        ("/update_weights_from_disk", {"model_path": "m", "abort_all_requests": True}, True),
        ("/update_weights_from_disk", {"model_path": "m", "abort_all_requests": "true"}, True),
        ("/update_weights_from_disk", {"model_path": "m"}, False),
        ("/update_weight_version", {"new_version": "2"}, True),
        ("/update_weight_version", {"new_version": "2", "abort_all_requests": False}, False),
    ],
)
async def test_a_weight_update_that_aborts_all_ends_what_waits(
    path: str, fields: dict[str, Any], is_over: bool
) -> None:
    async with crowded() as (site, _):
        (reply,) = await waiting(site, ask(site, "/generate", {"text": "hi", "rid": "mine"}))
        await ask(site, path, fields)
        assert num_waiting(site) == (not is_over)
        await abort(site, rid="mine")
        assert is_aborted(await reply)
