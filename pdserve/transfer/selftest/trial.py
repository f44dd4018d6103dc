"""One prefill and one decode rank in two processes, without SGLang: real pools, slabs and transport.

Used by the doctor's transfer check, ``bench/transfer.py`` and the byte-exact tests.
Outbox, inbox and planner are those that serve; the KV is synthetic, of any geometry.

    this process                         child process
    Trial.send ──► outbox ── NIXL ──►    inbox ──► arrival time, checksums
       ▲            ▲ credits ◄── pipe ──┘ │
       └────────────┴──────── pipe ◄───────┘

Clocks agree because both processes read the same CLOCK_MONOTONIC.
"""

from __future__ import annotations

import multiprocessing
import threading
import time
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from types import TracebackType

import msgspec
import numpy as np

from pdserve.config.worker_env import cache_dir
from pdserve.errors import TransferFailed
from pdserve.kv.cuda_copy import make_copier
from pdserve.kv.layout import PageIds
from pdserve.transfer.engine import MemoryKind, PeerName
from pdserve.transfer.inbox import Inbox
from pdserve.transfer.jobs import ChunkJob, Target, TransferRecord
from pdserve.transfer.messages import Ask, Credit, Void, decode_control, decode_offer, encode
from pdserve.transfer.nixl import AgentTuning, NixlEngine, tune_agents
from pdserve.transfer.outbox import Outbox
from pdserve.transfer.peer import PeerLink, RankPool, connect_peer, page_blocks
from pdserve.transfer.plan import Path
from pdserve.transfer.selftest.pool import PoolSums, TrialGeometry, TrialPool, make_buffer
from pdserve.transfer.slots import Slab, SlotLender
from pdserve.transfer.steps import StepRunner
from pdserve.transfer.warm_up import warm_up

__all__ = ["SendReport", "Trial", "TrialGeometry"]

SEND_S = 120.0
"""Longest wait for one room; a trial that takes longer has hung."""


class _Expect(msgspec.Struct, tag=True, frozen=True):
    room: int
    pages: list[int]


class _Digest(msgspec.Struct, tag=True, frozen=True):
    pages: list[int]
    num_tokens: int
    first_head: int
    num_heads: int


class _Stop(msgspec.Struct, tag=True, frozen=True):
    pass


class _Hello(msgspec.Struct, tag=True, frozen=True):
    engine: bytes
    offer: bytes


class _Arrived(msgspec.Struct, tag=True, frozen=True):
    room: int
    at_s: float
    scatter_s: float
    failure: str = ""


_Command = _Expect | _Digest | _Stop | Void | Ask
_COMMANDS: msgspec.msgpack.Decoder[_Command] = msgspec.msgpack.Decoder(_Command)
_REPLIES: msgspec.msgpack.Decoder[_Hello | _Arrived | PoolSums] = msgspec.msgpack.Decoder(
    _Hello | _Arrived | PoolSums
)


class _Rank:
    """Pool, slab and transport of one side."""

    def __init__(self, name: str, geometry: TrialGeometry) -> None:
        self.memory = TrialPool(geometry)
        memory = make_buffer(geometry, geometry.slab_bytes)
        self.slab = Slab(memory.address, geometry.slab_bytes, geometry.slot_bytes, memory)
        if geometry.kind is MemoryKind.DRAM:
            tune_agents(lambda: AgentTuning(has_progress_thread=False))
        self.engine = NixlEngine.create(name=name)
        self.engine.register(self.memory.spans(), geometry.kind)
        slab = np.array([(self.slab.address, geometry.slab_bytes, geometry.device)], dtype=np.uint64)
        self.engine.register(slab, geometry.kind)
        self.pool = RankPool(
            self.memory.regions, geometry.heads, geometry.tp_size, geometry.tp_rank,
            geometry.kind, geometry.device,
        )  # fmt: skip
        self.copier = make_copier(
            self.memory.regions, is_gpu=geometry.gpu >= 0, device=geometry.device,
            cache_dir=str(cache_dir() / "kernels"),
        )  # fmt: skip


