"""least_load beyond plain loads: what is cached, how far the KV travels, what it remembers."""

from __future__ import annotations

import random

from pdserve.scheduling.load import LoadTable
from pdserve.scheduling.policy import Candidates, Choice, LinkCost, PairView, WorkerView, make_policy
from pdserve.scheduling.policy.least_load import LeastLoad
from pdserve.scheduling.policy.score import REQUEST_TOKENS
from pdserve.scheduling.prefix.tree import BYTES_PER_TOKEN
from pdserve.types import InstanceId, RequestShape
from tests.scheduling.policy.test_policy import decode, prefill

TOKENS = 4000


def shape(seed: int, *, tail_bytes: int = 0) -> RequestShape:
    """A prompt of TOKENS tokens, and a tail that no other has."""
    prompt = random.Random(seed).randbytes(TOKENS * BYTES_PER_TOKEN)
    tail = random.Random().randbytes(tail_bytes)
    return RequestShape(TOKENS + tail_bytes // BYTES_PER_TOKEN, 100, prompt + tail)


def choose(policy: LeastLoad, request: RequestShape, rows: list[WorkerView]) -> Choice:
    return policy.choose(request, Candidates(rows, [decode()]))


def idle() -> list[WorkerView]:
    return [prefill(0, prefill_tokens_s=1000), prefill(1, prefill_tokens_s=1000, last_turn=9)]


def test_prompt_that_was_there_before_goes_there_again_unless_the_queue_outweighs_it() -> None:
    policy = LeastLoad()
    rows = idle()
    assert choose(policy, shape(1), rows).pair.prefill is rows[0]
    rows[0].queued_tokens, rows[0].last_turn = TOKENS // 2, 10
    again = choose(policy, shape(1, tail_bytes=400), rows)
    assert again.pair.prefill is rows[0], "half a prompt in the queue, but a whole one saved"
    assert TOKENS * 0.95 < again.cached_tokens <= TOKENS
    rows[0].queued_tokens = 2 * TOKENS
    assert choose(policy, shape(1), rows).pair.prefill is rows[1]


def test_unknown_and_short_prompts_are_not_credited() -> None:
    policy = LeastLoad()
    assert choose(policy, shape(1), idle()).cached_tokens == 0
    assert choose(policy, shape(2), idle()).cached_tokens == 0
    for _ in range(2):
        assert choose(policy, RequestShape(30, 100, b"hello" * 20), idle()).cached_tokens == 0
        assert choose(policy, RequestShape(TOKENS, 100), idle()).cached_tokens == 0


def test_wholly_cached_prompts_still_count_for_something_and_spill_over_in_a_burst() -> None:
    table, policy = LoadTable(), LeastLoad()
    for view in (*idle(), decode()):
        table.add(view.info)
    rows = [table.view(InstanceId(f"prefill{index}")) for index in range(2)]
    picks = []
    for turn in range(200):
        choice = choose(policy, shape(1), rows)
        assert choice.cached_tokens <= TOKENS - REQUEST_TOKENS
        info = choice.pair.prefill.info
        picks.append(info.worker_id)
        table.dispatch(info.instance_id, TOKENS, float(turn), choice.cached_tokens)
    assert 60 <= picks.count(picks[0]) <= 140


def test_no_more_is_remembered_of_a_worker_than_its_pool_holds() -> None:
    policy = LeastLoad()
    rows = [prefill(index, kv_capacity=3 * TOKENS) for index in range(2)]
    rows[1].queued_tokens = 10**9
    for seed in range(6):
        choose(policy, shape(seed), rows)
    assert choose(policy, shape(5), rows).cached_tokens > 0
    assert choose(policy, shape(0), rows).cached_tokens == 0


def test_forgotten_worker_is_credited_with_nothing() -> None:
    policy = LeastLoad()
    rows = idle()
    choose(policy, shape(1), rows)
    policy.forget(rows[0].info.instance_id)
    assert choose(policy, shape(1), rows).cached_tokens == 0


def linked(cost_s: LinkCost) -> Candidates:
    return Candidates([prefill(0), prefill(1)], [decode(0), decode(1)], link_s=cost_s)


def test_links_couple_the_two_legs() -> None:
    def same_number_is_near(p: WorkerView, d: WorkerView, request: RequestShape) -> float:
        return 0.001 if p.info.worker_id[-1] == d.info.worker_id[-1] else request.prompt_tokens / 1000

    candidates = linked(same_number_is_near)
    candidates.prefills[0].queued_tokens = 500
    choice = make_policy("least_load").choose(RequestShape(1000, 10), candidates)
    assert choice.pair.pair.label == "prefill-1>decode-1"
    assert choice.pair.link_s == 0.001
    candidates.decodes[1].num_reqs = 5000
    choice = make_policy("least_load").choose(RequestShape(1000, 10), candidates)
    assert choice.pair.pair.label == "prefill-0>decode-0"
    assert choice.reason.endswith("link 0.001s")


def test_links_alike_leave_the_best_of_each_row() -> None:
    candidates = linked(lambda p, d, request: 0.5)
    candidates.prefills[0].queued_tokens = candidates.decodes[1].num_reqs = 5000
    assert (
        make_policy("least_load").choose(RequestShape(9, 9), candidates).pair.pair.label
        == "prefill-1>decode-0"
    )


def test_links_respect_the_holes_of_the_grid() -> None:
    near = PairView(prefill(0), decode(0))
    far = PairView(prefill(1), decode(1))
    holes = Candidates.of([near, far])
    candidates = Candidates(
        holes.prefills, holes.decodes, holes.allowed, lambda p, d, request: float(p is near.prefill)
    )
    assert (
        make_policy("least_load").choose(RequestShape(9, 9), candidates).pair.pair.label
        == "prefill-1>decode-1"
    )


def test_reason_keeps_the_numbers_of_its_time() -> None:
    rows = idle()
    choice = choose(LeastLoad(), RequestShape(100, 10), rows)
    rows[0].queued_tokens = 10**6
    assert "least_load prefill-0 0.100s (0 tokens ahead) decode-0" in str(choice.why)
    assert choice.reason == str(choice.why)
