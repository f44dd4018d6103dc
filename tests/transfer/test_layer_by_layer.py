"""A chunk whose layers are filled one after another: each leaves when it is there, and never before."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

import numpy as np
import pytest

from pdserve.transfer.jobs import ChunkJob, Target
from pdserve.transfer.messages import decode_arrival
from pdserve.transfer.plan import Path, PathCosts
from tests.support import kv_rig
from tests.support.kv_rig import Geometry, Pace, Rig, wait_until

NUM_LAYERS = 6
LAYERED = Geometry(num_regions=2 * NUM_LAYERS, regions_per_layer=2)
TOKENS = 60
ROOM = 5


@pytest.fixture(params=list(Pace), autouse=True)
def pace(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kv_rig, "PACE", request.param)
    monkeypatch.setattr("pdserve.transfer.peer.PART_BYTES", 1)


class Forward:
    """A forward pass that fills the pages of one chunk, layer after layer, when it is told."""

    def __init__(self, rig: Rig, pages: np.ndarray) -> None:
        self._rig, self._pages = rig, pages
        self.num_layers = 0
        self.failure = ""

    def num_filled(self) -> int:
        if self.failure:
            raise RuntimeError(self.failure)
        return 2 * self.num_layers

    def run(self, num_layers: int) -> None:
        """Up to so many layers in all."""
        size = self._rig.prefill.geometry.page_size
        slots = (self._pages[:, None] * size + np.arange(size)).reshape(-1)
        for layer in range(self.num_layers, num_layers):
            for region in (2 * layer, 2 * layer + 1):
                values = self._rig.prefill.pool.rows(region)
                values[slots] = self._rig.rng.integers(
                    0, 256, (len(slots), *values.shape[1:]), dtype=np.uint8
                )
            self.num_layers = layer + 1


class Request:
    """A room in chunks: the last page goes whole, at the end; what comes before goes layer by layer."""

    def __init__(self, rig: Rig, *, path: Path | None, num_chunks: int = 1, num_cached: int = 0) -> None:
        size, target_size = rig.prefill.geometry.page_size, rig.decode.geometry.page_size
        self.rig, self.path = rig, path
        self.source = rig.rng.permutation(np.arange(1, 40))[: TOKENS // size].astype(np.int32)
        self.target = rig.rng.permutation(np.arange(1, rig.decode.geometry.num_pages))
        self.target = self.target[: -(-TOKENS // target_size)].astype(np.int32)
        rig.decode.inbox.expect(ROOM, self.target)
        self.forwards: list[Forward] = []
        if num_cached:
            self._submit(0, num_cached)
        new = len(self.source) - 1 - num_cached
        bounds = [num_cached + new * part // num_chunks for part in range(num_chunks + 1)]
        for begin, end in itertools.pairwise(bounds):
            self.forwards.append(Forward(rig, self.source[begin:end]))
            self._submit(begin, end, num_filled=self.forwards[-1].num_filled)

    def finish(self) -> None:
        """SGLang's own last send."""
        self._submit(len(self.source) - 1, len(self.source), is_last=True)

    def _submit(
        self, begin: int, end: int, *, is_last: bool = False, num_filled: Callable[[], int] | None = None
    ) -> None:
        aux = self.rig.decode.pool.aux_span(2) if is_last else None
        job = self.rig.prefill.job(
            ROOM, self.source[begin:end], begin * self.rig.prefill.geometry.page_size, is_last,
            [Target(self.rig.peer, self.target, aux)], forced_path=self.path, num_filled=num_filled,
        )  # fmt: skip
        self.rig.prefill.outbox.submit(job)


@pytest.fixture
def rig() -> Iterator[Rig]:
    made = Rig(source=LAYERED, target=LAYERED, max_piece_bytes=2 * TOKENS * 48)
    yield made
    made.close()


def _has_sent(rig: Rig, number: int) -> Callable[[], bool]:
    """So many writes have been posted, and have moved their bytes."""
    return lambda: (
        rig.fabric.num_writes >= number
        and not any(
            writes.in_flight
            for lane in list(rig.prefill.outbox._lanes.values())
            for writes in list(lane.writing)
        )
    )


def _is_over(rig: Rig, num_jobs: int) -> Callable[[], bool]:
    return lambda: len(rig.prefill.gate.done) >= num_jobs


