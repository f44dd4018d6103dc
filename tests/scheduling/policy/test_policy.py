"""Policies: pure choices over hand-made views."""

from __future__ import annotations

import random
import time
from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdserve.config.balancer import BalancerConfig
from pdserve.errors import ConfigError
from pdserve.scheduling.policy import POLICIES, Candidates, PairView, WorkerView, make_policy, policy_of
from pdserve.scheduling.policy.score import decode_cost_s, headroom_s, prefill_cost_s
from pdserve.types import InstanceId, RequestShape, Role, WorkerId, WorkerInfo

SHAPE = RequestShape(prompt_tokens=1000, max_new_tokens=100)


def view(role: Role, index: int, **fields: object) -> WorkerView:
    info = WorkerInfo(
        worker_id=WorkerId(f"{role}-{index}"),
        instance_id=InstanceId(f"{role}{index}"),
        role=role,
        url=f"http://{role}-{index}",
        model="m",
    )
    return replace(WorkerView(info), **fields)  # type: ignore[arg-type]


def prefill(index: int = 0, **fields: object) -> WorkerView:
    return view(Role.PREFILL, index, **fields)


def decode(index: int = 0, **fields: object) -> WorkerView:
    return view(Role.DECODE, index, **fields)


def chosen(policy_name: str, candidates: Candidates) -> tuple[str, str]:
    pair = make_policy(policy_name, seed=1).choose(SHAPE, candidates).pair
    return pair.prefill.info.worker_id, pair.decode.info.worker_id


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [("bucket", "least_load"), ("manual", "cache_aware"), ("consistent_hashing", "cache_aware")],
)
def test_policy_of_the_other_routers_is_refused_with_the_nearest_of_ours(theirs: str, ours: str) -> None:
    with pytest.raises(ConfigError, match=f"the nearest to '{theirs}' is '{ours}'"):
        policy_of(BalancerConfig(prefill_policy=theirs))


def test_policy_of_is_one_policy_for_both_legs_unless_they_differ() -> None:
    assert policy_of(BalancerConfig()).name == "pair_cost"
    assert policy_of(BalancerConfig(policy="random", decode_policy="random")).name == "random"
    assert policy_of(BalancerConfig(prefill_policy="cache_aware")).name == "cache_aware/pair_cost"
    assert (
        policy_of(BalancerConfig(policy="random", decode_policy="round_robin")).name == "random/round_robin"
    )


def test_policies_that_ignore_the_prompt_say_so() -> None:
    assert not policy_of(BalancerConfig(policy="round_robin")).needs_prompt
    assert policy_of(BalancerConfig(policy="cache_aware")).needs_prompt
    assert policy_of(BalancerConfig(policy="random", prefill_policy="cache_aware")).needs_prompt


def test_split_policy_lets_each_leg_choose_its_own_way() -> None:
    candidates = Candidates(
        [prefill(0, last_turn=5, queued_tokens=0), prefill(1, last_turn=3, queued_tokens=9000)],
        [decode(0, last_turn=4, num_reqs=90), decode(1, last_turn=6)],
    )
    policy = policy_of(BalancerConfig(prefill_policy="round_robin", decode_policy="least_load"))
    choice = policy.choose(SHAPE, candidates)
    assert choice.pair.pair.label == "prefill-1>decode-1"
    assert choice.reason.startswith("round_robin prefill-1: longest unused; least_load decode-1: ")


