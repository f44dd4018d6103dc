"""Load table arithmetic: parsing, in-flight credit, fitted rates."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdserve.balancer.load import Credit, LoadTable
from pdserve.balancer.rates import MIN_DECODE_STEPS, DecodeFit, RateFit, fit_decode
from pdserve.balancer.sample import ARRIVAL_S, Sample, parse_loads
from pdserve.errors import ProtocolMismatch
from pdserve.types import InstanceId, Role, WorkerId, WorkerInfo, WorkerLoad

P0 = InstanceId("p0")
D0 = InstanceId("d0")


def info(instance_id: InstanceId, role: Role = Role.PREFILL) -> WorkerInfo:
    return WorkerInfo(
        worker_id=WorkerId(f"{role}-{instance_id}"), instance_id=instance_id, role=role, url="", model=""
    )


def table_of(*infos: WorkerInfo) -> LoadTable:
    table = LoadTable()
    for each in infos:
        table.add(each)
    return table


def sample(covered_s: float = 0.0, **fields: object) -> Sample:
    return Sample(WorkerLoad(timestamp_s=covered_s, **fields), covered_s)  # type: ignore[arg-type]


def rank(**fields: object) -> dict[str, object]:
    return {"timestamp": 1_700_000_000.0, "dp_rank": 0, "num_running_reqs": 1, **fields}


# -- parsing ---------------------------------------------------------------------------------


def test_dp_ranks_are_summed_and_the_fullest_pool_counts() -> None:
    body = json.dumps(
        {
            "timestamp": "2023-11-14T22:13:21+00:00",
            "loads": [
                rank(token_usage=0.2, decode_moments=[1, 2, 3, 4, 5, 6], disaggregation={"mode": "decode"}),
                rank(
                    num_waiting_reqs=4,
                    token_usage=0.7,
                    decode_moments=[10, 20, 30, 40, 50, 60],
                    disaggregation={"decode_transfer_queue_reqs": 3},
                ),
            ],
        }
    ).encode()
    parsed = parse_loads(body, sent_s=100.0, received_s=100.5)
    assert parsed.load.num_running_reqs == 2
    assert parsed.load.num_waiting_reqs == 4
    assert parsed.load.token_usage == 0.7
    assert parsed.load.decode_moments == (11, 22, 33, 44, 55, 66)
    assert parsed.load.decode_transfer_queue_reqs == 3
    assert parsed.load.timestamp_s == 100.5
    # the server answered 1 s after it took the snapshot, by its own clock
    assert parsed.covered_s == pytest.approx(100.0 - 1.0 - ARRIVAL_S)


def test_missing_sections_and_null_fields_read_as_zero() -> None:
    parsed = parse_loads(
        b'{"loads":[{"num_running_reqs":null,"decode_moments":null}]}', sent_s=5.0, received_s=6.0
    )
    assert parsed.load == WorkerLoad(timestamp_s=6.0)
    assert parsed.covered_s == pytest.approx(5.0 - ARRIVAL_S)


def test_a_server_without_ranks_is_idle() -> None:
    assert parse_loads(b'{"loads":[]}', sent_s=0.0, received_s=0.0).load.is_idle


@pytest.mark.parametrize(
    "body", [b"", b"<html>", b"{}", b'{"loads": 3}', b'{"loads":[{"num_running_reqs":"x"}]}']
)
def test_anything_else_is_a_protocol_mismatch(body: bytes) -> None:
    with pytest.raises(ProtocolMismatch, match="/v1/loads"):
        parse_loads(body, sent_s=0.0, received_s=0.0)


# -- credit ----------------------------------------------------------------------------------


def test_a_burst_between_two_polls_is_credited_to_its_worker() -> None:
    table = table_of(info(P0))
    table.record(P0, sample(10.0, num_waiting_uncached_tokens=100))
    for step in range(3):
        table.dispatch(P0, 50, 10.1 + step)
    assert table.credit(P0) == Credit(reqs=3, prompt_tokens=150)
    assert table.view(P0).queued_tokens == 250
    assert table.view(P0).inflight == 3


def test_a_sample_takes_over_what_it_covers() -> None:
    table = table_of(info(P0))
    table.dispatch(P0, 50, 10.0)
    table.dispatch(P0, 70, 11.0)
    table.record(P0, sample(10.5, num_waiting_reqs=1, num_waiting_uncached_tokens=50))
    assert table.credit(P0) == Credit(reqs=1, prompt_tokens=70)
    assert table.view(P0).queued_tokens == 120


def test_a_running_prefill_batch_that_no_queue_lists_still_counts() -> None:
    table = table_of(info(P0))
    table.dispatch(P0, 4000, 10.0)
    table.record(P0, sample(11.0))  # SGLang: nothing waits, the batch of 4000 is being computed
    assert table.view(P0).queued_tokens == 4000


def test_requests_in_the_bootstrap_queue_count_with_the_mean_prompt() -> None:
    table = table_of(info(P0))
    table.dispatch(P0, 100, 1.0)
    table.dispatch(P0, 300, 1.0)
    table.record(P0, sample(2.0, num_waiting_reqs=2, prefill_bootstrap_queue_reqs=2))
    assert table.view(P0).queued_tokens == 400


def test_a_request_whose_kv_is_being_sent_is_no_prefill_work() -> None:
    table = table_of(info(P0))
    table.dispatch(P0, 4000, 10.0)
    table.record(P0, sample(11.0, prefill_inflight_queue_reqs=1))
    assert table.view(P0).queued_tokens == 0


def test_decode_queues_inside_num_waiting_are_not_counted_twice() -> None:
    table = table_of(info(D0, Role.DECODE))
    table.record(
        D0,
        sample(
            1.0,
            num_running_reqs=2,
            num_waiting_reqs=3,
            decode_prealloc_queue_reqs=1,
            decode_transfer_queue_reqs=2,
        ),
    )
    assert table.view(D0).num_reqs == 5


def test_num_reqs_is_never_below_our_own_open_legs() -> None:
    table = table_of(info(D0, Role.DECODE))
    for _ in range(4):
        table.dispatch(D0, 10, 1.0)
    table.record(D0, sample(2.0, num_running_reqs=1))
    assert table.view(D0).num_reqs == 4


def test_finishing_a_leg_of_a_worker_that_left_does_nothing() -> None:
    table = table_of(info(P0))
    leg = table.dispatch(P0, 10, 1.0)
    table.remove(P0)
    table.finish(P0, leg)
    table.record(P0, sample())
    assert table.inflight(P0) == 0
    assert table.load(P0) is None


@given(
    st.lists(
        st.one_of(
            st.tuples(st.just("dispatch"), st.integers(0, 5000)),
            st.tuples(st.just("finish"), st.integers(0, 30)),
            st.tuples(st.just("sample"), st.integers(0, 40)),
        ),
        max_size=60,
    )
)
def test_credit_is_exactly_the_open_legs_sent_after_the_sample(steps: list[tuple[str, int]]) -> None:
    table = table_of(info(P0))
    model: dict[int, tuple[int, float]] = {}
    covered_s, now_s = float("-inf"), 0.0
    for verb, number in steps:
        now_s += 1.0
        if verb == "dispatch":
            model[table.dispatch(P0, number, now_s)] = (number, now_s)
        elif verb == "finish":
            table.finish(P0, number)
            model.pop(number, None)
        else:
            covered_s = float(number)
            table.record(P0, sample(covered_s))
        fresh = [tokens for tokens, sent_s in model.values() if sent_s >= covered_s]
        assert table.credit(P0) == Credit(len(fresh), sum(fresh))
        assert table.inflight(P0) == len(model)
        assert table.view(P0).queued_tokens >= table.credit(P0).prompt_tokens


# -- rates -----------------------------------------------------------------------------------


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


def test_too_few_decode_steps_give_no_fit() -> None:
    assert fit_decode(moments([1] * int(MIN_DECODE_STEPS - 1), 1000, 1)[:5]) is None
    assert fit_decode([0.0] * 5) is None


def test_prefill_rate_follows_the_growth_of_the_counters() -> None:
    fit = RateFit()
    base = WorkerLoad(timestamp_s=0.0)
    assert fit.prefill_tokens_s is None
    fit.update(replace(base, total_prefill_uncached_tokens=8, total_prefill_busy_us=100))
    assert fit.prefill_tokens_s is None, "a probe's 8 tokens are noise"
    fit.update(replace(base, total_prefill_uncached_tokens=20_008, total_prefill_busy_us=10_000_100))
    assert fit.prefill_tokens_s == pytest.approx(2000, rel=0.01)
    fit.update(replace(base, total_prefill_uncached_tokens=60_008, total_prefill_busy_us=20_000_100))
    assert fit.prefill_tokens_s == pytest.approx(3000, rel=0.01), "the window leaks: old work fades"


def test_counters_that_fell_start_anew_instead_of_going_negative() -> None:
    fit = RateFit()
    base = WorkerLoad(timestamp_s=0.0)
    fit.update(replace(base, total_prefill_uncached_tokens=5000, total_prefill_busy_us=1_000_000))
    fit.update(replace(base, total_prefill_uncached_tokens=50, total_prefill_busy_us=10_000))
    assert fit.prefill_tokens_s == pytest.approx(5000)
    fit.update(replace(base, total_prefill_uncached_tokens=5050, total_prefill_busy_us=1_010_000))
    assert fit.prefill_tokens_s == pytest.approx(5000)


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
            )
        )
    assert fit.prefill_tokens_s is None or 0 < fit.prefill_tokens_s < float("inf")
    assert fit.decode is None or (fit.decode.base_s >= 0 and fit.decode.slope_s >= 0)


def test_an_unmeasured_worker_is_taken_to_be_like_its_measured_peers() -> None:
    other = InstanceId("p1")
    table = table_of(info(P0), info(other))
    before = table.view(other)
    table.record(P0, sample(total_prefill_uncached_tokens=4000, total_prefill_busy_us=20_000_000))
    assert before.prefill_tokens_s == 10_000
    assert table.view(other).prefill_tokens_s == pytest.approx(200)


def test_a_prefill_queue_is_time_and_not_pool_use() -> None:
    table = table_of(info(P0), info(D0, Role.DECODE))
    for instance_id in (P0, D0):
        table.record(
            instance_id, sample(num_used_tokens=100, num_total_tokens=900, max_total_num_tokens=1000)
        )
        table.dispatch(instance_id, 30, 1.0)
    assert table.view(P0).kv_tokens == 130
    assert table.view(D0).kv_tokens == 930


def test_worker_with_a_slow_start_is_not_taken_at_its_word() -> None:
    """A few slow first steps must not starve a worker: thin evidence is drawn towards the peers."""
    peers = DecodeFit(0.010, 0.0002)
    fit = RateFit()
    slow = moments([1] * 12, 40_000, 0)
    fit.update(replace(WorkerLoad(timestamp_s=0.0), timestamp_s=1.0, decode_moments=slow))
    assert fit.decode is not None
    assert fit.decode.step_s(1) == pytest.approx(0.040)
    assert fit.decode_near(peers).step_s(1) < 0.012


def test_worker_that_really_is_slow_is_known_to_be_after_enough_steps() -> None:
    peers = DecodeFit(0.010, 0.0002)
    fit = RateFit()
    fit.update(
        replace(WorkerLoad(timestamp_s=0.0), timestamp_s=1.0, decode_moments=moments([1] * 2000, 40_000, 0))
    )
    assert fit.decode_near(peers).step_s(1) > 0.035
    fit.update(
        replace(WorkerLoad(timestamp_s=0.0), timestamp_s=301.0, decode_moments=moments([1] * 2000, 40_000, 0))
    )
    assert fit.decode_near(peers).step_s(1) < 0.015, "unused for ten half-lives: worth another try"
