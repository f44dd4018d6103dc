"""Who gets a burst: least_load on a load table fed by simulated decode servers, on a virtual clock."""

from __future__ import annotations

import math
import random

import pytest

from pdserve.scheduling.policy import make_policy
from tests.support.decode_simulation import DecodeServer, Simulation, StepTime, cold, line

GPU = line(0.010, 0.0002)
STEEP = line(0.010, 0.001)


def concave(step: int, batch: int) -> float:
    """No line at all: steep among small batches, flat among large ones."""
    return 0.010 + 0.004 * batch**0.6


def kneed(step: int, batch: int) -> float:
    """Flat until the machine is full."""
    return 0.012 + 0.002 * max(0, batch - 8)


def twice(step_s: StepTime) -> StepTime:
    """A machine of half the speed."""
    return lambda step, batch: 2 * step_s(step, batch)


def noisy(step_s: StepTime, seed: int) -> StepTime:
    """Times off by 30 %, for some ten steps alike: other processes on the machine."""
    rng, drift = random.Random(seed), 0.0

    def step(number: int, batch: int) -> float:
        nonlocal drift
        drift = 0.9 * drift + rng.gauss(0.0, 0.3 * math.sqrt(0.19))
        return step_s(number, batch) * math.exp(drift)

    return step


def simulation(*step_times: StepTime) -> Simulation:
    servers = [DecodeServer(f"d{index}", step_s) for index, step_s in enumerate(step_times)]
    return Simulation(make_policy("least_load"), servers)


CURVES = pytest.mark.parametrize("step_s", [GPU, STEEP, concave, kneed])
RATES = pytest.mark.parametrize("per_s", [20, 50, 200])


@CURVES
@RATES
def test_two_equal_servers_share_a_burst_although_one_had_slow_first_steps(
    step_s: StepTime, per_s: float
) -> None:
    fleet = simulation(step_s, cold(12, 1.5, step_s))
    fleet.burst(6, per_s=1, tokens=16)
    picks = fleet.burst(207, per_s)
    assert abs(picks["d0"] - picks["d1"]) <= 20


@CURVES
@RATES
def test_server_that_joins_cold_and_late_gets_its_part_once_it_is_warm(
    step_s: StepTime, per_s: float
) -> None:
    fleet = simulation(step_s, step_s)
    fleet.burst(207, per_s)
    fleet.join(DecodeServer("d2", cold(20, 1.5, step_s)))
    fleet.burst(4, per_s=1, tokens=16)
    during = fleet.burst(254, per_s)
    assert during["d2"] >= 20, "it is not refused for its slow start, only for what waits there"
    after = fleet.burst(254, per_s)
    assert after["d2"] >= 65


@CURVES
def test_server_that_joins_warm_gets_a_third_at_once(step_s: StepTime) -> None:
    fleet = simulation(step_s, step_s)
    fleet.burst(207, per_s=50)
    fleet.join(DecodeServer("d2", step_s))
    assert abs(fleet.burst(254, per_s=50)["d2"] - 254 / 3) <= 20


@CURVES
def test_rates_measured_at_different_batch_sizes_do_not_favour_either(step_s: StepTime) -> None:
    """One server knows only large batches, the other only single requests."""
    fleet = simulation(step_s)
    fleet.burst(150, per_s=100)
    fleet.join(DecodeServer("d1", step_s))
    for _ in range(10):
        fleet.burst(2, per_s=1)
    picks = fleet.burst(200, per_s=50)
    assert abs(picks["d0"] - picks["d1"]) <= 30


@pytest.mark.parametrize("seed", range(4))
@RATES
def test_noise_does_not_move_traffic(seed: int, per_s: float) -> None:
    fleet = simulation(noisy(GPU, seed), noisy(GPU, seed + 100))
    for _ in range(3):
        picks = fleet.burst(207, per_s)
        assert abs(picks["d0"] - picks["d1"]) <= 40


@pytest.mark.parametrize("step_s", [STEEP, concave, kneed])
@RATES
def test_server_of_half_the_speed_gets_about_half_as_many_once_it_is_known(
    step_s: StepTime, per_s: float
) -> None:
    fleet = simulation(step_s, twice(step_s))
    for _ in range(3):
        fleet.burst(207, per_s)
    share = fleet.burst(207, per_s)["d1"] / 207
    assert 0.22 <= share <= 0.42


def test_server_of_half_the_speed_is_spared_while_the_fast_one_is_hardly_slowed() -> None:
    """Twenty more in its batch slow the fast one by less than what the slow one is behind."""
    fleet = simulation(GPU, twice(GPU))
    for _ in range(3):
        fleet.burst(207, per_s=20)
    assert fleet.burst(207, per_s=20)["d1"] <= 20
    assert fleet.burst(207, per_s=200)["d1"] >= 50


def test_server_that_was_slow_for_a_while_is_tried_again() -> None:
    was_slow = DecodeServer("d1", line(0.050, 0.001))
    fleet = Simulation(make_policy("least_load"), [DecodeServer("d0", GPU), was_slow])
    for _ in range(3):
        fleet.burst(207, per_s=50)
    assert fleet.burst(100, per_s=10)["d1"] <= 10
    was_slow.step_s = GPU
    fleet.rest(120.0)
    assert fleet.burst(100, per_s=10)["d1"] >= 40
