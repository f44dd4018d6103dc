"""The plugin's allocator gives SGLang what SGLang's own would, page for page as many, in fewer runs."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.slow

SIZE = 16


def _make(kind: str, num_pages: int) -> Any:
    from sglang.srt.mem_cache.allocator.paged import PagedTokenToKVPoolAllocator

    from pdserve.plugin.allocator import PdservePagedAllocator

    classes = {"stock": PagedTokenToKVPoolAllocator, "segment": PdservePagedAllocator}
    return classes[kind](num_pages * SIZE, SIZE, torch.float16, "cpu", None, True)


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


@pytest.mark.parametrize("seed", range(6))
def test_it_agrees_with_sglangs_allocator_on_any_trace(seed: int) -> None:
    rng = np.random.default_rng(seed)
    num_pages = 60
    sides = [(_make(kind, num_pages), []) for kind in ("stock", "segment")]
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
                    allocator.free(torch.tensor(row))
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
    assert allocator.num_free_segments == 1
    assert allocator.largest_free_segment == 8


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
