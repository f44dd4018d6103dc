"""A member that says it leaves is drained: it keeps its requests and gets no other, until it is gone."""

from __future__ import annotations

import msgspec

from pdserve.balancer.metrics.ledger import RequestLedger
from pdserve.balancer.metrics.state import render_state
from pdserve.balancer.metrics.workers import WorkerMetrics
from pdserve.types import WorkerInfo
from tests.support.fleet_network import (
    D0,
    D1,
    P0,
    SHAPE,
    Network,
    all_ready,
    release,
    reserve,
    running_fleet,
    worker_states,
)


def leaving(info: WorkerInfo) -> WorkerInfo:
    return msgspec.structs.replace(info, is_leaving=True)


async def test_it_keeps_what_it_has_and_gets_nothing_new() -> None:
    async with running_fleet(Network()) as fleet:
        fleet.apply([P0, D0, D1])
        await all_ready(fleet)
        held = [await reserve(fleet, SHAPE, timeout_s=1) for _ in range(4)]
        assert {r.pair.decode.worker_id for r in held} == {D0.worker_id, D1.worker_id}
        fleet.apply([P0, leaving(D0), D1])
        assert worker_states(fleet)["decode-0"] == "draining"
        rows = render_state(fleet, WorkerMetrics(), RequestLedger()).workers
        assert [row.worker_id for row in rows if row.leaving] == ["decode-0"]
        later = [await reserve(fleet, SHAPE, timeout_s=1) for _ in range(4)]
        assert {r.pair.decode.worker_id for r in later} == {D1.worker_id}
        for reservation in held:
            release(fleet, reservation, prefill_ok=True, decode_ok=True)
        events = [event.event for event in fleet.events if event.worker == "decode-0"]
        assert events[-2:] == ["draining", "drained"]
        assert worker_states(fleet)["decode-0"] == "draining", "a member until it ends"
        fleet.apply([P0, D1])
        assert "decode-0" not in worker_states(fleet)


async def test_one_that_joins_while_it_leaves_gets_nothing() -> None:
    """As a balancer sees it that starts meanwhile."""
    async with running_fleet(Network()) as fleet:
        fleet.apply([P0, leaving(D0), D1])
        assert worker_states(fleet)["decode-0"] == "draining"
        reservation = await reserve(fleet, SHAPE, timeout_s=5)
        assert reservation.pair.decode.worker_id == D1.worker_id


async def test_its_successor_serves() -> None:
    async with running_fleet(Network()) as fleet:
        fleet.apply([P0, leaving(D0)])
        fleet.apply([P0, msgspec.structs.replace(D0, instance_id="new")])
        await all_ready(fleet)