@pytest.mark.parametrize("path", [Path.DIRECT, Path.PACKED, None])
def test_each_layer_leaves_while_the_next_ones_are_not_there_yet(rig: Rig, path: Path | None) -> None:
    request = Request(rig, path=path)
    (forward,) = request.forwards
    for layer in range(NUM_LAYERS):
        forward.run(layer + 1)
        wait_until(_has_sent(rig, layer + 1), poll=rig.decode.inbox.poll)
        assert rig.fabric.num_writes == layer + 1, "one write a layer, none ahead of the forward"
    assert not rig.decode.owner.arrived[ROOM], "the last page is not there yet"
    request.finish()
    rig.receive(ROOM)
    rig.check(request.source, request.target, TOKENS)
    rig.settle()


@pytest.mark.parametrize("path", [Path.DIRECT, Path.PACKED])
@pytest.mark.parametrize("page_size", [2, 8])
def test_layers_are_converted_as_they_come(path: Path, page_size: int) -> None:
    target = Geometry(num_regions=2 * NUM_LAYERS, regions_per_layer=2, page_size=page_size, num_pages=80)
    rig = Rig(source=LAYERED, target=target, max_piece_bytes=2 * TOKENS * 48)
    try:
        request = Request(rig, path=path)
        request.forwards[0].run(3)
        wait_until(_has_sent(rig, 3), poll=rig.decode.inbox.poll)
        request.forwards[0].run(NUM_LAYERS)
        request.finish()
        rig.receive(ROOM)
        rig.check(request.source, request.target, TOKENS)
        rig.settle()
    finally:
        rig.close()


@pytest.mark.parametrize("path", [Path.DIRECT, Path.PACKED])
def test_chunks_and_a_cached_prefix_of_one_prompt_go_in_turn(rig: Rig, path: Path) -> None:
    """The prefix that was in the cache goes early and whole, each chunk layer by layer."""
    request = Request(rig, path=path, num_chunks=3, num_cached=4)
    for number, forward in enumerate(request.forwards):
        wait_until(_is_over(rig, 1 + number), poll=rig.decode.inbox.poll)
        for layer in range(NUM_LAYERS):
            forward.run(layer + 1)
            rig.decode.inbox.poll()
    request.finish()
    rig.receive(ROOM)
    rig.check(request.source, request.target, TOKENS)
    rig.settle()


@pytest.mark.parametrize("path", [Path.DIRECT, Path.PACKED])
def test_a_forward_that_is_ahead_of_the_wire_is_sent_in_order(rig: Rig, path: Path) -> None:
    rig.fabric.faults.is_held = True
    request = Request(rig, path=path)
    request.forwards[0].run(NUM_LAYERS)
    request.finish()
    wait_until(lambda: rig.fabric.num_writes >= NUM_LAYERS, poll=rig.decode.inbox.poll)
    assert not rig.decode.owner.arrived[ROOM]
    rig.fabric.faults.is_held = False
    rig.receive(ROOM)
    rig.check(request.source, request.target, TOKENS)
    rig.settle()


@pytest.mark.parametrize("path", [Path.DIRECT, Path.PACKED])
@pytest.mark.parametrize("num_layers", [0, 1, 3])
def test_an_abort_fences_the_layers_on_their_way_and_no_other_leaves(
    rig: Rig, path: Path, num_layers: int
) -> None:
    rig.fabric.faults.is_held = True
    request = Request(rig, path=path)
    (forward,) = request.forwards
    forward.run(num_layers)
    wait_until(lambda: rig.fabric.num_writes >= num_layers)
    rig.prefill.gate.closed.add(ROOM)
    rig.decode.owner.closed.add(ROOM)
    forward.run(NUM_LAYERS)
    if num_layers:
        # Given up without another write; decode keeps the pages until those on their way are over.
        wait_until(lambda: not rig.prefill.outbox._lanes[rig.peer].queue)
        assert rig.prefill.gate.outstanding[ROOM] == 1
    rig.fabric.faults.is_held = False
    wait_until(lambda: ROOM in rig.prefill.gate.failures, poll=rig.decode.inbox.poll)
    assert rig.prefill.gate.failures[ROOM][1]
    assert rig.prefill.gate.outstanding[ROOM] == 0
    assert rig.fabric.num_writes == num_layers
    rig.settle()


def test_an_abort_between_two_layers_is_seen_at_once(rig: Rig) -> None:
    request = Request(rig, path=Path.DIRECT)
    request.forwards[0].run(2)
    wait_until(_has_sent(rig, 2), poll=rig.decode.inbox.poll)
    rig.prefill.gate.closed.add(ROOM)
    wait_until(lambda: ROOM in rig.prefill.gate.failures)
    assert rig.prefill.gate.outstanding[ROOM] == 0, "the next layer may take long"


