"""cache_aware and the prefix memory under it: published behaviour, bounds, forgetting."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdserve.scheduling.policy import CacheParams, Candidates, PolicyParams, make_policy
from pdserve.scheduling.policy.cache_aware import BLOCK_BYTES, CacheAware
from pdserve.scheduling.prefix.blocks import (
    MIN_CHARGE_BYTES,
    SPARE_TREES,
    PrefixForest,
    PrefixMemory,
    block_ends,
    prefix_hashes,
)
from pdserve.types import InstanceId, RequestShape
from tests.scheduling.policy.test_policy import decode, prefill

ENDS = block_ends(BLOCK_BYTES)


def text(seed: int, nbytes: int) -> bytes:
    return random.Random(seed).randbytes(nbytes)


def shape(prompt: bytes) -> RequestShape:
    return RequestShape(prompt_tokens=len(prompt) // 4, max_new_tokens=16, prompt=prompt)


def picked(policy: CacheAware, prompt: bytes, *inflight: int) -> str:
    """The prefill worker chosen while these numbers of requests are in flight."""
    rows = [prefill(index, inflight=count, last_turn=index) for index, count in enumerate(inflight)]
    return policy.choose(shape(prompt), Candidates(rows, [decode()])).pair.prefill.info.worker_id


# -- the policy --------------------------------------------------------------------------------


def test_known_prefix_is_followed_although_another_worker_has_less_to_do() -> None:
    policy = CacheAware()
    assert picked(policy, text(1, 4000), 0, 0) == "prefill-0"
    assert picked(policy, text(1, 4000) + text(2, 1000), 60, 0) == "prefill-0"


def test_unknown_prompt_goes_to_the_least_loaded_then_to_the_smallest_tree() -> None:
    policy = CacheAware()
    assert picked(policy, text(1, 500), 3, 2) == "prefill-1"
    assert picked(policy, text(2, 500), 0, 0) == "prefill-0", "prefill-1 already remembers a prompt"
    assert picked(policy, text(3, 9000), 0, 0, 0) == "prefill-2"


@pytest.mark.parametrize(("known", "expected"), [(2000, "prefill-1"), (4000, "prefill-0")])
def test_match_must_exceed_the_threshold_share_of_the_prompt(known: int, expected: str) -> None:
    policy = CacheAware(CacheParams(cache_threshold=0.3))
    assert picked(policy, text(1, known), 0, 0) == "prefill-0"
    assert picked(policy, text(1, known) + text(2, 10_000 - known), 5, 1) == expected


@pytest.mark.parametrize(
    ("inflight", "expected"),
    [((70, 5), "prefill-1"), ((60, 0), "prefill-0"), ((265, 200), "prefill-0"), ((301, 200), "prefill-1")],
)
def test_uneven_queues_beyond_both_thresholds_override_the_cache(
    inflight: tuple[int, int], expected: str
) -> None:
    policy = CacheAware(CacheParams(balance_abs_threshold=64, balance_rel_threshold=1.5))
    assert picked(policy, text(1, 4000), 0, 0) == "prefill-0"
    assert picked(policy, text(1, 4000), *inflight) == expected


def test_prompt_sent_elsewhere_by_load_is_remembered_there_too() -> None:
    policy = CacheAware(CacheParams(balance_abs_threshold=4))
    assert picked(policy, text(1, 4000), 0, 0) == "prefill-0"
    assert picked(policy, text(1, 4000), 9, 0) == "prefill-1"
    assert picked(policy, text(1, 4000), 2, 1) == "prefill-1", "both have it: the less loaded one"


def test_short_prompts_are_told_apart_and_recognised() -> None:
    policy = CacheAware()
    assert picked(policy, b"hello", 0, 1) == "prefill-0"
    assert picked(policy, b"hello", 1, 0) == "prefill-0"
    assert picked(policy, b"hullo", 1, 0) == "prefill-1"


def test_legs_have_affinities_of_their_own() -> None:
    policy = CacheAware()
    rows, columns = [prefill(0), prefill(1)], [decode(0, inflight=1), decode(1)]
    first = policy.choose(shape(text(1, 900)), Candidates(rows, columns))
    assert first.pair.pair.label == "prefill-0>decode-1"
    rows[0].inflight = columns[1].inflight = 30
    again = policy.choose(shape(text(1, 900)), Candidates(rows, columns))
    assert again.pair.pair.label == "prefill-0>decode-1"
    assert "has 100% of the prompt's 900 bytes" in again.reason


def test_requests_without_a_prompt_are_balanced_and_leave_no_trace() -> None:
    policy = CacheAware()
    assert picked(policy, b"", 4, 3) == "prefill-1"
    assert picked(policy, b"", 3, 4) == "prefill-0"


def test_forgotten_worker_has_no_matches() -> None:
    policy = CacheAware()
    assert picked(policy, text(1, 4000), 0, 1) == "prefill-0"
    policy.forget(InstanceId("prefill0"))
    assert picked(policy, text(1, 4000), 1, 0) == "prefill-1"


def test_make_policy_passes_the_parameters_on() -> None:
    policy = make_policy("cache_aware", params=PolicyParams(cache=CacheParams(cache_threshold=0.99)))
    assert isinstance(policy, CacheAware)
    assert picked(policy, text(1, 4000), 0, 1) == "prefill-0"
    assert (
        picked(policy, text(1, 4000) + b"tail of some length that is not known there......", 1, 0)
        == "prefill-1"
    )


# -- the memory --------------------------------------------------------------------------------


@given(st.binary(max_size=20_000), st.binary(max_size=20_000), st.integers(0, 20_000))
def test_match_is_the_common_prefix_in_whole_blocks(a: bytes, b: bytes, keep: int) -> None:
    b = a[:keep] + b
    memory = PrefixMemory()
    memory.add(prefix_hashes(a, ENDS, with_tail=True), ENDS, 2**30)
    matched = memory.match(prefix_hashes(b, ENDS, with_tail=True))
    if a == b:
        assert matched == len(prefix_hashes(a, ENDS, with_tail=True))
    else:
        common = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
        assert matched == sum(end <= common for end in ENDS)


@pytest.mark.parametrize("nbytes", [2_000, 100_000, 1_000_000])
def test_a_match_is_told_to_within_a_few_percent_of_the_length(nbytes: int) -> None:
    forest = PrefixForest(BLOCK_BYTES, with_tail=False)
    prompt = text(1, nbytes)
    blocks = len(forest.hashes(prompt))
    assert forest.matched_bytes(blocks, prompt) >= nbytes * 0.96
    assert blocks < 340


@given(st.lists(st.tuples(st.integers(0, 12), st.integers(0, 40)), max_size=60), st.integers(1000, 20_000))
def test_memory_is_bounded_and_stays_a_prefix_tree(prompts: list[tuple[int, int]], max_bytes: int) -> None:
    memory = PrefixMemory()
    for seed, blocks in prompts:
        hashes = prefix_hashes(text(seed % 4, 300) + text(seed, blocks * 100), ENDS, with_tail=False)
        memory.add(hashes, ENDS, max_bytes)
        assert memory.size_bytes <= max_bytes
        assert memory.size_bytes >= len(memory) * MIN_CHARGE_BYTES
        known = memory.match(hashes)
        singles = [block for block in hashes if memory.match([block])]
        assert singles == hashes[:known], "no block is known whose predecessors are not"


def test_the_longest_unused_prefix_is_evicted_first() -> None:
    memory = PrefixMemory()
    old, kept, new = (prefix_hashes(text(seed, 1024), ENDS, with_tail=False) for seed in (1, 2, 3))
    room = 2 * len(old) * MIN_CHARGE_BYTES + 64
    for hashes in (old, kept, old, kept, new):
        memory.add(hashes, ENDS, room)
    assert memory.match(new) == len(new)
    assert memory.match(kept) > memory.match(old)


def test_trees_of_workers_that_nobody_forgot_are_bounded() -> None:
    forest = PrefixForest(BLOCK_BYTES, with_tail=True)
    present = [prefill(0), prefill(1)]
    hashes = forest.hashes(text(1, 500))
    for index in range(100):
        forest.remember(InstanceId(f"gone{index}"), hashes, 2**20, [p.info.instance_id for p in present])
    assert len(forest) <= SPARE_TREES + len(present) + 1
    assert forest.match(InstanceId("gone99"), hashes)
