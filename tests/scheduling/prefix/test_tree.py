"""The global prompt tree: what it claims against a naive model of sets, its bounds, and how it forgets."""

from __future__ import annotations

import random
from math import inf

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pdserve.scheduling.prefix.memory import FIRST_BYTES, SWEEP_BLOCKS
from pdserve.scheduling.prefix.tree import Mark, PromptTree
from pdserve.types import InstanceId
from tests.support.examples import n_examples

A, B, C = (InstanceId(name) for name in "abc")
TTL_S = 100.0


def text(seed: int, blocks: int) -> bytes:
    """A JSON string of so many first blocks; nobody else's shares a block with it."""
    return b'"' + random.Random(seed).randbytes(FIRST_BYTES * blocks).hex().encode()[: FIRST_BYTES * blocks]


def tree_with(prompt: bytes, *workers: InstanceId) -> PromptTree:
    tree = PromptTree(ttl_s=TTL_S)
    for worker in workers:
        tree.arrive(tree.send(tree.read(prompt), worker, 0.0), 0.0)
    return tree


def test_only_what_has_arrived_matches() -> None:
    tree, prompt = PromptTree(ttl_s=TTL_S), text(1, 8)
    prefix = tree.read(prompt)
    mark = tree.send(prefix, A, 0.0)
    assert tree.match(prefix, [A, B], 0.0) == [0.0, 0.0]
    assert tree.match_coming(prefix, [A, B], 0.0) == [pytest.approx(1.0, abs=0.01), 0.0]
    tree.arrive(mark, 1.0)
    assert tree.match(prefix, [B, A], 1.0) == [0.0, pytest.approx(1.0, abs=0.01)]


def test_lost_leg_counts_nowhere() -> None:
    tree, prefix = PromptTree(), PromptTree().read(text(1, 8))
    mark = tree.send(prefix, A, 0.0)
    tree.lose(mark)
    assert tree.match_coming(prefix, [A], 0.0) == [0.0]
    tree.arrive(mark, 0.0)
    assert tree.match(prefix, [A], 0.0) == [0.0]
    assert len(tree) == 0


def test_losing_one_of_two_legs_keeps_what_the_other_brings() -> None:
    tree, shared = PromptTree(), text(1, 4)
    first, second = tree.read(shared + text(2, 4)), tree.read(shared + text(3, 4))
    lost, whole = tree.send(first, A, 0.0), tree.send(second, A, 0.0)
    tree.lose(lost)
    assert tree.match_coming(second, [A], 0.0)[0] > 0.9
    assert tree.match_coming(first, [A], 0.0)[0] == pytest.approx(0.5, abs=0.07)
    tree.arrive(whole, 1.0)
    assert tree.match(first, [A], 1.0)[0] == pytest.approx(0.5, abs=0.07)


def test_match_ends_where_the_prompts_part() -> None:
    known = text(1, 10)
    tree = tree_with(known, A)
    share = tree.match(tree.read(known[: 6 * FIRST_BYTES] + text(2, 4)), [A], 0.0)[0]
    assert share == pytest.approx(0.6, abs=0.01)


def test_every_depth_is_told_apart() -> None:
    tree, whole = PromptTree(), text(1, 60)
    names = [InstanceId(f"w{i}") for i in range(61)]
    for blocks, name in enumerate(names):
        tree.arrive(tree.send(tree.read(whole[: blocks * FIRST_BYTES]), name, 0.0), 0.0)
    shares = tree.match(tree.read(whole), names, 0.0)
    assert shares == [pytest.approx(blocks * FIRST_BYTES / len(whole)) for blocks in range(61)]


def test_prefix_is_forgotten_when_nobody_asked_for_it_as_long_as_its_ttl() -> None:
    prompt = text(1, 4)
    tree = tree_with(prompt, A)
    prefix = tree.read(prompt)
    assert tree.match(prefix, [A], TTL_S - TTL_S / 32)[0] > 0.9
    assert tree.match(prefix, [A], TTL_S) == [0.0]


def test_use_renews_the_ttl_of_what_was_used_only() -> None:
    prompt = text(1, 8)
    tree = tree_with(prompt, A)
    tree.arrive(tree.send(tree.read(prompt[: 4 * FIRST_BYTES]), A, 60.0), 60.0)
    assert tree.match(tree.read(prompt), [A], 120.0)[0] == pytest.approx(0.5, abs=0.01)


def test_outlived_prefix_counts_as_coming_when_it_is_sent_again() -> None:
    prompt = text(1, 4)
    tree = tree_with(prompt, A)
    prefix = tree.read(prompt)
    tree.send(prefix, A, TTL_S)
    assert tree.match(prefix, [A], TTL_S) == [0.0]
    assert tree.match_coming(prefix, [A], TTL_S)[0] > 0.9