class _DecodeRank:
    """The child process: answers commands, reports arrivals."""

    def __init__(self, geometry: TrialGeometry, commands: Connection, reports: Connection) -> None:
        self._commands, self._reports = commands, reports
        self._send_lock = threading.Lock()
        self._rank = _Rank("trial-decode", geometry)
        lender = SlotLender(self._rank.slab)
        self.inbox = Inbox(
            self._rank.engine, self._rank.copier, self, lender, lambda _, credit: self._report(credit)
        )
        self.inbox.expect_connection()
        self.inbox.start()

    def serve(self) -> None:
        offer = self._rank.pool.offer(self.inbox.lender, "trial-prefill", "trial")
        self._commands.send_bytes(encode(_Hello(self._rank.engine.describe(), encode(offer))))
        while True:
            match _COMMANDS.decode(self._commands.recv_bytes()):
                case _Expect(room, pages):
                    self.inbox.expect(room, np.array(pages, dtype=np.int32))
                    self._commands.send_bytes(b"")
                case _Digest(pages, num_tokens, first_head, num_heads):
                    ids = np.array(pages, dtype=np.int32)
                    sums = self._rank.memory.digest(ids, num_tokens, first_head, num_heads)
                    self._commands.send_bytes(encode(sums))
                case Void() | Ask() as control:
                    self.inbox.take_control(control)
                case _Stop():
                    self.inbox.close()
                    return

    def is_open(self, room: int) -> bool:
        return True

    def rank_arrived(self, room: int, rank: int) -> None:
        self._report(_Arrived(room, time.perf_counter(), self.inbox.stats.scatter_s))
        self.inbox.forget(room)

    def failed(self, room: int, reason: str) -> None:
        self._report(_Arrived(room, time.perf_counter(), self.inbox.stats.scatter_s, reason))

    def _report(self, message: msgspec.Struct) -> None:
        with self._send_lock:
            self._reports.send_bytes(encode(message))


def _serve(geometry: TrialGeometry, commands: Connection, reports: Connection) -> None:
    _DecodeRank(geometry, commands, reports).serve()


@dataclass(slots=True)
class SendReport:
    """One room, from submit to the decode rank's observation that every byte is in its pages. Seconds."""

    total_s: float
    cpu_s: float
    """CPU time of this whole process meanwhile."""
    scatter_s: float
    record: TransferRecord


@dataclass(slots=True)
class _Flight:
    done: threading.Event = field(default_factory=threading.Event)
    sent: threading.Event = field(default_factory=threading.Event)
    arrived: _Arrived | None = None
    failure: str = ""
    record: TransferRecord = field(default_factory=TransferRecord)


