"""Windows of latencies and rates under a clock in the test's hands, against exact figures."""

from __future__ import annotations

import random
import statistics
from bisect import bisect_right

import pytest
from msgspec import structs

from pdserve.balancer.metrics.catalog import LATENCIES, METRICS
from pdserve.balancer.metrics.windows import (
    BOUNDS,
    GROWTH,
    NUM_STEPS,
    SECONDS,
    STEP_S,
    LatencyWindow,
    RollingWindow,
)
from pdserve.state.document import Latency

ERROR = GROWTH - 1


def exact(values: list[float], share: float) -> float:
    return sorted(values)[max(0, -(-int(share * 1000) * len(values) // 1000) - 1)]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("scale_s", [0.0005, 0.05, 3.0, 200.0])
def test_percentiles_are_within_a_bucket_of_exact_ones(seed: int, scale_s: float) -> None:
    random_ = random.Random(seed)
    values = [scale_s * random_.lognormvariate(0, 1) for _ in range(2000)]
    window = LatencyWindow()
    for at, value in enumerate(values):
        window.observe(value)
        if at % 500 == 250:
            window.close_step()
    told = window.recent()
    assert told.count == 2000
    assert told.mean == pytest.approx(statistics.fmean(values))
    for figure, share in ((told.p50, 0.5), (told.p95, 0.95), (told.p99, 0.99)):
        assert figure == pytest.approx(exact(values, share), rel=ERROR)


def test_a_step_is_forgotten_after_five_minutes_and_stays_in_the_totals() -> None:
    window = LatencyWindow()
    window.observe(1.0)
    for _ in range(NUM_STEPS):
        window.close_step()
    assert window.recent().count == 1
    assert window.close_step() == Latency()
    assert window.recent() == Latency()
    assert window.totals((0.8, 1, 2)) == ([0, 1, 1, 1], 1.0)


def test_memory_does_not_grow_with_time_or_observations() -> None:
    window, random_ = LatencyWindow(), random.Random(1)
    for _ in range(3 * NUM_STEPS):
        for _ in range(20):
            window.observe(random_.random())
        window.close_step()
    assert len(window._steps) == NUM_STEPS
    assert window.recent().count == 20 * NUM_STEPS


@pytest.mark.parametrize("metric", LATENCIES.values(), ids=lambda metric: metric.name)
def test_histogram_counts_are_exact_and_bounds_inclusive(metric: object) -> None:
    bounds = metric.bounds  # type: ignore[attr-defined]
    window, random_ = LatencyWindow(), random.Random(2)
    values = [*bounds, *(random_.expovariate(1.0) for _ in range(500)), 1e6]
    for value in values:
        window.observe(value)
    window.close_step()
    window.observe(bounds[0])
    values.append(bounds[0])
    counts, seconds = window.totals(bounds)
    ordered = sorted(values)
    assert counts == [*(bisect_right(ordered, bound) for bound in bounds), len(values)]
    assert seconds == pytest.approx(sum(values))


def test_every_bound_of_a_histogram_is_a_bound_of_the_window() -> None:
    assert set(SECONDS) <= set(BOUNDS)
    for metric in METRICS:
        assert set(map(float, metric.bounds)) <= set(map(float, SECONDS)), metric.name
        assert list(metric.bounds) == sorted(set(metric.bounds))


# -- rates and series --------------------------------------------------------------------------


def test_rates_are_of_the_last_minute() -> None:
    figures = RollingWindow(1000.0)
    now_s = 1000.0
    for second in range(120):
        now_s = 1000.0 + second
        figures.advance(now_s)
        figures.live.requests += 3
        figures.live.output_tokens += 100 if second >= 60 else 0
    now_s = 1119.999
    rates = figures.rates(now_s)
    assert rates.window_s == 60
    assert rates.requests_s == pytest.approx(3, rel=0.01)
    assert rates.output_tokens_s == pytest.approx(100, rel=0.01)
    assert rates.failed_s == 0
    assert figures.rates(now_s + 61).requests_s == 0


def test_rates_of_a_young_balancer_are_over_its_life() -> None:
    figures = RollingWindow(1002.0)
    figures.live.requests += 20
    assert figures.rates(1012.0).requests_s == pytest.approx(2.0)


def test_series_have_a_place_for_each_step_and_null_where_nothing_was() -> None:
    figures = RollingWindow(1000.0)
    figures.live.requests += 10
    figures.latencies["ttft_s"].observe(0.5)
    figures.advance(1005.0)
    series = figures.series(1020.0)
    assert series.step_s == STEP_S
    for name, values in structs.asdict(series).items():
        assert name in ("step_s", "waiting") or len(values) == NUM_STEPS, name
    assert series.requests_s == [None] * 56 + [2.0, 0.0, 0.0, 0.0]
    ttft = series.ttft_p50_s
    assert ttft[56] == pytest.approx(0.5, rel=ERROR)
    assert ttft[:56] + ttft[57:] == [None] * 59


def test_an_idle_hour_leaves_nothing_and_costs_five_minutes_of_steps() -> None:
    figures = RollingWindow(0.0)
    figures.live.requests += 1
    figures.latencies["e2e_s"].observe(1.0)
    figures.advance(3600.0)
    assert figures.rates(3600.0).requests_s == 0
    assert figures.latency(3600.0).e2e_s == Latency()
    assert len(figures._steps) == NUM_STEPS
    assert figures.latencies["e2e_s"].totals((1,)) == ([1, 1], 1.0)
