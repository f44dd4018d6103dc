"""The service over real sockets: joining, leaving, dying, being lost and coming back."""

from __future__ import annotations

import asyncio
import http.client
import json
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest

from pdserve.bootstrap.client import FleetWatcher, LeaseClient, LeaseKeeper
from pdserve.bootstrap.messages import Register
from pdserve.bootstrap.service import BootstrapService
from pdserve.config import BootstrapConfig
from pdserve.errors import ConfigError, KVLayoutMismatch, WorkerRejected
from pdserve.types import InstanceId, Role
from tests.unit.test_bootstrap_registry import LAYOUT, report, row, worker

TIMEOUT_S = 10.0


@asynccontextmanager
async def service(**changes: Any) -> AsyncIterator[BootstrapService]:
    running = BootstrapService(BootstrapConfig(**{"port": 0, **changes}))
    await running.start()
    try:
        yield running
    finally:
        await running.stop()


async def call(port: int, method: str, path: str, body: Any = None) -> tuple[int, Any]:
    """One request in a thread; the body of the answer as JSON where it is JSON."""

    def run() -> tuple[int, Any]:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
        payload = body if isinstance(body, bytes | None) else json.dumps(body).encode()
        connection.request(method, path, payload)
        response = connection.getresponse()
        data = response.read()
        connection.close()
        try:
            return response.status, json.loads(data)
        except ValueError:
            return response.status, data.decode()

    return await asyncio.to_thread(run)


async def until(condition: Callable[[], bool], what: str) -> None:
    async with asyncio.timeout(TIMEOUT_S):
        while not condition():
            await asyncio.sleep(0.01)
    assert condition(), what


async def join(running: BootstrapService, name: str, instance: str, role: Role = Role.PREFILL) -> int | None:
    client = LeaseClient(running.url)
    info = worker(name, instance, role)
    await asyncio.to_thread(client.report_rank, info.instance_id, report(role))
    lease = await asyncio.to_thread(client.register, Register(worker=info))
    return lease.worker.bootstrap_port


async def test_prefill_gets_a_port_that_speaks_sglangs_protocol() -> None:
    async with service() as running:
        port = await join(running, "prefill-0", "a")
        assert port is not None
        everything = "/route?prefill_dp_rank=-1&prefill_cp_rank=-1&target_tp_rank=-1&target_pp_rank=-1"
        status, info = await call(port, "GET", everything)
        assert (status, info["attn_tp_size"], info["page_size"]) == (200, 1, 16)
        status, rank = await call(
            port, "GET", "/route?prefill_dp_rank=0&prefill_cp_rank=0&target_tp_rank=0&target_pp_rank=0"
        )
        assert (status, rank) == (200, {"rank_ip": "127.0.0.1", "rank_port": 5000})
        assert (await call(port, "GET", "/health"))[0] == 200
        body = {"bootstrap_room": 5, "dp_rank": 1}
        assert (await call(port, "POST", "/register_dp_rank", body))[0] == 200
        assert await call(port, "POST", "/query_dp_ranks", {"bootstrap_rooms": [5, 6]}) == (200, {"5": 1})
        assert (await call(port, "PUT", "/route", row(port=7000)))[0] == 200


async def test_two_prefills_never_share_an_address() -> None:
    async with service() as running:
        ports = [await join(running, f"prefill-{i}", f"i{i}") for i in range(3)]
        assert len(set(ports)) == 3
        assert await join(running, "decode-0", "d", Role.DECODE) is None


async def test_address_of_a_dead_instance_is_closed_and_not_given_to_its_successor() -> None:
    async with service() as running:
        former = await join(running, "prefill-0", "a")
        assert former is not None
        kept = http.client.HTTPConnection("127.0.0.1", former, timeout=5)
        await asyncio.to_thread(kept.request, "GET", "/health")
        assert (await asyncio.to_thread(kept.getresponse)).read() == b"OK"

        successor = await join(running, "prefill-0", "b")

        assert successor not in (None, former)
        with pytest.raises(OSError):
            await call(former, "GET", "/health")
        with pytest.raises((OSError, http.client.HTTPException)):  # the keep-alive connection broke too
            kept.auto_open = False
            await asyncio.to_thread(kept.request, "GET", "/health")
            await asyncio.to_thread(kept.getresponse)


async def test_expired_lease_takes_the_member_out_and_closes_its_port() -> None:
    async with service(lease_s=0.2) as running:
        port = await join(running, "prefill-0", "a")
        assert port is not None
        await until(lambda: not running.registry.members(), "lease did not expire")
        with pytest.raises(OSError):
            await call(port, "GET", "/health")


