"""On a GPU a freed page is announced to nobody while a forward may still write it; the host never waits."""

from __future__ import annotations

import random
from typing import Any

import pytest

from tests.support.rows import rows

torch = pytest.importorskip("torch", reason="torch is not installed")
pytestmark = pytest.mark.slow

SIZE = 16


def _make(kind: str, num_pages: int) -> Any:
    from tests.support.device_allocator import LateStream, make_allocator

    allocator = make_allocator(kind, num_pages, SIZE)
    if kind == "device":
        allocator.forward_stream, allocator.schedule = LateStream(), LateStream()
    return allocator


def _prompt(allocator: Any, num_tokens: int, *, prefix: int = 0, last: int = -1) -> Any:
    from tests.support.device_allocator import on_device

    before, after = torch.tensor([prefix]), torch.tensor([prefix + num_tokens])
    return allocator.alloc_extend(
        on_device(before), before, on_device(after), after, on_device([last]), num_tokens
    )


def _pages(slots: Any) -> list[int]:
    return sorted({slot // SIZE for slot in slots.as_subclass(torch.Tensor).tolist()})


def _free(allocator: Any, slots: Any) -> None:
    allocator.free_segment(slots, start_pos=0)


@rows(("kind", "num_pages"), [("stock", 4096), ("device", 4096), ("device", 600)])
def test_a_page_freed_at_a_step_is_in_no_page_list_announced_before_that_step_is_over(
    kind: str, num_pages: int
) -> None:
    """600 requests end while their step runs, each in the very step that a new prompt is admitted in."""
    rng = random.Random(0)
    allocator = _make(kind, num_pages)
    live: list[Any] = []
    freed_at: dict[int, int] = {}
    step = num_early = 0
    while allocator.available_size() > num_pages * SIZE // 2:
        live.append(_prompt(allocator, rng.choice((200, 500, 1000, 2000))))
    for step in range(1, 601):
        if kind == "device":
            allocator.forward_stream.finish()
            allocator.schedule.finish()
            allocator.forward_stream.launch()
        gone = live.pop(rng.randrange(len(live)))
        freed_at.update((page, step) for page in _pages(gone))
        _free(allocator, gone)
        tokens = rng.choice((200, 500, 1000, 2000))
        while allocator.available_size() < tokens + SIZE:
            gone = live.pop(0)
            freed_at.update((page, step) for page in _pages(gone))
            _free(allocator, gone)
        new = _prompt(allocator, tokens)
        # What the device waits for before decode reads the page ids is announced after it.
        waited = max((wait.position for wait in getattr(allocator, "waits", ())), default=0)
        num_early += any(freed_at.get(page) == step and waited < step for page in _pages(new))
        live.append(new)
    assert num_early == 0


def test_nothing_is_read_back_from_the_device_while_pages_come_and_go() -> None:
    from tests.support.device_allocator import OnDevice

    num_reads = {}
    for kind in ("stock", "device"):
        allocator, slots = _make(kind, 64), []
        OnDevice.num_reads = 0
        for turn in range(200):
            if kind == "device" and turn % 3 == 0:
                allocator.forward_stream.finish()
                allocator.schedule.finish()
                allocator.forward_stream.launch()
            while allocator.available_size() < 13 * SIZE:
                _free(allocator, slots.pop(0))
            head = _prompt(allocator, 100)
            slots.append(torch.cat((head, _prompt(allocator, 90, prefix=100, last=head[-1:]))))
            last = slots[-1][-1:]
            length = torch.tensor([191])
            allocator.alloc_decode(length, length, last)
        num_reads[kind] = OnDevice.num_reads
    assert num_reads == {"stock": 0, "device": 0}


def test_cooled_pages_join_their_neighbours_and_hot_ones_are_the_last_resort() -> None:
    allocator = _make("device", 12)
    first, second = _prompt(allocator, 4 * SIZE), _prompt(allocator, 4 * SIZE)
    allocator.forward_stream.launch()
    _free(allocator, first)
    assert allocator.available_size() == 8 * SIZE
    assert _pages(_prompt(allocator, 4 * SIZE)) == [9, 10, 11, 12]
    assert not allocator.waits
    hot = _prompt(allocator, 2 * SIZE)
    assert _pages(hot) == [1, 2]
    assert [wait.stream for wait in allocator.waits] == [allocator.forward_stream]
    _free(allocator, second)
    allocator.forward_stream.finish()
    assert allocator.available_size() == 6 * SIZE
    assert _pages(_prompt(allocator, 2 * SIZE)) == [3, 4], "the host has not got their ids yet"
    allocator.schedule.finish()
    assert _pages(_prompt(allocator, 4 * SIZE)) == [5, 6, 7, 8]
    assert allocator.available_size() == 0
    assert _prompt(allocator, 1) is None


def test_a_refused_allocation_leaves_hot_pages_where_they_were() -> None:
    allocator = _make("device", 8)
    slots = _prompt(allocator, 8 * SIZE)
    allocator.forward_stream.launch()
    _free(allocator, slots)
    with pytest.raises(TypeError):
        allocator.alloc_extend(None, torch.tensor([0]), None, torch.tensor([40]), None, 40)
    assert allocator.available_size() == 8 * SIZE
    assert _pages(_prompt(allocator, 8 * SIZE)) == list(range(1, 9))


def test_sglang_tells_the_allocator_which_stream_its_forwards_run_on() -> None:
    from types import SimpleNamespace

    from pdserve.plugin.patches import name_forward_stream

    allocator = _make("segment", 8)
    target, draft = SimpleNamespace(forward_stream="target's"), SimpleNamespace(forward_stream="draft's")
    assert name_forward_stream(lambda _: allocator, target) is allocator
    assert name_forward_stream(lambda _: allocator, draft).forward_stream == "target's"
    stock = _make("stock", 8)
    assert not hasattr(name_forward_stream(lambda _: stock, target), "forward_stream")
