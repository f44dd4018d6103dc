"""Costs are learnt, the quicker path is taken, and a plan's pieces tile the chunk exactly."""

from __future__ import annotations

import numpy as np
import pytest

from pdserve.errors import ProtocolMismatch
from pdserve.transfer.inbox import ArrivalCounter
from pdserve.transfer.messages import (
    PROTOCOL_VERSION,
    Arrival,
    Ask,
    Credit,
    Grant,
    PeerOffer,
    Void,
    decode_arrival,
    decode_control,
    decode_offer,
    encode,
)
from pdserve.transfer.plan import GPU_COPY_S, HOST_COPY_S, LinearCost, Path, PathCosts, split_pieces
from tests.support.rows import rows


@rows(("alpha_s", "beta_s"), [(1e-5, 1e-10), (2e-6, 4e-10), (3e-5, 2e-10)])
def test_law_is_found_from_noisy_transfers_of_mixed_sizes(alpha_s: float, beta_s: float) -> None:
    rng = np.random.default_rng(1)
    cost = LinearCost(3e-6, 1e-10)
    for _ in range(60):
        items, nbytes = int(rng.integers(1, 5000)), int(rng.integers(1_000, 50_000_000))
        cost.observe(items, nbytes, (alpha_s * items + beta_s * nbytes) * float(rng.normal(1.0, 0.05)))
    for items, nbytes in ((10, 10_000_000), (4000, 2_000_000), (2000, 40_000_000)):
        expected = alpha_s * items + beta_s * nbytes
        assert cost.predict_s(items, nbytes) == pytest.approx(expected, rel=0.1)


def test_law_never_goes_negative_whatever_is_measured() -> None:
    rng = np.random.default_rng(2)
    cost = LinearCost(3e-6, 1e-10)
    for _ in range(300):
        cost.observe(int(rng.integers(1, 100)), int(rng.integers(1, 10**7)), float(rng.exponential(0.01)))
        assert cost.per_item_s >= 0
        assert cost.per_byte_s >= 0
        assert cost.predict_s(5, 1000) >= 0


def test_law_follows_a_link_that_becomes_slower() -> None:
    cost = LinearCost(3e-6, 1e-10)
    for speed in (1e-10, 8e-10):
        for size in [10**6, 10**7] * 60:
            cost.observe(10, size, 3e-5 + speed * size)
    assert cost.predict_s(10, 10**7) == pytest.approx(8e-3, rel=0.1)


def test_path_with_the_lower_expected_time_is_taken() -> None:
    costs = PathCosts()
    for _ in range(40):
        costs.observe(Path.DIRECT, 100, 10**7, 100 * 1e-5 + 10**7 * 1e-10)
        costs.observe(Path.DIRECT, 5000, 10**7, 5000 * 1e-5 + 10**7 * 1e-10)
        costs.observe(Path.PACKED, 5, 10**7, 5 * 1e-4 + 10**7 * 3e-10)
    assert costs.choose(10**7, 7000, 5) is Path.PACKED
    assert costs.choose(10**7, 60, 5) is Path.DIRECT


LINKS = {
    "NVLink, cuda_ipc": (3e-6, 300e9, 64, 1e-12, 80e-6),
    "NVLink, few runs": (3e-6, 300e9, 16, 1e-12, 80e-6),
    "RDMA 50 GB/s, 0.2 us": (0.2e-6, 50e9, 512, 1e-12, 80e-6),
    "RDMA 50 GB/s, 0.6 us": (0.6e-6, 50e9, 64, 1e-12, 80e-6),
    "RDMA 12 GB/s": (0.6e-6, 12e9, 128, 1e-12, 80e-6),
    "RDMA 12 GB/s, few runs": (0.6e-6, 12e9, 16, 1e-12, 80e-6),
    "host memory": (3e-6, 10e9, 30, 0.75e-10, 150e-6),
    "host memory, scattered": (3e-6, 10e9, 500, 0.75e-10, 150e-6),
    "slow copies": (3e-6, 10e9, 100, 4e-10, 150e-6),
}
"""Seconds a descriptor, bytes/s, runs of 8192 tokens, seconds a copied byte, seconds a piece."""


