"""The simulator computes what can be computed by hand, ends every request once and repeats itself."""

from __future__ import annotations

from dataclasses import replace

import msgspec
import pytest

from pdserve.config.balancer import BalancerConfig
from pdserve.errors import ConfigError
from pdserve.scheduling.policy import policy_of
from pdserve.sim.baselines import SIMULATED_MAKERS
from pdserve.sim.cost import CostModel
from pdserve.sim.forecasts import make_lengths
from pdserve.sim.simulator import SimOptions, Simulation, simulate
from pdserve.workload import LengthDistribution, Synthetic, TracedRequest, synthetic

MODEL = CostModel(
    name="plain",
    source="made up for tests",
    prefill_base_s=0.01,
    prefill_token_s=1e-4,
    prefill_pair_s=1e-8,
    decode_base_s=0.02,
    decode_request_s=1e-3,
    decode_token_s=1e-7,
    kv_bytes_per_token=1000,
    prefill_pool_tokens=100_000,
    decode_pool_tokens=100_000,
    max_running_requests=64,
    chunk_tokens=1000,
    link_alpha_s=0.005,
    link_beta_s=1e-9,
    request_s=0.002,
    handshake_s=0.001,
    response_s=0.0005,
    reload_beta_s=1e-9,
)
BUSY = Synthetic(
    rate=12.0,
    requests=300,
    inputs=LengthDistribution("lognormal", mean=600),
    outputs=LengthDistribution("lognormal", mean=40, high=400),
    num_prefixes=5,
    prefix_tokens=1024,
)


def one(tokens: int, answer: int, at_s: float = 0.0, ids: tuple[int, ...] | None = None) -> TracedRequest:
    return TracedRequest(at_s, tokens, answer, ids, serial=int(at_s * 1e6) + tokens)


def simulation(
    trace: list[TracedRequest], model: CostModel = MODEL, size: tuple[int, int] = (1, 1)
) -> Simulation:
    config = BalancerConfig()
    return Simulation(trace, model, policy_of(config, 1), size, config, make_lengths("learned"), SimOptions())


def test_one_request_on_an_idle_pair_takes_what_the_model_says() -> None:
    report = simulate([one(800, 5)], MODEL, "round_robin", 1, 1)
    (record,) = report.records
    ttft_s = 0.002 + 0.001 + MODEL.prefill_s(800) + MODEL.transfer_s(800) + 0.0005
    assert record.ttft_s == pytest.approx(ttft_s)
    steps_s = sum(MODEL.decode_step_s(1, 800 + step) for step in range(4))
    assert record.tpot_s == pytest.approx(steps_s / 4)
    assert report.itl_percentile(0.5) == pytest.approx(steps_s / 4, rel=0.01)
    assert record.e2e_s == pytest.approx(ttft_s + steps_s)


def test_a_long_prompt_goes_in_chunks_and_only_its_last_chunk_travels_after_it() -> None:
    (record,) = simulate([one(2500, 1)], MODEL, "round_robin", 1, 1).records
    passes_s = MODEL.prefill_s(1000) + MODEL.prefill_s(1000, 1000) + MODEL.prefill_s(500, 2000)
    assert passes_s == pytest.approx(MODEL.prefill_alone_s(2500))
    assert record.ttft_s == pytest.approx(0.003 + passes_s + MODEL.transfer_s(500) + 0.0005)
    assert record.tpot_s == 0.0


def test_a_second_request_waits_for_the_pass_before_it() -> None:
    first, second = simulate([one(900, 1), one(700, 1, 0.01)], MODEL, "round_robin", 1, 1).records
    ends_s = 0.003 + MODEL.prefill_s(900) + MODEL.prefill_s(700)
    assert first.ttft_s == pytest.approx(0.003 + MODEL.prefill_s(900) + MODEL.transfer_s(900) + 0.0005)
    assert second.ttft_s == pytest.approx(ends_s + MODEL.transfer_s(700) + 0.0005 - 0.01)


def test_requests_that_wait_together_share_a_pass() -> None:
    trace = [one(900, 1), one(300, 1, 0.01), one(200, 1, 0.02)]
    _, second, third = simulate(trace, MODEL, "round_robin", 1, 1).records
    passed_s = 0.003 + MODEL.prefill_s(900) + MODEL.prefill_pass_s([(300, 0), (200, 0)])
    assert second.ttft_s == pytest.approx(passed_s + MODEL.transfer_s(300) + 0.0005 - 0.01)
    # One port sends one after the other: the third one's bytes wait for the second's.
    third_s = passed_s + 300 * 1000 * 1e-9 + MODEL.transfer_s(200) + 0.0005 - 0.02
    assert third.ttft_s == pytest.approx(third_s)


