"""Keeping a lease and watching the fleet while the service goes, comes back, or is somebody else."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import msgspec
import pytest

from pdserve.bootstrap import watch
from pdserve.bootstrap.client import LeaseClient, LeaseKeeper
from pdserve.bootstrap.messages import FleetView
from pdserve.bootstrap.watch import FleetWatcher, settled
from pdserve.errors import ConfigError, KVLayoutMismatch, WorkerRejected
from pdserve.types import InstanceId, Role
from tests.support.bootstrap_parts import LAYOUT, TIMEOUT_S, join, report, service, until, worker


@asynccontextmanager
async def stranger(*answers: bytes) -> AsyncIterator[int]:
    """A server that answers each connection with the next of ``answers``, and then with the last one."""
    count = 0

    async def on_connect(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal count
        answer = answers[min(count, len(answers) - 1)]
        count += 1
        await reader.read(2**16)
        writer.write(answer)
        writer.close()

    server = await asyncio.start_server(on_connect, "127.0.0.1", 0)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()


def http_answer(body: bytes, status: str = "200 OK") -> bytes:
    return f"HTTP/1.1 {status}\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body


async def test_keeper_joins_renews_and_leaves() -> None:
    async with service(lease_s=0.4) as running:
        client = LeaseClient(running.url)
        info = worker("prefill-0", "a")
        keeper = LeaseKeeper(running.url, info, on_refused=lambda exc: None)
        keeper.start()  # before the ranks have reported: it waits for them
        await asyncio.to_thread(client.report_rank, info.instance_id, report())
        await until(lambda: len(running.fleet.members()) == 1, "did not join")
        expires = running.fleet.get(info.instance_id)
        assert expires is not None
        first = expires.expires_s
        await until(lambda: expires.expires_s > first, "did not renew")
        await asyncio.to_thread(keeper.stop)
        assert running.fleet.members() == []


async def test_keeper_comes_back_to_a_restarted_service_with_the_same_address() -> None:
    async with service(lease_s=0.4) as running:
        main_port = running.port
        info = worker("prefill-0", "a")
        await asyncio.to_thread(LeaseClient(running.url).report_rank, info.instance_id, report())
        keeper = LeaseKeeper(running.url, info, on_refused=lambda exc: None)
        keeper.start()
        await until(lambda: len(running.fleet.members()) == 1, "did not join")
        former = running.fleet.members()[0].bootstrap_port
    async with service(port=main_port) as restarted:
        await until(lambda: len(restarted.fleet.members()) == 1, "did not come back")
        member = restarted.fleet.members()[0]
        assert (member.instance_id, member.bootstrap_port) == ("a", former)
        assert member.kv_layout == LAYOUT
        await asyncio.to_thread(keeper.stop)


async def test_keeper_reports_a_final_refusal_once() -> None:
    async with service() as running:
        await join(running, "prefill-0", "a")
        other = worker("decode-0", "d", Role.DECODE, model="other")
        await asyncio.to_thread(LeaseClient(running.url).report_rank, other.instance_id, report(Role.DECODE))
        refused = threading.Event()
        errors: list[Exception] = []

        def on_refused(exc: Exception) -> None:
            errors.append(exc)
            refused.set()

        LeaseKeeper(running.url, other, on_refused=on_refused).start()
        assert await asyncio.to_thread(refused.wait, TIMEOUT_S)
        assert [type(error) for error in errors] == [KVLayoutMismatch]


async def test_watcher_keeps_members_while_a_restarted_service_fills_up() -> None:
    async with service() as running:
        main_port = running.port
        await join(running, "prefill-0", "a")
        await join(running, "decode-0", "d", Role.DECODE)
        watcher = FleetWatcher(running.url, grace_s=1.0)
        views = watcher.watch()
        async with asyncio.timeout(TIMEOUT_S):
            assert len((await anext(views)).workers) == 2
    following = asyncio.ensure_future(anext(views))
    await until(lambda: not watcher.is_connected, "loss not noticed")
    async with service(port=main_port) as restarted:
        async with asyncio.timeout(TIMEOUT_S):
            view = await following
        assert {w.worker_id for w in view.workers} == {"prefill-0", "decode-0"}, "nobody dropped too early"
        await join(restarted, "prefill-0", "a")
        async with asyncio.timeout(TIMEOUT_S):
            while True:
                view = await anext(views)
                if {w.worker_id for w in view.workers} == {"prefill-0"}:
                    break  # the one that never came back is dropped after the grace time
        await views.aclose()  # type: ignore[attr-defined]


async def test_keeper_gives_up_its_name_to_a_newer_process_and_says_so() -> None:
    async with service(lease_s=0.4) as running:
        info = worker("prefill-0", "a")
        await asyncio.to_thread(LeaseClient(running.url).report_rank, info.instance_id, report())
        errors: list[Exception] = []
        keeper = LeaseKeeper(running.url, info, on_refused=errors.append)
        keeper.start()
        await until(lambda: len(running.fleet.members()) == 1, "did not join")
        await join(running, "prefill-0", "b")
        await until(lambda: bool(errors), "the older process does not notice")
        assert isinstance(errors[0], ConfigError)
        assert "start it under another name" in str(errors[0])
        await asyncio.to_thread(keeper.stop)
        assert [member.instance_id for member in running.fleet.members()] == ["b"]
        assert len(errors) == 1


@pytest.mark.parametrize("body", [b"hello", b"\xff\xfe", b'{"worker": 3}'])
async def test_keeper_outlives_a_stranger_on_the_services_port(body: bytes) -> None:
    async with stranger(http_answer(body)) as port:
        info = worker("decode-0", "d", Role.DECODE)
        with pytest.raises(WorkerRejected):
            await asyncio.to_thread(LeaseClient(f"http://127.0.0.1:{port}").heartbeat, info.instance_id)
        refused: list[Exception] = []
        keeper = LeaseKeeper(f"http://127.0.0.1:{port}", info, on_refused=refused.append)
        keeper.start()
        await until(lambda: keeper._client is not None and keeper._thread.is_alive(), "thread did not start")
    async with service(port=port) as running:
        running.fleet.report_rank(info.instance_id, report(Role.DECODE), running.now())
        await until(lambda: len(running.fleet.members()) == 1, "did not join the service that came")
        await asyncio.to_thread(keeper.stop)
    assert refused == []


async def test_keeper_stops_quickly_although_the_service_hangs() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:  # accepts into its backlog, never answers
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        keeper = LeaseKeeper(url, worker("decode-0", "d", Role.DECODE), on_refused=lambda exc: None)
        keeper.start()
        await asyncio.to_thread(silent.accept)
        started = time.monotonic()
        await asyncio.to_thread(keeper.stop)
        assert time.monotonic() - started < 4.0


async def test_watcher_survives_whatever_answers_on_the_port(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "MAX_BACKOFF_S", 0.01)
    good = msgspec.json.encode(
        FleetView(epoch="e", version=1, workers=[worker("decode-0", "d", Role.DECODE)])
    )
    nonsense = [
        b"", b"\r\n\r\n", b"SSH-2.0-x\r\n\r\n", b"HTTP/1.1 200 OK\r\nX: " + b"x" * 100_000,
        b"HTTP/1.1 200 OK\r\n\r\n", b"HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 99\r\n\r\nshort", http_answer(b"down", "503 Unavailable"),
        http_answer(b"{"), http_answer(b"\xff"),
    ]  # fmt: skip
    async with stranger(*nonsense, http_answer(good)) as port:
        watcher = FleetWatcher(f"http://127.0.0.1:{port}")
        async with asyncio.timeout(TIMEOUT_S):
            view = await anext(watcher.watch())
    assert [w.worker_id for w in view.workers] == ["decode-0"]
    assert (watcher.is_connected, watcher.epoch) == (True, "e")


async def test_member_that_came_back_and_left_again_is_not_kept() -> None:
    async with service() as running:
        main_port = running.port
        await join(running, "prefill-0", "a")
        await join(running, "decode-0", "d", Role.DECODE)
        watcher = FleetWatcher(running.url, grace_s=60.0)
        views = watcher.watch()
        async with asyncio.timeout(TIMEOUT_S):
            await anext(views)
    async with service(port=main_port) as restarted:
        await join(restarted, "prefill-0", "a")
        async with asyncio.timeout(TIMEOUT_S):
            assert {w.worker_id for w in (await anext(views)).workers} == {"prefill-0", "decode-0"}
            restarted.deregister(InstanceId("a"), "stopped")
            assert {w.worker_id for w in (await anext(views)).workers} == {"decode-0"}
    await views.aclose()  # type: ignore[attr-defined]


def test_view_is_settled_once_every_lease_would_have_run_out() -> None:
    view = FleetView(epoch="e", version=0, workers=[], uptime_s=9.9)
    assert not settled(view, lease_s=10.0)
    assert settled(msgspec.structs.replace(view, uptime_s=10.0), lease_s=10.0)
