"""Fleet: who is blamed for a failure, and how a suspect worker comes back."""

from __future__ import annotations

import pytest

from pdserve.balancer.fleet import worker_monitor as keeper
from pdserve.balancer.fleet.breaker import Breaker, BreakerState, Failure
from pdserve.errors import WorkerRejected, WorkerTimeout, WorkerUnreachable
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
    release,
    reserve,
    running_fleet,
    until,
    worker_states,
)


async def test_a_broken_connection_takes_only_that_worker_out_until_it_is_proven_again() -> None:
    network = Network()
    async with running_fleet(network) as fleet:
        fleet.apply([P0, P1, D0])
        await all_ready(fleet)
        reservation = await reserve(fleet, SHAPE, timeout_s=1)
        broken, other = (P0, P1) if reservation.pair.prefill == P0 else (P1, P0)
        network[broken].is_down = True
        release(fleet, reservation, prefill_ok=False, error=WorkerUnreachable(broken.url, "connection reset"))
        states = worker_states(fleet)
        assert (states[broken.worker_id], states[other.worker_id]) == ("suspect", "ready")
        picks = {(await reserve(fleet, SHAPE, timeout_s=1)).pair.prefill for _ in range(5)}
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
        reservation = await reserve(fleet, SHAPE, timeout_s=1)
        release(fleet, reservation, decode_ok=False, error=WorkerTimeout(D0.url, "silent for 9 s"))
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
            reservation = await reserve(fleet, SHAPE, timeout_s=1)
            release(fleet, reservation, prefill_ok=True, decode_ok=decode_ok, error="HTTP 500")
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
        reservation = await reserve(fleet, SHAPE, timeout_s=1)
        release(fleet, reservation, decode_ok=False, error="stream ended early")
        await until(lambda: worker_states(fleet)["decode-0"] == "suspect")


async def test_a_dead_server_without_traffic_is_found_out_by_its_load_poll() -> None:
    network = Network()
    async with running_fleet(network) as fleet:
        fleet.apply([P0, D0, D1])
        await all_ready(fleet)
        network[D1].is_down = True
        await until(lambda: worker_states(fleet)["decode-1"] == "suspect")
        assert fleet.scheduler.has_ready_pair
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
        assert fleet.scheduler.table.load(D0.instance_id) is None
        await reserve(fleet, SHAPE, timeout_s=1)


async def test_an_idle_worker_is_polled_slowly_and_at_once_when_a_request_comes() -> None:
    network = Network()
    async with running_fleet(network, load_poll_s=0.05) as fleet:
        fleet.apply([P0, D0])
        await all_ready(fleet)
        await until(lambda: fleet.health.dozing == set(fleet.workers()))
        polls = network[P0].calls["/v1/loads"]
        await reserve(fleet, SHAPE, timeout_s=1)
        assert fleet.workers()[0].wake.is_set()
        await until(lambda: network[P0].calls["/v1/loads"] > polls)


@pytest.mark.parametrize("limit", [1, 5])
async def test_as_many_failures_as_configured_take_a_worker_out(limit: int) -> None:
    async with running_fleet(Network(), breaker_failures=limit, load_poll_s=60.0) as fleet:
        fleet.apply([P0, D0])
        await all_ready(fleet)
        for number in range(1, limit + 1):
            reservation = await reserve(fleet, SHAPE, timeout_s=1)
            release(fleet, reservation, decode_ok=False, error=WorkerRejected(D0.url, 500))
            assert worker_states(fleet)["decode-0"] == ("suspect" if number == limit else "ready")


async def test_of_two_silent_legs_the_one_known_to_be_suspect_is_blamed() -> None:
    async with running_fleet(Network(), load_poll_s=60.0) as fleet:
        fleet.apply([P0, D0])
        await all_ready(fleet)
        held = [await reserve(fleet, SHAPE, timeout_s=1) for _ in range(5)]
        network_of_d0_is_gone = WorkerUnreachable(D0.url, "reset")
        release(fleet, held.pop(), decode_ok=False, error=network_of_d0_is_gone)
        for reservation in held:
            release(fleet, reservation, prefill_ok=False, decode_ok=False, error="both silent")
        prefill, decode = fleet.workers()
        assert (prefill.breaker.errors, str(prefill.state)) == (0, "ready")
        assert decode.breaker.errors == 5


async def test_a_503_of_the_other_leg_is_a_failure_like_any_other() -> None:
    """Told by the url: only a worker's own "I am full" is no failure."""
    async with running_fleet(Network(), breaker_failures=1, load_poll_s=60.0) as fleet:
        fleet.apply([P0, D0])
        await all_ready(fleet)
        reservation = await reserve(fleet, SHAPE, timeout_s=1)
        release(fleet, reservation, prefill_ok=False, error=WorkerRejected(D0.url, 503))
        assert worker_states(fleet)["prefill-0"] == "suspect"


def test_a_breaker_counts_overloads_only_from_the_limit_on() -> None:
    breaker = Breaker(limit=3)
    assert [breaker.fail(Failure.OVERLOAD) for _ in range(2)] == [False, False]
    assert breaker.consecutive == 0
    breaker.succeed()
    outcomes = [breaker.fail(Failure.OVERLOAD) for _ in range(5)]
    assert outcomes == [False, False, False, False, True]
    breaker.half_open()
    assert breaker.state is BreakerState.HALF_OPEN
    breaker.succeed()
    assert not breaker.is_closed
    breaker.close()
    assert (breaker.is_closed, breaker.consecutive, breaker.overloads) == (True, 0, 0)


async def test_a_worker_that_fails_again_and_again_after_its_probe_is_left_alone_for_longer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(keeper, "MAX_CALM_S", 60.0)
    monkeypatch.setattr(keeper, "FREE_REVIVALS", 2)
    network = Network()
    async with running_fleet(network, load_poll_s=60.0) as fleet:
        fleet.apply([P0, D0])
        for _ in range(3):
            await all_ready(fleet)
            reservation = await reserve(fleet, SHAPE, timeout_s=1)
            release(fleet, reservation, decode_ok=False, error=WorkerUnreachable(D0.url, "connection reset"))
        pings = network[D0].calls["/ping"]
        await until(lambda: network[D0].calls["/ping"] > pings)
        assert worker_states(fleet)["decode-0"] == "suspect"
        assert pair_states(fleet)["prefill-0>decode-0"] == "untested"


async def test_a_worker_that_is_gone_is_not_judged() -> None:
    async with running_fleet(Network()) as fleet:
        fleet.apply([P0, D0, D1])
        await all_ready(fleet)
        held = [await reserve(fleet, SHAPE, timeout_s=1) for _ in range(2)]
        fleet.apply([P0, D1])
        for reservation in held:
            decode = reservation.pair.decode
            is_ok = False if decode == D0 else None
            release(fleet, reservation, decode_ok=is_ok, error=WorkerUnreachable(decode.url, "reset"))
        assert worker_states(fleet) == {"prefill-0": "ready", "decode-1": "ready"}