def test_what_joins_a_batch_takes_part_from_the_next_step_on() -> None:
    first, second = simulate([one(100, 200), one(100, 2, 0.5)], MODEL, "round_robin", 1, 1).records
    kv_s = 0.5 + 0.002
    start_s = first.ttft_s - 0.0005
    now_s, context = start_s, 100
    ends = []
    while now_s < 3.0:
        now_s += MODEL.decode_step_s(1, context)
        context += 1
        ends.append(now_s)
    looked_s = next(end for end in ends if end >= kv_s)  # decode looks at new requests between steps
    kv_s = looked_s + 0.001 + MODEL.prefill_s(100) + MODEL.transfer_s(100)
    joined = next(index for index, end in enumerate(ends) if end >= kv_s)
    assert second.ttft_s == pytest.approx(ends[joined] + 0.0005 - 0.5)
    assert second.tpot_s == pytest.approx(MODEL.decode_step_s(2, 200 + joined + 1))


def test_a_known_prefix_saves_its_part_of_the_pass() -> None:
    trace = [one(1000, 1, 0.0, (1, 2)), one(900, 1, 5.0, (1, 3))]
    model = msgspec.structs.replace(MODEL, chunk_tokens=8192)
    _, second = simulate(trace, model, "round_robin", 1, 1).records
    assert second.cached_tokens == 512
    # What was cached travels while the rest is computed; both are bound to one port.
    assert second.ttft_s == pytest.approx(0.003 + model.prefill_s(388, 512) + model.transfer_s(388) + 0.0005)


def test_a_prefix_still_being_computed_saves_nothing() -> None:
    trace = [one(1000, 1, 0.0, (1, 2)), one(900, 1, 0.01, (1, 3))]
    model = msgspec.structs.replace(MODEL, chunk_tokens=1500)
    _, second = simulate(trace, model, "round_robin", 1, 1).records
    assert second.cached_tokens == 512
    together = [one(400, 1, 0.0), *[replace(each, arrival_s=0.01) for each in trace]]
    _, _, last = simulate(
        together, msgspec.structs.replace(MODEL, chunk_tokens=9000), "round_robin", 1, 1
    ).records
    assert last.cached_tokens == 0


def test_with_a_decode_cache_only_the_rest_travels() -> None:
    trace = [one(1024, 1, 0.0, (1, 2)), one(1024, 1, 5.0, (1, 2))]
    model = msgspec.structs.replace(MODEL, has_decode_cache=True, chunk_tokens=8192)
    report = simulate(trace, model, "round_robin", 1, 1)
    assert report.records[1].decode_cached_tokens == 1023
    second_s = 0.003 + model.prefill_s(1, 1023) + model.transfer_s(1) + 0.0005
    assert report.records[1].ttft_s == pytest.approx(second_s)
    assert report.decode_cache_hit_rate() == pytest.approx(1023 / 2048)


def test_a_full_pool_retracts_and_everybody_still_ends() -> None:
    model = msgspec.structs.replace(MODEL, decode_pool_tokens=4000)
    trace = [one(800, 900, 0.001 * index) for index in range(3)]
    report = simulate(trace, model, "round_robin", 1, 1)
    assert report.use.retractions >= 1
    assert len(report.served) == 3
    assert max(record.retractions for record in report.records) >= 1
    roomy = simulate(trace, MODEL, "round_robin", 1, 1)
    assert roomy.use.retractions == 0
    assert roomy.percentile("e2e_s", 1.0) < report.percentile("e2e_s", 1.0)


def test_what_can_never_fit_is_refused_and_harms_nobody() -> None:
    report = simulate([one(200_000, 5), one(100, 5, 0.1)], MODEL, "least_load", 1, 1)
    assert report.records[0].error == "longer than the KV pool"
    assert report.records[1].error == ""


def test_a_queue_that_waits_too_long_ends_in_failures() -> None:
    config = BalancerConfig(max_concurrent_requests=1, queue_timeout_s=0.5, queue_size=2)
    trace = [one(100, 200, 0.01 * index) for index in range(5)]
    report = simulate(trace, MODEL, "round_robin", 1, 1, config)
    assert report.shed == {"timeout": 2, "queue_full": 2}
    assert [bool(record.error) for record in report.records] == [False, True, True, True, True]
    assert report.records[1].queue_s == pytest.approx(0.5)


