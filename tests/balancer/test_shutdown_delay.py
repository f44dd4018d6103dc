"""SIGTERM: readiness is 503 at once, requests are served on until load balancers have noticed."""

from __future__ import annotations

import asyncio
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from pdserve.types import Role
from tests.support.balancer_client import Exchange, Site, running_site
from tests.support.sglang_server import FakeSGLang, until
from tests.support.wire import Wire

PLAIN = {"text": "a"}
HOUR_S = 3600.0
PROGRAM = """
import logging, sys
from pdserve.balancer.app import run_balancer
from pdserve.config.balancer import BalancerConfig
logging.basicConfig(level="INFO", format="%(message)s")
workers = dict(prefill=((sys.argv[1], 8998),), decode=(sys.argv[2],))
run_balancer(BalancerConfig(port=0, **workers, shutdown_delay_s=3600.0))
"""


@asynccontextmanager
async def leaving(site: Site, drain_s: float = 0.0) -> AsyncIterator[asyncio.Event]:
    """The balancer within its delay, which the event ends as a second signal would."""
    hurry = asyncio.Event()
    stopping = asyncio.create_task(site.balancer.stop(drain_s, hurry, delay_s=HOUR_S))
    await asyncio.sleep(0)
    yield hurry
    hurry.set()
    await stopping


async def test_readiness_is_503_at_once_and_liveness_stays() -> None:
    async with running_site() as site, leaving(site):
        for path in ("/readiness", "/ready", "/health", "/ping", "/health_generate"):
            reply = await site.ask("GET", path)
            assert reply.status == 503, path
            assert "shutting down" in reply.json["error"]["message"], path
        assert (await site.ask("GET", "/liveness")).status == 200
        assert (await site.ask("GET", "/pdserve/state")).status == 200


async def test_requests_on_new_and_kept_connections_are_served() -> None:
    async with running_site() as site, Wire.open(site.balancer.url) as kept:
        kept.send_json("/generate", PLAIN)
        assert (await kept.reply()).status == 200
        async with leaving(site), Wire.open(site.balancer.url) as new:
            for wire in (kept, new):
                wire.send_json("/generate", PLAIN)
                *_, reply = await wire.ended()
                assert (reply.status, reply.header("connection")) == (200, "close")
        assert site.counts["completed"] == 3


async def test_after_the_delay_the_port_is_closed_and_running_requests_end() -> None:
    async with running_site() as site, Wire.open(site.balancer.url) as idle:
        idle.send_json("/generate", PLAIN)
        assert (await idle.reply()).status == 200
        num_seen = len(site.decode.requests)
        gate = site.decode.behaviour.gate = asyncio.Event()
        late = site.exchange("GET", "/liveness")
        async with site.exchange("POST", "/generate", PLAIN) as exchange:
            await until(lambda: len(site.decode.requests) > num_seen)
            stopping = asyncio.create_task(site.balancer.stop(60.0, delay_s=0.01))
            await idle.ended()
            with pytest.raises(ConnectionError):
                await late.__aenter__()
            assert not stopping.done()
            gate.set()
            assert (await exchange.reply()).status == 200
            await stopping


async def test_a_request_that_is_half_here_when_the_port_closes_is_served() -> None:
    async with running_site() as site, Wire.open(site.balancer.url) as slow:
        body = b'{"text": "a"}'
        slow.send(b"POST /generate HTTP/1.1\r\nhost: t\r\ncontent-length: %d\r\n\r\n" % len(body))
        (connection,) = site.balancer._server._connections
        await until(lambda: not connection.is_idle)
        stopping = asyncio.create_task(site.balancer.stop(60.0))
        late = site.exchange("GET", "/liveness")
        await until(lambda: connection._server.is_closing)
        with pytest.raises(ConnectionError):
            await late.__aenter__()
        slow.send(body)
        (reply,) = await slow.ended()
        assert (reply.status, reply.header("connection")) == (200, "close")
        await stopping


