"""Chunks in transfer: what is to be written where, how far it has come, and what it took.

Only the outbox thread uses these objects after ``Outbox.submit``.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from pdserve.kv.coalesce import Completion
from pdserve.kv.layout import PageIds
from pdserve.transfer.engine import PeerName, Spans, TransferHandle
from pdserve.transfer.messages import Arrival, Grant
from pdserve.transfer.peer import WritePlan
from pdserve.transfer.plan import Path


@dataclass(frozen=True, slots=True)
class Target:
    """Where one peer wants a chunk."""

    peer: PeerName
    pages: PageIds
    """All pages the peer gave for the room."""
    aux: Spans | None = None
    """``[n, 3]`` spans of the peer's metadata row, last chunk only; same lengths as the job's."""


@dataclass(slots=True)
class TransferRecord:
    """What moving one chunk to all its peers took. Times in seconds, summed over peers."""

    nbytes: int = 0
    num_descriptors: int = 0
    num_writes: int = 0
    num_direct: int = 0
    """Chunks, counted per peer, that went direct; ``num_packed`` those that were packed."""
    num_packed: int = 0
    plan_s: float = 0.0
    gather_s: float = 0.0
    post_s: float = 0.0
    wait_s: float = 0.0
    """From the last post of a chunk to a peer until its last completion."""

    def add(self, other: TransferRecord) -> None:
        """Sum up, chunk after chunk."""
        for name in self.__dataclass_fields__:
            setattr(self, name, getattr(self, name) + getattr(other, name))

    def counters(self) -> dict[str, int]:
        """As whole numbers, times in microseconds, under the names of plugin/stats.py."""
        return {
            "kv_bytes": self.nbytes,
            "direct_chunks": self.num_direct,
            "packed_chunks": self.num_packed,
            "descriptors": self.num_descriptors,
            "writes": self.num_writes,
            "plan_us": round(self.plan_s * 1e6),
            "gather_us": round(self.gather_s * 1e6),
            "post_us": round(self.post_s * 1e6),
            "wait_us": round(self.wait_s * 1e6),
        }


class JobState(enum.Enum):
    """Where a chunk is. Changed by ``ChunkJob.enter`` and ``ChunkJob.fail`` alone."""

    QUEUED = enum.auto()
    """Not counted by the gate; nothing has been posted."""
    WRITING = enum.auto()
    """Counted by the gate; writes are posted or in flight."""
    FAILING = enum.auto()
    """Counted, but given up; writes in flight settle."""
    ABANDONED = enum.auto()
    """Given up before it was counted."""


@dataclass(slots=True, eq=False)
class ChunkJob:
    """One chunk of a room, to be written to every target."""

    room: int
    pages: PageIds
    first_token: int
    is_last: bool
    targets: Sequence[Target]
    aux: Spans | None = None
    """The own metadata row, last chunk only."""
    is_ready: Callable[[], bool] = lambda: True
    """False while the page ids, or all that they hold, are not there yet."""
    num_filled: Callable[[], int] | None = None
    """Regions, from the first on, that the running forward has filled; None: all are, once it is ready.

    Raises if the forward failed.
    """
    forced_path: Path | None = None
    per_rank: list[RankWrites] = field(default_factory=list)
    record: TransferRecord = field(default_factory=TransferRecord)
    state: JobState = JobState.QUEUED
    failure: str = ""
    failed_at_s: float = 0.0
    is_silent: bool = False
    """The room was closed by its owner, who is not told of the failure."""
    may_have_written: bool = False
    """A refused write may still land, so the pages can never be released early."""

    @property
    def is_entered(self) -> bool:
        """True if the gate counts the chunk."""
        return self.state in (JobState.WRITING, JobState.FAILING)

    @property
    def has_failed(self) -> bool:
        """True once the chunk has been given up."""
        return self.state in (JobState.FAILING, JobState.ABANDONED)

    def enter(self) -> None:
        """The gate counts the chunk from now on."""
        self.state = JobState.WRITING

    def fail(self, reason: str, now_s: float, *, is_silent: bool = False) -> None:
        """Give the chunk up; the first reason stays."""
        if not self.has_failed:
            self.state = JobState.FAILING if self.is_entered else JobState.ABANDONED
            self.failure, self.failed_at_s, self.is_silent = reason, now_s, is_silent


class RoomGate(Protocol):
    """The owner of rooms and pages. Called from the outbox thread."""

    def enter(self, room: int) -> bool:
        """Count a chunk as being written, unless the room is closed: then False and nothing is counted."""

    def is_open(self, room: int) -> bool:
        """False once the room failed or was aborted."""

    def finished(self, job: ChunkJob) -> None:
        """All writes of the chunk are done; uncount it if it was entered."""

    def failed(self, job: ChunkJob, *, settled: bool) -> None:
        """The chunk failed. ``settled``: none of its writes can land any more; uncount it only then."""


class DirectSample(NamedTuple):
    """What a direct write carries, and since when."""

    num_descriptors: int
    nbytes: int
    started_s: float


@dataclass(slots=True, eq=False)
class Step:
    """One write: waiting for its gather (``handle`` None) or posted."""

    message: Arrival
    handle: TransferHandle | None = None
    gathered: Completion | None = None
    source: int | None = None
    """Slot of the own slab, while it is held."""
    grant: Grant | None = None
    """Slot of the peer's slab."""
    sample: DirectSample | None = None
    """Of a direct write that its cost law learns from."""
    is_settled: bool = False
    """The posted write is over: the transport neither reads its source nor writes its target any more."""


class WriteStage(enum.Enum):
    """What a decode rank's next write carries. Changed by ``RankWrites.advance`` alone."""

    PAYLOAD = enum.auto()
    AUX = enum.auto()
    """The metadata row, after all KV of the last chunk."""
    POSTED = enum.auto()
    """Nothing is left to post."""


@dataclass(slots=True, eq=False)
class RankWrites:
    """The writes of a chunk to one decode rank."""

    job: ChunkJob
    target: Target
    plan: WritePlan | None = None
    stage: WriteStage = WriteStage.PAYLOAD
    in_flight: list[Step] = field(default_factory=list)
    started_s: float = 0.0
    posted_s: float = 0.0
    blocked_since_s: float | None = None
    num_credits_due: int = 0
    num_planned: int = 0
    """Pieces of a packed plan: the items of the cost law."""
    teaches_packed: bool = True
    """False if it ended direct, or waited for layers: the packed law does not learn from it."""

    @property
    def is_posted(self) -> bool:
        """True once nothing is left to post."""
        return self.stage is WriteStage.POSTED

    @property
    def is_filled(self) -> bool:
        """The forward pass has filled what the next write reads; raises if it failed."""
        if self.job.num_filled is None or self.stage is not WriteStage.PAYLOAD:
            return True
        if self.plan is None:
            return self.job.num_filled() > 0
        return not self.plan.pieces or self.plan.pieces[0].region_end <= self.job.num_filled()

    def advance(self) -> None:
        """Enter the next stage if this one has nothing left to post; called after each post."""
        assert self.plan is not None
        if self.stage is WriteStage.PAYLOAD:
            if self.plan.pieces:
                return
            self.stage = WriteStage.POSTED if self.job.aux is None else WriteStage.AUX
        else:
            self.stage = WriteStage.POSTED
