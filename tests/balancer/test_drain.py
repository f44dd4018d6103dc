"""Workers come and go by an operator's wish: added, drained, taken back, removed."""

from __future__ import annotations

import asyncio

import msgspec
import pytest

from pdserve.balancer.fleet.fleet import WorkerFleet
from pdserve.balancer.metrics.ledger import RequestLedger
from pdserve.balancer.metrics.state import render_state
from pdserve.balancer.metrics.workers import WorkerMetrics
from pdserve.errors import ConfigError, NoWorkerError, WorkerUnreachable
from pdserve.types import InstanceId, WorkerId
from tests.support.fleet_network import (
    D0,
    D1,
    P0,
    P1,
    SHAPE,
    Network,
    all_ready,
    pair_states,
    prefill_finished,
    release,
    reserve,
    running_fleet,
    until,
    worker,
    worker_states,
)


def events_of(fleet: WorkerFleet, name: str) -> list[str]:
    """What happened to one worker, in order."""
    return [event.event for event in fleet.events if event.worker == name]


async def test_a_draining_worker_finishes_what_it_has_and_gets_nothing_new() -> None:
    async with running_fleet(Network()) as fleet:
        fleet.apply([P0, D0, D1])
        await all_ready(fleet)
        held = [await reserve(fleet, SHAPE, timeout_s=1) for _ in range(4)]
        fleet.drain(D0.worker_id)
        assert worker_states(fleet)["decode-0"] == "draining"
        later = [await reserve(fleet, SHAPE, timeout_s=1) for _ in range(4)]
        assert {r.pair.decode for r in later} == {D1}
        assert "drained" not in events_of(fleet, "decode-0")
        for reservation in held:
            release(fleet, reservation, prefill_ok=True, decode_ok=True)
        assert events_of(fleet, "decode-0")[-2:] == ["draining", "drained"]
        document = render_state(fleet, WorkerMetrics(), RequestLedger())
        row = next(row for row in document.workers if row.worker_id == "decode-0")
        assert (row.state, row.draining, row.inflight) == ("draining", True, 0)


async def test_an_idle_worker_is_drained_at_once_and_draining_twice_changes_nothing() -> None:
    async with running_fleet(Network()) as fleet:
        fleet.apply([P0, D0])
        await all_ready(fleet)
        fleet.drain(D0.worker_id)
        fleet.drain(D0.worker_id)
        assert events_of(fleet, "decode-0") == ["joined", "ready", "draining", "drained"]


async def test_prefill_is_drained_once_its_own_legs_have_ended() -> None:
    async with running_fleet(Network()) as fleet:
        fleet.apply([P0, D0])
        await all_ready(fleet)
        reservation = await reserve(fleet, SHAPE, timeout_s=1)
        fleet.drain(P0.worker_id)
        prefill_finished(fleet, reservation)
        assert events_of(fleet, "prefill-0")[-1] == "drained"
        release(fleet, reservation, prefill_ok=True, decode_ok=True)
        assert events_of(fleet, "prefill-0").count("drained") == 1


async def test_with_every_decode_worker_draining_requests_wait_and_learn_why() -> None:
    async with running_fleet(Network()) as fleet:
        fleet.apply([P0, D0])
        await all_ready(fleet)
        fleet.drain(D0.worker_id)
        assert not fleet.scheduler.has_ready_pair
        with pytest.raises(NoWorkerError, match="every decode server is draining: decode-0"):
            await reserve(fleet, SHAPE, timeout_s=0.01)


async def test_undrain_returns_a_worker_to_service_after_a_probe() -> None:
    network = Network()
    async with running_fleet(network) as fleet:
        fleet.apply([P0, D0])
        await all_ready(fleet)
        fleet.drain(D0.worker_id)
        network[D0].gate.clear()
        probes = network[D0].calls["/generate"]
        waiting = asyncio.create_task(reserve(fleet, SHAPE, timeout_s=5))
        fleet.undrain(D0.worker_id)
        await until(lambda: network[D0].calls["/generate"] == probes + 1)
        assert worker_states(fleet)["decode-0"] == "joining"
        assert not waiting.done()
        network[D0].gate.set()
        assert (await waiting).pair.decode == D0
        assert worker_states(fleet)["decode-0"] == "ready"


