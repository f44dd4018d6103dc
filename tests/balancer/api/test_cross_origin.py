"""Web pages read every answer of client routes, errors too, as from one SGLang server (Starlette's CORS)."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from tests.support.balancer_client import Reply, Site, running_site
from tests.support.sglang_server import until
from tests.support.wire import Wire

ORIGIN = "http://page:8080"
PAGE = {"origin": ORIGIN}
PLAIN = {"text": "a"}
EXPOSED = "x-request-id, retry-after"


def check_readable(reply: Reply, status: int) -> None:
    """A page of ORIGIN may read it."""
    assert reply.status == status, reply.body
    headers = {name: value for name, value in reply.headers.items() if name.startswith("access-control-")}
    assert headers == {
        "access-control-allow-origin": ORIGIN,
        "access-control-allow-credentials": "true",
        "access-control-expose-headers": EXPOSED,
    }
    assert reply.headers["vary"] == "Origin"


@pytest.mark.parametrize(
    ("method", "path", "body", "status"),
    [
        ("POST", "/generate", PLAIN, 200),
        ("GET", "/v1/models", None, 200),
        ("GET", "/health", None, 200),
        ("GET", "/metrics", None, 200),
        ("GET", "/nowhere", None, 404),
        ("POST", "/v1/nowhere", PLAIN, 404),
        ("POST", "/generate", b"{", 400),
        ("POST", "/v1/chat/completions", b"[]", 400),
        ("POST", "/v1/messages", b"[]", 400),
        ("DELETE", "/generate", None, 405),
        ("POST", "/v1/models", PLAIN, 405),
        ("POST", "/v1/embeddings", PLAIN, 501),
        ("POST", "/generate", b"x" * 3000, 413),
        ("POST", "/nowhere", b"x" * 3000, 404),
    ],
)
async def test_every_answer_is_readable(method: str, path: str, body: Any, status: int) -> None:
    async with running_site(max_body_bytes=2000) as site:
        check_readable(await site.ask(method, path, body, **PAGE), status)
        other = await site.ask(method, path, body)
        assert not [name for name in other.headers if name.startswith("access-control-")], "nobody asked"


async def test_a_refused_key_is_readable_with_a_body_or_without() -> None:
    async with running_site(api_key="k") as site:
        check_readable(await site.ask("GET", "/v1/models", **PAGE), 401)
        check_readable(await site.generate({"text": "x" * 100}, **PAGE), 401)
        check_readable(await site.generate(PLAIN, authorization="Bearer k", **PAGE), 200)


async def test_failures_of_the_fleet_are_readable() -> None:
    async with running_site(decode=0, queue_timeout_s=0.01) as site:
        check_readable(await site.generate(PLAIN, **PAGE), 503)
        check_readable(await site.ask("GET", "/readiness", **PAGE), 503)
    async with running_site(max_retries=0) as site:
        await site.decode.stop()
        check_readable(await site.generate(PLAIN, **PAGE), 502)


async def test_a_stream_is_readable_and_has_its_name() -> None:
    async with running_site() as site:
        stream = {"messages": [], "stream": True}
        reply = await site.ask("POST", "/v1/chat/completions", stream, x_request_id="mine", **PAGE)
        check_readable(reply, 200)
        assert reply.headers["x-request-id"] == "mine"


async def test_shutting_down_is_readable() -> None:
    async with running_site() as site:
        site.decode.behaviour.hang = True
        async with site.exchange("POST", "/generate", PLAIN, **PAGE) as exchange:
            await until(lambda: site.decode.requests)
            await site.balancer.dispatcher.close()
            check_readable(await exchange.reply(), 503)


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/generate", "/v1/models", "/health", "/nowhere"])
@pytest.mark.parametrize("method", ["POST", "DELETE"])
async def test_a_browser_that_asks_before_is_told_all_and_needs_no_key(path: str, method: str) -> None:
    asked = {"access_control_request_method": method, "access_control_request_headers": "authorization,x-a"}
    async with running_site(api_key="k", admin_api_key="a") as site:
        reply = await site.ask("OPTIONS", path, **PAGE, **asked)
        assert (reply.status, reply.body, reply.headers["content-type"]) == (200, b"OK", "text/plain")
        told = {name: value for name, value in reply.headers.items() if name.startswith("access-control-")}
        assert told == {
            "access-control-allow-origin": ORIGIN,
            "access-control-allow-credentials": "true",
            "access-control-expose-headers": EXPOSED,
            "access-control-allow-methods": "DELETE, GET, HEAD, OPTIONS, PATCH, POST, PUT, QUERY",
            "access-control-allow-headers": "authorization,x-a",
            "access-control-max-age": "600",
        }


async def test_options_that_are_no_browsers_question_are_a_wrong_method() -> None:
    async with running_site() as site:
        check_readable(await site.ask("OPTIONS", "/generate", **PAGE), 405)
        assert (await site.ask("OPTIONS", "/generate", access_control_request_method="POST")).status == 405


async def ask_both(site: Site, **headers: str) -> list[Reply]:
    """A browser's question about a control route, and the request itself."""
    asked = {"access_control_request_method": "POST"}
    return [
        await site.ask("OPTIONS", "/flush_cache", **PAGE, **asked),
        await site.ask("POST", "/flush_cache", **PAGE, **headers),
        await site.ask("GET", "/workers", **PAGE, **headers),
    ]