@pytest.mark.slow
@pytest.mark.parametrize("policy", SIMULATED_MAKERS)
def test_equal_arguments_give_equal_runs_and_every_request_ends_once(policy: str) -> None:
    trace = synthetic(BUSY, seed=7)
    first = simulate(trace, MODEL, policy, 2, 3, options=SimOptions(seed=5))
    again = simulate(trace, MODEL, policy, 2, 3, options=SimOptions(seed=5))
    assert first.records == again.records
    assert [record.index for record in first.records] == list(range(len(trace)))
    assert all(record.ttft_s > 0 and record.e2e_s >= record.ttft_s - 1e-9 for record in first.served)


@pytest.mark.slow
@pytest.mark.parametrize("model", [MODEL, msgspec.structs.replace(MODEL, has_decode_cache=True)])
@pytest.mark.parametrize("pool", [4_000, 12_000, 100_000])
def test_nothing_is_held_when_all_is_over(model: CostModel, pool: int) -> None:
    small = msgspec.structs.replace(model, prefill_pool_tokens=pool, decode_pool_tokens=pool)
    run = simulation(synthetic(BUSY, seed=3), small, (2, 2))
    report = run.run()
    assert len(report.records) == BUSY.requests
    for prefill in run.prefills:
        assert (prefill.held_tokens, prefill.cache.pinned_tokens, prefill.cache.num_pinned) == (0, 0, 0)
        assert prefill.cache.tokens <= pool
        assert prefill.is_idle
    for decode in run.decodes:
        assert (decode.used_tokens, decode.cache.pinned_tokens, decode.cache.num_pinned) == (0, 0, 0)
        assert decode.is_idle
    for worker in run.workers:
        assert (worker.num_inflight, worker.promised_tokens, worker.reserved_tokens) == (0, 0, 0)
        assert run.scheduler.table.inflight(worker.instance_id) == 0
    assert run.scheduler.admission.placement.num_open == 0
    assert not run.scheduler.admission.queue


@pytest.mark.slow
def test_rates_are_fitted_from_the_samples_as_in_production() -> None:
    run = simulation(synthetic(replace(BUSY, requests=600), seed=3), MODEL, (1, 1))
    run.run()
    decode = run.workers[1].view
    assert decode.step_base_s == pytest.approx(0.02, rel=0.1)
    assert decode.step_slope_s > 0
    prefill = run.workers[0].view
    assert prefill.prefill_tokens_s == pytest.approx(1 / 1.4e-4, rel=0.3)


@pytest.mark.slow
def test_a_faster_link_and_more_workers_are_never_worse() -> None:
    trace = synthetic(BUSY, seed=11)
    base = simulate(trace, MODEL, "least_load", 2, 2)
    fast = simulate(
        trace, msgspec.structs.replace(MODEL, link_alpha_s=0.0, link_beta_s=0.0), "least_load", 2, 2
    )
    more = simulate(trace, MODEL, "least_load", 4, 4)
    mean = [sum(record.ttft_s for record in report.served) / BUSY.requests for report in (fast, base, more)]
    assert mean[0] < mean[1]
    assert mean[2] < mean[1]


@pytest.mark.slow
def test_a_large_fleet_makes_no_grid_of_pairs() -> None:
    trace = synthetic(Synthetic(rate=500.0, requests=300), seed=2)
    run = simulation(trace, MODEL, (200, 200))
    report = run.run()
    assert len(report.served) == 300
    assert len({record.prefill for record in report.records}) > 100
    assert len(run.scheduler.admission.placement.ready_pairs) == 40_000


@pytest.mark.parametrize("lengths", ["learned", "oracle", "useless", "none"])
def test_each_teller_of_lengths_can_be_asked(lengths: str) -> None:
    report = simulate(synthetic(BUSY, seed=1), MODEL, "least_load", 1, 1, options=SimOptions(lengths=lengths))
    assert len(report.records) == BUSY.requests


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (([], MODEL, "least_load", 1, 1), "empty"),
        (([one(1, 1)], MODEL, "best", 1, 1), "unknown policy"),
        (([one(1, 1)], MODEL, "least_load", 0, 1), "at least one worker"),
    ],
)
def test_impossible_runs_are_refused(arguments: tuple, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        simulate(*arguments)
    with pytest.raises(ConfigError, match="lengths"):
        simulate([one(1, 1)], MODEL, "least_load", 1, 1, options=SimOptions(lengths="psychic"))