@pytest.mark.slow
@given(data=st.data())
@pytest.mark.parametrize("decode_policy", POLICIES)
@pytest.mark.parametrize("prefill_policy", POLICIES)
def test_split_policy_stays_on_the_allowed_grid(
    prefill_policy: str, decode_policy: str, data: st.DataObject
) -> None:
    grid = [(p, d) for p in range(3) for d in range(3)]
    kept = data.draw(st.lists(st.sampled_from(grid), min_size=1, unique=True))
    rows = [prefill(i, queued_tokens=i * 100) for i in range(3)]
    columns = [decode(i, num_reqs=data.draw(st.integers(0, 9))) for i in range(3)]
    candidates = Candidates.of(PairView(rows[p], columns[d]) for p, d in kept)
    policy = policy_of(BalancerConfig(prefill_policy=prefill_policy, decode_policy=decode_policy), seed=1)
    shape = RequestShape(1000, 100, prompt=b"x" * 4000)
    for _ in range(3):
        label = policy.choose(shape, candidates).pair.pair.label
        assert label in {candidate.pair.label for candidate in candidates}


def test_unknown_policy_lists_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="unknown policy 'best'; known: pair_cost, least_load, cache_aware"):
        make_policy("best")


def test_prefill_cost_is_tokens_ahead_plus_prompt_over_rate() -> None:
    assert prefill_cost_s(prefill(queued_tokens=3000, prefill_tokens_s=2000), SHAPE) == pytest.approx(2.0)


def test_decode_cost_is_the_own_time_in_the_grown_batch_and_what_the_others_lose() -> None:
    worker = decode(num_reqs=9, step_base_s=0.01, step_slope_s=0.001)
    assert decode_cost_s(worker, SHAPE) == pytest.approx(100 * 0.02 + 9 * 100 * 0.001)


def test_decode_cost_adds_the_wait_for_a_slot() -> None:
    worker = decode(num_reqs=19, max_running_requests=10, step_base_s=0.01, step_slope_s=0.0)
    assert decode_cost_s(worker, SHAPE) == pytest.approx(1.0 + 10 * 1.0 / 10)


def test_headroom_penalty_grows_without_end_near_a_full_pool() -> None:
    assert headroom_s(decode(kv_tokens=0, kv_capacity=2000), 1000) == pytest.approx(0.15)
    assert headroom_s(decode(kv_tokens=1900, kv_capacity=2000), 1000) > 10
    assert headroom_s(decode(kv_tokens=1900, kv_capacity=0), 1000) == 0


def test_least_load_takes_the_shorter_queue_on_each_leg() -> None:
    candidates = Candidates(
        [prefill(0, queued_tokens=9000), prefill(1, queued_tokens=100)],
        [decode(0, num_reqs=2), decode(1, num_reqs=200)],
    )
    assert chosen("least_load", candidates) == ("prefill-1", "decode-0")


def test_least_load_prefers_a_fast_worker_with_a_longer_queue() -> None:
    candidates = Candidates(
        [prefill(0, queued_tokens=5000, prefill_tokens_s=10_000), prefill(1, prefill_tokens_s=500)],
        [decode()],
    )
    assert chosen("least_load", candidates)[0] == "prefill-0"


def test_least_load_avoids_a_nearly_full_pool() -> None:
    candidates = Candidates(
        [prefill()],
        [decode(0, kv_tokens=98_000, kv_capacity=100_000), decode(1, num_reqs=3, kv_capacity=100_000)],
    )
    assert chosen("least_load", candidates)[1] == "decode-1"


def test_least_load_breaks_ties_by_inflight_then_by_longest_unused() -> None:
    rows = [prefill(0, inflight=1), prefill(1, last_turn=7), prefill(2, last_turn=3)]
    assert chosen("least_load", Candidates(rows, [decode()]))[0] == "prefill-2"


def test_least_load_names_its_reason() -> None:
    choice = make_policy("least_load").choose(SHAPE, Candidates([prefill(queued_tokens=50)], [decode()]))
    assert choice.reason.startswith("least_load prefill-0 0.105s (50 tokens ahead) decode-0 ")


def test_least_load_on_a_grid_with_holes_takes_the_best_allowed_pair() -> None:
    idle_p, busy_p = prefill(0), prefill(1, queued_tokens=10_000)
    idle_d, busy_d = decode(0), decode(1, num_reqs=1000)
    candidates = Candidates.of([PairView(idle_p, busy_d), PairView(busy_p, idle_d)])
    assert candidates.allowed == [(0, 0), (1, 1)]
    assert chosen("least_load", candidates) == ("prefill-1", "decode-0")


