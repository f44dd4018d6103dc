"""Fleet: membership, readiness, blame and reservations over an in-memory network."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator

import msgspec
import pytest

from pdserve.bootstrap.messages import FleetView
from pdserve.errors import ConfigError, NoWorkerError
from pdserve.scheduling.reservation import Reservation
from pdserve.types import KVLayoutDescriptor
from tests.support.fleet_network import (
    D0,
    D1,
    P0,
    P1,
    SHAPE,
    Answer,
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

LAYOUT = KVLayoutDescriptor(page_size=16, dtype="bfloat16", num_layers=2, num_kv_heads=2, token_bytes=512)


# -- joining ---------------------------------------------------------------------------------


async def test_a_joining_worker_takes_no_traffic_before_its_probe_has_passed() -> None:
    network = Network()
    network[D1].gate.clear()
    async with running_fleet(network) as fleet:
        fleet.apply([P0, D0, D1])
        await until(lambda: fleet.scheduler.has_ready_pair)
        held = [await reserve(fleet, SHAPE, timeout_s=1) for _ in range(6)]
        assert {reservation.pair.decode.worker_id for reservation in held} == {"decode-0"}
        assert worker_states(fleet)["decode-1"] == "joining"
        network[D1].gate.set()
        await all_ready(fleet)
        assert (await reserve(fleet, SHAPE, timeout_s=1)).pair.decode.worker_id == "decode-1"


async def test_both_legs_of_a_probe_get_the_same_request_with_a_legal_room() -> None:
    network = Network()
    async with running_fleet(network) as fleet:
        fleet.apply([P0, D0])
        await all_ready(fleet)
    (prefill,), (decode,) = network[P0].bodies, network[D0].bodies
    assert prefill == decode
    assert (prefill["bootstrap_host"], prefill["bootstrap_port"]) == ("h", 9000)
    assert isinstance(prefill["bootstrap_room"], int)
    assert 1 <= prefill["bootstrap_room"] < 2**63
    assert len(str(prefill["rid"])) == 32


async def test_a_failed_probe_ends_both_legs_and_is_tried_again() -> None:
    network = Network()
    network[D0].generate = Answer(500, b'{"error":"no KV"}')
    async with running_fleet(network) as fleet:
        fleet.apply([P0, D0])
        await until(lambda: pair_states(fleet) == {"prefill-0>decode-0": "failed"})
        assert "decode http://decode-0: HTTP 500" in fleet.pairs()[0].error
        assert network[P0].calls["/abort_request"] == network[D0].calls["/abort_request"] == 1
        network[D0].generate = Answer(200, b'{"text":"a"}')
        await all_ready(fleet)
        assert fleet.pairs()[0].probes == 2


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b'{"text":"","output_ids":[]}',
        b'{"text":"","output_ids":[1],"meta_info":{"finish_reason":{"type":"abort","message":"gone"}}}',
    ],
)
async def test_an_answer_without_a_real_token_is_a_failed_probe(body: bytes) -> None:
    network = Network()
    network[D0].generate = Answer(200, body)
    async with running_fleet(network) as fleet:
        fleet.apply([P0, D0])
        await until(lambda: pair_states(fleet) == {"prefill-0>decode-0": "failed"})


async def test_a_silent_probe_times_out_and_names_the_leg() -> None:
    network = Network()
    network[D0].gate.clear()
    async with running_fleet(network, probe_s=0.05) as fleet:
        fleet.apply([P0, D0])
        await until(lambda: pair_states(fleet) == {"prefill-0>decode-0": "failed"})
        assert fleet.pairs()[0].error == "no answer from decode within 0.05 s"


async def test_a_hung_worker_does_not_keep_others_from_joining() -> None:
    network = Network()
    network[D0].gate.clear()
    async with running_fleet(network) as fleet:
        fleet.apply([P0, D0, D1])
        await until(lambda: pair_states(fleet)["prefill-0>decode-1"] == "ready")


async def test_workers_with_different_kv_layouts_are_never_paired() -> None:
    network = Network()
    prefill = msgspec.structs.replace(P0, kv_layout=LAYOUT)
    decode = msgspec.structs.replace(D0, kv_layout=msgspec.structs.replace(LAYOUT, page_size=1))
    async with running_fleet(network) as fleet:
        fleet.apply([prefill, decode])
        assert fleet.pairs()[0].error == "KV layouts differ: page_size: 16 != 1"
        with pytest.raises(NoWorkerError, match=r"all 1 pairs failed their test.*page_size"):
            await reserve(fleet, SHAPE, timeout_s=0.05)
        assert network[P0].calls["/generate"] == 0


async def test_a_superseding_instance_drops_its_predecessor() -> None:
    network, heir = Network(), worker(P0.role, 0, "b")
    async with running_fleet(network) as fleet:
        fleet.apply([P0, D0])
        await all_ready(fleet)
        old = await reserve(fleet, SHAPE, timeout_s=1)
        fleet.apply([heir, D0])
        assert [member.instance_id for member in fleet.workers()] == [heir.instance_id, D0.instance_id]
        assert not fleet.scheduler.has_ready_pair
        await all_ready(fleet)
        assert (await reserve(fleet, SHAPE, timeout_s=1)).pair.prefill == heir
        release(fleet, old, prefill_ok=False, error="it died")
        assert worker_states(fleet) == {"prefill-0": "ready", "decode-0": "ready"}
        assert ("gone", "prefill-0") in [(event.event, event.worker) for event in fleet.events]


async def test_a_worker_that_left_is_gone_at_once() -> None:
    async with running_fleet(Network()) as fleet:
        fleet.apply([P0, P1, D0])
        await all_ready(fleet)
        fleet.apply([P1, D0])
        assert pair_states(fleet) == {"prefill-1>decode-0": "ready"}
        assert (await reserve(fleet, SHAPE, timeout_s=1)).pair.prefill == P1


async def test_a_moved_worker_is_tested_again() -> None:
    async with running_fleet(Network()) as fleet:
        fleet.apply([P0, D0])
        await all_ready(fleet)
        moved = msgspec.structs.replace(P0, bootstrap_port=9999)
        fleet.apply([moved, D0])
        assert not fleet.scheduler.has_ready_pair
        await all_ready(fleet)
        assert (await reserve(fleet, SHAPE, timeout_s=1)).pair.prefill.bootstrap_port == 9999


class ScriptedMembership:
    """Views come when the test puts them."""

    is_connected = False
    epoch = "e1"

    def __init__(self) -> None:
        self.views: asyncio.Queue[FleetView] = asyncio.Queue()

    async def watch(self) -> AsyncIterator[FleetView]:
        while True:
            yield await self.views.get()


async def test_members_follow_the_bootstrap_service() -> None:
    membership = ScriptedMembership()
    async with running_fleet(Network(), membership, bootstrap_url="http://b:1") as fleet:
        assert fleet.scheduler.explain() == (
            "no prefill and no decode server is registered; bootstrap service http://b:1 is not reachable"
        )
        membership.views.put_nowait(FleetView(epoch="e1", version=1, workers=[P0, D0]))
        await all_ready(fleet)
        membership.views.put_nowait(FleetView(epoch="e1", version=2, workers=[P0]))
        await until(lambda: worker_states(fleet).keys() == {"prefill-0"})
        assert not fleet.scheduler.has_ready_pair


# -- static workers --------------------------------------------------------------------------


async def test_static_workers_join_when_they_answer_and_tell_their_model() -> None:
    network = Network()
    network[worker(P0.role, 0)].is_down = True
    network[D0].model_info = Answer(200, b'{"model_path":"/m/tiny","served_model_name":"tiny"}')
    async with running_fleet(
        network, prefill=(("http://prefill-0", 8998),), decode=("http://decode-0",)
    ) as fleet:
        await until(lambda: "connection refused" in fleet.workers()[0].last_error)
        assert "no prefill server answers; prefill-0" in fleet.scheduler.explain()
        network[P0].is_down = False
        await all_ready(fleet)
        pair = (await reserve(fleet, SHAPE, timeout_s=1)).pair
        assert (pair.prefill.bootstrap_host, pair.prefill.bootstrap_port) == ("prefill-0", 8998)
        assert pair.decode.served_model_name == "tiny"


async def test_a_static_worker_in_the_wrong_mode_is_refused_in_words() -> None:
    network = Network()
    network[P0].model_info = Answer(200, b'{"model_path":"m","disaggregation_mode":"null"}')
    async with running_fleet(
        network, prefill=(("http://prefill-0", None),), decode=("http://decode-0",)
    ) as fleet:
        await until(lambda: "--disaggregation-mode null" in fleet.scheduler.explain())
        assert network[P0].calls["/generate"] == 0


@pytest.mark.parametrize("url", ["ftp://a:1", "http://", "http://a:0", "http://a:x", "http://u:p@a:1"])
async def test_a_bad_static_address_is_a_config_error(url: str) -> None:
    with pytest.raises(ConfigError, match="expects http://host:port"):
        async with running_fleet(Network(), decode=(url,)):
            pass


# -- reservations ----------------------------------------------------------------------------


async def test_a_burst_between_polls_spreads_over_all_workers() -> None:
    async with running_fleet(Network(), load_poll_s=60.0) as fleet:
        fleet.apply([P0, P1, D0, D1])
        await all_ready(fleet)
        held = [await reserve(fleet, SHAPE, timeout_s=1) for _ in range(20)]
        assert Counter(r.pair.prefill.worker_id for r in held) == {"prefill-0": 10, "prefill-1": 10}
        assert Counter(r.pair.decode.worker_id for r in held) == {"decode-0": 10, "decode-1": 10}


async def test_an_idle_fleet_alternates_its_workers() -> None:
    async with running_fleet(Network()) as fleet:
        fleet.apply([P0, P1, D0, D1])
        await all_ready(fleet)
        order = []
        for _ in range(4):
            reservation = await reserve(fleet, SHAPE, timeout_s=1)
            order.append(reservation.pair.prefill.worker_id)
            release(fleet, reservation, prefill_ok=True, decode_ok=True)
        assert order[0] != order[1]
        assert order[:2] == order[2:]


async def test_waiting_requests_are_served_in_order_of_arrival() -> None:
    async with running_fleet(Network()) as fleet:
        served: list[int] = []

        async def client(number: int) -> Reservation:
            reservation = await reserve(fleet, SHAPE, timeout_s=5)
            served.append(number)
            return reservation

        clients = []
        for number in range(8):
            clients.append(asyncio.create_task(client(number)))
            await until(lambda: fleet.scheduler.num_waiting == len(clients))
        fleet.apply([P0, D0])
        held = await asyncio.gather(*clients)
        assert served == list(range(8))
        assert fleet.scheduler.num_waiting == 0
        assert [r.legs for r in held] == sorted(r.legs for r in held)


async def test_a_cancelled_wait_holds_nothing() -> None:
    async with running_fleet(Network()) as fleet:
        client = asyncio.create_task(reserve(fleet, SHAPE, timeout_s=5))
        await until(lambda: fleet.scheduler.num_waiting == 1)
        client.cancel()
        await asyncio.wait([client])
        assert fleet.scheduler.num_waiting == 0
        fleet.apply([P0, D0])
        await all_ready(fleet)
        assert [member.num_inflight for member in fleet.workers()] == [0, 0]


async def test_a_client_that_leaves_in_the_moment_it_is_served_gives_the_pair_back() -> None:
    async with running_fleet(Network(), max_concurrent_requests=1) as fleet:
        fleet.apply([P0, D0])
        await all_ready(fleet)
        held = await reserve(fleet, SHAPE, timeout_s=1)
        client = asyncio.create_task(reserve(fleet, SHAPE, timeout_s=5))
        await until(lambda: fleet.scheduler.num_waiting == 1)
        release(fleet, held, prefill_ok=True, decode_ok=True)
        assert [member.num_inflight for member in fleet.workers()] == [1, 1]
        client.cancel()
        await asyncio.wait([client])
        assert client.cancelled()
        assert [member.num_inflight for member in fleet.workers()] == [0, 0]


async def test_excluded_pairs_are_not_given_again() -> None:
    async with running_fleet(Network()) as fleet:
        fleet.apply([P0, P1, D0])
        await all_ready(fleet)
        first = await reserve(fleet, SHAPE, timeout_s=1)
        for _ in range(5):
            other = await reserve(fleet, SHAPE, exclude=frozenset({first.key}), timeout_s=1)
            assert other.key != first.key
        with pytest.raises(NoWorkerError, match="every ready pair has already failed this request"):
            await reserve(fleet, SHAPE, exclude=frozenset({first.key, other.key}), timeout_s=0.02)


async def test_release_is_idempotent() -> None:
    async with running_fleet(Network()) as fleet:
        fleet.apply([P0, D0])
        await all_ready(fleet)
        reservation = await reserve(fleet, SHAPE, timeout_s=1)
        assert [member.num_inflight for member in fleet.workers()] == [1, 1]
        for _ in range(3):
            release(fleet, reservation, decode_ok=False, error="HTTP 500")
            prefill_finished(fleet, reservation)
        assert [member.num_inflight for member in fleet.workers()] == [0, 0]
        assert [member.breaker.errors for member in fleet.workers()] == [0, 1]


async def test_a_finished_prefill_no_longer_loads_its_worker() -> None:
    async with running_fleet(Network(), load_poll_s=60.0) as fleet:
        fleet.apply([P0, D0])
        await all_ready(fleet)
        reservation = await reserve(fleet, SHAPE, timeout_s=1)
        assert fleet.scheduler.table.view(P0.instance_id).queued_tokens == 100
        prefill_finished(fleet, reservation)
        assert fleet.scheduler.table.view(P0.instance_id).queued_tokens == 0
        assert fleet.scheduler.table.inflight(D0.instance_id) == 1
        release(fleet, reservation, prefill_ok=True, decode_ok=True)
        assert fleet.scheduler.table.inflight(D0.instance_id) == 0


# -- why there is none -----------------------------------------------------------------------


async def test_timeout_names_the_missing_role() -> None:
    async with running_fleet(Network()) as fleet:
        with pytest.raises(NoWorkerError, match="no prefill and no decode server is registered"):
            await reserve(fleet, SHAPE, timeout_s=0)
        fleet.apply([P0])
        with pytest.raises(NoWorkerError, match=r"within 0\.01 s: no decode server is registered"):
            await reserve(fleet, SHAPE, timeout_s=0.01)


async def test_timeout_says_that_pairs_are_being_tested_or_have_failed() -> None:
    network = Network()
    network[D0].gate.clear()
    network[D0].generate = Answer(503, b"full")
    async with running_fleet(network) as fleet:
        fleet.apply([P0, D0])
        with pytest.raises(NoWorkerError, match="1 of 1 pairs are still being tested"):
            await reserve(fleet, SHAPE, timeout_s=0.01)
        network[D0].gate.set()
        await until(lambda: pair_states(fleet) == {"prefill-0>decode-0": "failed"})
        with pytest.raises(NoWorkerError, match=r"all 1 pairs failed their test; .*HTTP 503: full"):
            await reserve(fleet, SHAPE, timeout_s=0.01)


async def test_stop_dismisses_those_who_wait() -> None:
    async with running_fleet(Network()) as fleet:
        client = asyncio.create_task(reserve(fleet, SHAPE, timeout_s=60))
        await until(lambda: fleet.scheduler.num_waiting == 1)
    with pytest.raises(NoWorkerError, match="stopping"):
        await client
    with pytest.raises(NoWorkerError, match="stopping"):
        await reserve(fleet, SHAPE, timeout_s=60)