async def test_control_routes_are_for_pages_that_have_their_key() -> None:
    async with running_site(admin_api_key="a") as site:
        before, done, listed = await ask_both(site, authorization="Bearer a")
        assert before.status == 200 and before.headers["access-control-allow-origin"] == ORIGIN
        check_readable(done, 200)
        check_readable(listed, 200)
        check_readable((await ask_both(site))[1], 401)


async def test_control_routes_without_a_key_are_for_no_page() -> None:
    async with running_site() as site:
        replies = await ask_both(site)
        assert [reply.status for reply in replies] == [405, 200, 200]
        for reply in replies:
            assert not [name for name in reply.headers if name.startswith("access-control-")]


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (b"nonsense\r\n\r\n", 400),
        (b"GET ftp://x/ HTTP/1.1\r\nhost: t\r\norigin: http://page:8080\r\n\r\n", 400),
        (b"GET /v1/models HTTP/1.1\r\norigin: http://page:8080\r\nx: " + b"y" * 3000 + b"\r\n\r\n", 431),
    ],
)
async def test_what_cannot_be_read_is_readable_by_any_page(sent: bytes, status: int) -> None:
    async with running_site(max_header_bytes=2000) as site, Wire.open(site.balancer.url) as wire:
        wire.send(sent)
        (reply,) = await wire.ended()
        assert (reply.status, reply.header("access-control-allow-origin")) == (status, "*")


async def test_a_body_that_breaks_off_or_grows_is_readable() -> None:
    head = b"POST /generate HTTP/1.1\r\nhost: t\r\norigin: http://page:8080\r\n"
    head += b"transfer-encoding: chunked\r\n\r\n"
    async with running_site(max_body_bytes=100) as site:
        for chunk, status in ((b"zz\r\n", 400), (b"65\r\n" + b"x" * 101, 413)):
            async with Wire.open(site.balancer.url) as wire:
                wire.send(head)
                await asyncio.sleep(0)
                wire.send(chunk)
                (reply,) = await wire.ended()
                assert (reply.status, reply.header("access-control-allow-origin")) == (status, ORIGIN)


async def test_a_connection_too_many_is_told_so_readably() -> None:
    async with running_site(max_connections=1) as site, Wire.open(site.balancer.url) as first:
        first.send_json("/generate", PLAIN)
        await first.reply()
        async with Wire.open(site.balancer.url) as second:
            (reply,) = await second.ended()
            assert (reply.status, reply.header("access-control-allow-origin")) == (503, "*")