async def test_a_draining_worker_is_not_probed() -> None:
    network = Network()
    async with running_fleet(network) as fleet:
        fleet.apply([P0, D0, D1])
        await all_ready(fleet)
        fleet.drain(D0.worker_id)
        probes = network[D0].calls["/generate"]
        reservation = await reserve(fleet, SHAPE, timeout_s=1)
        release(fleet, reservation, prefill_ok=False, error=WorkerUnreachable(P0.url, "reset"))
        await until(lambda: pair_states(fleet)["prefill-0>decode-1"] == "ready")
        assert network[D0].calls["/generate"] == probes
        assert worker_states(fleet)["decode-0"] == "draining"


async def test_a_probe_under_way_does_not_bring_a_draining_worker_back() -> None:
    network = Network()
    network[D0].gate.clear()
    async with running_fleet(network) as fleet:
        fleet.apply([P0, D0])
        await until(lambda: network[D0].calls["/generate"] == 1)
        fleet.drain(D0.worker_id)
        network[D0].gate.set()
        await until(lambda: fleet.pairs()[0].probes == 1)
        assert worker_states(fleet)["decode-0"] == "draining"
        assert not fleet.scheduler.has_ready_pair


async def test_a_removed_worker_leaves_once_its_requests_have_ended() -> None:
    async with running_fleet(Network()) as fleet:
        fleet.apply([P0, D0, D1])
        await all_ready(fleet)
        held = [await reserve(fleet, SHAPE, timeout_s=1) for _ in range(2)]
        fleet.remove_worker(D0.worker_id)
        assert worker_states(fleet)["decode-0"] == "draining"
        for reservation in held:
            release(fleet, reservation, prefill_ok=True, decode_ok=True)
        assert "decode-0" not in worker_states(fleet)
        assert events_of(fleet, "decode-0")[-3:] == ["draining", "drained", "gone"]
        assert fleet.find(D0.worker_id) is None


async def test_a_removed_member_stays_away_until_it_is_a_new_instance() -> None:
    async with running_fleet(Network()) as fleet:
        fleet.apply([P0, D0])
        await all_ready(fleet)
        fleet.remove_worker(D0.worker_id)
        fleet.apply([P0, D0])
        assert worker_states(fleet) == {"prefill-0": "ready"}
        fleet.apply([P0, worker(D0.role, 0, "b")])
        await all_ready(fleet)


async def test_undrain_calls_a_removal_off() -> None:
    async with running_fleet(Network()) as fleet:
        fleet.apply([P0, D0])
        await all_ready(fleet)
        reservation = await reserve(fleet, SHAPE, timeout_s=1)
        fleet.remove_worker(D0.worker_id)
        fleet.undrain(D0.worker_id)
        release(fleet, reservation, prefill_ok=True, decode_ok=True)
        await all_ready(fleet)


async def test_removing_a_drained_worker_forgets_it_at_once() -> None:
    async with running_fleet(Network()) as fleet:
        fleet.apply([P0, D0])
        fleet.drain(D0.worker_id)
        fleet.remove_worker(D0.worker_id)
        assert set(worker_states(fleet)) == {"prefill-0"}


async def test_a_worker_added_by_hand_is_proven_and_survives_the_views_of_the_bootstrap_service() -> None:
    async with running_fleet(Network()) as fleet:
        fleet.apply([P0])
        added = fleet.add_worker(D0)
        assert fleet.find(D0.worker_id) is added
        assert worker_states(fleet)["decode-0"] == "joining"
        await all_ready(fleet)
        fleet.apply([P1])
        assert set(worker_states(fleet)) == {"prefill-1", "decode-0"}


async def test_a_name_or_an_address_that_is_taken_is_refused() -> None:
    async with running_fleet(Network()) as fleet:
        fleet.apply([P0, D0])
        for twin in (
            msgspec.structs.replace(D1, worker_id=D0.worker_id),
            msgspec.structs.replace(D1, url=D0.url, instance_id=InstanceId("x")),
        ):
            with pytest.raises(ConfigError, match="decode-0 at http://decode-0 is a member already"):
                fleet.add_worker(twin)


async def test_an_unknown_worker_is_a_key_error() -> None:
    async with running_fleet(Network()) as fleet:
        for act in (fleet.drain, fleet.undrain, fleet.remove_worker):
            with pytest.raises(KeyError):
                act(WorkerId("nobody"))


async def test_a_worker_that_leaves_is_forgotten_by_the_policy() -> None:
    async with running_fleet(Network()) as fleet:
        fleet.apply([P0, D0])
        forgotten: list[str] = []
        fleet.scheduler.policy.forget = forgotten.append  # type: ignore[method-assign, assignment]
        fleet.remove_worker(D0.worker_id)
        assert forgotten == [D0.instance_id]
