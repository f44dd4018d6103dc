"""Admission: which workers have room for a request, over an in-memory network."""

from __future__ import annotations

import pytest

from pdserve.balancer.fleet.fleet import WorkerFleet
from pdserve.errors import NoWorkerError, WorkerRejected
from pdserve.types import RequestShape, WorkerInfo
from tests.support.fleet_network import (
    D0,
    D1,
    LARGE,
    P0,
    SHAPE,
    SOON_S,
    Network,
    known_fleet,
    loads,
    prefill_finished,
    release,
    reserve,
    running_fleet,
    until,
    worker_states,
)

# -- room on decode --------------------------------------------------------------------------


async def test_a_decode_worker_gets_no_more_requests_than_it_runs_at_once() -> None:
    network = Network()
    network[D0].loads = loads(max_running_requests=2)
    async with known_fleet(network, P0, D0) as fleet:
        first, _ = await reserve(fleet), await reserve(fleet)
        with pytest.raises(
            NoWorkerError, match=r"all 1 usable decode servers are full: decode-0: 2 of 2 req"
        ):
            await reserve(fleet)
        release(fleet, first)
        await reserve(fleet)


async def test_other_users_requests_take_slots_too() -> None:
    network = Network()
    network[D0].loads = loads(max_running_requests=4, num_running_reqs=3)
    async with known_fleet(network, P0, D0) as fleet:
        await reserve(fleet)
        with pytest.raises(NoWorkerError, match="4 of 4 requests"):
            await reserve(fleet)


async def test_only_workers_with_room_are_chosen_whatever_the_policy_likes() -> None:
    network = Network()
    network[D0].loads = loads(max_running_requests=1)
    network[D1].loads = loads(max_running_requests=9)
    async with known_fleet(network, P0, D0, D1, policy="round_robin") as fleet:
        held = [await reserve(fleet) for _ in range(10)]
        assert [r.pair.decode.worker_id for r in held].count(D0.worker_id) == 1


async def test_the_kv_of_a_decode_worker_is_promised_only_once() -> None:
    network = Network()
    network[D0].loads = loads(max_total_num_tokens=1000)
    shape = RequestShape(prompt_tokens=200, max_new_tokens=10_000)
    async with known_fleet(network, P0, D0, load_poll_s=60.0) as fleet:
        await reserve(fleet, shape)  # 200 and SGLang's reserve of 512
        assert fleet.workers()[1].slots.promised_tokens == 712
        with pytest.raises(NoWorkerError, match="712 of 1000 KV tokens promised"):
            await reserve(fleet, shape)
        await reserve(fleet, RequestShape(prompt_tokens=200, max_new_tokens=16))


async def test_kv_that_others_use_is_not_promised() -> None:
    network = Network()
    network[D0].loads = loads(max_total_num_tokens=2000, num_total_tokens=1500)
    async with known_fleet(network, P0, D0) as fleet:
        await reserve(fleet)
        with pytest.raises(NoWorkerError, match="KV tokens promised"):
            await reserve(fleet, RequestShape(prompt_tokens=400, max_new_tokens=16))
        network[D0].loads = loads(max_total_num_tokens=2000, num_total_tokens=200)
        await reserve(fleet, RequestShape(prompt_tokens=400, max_new_tokens=16), timeout_s=5)


async def test_promises_end_with_their_legs() -> None:
    network = Network()
    network[D0].loads = network[P0].loads = loads(max_total_num_tokens=10_000)
    async with known_fleet(network, P0, D0) as fleet:
        prefill, decode = fleet.workers()
        reservation = await reserve(fleet)
        assert (
            prefill.slots.promised_tokens,
            decode.slots.promised_tokens,
            decode.slots.reserved_tokens,
        ) == (100, 116, 16)
        prefill_finished(fleet, reservation)
        assert (prefill.slots.promised_tokens, prefill.num_inflight, decode.num_inflight) == (0, 0, 1)
        release(fleet, reservation)
        assert (prefill.num_inflight, decode.num_inflight) == (0, 0)
        assert (decode.slots.promised_tokens, decode.slots.reserved_tokens) == (0, 0)


# -- room on prefill -------------------------------------------------------------------------


