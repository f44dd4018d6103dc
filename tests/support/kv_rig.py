"""A prefill and a decode rank without SGLang: real pools, real outbox and inbox, any engine.

Room bookkeeping is the smallest that keeps the contract of RoomGate/RoomOwner;
control messages are handed over in memory, as the ZMQ socket would.
"""

from __future__ import annotations

import enum
import itertools
import random
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from pdserve.kv.coalesce import Completion, HostPageCopier, PageCopier, Piece
from pdserve.kv.layout import PagedRegions, PageIds
from pdserve.kv.staging import ALIGNMENT
from pdserve.transfer.engine import MemoryKind, PeerName, TransferEngine
from pdserve.transfer.inbox import Inbox
from pdserve.transfer.jobs import ChunkJob, Target
from pdserve.transfer.messages import Ask, Credit, PeerOffer, Void
from pdserve.transfer.outbox import Outbox
from pdserve.transfer.peer import RankPool, connect_peer, page_blocks
from pdserve.transfer.plan import Path
from pdserve.transfer.slots import Slab, SlotLender
from pdserve.transfer.steps import StepRunner
from tests.support.loopback import LoopbackFabric

AUX_BYTES = 64


class Pace(enum.Enum):
    """When copies and writes are over."""

    AT_ONCE = enum.auto()
    LATE_COPIES = enum.auto()
    """A copy moves its bytes at its third look, as a stream of a GPU does."""
    ANY_ORDER = enum.auto()
    """Copies and writes are over after any number of looks, so in any order."""


PACE = Pace.AT_ONCE
"""Of the rigs made from now on; a test sets it with monkeypatch."""


def make_fabric() -> LoopbackFabric:
    """A fabric whose writes complete at ``PACE``."""
    return LoopbackFabric(order=random.Random(11) if PACE is Pace.ANY_ORDER else None)


def make_copier(regions: PagedRegions) -> PageCopier:
    """A copier whose copies complete at ``PACE``."""
    if PACE is Pace.AT_ONCE:
        return HostPageCopier(regions)
    rng = random.Random(7)
    return LateCopier(regions, (lambda: 3) if PACE is Pace.LATE_COPIES else (lambda: rng.randrange(5)))


class LateCopier(HostPageCopier):
    """Copies when its completion has been looked at as often as ``looks`` says, 0: at once."""

    def __init__(self, regions: PagedRegions, looks: Callable[[], int]) -> None:
        super().__init__(regions)
        self._looks = looks

    def gather_pages(self, pages: PageIds, piece: Piece, slab_address: int) -> Completion:
        copy = super().gather_pages
        return _LateCopy(self._looks(), lambda: copy(pages, piece, slab_address))

    def scatter_pages(self, pages: PageIds, piece: Piece, slab_address: int) -> Completion:
        copy = super().scatter_pages
        return _LateCopy(self._looks(), lambda: copy(pages, piece, slab_address))


class _LateCopy:
    def __init__(self, looks: int, copy: Callable[[], object]) -> None:
        self._looks, self._copy = looks, copy
        self._is_copied = False

    def is_done(self) -> bool:
        self._looks -= 1
        if self._looks <= 0 and not self._is_copied:
            self._is_copied = True
            self._copy()
        return self._is_copied


@dataclass(frozen=True)
class Geometry:
    """Of one rank's pool."""

    num_regions: int = 4
    num_pages: int = 40
    page_size: int = 4
    num_kv_heads: int = 2
    total_kv_heads: int = 2
    head_bytes: int = 24
    gap_bytes: int = 0
    tp_size: int = 1
    tp_rank: int = 0
    regions_per_layer: int = 1
    num_draft_regions: int = 0


SAME = Geometry()


