"""Outbox to inbox over the loopback engine: every path moves exactly the bytes asked, whatever goes wrong."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from pdserve.transfer.engine import PeerName
from pdserve.transfer.jobs import Target
from pdserve.transfer.messages import decode_arrival
from pdserve.transfer.plan import Path
from tests.support import kv_rig
from tests.support.kv_rig import SAME, DecodeRank, Geometry, Pace, PrefillRank, Rig, make_fabric, wait_until
from tests.support.rows import rows


@pytest.fixture(autouse=True, params=list(Pace))
def pace(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every test of this file runs with copies and writes that are over at once, late, and in any order."""
    monkeypatch.setattr(kv_rig, "PACE", request.param)


@pytest.fixture
def rig() -> Iterator[Rig]:
    made = Rig()
    yield made
    made.close()


@rows("path", [Path.DIRECT, Path.PACKED, None])
@rows("chunks", [1, 3])
def test_every_path_moves_exactly_the_rooms_tokens(path: Path | None, chunks: int) -> None:
    for seed in range(4):
        rig = Rig(seed)
        try:
            tokens = int(rig.rng.integers(1, 100))
            before = rig.decode.pool.snapshot()
            source, target = rig.send(7, tokens, path=path, chunks=min(chunks, -(-tokens // 4)))
            rig.receive(7)
            rig.check(source, target, tokens)
            rig.settle()
            _assert_only_pages_changed(rig, before, target)
            assert rig.decode.owner.arrived[7] == [0]
        finally:
            rig.close()


def _assert_only_pages_changed(rig: Rig, before: list[np.ndarray], target: np.ndarray) -> None:
    size = rig.decode.geometry.page_size
    touched = (target[:, None] * size + np.arange(size)).reshape(-1)
    after = rig.decode.pool.snapshot()
    for region, (old, new) in enumerate(zip(before, after, strict=True)):
        start, stride = rig.decode.pool._starts[region], rig.decode.pool.regions.token_stride
        mask = np.ones(len(old), dtype=bool)
        for slot in touched:
            mask[start + slot * stride : start + slot * stride + rig.decode.pool.regions.row_bytes] = False
        np.testing.assert_array_equal(old[mask], new[mask])


@rows(
    ("source", "target"),
    [
        (Geometry(page_size=4), Geometry(page_size=8)),
        (Geometry(page_size=16, num_pages=12), Geometry(page_size=1, num_pages=160)),
        (Geometry(page_size=3), Geometry(page_size=5)),
        (Geometry(gap_bytes=16), Geometry(gap_bytes=0)),
        (Geometry(head_bytes=6), Geometry(head_bytes=6, gap_bytes=10)),
        (
            Geometry(num_kv_heads=4, total_kv_heads=4),
            Geometry(num_kv_heads=2, total_kv_heads=4, tp_size=2, tp_rank=1),
        ),
    ],
)  # fmt: skip
def test_other_geometry_is_converted_while_scattering(source: Geometry, target: Geometry) -> None:
    for seed in range(3):
        rig = Rig(seed, source, target, max_piece_bytes=1000)
        try:
            tokens = int(rig.rng.integers(1, 90))
            before = rig.decode.pool.snapshot()
            pages, wanted = rig.send(3, tokens, chunks=min(2, -(-tokens // source.page_size)))
            rig.receive(3)
            first = target.tp_rank * target.num_kv_heads if source.num_kv_heads > target.num_kv_heads else 0
            for region in range(source.num_regions):
                np.testing.assert_array_equal(
                    rig.prefill.pool.tokens(region, pages, tokens)[:, first : first + target.num_kv_heads],
                    rig.decode.pool.tokens(region, wanted, tokens),
                )
            rig.settle()
            _assert_only_pages_changed(rig, before, wanted)
        finally:
            rig.close()


def test_fewer_decode_ranks_collect_heads_of_all_prefill_ranks() -> None:
    rng = np.random.default_rng(5)
    fabric = make_fabric()
    decode = DecodeRank(fabric.engine("d"), Geometry(num_kv_heads=4, total_kv_heads=4), rng)
    ranks = [
        PrefillRank(
            fabric.engine(f"p{rank}"), Geometry(total_kv_heads=4, tp_size=2, tp_rank=rank), rng, rank=rank
        )
        for rank in range(2)
    ]
    source, target = np.array([5, 2, 9], dtype=np.int32), np.array([3, 8, 1], dtype=np.int32)
    decode.inbox.expect(11, target)
    for rank in ranks:
        peer = rank.connect(decode)
        rank.outbox.start()
        rank.outbox.submit(rank.job(11, source, 0, True, [Target(peer, target, decode.pool.aux_span(2))]))
    wait_until(lambda: len(decode.owner.arrived[11]) == 2, poll=decode.inbox.poll)
    for rank in ranks:
        rank.outbox.close()
    assert sorted(decode.owner.arrived[11]) == [0, 1]
    for region in range(4):
        expected = np.concatenate([rank.pool.tokens(region, source, 12) for rank in ranks], axis=1)
        np.testing.assert_array_equal(decode.pool.tokens(region, target, 12), expected)


@pytest.mark.parametrize("repeats", [1, 3])
@pytest.mark.parametrize("path", [Path.DIRECT, Path.PACKED])
def test_messages_in_any_order_and_repeated_complete_a_room_once(rig: Rig, path: Path, repeats: int) -> None:
    rig.fabric.faults.is_reversed = True
    rig.fabric.faults.repeats = repeats
    source, target = rig.send(5, 77, path=path, chunks=4)
    wait_until(lambda: len(rig.prefill.gate.done) == 4)
    rig.receive(5)
    rig.decode.inbox.poll()
    assert rig.decode.owner.arrived[5] == [0]
    rig.check(source, target, 77)
    rig.settle()


def test_a_lost_message_fails_the_room_in_time_and_its_slab_piece_comes_back() -> None:
    rig = Rig(arrival_timeout_s=0.2, credit_timeout_s=0.2)
    try:
        rig.fabric.faults.drops = lambda message: decode_arrival(message).seq == 1
        rig.send(9, 90, path=Path.PACKED)
        rig.decode.inbox.start()
        wait_until(lambda: 9 in rig.decode.owner.failures)
        assert "did not arrive" in rig.decode.owner.failures[9]
        rig.settle()
    finally:
        rig.decode.inbox.close()
        rig.close()


def test_a_failed_write_fails_the_chunk_after_its_other_writes_settled(rig: Rig) -> None:
    rig.fabric.faults.fails = lambda message: decode_arrival(message).seq == 2
    rig.send(4, 90, path=Path.PACKED)
    wait_until(lambda: 4 in rig.prefill.gate.failures, poll=rig.decode.inbox.poll)
    reason, settled = rig.prefill.gate.failures[4]
    assert "failed" in reason
    assert settled
    assert rig.prefill.gate.outstanding[4] == 0
    assert not rig.decode.owner.arrived[4]


def test_a_room_closed_before_its_turn_is_not_written(rig: Rig) -> None:
    rig.prefill.gate.closed.add(6)
    before = rig.decode.pool.snapshot()
    rig.send(6, 50)
    wait_until(lambda: 6 in rig.prefill.gate.failures)
    rig.settle()
    assert rig.fabric.num_writes == 0
    for old, new in zip(before, rig.decode.pool.snapshot(), strict=True):
        np.testing.assert_array_equal(old, new)


def test_a_room_closed_while_its_writes_are_held_is_uncounted_only_when_they_settle(rig: Rig) -> None:
    rig.fabric.faults.is_held = True
    rig.send(6, 90, path=Path.PACKED)
    wait_until(lambda: rig.fabric.num_writes > 0)
    rig.prefill.gate.closed.add(6)
    rig.decode.owner.closed.add(6)
    assert rig.prefill.gate.outstanding[6] == 1
    before = rig.decode.pool.snapshot()
    rig.fabric.faults.is_held = False
    rig.settle()
    for old, new in zip(before, rig.decode.pool.snapshot(), strict=True):
        np.testing.assert_array_equal(old, new)
    assert rig.decode.inbox.stats.num_scattered == 0


def test_a_forgotten_room_is_not_scattered_and_its_space_comes_back(rig: Rig) -> None:
    rig.fabric.faults.is_held = True
    rig.send(6, 90, path=Path.PACKED)
    wait_until(lambda: rig.fabric.num_writes > 0)
    rig.decode.inbox.forget(6)
    before = rig.decode.pool.snapshot()
    rig.fabric.faults.is_held = False
    rig.settle()
    for old, new in zip(before, rig.decode.pool.snapshot(), strict=True):
        np.testing.assert_array_equal(old, new)
    assert rig.decode.inbox.stats.num_stray > 0


def test_a_room_is_a_success_only_after_its_earlier_chunks_whatever_ends_first(rig: Rig) -> None:
    rig.fabric.faults.holds = lambda message: decode_arrival(message).seq == 0
    rig.send(6, 48, path=Path.DIRECT, chunks=3)
    wait_until(lambda: rig.prefill.outbox._lanes[rig.peer].num_in_flight == 1)
    assert not rig.prefill.gate.done
    rig.fabric.faults.holds = lambda message: False
    rig.receive(6)
    rig.settle()
    assert [job.is_last for job in rig.prefill.gate.done] == [False, False, True]


def test_a_full_window_ends_in_direct_writes_not_in_a_wait() -> None:
    # Nobody polls the inbox, so no credit ever comes back while the chunk is sent.
    rig = Rig(decode_slab_bytes=8192)
    try:
        source, target = rig.send(8, 150, path=Path.PACKED)
        wait_until(lambda: bool(rig.prefill.gate.done))
        record = rig.prefill.gate.done[0].record
        assert record.num_writes > 2
        assert rig.prefill.outbox.num_due > 0
        rig.receive(8)
        rig.check(source, target, 150)
        rig.settle()
    finally:
        rig.close()


def test_a_full_window_waits_for_credits_when_only_packed_works() -> None:
    rig = Rig(1, Geometry(), Geometry(page_size=8), decode_slab_bytes=8192)
    try:
        source, target = rig.send(8, 150)
        wait_until(lambda: rig.fabric.num_writes >= 1)
        assert not rig.prefill.gate.done
        rig.receive(8)
        rig.check(source, target, 150)
        rig.settle()
    finally:
        rig.close()


@pytest.mark.parametrize("path", [Path.DIRECT, Path.PACKED])
def test_a_peer_that_refuses_posts_fails_its_room_and_leaves_others_alone(rig: Rig, path: Path) -> None:
    rig.fabric.faults.refuses = lambda message: decode_arrival(message).room == 1
    rig.send(1, 60, path=path)
    source, target = rig.send(2, 60, path=path)
    rig.receive(2)
    rig.check(source, target, 60)
    wait_until(lambda: 1 in rig.prefill.gate.failures)
    rig.settle()


def test_a_peer_that_dies_fails_its_chunks_and_frees_the_source_slab(rig: Rig) -> None:
    rig.fabric.faults.is_held = True
    rig.send(1, 90, path=Path.PACKED)
    wait_until(lambda: rig.fabric.num_writes > 0)
    rig.decode.engine.close()
    rig.fabric.faults.is_held = False
    wait_until(lambda: 1 in rig.prefill.gate.failures)
    assert rig.prefill.gate.failures[1][1]
    wait_until(lambda: rig.prefill.runner.num_source_held == 0)
    rig.peer = PeerName("never-connected")
    rig.send(2, 10)
    wait_until(lambda: 2 in rig.prefill.gate.failures)
    assert "not connected" in rig.prefill.gate.failures[2][0]


def test_a_chunk_waits_for_its_forward_pass_without_holding_up_other_rooms(rig: Rig) -> None:
    is_filled = False
    source = np.array([1, 2, 3], dtype=np.int32)
    target = np.array([4, 5, 6], dtype=np.int32)
    rig.decode.inbox.expect(1, target)
    job = rig.prefill.job(1, source, 0, True, [Target(rig.peer, target, rig.decode.pool.aux_span(3))],
                          is_ready=lambda: is_filled)  # fmt: skip
    rig.prefill.outbox.submit(job)
    rig.send(2, 20)
    rig.receive(2)
    assert not rig.decode.owner.arrived[1]
    is_filled = True
    rig.receive(1)


def test_peers_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(1)
    fabric = make_fabric()
    prefill = PrefillRank(fabric.engine("p"), SAME, rng, max_piece_bytes=500)
    decodes = [DecodeRank(fabric.engine(f"d{number}"), SAME, rng) for number in range(2)]
    peers = [prefill.connect(decode) for decode in decodes]
    order: list[int] = []
    gather = prefill.runner._copier.gather_pages
    monkeypatch.setattr(
        prefill.runner._copier, "gather_pages",
        lambda pages, *args: (order.append(int(pages[0])), gather(pages, *args))[1],
    )  # fmt: skip
    for room, (peer, decode) in enumerate(zip(peers, decodes, strict=True), start=1):
        pages = np.arange(room, room + 30, dtype=np.int32)
        decode.inbox.expect(room, pages)
        target = Target(peer, pages, decode.pool.aux_span(2))
        prefill.outbox.submit(prefill.job(room, pages, 0, True, [target], forced_path=Path.PACKED))
    prefill.outbox.start()
    wait_until(lambda: len(prefill.gate.done) == 2)
    prefill.outbox.close()
    assert order[:6] in ([1, 2] * 3, [2, 1] * 3)


def test_an_error_nobody_foresaw_ends_its_own_room_and_no_other(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Raised where a CUDA error would be: by the forward pass's event, and by a copier on either side."""

    def broken() -> bool:
        raise RuntimeError("CUDA error: an illegal memory access")

    pages = np.array([1, 2], dtype=np.int32)
    rig.decode.inbox.expect(1, pages)
    target = Target(rig.peer, pages, rig.decode.pool.aux_span(2))
    rig.prefill.outbox.submit(rig.prefill.job(1, pages, 0, True, [target], is_ready=broken))
    wait_until(lambda: 1 in rig.prefill.gate.failures)
    assert "illegal memory access" in rig.prefill.gate.failures[1][0]

    original = rig.prefill.runner._copier.gather_pages
    monkeypatch.setattr(rig.prefill.runner._copier, "gather_pages", lambda *args: broken())
    rig.send(2, 40, path=Path.PACKED)
    wait_until(lambda: 2 in rig.prefill.gate.failures)
    monkeypatch.setattr(rig.prefill.runner._copier, "gather_pages", original)

    original = rig.decode.inbox._copier.scatter_pages
    monkeypatch.setattr(rig.decode.inbox._copier, "scatter_pages", lambda *args: broken())
    rig.send(3, 40, path=Path.PACKED)
    wait_until(lambda: 3 in rig.decode.owner.failures, poll=rig.decode.inbox.poll)
    monkeypatch.setattr(rig.decode.inbox._copier, "scatter_pages", original)

    source, pages = rig.send(4, 40, path=Path.PACKED)
    rig.receive(4)
    rig.check(source, pages, 40)
    rig.settle()