async def test_a_prefill_worker_gets_no_longer_a_queue_than_configured() -> None:
    async with known_fleet(Network(), P0, D0, prefill_queue_s=1.0, load_poll_s=60.0) as fleet:
        rate = fleet.workers()[0].view.prefill_tokens_s
        long = RequestShape(prompt_tokens=int(rate * 0.6), max_new_tokens=1)
        first = await reserve(fleet, long)
        await reserve(fleet, long)
        with pytest.raises(
            NoWorkerError, match=r"usable prefill servers are full: prefill-0: .* tokens queued"
        ):
            await reserve(fleet)
        prefill_finished(fleet, first)
        await reserve(fleet)


async def test_a_prefill_worker_is_not_promised_more_kv_than_it_has() -> None:
    network = Network()
    network[P0].loads = loads(max_total_num_tokens=1000)
    async with known_fleet(network, P0, D0) as fleet:
        await reserve(fleet, LARGE)
        with pytest.raises(NoWorkerError, match="800 of 1000 KV tokens promised"):
            await reserve(fleet, LARGE)


# -- what can never fit ----------------------------------------------------------------------


async def test_a_request_larger_than_every_pool_reaches_sglang_at_once() -> None:
    network = Network()
    network[D0].loads = loads(max_total_num_tokens=1000)
    async with known_fleet(network, P0, D0) as fleet:
        await reserve(fleet, LARGE)
        giant = await reserve(fleet, RequestShape(prompt_tokens=5000, max_new_tokens=16))
        assert fleet.workers()[1].slots.promised_tokens == 816
        release(fleet, giant)


async def test_a_request_goes_to_the_worker_that_is_large_enough() -> None:
    network = Network()
    network[D0].loads = loads(max_total_num_tokens=500)
    network[D1].loads = loads(max_total_num_tokens=5000)
    async with known_fleet(network, P0, D0, D1) as fleet:
        held = [await reserve(fleet, LARGE) for _ in range(4)]
        assert {r.pair.decode.worker_id for r in held} == {D1.worker_id}


async def test_an_empty_worker_takes_a_request_whose_answer_might_not_fit() -> None:
    network = Network()
    network[D0].loads = loads(max_total_num_tokens=900)
    async with known_fleet(network, P0, D0) as fleet:
        await reserve(fleet, RequestShape(prompt_tokens=800, max_new_tokens=4096))


# -- overloaded ------------------------------------------------------------------------------


async def test_a_worker_that_says_it_is_full_rests_until_its_next_sample_and_is_not_blamed() -> None:
    async with known_fleet(Network(), P0, D0, D1, load_poll_s=60.0) as fleet:
        full = WorkerRejected(D0.url, 503, b"The request queue is full.")
        held = [await reserve(fleet) for _ in range(8)]
        on_d0 = [r for r in held if r.pair.decode == D0]
        for reservation in on_d0[:3]:
            release(fleet, reservation, decode_ok=False, error=full)
        assert worker_states(fleet)["decode-0"] == "ready"
        assert {(await reserve(fleet)).pair.decode for _ in range(4)} == {D1}
        fleet.workers()[1].wake.set()  # a poll
        await sampled_one(fleet, D0)
        assert D0 in {(await reserve(fleet)).pair.decode for _ in range(4)}


async def sampled_one(fleet: WorkerFleet, info: WorkerInfo) -> None:
    """Wait until that worker is not overloaded any more."""
    member = fleet.find(info.worker_id)
    assert member is not None
    await until(lambda: not member.slots.is_overloaded)


async def test_a_worker_that_is_full_again_and_again_is_taken_out() -> None:
    async with known_fleet(Network(), P0, D0) as fleet:
        full = WorkerRejected(D0.url, 503)
        rounds = 0
        while not fleet.workers()[1].breaker.opened:
            reservation = await reserve(fleet, SHAPE, timeout_s=5)
            release(fleet, reservation, decode_ok=False, error=full)
            await until(lambda: not fleet.workers()[1].slots.is_overloaded)
            rounds += 1
        assert rounds == 2 * fleet.config.breaker_failures - 1


# -- why not ---------------------------------------------------------------------------------


async def test_a_fleet_without_members_says_how_to_add_some() -> None:
    async with running_fleet(Network()) as fleet:
        with pytest.raises(
            NoWorkerError, match=r"no prefill and no decode .*--prefill and --decode.*POST /work"
        ):
            await reserve(fleet, SHAPE, timeout_s=SOON_S)
