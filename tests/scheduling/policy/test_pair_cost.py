"""pair_cost: each term by itself, and the rules that fall out of their sum."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import msgspec
import pytest

from pdserve.scheduling.policy import Candidates, Choice, PairCost, PairCostParams, PairView, WorkerView
from pdserve.scheduling.policy.decode_batch import DecodeBatch, decode_costs_s
from pdserve.scheduling.policy.links import GIB, FittedLinks, LinkFit
from pdserve.scheduling.policy.pair_cost import MISS_S
from pdserve.scheduling.policy.prefill_time import ENDLESS_KNEE, PrefillCurve, PrefillLeg, PrefillQueue
from pdserve.scheduling.prefix.tree import PromptTree
from pdserve.types import (
    Forecast,
    InstanceId,
    KVLayoutDescriptor,
    RequestShape,
    Role,
    WorkerId,
    WorkerInfo,
    WorkerLoad,
)

RATE = 10_000.0
TOKENS = 8192
TEXT = b"".join(b"%08d" % index for index in range(TOKENS // 2))
SHAPE = RequestShape(TOKENS, 100, prompt=TEXT)
LAYOUT = KVLayoutDescriptor(page_size=1, dtype="bf16", num_layers=32, num_kv_heads=8, token_bytes=4096)


def view(role: Role, index: int, host: str = "", **fields: object) -> WorkerView:
    info = WorkerInfo(
        worker_id=WorkerId(f"{role}-{index}"),
        instance_id=InstanceId(f"{role}{index}"),
        role=role,
        url=f"http://{host or 'one'}:{3000 + index}",
        model="m",
        kv_layout=LAYOUT,
    )
    return replace(WorkerView(info), prefill_tokens_s=RATE, **fields)  # type: ignore[arg-type]


def prefill(index: int = 0, host: str = "", **fields: object) -> WorkerView:
    return view(Role.PREFILL, index, host, **fields)


def decode(index: int = 0, host: str = "", **fields: object) -> WorkerView:
    return view(Role.DECODE, index, host, **fields)


def policy_with(**params: float) -> PairCost:
    return PairCost(PairCostParams(**params), PromptTree())


def ask(
    policy: PairCost,
    prefills: Sequence[WorkerView],
    decodes: Sequence[WorkerView] = (),
    shape: RequestShape = SHAPE,
    now_s: float = 0.0,
) -> Choice:
    candidates = Candidates(prefills, decodes or [decode()])
    candidates.now_s = now_s
    return policy.choose(shape, candidates)


def end(policy: PairCost, choice: Choice, now_s: float, *, is_whole: bool = True) -> None:
    policy.leg_ended(choice, Role.PREFILL, is_whole=is_whole, now_s=now_s)
    policy.leg_ended(choice, Role.DECODE, is_whole=is_whole, now_s=now_s)


def prefill_name(choice: Choice) -> str:
    return choice.pair.prefill.info.worker_id


def decode_name(choice: Choice) -> str:
    return choice.pair.decode.info.worker_id


# -- prefill: queue and own work ------------------------------------------------------------------


def test_own_legs_are_counted_before_any_sample_tells_of_them() -> None:
    policy = policy_with()
    rows = [prefill(0), prefill(1)]
    names = [prefill_name(ask(policy, rows, shape=replace_prompt(seed))) for seed in range(4)]
    assert sorted(names) == ["prefill-0", "prefill-0", "prefill-1", "prefill-1"]


def replace_prompt(seed: int, tokens: int = TOKENS) -> RequestShape:
    text = b"".join(b"%08d" % (index + 10**7 * (seed + 1)) for index in range(tokens // 2))
    return RequestShape(tokens, 100, prompt=text)


def test_what_a_worker_has_computed_meanwhile_is_no_queue_any_more() -> None:
    queue = PrefillQueue(PrefillCurve())
    for _ in range(3):
        queue.send(PrefillLeg(2.0, 20_000, 0), 10.0)
    assert queue.wait_s(10.0) == pytest.approx(6.0)
    assert queue.wait_s(11.5) == pytest.approx(4.5)
    assert queue.wait_s(60.0) == pytest.approx(4.0)  # nothing ended: it cannot be beyond its first prompt


def test_an_ended_leg_leaves_the_queue_whole_or_not() -> None:
    queue = PrefillQueue(PrefillCurve())
    legs = [PrefillLeg(2.0, 20_000, 0) for _ in range(3)]
    for leg in legs:
        queue.send(leg, 0.0)
    queue.end(legs[1], 1.0, is_whole=False)
    assert queue.wait_s(1.0) == pytest.approx(4.0)
    queue.end(legs[0], 2.0, is_whole=True)
    queue.end(legs[0], 2.0, is_whole=True)
    assert queue.wait_s(3.0) == pytest.approx(1.0)


def test_a_worker_that_others_use_too_is_taken_at_its_word() -> None:
    policy = policy_with()
    rows = [prefill(0, num_reqs=3, queued_tokens=90_000.0), prefill(1, num_reqs=3, queued_tokens=80_000.0)]
    assert prefill_name(ask(policy, rows)) == "prefill-1"


def test_memserves_rule_the_cached_prefix_is_left_exactly_when_its_queue_outlasts_recomputing() -> None:
    """p* = argmin of queue + own: 8192 tokens at 10,000/s are 0.82 s, nearly all saved where cached."""
    for queued_s, expected in ((0.5, "prefill-0"), (1.1, "prefill-1")):
        policy = policy_with(delay_weight=0.0)
        first = ask(policy, [prefill(0)])
        end(policy, first, 1.0)
        rows = [prefill(0, num_reqs=1, queued_tokens=queued_s * RATE), prefill(1)]
        assert prefill_name(ask(policy, rows, now_s=2.0)) == expected


def keep_busy(policy: PairCost) -> None:
    """All workers have queues whenever a request comes, for as long as is remembered."""
    rows = [prefill(8, num_reqs=1000, queued_tokens=9e6), prefill(9, num_reqs=1000, queued_tokens=9e6)]
    for _ in range(500):
        end(policy, ask(policy, rows, shape=RequestShape(100, 10)), 0.5)
    policy.forget(InstanceId("prefill8"))
    policy.forget(InstanceId("prefill9"))


def test_a_busy_fleet_holds_on_to_the_cached_prefix_for_longer() -> None:
    policy = policy_with(delay_weight=1.0)
    keep_busy(policy)
    assert policy.delay_weight == pytest.approx(1.0)
    end(policy, ask(policy, [prefill(0)]), 1.0)
    rows = [prefill(0, num_reqs=1, queued_tokens=1.1 * RATE), prefill(1)]
    choice = ask(policy, rows, now_s=2.0)
    assert prefill_name(choice) == "prefill-0"
    assert choice.cached_tokens > 0.9 * TOKENS


def test_an_idle_fleet_gives_no_weight_to_those_who_might_come_behind() -> None:
    policy = policy_with()
    keep_busy(policy)
    assert policy.delay_weight == 16.0
    for _ in range(500):
        end(policy, ask(policy, [prefill(0)], shape=RequestShape(100, 10)), 1.0)
    assert policy.delay_weight < 0.01


def test_a_request_may_wait_as_much_longer_for_its_prefix_as_that_saves() -> None:
    policy, rows = policy_with(delay_weight=1.0), [prefill(0), prefill(1)]
    assert not policy.reach_s(SHAPE, rows, 0.0)
    end(policy, ask(policy, rows[:1]), 1.0)
    here, elsewhere = policy.reach_s(SHAPE, rows, 2.0)
    assert here == pytest.approx(0.82, abs=0.02)
    assert elsewhere == 0.0
    keep_busy(policy)
    assert policy.reach_s(SHAPE, rows, 2.0)[0] == pytest.approx(1.64, abs=0.04)


def test_a_prefix_that_is_still_being_computed_counts_where_it_will_be() -> None:
    policy = policy_with(delay_weight=1.0)
    keep_busy(policy)
    first = ask(policy, [prefill(0), prefill(1)])
    again = ask(policy, [prefill(0), prefill(1)])
    assert prefill_name(again) == prefill_name(first)
    assert again.cached_tokens > 0.9 * TOKENS


def test_a_prefix_that_failed_to_be_computed_does_not_count() -> None:
    policy = policy_with()
    end(policy, ask(policy, [prefill(0)]), 1.0, is_whole=False)
    assert ask(policy, [prefill(0)], now_s=2.0).cached_tokens == 0


def test_forgotten_worker_has_no_queue_and_no_prefix() -> None:
    policy = policy_with()
    ask(policy, [prefill(0)])
    policy.forget(InstanceId("prefill0"))
    choice = ask(policy, [prefill(0)])
    assert choice.cached_tokens == 0
    assert "wait 0.000s" in choice.reason


# -- prefill: context-aware time --------------------------------------------------------------------


def served(curve: PrefillCurve, prompts: Sequence[tuple[int, int]], base: float, pair: float) -> None:
    """A worker with a queue all the time that computes (new, past) prompts at these costs per token, pair."""
    queue, now_s = PrefillQueue(curve), 0.0
    legs = [PrefillLeg(1.0, float(new), float(past)) for new, past in prompts]
    for leg in legs:
        queue.send(leg, now_s)
    for leg in legs:
        now_s += base * leg.new + pair * leg.cross
        queue.end(leg, now_s, is_whole=True)


def test_the_context_at_which_attention_costs_as_much_as_the_rest_is_learned_from_own_legs() -> None:
    curve = PrefillCurve()
    prompts = [(1000 + 977 * (index * 7 % 60), 512 * (index % 5)) for index in range(200)]
    served(curve, prompts, base=40e-6, pair=1e-9)
    assert curve.knee_tokens == pytest.approx(40_000, rel=0.01)
    assert curve.work(100_000, 0) / curve.work(1000, 0) > 200


def test_prompts_of_one_length_teach_no_curve() -> None:
    curve = PrefillCurve()
    served(curve, [(4096, 0)] * 200, base=40e-6, pair=1e-9)
    assert curve.knee_tokens == ENDLESS_KNEE


def test_work_is_scaled_so_that_the_fitted_rate_stays_right_for_the_recent_mix() -> None:
    curve = PrefillCurve(knee_tokens=10_000)
    curve.count(PrefillLeg(1.0, 10_000, 0))
    assert curve.work(10_000, 0) / curve.mix == pytest.approx(10_000)


# -- links ------------------------------------------------------------------------------------------


def test_a_link_fit_starts_from_its_prior_and_finds_alpha_and_beta() -> None:
    fit = LinkFit(20.0)
    assert fit.seconds(20 * GIB) == pytest.approx(1.005)
    for index in range(200):
        size = 2.0**24 * (1 + index % 40)
        fit.observe(size, 0.020 + size / (2.0 * GIB))
    assert fit.alpha_s == pytest.approx(0.020, rel=0.05)
    assert 1 / fit.beta_s == pytest.approx(2.0 * GIB, rel=0.05)


def test_a_transfer_is_counted_once_and_for_the_class_it_was_of() -> None:
    links, worker = FittedLinks(), prefill(0)
    links.sent(worker.info, is_same_host=False)
    for _ in range(3):
        for latency_ms in (2000.0, 2500.0):
            load = WorkerLoad(0.0, kv_transfer_latency_ms=latency_ms, kv_transfer_speed_gb_s=0.5)
            links.learn(worker.info.instance_id, load)
            links.learn(worker.info.instance_id, load)
    assert links.other_host.seconds(GIB) > links.same_host.seconds(GIB) * 2
    assert links.same_host.seconds(GIB) == pytest.approx(0.055)


def test_the_near_decode_worker_is_taken_until_its_batch_costs_more_than_the_way() -> None:
    far = decode(1, "two")
    near = ask(policy_with(), [prefill(0)], [decode(0, num_reqs=20), far])
    assert decode_name(near) == "decode-1"
    slow = policy_with()  # 10 MB/s between hosts: 1 GiB of KV takes 100 s
    for index in range(100):
        size = 2.0**24 * (1 + index % 40)
        slow.links.other_host.observe(size, size / (0.01 * GIB))
    near = ask(slow, [prefill(0)], [decode(0, num_reqs=20), far])
    assert decode_name(near) == "decode-0"
    assert near.pair.link_s < 0.2


def test_what_decode_already_holds_need_not_travel() -> None:
    policy, rows = policy_with(), [decode(0), decode(1)]
    for row in rows:
        row.info = msgspec.structs.replace(row.info, keeps_prefixes=True)
    first = ask(policy, [prefill(0)], rows)
    assert first.decode_cached_tokens == 0
    policy.leg_ended(first, Role.PREFILL, is_whole=True, now_s=1.0)
    under_way = ask(policy, [prefill(0)], [first.pair.decode])
    assert under_way.decode_cached_tokens == 0  # it has not arrived
    policy.leg_ended(first, Role.DECODE, is_whole=True, now_s=2.0)
    again = ask(policy, [prefill(0)], [first.pair.decode], now_s=3.0)
    assert again.decode_cached_tokens > 0.9 * TOKENS
    assert again.pair.link_s < first.pair.link_s / 4


def test_a_worker_without_a_prefix_cache_is_credited_with_nothing() -> None:
    policy, rows = policy_with(), [prefill(0)]
    rows[0].info = msgspec.structs.replace(rows[0].info, keeps_prefixes=False)
    end(policy, ask(policy, rows), 1.0)
    again = ask(policy, rows, now_s=2.0)
    assert again.cached_tokens == again.decode_cached_tokens == 0


def test_a_told_link_cost_goes_before_the_fitted_one() -> None:
    candidates = Candidates(
        [prefill(0), prefill(1)],
        [decode(0), decode(1)],
        link_s=lambda p, d, request: 0.0 if p.info.worker_id[-1] == d.info.worker_id[-1] else 9.0,
    )
    candidates.prefills[0].queued_tokens = 5000.0
    assert policy_with().choose(SHAPE, candidates).pair.pair.label == "prefill-1>decode-1"


# -- decode -------------------------------------------------------------------------------------------


def cost_s(
    worker: WorkerView, forecast: Forecast, batch: DecodeBatch | None = None, slo_s: float = 0.0
) -> float:
    shape = RequestShape(1000, 2000, forecast=forecast)
    batches = {worker.info.instance_id: batch} if batch else {}
    return decode_costs_s(shape, [worker], batches, slo_s, MISS_S)[0]


def test_decode_cost_is_the_own_time_and_what_the_others_lose_while_both_are_there() -> None:
    worker = decode(num_reqs=9, step_base_s=0.01, step_slope_s=0.001)
    batch = DecodeBatch()
    for _ in range(9):
        batch.send(Forecast(300.0, 0.0, 600.0))
    own, others = 100 * (0.01 + 0.001 * 10), 9 * 0.001 * 100 * 300 / (100 + 300)
    assert cost_s(worker, Forecast(100.0, 0.0, 200.0), batch) == pytest.approx(own + others)


def test_short_remaining_answers_of_the_others_make_a_worker_cheaper() -> None:
    worker = decode(num_reqs=20)
    short, long = DecodeBatch(), DecodeBatch()
    for _ in range(20):
        short.send(Forecast(10.0, 0.0, 20.0))
        long.send(Forecast(1000.0, 0.0, 2000.0))
    mine = Forecast(500.0, 0.0, 900.0)
    assert cost_s(worker, mine, short) < cost_s(worker, mine, long)
    for _ in range(20):
        long.end(Forecast(1000.0, 0.0, 2000.0))
    assert long.count == long.mean_tokens == 0


def test_a_full_batch_costs_the_wait_for_a_slot() -> None:
    calm = decode(num_reqs=9, max_running_requests=10, step_slope_s=0.0, step_base_s=0.01)
    full = decode(num_reqs=19, max_running_requests=10, step_slope_s=0.0, step_base_s=0.01)
    forecast = Forecast(100.0, 0.0, 100.0)
    assert cost_s(full, forecast) - cost_s(calm, forecast) == pytest.approx(10 / 10 * 100 * 0.01)


def test_a_pool_without_room_for_the_prompt_costs_the_wait_for_it() -> None:
    roomy = decode(num_reqs=10, kv_tokens=50_000, kv_capacity=100_000)
    packed = decode(num_reqs=10, kv_tokens=94_000, kv_capacity=100_000)
    forecast = Forecast(100.0, 0.0, 100.0)
    assert cost_s(packed, forecast) > cost_s(roomy, forecast) + 0.5


def test_growth_to_the_forecasts_high_end_counts_as_use_of_the_pool() -> None:
    worker = decode(num_reqs=10, kv_tokens=70_000, kv_capacity=100_000)
    sure, unsure = Forecast(500.0, 400.0, 600.0), Forecast(500.0, 0.0, 28_000.0)
    assert cost_s(worker, unsure) > cost_s(worker, sure) + 1.0


def test_without_a_forecast_the_limit_counts_up_to_the_mean_of_a_conversation() -> None:
    short = decode_costs_s(RequestShape(1000, 10), [decode()], {}, 0.0, MISS_S)[0]
    long = decode_costs_s(RequestShape(1000, 100_000), [decode()], {}, 0.0, MISS_S)[0]
    mean = decode_costs_s(RequestShape(1000, 343), [decode()], {}, 0.0, MISS_S)[0]
    assert short < long == mean


# -- objectives -------------------------------------------------------------------------------------------


def test_a_decode_worker_over_the_tpot_objective_is_left_for_one_with_room() -> None:
    slow = decode(0, num_reqs=50, step_base_s=0.01, step_slope_s=0.001)
    roomy = decode(1, num_reqs=90, step_base_s=0.02, step_slope_s=0.0001)
    calm = decode(2, num_reqs=20, step_base_s=0.03, step_slope_s=0.001)
    assert decode_name(ask(policy_with(), [prefill()], [slow, roomy, calm])) == "decode-1"
    kept = policy_with(slo_tpot_s=0.055)
    assert decode_name(ask(kept, [prefill()], [slow, calm])) == "decode-2"


def test_a_prefix_is_not_followed_into_a_missed_ttft() -> None:
    for slo_s, expected in ((0.0, "prefill-0"), (1.0, "prefill-1")):
        policy = policy_with(slo_ttft_s=slo_s, delay_weight=1.0)
        keep_busy(policy)
        end(policy, ask(policy, [prefill(0)]), 1.0)
        rows = [prefill(0, num_reqs=1, queued_tokens=1.1 * RATE), prefill(1)]
        assert prefill_name(ask(policy, rows, now_s=2.0)) == expected


# -- choice ---------------------------------------------------------------------------------------------


def test_an_idle_fleet_takes_turns() -> None:
    policy = policy_with()
    rows = [prefill(index, last_turn=3 - index) for index in range(3)]
    columns = [decode(index, last_turn=3 - index) for index in range(3)]
    assert ask(policy, rows, columns).pair.pair.label == "prefill-2>decode-2"


def test_holes_in_the_grid_are_respected_also_where_the_cheapest_workers_are_no_pair() -> None:
    rows = [prefill(0), prefill(1, num_reqs=1, queued_tokens=50_000.0)]
    columns = [decode(0, num_reqs=90), decode(1)]
    candidates = Candidates.of([PairView(rows[0], columns[0]), PairView(rows[1], columns[1])])
    label = policy_with().choose(SHAPE, candidates).pair.pair.label
    assert label in {"prefill-0>decode-0", "prefill-1>decode-1"}


def test_reason_tells_every_term() -> None:
    reason = ask(policy_with(), [prefill(0)]).reason
    assert reason.startswith("pair_cost prefill-0 wait 0.000s + work 0.819s (0 of 8192 tokens cached), link ")
    assert "decode-0" in reason and "100 tokens expected" in reason
