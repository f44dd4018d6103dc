"""``stream_heartbeat_s``: a silent stream gets its head and comments; what comes then is an event."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from pdserve.balancer.request.transforms import HEARTBEAT
from pdserve.config.balancer import BalancerConfig
from tests.support.balancer_client import Reply, Site, running_site
from tests.support.dialects import (
    CHAT,
    DIALECTS,
    GENERATE,
    MESSAGES,
    RESPONSES,
    deltas,
    end,
    failure,
    preamble,
    request_to,
    stream,
)  # fmt: skip
from tests.support.sglang_server import until
from tests.support.wire import Wire

BEAT_S = 0.01
TWICE = HEARTBEAT.strip()


def silent(site: Site) -> asyncio.Event:
    """Decode says nothing until the event that is returned is set."""
    gate = site.decode.behaviour.gate = asyncio.Event()
    return gate


def without_comments(body: bytes) -> bytes:
    return body.replace(HEARTBEAT, b"")


def test_it_is_off_unless_asked_for() -> None:
    assert BalancerConfig().stream_heartbeat_s == 0.0


@pytest.mark.parametrize("path", DIALECTS)
async def test_the_head_and_comments_come_before_the_first_token(path: str) -> None:
    async with running_site(stream_heartbeat_s=BEAT_S) as site:
        gate = silent(site)
        site.decode.behaviour.segments = tuple(stream(path))
        async with site.exchange("POST", path, request_to(path, stream=True)) as exchange:
            head = await exchange.read_until(b"\r\n\r\n")
            assert head.startswith(b"HTTP/1.1 200 ")
            assert b"content-type: text/event-stream" in head
            for _ in range(2):
                head += await exchange.read_until(TWICE)
            gate.set()
            reply = Reply.of(head + (await exchange.read_until(b"0\r\n\r\n")))
        assert without_comments(reply.body) == b"".join(stream(path))
        assert reply.body.startswith(HEARTBEAT * 2)
        assert (site.last["completion_tokens"], site.counts["completed"]) == (40, 1)


async def test_comments_come_between_events_that_are_far_apart() -> None:
    async with running_site(stream_heartbeat_s=BEAT_S) as site:
        events = stream(CHAT)
        site.decode.behaviour.segments = tuple(events)
        site.decode.behaviour.hang_after = 3
        go_on = site.decode.behaviour.go_on = asyncio.Event()
        async with site.exchange("POST", CHAT, request_to(CHAT, stream=True)) as exchange:
            begun = await exchange.read_until(events[2])
            begun += await exchange.read_until(TWICE)
            begun += await exchange.read_until(TWICE)
            go_on.set()
            reply = Reply.of(begun + await exchange.read_until(b"0\r\n\r\n"))
        assert without_comments(reply.body) == b"".join(events)


@pytest.mark.parametrize("path", DIALECTS)
async def test_another_pair_is_still_tried_after_the_head(path: str) -> None:
    async with running_site(decode=2, stream_heartbeat_s=BEAT_S, retry_ratio=10.0) as site:
        gates = []
        for fake in site.decodes:
            fake.behaviour.segments = tuple([*preamble(path), *failure(path, "lost")])
            fake.behaviour.gate = asyncio.Event()
            gates.append(fake.behaviour.gate)
        async with site.exchange("POST", path, request_to(path, stream=True)) as exchange:
            begun = await exchange.read_until(TWICE)
            await until(lambda: any(fake.requests for fake in site.decodes))
            first = next(fake for fake in site.decodes if fake.requests)
            other = site.decodes[first is site.decodes[0]]
            other.behaviour.segments = tuple(stream(path))
            for gate in gates:
                gate.set()
            reply = Reply.of(begun + await exchange.read_until(b"0\r\n\r\n"))
        assert without_comments(reply.body) == b"".join(stream(path))
        assert (site.counts["retried"], site.counts["completed"]) == (1, 1)


def error_in(path: str, body: bytes) -> dict[str, Any]:
    """The error that ends a stream; nothing but comments before it."""
    lines = without_comments(body).decode().strip().split("\n")
    document: dict[str, Any] = json.loads(lines[-1].removeprefix("data: "))
    named = path in (MESSAGES, RESPONSES)
    assert lines[:-1] == (["event: error"] if named else [])
    return document if path == RESPONSES else document["error"]


@pytest.mark.parametrize("path", DIALECTS)
async def test_no_pair_in_time_is_an_event(path: str) -> None:
    async with running_site(prefill=0, queue_timeout_s=0.1, stream_heartbeat_s=BEAT_S) as site:
        reply = await site.ask("POST", path, request_to(path, stream=True))
        assert reply.status == 200 and reply.body.startswith(HEARTBEAT)
        error = error_in(path, reply.body)
        assert "pair" in error["message"] or "worker" in error["message"]
        if path == RESPONSES:
            assert error["sequence_number"] == 0
        assert site.last["status"] == 503


@pytest.mark.parametrize("path", [GENERATE, CHAT, MESSAGES])
async def test_a_workers_refusal_is_an_event_with_its_words(path: str) -> None:
    async with running_site(stream_heartbeat_s=BEAT_S) as site:
        gate = silent(site)
        site.decode.behaviour.status = 400
        site.decode.behaviour.error_body = b'{"object":"error","message":"too long","code":400}'
        async with site.exchange("POST", path, request_to(path, stream=True)) as exchange:
            begun = await exchange.read_until(TWICE)
            gate.set()
            reply = Reply.of(begun + await exchange.read_until(b"0\r\n\r\n"))
        error = error_in(path, reply.body)
        assert error["message"] == "too long"
        assert error["type" if path == MESSAGES else "code"] == (
            "invalid_request_error" if path == MESSAGES else 400
        )
        assert (site.last["status"], site.counts["failed"]) == (400, 1)


async def test_an_abort_after_the_head_ends_as_one_before_it() -> None:
    async with running_site(prefill=0, stream_heartbeat_s=BEAT_S) as site:
        async with site.exchange("POST", GENERATE, request_to(GENERATE, stream=True)) as exchange:
            begun = await exchange.read_until(TWICE)
            site.balancer.dispatcher.abort_all()
            reply = Reply.of(begun + await exchange.read_until(b"0\r\n\r\n"))
        events = [event for event in reply.events if not event.startswith(":")]
        assert json.loads(events[0])["meta_info"]["finish_reason"]["type"] == "abort"
        assert events[1:] == ["[DONE]"]
        assert site.counts["aborted"] == 1


async def test_samples_of_a_chat_share_one_head() -> None:
    async with running_site(stream_heartbeat_s=BEAT_S) as site:
        gate = silent(site)
        site.decode.behaviour.segments = tuple([*deltas(CHAT, 2), *end(CHAT, "stop", num_tokens=2)])
        async with site.exchange("POST", CHAT, request_to(CHAT, stream=True, n=2)) as exchange:
            begun = await exchange.read_until(TWICE)
            gate.set()
            rest = begun + await exchange.read_until(b"0\r\n\r\n")
        assert rest.count(b"HTTP/1.1") == 1
        documents = [json.loads(event) for event in Reply.of(rest).events if event.startswith("{")]
        texts = [d["choices"][0]["index"] for d in documents if d["choices"] and "content" in str(d)]
        assert {texts.count(0), texts.count(1)} == {3}  # its role and two tokens each


async def test_whole_answers_get_none() -> None:
    async with running_site(stream_heartbeat_s=BEAT_S) as site:
        gate = silent(site)
        asking = asyncio.create_task(site.generate({"text": "hi"}))
        await until(lambda: site.decode.requests)
        await asyncio.sleep(5 * BEAT_S)
        gate.set()
        reply = await asking
        assert reply.status == 200 and HEARTBEAT not in reply.body


async def test_nothing_follows_the_end_on_a_kept_connection() -> None:
    async with running_site(stream_heartbeat_s=BEAT_S) as site, Wire.open(site.balancer.url) as wire:
        for _ in range(3):
            wire.send_json(GENERATE, request_to(GENERATE, stream=True))
            reply = await wire.reply()
            assert reply.status == 200 and without_comments(reply.body).endswith(b"[DONE]\n\n")
            wire.forget()
            await asyncio.sleep(3 * BEAT_S)
            assert wire.seen == b""