@pytest.mark.parametrize("path", [Path.DIRECT, Path.PACKED])
def test_a_forward_that_fails_after_some_layers_fails_the_room(rig: Rig, path: Path) -> None:
    request = Request(rig, path=path)
    request.forwards[0].run(2)
    wait_until(_has_sent(rig, 2), poll=rig.decode.inbox.poll)
    request.forwards[0].failure = "out of memory"
    wait_until(lambda: ROOM in rig.prefill.gate.failures, poll=rig.decode.inbox.poll)
    assert rig.prefill.gate.failures[ROOM][0] == "the forward pass failed: out of memory"
    rig.decode.owner.closed.add(ROOM)
    rig.settle()
    assert not rig.decode.owner.arrived[ROOM]


@pytest.mark.parametrize("path", [Path.DIRECT, Path.PACKED])
def test_a_room_misses_each_of_its_layers(rig: Rig, path: Path) -> None:
    """Complete is what is counted: whichever layer's message is lost, the room is not reported."""
    for lost in range(NUM_LAYERS):
        rig.fabric.faults.drops = lambda message, lost=lost: decode_arrival(message).seq == lost  # type: ignore[misc]
        request = Request(rig, path=path)
        request.forwards[0].run(NUM_LAYERS)
        request.finish()
        wait_until(_is_over(rig, 2 * (lost + 1)), poll=rig.decode.inbox.poll)
        for _ in range(20):
            rig.decode.inbox.poll()
        assert not rig.decode.owner.arrived[ROOM], f"layer {lost}"
        rig.decode.inbox.forget(ROOM)


def test_without_a_slot_only_the_layers_that_are_there_go_direct() -> None:
    """A packed chunk that finds no slot free is finished directly: not with layers that are still to come."""
    rig = Rig(source=LAYERED, target=LAYERED, max_piece_bytes=2 * TOKENS * 48, decode_slab_bytes=1 << 13)
    try:
        rig.fabric.faults.holds = lambda message: decode_arrival(message).slab is not None
        request = Request(rig, path=Path.PACKED)
        for layer in range(NUM_LAYERS):
            before = rig.fabric.num_writes
            request.forwards[0].run(layer + 1)
            wait_until(lambda before=before: rig.fabric.num_writes > before, poll=rig.decode.inbox.poll)  # type: ignore[misc]
        request.finish()
        rig.fabric.faults.holds = lambda message: False
        rig.receive(ROOM)
        rig.check(request.source, request.target, TOKENS)
        rig.settle()
    finally:
        rig.close()


def test_what_waits_for_layers_teaches_the_laws_no_compute_time(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[Path, int]] = []
    monkeypatch.setattr(
        PathCosts, "observe", lambda _, path, items, nbytes, seconds: seen.append((path, nbytes))
    )
    for number, path in enumerate((Path.PACKED, Path.DIRECT)):
        request = Request(rig, path=path)
        request.forwards[0].run(NUM_LAYERS)
        wait_until(_is_over(rig, 2 * number + 1), poll=rig.decode.inbox.poll)
        wait_until(lambda: rig.prefill.runner.num_due == 0, poll=rig.decode.inbox.poll)
        expected = NUM_LAYERS if path is Path.DIRECT else 0
        assert seen == [(Path.DIRECT, (TOKENS - 4) * 48 * 2)] * expected, "each part by itself"
        request.finish()
        rig.receive(ROOM)
        rig.settle()
        seen.clear()
        rig.decode.owner.arrived.clear()


def test_small_layers_travel_together(monkeypatch: pytest.MonkeyPatch) -> None:
    layer_bytes = (TOKENS - 4) * 48 * 2
    monkeypatch.setattr("pdserve.transfer.peer.PART_BYTES", 2 * layer_bytes)
    rig = Rig(source=LAYERED, target=LAYERED)
    try:
        request = Request(rig, path=Path.DIRECT)
        for layer in range(NUM_LAYERS):
            request.forwards[0].run(layer + 1)
            wait_until(_has_sent(rig, (layer + 1) // 2), poll=rig.decode.inbox.poll)
        assert rig.fabric.num_writes == NUM_LAYERS // 2
        request.finish()
        rig.receive(ROOM)
        rig.check(request.source, request.target, TOKENS)
    finally:
        rig.close()


def _job(**kwargs: object) -> ChunkJob:
    return ChunkJob(
        room=1,
        pages=np.zeros(1, dtype=np.int32),
        first_token=0,
        is_last=False,
        targets=[],
        **kwargs,  # type: ignore[arg-type]
    )


def test_a_chunk_without_layers_is_filled_when_it_is_ready() -> None:
    from pdserve.transfer.engine import PeerName
    from pdserve.transfer.jobs import RankWrites

    target = Target(PeerName("d"), np.zeros(1, dtype=np.int32))
    assert RankWrites(_job(), target).is_filled
    assert not RankWrites(_job(num_filled=lambda: 0), target).is_filled
