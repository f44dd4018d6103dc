"""Token pages: their hashes are SGLang's, ties hold what they promise, memory stays within its bounds."""

from __future__ import annotations

import json
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pdserve.scheduling.prefix.pages import PageIndex
from pdserve.scheduling.prefix.token_pages import page_hashes, tokens_of_ids, tokens_of_text

A, B = 1, 2


def following(*bits: int, page_tokens: int = 16, **bounds: int) -> PageIndex:
    index = PageIndex(**bounds)
    for bit in bits:
        assert index.follow(bit, page_tokens, is_exact=True)
    return index


# -- hashes --------------------------------------------------------------------------------------


def test_pages_are_named_as_sglang_names_them() -> None:
    # get_native_hash(array("q", range(1, 40)), None, 16) of SGLang 0.5.23, through hash_str_to_int64.
    assert page_hashes(range(1, 40), 16) == [8635429971592222890, 1256577331724852459]


def test_page_name_covers_everything_before_it() -> None:
    first, second = page_hashes([1] * 32, 16), page_hashes([2] + [1] * 31, 16)
    assert first[0] != second[0]
    assert first[1] != second[1]
    assert page_hashes([1] * 15, 16) == []


@given(st.lists(st.integers(0, 10**6), min_size=1, max_size=80), st.integers(1, 40))
def test_ids_in_json_begin_where_they_are_counted(ids: list[int], step: int) -> None:
    prompt = json.dumps(ids).encode()
    ends = list(range(step, len(prompt), step))
    begun = [len(json.loads(prompt[:end].rstrip(b", [") + b"]")) for end in ends if end > 1]
    counts = [count for end, count in zip(ends, tokens_of_ids(prompt, ends), strict=True) if end > 1]
    assert all(count >= number for count, number in zip(counts, begun, strict=True))
    assert all(count <= number + 1 for count, number in zip(counts, begun, strict=True))


def test_tokens_follow_the_density_of_the_text() -> None:
    chunks = ["x" * 128] * 2 + ["word" * 128] * 2
    ends = [128, 256, 512, 1280]
    assert tokens_of_text(1280, 512, ends, chunks) == pytest.approx([128, 256, 320, 512])
    assert tokens_of_text(2560, 512, [2 * end for end in ends], chunks) == pytest.approx([128, 256, 320, 512])
    assert tokens_of_text(1280, 512, ends) == pytest.approx([51.2, 102.4, 204.8, 512])
    assert tokens_of_text(1000, 100, [500, 1000], ["y" * 1000]) == pytest.approx([50, 100])


# -- the index -----------------------------------------------------------------------------------


def test_block_is_tied_to_the_first_page_that_covers_it() -> None:
    index = following(A)
    assert index.tie([11, 12, 13, 14], [8, 16, 17, 40], [101, 102]) == 3
    index.store(A, [101])
    assert [index.holders(key) for key in (11, 12, 13, 14)] == [A, A, 0, 0]
    assert index.num_tied([11, 12, 13, 14]) == 3
    assert index.num_tied([11, 12, 99]) == 2


def test_worker_that_is_not_followed_is_not_heard() -> None:
    index = following(A)
    index.store(B, [101])
    index.unfollow(A)
    index.store(A, [102])
    assert len(index) == 0


def test_pages_go_with_the_last_worker_that_holds_them() -> None:
    index = following(A, B)
    index.store(A, [101, 102])
    index.store(B, [102])
    index.remove(A, [101, 102, 103])
    assert len(index) == 1
    index.clear(B)
    assert len(index) == 0
    assert index.exact == A | B


def test_other_page_size_is_not_followed_beside_the_first() -> None:
    index = following(A, page_tokens=16)
    assert not index.follow(B, 64, is_exact=True)
    index.unfollow(A)
    assert index.follow(B, 64, is_exact=True)
    assert index.page_tokens == 64


def test_pages_of_one_token_are_kept_by_a_sixteenth_and_still_prove_their_prefix() -> None:
    index = following(A, page_tokens=1)
    ids = random.Random(3).choices(range(1000), k=3000)
    pages = page_hashes(ids, 1)
    index.store(A, pages[:2000])
    assert 60 < len(index) < 200
    blocks = list(range(1, 31))
    index.tie(blocks, [100.0 * block for block in blocks], pages)
    held = [block for block in blocks if index.holders(block)]
    assert held == list(range(1, len(held) + 1))
    assert 17 <= len(held) <= 20


def test_pages_beyond_the_bound_are_thinned_out() -> None:
    index = following(A, B, max_pages=100)
    pages = page_hashes(random.Random(4).choices(range(1000), k=16 * 1000), 16)
    index.store(A, pages)
    assert len(index) <= 100
    index.tie([1, 2], [160, 8000], pages)
    assert index.holders(1) == A
    index.remove(A, pages)
    assert len(index) == 0


def test_ties_are_bounded_and_the_prompts_beginnings_stay_longest() -> None:
    index = following(A, max_ties=3)
    index.tie([1, 2], [16, 32], [101, 102])
    index.tie([11, 12], [16, 32], [111, 112])
    assert index.num_ties == 3
    assert index.num_tied([1, 2]) == 1
    assert index.num_tied([11, 12]) == 2


steps = st.tuples(
    st.sampled_from(["store", "remove", "clear", "unfollow", "follow"]),
    st.sampled_from([A, B]),
    st.lists(st.integers(-40, 40), max_size=12),
)


@settings(max_examples=150, deadline=None)
@given(st.lists(steps, max_size=25), st.integers(5, 60))
def test_index_never_names_a_page_that_is_not_there_and_keeps_its_bound(
    sequence: list[tuple[str, int, list[int]]], max_pages: int
) -> None:
    index, truth = following(A, B, max_pages=max_pages), {A: set[int](), B: set[int]()}
    for verb, bit, pages in sequence:
        match verb:
            case "store":
                index.store(bit, pages)
                truth[bit].update(pages)
            case "remove":
                index.remove(bit, pages)
                truth[bit].difference_update(pages)
            case "follow":
                index.follow(bit, 16, is_exact=True)
                truth[bit].clear()
            case _:
                getattr(index, verb)(bit)
                truth[bit].clear()
        assert len(index) <= max_pages
        for each in (A, B):
            assert set(index.held(each)) <= truth[each]
    blocks = sorted(truth[A] | truth[B])
    index.tie(blocks, [16.0 * (i + 1) for i in range(len(blocks))], blocks)
    for place, key in enumerate(blocks):
        for bit in (A, B):
            assert not index.holders(key) & bit or truth[bit].intersection(blocks[place:])
