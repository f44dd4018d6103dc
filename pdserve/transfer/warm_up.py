"""First contact with a peer, paid before a request needs it, and the first point of its cost law.

A few writes into one of the peer's slots that this rank was granted open the
transport's lanes, map memory and show what a descriptor and a byte cost on this
very link.
"""

from __future__ import annotations

import logging
import time

import numpy as np

from pdserve.errors import PeerLost
from pdserve.transfer.engine import Spans, TransferEngine, TransferState
from pdserve.transfer.peer import PeerLink
from pdserve.transfer.plan import Path

logger = logging.getLogger(__name__)

WARM_UP_S = 5.0
"""Longest wait for the probes; a peer that is slower is used all the same."""

BLOCKS = 128
BLOCK_BYTES = 4096


def warm_up(engine: TransferEngine, link: PeerLink, source_address: int) -> None:
    """Write probes from the own slab into a granted slot, twice; only the second round is measured.

    Nothing may have been sent to the peer before. Does nothing without a grant.
    """
    size = min(link.piece_bytes, 1 << 20)
    grant = link.slots.take() if size >= BLOCKS * BLOCK_BYTES else None
    if grant is None:
        return
    if _probe(engine, link, (source_address, link.slots.address(grant)), size):
        link.slots.put_back(grant)


def _probe(engine: TransferEngine, link: PeerLink, ends: tuple[int, int], size: int) -> bool:
    """False if a probe may still land."""
    big = np.array([[0, size, 0]], dtype=np.uint64)
    # Every other block, last first: nothing that NIXL could merge.
    offsets = np.arange(0, size - BLOCK_BYTES, 2 * BLOCK_BYTES, dtype=np.uint64)[:BLOCKS][::-1]
    many = np.stack([offsets, np.full_like(offsets, BLOCK_BYTES), np.zeros_like(offsets)], axis=1)
    for is_measured in (False, True):
        for probe in (big, many):
            seconds = _write(engine, link, ends, probe)
            if seconds is None:
                return False
            if is_measured:
                link.costs.observe(Path.DIRECT, len(probe), int(probe[:, 1].sum()), seconds)
    return True


def _write(engine: TransferEngine, link: PeerLink, ends: tuple[int, int], probe: Spans) -> float | None:
    source, target = probe.copy(), probe.copy()
    source[:, 0] += np.uint64(ends[0])
    source[:, 2] = link.own.device
    target[:, 0] += np.uint64(ends[1])
    target[:, 2] = link.offer.device
    begin = time.perf_counter()
    try:
        handle = engine.write_spans(link.name, source, target, (link.own.kind, link.offer.kind), b"")
        state = engine.poll(handle)
        while state is TransferState.PENDING:
            if time.perf_counter() - begin > WARM_UP_S:
                logger.warning("decode rank %s: first contact took over %.0f s", link.name, WARM_UP_S)
                return None
            time.sleep(0.00005)
            state = engine.poll(handle)
    except PeerLost as exc:
        logger.warning("decode rank %s: first contact failed: %s", link.name, exc)
        return None
    return time.perf_counter() - begin if state is TransferState.DONE else None
