"""Page runs, head ranges and slots: the arithmetic under every transfer."""

from __future__ import annotations

import numpy as np
import pytest

from pdserve.errors import KVLayoutMismatch
from pdserve.kv.coalesce import HostPageCopier, Piece, check_piece
from pdserve.kv.layout import (
    HeadSlice,
    PagedRegions,
    head_slice,
    heads_of_rank,
    is_first_replica,
    num_runs,
    page_runs,
)
from pdserve.kv.staging import ALIGNMENT, SlotPool
from tests.support.rows import rows


@rows("seed", range(20))
def test_page_runs_are_maximal_and_cover_every_pair_once(seed: int) -> None:
    rng = np.random.default_rng(seed)
    count = int(rng.integers(1, 40))
    source = np.sort(rng.choice(60, count, replace=False)).astype(np.int32)
    target = np.sort(rng.choice(60, count, replace=False)).astype(np.int32)
    runs = page_runs(source, target)
    pairs = [
        (int(first) + step, int(second) + step)
        for first, second, length in zip(*runs, strict=True)
        for step in range(int(length))
    ]
    assert pairs == list(zip(source.tolist(), target.tolist(), strict=True))
    ends = [(first + length, second + length) for first, second, length in zip(*runs, strict=True)]
    starts = list(zip(runs.source.tolist(), runs.target.tolist(), strict=True))
    assert not set(ends[:-1]) & set(starts[1:]) or all(
        end != start for end, start in zip(ends, starts[1:], strict=False)
    )
    assert num_runs(source, target) == len(runs.lengths)


def test_no_pages_have_no_runs() -> None:
    empty = np.empty(0, dtype=np.int32)
    assert num_runs(empty, empty) == 0
    assert len(page_runs(empty, empty).lengths) == 0


def test_lists_of_different_length_are_refused() -> None:
    with pytest.raises(ValueError, match="3 source pages but 2 target pages"):
        page_runs(np.arange(3, dtype=np.int32), np.arange(2, dtype=np.int32))


