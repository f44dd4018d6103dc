"""Rates fitted from cumulative counters: the shared line, each worker's factor, what evidence moves it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdserve.scheduling.load import LoadTable
from pdserve.scheduling.load_sample import Sample
from pdserve.scheduling.rates import (
    COLD_STEPS,
    COLD_TOKENS,
    MIN_STEPS,
    DecodeFit,
    Deviation,
    RateFit,
    SharedRates,
    fit_decode,
    pool_decode,
    pool_prefill,
)
from pdserve.types import InstanceId, Role, WorkerId, WorkerInfo, WorkerLoad

SHARED = SharedRates(prefill_tokens_s=1000.0, decode=DecodeFit(0.010, 0.0002))


def moments(batches: list[int], base_us: float, slope_us: float) -> tuple[float, ...]:
    times = [base_us + slope_us * b for b in batches]
    return (
        float(len(batches)),
        float(sum(batches)),
        sum(times),
        float(sum(b * b for b in batches)),
        sum(b * t for b, t in zip(batches, times, strict=True)),
        float(sum(batches)),
    )


class Counters:
    """A server's cumulative counters, past its cold start, and the fit that is fed from them."""

    def __init__(self, shared: SharedRates | None = SHARED) -> None:
        self.fit = RateFit()
        self.shared = shared
        self.now_s = 0.0
        self._moments = moments([1] * COLD_STEPS, 10_000, 0)
        self._tokens, self._busy_us = COLD_TOKENS, 100_000
        self._tell()

    def steps(self, batches: list[int], base_us: float, slope_us: float) -> None:
        grown = moments(batches, base_us, slope_us)
        self._moments = tuple(old + new for old, new in zip(self._moments, grown, strict=True))
        self.now_s += grown[2] / 1e6
        self._tell()

    def prefill(self, tokens: int, busy_s: float) -> None:
        self._tokens += tokens
        self._busy_us += round(busy_s * 1e6)
        self.now_s += busy_s
        self._tell()

    def rest(self, seconds: float) -> None:
        self.now_s += seconds
        self._tell()

    def _tell(self) -> None:
        load = WorkerLoad(
            timestamp_s=self.now_s,
            total_prefill_uncached_tokens=self._tokens,
            total_prefill_busy_us=self._busy_us,
            decode_moments=self._moments,
        )
        self.fit.update(load, self.shared)


# -- the line --------------------------------------------------------------------------------


@given(
    st.lists(st.integers(1, 256), min_size=8, max_size=50).filter(lambda b: len(set(b)) > 2),
    st.floats(0, 1e5),
    st.floats(0, 1e4),
)
def test_decode_line_is_recovered_from_moments(batches: list[int], base_us: float, slope_us: float) -> None:
    mean = sum(batches) / len(batches)
    fit = fit_decode(moments(batches, base_us, slope_us)[:5])
    if fit is None:
        assert base_us + slope_us == 0
        return
    assert fit.base_s >= 0
    assert fit.slope_s >= 0
    assert fit.step_s(mean) * 1e6 == pytest.approx(base_us + slope_us * mean, rel=1e-6)


def test_decode_line_is_exact_on_a_wide_spread() -> None:
    fit = fit_decode(moments(list(range(1, 65)), 20_000, 150)[:5])
    assert fit is not None
    assert fit.base_s == pytest.approx(0.020)
    assert fit.slope_s == pytest.approx(0.000150)


def test_a_constant_batch_keeps_its_mean_and_assumes_a_small_slope() -> None:
    fit = fit_decode(moments([8] * 20, 30_000, 0)[:5])
    assert fit is not None
    assert fit.step_s(8) == pytest.approx(0.030)
    assert fit.slope_s > 0


def test_line_that_would_start_below_zero_goes_through_zero() -> None:
    fit = fit_decode(moments(list(range(10, 60)), -5_000, 1000)[:5])
    assert fit is not None
    assert fit.base_s == 0
    assert fit.step_s(50) == pytest.approx(0.045, rel=0.1)


def test_too_few_decode_steps_give_no_line() -> None:
    assert fit_decode(moments([1] * int(MIN_STEPS - 1), 1000, 1)[:5]) is None
    assert fit_decode([0.0] * 5) is None


def test_shared_line_keeps_its_slope_beside_a_slow_worker_with_small_batches() -> None:
    """Pooled blindly, times would seem to fall with the batch size."""
    fast, slow = Counters(None), Counters(None)
    fast.steps(list(range(30, 60)) * 4, 10_000, 200)
    slow.steps(list(range(1, 8)) * 10, 30_000, 600)
    line = pool_decode([fast.fit, slow.fit])
    assert line is not None
    assert line.slope_s / line.base_s == pytest.approx(0.02, rel=0.1)


# -- a worker's own factor ---------------------------------------------------------------------


def test_worker_without_evidence_is_like_its_kind() -> None:
    fit = RateFit()
    assert fit.decode(SHARED) == SHARED.decode
    assert fit.prefill_tokens_s(SHARED) == SHARED.prefill_tokens_s


def test_few_slow_steps_move_nothing_and_many_do() -> None:
    counters = Counters()
    counters.steps([1] * 12, 20_400, 0)
    assert counters.fit.decode(SHARED) == SHARED.decode
    for _ in range(80):
        counters.steps([1] * 12, 20_400, 0)
    assert counters.fit.decode(SHARED).step_s(1) == pytest.approx(0.020, rel=0.1)


def test_difference_of_a_few_percent_never_moves_anything() -> None:
    counters = Counters()
    for _ in range(200):
        counters.steps([1, 2, 3] * 10, 10_500, 210)
    assert counters.fit.decode(SHARED) == SHARED.decode


