"""What a transport must be able to do, so that the data plane runs on NIXL and on the test's loopback alike.

One-sided writes with a message: the message reaches the target only after every
byte of its write has arrived there. Nothing is ordered between writes. A write
is posted and polled later; ``poll`` is the only place where completion shows.

``Handle`` is mine, a *description* travels.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NewType, Protocol, TypeAlias

if TYPE_CHECKING:  # pdserve doctor reads this module where there is no numpy
    import numpy as np
    import numpy.typing as npt

PeerName = NewType("PeerName", str)
"""What the transport calls the other side; learnt from its description."""

Spans: TypeAlias = "npt.NDArray[np.uint64]"
"""``[n, 3]``: address, bytes, device of each span."""

StridedSpans: TypeAlias = "npt.NDArray[np.uint64]"
"""``[n, 5]``: address, bytes, device, stride, count; ``count`` blocks of ``bytes``, ``stride`` apart."""


class MemoryKind(enum.StrEnum):
    """Where memory lies, in NIXL's words."""

    DRAM = "DRAM"
    VRAM = "VRAM"


class TransferState(enum.Enum):
    """State of a posted write."""

    PENDING = enum.auto()
    DONE = enum.auto()
    FAILED = enum.auto()


@dataclass(frozen=True, slots=True)
class DescriptorList:
    """Prepared blocks on one side of a write; chosen from by number. Valid until its engine closes."""

    raw: Any


@dataclass(slots=True, eq=False)
class TransferHandle:
    """A posted write. The engine releases what it holds once ``poll`` says DONE or FAILED."""

    raw: Any


class TransferEngine(Protocol):
    """One agent of the transport. Methods may be called from several threads."""

    @property
    def name(self) -> PeerName:
        """This agent's own name, as peers see it."""

    def register(self, spans: Spans, kind: MemoryKind) -> None:
        """Make memory known to the transport. Raises RegistrationFailed."""

    def describe(self) -> bytes:
        """What a peer needs to write here. Covers all memory registered so far."""

    def connect(self, description: bytes) -> PeerName:
        """Get ready to write to a peer; the first contact is paid here. Raises PeerLost."""

    def prepare(self, peer: PeerName | None, blocks: StridedSpans, kind: MemoryKind) -> DescriptorList:
        """Prepare blocks of a peer's memory, or of the own when ``peer`` is None, for many writes."""

    def write(
        self,
        source: tuple[DescriptorList, npt.NDArray[np.int32]],
        target: tuple[DescriptorList, npt.NDArray[np.int32]],
        message: bytes,
    ) -> TransferHandle:
        """Post a write of prepared blocks, pairwise; neighbours on both sides are merged. Raises PeerLost."""

    def write_spans(
        self,
        peer: PeerName,
        source: Spans,
        target: Spans,
        kind: tuple[MemoryKind, MemoryKind],
        message: bytes,
    ) -> TransferHandle:
        """Post a write of spans given in full, pairwise of equal length. Raises PeerLost."""

    def poll(self, handle: TransferHandle) -> TransferState:
        """Where a write stands. FAILED is final, but says nothing about which bytes arrived."""

    def arrivals(self) -> list[tuple[PeerName, bytes]]:
        """Messages of completed writes into this agent's memory since the last call."""

    def close(self) -> None:
        """Give everything back. Writes still pending are lost."""