async def test_a_second_signal_ends_the_delay_and_what_runs() -> None:
    async with running_site() as site:
        site.decode.behaviour.hang = True
        async with site.exchange("POST", "/generate", PLAIN) as exchange:
            await until(lambda: site.decode.requests)
            async with leaving(site, drain_s=HOUR_S) as hurry:
                hurry.set()
                assert (await exchange.reply()).status == 503
        assert site.decode.aborts == [site.decode.requests[0]["rid"]]


@asynccontextmanager
async def balancer_process() -> AsyncIterator[tuple[asyncio.subprocess.Process, str, FakeSGLang]]:
    """A balancer with a ready pair and an hour's delay; its URL and its decode server."""
    async with FakeSGLang(Role.PREFILL) as prefill, FakeSGLang(Role.DECODE) as decode:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-c", PROGRAM, prefill.url, decode.url),
            stderr=asyncio.subprocess.PIPE,
        )
        try:
            url = ""
            async with asyncio.timeout(60):
                while "a token came" not in (line := await said(process)):
                    url = line.split(" on ")[1].strip() if "balancer listening on" in line else url
            yield process, url, decode
        finally:
            if process.returncode is None:
                process.kill()
            await process.communicate()


async def said(process: asyncio.subprocess.Process) -> str:
    """The next line of its log."""
    assert process.stderr is not None
    line = await process.stderr.readline()
    assert line, "it ended"
    return line.decode()


async def signalled(process: asyncio.subprocess.Process, number: signal.Signals) -> None:
    """Send it and wait until it is heard."""
    process.send_signal(number)
    async with asyncio.timeout(60):
        while "balancer leaving" not in await said(process):
            pass


@pytest.mark.process
async def test_a_rolling_update_behind_a_load_balancer_loses_nothing() -> None:
    """Clients on kept connections go on asking until they are told to close, then come on new ones."""
    async with balancer_process() as (process, url, _):
        statuses: list[int] = []
        is_over = asyncio.Event()

        async def client() -> None:
            while not is_over.is_set():
                async with Wire.open(url) as wire:
                    while not is_over.is_set() and not wire.is_closed:
                        wire.send_json("/generate", PLAIN)
                        reply = await wire.reply()
                        statuses.append(reply.status)
                        if reply.header("connection") == "close":
                            await wire.ended()
                        wire.forget()
                        await asyncio.sleep(0)

        async with asyncio.timeout(60), asyncio.TaskGroup() as clients:
            for _ in range(4):
                clients.create_task(client())
            await until(lambda: len(statuses) > 20)
            await signalled(process, signal.SIGTERM)
            async with Exchange(url, "GET", "/readiness") as exchange:
                assert (await exchange.reply()).status == 503
            seen = len(statuses)
            await until(lambda: len(statuses) > seen + 50)
            is_over.set()  # the load balancer has turned elsewhere
        assert set(statuses) == {200}
        process.send_signal(signal.SIGTERM)
        async with asyncio.timeout(60):
            assert await process.wait() == 0


@pytest.mark.process
@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGINT])
async def test_a_second_signal_ends_quickly(second: signal.Signals) -> None:
    async with balancer_process() as (process, url, decode):
        num_seen = len(decode.requests)
        decode.behaviour.hang = True
        async with Exchange(url, "POST", "/generate", PLAIN) as exchange:
            await until(lambda: len(decode.requests) > num_seen)
            await signalled(process, signal.SIGTERM)
            process.send_signal(second)
            assert (await exchange.reply()).status == 503
        async with asyncio.timeout(60):
            assert await process.wait() == 0


@pytest.mark.process
async def test_ctrl_c_waits_for_no_load_balancer() -> None:
    async with balancer_process() as (process, _, _):
        await signalled(process, signal.SIGINT)
        async with asyncio.timeout(60):
            assert await process.wait() == 0
