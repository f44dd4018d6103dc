"""The balancer as a server: its own endpoints, HTTP errors, fan-outs, start and stop."""

from __future__ import annotations

import asyncio
import json
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from pdserve.balancer.app import Balancer, bind
from pdserve.config.balancer import BalancerConfig
from pdserve.errors import ConfigError
from pdserve.types import Role
from tests.support.balancer_client import Exchange, running_site
from tests.support.sglang_server import FakeSGLang, until

PROGRAM = """
import json, logging, sys
from pdserve.balancer.app import run_balancer
from pdserve.config.balancer import BalancerConfig
logging.basicConfig(level="INFO", format="%(message)s")
workers = dict(prefill=((sys.argv[1], 8998),), decode=(sys.argv[2],))
run_balancer(BalancerConfig(port=0, **workers, shutdown_delay_s=0.0))
"""


# -- health ------------------------------------------------------------------------------------


async def test_health_follows_readiness() -> None:
    async with running_site() as site:
        for path in ("/health", "/readiness", "/liveness"):
            assert (await site.ask("GET", path)).status == 200
        await site.decode.stop()
        await site.generate({"text": "a"})
        reply = await site.ask("GET", "/health")
        assert reply.status == 503
        assert "decode-0" in reply.json["error"]["message"]
        assert (await site.ask("GET", "/liveness")).status == 200


async def test_it_starts_without_workers_and_says_so() -> None:
    async with running_site(prefill=0, decode=0) as site:
        for path in ("/health", "/readiness", "/v1/models", "/model_info", "/server_info"):
            reply = await site.ask("GET", path)
            assert reply.status == 503, path
        assert (await site.ask("GET", "/liveness")).status == 200
        assert (await site.ask("GET", "/workers")).json["total"] == 0
        assert (await site.ask("POST", "/flush_cache")).status == 503


async def test_head_is_get_without_a_body() -> None:
    async with running_site() as site:
        reply = await site.ask("HEAD", "/health")
        assert (reply.status, reply.body) == (200, b"")


# -- documents ---------------------------------------------------------------------------------


async def test_state_document_has_the_request() -> None:
    async with running_site() as site:
        await site.generate({"text": "12345678"})
        await site.ask("POST", "/v1/chat/completions", {"messages": [], "stream": True})
        state = (await site.ask("GET", "/pdserve/state")).json
        assert state["requests"] == {
            "total": 2, "inflight": 0, "completed": 2, "failed": 0, "aborted": 0, "shed": 0, "retried": 0,
            "resumed": 0, "moved": 0,
            "deflected": 0,
        }  # fmt: skip
        plain, stream = state["recent"]
        sent = site.decode.requests[0]
        assert (plain["rid"], plain["room"]) == (sent["rid"], sent["bootstrap_room"])
        assert (plain["pair"], plain["route"], plain["stream"]) == ("prefill-0>decode-0", "/generate", False)
        assert (plain["status"], plain["finish"], plain["completion_tokens"]) == (200, "length", 3)
        assert plain["ttft_s"] is None
        assert stream["ttft_s"] <= stream["e2e_s"]
        assert [pair["requests"] for pair in state["pairs"]] == [2]
        assert [worker["inflight"] for worker in state["workers"]] == [0, 0]


async def test_recent_keeps_the_last_64() -> None:
    async with running_site() as site:
        async with asyncio.TaskGroup() as group:
            for _ in range(70):
                group.create_task(site.generate({"text": "a"}))
        state = (await site.ask("GET", "/pdserve/state")).json
        assert (len(state["recent"]), state["requests"]["completed"]) == (64, 70)
        assert len({row["room"] for row in state["recent"]}) == 64


async def test_workers_are_listed_as_by_sglang_router() -> None:
    async with running_site(prefill=1, decode=2) as site:
        document = (await site.ask("GET", "/workers")).json
        assert document["stats"] == {"prefill_count": 1, "decode_count": 2, "regular_count": 0}
        assert document["total"] == 3
        first = document["workers"][0]
        assert (first["id"], first["url"]) == ("prefill-0", site.prefill.url)
        assert (first["worker_type"], first["bootstrap_port"]) == ("prefill", 8998)
        assert (first["model_id"], first["is_healthy"], first["load"]) == ("fake-model", True, 0)