class Trial:
    """Both ranks, as a context manager. ``send`` one room at a time."""

    def __init__(
        self, source: TrialGeometry, target: TrialGeometry | None = None, *, piece_bytes: int = 2 << 20
    ) -> None:
        self.source, self.target = source, target or source
        context = multiprocessing.get_context("spawn")
        self._commands, commands = context.Pipe()
        reports_in, reports = context.Pipe(duplex=False)
        self._reports = reports_in
        self._send_lock = threading.Lock()
        self._child = context.Process(target=_serve, args=(self.target, commands, reports), daemon=True)
        self._child.start()
        reports.close()
        self._rank = _Rank("trial-prefill", source)
        self.pool = self._rank.memory
        self._flights: dict[int, _Flight] = {}
        self._next_room = 1
        self._scatter_s = 0.0
        self.link = self._connect(min(piece_bytes, source.slot_bytes))
        runner = StepRunner(
            self._rank.engine, self._rank.copier, self._rank.slab, rank=0, kind=source.kind,
            device=source.device,
        )  # fmt: skip
        self._outbox = Outbox(runner, self, self._send_control)
        self._outbox.add_peer(self.link)
        self._outbox.start()
        self._reader = threading.Thread(target=self._read_reports, name="pdserve-trial", daemon=True)
        self._reader.start()

    def _connect(self, max_piece_bytes: int) -> PeerLink:
        hello = _REPLIES.decode(self._commands.recv_bytes())
        assert isinstance(hello, _Hello)
        engine, pool = self._rank.engine, self._rank.pool
        link = connect_peer(
            engine, engine.connect(hello.engine), decode_offer(hello.offer), pool,
            source_blocks=engine.prepare(None, page_blocks(pool.regions, pool.device), pool.kind),
            max_piece_bytes=max_piece_bytes,
        )  # fmt: skip
        warm_up(engine, link, self._rank.slab.address)
        return link

    def __enter__(self) -> Trial:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._outbox.close()
        self._command(_Stop())
        self._child.join(10)
        if self._child.is_alive():
            self._child.kill()

    def send(
        self,
        source: PageIds,
        target: PageIds,
        *,
        path: Path | None = None,
        piece_bytes: int = 0,
        chunks: int = 1,
    ) -> SendReport:
        """Move all tokens of ``source`` pages into ``target`` pages.

        Raises:
            TransferFailed: when either side gave the room up.
        """
        room, flight = self._next_room, _Flight()
        self._next_room += 1
        self._flights[room] = flight
        self._command(_Expect(room, target.tolist()))
        self._commands.recv_bytes()
        if piece_bytes:
            self.link.piece_bytes = piece_bytes
        bounds = [len(source) * part // chunks for part in range(chunks + 1)]
        begin_cpu, begin = time.process_time(), time.perf_counter()
        for first, last in zip(bounds, bounds[1:], strict=False):  # noqa: RUF007
            self._outbox.submit(
                ChunkJob(
                    room=room, pages=source[first:last], first_token=first * self.source.page_size,
                    is_last=last == len(source), targets=[Target(PeerName(self.link.name), target)],
                    forced_path=path,
                )
            )  # fmt: skip
        if not flight.done.wait(SEND_S) or not flight.sent.wait(SEND_S):
            raise TransferFailed(room, flight.failure or f"nothing heard for {SEND_S:.0f} s")
        if flight.failure or flight.arrived is None:
            raise TransferFailed(room, flight.failure or "no arrival")
        scatter_s, self._scatter_s = flight.arrived.scatter_s - self._scatter_s, flight.arrived.scatter_s
        del self._flights[room]
        return SendReport(
            flight.arrived.at_s - begin, time.process_time() - begin_cpu, scatter_s, flight.record
        )

    def digest_target(
        self, pages: PageIds, num_tokens: int, first_head: int = 0, num_heads: int = 0
    ) -> PoolSums:
        """Checksums of the decode rank's pool; see ``TrialPool.digest``."""
        command = _Digest(pages.tolist(), num_tokens, first_head, num_heads or self.target.num_kv_heads)
        self._command(command)
        reply = _REPLIES.decode(self._commands.recv_bytes())
        assert isinstance(reply, PoolSums)
        return reply

    @property
    def num_due(self) -> int:
        """Pieces that the decode rank has not said it is done with."""
        return self._outbox.num_due

    # RoomGate

    def enter(self, room: int) -> bool:
        """Trial rooms are never closed."""
        return True

    def is_open(self, room: int) -> bool:
        """Trial rooms are never closed."""
        return True

    def finished(self, job: ChunkJob) -> None:
        """Keep what it took."""
        flight = self._flights[job.room]
        flight.record.add(job.record)
        if job.is_last:
            flight.sent.set()

    def failed(self, job: ChunkJob, *, settled: bool) -> None:
        """End the wait."""
        flight = self._flights[job.room]
        flight.failure = job.failure or "failed"
        flight.sent.set()
        flight.done.set()

    def _send_control(self, peer: PeerName, message: Void | Ask) -> None:
        self._command(message)

    def _command(self, message: msgspec.Struct) -> None:
        with self._send_lock:
            self._commands.send_bytes(encode(message))

    def _read_reports(self) -> None:
        while True:
            try:
                raw = self._reports.recv_bytes()
            except (EOFError, OSError):
                return
            if b"Arrived" not in raw[:24]:
                message = decode_control(raw)
                if isinstance(message, Credit):
                    self._outbox.credit(message)
                continue
            arrived = _REPLIES.decode(raw)
            assert isinstance(arrived, _Arrived)
            flight = self._flights[arrived.room]
            flight.arrived, flight.failure = arrived, arrived.failure or flight.failure
            flight.done.set()
