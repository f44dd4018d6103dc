"""The plugin's allocator gives SGLang what SGLang's own would, page for page as many, in fewer runs."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from pdserve.kv.layout import num_runs

torch = pytest.importorskip("torch", reason="torch is not installed")
pytestmark = pytest.mark.slow

SIZE = 16


def _make(kind: str, num_pages: int, *, need_sort: bool = True) -> Any:
    from tests.support.device_allocator import make_allocator

    made = make_allocator(kind, num_pages, SIZE, need_sort=need_sort)
    made.debug_mode = True
    return made


def _extend(allocator: Any, rows: list[list[int]], extra: list[int]) -> bool:
    """Grow each row by so many tokens in one call; False when the pool is short."""
    prefix = torch.tensor([len(row) for row in rows])
    after = prefix + torch.tensor(extra)
    last = torch.tensor([row[-1] if row else -1 for row in rows])
    slots = allocator.alloc_extend(prefix, prefix, after, after, last, int(sum(extra)))
    if slots is None:
        return False
    for row, part in zip(rows, torch.split(slots, extra), strict=True):
        row.extend(part.tolist())
    return True


def _decode(allocator: Any, rows: list[list[int]]) -> bool:
    lengths = torch.tensor([len(row) + 1 for row in rows])
    slots = allocator.alloc_decode(lengths, lengths, torch.tensor([row[-1] for row in rows]))
    if slots is None:
        return False
    for row, slot in zip(rows, slots.tolist(), strict=True):
        row.append(slot)
    return True


def _check_rows(rows: list[list[int]], num_pages: int) -> None:
    owners: dict[int, int] = {}
    for number, row in enumerate(rows):
        for position, slot in enumerate(row):
            page = slot // SIZE
            assert 1 <= page <= num_pages
            assert slot % SIZE == position % SIZE
            assert row[position - position % SIZE] // SIZE == page
            assert owners.setdefault(page, number) == number


@pytest.mark.parametrize("kind", ["segment", "device"])
@pytest.mark.parametrize("seed", range(6))
def test_it_agrees_with_sglangs_allocator_on_any_trace(seed: int, kind: str) -> None:
    rng = np.random.default_rng(seed)
    num_pages = 60
    need_sort = seed % 2 == 0
    sides = [(_make(side, num_pages, need_sort=need_sort), []) for side in ("stock", kind)]
    for _ in range(120):
        action, pick = int(rng.integers(0, 4)), rng.random(40)
        extra = [int(value) for value in rng.integers(1, 100, 3)]
        outcomes = []
        for allocator, rows in sides:
            match action:
                case 0:
                    new: list[list[int]] = [[], [], []]
                    outcomes.append(_extend(allocator, new, extra))
                    rows.extend(row for row in new if row)
                case 1:
                    chosen = [row for row, value in zip(rows, pick, strict=False) if value < 0.4][:3]
                    outcomes.append(not chosen or _extend(allocator, chosen, extra[: len(chosen)]))
                case 2:
                    outcomes.append(not rows or _decode(allocator, rows))
                case _ if rows:
                    row = rows.pop(int(pick[0] * len(rows)))
                    if pick[1] < 0.5:
                        allocator.free(torch.tensor(row))
                    else:
                        allocator.free_segment(torch.tensor(row), start_pos=0)
            _check_rows(rows, num_pages)
            free = allocator.get_all_free_pages().tolist()
            held = {slot // SIZE for row in rows for slot in row}
            assert sorted(free) == sorted(set(range(1, num_pages + 1)) - held)
            assert allocator.available_size() == len(free) * SIZE
        assert len(set(outcomes)) <= 1, outcomes
        assert sides[0][0].available_size() == sides[1][0].available_size()


def test_a_chunk_goes_on_right_behind_the_one_before() -> None:
    allocator, rows = _make("segment", 64), [[], []]
    assert _extend(allocator, rows[:1], [40])
    assert _extend(allocator, rows[1:], [33])
    first_pages = sorted({slot // SIZE for slot in rows[0]})
    assert _extend(allocator, rows[:1], [60])
    pages = sorted({slot // SIZE for slot in rows[0]})
    assert pages[:3] == first_pages == [1, 2, 3]
    assert len(pages) == 7
    _check_rows(rows, 64)


def test_slots_freed_within_a_group_come_back_at_its_end() -> None:
    allocator, row = _make("segment", 8), []
    assert _extend(allocator, [row], [50])
    allocator.free_group_begin()
    allocator.free(torch.tensor(row[:32]))
    allocator.free_page_ids(torch.tensor([row[32] // SIZE, row[48] // SIZE]))
    assert allocator.available_size() == 4 * SIZE
    allocator.free_group_end()
    assert allocator.available_size() == 8 * SIZE
    assert allocator._segments.num_segments == 1


def test_whole_page_allocation_and_clear() -> None:
    allocator = _make("segment", 8)
    slots = allocator.alloc(3 * SIZE)
    assert slots.tolist() == list(range(SIZE, 4 * SIZE))
    assert allocator.alloc(6 * SIZE) is None
    allocator.free_segment(slots, start_pos=0)
    assert allocator.available_size() == 8 * SIZE
    allocator.alloc(8 * SIZE)
    allocator.clear()
    assert allocator.available_size() == 8 * SIZE
    assert allocator.get_all_free_pages().tolist() == list(range(1, 9))


def test_a_failing_allocation_leaves_every_page_free() -> None:
    allocator = _make("segment", 8)
    with pytest.raises(AssertionError, match="page-aligned"):
        allocator.alloc(SIZE + 1)
    zero, length = torch.tensor([0]), torch.tensor([20])
    with pytest.raises(AssertionError):
        allocator.alloc_extend(zero, zero, length, length, torch.tensor([6]), 20)
    assert allocator.available_size() == 8 * SIZE
    assert len(allocator.free_pages) == 0


def test_a_page_freed_twice_is_named() -> None:
    allocator = _make("segment", 8)
    slots = allocator.alloc(2 * SIZE)
    allocator.free(slots)
    with pytest.raises(ValueError, match="page 1 is free already"):
        allocator.free(slots)


@pytest.mark.parametrize("kind", ["segment", "device"])
def test_a_chunk_goes_on_behind_its_last_page_not_in_a_tighter_hole(kind: str) -> None:
    allocator = _make(kind, 14)
    rows: list[list[int]] = [[] for _ in range(4)]
    for row, num_pages in zip(rows, (4, 1, 1, 8), strict=True):
        assert _extend(allocator, [row], [num_pages * SIZE])
    gap, _, tighter, _ = rows
    allocator.free(torch.tensor(gap))
    allocator.free(torch.tensor(tighter))
    prompt: list[int] = []
    for num_tokens in (SIZE, SIZE // 2, SIZE):
        assert _extend(allocator, [prompt], [num_tokens])
    assert [slot // SIZE for slot in prompt[::SIZE]] == [tighter[0] // SIZE, 1, 2]


@pytest.mark.parametrize("kind", ["segment", "device"])
def test_requests_get_fewer_runs_than_from_sglangs_allocator_under_churn(kind: str) -> None:
    ours, stock = _mean_runs(kind, seed=7), _mean_runs("stock", seed=7)
    assert ours < stock / 2, (ours, stock)


def _mean_runs(kind: str, seed: int) -> float:
    """Runs of new requests in a crowded pool where all grow and end at random."""
    rng = np.random.default_rng(seed)
    allocator, rows = _make(kind, 300), []
    allocator.debug_mode = False
    runs: list[int] = []
    for turn in range(250):
        row: list[int] = []
        while not _extend(allocator, [row], [int(rng.integers(16, 400))]):
            allocator.free(torch.tensor(rows.pop(int(rng.random() * len(rows)))))
        if turn > 100:
            pages = np.array(row[::SIZE]) // SIZE
            runs.append(num_runs(pages, pages))
        rows.append(row)
        for _ in range(4):
            _decode(allocator, rows)
    return float(np.mean(runs))