def test_round_robin_takes_the_longest_unused_of_each_row() -> None:
    candidates = Candidates(
        [prefill(0, last_turn=5), prefill(1, last_turn=3)], [decode(0, last_turn=4), decode(1, last_turn=6)]
    )
    assert chosen("round_robin", candidates) == ("prefill-1", "decode-0")


def test_random_reaches_every_pair_about_equally_and_repeats_with_its_seed() -> None:
    candidates = Candidates([prefill(0), prefill(1)], [decode(0), decode(1)])

    def draw(seed: int) -> list[str]:
        policy = make_policy("random", seed)
        return [policy.choose(SHAPE, candidates).pair.pair.label for _ in range(400)]

    counts = Counter(draw(3))
    assert len(counts) == 4
    assert min(counts.values()) > 60
    assert draw(3) == draw(3)


def test_power_of_two_never_takes_the_worst_of_three() -> None:
    rows = [prefill(0), prefill(1, queued_tokens=100_000), prefill(2)]
    policy = make_policy("power_of_two", seed=5)
    picks = {
        policy.choose(SHAPE, Candidates(rows, [decode()])).pair.prefill.info.worker_id for _ in range(99)
    }
    assert picks == {"prefill-0", "prefill-2"}


@pytest.mark.parametrize("name", POLICIES)
@given(data=st.data())
def test_every_policy_picks_an_allowed_pair(name: str, data: st.DataObject) -> None:
    num_p, num_d = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 4))
    load = st.integers(0, 100_000)
    rows = [prefill(i, queued_tokens=data.draw(load), last_turn=i) for i in range(num_p)]
    columns = [decode(i, num_reqs=data.draw(load), last_turn=i) for i in range(num_d)]
    grid = [(p, d) for p in range(num_p) for d in range(num_d)]
    kept = data.draw(st.lists(st.sampled_from(grid), min_size=1, unique=True))
    candidates = Candidates.of(PairView(rows[p], columns[d]) for p, d in kept)
    allowed = {candidate.pair.label for candidate in candidates}
    assert len(candidates) == len(kept) == len(allowed)
    assert make_policy(name, seed=0).choose(SHAPE, candidates).pair.pair.label in allowed


@given(
    st.lists(st.integers(0, 10**6), min_size=1, max_size=8),
    st.lists(st.integers(0, 500), min_size=1, max_size=8),
)
def test_least_load_on_a_whole_grid_is_within_the_tie_margin_of_the_joint_optimum(
    queued: list[int], reqs: list[int]
) -> None:
    candidates = Candidates(
        [prefill(i, queued_tokens=tokens) for i, tokens in enumerate(queued)],
        [decode(i, num_reqs=n) for i, n in enumerate(reqs)],
    )

    def cost(pair: PairView) -> float:
        return prefill_cost_s(pair.prefill, SHAPE) + decode_cost_s(pair.decode, SHAPE)

    picked = make_policy("least_load").choose(SHAPE, candidates).pair
    assert cost(picked) <= min(map(cost, candidates)) * 1.05 + 0.002


def test_least_load_decides_fast_on_an_eight_by_eight_grid() -> None:
    rng = random.Random(0)
    candidates = Candidates(
        [prefill(i, queued_tokens=rng.randrange(10_000), kv_capacity=10**6) for i in range(8)],
        [decode(i, num_reqs=rng.randrange(100), kv_capacity=10**6) for i in range(8)],
    )
    policy = make_policy("least_load")
    best_s = min(_timed(lambda: policy.choose(SHAPE, candidates)) for _ in range(200))
    assert best_s < 200e-6  # about 20 µs on an idle machine; ten times that is a broken algorithm


def _timed(call: object) -> float:
    started_s = time.perf_counter()
    call()  # type: ignore[operator]
    return time.perf_counter() - started_s
