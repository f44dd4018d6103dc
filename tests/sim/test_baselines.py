"""Other systems' policies choose as they are published to, and only simulations offer them."""

from __future__ import annotations

from dataclasses import replace

import pytest

from pdserve.config.balancer import BalancerConfig
from pdserve.errors import ConfigError
from pdserve.scheduling.policy import (
    Candidates,
    Choice,
    LegPolicy,
    Policy,
    PolicyParams,
    WorkerView,
    policy_of,
)
from pdserve.sim.baselines import BASELINES
from pdserve.types import InstanceId, RequestShape, Role, WorkerId, WorkerInfo, WorkerLoad

TEXT = b"".join(b"%08d" % index for index in range(4096))
SHAPE = RequestShape(8192, 100, prompt=TEXT)


def view(role: Role, index: int, **fields: object) -> WorkerView:
    info = WorkerInfo(
        worker_id=WorkerId(f"{role}-{index}"),
        instance_id=InstanceId(f"{role}{index}"),
        role=role,
        url=f"http://{role}-{index}",
        model="m",
    )
    return replace(WorkerView(info), **fields)  # type: ignore[arg-type]


def prefill(index: int, **fields: object) -> WorkerView:
    return view(Role.PREFILL, index, **fields)


def decode(index: int, **fields: object) -> WorkerView:
    return view(Role.DECODE, index, **fields)


def ask(policy: Policy, prefills: list[WorkerView], decodes: list[WorkerView], now_s: float = 0.0) -> Choice:
    candidates = Candidates(prefills, decodes)
    candidates.now_s = now_s
    return policy.choose(SHAPE, candidates)


def make(name: str, seed: int | None = None) -> LegPolicy:
    return BASELINES[name](seed, PolicyParams())


def label(name: str, prefills: list[WorkerView], decodes: list[WorkerView]) -> str:
    return ask(make(name, seed=1), prefills, decodes).pair.pair.label


def compute_on(policy: Policy, worker: WorkerView) -> None:
    choice = ask(policy, [worker], [decode(0)])
    policy.leg_ended(choice, Role.PREFILL, is_whole=True, now_s=1.0)
    policy.leg_ended(choice, Role.DECODE, is_whole=True, now_s=1.0)


def test_router_power_of_two_counts_requests_and_not_tokens() -> None:
    rows = [prefill(0, inflight=3, queued_tokens=1.0), prefill(1, inflight=2, queued_tokens=1e6)]
    assert label("router_power_of_two", rows, [decode(0, inflight=1), decode(1)]) == "prefill-1>decode-1"


def test_smg_least_load_is_queued_tokens_over_throughput_plus_headroom() -> None:
    rows = [
        prefill(0, queued_tokens=1000.0, prefill_tokens_s=1000.0),
        prefill(1, queued_tokens=1500.0, prefill_tokens_s=2000.0),
    ]
    crowded = decode(0, kv_tokens=95, kv_capacity=100)
    queued = decode(1, queued_tokens=100.0, load=WorkerLoad(0.0, gen_throughput=1000.0))
    choice = ask(make("smg_least_load"), rows, [crowded, queued])
    assert choice.pair.pair.label == "prefill-1>decode-1"
    assert "0.750s (1500 tokens queued)" in choice.reason
    assert "0.100s (100 tokens queued)" in choice.reason


def test_dynamo_credits_the_overlap_on_prefill_only() -> None:
    policy = make("dynamo_kv", seed=1)
    compute_on(policy, prefill(0))
    rows = [prefill(0, queued_tokens=8000.0), prefill(1)]
    choice = ask(policy, rows, [decode(0, kv_tokens=5000), decode(1, kv_tokens=4000)], 2.0)
    assert choice.pair.pair.label == "prefill-0>decode-1"
    assert choice.cached_tokens > 8000
    rows[0].queued_tokens = 9000.0
    assert ask(policy, rows, [decode(0)], 2.0).pair.pair.label == "prefill-1>decode-0"


def test_dynamo_adds_the_kv_in_use_to_the_prefill_queue() -> None:
    rows = [prefill(0, kv_tokens=10_000), prefill(1, queued_tokens=9_000.0)]
    assert label("dynamo_kv", rows, [decode(0)]) == "prefill-1>decode-0"


def test_dynamo_does_not_credit_a_prefix_that_has_not_arrived() -> None:
    policy = make("dynamo_kv", seed=1)
    ask(policy, [prefill(0)], [decode(0)])
    assert ask(policy, [prefill(0)], [decode(0)]).cached_tokens == 0


def test_aibrix_weighs_match_percent_against_the_share_of_requests() -> None:
    policy = make("aibrix")
    compute_on(policy, prefill(0))
    rows = [prefill(0, num_reqs=16), prefill(1, num_reqs=1)]
    assert ask(policy, rows, [decode(0)], 2.0).pair.pair.label == "prefill-0>decode-0"
    rows[0].num_reqs = 18  # the fullest has over 16 more: the emptiest at once
    assert ask(policy, rows, [decode(0)], 2.0).pair.pair.label == "prefill-1>decode-0"


def test_aibrix_decode_score_divides_by_what_is_free() -> None:
    fast = WorkerLoad(0.0, gen_throughput=1000.0)
    packed = decode(0, num_reqs=4, kv_tokens=90, kv_capacity=100, load=fast)
    roomy = decode(1, num_reqs=5, kv_tokens=10, kv_capacity=100, load=fast)
    assert label("aibrix", [prefill(0)], [packed, roomy]) == "prefill-0>decode-1"
    slow = decode(2, num_reqs=5, kv_tokens=10, kv_capacity=100, load=WorkerLoad(0.0, gen_throughput=100.0))
    assert label("aibrix", [prefill(0)], [slow, roomy]) == "prefill-0>decode-1"


@pytest.mark.parametrize("name", ["dynamo_kv", "aibrix"])
def test_a_forgotten_worker_holds_no_prefix(name: str) -> None:
    policy = make(name, seed=1)
    compute_on(policy, prefill(0))
    policy.forget(InstanceId("prefill0"))
    assert ask(policy, [prefill(0)], [decode(0)], 2.0).cached_tokens == 0


def test_a_balancer_does_not_offer_them() -> None:
    for name in BASELINES:
        with pytest.raises(ConfigError, match=r"known: pair_cost, .*, random$"):
            policy_of(BalancerConfig(policy=name))