def test_outlived_prefix_is_not_believed_even_while_more_than_a_sweep_takes_is_left() -> None:
    tree = PromptTree(ttl_s=TTL_S)
    prefixes = [tree.read(text(seed, 60)) for seed in range(SWEEP_BLOCKS // 60 + 5)]
    for prefix in prefixes:
        tree.arrive(tree.send(prefix, A, 0.0), 0.0)
    assert tree.match(prefixes[-1], [A], TTL_S) == [0.0]
    assert len(tree) > 0


def test_memory_of_what_has_outlived_its_ttl_is_taken_back() -> None:
    tree = tree_with(text(1, 50), A, B)
    tree.arrive(tree.send(tree.read(text(2, 1)), C, 3 * TTL_S), 3 * TTL_S)
    assert len(tree) == 1


def test_least_recently_used_leaves_go_first_within_the_kv_pool() -> None:
    tree = PromptTree()
    tree.resize(A, 10 * FIRST_BYTES // 4)
    shared = text(1, 4)
    old, new = shared + text(2, 4), shared + text(3, 4)
    for now_s, prompt in enumerate([old, new]):
        tree.arrive(tree.send(tree.read(prompt), A, now_s), now_s)
    assert tree.size_bytes(A) <= 10 * FIRST_BYTES
    assert tree.match(tree.read(new), [A], 2.0)[0] > 0.9
    assert 0.5 < tree.match(tree.read(old), [A], 2.0)[0] < 0.9


def test_pool_that_shrinks_keeps_the_most_recent() -> None:
    tree, prompt = PromptTree(), text(1, 10)
    tree.arrive(tree.send(tree.read(prompt), A, 0.0), 0.0)
    tree.resize(A, 5 * FIRST_BYTES // 4)
    assert tree.match(tree.read(prompt), [A], 0.0)[0] == pytest.approx(0.5, abs=0.01)


def test_forgetting_a_worker_keeps_the_others_and_voids_its_marks() -> None:
    prompt = text(1, 4)
    tree = tree_with(prompt, A, B)
    prefix = tree.read(prompt)
    mark = tree.send(tree.read(text(2, 4)), A, 0.0)
    tree.forget(A)
    tree.arrive(mark, 0.0)
    assert tree.match(prefix, [A, B], 0.0) == [0.0, pytest.approx(1.0, abs=0.01)]
    tree.arrive(tree.send(prefix, C, 1.0), 1.0)
    assert tree.match(prefix, [C, B, A], 1.0)[2] == 0.0


def test_flushed_worker_holds_nothing_but_what_is_still_coming() -> None:
    tree = tree_with(text(1, 4), A, B)
    coming = tree.read(text(2, 4))
    tree.send(coming, A, 0.0)
    tree.flush(A)
    prefix = tree.read(text(1, 4))
    assert tree.match(prefix, [A], 0.0) == tree.match_coming(prefix, [A], 0.0) == [0.0]
    assert tree.match(prefix, [B], 0.0)[0] > 0.9
    assert tree.match_coming(coming, [A], 0.0)[0] > 0.9


def test_with_its_tail_a_prompt_is_known_to_its_last_byte() -> None:
    tree, prompt = PromptTree(), text(1, 4)[:-7]
    for known in (prompt, b'"hi"'):
        tree.hold(tree.read(known, with_tail=True), A, 0.0)
        assert tree.match(tree.read(known, with_tail=True), [A], 0.0) == [1.0]
    assert tree.match(tree.read(b'"ho"', with_tail=True), [A], 0.0) == [0.0]
    longer = tree.match(tree.read(prompt + text(2, 4), with_tail=True), [A], 0.0)[0]
    assert longer * len(prompt + text(2, 4)) == pytest.approx(3 * FIRST_BYTES)


def test_a_worker_of_unknown_pool_is_held_to_the_default() -> None:
    tree = PromptTree(max_worker_bytes=10 * FIRST_BYTES, ttl_s=inf)
    for turn in range(9):
        tree.hold(tree.read(text(turn, 4)), A, 0.0)
        assert 4 * FIRST_BYTES <= tree.size_bytes(A) <= 10 * FIRST_BYTES
    assert tree.match(tree.read(text(8, 4)), [A], 0.0)[0] > 0.9
    assert tree.match(tree.read(text(2, 4)), [A], 0.0) == [0.0]


@pytest.mark.parametrize("num_bytes", [2_000, 100_000, 1_000_000])
def test_a_match_is_told_to_within_a_few_percent_of_the_length(num_bytes: int) -> None:
    prefix = PromptTree().read(b"x" * num_bytes)
    assert prefix.share(len(prefix.hashes)) >= 0.93
    assert len(prefix.hashes) < 340


def test_prompt_too_short_for_a_block_is_held_by_nobody() -> None:
    tree = tree_with(b'"hi"', A)
    assert tree.match(tree.read(b'"hi"'), [A], 0.0) == [0.0]
    assert tree.match(tree.read(b""), [A], 0.0) == [0.0]


# -- against sets --------------------------------------------------------------------------------

WORKERS = (A, B, C)
PIECES = [text(seed, 2)[: 2 * FIRST_BYTES] for seed in range(3)]
prompts = st.lists(st.sampled_from(PIECES), min_size=1, max_size=5).map(b"".join)
workers = st.sampled_from(WORKERS)
steps = st.one_of(
    st.tuples(st.just("send"), workers, prompts),
    st.tuples(st.just("arrive"), st.integers(0, 30), st.none()),
    st.tuples(st.just("lose"), st.integers(0, 30), st.none()),
    st.tuples(st.just("forget"), workers, st.none()),
    st.tuples(st.just("flush"), workers, st.none()),
    st.tuples(st.just("resize"), workers, st.integers(1, 400)),
    st.tuples(st.just("wait"), st.floats(0, 80), st.none()),
)


class Naive:
    """Sets of block prefixes: all that could be at a worker, with no bound and no TTL."""

    def __init__(self) -> None:
        self.held: dict[InstanceId, set[bytes]] = {}
        self.legs: list[tuple[InstanceId, bytes, Mark]] = []

    def arrived(self, worker: InstanceId, prompt: bytes) -> None:
        whole = range(FIRST_BYTES, len(prompt) + 1, FIRST_BYTES)
        self.held.setdefault(worker, set()).update(prompt[:end] for end in whole)

    def bound(self, worker: InstanceId, prompt: bytes, *, is_coming: bool) -> int:
        known = set(self.held.get(worker, ()))
        for where, coming, _ in self.legs if is_coming else ():
            if where == worker:
                known.update(coming[:end] for end in range(FIRST_BYTES, len(coming) + 1, FIRST_BYTES))
        return max((end for end in range(len(prompt) + 1) if prompt[:end] in known), default=0)


def apply(tree: PromptTree, naive: Naive, step: tuple[str, object, object], now_s: float) -> float:
    """One step on both; returns the new time."""
    match step:
        case "send", str(worker), bytes(prompt):
            mark = tree.send(tree.read(prompt), InstanceId(worker), now_s)
            naive.legs.append((InstanceId(worker), prompt, mark))
        case ("arrive" | "lose") as verb, int(index), _ if naive.legs:
            worker, prompt, mark = naive.legs.pop(index % len(naive.legs))
            if verb == "arrive":
                tree.arrive(mark, now_s)
                naive.arrived(worker, prompt)
            else:
                tree.lose(mark)
        case "forget", str(worker), _:
            tree.forget(InstanceId(worker))
            naive.held.pop(InstanceId(worker), None)
            for _, _, mark in [leg for leg in naive.legs if leg[0] == worker]:
                tree.arrive(mark, now_s)
            naive.legs = [leg for leg in naive.legs if leg[0] != worker]
        case "flush", str(worker), _:
            tree.flush(InstanceId(worker))
            naive.held.pop(InstanceId(worker), None)
        case "resize", str(worker), int(tokens):
            tree.resize(InstanceId(worker), tokens)
        case "wait", float(seconds), _:
            return now_s + seconds
    return now_s


@settings(max_examples=n_examples(150))
@given(st.lists(steps, max_size=40), prompts, st.integers(4, 40))
def test_tree_never_claims_an_absent_prefix_and_keeps_its_bounds(
    sequence: list[tuple[str, object, object]], asked: bytes, max_blocks: int
) -> None:
    tree, naive, now_s = PromptTree(max_blocks=max_blocks, ttl_s=TTL_S), Naive(), 0.0
    for step in sequence:
        now_s = apply(tree, naive, step, now_s)
        assert len(tree) <= max_blocks
        prefix = tree.read(asked)
        arrived = tree.match(prefix, WORKERS, now_s)
        coming = tree.match_coming(prefix, WORKERS, now_s)
        for worker, here, there in zip(WORKERS, arrived, coming, strict=True):
            assert here * len(asked) <= naive.bound(worker, asked, is_coming=False) + 1e-6
            assert there * len(asked) <= naive.bound(worker, asked, is_coming=True) + 1e-6
            assert here <= there


@settings(max_examples=n_examples(60))
@given(st.lists(steps.filter(lambda step: step[0] in ("send", "arrive", "lose")), max_size=40), prompts)
def test_without_bounds_the_tree_tells_all_that_is_there(
    sequence: list[tuple[str, object, object]], asked: bytes
) -> None:
    tree, naive = PromptTree(), Naive()
    for step in sequence:
        apply(tree, naive, step, 0.0)
    prefix = tree.read(asked)
    for is_coming, shares in (
        (False, tree.match(prefix, WORKERS, 0.0)),
        (True, tree.match_coming(prefix, WORKERS, 0.0)),
    ):
        expected = [naive.bound(worker, asked, is_coming=is_coming) / len(asked) for worker in WORKERS]
        assert shares == pytest.approx(expected)


@settings(max_examples=n_examples(60))
@given(st.lists(steps, max_size=40))
def test_when_all_legs_ended_and_all_workers_are_gone_nothing_is_left(
    sequence: list[tuple[str, object, object]],
) -> None:
    tree, naive, now_s = PromptTree(max_blocks=30, ttl_s=TTL_S), Naive(), 0.0
    for step in sequence:
        now_s = apply(tree, naive, step, now_s)
    for _, _, mark in naive.legs:
        tree.lose(mark)
    for worker in WORKERS:
        tree.forget(worker)
    assert len(tree) == 0
    assert not tree._memory.blocks
