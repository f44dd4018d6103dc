"""cache_aware: published behaviour, bounds, forgetting."""

from __future__ import annotations

import random

import pytest

from pdserve.scheduling.policy import CacheParams, Candidates, PolicyParams, make_policy
from pdserve.scheduling.policy.cache_aware import CacheAware
from pdserve.types import InstanceId, RequestShape
from tests.scheduling.policy.test_policy import decode, prefill


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


def test_no_more_of_a_worker_is_remembered_than_max_tree_size() -> None:
    policy = CacheAware(CacheParams(max_tree_size=10_000))
    for seed in range(5):
        assert picked(policy, text(seed, 4000), 0, 1) == "prefill-0"
    assert picked(policy, text(4, 4000), 1, 0) == "prefill-0", "the last one is known"
    assert picked(policy, text(0, 4000), 1, 0) == "prefill-1", "the first one is not any more"
