"""Calibrating a small real service whose costs are known: they come back, or the measurement is refused."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pdserve.balancer.app import Balancer
from pdserve.config.balancer import BalancerConfig
from pdserve.errors import ConfigError
from pdserve.sim.calibrate import (
    Calibration,
    CalibrationOptions,
    calibrate,
    format_calibration,
    run_calibration,
)
from pdserve.sim.cost import load_model
from pdserve.sim.fits import Row, fit
from pdserve.sim.measure import OUT_TOKENS, decode_row, pass_counts
from pdserve.types import Role, WorkerLoad
from tests.support.sglang_server import until
from tests.support.timed_sglang import Costs, TimedSGLang

QUICK = CalibrationOptions(budget_s=1.5, max_tokens=1024, max_batch=8, seed=11)


@asynccontextmanager
async def timed_fleet(costs: Costs, decode: int = 1) -> AsyncIterator[tuple[TimedSGLang, list[TimedSGLang]]]:
    """One prefill fake and some decode fakes of the same costs."""
    rooms: dict[int, asyncio.Future[int]] = {}
    async with AsyncExitStack() as stack:
        prefill = await stack.enter_async_context(TimedSGLang(Role.PREFILL, costs, rooms))
        decodes = [
            await stack.enter_async_context(TimedSGLang(Role.DECODE, costs, rooms, name=f"decode-{index}"))
            for index in range(decode)
        ]
        yield prefill, decodes


def named(prefill: TimedSGLang, decodes: list[TimedSGLang], **more: Any) -> CalibrationOptions:
    """Options that name these servers."""
    return replace(QUICK, prefill=((prefill.url, 9000),), decode=tuple(d.url for d in decodes), **more)


async def calibrated(costs: Costs, decode: int = 1, **more: Any) -> Calibration:
    """Calibrate a fleet of these costs."""
    async with timed_fleet(costs, decode) as (prefill, decodes):
        return await calibrate(named(prefill, decodes, **more))


async def test_known_costs_come_back() -> None:
    costs = Costs()
    model = (await calibrated(costs)).model
    found = (model.prefill_base_s, model.prefill_token_s, model.prefill_pair_s)
    assert found == pytest.approx(costs.prefill[:3], rel=0.03)
    found = (model.decode_base_s, model.decode_request_s, model.decode_token_s)
    assert found == pytest.approx(costs.decode, rel=0.05)
    assert (model.link_alpha_s, model.link_beta_s) == (0.0, 0.0)
    assert model.kv_bytes_per_token == 2**28 // costs.pool
    assert (model.prefill_pool_tokens, model.decode_pool_tokens) == (costs.pool, costs.pool)
    assert (model.chunk_tokens, model.max_running_requests) == (costs.chunk, 64)
    assert model.fit_error < 0.02


@pytest.mark.slow
async def test_kernels_that_compute_a_known_prefix_again_are_told_apart() -> None:
    model = (await calibrated(Costs(prefill=(0.02, 2e-4, 1e-7, 3e-7)))).model
    assert (model.prefill_pair_s, model.prefill_reread_s) == pytest.approx((1e-7, 3e-7), rel=0.05)
    assert (await calibrated(Costs())).model.prefill_reread_s < 1e-9


@pytest.mark.slow
async def test_noise_and_rows_hit_by_others_move_the_model_little() -> None:
    costs = Costs(noise=0.05)
    calibration = await calibrated(costs, decode=2, budget_s=4.0)
    model = calibration.model
    for context, new in ((0, 64), (0, 512), (512, 128)):
        (a, b, c, d), passes = costs.prefill, pass_counts(context, new, costs.chunk)
        exact_s = a * passes[0] + b * passes[1] + c * passes[2] + d * passes[3]
        assert model.prefill_s(new, context) == pytest.approx(exact_s, rel=0.15)
    # A step's time is a mean of many: the spikes of one in ten steps are in all of them alike, 20 % on top.
    exact_s = costs.decode[0] + 4 * costs.decode[1]
    assert exact_s < model.decode_step_s(4, 200) < exact_s * 1.4
    assert "off by" in format_calibration(calibration)


async def test_a_service_is_found_by_its_url_and_the_file_can_be_read_back(tmp_path: Path) -> None:
    costs = Costs()
    async with timed_fleet(costs, decode=2) as (prefill, decodes), AsyncExitStack() as stack:
        config = BalancerConfig(
            port=0, prefill=((prefill.url, 9000),), decode=tuple(d.url for d in decodes), load_poll_s=60.0
        )
        balancer = Balancer(config)
        await balancer.start()
        stack.push_async_callback(balancer.stop)
        await until(lambda: all(str(pair.state) == "ready" for pair in balancer.fleet.pairs()), "pairs")
        out = tmp_path / "model.json"
        options = replace(QUICK, url=balancer.url, out=str(out), name="mine")
        report = await asyncio.to_thread(run_calibration, options)
    model = load_model(out)
    assert model.name == "mine"
    assert model.prefill_token_s == pytest.approx(costs.prefill[1], rel=0.03)
    assert str(out) in report and "prefill" in report and "±" in report


def test_a_decode_row_is_what_the_moments_grew_by() -> None:
    def load(*moments: float) -> WorkerLoad:
        return WorkerLoad(timestamp_s=0.0, decode_moments=moments)

    with pytest.raises(ConfigError, match="counted no decode steps"):
        decode_row("d", load(), load(), context=10)
    row = decode_row("d", load(5, 5, 100), load(105, 205, 1_000_100), context=10)
    assert row.counts == (100, 200, 200 * (10 + OUT_TOKENS / 2)) and row.seconds == pytest.approx(1.0)


async def test_a_server_without_counters_is_refused() -> None:
    with pytest.raises(ConfigError, match="calibrating needs the"):
        await calibrated(Costs(has_counters=False))


async def test_times_that_follow_nothing_are_refused() -> None:
    with pytest.raises(ConfigError, match="no line fits"):
        await calibrated(Costs(chaos=True))


async def test_a_server_of_the_other_role_is_refused() -> None:
    async with timed_fleet(Costs()) as (prefill, decodes):
        prefill.mode = "decode"
        with pytest.raises(ConfigError, match="its mode is 'decode'"):
            await calibrate(named(prefill, decodes))


async def test_what_is_no_service_is_refused() -> None:
    with pytest.raises(ConfigError, match="name a service"):
        await calibrate(QUICK)
    async with timed_fleet(Costs()) as (prefill, _):
        with pytest.raises(ConfigError, match="no pdserve service"):
            await calibrate(replace(QUICK, url=prefill.url))
    with pytest.raises(ConfigError, match="cannot connect"):
        await calibrate(replace(QUICK, url="http://127.0.0.1:9"))


def test_a_request_in_chunks_pays_a_pass_for_each_and_every_pair_once() -> None:
    passes, tokens, pairs, reread = pass_counts(0, 1200, 512)
    assert (passes, tokens, pairs) == (3, 1200, 1200 * 1200 / 2)
    assert reread == 512 * 512 / 2 + 1024 * 1024 / 2
    assert pass_counts(100, 50, 512) == (1, 50, 50 * 125, 100 * 100 / 2)


def test_no_term_costs_less_than_nothing_and_outliers_are_outvoted() -> None:
    rows = [Row((1, n), 1.0 - 0.01 * n) for n in range(1, 20)]
    assert fit(("base", "slope"), rows).cost["slope"] == 0.0
    rows = [Row((1, n), (1.0 + 0.5 * n) * (5 if n % 6 == 0 else 1)) for n in range(1, 30)]
    found = fit(("base", "slope"), rows)
    assert (found.cost["base"], found.cost["slope"]) == pytest.approx((1.0, 0.5), rel=0.01)
    assert found.median_error < 0.01 < found.worst_error


def test_a_term_that_was_never_paid_is_not_seen() -> None:
    found = fit(("base", "never"), [Row((1, 0), 2.0), Row((2, 0), 4.0), Row((3, 0), 6.0)])
    assert found.cost == {"base": pytest.approx(2.0), "never": 0.0}
    assert math.isnan(found.error["never"])
    with pytest.raises(ValueError, match="1 measurements for 2 terms"):
        fit(("a", "b"), [Row((1, 1), 1.0)])
