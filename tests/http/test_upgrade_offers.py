"""An offer to change the protocol is ignored: the body is read, the connection stays usable.

Every JVM client and ``curl --http2`` offer h2c with each plain request (RFC 9110 §7.8).
"""

from __future__ import annotations

import asyncio
import json

import pytest

from pdserve.bootstrap.service import BootstrapService
from pdserve.config.launch import BootstrapConfig
from tests.support.balancer_client import running_site
from tests.support.wire import Wire

H2C = b"connection: Upgrade, HTTP2-Settings\r\nupgrade: h2c\r\nhttp2-settings: AAMAAABkAAQAAP__\r\n"
WEBSOCKET = b"connection: keep-alive, Upgrade\r\nupgrade: websocket\r\nsec-websocket-version: 13\r\n"
BODY = json.dumps({"text": "hello"}).encode()
WHOLE = b"content-length: %d\r\n\r\n%b" % (len(BODY), BODY)
CHUNKED = b"transfer-encoding: chunked\r\n\r\n4\r\n%b\r\n%x\r\n%b\r\n0\r\n\r\n" % (
    BODY[:4], len(BODY) - 4, BODY[4:]
)  # fmt: skip
LAST = b"GET /liveness HTTP/1.1\r\nhost: t\r\nconnection: close\r\n\r\n"


def offer(lines: bytes, rest: bytes, start: bytes = b"POST /generate HTTP/1.1") -> bytes:
    """A request with an offer to upgrade."""
    return start + b"\r\nhost: t\r\n" + lines + rest


@pytest.mark.parametrize("lines", [H2C, WEBSOCKET], ids=["h2c", "websocket"])
@pytest.mark.parametrize("rest", [WHOLE, CHUNKED], ids=["length", "chunked"])
@pytest.mark.parametrize("cut", [0, len(BODY), len(BODY) - 3, 1], ids=["one", "two", "within", "bytewise"])
async def test_the_body_is_read_and_the_connection_serves_on(lines: bytes, rest: bytes, cut: int) -> None:
    data = offer(lines, rest)
    pieces = [data] if not cut else [data[:-cut], data[-cut:]]
    if cut == 1:
        pieces = [bytes([byte]) for byte in data]
    async with running_site() as site, Wire.open(site.balancer.url) as wire:
        for piece in pieces:
            wire.send(piece)
            await asyncio.sleep(0)
        reply = await wire.reply()
        assert (reply.status, reply.header("connection")) == (200, "")
        wire.send(data + LAST)
        replies = await wire.ended()
        assert [reply.status for reply in replies] == [200, 200, 200]
        assert [request["text"] for request in site.decode.requests] == ["hello", "hello"]


async def test_many_offers_in_one_packet_are_answered_in_order() -> None:
    """Each makes a new parser; none may cost the stack or copy the rest."""
    async with running_site() as site, Wire.open(site.balancer.url) as wire:
        get = offer(H2C, b"\r\n", b"GET /liveness HTTP/1.1")
        wire.send(get * 2000 + offer(H2C, WHOLE) + LAST)
        replies = await wire.ended()
        assert [reply.status for reply in replies] == [200] * 2002


async def test_an_offer_with_close_is_answered_with_close() -> None:
    async with running_site() as site, Wire.open(site.balancer.url) as wire:
        wire.send(offer(b"connection: close, Upgrade\r\nupgrade: h2c\r\n", WHOLE))
        (reply,) = await wire.ended()
        assert (reply.status, reply.header("connection")) == (200, "close")


async def test_no_worker_sees_the_offer() -> None:
    async with running_site() as site, Wire.open(site.balancer.url) as wire:
        wire.send(offer(H2C, WHOLE))
        assert (await wire.reply()).status == 200
        wire.forget()
        wire.send(offer(H2C, b"\r\n", b"GET /v1/models HTTP/1.1"))
        assert (await wire.reply()).status == 200
        seen = [*site.prefill.headers, *site.decode.headers, *(call[2] for call in site.decode.calls)]
        assert len(seen) >= 3
        assert not {"upgrade", "http2-settings"} & {name for headers in seen for name in headers}


@pytest.mark.parametrize(
    "rest",
    [
        b"content-length: 3\r\ncontent-length: 4\r\n\r\nabcd",
        b"content-length: 3\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n",
        b"transfer-encoding: chunked\r\ntransfer-encoding: gzip\r\n\r\n0\r\n\r\n",
        b"transfer-encoding: gzip\r\n\r\nabc",
    ],
)
async def test_ambiguous_framing_is_refused_as_without_an_offer(rest: bytes) -> None:
    async with running_site() as site, Wire.open(site.balancer.url) as wire:
        wire.send(offer(H2C, rest) + LAST)
        assert [reply.status for reply in await wire.ended()] == [400]


async def test_limits_hold_for_an_offer_too() -> None:
    async with running_site(max_body_bytes=100, max_header_bytes=2000) as site:
        for rest, status in (
            (b"content-length: 101\r\n\r\n", 413),
            (b"transfer-encoding: chunked\r\n\r\n65\r\n" + b"x" * 101 + b"\r\n", 413),
            (b"x-a: " + b"y" * 2000 + b"\r\n" + WHOLE, 431),
        ):
            async with Wire.open(site.balancer.url) as wire:
                wire.send(offer(H2C, rest))
                assert [reply.status for reply in await wire.ended()] == [status]


async def test_the_bootstrap_service_reads_the_body_too() -> None:
    service = BootstrapService(BootstrapConfig(port=0))
    await service.start()
    try:
        async with Wire.open(service.url) as wire:
            body = b'{"instance_id": "nobody"}'
            rest = b"content-length: %d\r\n\r\n%b" % (len(body), body)
            wire.send(offer(H2C, rest, b"POST /fleet/deregister HTTP/1.1"))
            reply = await wire.reply()
            assert (reply.status, reply.json) == (200, {"known": False})
            wire.forget()
            wire.send(offer(H2C, b"\r\n", b"GET /health HTTP/1.1"))
            assert (await wire.reply()).status == 200
    finally:
        await service.stop()
