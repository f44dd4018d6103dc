"""Fleet: who is blamed for a failure, and how a suspect worker comes back."""

from __future__ import annotations

from pdserve.errors import WorkerTimeout, WorkerUnreachable
from tests.unit.fleet_network import (
    D0,
    D1,
    P0,
    P1,
    SHAPE,
    Answer,
    Network,
    all_ready,
    pair_states,
    running_fleet,
    until,
    worker_states,
)


async def test_a_broken_connection_takes_only_that_worker_out_until_it_is_proven_again() -> None:
    network = Network()
    async with running_fleet(network) as fleet:
        fleet.apply([P0, P1, D0])
        await all_ready(fleet)
        reservation = await fleet.reserve(SHAPE, timeout_s=1)
        broken, other = (P0, P1) if reservation.pair.prefill == P0 else (P1, P0)
        network[broken].is_down = True
        reservation.release(
            prefill_ok=False, decode_ok=None, error=WorkerUnreachable(broken.url, "connection reset")
        )
        states = worker_states(fleet)
        assert (states[broken.worker_id], states[other.worker_id]) == ("suspect", "ready")
        picks = {(await fleet.reserve(SHAPE, timeout_s=1)).pair.prefill for _ in range(5)}
        assert picks == {other}
        probes = network[broken].calls["/generate"]
        network[broken].is_down = False
        await all_ready(fleet)
        assert network[broken].calls["/generate"] == probes + 1
        assert worker_states(fleet)[broken.worker_id] == "ready"


async def test_a_ping_alone_does_not_bring_a_suspect_back() -> None:
    network = Network()
    async with running_fleet(network) as fleet:
        fleet.apply([P0, D0])
        await all_ready(fleet)
        network[D0].generate = Answer(500)
        reservation = await fleet.reserve(SHAPE, timeout_s=1)
        reservation.release(prefill_ok=None, decode_ok=False, error=WorkerTimeout(D0.url, "silent for 9 s"))
        await until(
            lambda: network[D0].calls["/ping"] >= 1 and pair_states(fleet)["prefill-0>decode-0"] == "failed"
        )
        assert worker_states(fleet)["decode-0"] == "suspect"
        network[D0].generate = Answer(200, b'{"text":"a"}')
        await all_ready(fleet)
        assert str(fleet.workers()[1].breaker.state) == "closed"


async def test_three_server_errors_in_a_row_make_a_worker_suspect() -> None:
    async with running_fleet(Network(), load_poll_s=60.0) as fleet:
        fleet.apply([P0, D0])
        await all_ready(fleet)
        verdicts: list[bool | None] = [False, False, True, None, False, False, False]
        seen = []
        for decode_ok in verdicts:
            reservation = await fleet.reserve(SHAPE, timeout_s=1)
            reservation.release(prefill_ok=True, decode_ok=decode_ok, error="HTTP 500")
            seen.append(worker_states(fleet)["decode-0"])
        assert seen == ["ready"] * 6 + ["suspect"]
        assert worker_states(fleet)["prefill-0"] == "ready"
        await all_ready(fleet)


async def test_a_failed_leg_of_a_dead_server_is_found_out_by_a_ping() -> None:
    network = Network()
    async with running_fleet(network, load_poll_s=60.0) as fleet:
        fleet.apply([P0, D0])
        await all_ready(fleet)
        network[D0].is_down = True
        reservation = await fleet.reserve(SHAPE, timeout_s=1)
        reservation.release(prefill_ok=None, decode_ok=False, error="stream ended early")
        await until(lambda: worker_states(fleet)["decode-0"] == "suspect")


async def test_a_dead_server_without_traffic_is_found_out_by_its_load_poll() -> None:
    network = Network()
    async with running_fleet(network) as fleet:
        fleet.apply([P0, D0, D1])
        await all_ready(fleet)
        network[D1].is_down = True
        await until(lambda: worker_states(fleet)["decode-1"] == "suspect")
        assert fleet.has_ready_pair
        network[D1].is_down = False
        await all_ready(fleet)


async def test_a_server_without_load_figures_still_serves() -> None:
    network = Network()
    network[D0].loads = Answer(404)
    network[P0].loads = Answer(200, b"<html>")
    async with running_fleet(network) as fleet:
        fleet.apply([P0, D0])
        await all_ready(fleet)
        await until(lambda: network[D0].calls["/v1/loads"] > 1)
        assert fleet.table.load(D0.instance_id) is None
        await fleet.reserve(SHAPE, timeout_s=1)


async def test_an_idle_worker_is_polled_slowly_and_at_once_when_a_request_comes() -> None:
    network = Network()
    async with running_fleet(network, load_poll_s=0.05) as fleet:
        fleet.apply([P0, D0])
        await all_ready(fleet)
        await until(lambda: all(member.is_dozing for member in fleet.workers()))
        polls = network[P0].calls["/v1/loads"]
        await fleet.reserve(SHAPE, timeout_s=1)
        assert fleet.workers()[0].wake.is_set()
        await until(lambda: network[P0].calls["/v1/loads"] > polls)