async def test_refusals_are_typed_errors_with_the_services_words() -> None:
    async with service() as running:
        await join(running, "prefill-0", "a")
        client = LeaseClient(running.url)
        other = worker("decode-0", "d", Role.DECODE, model="other")
        await asyncio.to_thread(client.report_rank, other.instance_id, report(Role.DECODE))
        with pytest.raises(KVLayoutMismatch, match="model: other != tiny"):
            await asyncio.to_thread(client.register, Register(worker=other))
        with pytest.raises(WorkerRejected) as pending:
            await asyncio.to_thread(client.register, Register(worker=worker("x", "unknown")))
        assert pending.value.status == 425


@pytest.mark.parametrize(
    ("method", "path", "body", "status"),
    [
        ("POST", "/fleet/register", b"{", 400),
        ("POST", "/fleet/register", {"worker": 3}, 400),
        ("GET", "/fleet/register", None, 405),
        ("GET", "/nowhere", None, 404),
        ("POST", "/fleet/heartbeat", {"instance_id": "nobody"}, 404),
        ("GET", "/fleet/view?after=x", None, 400),
        ("POST", "/fleet/deregister", b"x" * (2**20 + 1), 413),
        ("POST", "/fleet/deregister", {"instance_id": "nobody"}, 200),
    ],
)
async def test_every_answer_is_json_whatever_is_asked(method: str, path: str, body: Any, status: int) -> None:
    async with service() as running:
        got, answer = await call(running.port, method, path, body)
        assert got == status
        assert isinstance(answer, dict)
        assert status == 200 or answer["message"]


async def test_bad_input_on_a_prefill_port_is_a_400_not_a_500() -> None:
    async with service() as running:
        port = await join(running, "prefill-0", "a")
        assert port is not None
        assert (await call(port, "PUT", "/route", b"nope"))[0] == 400
        assert (await call(port, "PUT", "/route", {"attn_tp_size": 1}))[0] == 400
        assert (await call(port, "GET", "/route?prefill_dp_rank=zero"))[0] == 400
        assert (await call(port, "POST", "/query_dp_ranks", {"rooms": []}))[0] == 400


async def test_taken_port_is_a_config_error_that_says_what_to_do() -> None:
    async with service() as running:
        with pytest.raises(ConfigError, match=rf"{running.port}.*choose another port with --port"):
            async with service(port=running.port):
                pass


async def test_port_range_is_kept_and_its_end_is_named() -> None:
    async with service(port_range=(42_815, 42_815)) as running:
        assert await join(running, "prefill-0", "a") == 42_815
        with pytest.raises(WorkerRejected, match="no free port left in 42815-42815"):
            await join(running, "prefill-1", "b")
        assert [member.worker_id for member in running.registry.members()] == ["prefill-0"]


async def test_long_poll_wakes_on_a_change() -> None:
    async with service() as running:
        _, first = await call(running.port, "GET", "/fleet/view")
        path = f"/fleet/view?epoch={first['epoch']}&after={first['version']}&wait_s=20"
        waiting = asyncio.create_task(call(running.port, "GET", path))
        await join(running, "decode-0", "d", Role.DECODE)
        async with asyncio.timeout(TIMEOUT_S):
            _, second = await waiting
        assert [w["worker_id"] for w in second["workers"]] == ["decode-0"]


async def test_keeper_joins_renews_and_leaves() -> None:
    async with service(lease_s=0.4) as running:
        client = LeaseClient(running.url)
        info = worker("prefill-0", "a")
        keeper = LeaseKeeper(running.url, info, on_refused=lambda exc: None)
        keeper.start()  # before the ranks have reported: it waits for them
        await asyncio.to_thread(client.report_rank, info.instance_id, report())
        await until(lambda: len(running.registry.members()) == 1, "did not join")
        expires = running.registry.get(info.instance_id)
        assert expires is not None
        first = expires.expires_s
        await until(lambda: expires.expires_s > first, "did not renew")
        await asyncio.to_thread(keeper.stop)
        assert running.registry.members() == []


async def test_keeper_comes_back_to_a_restarted_service_with_the_same_address() -> None:
    async with service(lease_s=0.4) as running:
        main_port = running.port
        info = worker("prefill-0", "a")
        await asyncio.to_thread(LeaseClient(running.url).report_rank, info.instance_id, report())
        keeper = LeaseKeeper(running.url, info, on_refused=lambda exc: None)
        keeper.start()
        await until(lambda: len(running.registry.members()) == 1, "did not join")
        former = running.registry.members()[0].bootstrap_port
    async with service(port=main_port) as restarted:
        await until(lambda: len(restarted.registry.members()) == 1, "did not come back")
        member = restarted.registry.members()[0]
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


async def test_superseded_instance_is_unknown_afterwards() -> None:
    async with service() as running:
        await join(running, "prefill-0", "a")
        await join(running, "prefill-0", "b")
        with pytest.raises(WorkerRejected) as error:
            await asyncio.to_thread(LeaseClient(running.url).heartbeat, InstanceId("a"))
        assert error.value.status == 404
