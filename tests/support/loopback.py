"""The transfer engine's contract by memory copies inside one process, with faults on demand.

A test can reorder, repeat or lose messages, fail a write, or keep it pending. Host memory only.
"""

from __future__ import annotations

import ctypes
import random
import threading
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from pdserve.errors import PeerLost, RegistrationFailed
from pdserve.transfer.engine import (
    DescriptorList,
    MemoryKind,
    PeerName,
    Spans,
    StridedSpans,
    TransferHandle,
    TransferState,
)


@dataclass(slots=True)
class LoopbackFaults:
    """What goes wrong. May be changed while engines run."""

    is_held: bool = False
    """Writes stay pending, nothing is copied, until this is False again."""
    holds: Callable[[bytes], bool] = lambda message: False
    """Writes whose message this picks stay pending."""
    fails: Callable[[bytes], bool] = lambda message: False
    """Writes whose message this picks end as FAILED, with nothing copied."""
    drops: Callable[[bytes], bool] = lambda message: False
    """Messages this picks are lost; the bytes arrive."""
    repeats: int = 1
    """How often each message arrives."""
    is_reversed: bool = False
    """``arrivals`` gives the newest message first."""
    refuses: Callable[[bytes], bool] = lambda message: False
    """Posting raises PeerLost for these, after nothing was copied."""
    refusal_may_have_written: bool = False
    """What such a PeerLost says."""


@dataclass(slots=True)
class LoopbackFabric:
    """Engines that can reach each other."""

    faults: LoopbackFaults = field(default_factory=LoopbackFaults)
    engines: dict[str, LoopbackEngine] = field(default_factory=dict)
    num_writes: int = 0
    num_descriptors: int = 0
    """Spans written so far, neighbours merged as NIXL does."""
    order: random.Random | None = None
    """Draws after how many polls each write completes; None: at the first."""
    pending: list[_Write] | None = None
    """Writes that a test lands itself, if it makes this a list: posted, and neither landed nor failed."""

    def engine(self, name: str) -> LoopbackEngine:
        """A new engine on this fabric."""
        engine = LoopbackEngine(self, name)
        self.engines[name] = engine
        return engine


@dataclass(slots=True, eq=False)
class _Write:
    target: LoopbackEngine
    source_spans: Spans
    target_spans: Spans
    message: bytes
    polls: int = 0
    state: TransferState = TransferState.PENDING
    writer: str = ""

    def land(self, faults: LoopbackFaults) -> None:
        """Copy the bytes; then the message arrives."""
        for (source, nbytes, _), (target, _, _) in zip(
            self.source_spans.tolist(), self.target_spans.tolist(), strict=True
        ):
            ctypes.memmove(target, source, nbytes)
        self.state = TransferState.DONE
        if self.message and not faults.drops(self.message):
            with self.target._lock:
                self.target._inbox.extend([(PeerName(self.writer), self.message)] * faults.repeats)


