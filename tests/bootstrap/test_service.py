"""The service over real sockets: joining, leaving, dying, being lost and coming back."""

from __future__ import annotations

import asyncio
import http.client
import json
import logging
import os
import signal
import socket
import sys
import time
from typing import Any

import msgspec
import pytest

from pdserve.bootstrap import service as service_module
from pdserve.bootstrap.client import LeaseClient
from pdserve.bootstrap.messages import Register
from pdserve.bootstrap.service import BootstrapService
from pdserve.config.launch import BootstrapConfig
from pdserve.errors import ConfigError, KVLayoutMismatch, WorkerRejected
from pdserve.types import InstanceId, Role
from tests.support.bootstrap_parts import TIMEOUT_S, call, join, report, row, service, until, worker

DEEP = b'{"a":' + b"[" * 200_000
NOT_UTF8 = b'{"instance_id": "\xff"}'


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
        await until(lambda: not running.fleet.members(), "lease did not expire")
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
        ("POST", "/fleet/deregister", NOT_UTF8, 400),
        ("POST", "/fleet/register", {"worker": {}, "deep": [[]]}, 400),
        ("PUT", "/fleet/instances/a/ranks", DEEP, 400),
        ("GET", "/fleet/register", None, 405),
        ("GET", "/nowhere", None, 404),
        ("POST", "/fleet/heartbeat", {"instance_id": "nobody"}, 404),
        ("GET", "/fleet/view?after=x", None, 400),
        ("GET", "/fleet/view?wait_s=nan", None, 200),
        ("GET", "/fleet/view?wait_s=-1", None, 200),
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
        for body in (b"nope", NOT_UTF8, DEEP, [], {**row(), "attn_tp_size": "two"}):
            assert (await call(port, "PUT", "/route", body))[0] == 400
        assert (await call(port, "PUT", "/route", {"attn_tp_size": 1}))[0] == 400
        assert (await call(port, "GET", "/route?prefill_dp_rank=zero"))[0] == 400
        assert (await call(port, "POST", "/query_dp_ranks", {"rooms": []}))[0] == 400


async def test_taken_port_is_a_config_error_that_says_what_to_do() -> None:
    async with service() as running:
        with pytest.raises(ConfigError, match=rf"{running.port}.*choose another port with --port"):
            async with service(port=running.port):
                pass


async def test_port_range_is_kept_and_its_end_is_named() -> None:
    # Below the ephemeral range: no outgoing connection of another test can hold it.
    async with service(port_range=(31_815, 31_815)) as running:
        assert await join(running, "prefill-0", "a") == 31_815
        with pytest.raises(WorkerRejected, match="no free port left in 31815-31815"):
            await join(running, "prefill-1", "b")
        assert [member.worker_id for member in running.fleet.members()] == ["prefill-0"]


async def test_long_poll_wakes_on_a_change() -> None:
    async with service() as running:
        _, first = await call(running.port, "GET", "/fleet/view")
        path = f"/fleet/view?epoch={first['epoch']}&after={first['version']}&wait_s=20"
        waiting = asyncio.create_task(call(running.port, "GET", path))
        await join(running, "decode-0", "d", Role.DECODE)
        async with asyncio.timeout(TIMEOUT_S):
            _, second = await waiting
        assert [w["worker_id"] for w in second["workers"]] == ["decode-0"]


async def test_superseded_instance_is_unknown_afterwards() -> None:
    async with service() as running:
        await join(running, "prefill-0", "a")
        await join(running, "prefill-0", "b")
        with pytest.raises(WorkerRejected) as error:
            await asyncio.to_thread(LeaseClient(running.url).heartbeat, InstanceId("a"))
        assert error.value.status == 404


async def test_prefill_is_no_member_before_it_has_an_address() -> None:
    async with service() as running:
        info = worker("prefill-0", "a")
        running.fleet.report_rank(info.instance_id, report(), running.now())
        joining = asyncio.create_task(running.register(Register(worker=info)))
        while not joining.done():
            assert all(member.bootstrap_port for member in running.fleet.members())
            await asyncio.sleep(0)
        assert running.fleet.version == 1, "one change, not two"
        assert running.fleet.members()[0].bootstrap_port == (await joining).worker.bootstrap_port


async def test_client_that_asks_twice_gets_one_port() -> None:
    async with service() as running:
        request = Register(worker=worker("prefill-0", "a"))
        running.fleet.report_rank(request.worker.instance_id, report(), running.now())
        leases = await asyncio.gather(*[running.register(request) for _ in range(3)])
        assert len({lease.worker.bootstrap_port for lease in leases}) == 1
        assert running.fleet.version == 1


async def test_full_port_range_does_not_keep_a_restarted_worker_out(caplog: pytest.LogCaptureFixture) -> None:
    async with service(port_range=(31_816, 31_816)) as running:
        assert await join(running, "prefill-0", "a") == 31_816
        assert await join(running, "prefill-0", "b") == 31_816
        assert [member.instance_id for member in running.fleet.members()] == ["b"]
        assert "--port-range a few more ports" in caplog.text