@rows("name", LINKS)
@rows("tokens", [500, 2000, 8192])
def test_whatever_the_link_the_better_path_is_found(name: str, tokens: int) -> None:
    """From the warm-up's two probes on; mean of 400 requests is at most 1.1 of the better path."""
    alpha_s, rate, runs, copy_s, piece_s = LINKS[name]
    believed_s = GPU_COPY_S if copy_s < 1e-11 else HOST_COPY_S

    def truth(path: Path, items: int, nbytes: int) -> float:
        per_item_s = alpha_s if path is Path.DIRECT else piece_s
        return per_item_s * items + nbytes / rate + (2 * copy_s * nbytes if path is Path.PACKED else 0)

    costs = PathCosts(copy_s_per_byte=believed_s)
    for items, nbytes in ((1, 1 << 20), (128, 128 * 4096)):
        costs.observe(Path.DIRECT, items, nbytes, truth(Path.DIRECT, items, nbytes))
    nbytes, total_s = tokens * 160 * 256, 0.0
    items = {Path.DIRECT: max(1, runs * tokens // 8192) * 160, Path.PACKED: -(-nbytes // (32 << 20))}
    for _ in range(400):
        path = costs.choose(nbytes, items[Path.DIRECT], items[Path.PACKED])
        seconds = truth(path, items[path], nbytes)
        costs.observe(path, items[path], nbytes, seconds)
        total_s += seconds
    best_s = min(truth(path, items[path], nbytes) for path in Path)
    assert total_s / 400 <= 1.1 * best_s


def test_a_link_that_changes_is_noticed_on_the_path_not_taken() -> None:
    costs = PathCosts()
    for _ in range(40):
        costs.observe(Path.DIRECT, 100, 10**7, 1e-3)
        costs.observe(Path.DIRECT, 5000, 10**7, 9e-3)
        costs.observe(Path.PACKED, 5, 10**7, 4e-3)
    assert costs.choose(10**7, 5000, 5) is Path.PACKED
    for _ in range(2000):
        if costs.choose(10**7, 5000, 5) is Path.DIRECT:
            costs.observe(Path.DIRECT, 5000, 10**7, 2e-3)
        else:
            costs.observe(Path.PACKED, 5, 10**7, 4e-3)
    assert [costs.choose(10**7, 5000, 5) for _ in range(9)].count(Path.DIRECT) >= 8


@rows("seed", range(25))
def test_pieces_tile_regions_and_tokens_exactly(seed: int) -> None:
    rng = np.random.default_rng(seed)
    regions, tokens, nbytes = int(rng.integers(1, 70)), int(rng.integers(1, 300)), int(rng.integers(1, 600))
    unit, limit = int(rng.integers(1, 33)), int(rng.integers(1, 200_000))
    pieces = split_pieces(
        num_regions=regions, num_tokens=tokens, slice_offset=3, slice_bytes=nbytes,
        piece_bytes=limit, token_unit=unit,
    )  # fmt: skip
    covered = np.zeros((regions, tokens), dtype=int)
    for piece in pieces:
        begin = piece.first_token
        covered[piece.region_begin :][: piece.num_regions, begin : begin + piece.num_tokens] += 1
        assert piece.nbytes <= max(limit, nbytes)
        assert begin % unit == 0 or unit * nbytes > limit
    assert (covered == 1).all()


def test_room_completes_once_in_any_order_with_repeats() -> None:
    rng = np.random.default_rng(3)
    for _ in range(50):
        counter = ArrivalCounter()
        counter.expect(1)
        total = int(rng.integers(1, 20))
        arrivals = [*range(total), *rng.integers(0, total, 5).tolist()]
        completions = 0
        for seq in rng.permutation(arrivals).tolist():
            if counter.claim(1, 0, seq):
                completions += counter.count(1, 0, total if seq == total - 1 else 0)
        assert completions == 1
        assert not counter.missing(1)


def test_ranks_of_a_room_complete_on_their_own() -> None:
    counter = ArrivalCounter()
    counter.expect(1)
    assert counter.claim(1, 0, 0)
    assert counter.claim(1, 1, 1)
    assert counter.count(1, 0, 1)
    assert not counter.count(1, 1, 2)
    assert counter.missing(1) == {1: 1}
    assert counter.claim(1, 1, 0)
    assert counter.count(1, 1, 0)


def test_rooms_not_expected_are_nobodys() -> None:
    counter = ArrivalCounter()
    assert not counter.claim(5, 0, 0)
    assert not counter.count(5, 0, 1)
    counter.expect(5)
    counter.forget(5)
    assert not counter.claim(5, 0, 0)
    assert not counter.is_expected(5)


def _offer(version: int = PROTOCOL_VERSION) -> PeerOffer:
    return PeerOffer(
        version=version, instance_id="x", bases=(1, 2**63 + 5), num_pages=3, page_size=16, row_bytes=8,
        token_stride=8, num_kv_heads=1, total_kv_heads=1, tp_size=1, tp_rank=0, memory="DRAM", device=0,
        holder=3, slab_address=2**63, slot_bytes=10, grants=(Grant(1, 0), Grant(2, 1)),
    )  # fmt: skip


def test_messages_survive_the_wire() -> None:
    arrival = Arrival(room=2**63 - 1, rank=3, seq=7, total=9)
    assert decode_arrival(encode(arrival)) == arrival
    credit = Credit(agent="a", holder=1, over=[4, 5], grants=[Grant(6, 1)], recall=[3])
    for control in (credit, Void(holder=2, leases=[]), Ask(holder=2, num_slots=7)):
        assert decode_control(encode(control)) == control
    assert decode_offer(encode(_offer())) == _offer()


@rows("raw", [b"", b"\xff\x00", b"GUARD", encode(_offer())[:20]])
def test_anything_else_is_refused_by_name(raw: bytes) -> None:
    for decode in (decode_arrival, decode_control, decode_offer):
        with pytest.raises(ProtocolMismatch, match="not a data-plane message"):
            decode(raw)


def test_another_protocol_version_is_refused() -> None:
    with pytest.raises(ProtocolMismatch, match="version 99"):
        decode_offer(encode(_offer(99)))