class Pool:
    """Host memory laid out as SGLang's pools, with a random gap between regions."""

    def __init__(self, geometry: Geometry, rng: np.random.Generator) -> None:
        self.geometry = geometry
        row = geometry.num_kv_heads * geometry.head_bytes
        stride = row + geometry.gap_bytes
        nbytes = geometry.num_pages * geometry.page_size * stride
        self._memory = [
            rng.integers(0, 256, nbytes + 64, dtype=np.uint8) for _ in range(geometry.num_regions)
        ]
        self._starts = [int(rng.integers(0, 8)) * 8 for _ in range(geometry.num_regions)]
        self.regions = PagedRegions(
            bases=tuple(
                memory.ctypes.data + start for memory, start in zip(self._memory, self._starts, strict=True)
            ),
            num_pages=geometry.num_pages,
            page_size=geometry.page_size,
            row_bytes=row,
            token_stride=stride,
            num_kv_heads=geometry.num_kv_heads,
            regions_per_layer=geometry.regions_per_layer,
            num_draft_regions=geometry.num_draft_regions,
        )
        self.slots = geometry.num_pages * geometry.page_size
        self.aux = rng.integers(0, 256, (8, AUX_BYTES), dtype=np.uint8)

    def rows(self, region: int) -> npt.NDArray[np.uint8]:
        """``[slots, heads, head_bytes]`` view of one region."""
        geometry, regions = self.geometry, self.regions
        start = self._starts[region]
        flat = self._memory[region][start : start + self.slots * regions.token_stride]
        strided = flat.reshape(self.slots, regions.token_stride)[:, : regions.row_bytes]
        return strided.reshape(self.slots, geometry.num_kv_heads, geometry.head_bytes)

    def tokens(self, region: int, pages: npt.NDArray[np.int32], count: int) -> npt.NDArray[np.uint8]:
        """The first ``count`` tokens held by ``pages``, copied."""
        size = self.geometry.page_size
        slots = (pages.astype(np.int64)[:, None] * size + np.arange(size)).reshape(-1)[:count]
        return self.rows(region)[slots].copy()

    def snapshot(self) -> list[npt.NDArray[np.uint8]]:
        """All memory, gaps and margins included."""
        return [memory.copy() for memory in self._memory]

    def spans(self) -> npt.NDArray[np.uint64]:
        """Everything a peer or the transport may touch."""
        whole = [(memory.ctypes.data, memory.nbytes, 0) for memory in self._memory]
        return np.array([*whole, (self.aux.ctypes.data, self.aux.nbytes, 0)], dtype=np.uint64)

    def aux_span(self, row: int) -> npt.NDArray[np.uint64]:
        """One metadata row."""
        return np.array([[self.aux.ctypes.data + row * AUX_BYTES, AUX_BYTES, 0]], dtype=np.uint64)


@dataclass
class Gate:
    """Prefill rank's rooms."""

    closed: set[int] = field(default_factory=set)
    outstanding: dict[int, int] = field(default_factory=lambda: defaultdict(int))
    done: list[ChunkJob] = field(default_factory=list)
    failures: dict[int, tuple[str, bool]] = field(default_factory=dict)
    num_failed: Counter[int] = field(default_factory=Counter)

    def enter(self, room: int) -> bool:
        self.outstanding[room] += 1
        if room in self.closed:
            self.outstanding[room] -= 1
            return False
        return True

    def is_open(self, room: int) -> bool:
        return room not in self.closed

    def finished(self, job: ChunkJob) -> None:
        if job.is_entered:
            self.outstanding[job.room] -= 1
        self.done.append(job)

    def failed(self, job: ChunkJob, *, settled: bool) -> None:
        if job.is_entered and settled:
            self.outstanding[job.room] -= 1
        self.failures[job.room] = (job.failure, settled)
        self.num_failed[job.room] += 1


@dataclass
class Owner:
    """Decode rank's rooms."""

    closed: set[int] = field(default_factory=set)
    arrived: dict[int, list[int]] = field(default_factory=lambda: defaultdict(list))
    failures: dict[int, str] = field(default_factory=dict)

    def is_open(self, room: int) -> bool:
        return room not in self.closed

    def rank_arrived(self, room: int, rank: int) -> None:
        self.arrived[room].append(rank)

    def failed(self, room: int, reason: str) -> None:
        self.failures[room] = reason
        self.closed.add(room)


