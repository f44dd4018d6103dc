"""Single attacks on the HTTP server that a generator does not find: limits passed by, names forged."""

from __future__ import annotations

import asyncio
import json

import pytest

from pdserve.http import server as listener
from pdserve.http import server_connection as connection
from tests.faults.site import running_site
from tests.support.fuzz_checks import check_answer, rss_bytes
from tests.support.fuzz_http import BODY, LAST, request
from tests.support.sglang_server import until
from tests.support.wire import Wire

CHUNKED = b"POST /generate HTTP/1.1\r\nhost: t\r\ntransfer-encoding: chunked\r\n\r\n"
CHUNKED += b"%x\r\n%b\r\n0\r\n" % (len(BODY), BODY)


async def test_trailers_are_limited_as_headers_are() -> None:
    async with running_site(max_header_bytes=16_384) as site:
        before = rss_bytes()
        async with Wire.open(site.url) as wire:
            wire.send(CHUNKED)
            for index in range(400):
                if wire.is_closed or wire.seen:
                    break
                wire.send(b"x-%d: %b\r\n" % (index, b"y" * 8000))
                await asyncio.sleep(0)
            wire.send(b"\r\n" + LAST)
            reply, *_ = await wire.ended()
        assert reply.status in (400, 431)
        check_answer(reply, "/generate")
        assert rss_bytes() - before < 8 * 2**20


async def test_trailers_cannot_change_what_the_head_said() -> None:
    """They come after the keys were checked."""
    async with running_site() as site, Wire.open(site.url) as wire:
        wire.send(
            CHUNKED + b"x-request-id: forged\r\nauthorization: Bearer forged\r\nx-a: forged\r\n\r\n" + LAST
        )
        first, last = await wire.ended()
        assert (first.status, last.status) == (200, 200)
        assert first.header("x-request-id") != "forged"
        for fake in site.fakes:
            assert "forged" not in json.dumps(fake.headers), fake.headers


async def test_a_long_body_does_not_count_as_the_next_requests_head() -> None:
    async with running_site(max_header_bytes=16_384) as site, Wire.open(site.url) as wire:
        long = json.dumps({"text": "x" * 200_000}).encode()
        wire.send(request(body=long) + LAST[:10])
        await wire.until_sight_of(b"200 OK")
        wire.send(LAST[10:])
        replies = await wire.ended()
        assert [reply.status for reply in replies] == [200, 200]


async def test_an_offer_to_upgrade_is_ignored_and_the_body_read() -> None:
    """Java's HttpClient offers h2c with every plain request."""
    async with running_site() as site, Wire.open(site.url) as wire:
        offer = [(b"connection", b"Upgrade, HTTP2-Settings"), (b"upgrade", b"h2c")]
        wire.send(request(headers=offer))
        reply = await wire.reply()
        assert (reply.status, reply.body[:8]) == (200, b'{"text":')


@pytest.mark.slow
@pytest.mark.parametrize("partial", [b"", b"GET /liveness HTTP/1.1\r\nhost"], ids=["idle", "half a head"])
async def test_a_client_that_was_slow_to_read_once_is_not_kept_for_ever(
    partial: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(listener, "SWEEP_S", 0.05)
    monkeypatch.setattr(connection, "KEEP_ALIVE_S", 0.2)
    async with running_site(header_s=0.2) as site, Wire.open(site.url) as wire:
        site.decode.behaviour.padding_bytes = 20 * 2**20  # more than any socket buffer
        wire.pause()
        wire.send_json("/generate", {"text": "hi"})
        await until(lambda: site.counts["completed"] == 1, "the answer written")
        wire.send(partial)
        wire.resume()
        await wire.until(lambda: len(wire.seen) > 20 * 2**20, "the whole answer")
        await wire.until(lambda: wire.is_closed, "the connection's end")


async def test_thousands_of_requests_in_one_packet_are_answered_in_order() -> None:
    async with running_site() as site, Wire.open(site.url) as wire:
        number = 400
        paths = [b"/liveness", b"/pdserve/state"]
        for index in range(number):
            wire.send(request(method=b"GET", target=paths[index % 2], body=b""))
        wire.send(LAST)
        replies = await wire.ended()
        assert [reply.status for reply in replies] == [200] * (number + 1)
        assert [b"workers" in reply.body for reply in replies] == [False, True] * (number // 2) + [False]


async def test_a_forged_request_id_cannot_split_an_answer() -> None:
    async with running_site() as site, Wire.open(site.url) as wire:
        for value in (b"a\tb", b"\xff\xfe", b"a: b", b'"', b"x" * 8000, b"%0d%0aset-cookie: a=b"):
            wire.send(request(headers=[(b"x-request-id", value)]))
            reply = await wire.reply()
            assert reply.status == 200
            assert reply.header("x-request-id") == value.decode("latin-1")
            wire.forget()
        for fake in site.fakes:
            assert all(seen["x-request-id"] for seen in fake.headers)
