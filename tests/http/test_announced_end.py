"""Between ``announce_end`` and the end, whoever comes is served and told to come elsewhere."""

from __future__ import annotations

import asyncio

from tests.http.test_server import GET, post, running, talk
from tests.support.sglang_server import until
from tests.support.wire import Wire


def url(port: int) -> str:
    return f"http://127.0.0.1:{port}"


async def test_a_new_connection_is_served_once() -> None:
    async with running() as (_, server, port):
        server.announce_end()
        async with Wire.open(url(port)) as wire:
            wire.send(GET)
            (reply,) = await wire.ended()
        assert (reply.status, reply.header("connection")) == (200, "close")


async def test_a_kept_connection_is_served_once_more() -> None:
    async with running() as (_, server, port), Wire.open(url(port)) as wire:
        wire.send(GET)
        assert (await wire.reply()).header("connection") == ""
        server.announce_end()
        await asyncio.sleep(0.02)
        assert not wire.is_closed, "an idle connection stays: its next request is not lost"
        wire.send(post(b"late"))
        _, second = await wire.ended()
        assert (second.status, second.json["body"], second.header("connection")) == (200, "late", "close")


async def test_an_answer_that_has_not_begun_says_so() -> None:
    async with running() as (echo, server, port), Wire.open(url(port)) as wire:
        wire.send(GET.replace(b"/echo", b"/hold"))
        await until(lambda: echo.seen)
        server.announce_end()
        echo.gate.set()
        (reply,) = await wire.ended()
        assert (reply.status, reply.header("connection")) == (200, "close")


async def test_a_stream_that_has_begun_keeps_its_word() -> None:
    """Its head promised a kept connection: the next request on it may be under way."""
    async with running() as (echo, server, port), Wire.open(url(port)) as wire:
        wire.send(GET.replace(b"/echo", b"/big"))
        await wire.until(lambda: len(wire.seen) > 1000, "the stream's begin")
        server.announce_end()
        echo.gate.set()
        await wire.until_sight_of(b"\r\n0\r\n\r\n")
        wire.send(GET)
        first, second = await wire.ended()
        assert (first.is_complete, first.header("connection")) == (True, "")
        assert (second.status, second.header("connection")) == (200, "close")


async def test_pipelined_requests_are_all_answered_and_the_last_says_so() -> None:
    async with running() as (echo, server, port), Wire.open(url(port)) as wire:
        wire.send(GET.replace(b"/echo", b"/hold") + GET)
        await until(lambda: echo.seen)
        server.announce_end()
        echo.gate.set()
        first, second = await wire.ended()
        assert [first.header("connection"), second.header("connection")] == ["", "close"]


async def test_a_request_that_is_half_there_at_the_end_is_served_and_says_so() -> None:
    async with running() as (_, server, port), Wire.open(url(port)) as wire:
        request = post(b"hello")
        wire.send(request[:-2])
        await until(lambda: any(not connection.is_idle for connection in server._connections))
        server.stop_accepting()
        wire.send(request[-2:])
        (reply,) = await wire.ended()
        assert (reply.status, reply.header("connection")) == (200, "close")


async def test_refusals_end_their_connection_too() -> None:
    async with running() as (_, server, port):
        server.announce_end()
        answer = await talk(port, GET.replace(b"/echo", b"/none"))
    assert answer.startswith(b"HTTP/1.1 404") and b"connection: close" in answer