@rows("heads", [1, 2, 4, 8, 12])
@rows("source_tp", [1, 2, 4, 8])
@rows("target_tp", [1, 2, 4, 8])
def test_every_decode_rank_gets_each_of_its_heads(heads: int, source_tp: int, target_tp: int) -> None:
    if heads % min(source_tp, heads) or heads % min(target_tp, heads):
        pytest.skip("SGLang needs heads divisible by the ranks")
    for target_rank in range(target_tp):
        wanted = heads_of_rank(heads, target_tp, target_rank)
        got: set[int] = set()
        for source_rank in range(source_tp):
            held = heads_of_rank(heads, source_tp, source_rank)
            part = head_slice(held, wanted, 10)
            if part is None:
                continue
            first = held.start + part.source_offset // 10
            assert wanted.start + part.target_offset // 10 == first
            got |= set(range(first, first + part.nbytes // 10))
        assert got == set(wanted)


@rows(
    ("heads", "source_tp", "target_tp"),
    [(8, 16, 8), (4, 8, 4), (4, 8, 2), (2, 8, 1), (4, 8, 8), (8, 8, 4), (4, 16, 8), (2, 4, 8), (1, 8, 2)],
)
def test_each_head_is_sent_once_to_a_decode_rank(heads: int, source_tp: int, target_tp: int) -> None:
    """However many prefill ranks hold it; two to four times before."""
    for target_rank in range(target_tp):
        wanted = heads_of_rank(heads, target_tp, target_rank)
        per = max(1, source_tp // target_tp)
        first = target_rank * per if source_tp > target_tp else target_rank // (target_tp // source_tp)
        sent: list[int] = []
        for source_rank in range(first, first + per):
            held = heads_of_rank(heads, source_tp, source_rank)
            if is_first_replica(heads, source_tp, source_rank, target_tp, target_rank):
                sent.extend(sorted(set(held) & set(wanted)))
        assert sent == list(wanted)


def test_whole_rows_are_one_slice() -> None:
    assert head_slice(range(4), range(4), 32) == HeadSlice(0, 0, 128)
    assert head_slice(range(2), range(2, 4), 32) is None


@rows(
    ("changes", "message"),
    [
        ({"num_pages": 0}, "at least one page"),
        ({"token_stride": 8}, "stride 8 is smaller"),
        ({"num_kv_heads": 3}, "do not divide into 3"),
    ],
)
def test_impossible_pools_are_refused(changes: dict[str, int], message: str) -> None:
    fields = {"bases": (0,), "num_pages": 4, "page_size": 2, "row_bytes": 16, "token_stride": 16} | changes
    with pytest.raises(KVLayoutMismatch, match=message):
        PagedRegions(**fields)  # type: ignore[arg-type]


@rows(
    ("piece", "pages", "message"),
    [
        (Piece(1, 2, 0, 4, 0, 16), [1, 2], "regions 1..3"),
        (Piece(0, 1, 3, 2, 0, 16), [1, 2], "tokens 3..5"),
        (Piece(0, 1, 0, 4, 8, 16), [1, 2], "bytes 8..24"),
        (Piece(0, 1, 0, 4, 0, 16), [1, 4], "page ids 1..4"),
        (Piece(0, 1, 0, 4, 0, 16), [-1, 2], "page ids -1..2"),
    ],
)
def test_pieces_outside_the_pool_are_refused_by_the_bound_they_break(
    piece: Piece, pages: list[int], message: str
) -> None:
    regions = PagedRegions(bases=(0, 0), num_pages=4, page_size=2, row_bytes=16, token_stride=16)
    with pytest.raises(KVLayoutMismatch, match=message):
        check_piece(regions, np.array(pages, dtype=np.int32), piece)


@rows("seed", range(30))
def test_gather_then_scatter_is_numpys_own_indexing(seed: int) -> None:
    """Any geometry and piece, against plain indexing of the pool as an array of tokens."""
    rng = np.random.default_rng(seed)
    heads, head_bytes = int(rng.integers(1, 5)), int(rng.integers(1, 20))
    row, page_size, num_pages = heads * head_bytes, int(rng.integers(1, 9)), int(rng.integers(2, 12))
    stride = row + int(rng.integers(0, 3)) * 4
    memory = [rng.integers(0, 256, num_pages * page_size * stride + 16, dtype=np.uint8) for _ in range(3)]
    offset = int(rng.integers(0, 16))
    regions = PagedRegions(
        tuple(int(one.ctypes.data) + offset for one in memory), num_pages, page_size, row, stride, heads
    )
    pages = rng.choice(num_pages, int(rng.integers(1, num_pages)), replace=False).astype(np.int32)
    first = int(rng.integers(0, len(pages) * page_size))
    tokens = int(rng.integers(1, len(pages) * page_size - first + 1))
    first_head = int(rng.integers(0, heads))
    part = int(rng.integers(1, heads - first_head + 1)) * head_bytes
    piece = Piece(1, 2, first, tokens, first_head * head_bytes, part)
    slots = (pages.astype(np.int64)[:, None] * page_size + np.arange(page_size)).reshape(-1)
    slots = slots[first : first + tokens]
    views = [
        one[offset : offset + num_pages * page_size * stride].reshape(-1, stride)[:, piece.slice_offset :][
            :, :part
        ]
        for one in memory
    ]
    slab = np.zeros(piece.nbytes + 8, dtype=np.uint8)
    shift = int(rng.integers(0, 8))
    copier = HostPageCopier(regions)
    assert copier.gather_pages(pages, piece, slab.ctypes.data + shift).is_done()
    expected = np.stack([views[1][slots], views[2][slots]]).reshape(-1)
    np.testing.assert_array_equal(slab[shift : shift + piece.nbytes], expected)
    before = [one.copy() for one in memory]
    slab[shift : shift + piece.nbytes] = rng.integers(0, 256, piece.nbytes, dtype=np.uint8)
    copier.scatter_pages(pages, piece, slab.ctypes.data + shift)
    new = slab[shift : shift + piece.nbytes].reshape(2, tokens, part)
    for region in (1, 2):
        np.testing.assert_array_equal(views[region][slots], new[region - 1])
        restored = memory[region].copy()
        flat = restored[offset : offset + num_pages * page_size * stride].reshape(-1, stride)
        old = before[region][offset : offset + num_pages * page_size * stride].reshape(-1, stride)
        flat[slots, piece.slice_offset : piece.slice_offset + part] = old[
            slots, piece.slice_offset : piece.slice_offset + part
        ]
        np.testing.assert_array_equal(restored, before[region])
    np.testing.assert_array_equal(memory[0], before[0])


@rows("seed", range(10))
def test_slots_have_one_holder_and_all_come_back(seed: int) -> None:
    rng = np.random.default_rng(seed)
    pool = SlotPool(int(rng.integers(4, 40)) * 1000, 1000)
    assert pool.slot_bytes % ALIGNMENT == 0
    held: dict[int, int] = {}
    for _ in range(400):
        if held and rng.random() < 0.5:
            slot = int(rng.choice(list(held)))
            pool.give_back(slot)
            del held[slot]
            continue
        holder = int(rng.integers(0, 3))
        slot = pool.take(holder)
        if slot is None:
            assert pool.held_by(holder) >= pool.num_free, "a holder of fewer slots than are free gets one"
            continue
        assert slot not in held
        assert pool.offset(slot) + pool.slot_bytes <= pool.num_slots * pool.slot_bytes
        held[slot] = holder
        assert pool.num_held == len(held)
    for slot in held:
        pool.give_back(slot)
    assert pool.num_free == pool.num_slots
    with pytest.raises(ValueError, match="is not held"):
        pool.give_back(0)


def test_holders_that_never_give_back_leave_slots_to_the_next() -> None:
    pool = SlotPool(32 * 256, 256)
    shares = []
    for holder in range(6):
        while pool.take(holder) is not None:
            pass
        shares.append(pool.held_by(holder))
    assert shares == [16, 8, 4, 2, 1, 1]


def test_a_slab_smaller_than_a_slot_has_none() -> None:
    assert SlotPool(0, 0).take("a") is None
    assert SlotPool(1000, 2000).num_slots == 0