class LoopbackEngine:
    """``TransferEngine`` by memmove. Made by ``LoopbackFabric.engine``."""

    def __init__(self, fabric: LoopbackFabric, name: str) -> None:
        self._fabric = fabric
        self._name = PeerName(name)
        self._spans: list[tuple[int, int]] = []
        self._inbox: list[tuple[PeerName, bytes]] = []
        self._lock = threading.Lock()

    @property
    def name(self) -> PeerName:
        """The name given to ``LoopbackFabric.engine``."""
        return self._name

    def register(self, spans: Spans, kind: MemoryKind) -> None:
        """Remember the spans; writes outside of them are refused."""
        if kind is not MemoryKind.DRAM:
            raise RegistrationFailed(f"loopback copies host memory only, got {kind}")
        self._spans.extend((int(address), int(nbytes)) for address, nbytes, _ in spans)

    def describe(self) -> bytes:
        """The name."""
        return self._name.encode()

    def connect(self, description: bytes) -> PeerName:
        """Look the peer up on the fabric."""
        name = description.decode()
        if name not in self._fabric.engines:
            raise PeerLost(f"no loopback engine {name!r}")
        return PeerName(name)

    def prepare(self, peer: PeerName | None, blocks: StridedSpans, kind: MemoryKind) -> DescriptorList:
        """Expand the blocks."""
        parts = [
            np.stack([address + np.arange(count, dtype=np.uint64) * stride,
                      np.full(count, nbytes, dtype=np.uint64),
                      np.full(count, device, dtype=np.uint64)], axis=1)
            for address, nbytes, device, stride, count in blocks
        ]  # fmt: skip
        return DescriptorList((peer, np.concatenate(parts)))

    def write(
        self,
        source: tuple[DescriptorList, npt.NDArray[np.int32]],
        target: tuple[DescriptorList, npt.NDArray[np.int32]],
        message: bytes,
    ) -> TransferHandle:
        """Pick the blocks and write them."""
        peer, blocks = target[0].raw
        return self._post(peer, source[0].raw[1][source[1]], blocks[target[1]], message)

    def write_spans(
        self,
        peer: PeerName,
        source: Spans,
        target: Spans,
        kind: tuple[MemoryKind, MemoryKind],
        message: bytes,
    ) -> TransferHandle:
        """Write the spans."""
        return self._post(peer, source, target, message)

    def poll(self, handle: TransferHandle) -> TransferState:
        """Carry the write out now, unless writes are held or a test lands them itself."""
        write: _Write = handle.raw
        fabric, faults = self._fabric, self._fabric.faults
        if write.state is not TransferState.PENDING or faults.is_held or faults.holds(write.message):
            return write.state
        if fabric.pending is not None and write in fabric.pending:
            return write.state
        if write.polls > 0:
            write.polls -= 1
            return write.state
        if fabric.engines.get(write.target.name) is not write.target or faults.fails(write.message):
            write.state = TransferState.FAILED
        else:
            write.land(faults)
        return write.state

    def arrivals(self) -> list[tuple[PeerName, bytes]]:
        """Messages of finished writes."""
        with self._lock:
            found, self._inbox = self._inbox, []
        return found[::-1] if self._fabric.faults.is_reversed else found

    def close(self) -> None:
        """Leave the fabric; writes to this engine fail from now on."""
        self._fabric.engines.pop(self._name, None)

    def _post(self, peer: PeerName, source: Spans, target: Spans, message: bytes) -> TransferHandle:
        engine = self._fabric.engines.get(peer)
        if engine is None or self._fabric.faults.refuses(message):
            may_have_written = engine is not None and self._fabric.faults.refusal_may_have_written
            raise PeerLost(f"loopback refused a write to {peer}", may_have_written=may_have_written)
        if not np.array_equal(source[:, 1], target[:, 1]):
            raise ValueError("source and target spans differ in length")
        for spans, owner in ((source, self), (target, engine)):
            owner._check(spans)
        self._fabric.num_writes += 1
        self._fabric.num_descriptors += num_merged(source, target)
        polls = self._fabric.order.randrange(8) if self._fabric.order is not None else 0
        write = _Write(engine, source.copy(), target.copy(), message, polls, writer=self._name)
        if self._fabric.pending is not None:
            self._fabric.pending.append(write)
        return TransferHandle(write)

    def _check(self, spans: Spans) -> None:
        for address, nbytes, _ in spans.tolist():
            if not any(base <= address and address + nbytes <= base + size for base, size in self._spans):
                raise ValueError(f"{self._name}: {nbytes} bytes at {address:#x} are not in registered memory")


def num_merged(source: Spans, target: Spans) -> int:
    """Descriptors left when spans that follow each other on both sides are merged."""
    if len(source) == 0:
        return 0
    follows = (source[1:, 0] == source[:-1, 0] + source[:-1, 1]) & (
        target[1:, 0] == target[:-1, 0] + target[:-1, 1]
    )
    return len(source) - int(np.count_nonzero(follows))
