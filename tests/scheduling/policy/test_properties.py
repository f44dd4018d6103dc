"""What must hold of every policy, whatever the views."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pdserve.scheduling.policy import Candidates, PairCost, PairView, WorkerView, make_policy
from pdserve.scheduling.policy.pair_search import PairSearch
from pdserve.sim.baselines import SIMULATED_MAKERS
from pdserve.types import Forecast, InstanceId, RequestShape, Role, WorkerId, WorkerInfo, WorkerLoad
from tests.support.examples import n_examples

COUNTS = st.integers(0, 10**6) | st.sampled_from([0, 1, 10**12])
SECONDS = st.floats(0.0, 100.0)

shapes = st.builds(
    RequestShape,
    prompt_tokens=st.integers(0, 200_000),
    max_new_tokens=st.integers(0, 10**6),
    prompt=st.sampled_from([b"", b"x", b"y" * 300, b"z" * 40_000]),
    num_prompts=st.integers(1, 8),
    forecast=st.none() | st.builds(Forecast, mean=SECONDS, low=SECONDS, high=SECONDS),
)

loads = st.none() | st.builds(
    WorkerLoad,
    timestamp_s=SECONDS,
    gen_throughput=st.floats(0.0, 1e5),
    kv_transfer_latency_ms=st.floats(0.0, 1e5),
    kv_transfer_speed_gb_s=st.floats(0.0, 1e3),
)


def info_of(role: Role, index: int, host: str) -> WorkerInfo:
    return WorkerInfo(
        worker_id=WorkerId(f"{role}-{index}"),
        instance_id=InstanceId(f"{role}{index}"),
        role=role,
        url=f"http://{host}:{index}",
        model="m",
    )


@st.composite
def views(draw: st.DrawFn, role: Role, index: int) -> WorkerView:
    return WorkerView(
        info_of(role, index, draw(st.sampled_from(["a", "b"]))),
        load=draw(loads),
        inflight=draw(st.integers(0, 300)),
        queued_tokens=float(draw(COUNTS)),
        num_reqs=draw(st.integers(0, 10_000)),
        kv_tokens=draw(COUNTS),
        kv_capacity=draw(st.sampled_from([0, 1, 1000, 10**6])),
        max_running_requests=draw(st.sampled_from([0, 1, 256])),
        prefill_tokens_s=draw(st.floats(1.0, 1e6)),
        step_base_s=draw(st.floats(0.0, 1.0)),
        step_slope_s=draw(st.floats(0.0, 0.1)),
        last_turn=draw(st.integers(0, 100)),
    )


@st.composite
def grids(draw: st.DrawFn) -> Candidates:
    num_p, num_d = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    rows = [draw(views(Role.PREFILL, index)) for index in range(num_p)]
    columns = [draw(views(Role.DECODE, index)) for index in range(num_d)]
    every = [(p, d) for p in range(num_p) for d in range(num_d)]
    kept = draw(st.just(every) | st.lists(st.sampled_from(every), min_size=1, unique=True))
    candidates = Candidates.of(PairView(rows[p], columns[d]) for p, d in sorted(kept))
    candidates.now_s = draw(SECONDS)
    return candidates


@pytest.mark.parametrize("name", SIMULATED_MAKERS)
@settings(max_examples=n_examples(60))
@given(candidates=grids(), requests=st.lists(shapes, min_size=1, max_size=4))
def test_every_policy_picks_an_allowed_pair_and_the_same_one_again_under_its_seed(
    name: str, candidates: Candidates, requests: list[RequestShape]
) -> None:
    labels = {pair.pair.label for pair in candidates}
    runs = []
    for _ in range(2):
        policy = make_policy(name, seed=3, makers=SIMULATED_MAKERS)
        choices = [policy.choose(request, candidates) for request in requests]
        assert all(0 <= c.cached_tokens <= r.prompt_tokens for c, r in zip(choices, requests, strict=True))
        for turn, choice in enumerate(choices):
            for role in Role:
                policy.leg_ended(choice, role, is_whole=turn % 2 == 0, now_s=candidates.now_s + turn)
        choices.append(policy.choose(requests[0], candidates))
        policy.forget(choices[0].pair.prefill.info.instance_id)
        runs.append([choice.pair.pair.label for choice in choices])
        assert all(choice.reason for choice in choices)
    assert runs[0] == runs[1]
    assert set(runs[0]) <= labels


costs = st.lists(st.floats(0.0, 50.0), min_size=1, max_size=7)


@settings(max_examples=n_examples(300))
@given(prefill_s=costs, decode_s=costs, data=st.data())
def test_best_first_finds_what_looking_at_every_pair_finds(
    prefill_s: list[float], decode_s: list[float], data: st.DataObject
) -> None:
    every = [(p, d) for p in range(len(prefill_s)) for d in range(len(decode_s))]
    extras = {at: data.draw(st.floats(0.0, 20.0)) for at in every}
    allowed = data.draw(st.none() | st.lists(st.sampled_from(every), min_size=1, unique=True))
    rows = [WorkerView(info_of(Role.PREFILL, index, "a")) for index in range(len(prefill_s))]
    columns = [WorkerView(info_of(Role.DECODE, index, "a")) for index in range(len(decode_s))]
    candidates = Candidates(rows, columns, None if allowed is None else sorted(allowed))

    def total(at: tuple[int, int]) -> float:
        return prefill_s[at[0]] + decode_s[at[1]] + extras[at]

    looked: list[tuple[int, int]] = []

    def extra(p: int, d: int) -> float:
        looked.append((p, d))
        return extras[p, d]

    found = PairSearch().least(prefill_s, decode_s, candidates, extra)
    assert found in candidates.indices()
    assert total(found) == pytest.approx(min(total(at) for at in candidates.indices()))
    assert len(looked) == len(set(looked))
    tied = PairSearch().choose(prefill_s, decode_s, candidates, lambda p, d: extras[p, d])
    assert tied in candidates.indices()
    assert total(tied) <= total(found) * 1.02 + 0.0031


def lone(policy: PairCost, request: RequestShape, prefill: WorkerView, decode: WorkerView) -> str:
    """Is this worker taken, or its calm neighbour?"""
    rows = [prefill, WorkerView(info_of(Role.PREFILL, 9, "a"), queued_tokens=20_000, kv_capacity=10**6)]
    columns = [decode, WorkerView(info_of(Role.DECODE, 9, "a"), num_reqs=20, kv_capacity=10**6)]
    return policy.choose(request, Candidates(rows, columns)).pair.pair.label


@settings(max_examples=n_examples(150))
@given(
    request=shapes,
    prefill=views(Role.PREFILL, 0),
    decode=views(Role.DECODE, 0),
    more=st.integers(1, 100_000),
    slo_s=st.sampled_from([0.0, 0.05, 2.0]),
)
def test_more_queue_or_less_room_never_makes_a_worker_more_attractive(
    request: RequestShape, prefill: WorkerView, decode: WorkerView, more: int, slo_s: float
) -> None:
    from pdserve.scheduling.policy import PairCostParams

    params = PairCostParams(slo_tpot_s=slo_s)
    before = lone(PairCost(params), request, prefill, decode)
    worse_p = replace(prefill, queued_tokens=prefill.queued_tokens + more)
    worse_d = replace(
        decode, num_reqs=decode.num_reqs + more % 100, kv_tokens=decode.kv_tokens + more, inflight=9
    )
    after = lone(PairCost(params), request, worse_p, worse_d)
    for role in ("prefill", "decode"):
        assert f"{role}-0" in before or f"{role}-0" not in after