async def test_models_and_model_info_come_from_any_worker() -> None:
    async with running_site(decode=2) as site:
        await site.decode.stop()
        models = await site.ask("GET", "/v1/models")
        assert models.json["data"][0]["id"] == "fake-model"
        for path in ("/model_info", "/get_model_info"):
            assert (await site.ask("GET", path)).json["model_path"] == "fake-model"


async def test_server_info_gathers_all_workers() -> None:
    async with running_site(prefill=1, decode=2) as site:
        info = (await site.ask("GET", "/server_info")).json
        assert info["name"] == "decode-0"
        assert [worker["name"] for worker in info["prefill"]] == ["prefill-0"]
        assert [worker["name"] for worker in info["decode"]] == ["decode-0", "decode-1"]
        assert [state["name"] for state in info["internal_states"]] == ["decode-0", "decode-1"]
        assert (await site.ask("GET", "/get_server_info")).json == info


# -- fan-outs ----------------------------------------------------------------------------------


async def test_flush_cache_reaches_every_worker() -> None:
    async with running_site(prefill=2, decode=1) as site:
        reply = await site.ask("POST", "/flush_cache?timeout=3")
        assert (reply.status, reply.json["success"]) == (200, True)
        assert [worker["status"] for worker in reply.json["workers"]] == [200, 200, 200]
        assert [fake.flushes for fake in site.fakes] == [1, 1, 1]
        await site.decode.stop()
        reply = await site.ask("GET", "/flush_cache")
        assert (reply.status, reply.json["success"]) == (502, False)
        assert [worker["status"] for worker in reply.json["workers"]] == [200, 200, 502]


async def test_abort_request_reaches_every_worker() -> None:
    async with running_site() as site:
        assert (await site.ask("POST", "/abort_request", {"rid": "abc"})).status == 200
        assert site.prefill.aborts == site.decode.aborts == ["abc"]
        assert (await site.ask("POST", "/abort_request", b"{")).status == 400


@pytest.mark.parametrize("name", ["body", "header"])
async def test_abort_request_understands_the_clients_own_name(name: str) -> None:
    async with running_site() as site:
        gate = site.decode.behaviour.gate = asyncio.Event()
        body = {"text": "a"} | ({"rid": "mine"} if name == "body" else {})
        headers = {"x_request_id": "mine"} if name == "header" else {}
        async with site.exchange("POST", "/generate", body, **headers) as exchange:
            await until(lambda: site.decode.requests)
            await site.ask("POST", "/abort_request", {"rid": "mine"})
            assert site.decode.aborts == site.prefill.aborts == [site.decode.requests[0]["rid"]]
            gate.set()
            assert (await exchange.reply()).status == 200


# -- HTTP errors -------------------------------------------------------------------------------


async def test_unknown_path_is_404_json() -> None:
    async with running_site() as site:
        assert (await site.ask("GET", "/nope")).json["error"]["message"]
        reply = await site.ask("POST", "/v1/nope")
        assert (reply.status, reply.json["code"], reply.json["object"]) == (404, 404, "error")


async def test_wrong_method_is_405_with_allow() -> None:
    async with running_site() as site:
        reply = await site.ask("GET", "/generate")
        assert (reply.status, reply.headers["allow"]) == (405, "POST, PUT")
        reply = await site.ask("PUT", "/v1/completions", {})
        assert (reply.status, reply.headers["allow"], reply.json["code"]) == (405, "POST", 405)
        assert (await site.ask("POST", "/health")).headers["allow"] == "GET"