class DecodeRank:
    """Pool, slab and inbox of one decode rank."""

    def __init__(
        self, engine: TransferEngine, geometry: Geometry, rng: np.random.Generator,
        *, slab_bytes: int = 1 << 20, slot_bytes: int = 4096, arrival_timeout_s: float = 30.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:  # fmt: skip
        self.engine, self.geometry = engine, geometry
        self.pool = Pool(geometry, rng)
        self.slab = np.zeros(max(slab_bytes, 1), dtype=np.uint8)
        engine.register(self.pool.spans(), MemoryKind.DRAM)
        engine.register(
            np.array([(self.slab.ctypes.data, self.slab.nbytes, 0)], dtype=np.uint64), MemoryKind.DRAM
        )
        self.owner = Owner()
        self.prefills: dict[str, PrefillRank] = {}
        lender = SlotLender(Slab(self.slab.ctypes.data, slab_bytes, slot_bytes), clock)
        self.inbox = Inbox(
            engine, make_copier(self.pool.regions), self.owner, lender, self._credit,
            arrival_timeout_s=arrival_timeout_s, clock=clock,
        )  # fmt: skip
        self.num_credit_messages = 0

    def _credit(self, endpoint: str, credit: Credit) -> None:
        self.num_credit_messages += 1
        self.prefills[endpoint].outbox.credit(credit)

    def offer(self, prefill: PrefillRank) -> PeerOffer:
        """What this prefill rank is told when it registers."""
        self.prefills[prefill.endpoint] = prefill
        geometry = self.geometry
        pool = RankPool(
            self.pool.regions, geometry.total_kv_heads, geometry.tp_size, geometry.tp_rank, MemoryKind.DRAM, 0
        )
        return pool.offer(self.inbox.lender, prefill.endpoint, "d")


class PrefillRank:
    """Pool, slab and outbox of one prefill rank."""

    def __init__(
        self, engine: TransferEngine, geometry: Geometry, rng: np.random.Generator,
        *, slab_bytes: int = 1 << 20, max_piece_bytes: int = 4096, credit_timeout_s: float = 30.0,
        rank: int = 0, clock: Callable[[], float] = time.monotonic,
    ) -> None:  # fmt: skip
        self.engine, self.geometry = engine, geometry
        self.endpoint = str(engine.name)
        self.pool = Pool(geometry, rng)
        self.slab = np.zeros(slab_bytes, dtype=np.uint8)
        engine.register(self.pool.spans(), MemoryKind.DRAM)
        engine.register(np.array([(self.slab.ctypes.data, slab_bytes, 0)], dtype=np.uint64), MemoryKind.DRAM)
        self.own = RankPool(
            self.pool.regions, geometry.total_kv_heads, geometry.tp_size, geometry.tp_rank, MemoryKind.DRAM, 0
        )
        self.blocks = engine.prepare(None, page_blocks(self.pool.regions, 0), MemoryKind.DRAM)
        self.gate = Gate()
        self.max_piece_bytes = max_piece_bytes
        self.peers: dict[PeerName, DecodeRank] = {}
        slab = Slab(self.slab.ctypes.data, slab_bytes, _whole_slots(max_piece_bytes))
        self.runner = StepRunner(
            engine, make_copier(self.pool.regions), slab, rank=rank, kind=MemoryKind.DRAM, device=0,
            clock=clock,
        )  # fmt: skip
        self.outbox = Outbox(
            self.runner, self.gate, self._control, credit_timeout_s=credit_timeout_s, clock=clock
        )

    def _control(self, peer: PeerName, message: Void | Ask) -> None:
        self.peers[peer].inbox.take_control(message)

    def connect(self, decode: DecodeRank) -> PeerName:
        """Exchange offers, as SGLang's registration does."""
        offer = decode.offer(self)
        name = self.engine.connect(decode.engine.describe())
        self.peers[name] = decode
        link = connect_peer(
            self.engine,
            name,
            offer,
            self.own,
            source_blocks=self.blocks,
            max_piece_bytes=self.max_piece_bytes,
        )
        self.outbox.add_peer(link)
        return name

    def job(self, room: int, pages: npt.NDArray[np.int32], first_token: int, is_last: bool,
            targets: list[Target], **kwargs: object) -> ChunkJob:  # fmt: skip
        """A chunk whose metadata row is row 1."""
        return ChunkJob(
            room=room, pages=pages, first_token=first_token, is_last=is_last, targets=targets,
            aux=self.pool.aux_span(1) if is_last else None, **kwargs,  # type: ignore[arg-type]
        )  # fmt: skip


def wait_until(
    condition: Callable[[], bool], *, timeout_s: float = 10.0, poll: Callable[[], object] = bool
) -> None:
    """Poll until true; fail loudly otherwise."""
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline_s, "condition not reached in time"
        poll()
        time.sleep(0.0005)


def _whole_slots(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


class Rig:
    """One prefill and one decode rank on a loopback fabric."""

    def __init__(
        self, seed: int = 0, source: Geometry = SAME, target: Geometry = SAME, **kwargs: object
    ) -> None:
        self.rng = np.random.default_rng(seed)
        self.fabric = make_fabric()
        decode_kwargs = {k: kwargs.pop(k) for k in ("arrival_timeout_s",) if k in kwargs}
        self.decode = DecodeRank(
            self.fabric.engine("d"),
            target,
            self.rng,
            slab_bytes=int(str(kwargs.pop("decode_slab_bytes", 1 << 20))),
            slot_bytes=_whole_slots(int(str(kwargs.get("max_piece_bytes", 4096)))),
            **decode_kwargs,  # type: ignore[arg-type]
        )
        self.prefill = PrefillRank(self.fabric.engine("p"), source, self.rng, **kwargs)  # type: ignore[arg-type]
        self.peer = self.prefill.connect(self.decode)
        self.prefill.outbox.start()

    def close(self) -> None:
        self.prefill.outbox.close()

    def send(
        self, room: int, num_tokens: int, *, path: Path | None = None, chunks: int = 1,
        within: range | None = None,
    ) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
        """Submit a room in ``chunks`` chunks from random pages to random pages, these ``within`` a range."""
        size, target_size = self.prefill.geometry.page_size, self.decode.geometry.page_size
        source = self.rng.permutation(np.arange(1, self.prefill.geometry.num_pages))[: -(-num_tokens // size)]
        allowed = within or range(1, self.decode.geometry.num_pages)
        target = self.rng.permutation(np.array(allowed))[: -(-num_tokens // target_size)]
        source, target = source.astype(np.int32), target.astype(np.int32)
        self.decode.inbox.expect(room, target)
        bounds = [len(source) * part // chunks for part in range(chunks + 1)]
        for begin, end in itertools.pairwise(bounds):
            is_last = end == len(source)
            aux = self.decode.pool.aux_span(2) if is_last else None
            self.prefill.outbox.submit(
                self.prefill.job(
                    room,
                    source[begin:end],
                    begin * size,
                    is_last,
                    [Target(self.peer, target, aux)],
                    forced_path=path,
                )
            )
        return source, target

    def receive(self, *rooms: int) -> None:
        wait_until(
            lambda: all(self.decode.owner.arrived[room] for room in rooms), poll=self.decode.inbox.poll
        )

    def check(self, source: np.ndarray, target: np.ndarray, num_tokens: int) -> None:
        for region in range(self.prefill.geometry.num_regions):
            np.testing.assert_array_equal(
                self.prefill.pool.tokens(region, source, num_tokens),
                self.decode.pool.tokens(region, target, num_tokens),
            )
        np.testing.assert_array_equal(self.prefill.pool.aux[1], self.decode.pool.aux[2])

    def settle(self) -> None:
        """Nothing is held any more, on either side."""
        wait_until(
            lambda: self.prefill.outbox.is_idle and not self.prefill.outbox.num_due,
            poll=self.decode.inbox.poll,
        )
        assert self.prefill.runner.num_source_held == 0
        assert not any(self.prefill.gate.outstanding.values())
