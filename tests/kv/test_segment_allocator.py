"""The segment allocator never overlaps, never leaks, keeps free runs maximal, and makes few runs."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from pdserve.kv.allocator import SegmentAllocator
from pdserve.kv.layout import num_runs
from tests.support.rows import rows


def _segments(allocator: SegmentAllocator) -> list[tuple[int, int]]:
    """``(first page, pages)`` of every free segment, by page."""
    return sorted(allocator._length_at.items())


def _check(allocator: SegmentAllocator, held: set[int]) -> None:
    """Free segments are exactly the complement of what is held, and no two of them touch."""
    segments = _segments(allocator)
    free = {page for start, length in segments for page in range(start, start + length)}
    assert free == set(range(1, allocator.num_pages + 1)) - held
    assert allocator.num_free == len(free)
    assert all(start + length < following for (start, length), (following, _) in itertools.pairwise(segments))
    assert allocator.num_segments == len(segments)
    np.testing.assert_array_equal(allocator.free_pages(), sorted(free))


@rows("seed", range(12))
def test_any_sequence_of_calls_keeps_the_books(seed: int) -> None:
    rng = np.random.default_rng(seed)
    allocator = SegmentAllocator(int(rng.integers(1, 90)))
    requests: list[list[int]] = []
    held: set[int] = set()
    for _ in range(250):
        match int(rng.integers(0, 4)):
            case 0:
                wanted = int(rng.integers(1, 20))
                pages = allocator.alloc(wanted, slack_pages=int(rng.integers(0, 4)))
                assert (pages is None) == (wanted > allocator.num_pages - len(held))
            case 1 if requests:
                lasts = [requests[int(rng.integers(0, len(requests)))][-1], 0, -1]
                counts = rng.integers(0, 9, 3).tolist()
                parts = allocator.alloc_each(counts, lasts, slack_pages=int(rng.integers(0, 3)))
                assert (parts is None) == (sum(counts) > allocator.num_pages - len(held))
                assert parts is None or [len(part) for part in parts] == counts
                pages = np.concatenate(parts) if parts and sum(counts) else None
            case 2 if requests:
                growing = [request for request in requests if rng.random() < 0.5]
                before = set(held)
                lasts = [request[-1] if rng.random() < 0.8 else 0 for request in growing]
                pages = allocator.extend(lasts)
                assert (pages is None) == (len(growing) > allocator.num_pages - len(held))
                for request, page, last in zip(
                    growing, [] if pages is None else pages.tolist(), lasts, strict=False
                ):
                    if last and last + 1 <= allocator.num_pages and last + 1 not in before:
                        assert page == last + 1 or last + 1 in pages.tolist()
                    request.append(page)
                if pages is not None:
                    assert not before & set(pages.tolist())
                    assert len(set(pages.tolist())) == len(pages)
                    held |= set(pages.tolist())
                pages = None
            case _ if requests:
                gone = requests.pop(int(rng.integers(0, len(requests))))
                allocator.free(rng.permutation(gone))
                held -= set(gone)
                pages = None
            case _:
                pages = None
        if pages is not None:
            taken = set(pages.tolist())
            assert len(taken) == len(pages)
            assert not taken & held
            held |= taken
            requests.append(pages.tolist())
        _check(allocator, held)
    for request in requests:
        allocator.free(np.array(request))
    assert _segments(allocator) == [(1, allocator.num_pages)]


def test_smallest_segment_that_fits_is_taken() -> None:
    allocator = SegmentAllocator(40)
    whole = allocator.alloc(40)
    assert whole is not None
    for start, length in ((1, 10), (15, 4), (25, 6)):
        allocator.free(np.arange(start, start + length))
    assert allocator.alloc(4).tolist() == [15, 16, 17, 18]  # type: ignore[union-attr]
    assert allocator.alloc(5).tolist() == [25, 26, 27, 28, 29]  # type: ignore[union-attr]


def test_without_a_fit_as_few_segments_as_possible_are_taken() -> None:
    allocator = SegmentAllocator(40)
    allocator.alloc(40)
    for start, length in ((1, 3), (10, 8), (25, 5)):
        allocator.free(np.arange(start, start + length))
    pages = allocator.alloc(12)
    assert pages is not None
    assert pages.tolist() == [*range(10, 18), *range(25, 29)]


def test_room_to_grow_is_kept_around_runs_when_there_is_plenty_and_never_refuses() -> None:
    allocator = SegmentAllocator(30)
    first, second = allocator.alloc(5, slack_pages=3), allocator.alloc(5, slack_pages=3)
    assert first is not None
    assert second is not None
    assert first.tolist() == [1, 2, 3, 4, 5]
    assert second.tolist() == [9, 10, 11, 12, 13]
    assert allocator.extend([5, 13]).tolist() == [6, 14]  # type: ignore[union-attr]
    assert len(allocator.alloc(18, slack_pages=100)) == 18  # type: ignore[arg-type]
    assert allocator.num_free == 0


def test_in_a_batch_those_that_go_on_keep_their_place_and_the_longest_is_placed_first() -> None:
    allocator = SegmentAllocator(40)
    allocator.alloc(40)
    for start, length in ((3, 5), (12, 2), (20, 10)):
        allocator.free(np.arange(start, start + length))
    parts = allocator.alloc_each([3, 2, 7], [0, 2, 0])
    assert parts is not None
    assert [part.tolist() for part in parts] == [[5, 6, 7], [3, 4], [20, 21, 22, 23, 24, 25, 26]]
    assert allocator.alloc_each([3, 3], [0, 0]) is None
    assert allocator.num_free == 5


def test_a_growing_request_leaves_large_segments_whole() -> None:
    allocator = SegmentAllocator(40)
    allocator.alloc(40)
    allocator.free(np.arange(20, 36))
    allocator.free(np.array([3]))
    assert allocator.extend([10]).tolist() == [3]  # type: ignore[union-attr]
    assert _segments(allocator) == [(20, 16)]


def test_requests_that_can_grow_in_place_are_not_robbed_by_others() -> None:
    allocator = SegmentAllocator(10)
    allocator.alloc(10)
    allocator.free(np.array([5, 9]))
    assert allocator.extend([7, 4]).tolist() == [9, 5]  # type: ignore[union-attr]


@rows(
    ("pages", "message"),
    [
        ([0], "page 0 is not one"),
        ([11], "page 11 is not one"),
        ([4, 4], "page 4 is freed twice"),
        ([9], "page 9 is free already"),
    ],
)
def test_pages_that_are_not_held_are_refused_by_name_and_nothing_changes(
    pages: list[int], message: str
) -> None:
    allocator = SegmentAllocator(10)
    allocator.alloc(8)
    before = _segments(allocator)
    with pytest.raises(ValueError, match=message):
        allocator.free(np.array([1, *pages]))
    assert _segments(allocator) == before


@pytest.mark.slow
def test_runs_stay_few_under_churn_where_a_free_list_scatters() -> None:
    """The same trace on both: a list taken from the head and appended to, as SGLang's between sorts."""
    for seed in range(5):
        ours, theirs = _churned_runs(seed)
        assert ours < theirs / 3, (ours, theirs)


def _churned_runs(seed: int) -> tuple[float, float]:
    rng = np.random.default_rng(seed)
    allocator, queue = SegmentAllocator(2000), list(range(1, 2001))
    ours: list[np.ndarray] = []
    theirs: list[np.ndarray] = []
    runs: list[tuple[int, int]] = []
    for turn in range(3000):
        wanted = int(min(200, rng.lognormal(3.0, 0.9))) + 1
        while allocator.num_free < wanted + 60:
            gone = int(rng.integers(0, len(ours)))
            allocator.free(ours.pop(gone))
            queue.extend(theirs.pop(gone).tolist())
        pages = allocator.alloc(wanted, slack_pages=4)
        assert pages is not None
        ours.append(pages)
        theirs.append(np.array(queue[:wanted]))
        del queue[:wanted]
        if turn > 1500:
            runs.append((num_runs(pages, pages), num_runs(theirs[-1], theirs[-1])))
    means = np.mean(runs, axis=0)
    return float(means[0]), float(means[1])
