"""Prefill ranks share a decode rank's slab slot by slot: all get through, whoever hangs or dies."""

from __future__ import annotations

import numpy as np

from pdserve.transfer import slots, steps
from pdserve.transfer.jobs import Target
from pdserve.transfer.messages import Grant, decode_arrival
from pdserve.transfer.plan import Path
from pdserve.transfer.slots import FIRST_GRANTS, NUM_SLOTS, QUARANTINE_S, GrantedSlots, Slab, SlotLender
from tests.support.kv_rig import DecodeRank, Geometry, PrefillRank, make_fabric, wait_until
from tests.support.rows import rows

CONVERTED = Geometry(page_size=8, num_pages=40)


class Clock:
    """Time as a test sets it."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def _lender(num_slots: int = NUM_SLOTS) -> tuple[SlotLender, Clock]:
    clock = Clock()
    return SlotLender(Slab(4096, num_slots * 256, 256), clock), clock


def _prefills(fabric: object, count: int, rng: np.random.Generator) -> list[PrefillRank]:
    return [
        PrefillRank(fabric.engine(f"p{rank}"), Geometry(), rng, slab_bytes=1 << 15, rank=rank)  # type: ignore[attr-defined]
        for rank in range(count)
    ]


def _turn(ranks: list[PrefillRank], decode: DecodeRank, condition: object) -> None:
    for _ in range(20_000):
        for rank in ranks:
            rank.outbox.turn()
        decode.inbox.poll()
        if condition():  # type: ignore[operator]
            return
    raise AssertionError("not reached")


@rows("num_ranks", [1, 16, 64])
def test_ranks_that_all_write_at_once_all_get_through_and_every_byte_arrives(num_ranks: int) -> None:
    """Pages of 4 to pages of 8, so all of it needs slots, of which there are 32."""
    rng, fabric = np.random.default_rng(3), make_fabric()
    geometry = Geometry(page_size=8, num_pages=2 + 9 * num_ranks)
    decode = DecodeRank(fabric.engine("d"), geometry, rng, slab_bytes=NUM_SLOTS * 4096)
    ranks = _prefills(fabric, num_ranks, rng)
    pages = np.array([3, 1, 9, 4, 2, 7], dtype=np.int32)
    rooms = []
    for number, rank in enumerate(ranks):
        peer = rank.connect(decode)
        for turn in range(3):
            first = 1 + 9 * number + 3 * turn
            target = np.arange(first, first + 3, dtype=np.int32)
            rooms.append((first, rank, target))
            decode.inbox.expect(first, target)
            aux = decode.pool.aux_span(2)
            rank.outbox.submit(rank.job(first, pages, 0, True, [Target(peer, target, aux)]))
    _turn(ranks, decode, lambda: all(decode.owner.arrived[room] for room, _, _ in rooms))
    for _, rank, target in rooms:
        for region in range(4):
            np.testing.assert_array_equal(
                rank.pool.tokens(region, pages, 24), decode.pool.tokens(region, target, 24)
            )
    _turn(ranks, decode, lambda: not any(rank.outbox.num_due for rank in ranks))


def test_a_decode_rank_that_hangs_does_not_starve_the_others() -> None:
    rng, fabric = np.random.default_rng(0), make_fabric()
    prefill = PrefillRank(fabric.engine("p"), Geometry(num_pages=200), rng, slab_bytes=1 << 16)
    decodes = [DecodeRank(fabric.engine(f"d{number}"), CONVERTED, rng) for number in range(2)]
    peers = [prefill.connect(decode) for decode in decodes]
    fabric.faults.holds = lambda message: decode_arrival(message).room < 10
    pages, target = np.arange(1, 31, dtype=np.int32), np.arange(1, 16, dtype=np.int32)
    for room in range(1, 10):
        decodes[0].inbox.expect(room, target)
        aux = decodes[0].pool.aux_span(2)
        prefill.outbox.submit(prefill.job(room, pages, 0, True, [Target(peers[0], target, aux)]))
    for room in range(10, 100):
        decodes[1].inbox.expect(room, target)
        aux = decodes[1].pool.aux_span(2)
        prefill.outbox.submit(prefill.job(room, pages, 0, True, [Target(peers[1], target, aux)]))
    _turn([prefill], decodes[1], lambda: all(decodes[1].owner.arrived[room] for room in range(10, 100)))


def test_a_piece_that_waits_for_ever_fails_its_room_with_the_reason() -> None:
    rng, fabric, clock = np.random.default_rng(0), make_fabric(), Clock()
    prefill = PrefillRank(fabric.engine("p"), Geometry(), rng, clock=clock)
    decode = DecodeRank(fabric.engine("d"), CONVERTED, rng, slab_bytes=4096, clock=clock)
    peer = prefill.connect(decode)
    pages, target = np.arange(1, 31, dtype=np.int32), np.arange(1, 16, dtype=np.int32)
    for room in (1, 2):  # nobody reads what arrives
        aux = decode.pool.aux_span(2)
        prefill.outbox.submit(prefill.job(room, pages, 0, True, [Target(peer, target, aux)]))
    for _ in range(20):
        prefill.outbox.turn()
    assert not prefill.gate.failures
    clock.now_s += steps.STARVED_S + 1
    for _ in range(20):
        prefill.outbox.turn()
    for room in (1, 2):
        assert (
            f"no slot of the slab of decode rank d became free within {steps.STARVED_S:.0f} s"
            in (prefill.gate.failures[room][0])
        )


def test_a_late_comer_gets_the_idle_slots_of_the_others() -> None:
    lender, _ = _lender(8)
    first, grants = lender.enter("a:1", 8)
    others = [lender.enter(f"b:{number}", 8)[0] for number in range(4)]
    last, none = lender.enter("z:1")
    assert len(grants) == 4
    assert not none
    lender.ask(last, 3)
    deals = dict(lender.deals())
    assert set(deals) <= {first, *others}
    assert len(deals[first].recall) == 3
    lender.void(first, deals[first].recall)
    deals = dict(lender.deals())
    assert deals[last].grants
    assert {grant.slot for grant in deals[last].grants} <= {grant.slot for grant in grants}
    assert not deals[first].grants, "what was given back is not granted again while others ask"


def test_who_holds_fewest_is_served_first() -> None:
    lender, clock = _lender(8)
    rich, grants = lender.enter("a:1", 4)
    poor, _ = lender.enter("b:1", 1)
    for holder in (rich, poor):
        lender.ask(holder, 5)
        clock.now_s += 0.001
    lender.deals()
    lender.read(grants[0].lease)
    lender.end(grants[0].lease)
    deals = dict(lender.deals())
    assert deals[poor].grants
    assert not deals[rich].grants


def test_a_slot_stays_with_its_user_while_nobody_asks() -> None:
    lender, _ = _lender()
    holder, grants = lender.enter("a:1")
    assert len(grants) == FIRST_GRANTS
    assert lender.read(grants[0].lease) == 4096 + 256 * grants[0].slot
    assert lender.read(grants[0].lease) is None, "a repeated message is left alone"
    lender.end(grants[0].lease, 0.5)
    ((told, deal),) = lender.deals()
    assert told == holder
    assert deal.over == [grants[0].lease]
    assert deal.scatter_s == 0.5
    (again,) = deal.grants
    assert again.slot == grants[0].slot
    assert again.lease not in {grant.lease for grant in grants}
    assert lender.read(grants[0].lease) is None, "nothing of the old use is acted on"


def test_a_dead_prefills_slots_come_back_after_the_quarantine_and_not_before() -> None:
    lender, clock = _lender(4)
    dead, grants = lender.enter("a:1", 4)
    late, _ = lender.enter("b:1")
    lender.bury({"a:1"})
    clock.now_s += QUARANTINE_S - 1
    lender.reclaim()
    assert lender.read(grants[0].lease) is not None
    lender.end(grants[0].lease)
    assert not dict(lender.deals())[dead].grants, "the dead get nothing new"
    held = lender.num_held
    clock.now_s += 2
    lender.reclaim()
    assert lender.num_held == held - 1
    assert lender.endpoint(dead) is None
    assert lender.endpoint(late) == "b:1"


def test_a_prefill_restarted_on_the_same_address_inherits_nothing() -> None:
    lender, clock = _lender(8)
    old, grants = lender.enter("a:1")
    new, fresh = lender.enter("a:1")
    assert new != old
    assert not {grant.lease for grant in grants} & {grant.lease for grant in fresh}
    assert not {grant.slot for grant in grants} & {grant.slot for grant in fresh}, "its old writes may land"
    lender.ask(old, 3)
    assert not lender.deals()
    lender.void(old, [grants[0].lease])
    assert lender.num_held == len(grants) + len(fresh) - 1
    clock.now_s += QUARANTINE_S + 1
    lender.reclaim()
    assert lender.num_held == len(fresh)


def _granted(*leases: int) -> GrantedSlots:
    rng, fabric = np.random.default_rng(0), make_fabric()
    decode = DecodeRank(fabric.engine("d"), Geometry(), rng)
    made = GrantedSlots(decode.offer(PrefillRank(fabric.engine("p"), Geometry(), rng)))
    made.give_up()
    made.add(Grant(lease, lease) for lease in leases)
    return made


def test_recalled_leases_come_back_unless_they_are_in_use() -> None:
    granted = _granted(1, 2, 3)
    used = granted.take()
    assert used is not None
    assert granted.recall([used.lease, 3, 9]) == [3, 9]
    granted.add([Grant(9, 0)])
    assert granted.num_unused == 1, "a grant that was given back before it came is not used"
    granted.put_back(used)
    assert granted.num_unused == 2
    granted.put_back(Grant(77, 0))
    assert granted.num_unused == 2, "a grant of an earlier offer is not this one's"


def test_an_ask_stands_until_it_is_answered_or_old() -> None:
    granted = _granted(1)
    assert granted.shortage(1, 0.0) == 0
    assert granted.shortage(3, 0.0) == 2
    assert granted.shortage(3, slots.ASK_AGAIN_S / 2) == 0
    assert granted.shortage(3, slots.ASK_AGAIN_S * 1.1) == 2
    granted.add([Grant(2, 1), Grant(3, 2)])
    assert granted.shortage(4, slots.ASK_AGAIN_S * 1.2) == 1


def test_a_wait_for_slots_ends_with_the_first_credit() -> None:
    """The whole way with threads: more pieces than slots, one slot at a time."""
    rng, fabric = np.random.default_rng(1), make_fabric()
    decode = DecodeRank(fabric.engine("d"), CONVERTED, rng, slab_bytes=4096)
    prefill = PrefillRank(fabric.engine("p"), Geometry(), rng)
    peer = prefill.connect(decode)
    prefill.outbox.start()
    try:
        pages, target = np.arange(1, 31, dtype=np.int32), np.arange(1, 16, dtype=np.int32)
        decode.inbox.expect(1, target)
        aux = decode.pool.aux_span(2)
        prefill.outbox.submit(prefill.job(1, pages, 0, True, [Target(peer, target, aux)]))
        wait_until(lambda: bool(decode.owner.arrived[1]), poll=decode.inbox.poll, timeout_s=60)
    finally:
        prefill.outbox.close()


def test_a_page_longer_than_a_slot_arrives_whole_though_its_pieces_end_in_direct_writes() -> None:
    """Pieces are cut inside pages then; without slots the rest of the chunk goes page by page."""
    rng, fabric = np.random.default_rng(1), make_fabric()
    geometry = Geometry(page_size=64, num_pages=8)
    decode = DecodeRank(fabric.engine("d"), geometry, rng, slab_bytes=4 * 768, slot_bytes=768)
    prefill = PrefillRank(fabric.engine("p"), geometry, rng, max_piece_bytes=768)
    peer = prefill.connect(decode)
    pages, target = np.array([3, 1, 6], dtype=np.int32), np.array([2, 5, 4], dtype=np.int32)
    decode.inbox.expect(1, target)
    aux = decode.pool.aux_span(2)
    job = prefill.job(1, pages, 0, True, [Target(peer, target, aux)], forced_path=Path.PACKED)
    prefill.outbox.submit(job)
    for _ in range(10_000):  # nobody gives slots back meanwhile
        prefill.outbox.turn()
        if prefill.gate.done:
            break
    assert prefill.gate.done[0].record.num_writes > 2
    _turn([prefill], decode, lambda: bool(decode.owner.arrived[1]))
    for region in range(4):
        np.testing.assert_array_equal(
            prefill.pool.tokens(region, pages, 192), decode.pool.tokens(region, target, 192)
        )


def test_replicas_of_a_head_send_it_once_and_all_their_messages_count() -> None:
    """Prefill TP 2 with one KV head, decode TP 1."""
    rng, fabric = np.random.default_rng(2), make_fabric()
    one = {"num_kv_heads": 1, "total_kv_heads": 1}
    decode = DecodeRank(fabric.engine("d"), Geometry(**one), rng)
    ranks = [
        PrefillRank(fabric.engine(f"p{rank}"), Geometry(**one, tp_size=2, tp_rank=rank), rng, rank=rank)
        for rank in range(2)
    ]
    pages, target = np.array([3, 1], dtype=np.int32), np.array([2, 5], dtype=np.int32)
    decode.inbox.expect(1, target)
    for rank in ranks:
        peer, aux = rank.connect(decode), decode.pool.aux_span(2)
        rank.outbox.submit(rank.job(1, pages, 0, True, [Target(peer, target, aux)]))
    _turn(ranks, decode, lambda: sorted(decode.owner.arrived[1]) == [0, 1])
    assert [rank.gate.done[0].record.nbytes for rank in ranks] == [8 * 24 * 4, 0]
    for region in range(4):
        np.testing.assert_array_equal(
            ranks[0].pool.tokens(region, pages, 8), decode.pool.tokens(region, target, 8)
        )