async def test_long_body_is_413_before_it_is_read() -> None:
    async with running_site(max_body_bytes=100) as site:
        head = "POST /generate HTTP/1.1\r\nhost: t\r\ncontent-length: 101\r\n\r\n"
        exchange = Exchange(site.balancer.url, "POST", "/generate")
        exchange._request = head.encode()
        async with exchange:
            reply = await exchange.reply()
        assert (reply.status, reply.headers["connection"]) == (413, "close")
        assert "100" in reply.json["error"]["message"]


async def test_long_body_of_unknown_length_is_413() -> None:
    async with running_site(max_body_bytes=100) as site:
        exchange = Exchange(site.balancer.url, "POST", "/v1/completions")
        head = b"POST /v1/completions HTTP/1.1\r\nhost: t\r\ntransfer-encoding: chunked\r\n\r\n"
        exchange._request = head + b"%x\r\n%b\r\n" % (101, b"x" * 101)
        async with exchange:
            reply = await exchange.reply()
        assert (reply.status, reply.json["code"]) == (413, 413)


async def test_body_of_exactly_the_limit_is_taken() -> None:
    body = json.dumps({"text": "a"}).encode()
    async with running_site(max_body_bytes=len(body)) as site:
        assert (await site.generate(body)).status == 200


# -- life --------------------------------------------------------------------------------------


def test_taken_port_is_a_config_error() -> None:
    taken = bind("127.0.0.1", 0)
    port = taken.getsockname()[1]
    with pytest.raises(ConfigError, match=rf"{port}.*choose another with --port"):
        bind("127.0.0.1", port)
    taken.close()


def test_unknown_host_is_a_config_error() -> None:
    with pytest.raises(ConfigError, match="check --host"):
        bind("no such host", 0)


async def test_stop_before_start_is_harmless() -> None:
    await Balancer(BalancerConfig()).stop()


@asynccontextmanager
async def balancer_process(*fakes: FakeSGLang) -> AsyncIterator[tuple[asyncio.subprocess.Process, str]]:
    """``run_balancer`` in a process of its own, with a ready pair; its URL."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", PROGRAM, *(fake.url for fake in fakes), stderr=asyncio.subprocess.PIPE
    )
    try:
        assert process.stderr is not None
        url = ""
        async with asyncio.timeout(20):
            while (line := (await process.stderr.readline()).decode()) and "a token came" not in line:
                url = line.split(" on ")[1].strip() if "balancer listening on" in line else url
        yield process, url
    finally:
        if process.returncode is None:
            process.kill()
        await process.communicate()


@pytest.mark.process
async def test_sigterm_lets_requests_finish_and_exits_zero() -> None:
    async with (
        FakeSGLang(Role.PREFILL) as prefill,
        FakeSGLang(Role.DECODE) as decode,
        balancer_process(prefill, decode) as (process, url),
    ):
        gate = decode.behaviour.gate = asyncio.Event()
        num_seen = len(decode.requests)
        async with Exchange(url, "POST", "/generate", {"text": "a"}) as exchange:
            await until(lambda: len(decode.requests) > num_seen)
            process.send_signal(signal.SIGTERM)
            gate.set()
            assert (await exchange.reply()).status == 200
        async with asyncio.timeout(10):
            assert await process.wait() == 0


@pytest.mark.process
async def test_a_second_signal_ends_at_once_and_aborts() -> None:
    async with (
        FakeSGLang(Role.PREFILL) as prefill,
        FakeSGLang(Role.DECODE) as decode,
        balancer_process(prefill, decode) as (process, url),
    ):
        num_seen = len(decode.requests)
        decode.behaviour.hang = True
        async with Exchange(url, "POST", "/generate", {"text": "a"}) as exchange:
            await until(lambda: len(decode.requests) > num_seen)
            process.send_signal(signal.SIGINT)
            assert process.stderr is not None
            while b"draining" not in await process.stderr.readline():
                pass
            process.send_signal(signal.SIGINT)
            assert (await exchange.reply()).status == 503
        async with asyncio.timeout(10):
            assert await process.wait() == 0
        rid = decode.requests[-1]["rid"]
        assert prefill.aborts == decode.aborts == [rid]