def test_step_times_are_judged_at_their_own_batch_sizes() -> None:
    """Steps of 30 ms at a batch of 100 are what the line says: no sign of a slow worker."""
    counters = Counters()
    for _ in range(50):
        counters.steps([100] * 20, 30_000, 0)
    assert counters.fit.decode(SHARED) == SHARED.decode


def test_a_single_wild_step_does_not_count_for_more_than_four_times_its_due() -> None:
    counters = Counters()
    counters.steps([1], 1_900_000, 0)
    line = pool_decode([counters.fit])
    assert line is None, "one step is no line"
    counters.steps([1] * 39, 10_200, 0)
    line = pool_decode([counters.fit])
    assert line is not None
    assert line.step_s(1) < 0.012


def test_slow_worker_is_forgiven_after_a_long_rest() -> None:
    counters = Counters()
    for _ in range(80):
        counters.steps([1] * 12, 40_800, 0)
    assert counters.fit.decode(SHARED).step_s(1) > 0.03
    counters.rest(150.0)
    assert counters.fit.decode(SHARED) == SHARED.decode


def test_first_steps_and_tokens_of_a_process_are_no_evidence() -> None:
    fit = RateFit()
    base = WorkerLoad(timestamp_s=0.0)
    fit.update(base, SHARED)
    slow = moments([1] * COLD_STEPS, 1_500_000, 0)
    fit.update(
        WorkerLoad(1.0, total_prefill_uncached_tokens=8, total_prefill_busy_us=900_000, decode_moments=slow),
        SHARED,
    )
    assert fit.moments == [0.0] * 5
    assert fit.tokens == 0


def test_history_of_unknown_age_is_no_evidence() -> None:
    fit = RateFit()
    fit.update(WorkerLoad(5.0, decode_moments=moments([4] * 5000, 50_000, 0)), SHARED)
    assert fit.moments == [0.0] * 5


def test_prefill_rate_of_a_kind_is_tokens_over_busy_seconds() -> None:
    one, other = Counters(None), Counters(None)
    one.prefill(3000, 1.0)
    other.prefill(1000, 1.0)
    assert pool_prefill([one.fit, other.fit]) == pytest.approx(2000, rel=0.01)
    assert pool_prefill([RateFit()]) is None


def test_prefill_worker_of_half_the_speed_is_known_after_a_while() -> None:
    counters = Counters()
    counters.prefill(100, 0.2)
    assert counters.fit.prefill_tokens_s(SHARED) == 1000
    for _ in range(40):
        counters.prefill(250, 0.5)
    assert counters.fit.prefill_tokens_s(SHARED) == pytest.approx(500, rel=0.1)


def test_counters_that_fell_start_anew_instead_of_going_negative() -> None:
    counters = Counters(None)
    counters.prefill(5000, 1.0)
    counters.steps([1] * 50, 10_000, 0)
    before = (counters.fit.tokens, list(counters.fit.moments))
    counters.fit.update(WorkerLoad(counters.now_s), None)
    assert (counters.fit.tokens, counters.fit.moments) == before


@given(st.floats(-1.5, 1.5), st.floats(0, 100), st.floats(0, 2))
def test_proven_part_is_never_more_than_the_measured_and_never_reversed(
    log_ratio: float, weight: float, spread: float
) -> None:
    deviation = Deviation()
    deviation.add(log_ratio - spread, weight / 2)
    deviation.add(log_ratio + spread, weight / 2)
    proven = deviation.proven(log_ratio)
    assert abs(proven) <= abs(log_ratio)
    assert proven * log_ratio >= 0


@given(st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 10**7), st.integers(0, 10**6)), max_size=20))
def test_rates_stay_positive_and_finite_whatever_the_counters_do(rows: list[tuple[int, int, int]]) -> None:
    fit = RateFit()
    for tokens, busy_us, n in rows:
        fit.update(
            WorkerLoad(
                timestamp_s=0.0,
                total_prefill_uncached_tokens=tokens,
                total_prefill_busy_us=busy_us,
                decode_moments=(float(n), 3.0 * n, float(busy_us), 11.0 * n, 2.0 * busy_us, 1.0),
            ),
            SHARED,
        )
        pool_decode([fit, fit])
    assert 0 < fit.prefill_tokens_s(SHARED) < float("inf")
    assert 0 < fit.decode(SHARED).step_s(1) < float("inf")


# -- in the table ------------------------------------------------------------------------------


def worker(name: str, role: Role, tp_size: int = 1) -> WorkerInfo:
    return WorkerInfo(
        worker_id=WorkerId(name), instance_id=InstanceId(name), role=role, url="", model="m", tp_size=tp_size
    )


def feed(table: LoadTable, name: str, tokens_s: int) -> None:
    for second in range(4):
        tokens = COLD_TOKENS + second * tokens_s
        load = WorkerLoad(
            float(second), total_prefill_uncached_tokens=tokens, total_prefill_busy_us=second * 10**6
        )
        table.record(InstanceId(name), Sample(load, float(second)))


def test_unmeasured_worker_is_like_its_kind_and_an_unmeasured_kind_like_its_role() -> None:
    table = LoadTable()
    for name, tp_size in (("a", 1), ("b", 1), ("c", 4)):
        table.add(worker(name, Role.PREFILL, tp_size))
    feed(table, "a", 200)
    assert table.view(InstanceId("b")).prefill_tokens_s == pytest.approx(200)
    table.add(worker("d", Role.PREFILL, 2))
    assert table.view(InstanceId("d")).prefill_tokens_s == pytest.approx(200)
    feed(table, "c", 900)
    assert table.view(InstanceId("c")).prefill_tokens_s == pytest.approx(900)
    assert table.view(InstanceId("b")).prefill_tokens_s == pytest.approx(200)