async def test_freed_port_goes_to_nobody_else_while_another_is_free() -> None:
    async with service(port_range=(31_817, 31_818)) as running:
        assert await join(running, "prefill-0", "a") == 31_817
        running.deregister(InstanceId("a"), "stopped")
        assert await join(running, "prefill-1", "b") == 31_818


@pytest.mark.parametrize("former", [70_000, -1, 0])
async def test_impossible_former_port_is_ignored(former: int) -> None:
    async with service() as running:
        info = msgspec.structs.replace(worker("prefill-0", "a"), bootstrap_port=former)
        running.fleet.report_rank(info.instance_id, report(), running.now())
        lease = await running.register(Register(worker=info))
        assert lease.worker.bootstrap_port not in (None, former)


async def test_former_port_that_somebody_took_is_replaced_with_a_warning(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        taken = other.getsockname()[1]
        async with service() as running:
            info = msgspec.structs.replace(worker("prefill-0", "a"), bootstrap_port=taken)
            lease = await running.register(Register(worker=info, ranks=[report()]))
            assert lease.worker.bootstrap_port not in (None, taken)
            assert f"former bootstrap port {taken} is taken" in caplog.text


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"host": "0.0.0.0"}, "127.0.0.1"),
        ({"host": "127.0.0.1"}, "127.0.0.1"),
        ({"host": "0.0.0.0", "advertise_host": "svc.example"}, "svc.example"),
        ({"host": "127.0.0.1", "advertise_host": "svc.example"}, "svc.example"),
    ],
)
async def test_decode_servers_are_given_an_address_they_can_dial(
    config: dict[str, str], expected: str
) -> None:
    async with service(**config) as running:
        ranks = [msgspec.to_builtins(report())]
        body = {"worker": msgspec.to_builtins(worker("prefill-0", "a")), "ranks": ranks}
        status, lease = await call(running.port, "POST", "/fleet/register", body)
        assert (status, lease["worker"]["bootstrap_host"]) == (200, expected)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"host": "192.0.2.1"}, "give an address of this machine with --host"),
        ({"host": "no such host"}, "give an address of this machine with --host"),
        ({"lease_s": 0.0}, "lease_s must be above 0"),
        ({"port_range": (9, 8)}, "port_range must be LOW-HIGH"),
    ],
)
async def test_wrong_setting_is_a_config_error(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        async with service(**config):
            pass


async def test_stop_ends_long_polls_with_the_view_and_no_complaint(caplog: pytest.LogCaptureFixture) -> None:
    running = BootstrapService(BootstrapConfig(port=0))
    await running.start()
    await join(running, "decode-0", "d", Role.DECODE)
    path = f"/fleet/view?epoch={running.fleet.epoch}&after={running.fleet.version}&wait_s=30"
    waiting = asyncio.create_task(call(running.port, "GET", path))
    await until(lambda: bool(running.listener.num_serving), "the poll did not arrive")
    async with asyncio.timeout(TIMEOUT_S):
        await running.stop()
        status, view = await waiting
    assert (status, len(view["workers"])) == (200, 1), "the last view does not empty the fleet"
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []


async def test_service_that_stood_still_blames_nobody(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(service_module, "EXPIRY_CHECK_S", 0.02)
    monkeypatch.setattr(service_module, "STALL_S", 0.2)
    async with service(lease_s=0.5) as running:
        await join(running, "decode-0", "d", Role.DECODE)
        time.sleep(0.8)  # the loop itself stands still, longer than the lease
        await until(lambda: "stood still" in caplog.text, "stall not noticed")
        assert len(running.fleet.members()) == 1
        await until(lambda: not running.fleet.members(), "leases must still end")


@pytest.mark.process
async def test_process_ends_cleanly_on_sigterm() -> None:
    code = (
        "import logging; logging.basicConfig(level='INFO')\n"
        "from pdserve.bootstrap.service import run_bootstrap\n"
        "from pdserve.config.launch import BootstrapConfig\n"
        "run_bootstrap(BootstrapConfig(port=0))\n"
    )
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", code, stderr=asyncio.subprocess.PIPE, env=dict(os.environ)
    )
    assert process.stderr is not None
    async with asyncio.timeout(30):
        line = (await process.stderr.readline()).decode()
        assert "bootstrap service listening on http://127.0.0.1:" in line
        port = int(line.split("http://127.0.0.1:")[1].split()[0])
        _, view = await call(port, "GET", "/fleet/view")
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        path = f"/fleet/view?epoch={view['epoch']}&after={view['version']}&wait_s=30"
        writer.write(f"GET {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        await call(port, "GET", "/health")  # answered after the poll above was taken up
        process.send_signal(signal.SIGTERM)
        answer = await reader.read()
        assert json.loads(answer.split(b"\r\n\r\n")[1])["epoch"] == view["epoch"]
        rest = (await process.stderr.read()).decode()
        assert await process.wait() == 0
    writer.close()
    assert rest == ""
