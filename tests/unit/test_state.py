"""The state document: every key of the contract, JSON-ready."""

from __future__ import annotations

import json

from pdserve.balancer.state import fleet_model, render_state
from pdserve.types import WorkerLoad
from tests.unit.fleet_network import D0, P0, SHAPE, Answer, Network, all_ready, running_fleet, until

DISPATCHER: dict[str, object] = {"requests": {"total": 3}, "recent": []}


async def test_a_fresh_fleet_renders_an_empty_document() -> None:
    async with running_fleet(Network()) as fleet:
        document = render_state(fleet, DISPATCHER)
    assert document["workers"] == document["pairs"] == document["events"] == []
    assert document["model"] == ""
    assert document["bootstrap"] == {"url": "", "connected": False, "epoch": ""}
    assert document["requests"] == {"total": 3}
    assert isinstance(document["uptime_s"], float)


async def test_workers_and_pairs_carry_the_contract_fields() -> None:
    network = Network()
    network[D0].loads = Answer(200, b'{"loads":[{"num_running_reqs":2,"decode_moments":[1,2,3,4,5,6]}]}')
    async with running_fleet(network) as fleet:
        fleet.apply([P0, D0])
        await all_ready(fleet)
        await until(lambda: fleet.table.load(D0.instance_id))
        await fleet.reserve(SHAPE, timeout_s=1)
        document = json.loads(json.dumps(render_state(fleet, DISPATCHER)))
        assert fleet_model(fleet) == "tiny"
    prefill, decode = document["workers"]
    assert (prefill["worker_id"], prefill["role"], prefill["state"]) == ("prefill-0", "prefill", "ready")
    assert (prefill["bootstrap_host"], prefill["bootstrap_port"], prefill["inflight"]) == ("h", 9000, 1)
    assert (decode["errors"], decode["breaker"], decode["bootstrap_port"]) == (0, "closed", None)
    assert set(decode["load"]) == set(WorkerLoad.__slots__)
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
    }
    assert [event["event"] for event in document["events"]] == ["joined", "joined", "ready", "ready"]
    assert set(document["events"][0]) == {"time_s", "event", "worker", "detail"}
