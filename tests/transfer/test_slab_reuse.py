"""A slab piece is used again once nothing of its old use can arrive any more, and never before."""

from __future__ import annotations

import time

import pytest

from pdserve.transfer.messages import Void, decode_arrival
from pdserve.transfer.plan import Path
from tests.support import kv_rig
from tests.support.kv_rig import Geometry, Pace, Rig, wait_until


def test_a_piece_is_not_asked_back_while_its_write_is_in_flight() -> None:
    """Else its late bytes would lie in another room's piece, which is then reported complete."""
    rig = Rig(credit_timeout_s=0.02, max_piece_bytes=4096, decode_slab_bytes=1 << 14)
    try:
        stalled, voids = {1}, []
        rig.fabric.faults.holds = lambda message: decode_arrival(message).room in stalled
        take = rig.decode.inbox.take_control
        rig.decode.inbox.take_control = lambda message: (voids.append(message), take(message))[1]
        first = rig.send(1, 60, path=Path.PACKED, within=range(1, 20))
        wait_until(lambda: rig.fabric.num_writes >= 2)
        time.sleep(0.05)  # longer than the time-out; a sweep comes within it
        second = rig.send(2, 60, path=Path.PACKED, within=range(20, 40))
        wait_until(lambda: any(job.room == 2 for job in rig.prefill.gate.done))
        stalled.clear()
        wait_until(lambda: len(rig.prefill.gate.done) == 2)
        rig.receive(2)
        rig.check(*second, 60)
        assert not [message for message in voids if isinstance(message, Void)]
        rig.receive(1)
        rig.check(*first, 60)
        rig.settle()
    finally:
        rig.close()


def test_a_peer_that_is_gone_is_forgotten_with_all_that_was_due_from_it() -> None:
    rig = Rig(credit_timeout_s=0.02)
    try:
        rig.send(1, 60, path=Path.PACKED)  # it arrives, and nobody reads it
        wait_until(lambda: bool(rig.prefill.gate.done))
        rig.fabric.faults.is_held = True
        rig.send(2, 60, path=Path.PACKED)
        wait_until(lambda: rig.prefill.gate.outstanding[2] == 1)
        rig.prefill.outbox.remove_peer(rig.peer, "decode rank d is gone")
        wait_until(lambda: not rig.prefill.outbox.num_due)
        rig.fabric.faults.is_held = False
        wait_until(lambda: 2 in rig.prefill.gate.failures)
        rig.send(3, 60)
        wait_until(lambda: 3 in rig.prefill.gate.failures)
        assert rig.prefill.gate.failures[2] == ("decode rank d is gone", True)
        assert "not connected" in rig.prefill.gate.failures[3][0]
        wait_until(lambda: not rig.prefill.outbox._lanes)
        assert not rig.prefill.runner.num_source_held
    finally:
        rig.close()


@pytest.mark.parametrize("may_have_written", [False, True])
def test_a_post_refused_after_a_late_gather_leaves_nothing_behind(
    monkeypatch: pytest.MonkeyPatch, may_have_written: bool
) -> None:
    """On a GPU the post comes after the gather, in another turn of the loop."""
    monkeypatch.setattr(kv_rig, "PACE", Pace.LATE_COPIES)
    rig = Rig(
        target=Geometry(page_size=8), slab_bytes=1 << 13, decode_slab_bytes=1 << 13, credit_timeout_s=0.02
    )
    try:
        rig.fabric.faults.refuses = lambda message: decode_arrival(message).room == 1
        rig.fabric.faults.refusal_may_have_written = may_have_written
        rig.send(1, 60)
        wait_until(lambda: 1 in rig.prefill.gate.failures)
        for room in range(2, 10):
            pages = rig.send(room, 60)
            rig.receive(room)
            rig.check(*pages, 60)
        rig.settle()
    finally:
        rig.close()
