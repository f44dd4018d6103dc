"""The state document: every key of the contract, JSON-ready."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import msgspec
import pytest

from pdserve.balancer.fleet.fleet import WorkerFleet
from pdserve.balancer.metrics.ledger import RequestLedger
from pdserve.balancer.metrics.state import fleet_model, render_state
from pdserve.balancer.metrics.workers import WorkerMetrics
from pdserve.bootstrap.messages import FleetView
from pdserve.errors import NoWorkerError
from pdserve.types import WorkerLoad
from tests.support.fleet_network import (
    D0,
    P0,
    SHAPE,
    Answer,
    Network,
    all_ready,
    loads,
    reserve,
    running_fleet,
    sampled,
    until,
)


def rendered(fleet: WorkerFleet) -> Any:
    """The document as its readers decode it."""
    return json.loads(msgspec.json.encode(render_state(fleet, WorkerMetrics(), RequestLedger())))


async def test_a_fresh_fleet_renders_an_empty_document() -> None:
    async with running_fleet(Network()) as fleet:
        document = rendered(fleet)
    assert document["workers"] == document["pairs"] == document["events"] == []
    assert document["model"] == ""
    assert document["bootstrap"] == {"url": "", "connected": False, "epoch": ""}
    assert isinstance(document["uptime_s"], float)


async def test_workers_and_pairs_carry_the_contract_fields() -> None:
    network = Network()
    network[D0].loads = Answer(200, b'{"loads":[{"num_running_reqs":2,"decode_moments":[1,2,3,4,5,6]}]}')
    async with running_fleet(network) as fleet:
        fleet.apply([P0, D0])
        await all_ready(fleet)
        await until(lambda: fleet.scheduler.table.load(D0.instance_id))
        await reserve(fleet, SHAPE, timeout_s=1)
        document = rendered(fleet)
        assert fleet_model(fleet) == "tiny"
    prefill, decode = document["workers"]
    assert (prefill["worker_id"], prefill["role"], prefill["state"]) == ("prefill-0", "prefill", "ready")
    assert (prefill["bootstrap_host"], prefill["bootstrap_port"], prefill["inflight"]) == ("h", 9000, 1)
    assert (decode["errors"], decode["breaker"], decode["bootstrap_port"]) == (0, "closed", None)
    assert set(decode["load"]) == set(WorkerLoad.__dataclass_fields__)
    assert decode["load"]["num_running_reqs"] == 2
    assert decode["load_age_s"] >= 0
    (pair,) = document["pairs"]
    assert pair["probe_s"] > 0
    del pair["probe_s"]
    assert pair == {
        "prefill": "prefill-0",
        "decode": "decode-0",
        "state": "ready",
        "probes": 1,
        "error": "",
        "requests": 1,
        "prompt_tokens": 0,
        "kv_bytes": None,
        "kv_bytes_s": None,
        "transfer_p50_s": None,
        "kv_path": "",
    }
    assert [event["event"] for event in document["events"]] == ["joined", "joined", "ready", "ready"]
    assert set(document["events"][0]) == {"time_s", "event", "worker", "detail"}


async def test_the_queue_and_what_is_promised_are_shown() -> None:
    network = Network()
    network[D0].loads = loads(max_total_num_tokens=5000, max_running_requests=8)
    async with running_fleet(network, max_concurrent_requests=1, queue_size=1) as fleet:
        fleet.apply([P0, D0])
        await all_ready(fleet)
        await sampled(fleet)
        await reserve(fleet, SHAPE, timeout_s=1)
        waiting = asyncio.create_task(reserve(fleet, SHAPE, timeout_s=5))
        await until(lambda: fleet.scheduler.num_waiting == 1)
        with pytest.raises(NoWorkerError):
            await reserve(fleet, SHAPE, timeout_s=5)
        document = rendered(fleet)
        waiting.cancel()
    queue, decode = document["queue"], document["workers"][1]
    assert (document["waiting"], queue["length"], queue["size"]) == (1, 1, 1)
    assert queue["oldest_wait_s"] > 0
    assert (queue["shed"], queue["dispatched"], queue["max_dispatched"]) == ({"queue_full": 1}, 1, 1)
    assert decode["admission"] == {
        "reqs": 1,
        "max_reqs": 8,
        "promised_tokens": 116,
        "committed_tokens": 116,
        "capacity_tokens": 5000,
        "queued_s": 0.0,
        "overloaded": False,
        "held": False,
    }
    assert (decode["draining"], decode["leaving"]) == (False, False)
    assert decode["wedge"]["wedged"] == 0 and decode["wedge"]["stalled_s"] >= 0.0


async def test_no_secret_is_shown() -> None:
    keys = {"api_key": "s3cret-a", "admin_api_key": "s3cret-b", "worker_api_key": "s3cret-c"}
    settings = {**keys, "bootstrap_url": "http://user:s3cret-d@127.0.0.1:9"}
    async with running_fleet(Network(), SilentMembership(), **settings) as fleet:
        fleet.apply([P0, D0])
        await all_ready(fleet)
        text = json.dumps(rendered(fleet))
    assert "http://127.0.0.1:9" in text
    assert "s3cret" not in text


class SilentMembership:
    """Never tells anything."""

    is_connected = False
    epoch = ""

    async def watch(self) -> AsyncIterator[FleetView]:
        await asyncio.Event().wait()
        yield FleetView(epoch="", version=0, workers=[])
