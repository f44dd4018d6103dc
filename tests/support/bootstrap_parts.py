"""Members and a running service for the bootstrap tests: real sockets, no SGLang."""

from __future__ import annotations

import asyncio
import http.client
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

from pdserve.bootstrap.client import LeaseClient
from pdserve.bootstrap.messages import RankRoute, Register
from pdserve.bootstrap.service import BootstrapService
from pdserve.config.launch import BootstrapConfig
from pdserve.types import InstanceId, KVLayoutDescriptor, Role, WorkerId, WorkerInfo

TIMEOUT_S = 60.0
LAYOUT = KVLayoutDescriptor(page_size=16, dtype="float32", num_layers=2, num_kv_heads=2, token_bytes=256)


def row(tp_rank: int = 0, tp_size: int = 1, port: int = 5000) -> dict[str, object]:
    """What one SGLang prefill rank PUTs."""
    return {
        "attn_tp_size": tp_size, "attn_tp_rank": tp_rank, "attn_cp_size": 1, "attn_cp_rank": 0,
        "attn_dp_size": 1, "attn_dp_rank": 0, "pp_size": 1, "pp_rank": 0, "system_dp_size": 1,
        "system_dp_rank": 0, "rank_ip": "127.0.0.1", "rank_port": port, "page_size": 16,
        "kv_cache_dtype": "float32", "kv_layout": None, "load_balance_method": "follow_bootstrap_room",
        "prefill_http_port": 31000, "dsv41_spec_layout": None, "enable_dsa_cache_layer_split": False,
        "enable_kv_cache_sharding": False, "decode_allocation_policy": "early",
    }  # fmt: skip


def worker(name: str, instance: str, role: Role = Role.PREFILL, model: str = "tiny") -> WorkerInfo:
    return WorkerInfo(
        worker_id=WorkerId(name),
        instance_id=InstanceId(instance),
        role=role,
        url="http://127.0.0.1:31000",
        model=model,
        served_model_name=model,
    )


def report(role: Role = Role.PREFILL, layout: KVLayoutDescriptor = LAYOUT) -> RankRoute:
    route = row() if role is Role.PREFILL else None
    return RankRoute(role=role, rank=0, num_ranks=1, kv_layout=layout, route=route)


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


async def until_listening(port: int) -> None:
    """Wait for a server that starts in a thread or process of its own."""
    async with asyncio.timeout(TIMEOUT_S):
        while True:
            try:
                _, writer = await asyncio.open_connection("127.0.0.1", port)
            except OSError:
                await asyncio.sleep(0.01)
            else:
                writer.close()
                return
