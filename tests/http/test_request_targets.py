"""Every form of a request target that RFC 9112 §3.2 lets a client send, and a clear 400 for the others."""

from __future__ import annotations

import pytest

from pdserve.http.wire import read_target
from tests.http.test_server import running, talk
from tests.support.balancer_client import running_site


def ask(method: str, target: bytes, *lines: bytes) -> bytes:
    """A request that closes."""
    rest = b"".join(line + b"\r\n" for line in (b"host: t", *lines, b"connection: close"))
    return method.encode() + b" " + target + b" HTTP/1.1\r\n" + rest + b"\r\n"


@pytest.mark.parametrize(
    ("target", "path", "query"),
    [
        (b"http://proxied:8000/echo", "/echo", ""),
        (b"http://proxied/echo?a=b%20c", "/echo", "a=b%20c"),
        (b"HTTPS://proxied/e%63ho?", "/echo", ""),
        (b"http://[::1]:8000/echo?x=/?", "/echo", "x=/?"),
        (b"http://proxied", "/", ""),
        (b"http://proxied?a", "/", "a"),
        (b"http://proxied:/", "/", ""),
        (b"//echo", "//echo", ""),
    ],
)
async def test_a_target_with_an_authority_names_a_path(target: bytes, path: str, query: str) -> None:
    async with running() as (echo, _, port):
        answer = await talk(port, ask("GET", target))
        (client,) = echo.seen
    assert answer.startswith(b"HTTP/1.1 200")
    assert (client.path, client.query.decode()) == (path, query)


async def test_the_targets_authority_is_the_host() -> None:
    async with running() as (echo, _, port):
        await talk(port, ask("GET", b"http://proxied:80/a"))
        await talk(port, ask("GET", b"/a"))
        assert [client.headers[b"host"] for client in echo.seen] == [b"proxied:80", b"t"]


@pytest.mark.parametrize("target", [b"*", b"http://proxied", b"http://proxied:8000"])
async def test_options_of_the_whole_server_is_answered(target: bytes) -> None:
    async with running() as (echo, _, port):
        kept = ask("OPTIONS", target).replace(b"connection: close\r\n", b"")
        answer = await talk(port, kept + ask("GET", b"/echo"))
        assert [client.path for client in echo.seen] == ["/echo"]
    assert answer.startswith(b"HTTP/1.1 200 OK\r\nallow: GET, HEAD, POST, PUT, PATCH, DELETE, OPTIONS\r\n")
    assert answer.count(b"HTTP/1.1 200") == 2, "the connection is kept"


@pytest.mark.parametrize("method", ["GET", "POST", "HEAD"])
@pytest.mark.parametrize(
    "target",
    [
        b"*", b"http:///echo", b"http://user@proxied/echo", b"http://user:pw@proxied/echo", b"http://a:b/echo",
        b"ftp://proxied/echo", b"proxied:80", b"echo", b"?a", b"http://[::1/echo", b"*/echo",
    ],
)  # fmt: skip
async def test_other_targets_are_400_and_say_so(method: str, target: bytes) -> None:
    async with running() as (echo, _, port):
        answer = await talk(port, ask(method, target))
        assert echo.seen == []
    assert answer.startswith(b"HTTP/1.1 400 Bad Request") and b"connection: close" in answer


async def test_a_malformed_target_is_shown() -> None:
    async with running() as (_, _, port):
        answer = await talk(port, ask("GET", b"ftp://proxied/echo"))
    assert b"must be /path, http://host/path, or * of OPTIONS, got ftp://proxied/echo" in answer


@pytest.mark.parametrize("target", [b"proxied:443", b"/echo", b"http://proxied/"])
async def test_connect_is_refused_by_what_is_no_proxy(target: bytes) -> None:
    async with running() as (echo, _, port):
        answer = await talk(port, ask("CONNECT", target) + b"\x16\x03\x01 a TLS hello")
        assert echo.seen == []
    assert answer.startswith(b"HTTP/1.1 501") and b"opens no tunnel" in answer
    assert answer.count(b"HTTP/1.1") == 1


async def test_the_balancer_serves_what_comes_through_a_proxy() -> None:
    async with running_site(api_key="k") as site:
        url = site.balancer.url
        models = await site.ask("GET", f"{url}/v1/models", authorization="Bearer k")
        assert (models.status, models.json["data"][0]["id"]) == (200, "fake-model")
        assert (await site.ask("GET", f"{url}/v1/models")).status == 401
        answer = await site.ask("POST", f"{url}/generate", {"text": "a"}, authorization="Bearer k")
        assert answer.status == 200
        assert (await site.ask("OPTIONS", "*")).status == 200


def test_only_options_may_ask_for_the_whole_server() -> None:
    assert read_target("OPTIONS", b"*") == (b"", b"*")
    assert read_target("OPTIONS", b"http://h/") == (b"h", b"/")
    with pytest.raises(ValueError, match="must be /path"):
        read_target("GET", b"*")
