"""The prefill rank's data plane: SGLang's rooms and chunks in, outbox jobs out.

    add_transfer_request ──► ChunkJob ──► outbox ──► finished ──► room Success, prefill answers
    ABORT from decode ──► room Failed ──► outbox stops posting ──► last write settles ──► ABORT_ACK
    room fails here ──► KV_STATUS Failed to every decode rank at once

The count in ``_staging_outstanding`` is SGLang's own: its abort acknowledgement
waits for it, so decode keeps its pages until nothing of ours can land in them.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import threading
from collections import OrderedDict, deque
from collections.abc import Callable
from typing import Any

import numpy as np
from sglang.srt.disaggregation.base.conn import KVPoll

from pdserve.errors import PdserveError, PeerLost, ProtocolMismatch
from pdserve.kv.coalesce import PageCopier
from pdserve.kv.cuda_copy import TorchRuntime
from pdserve.plugin.dataplane import Endpoint, refuses_connections
from pdserve.plugin.idle import wake_scheduler
from pdserve.plugin.layers import LayerClock
from pdserve.transfer.engine import MemoryKind, PeerName, Spans
from pdserve.transfer.jobs import ChunkJob, Target, TransferRecord
from pdserve.transfer.messages import Ask, Credit, PeerOffer, Void, decode_control, encode
from pdserve.transfer.nixl import NixlEngine
from pdserve.transfer.outbox import Outbox
from pdserve.transfer.peer import PeerLink, RankPool, connect_peer, page_blocks
from pdserve.transfer.plan import Path
from pdserve.transfer.slots import Slab
from pdserve.transfer.steps import StepRunner
from pdserve.transfer.warm_up import warm_up

logger = logging.getLogger(__name__)

CONTROL_TAG = b"PDSERVE"
"""First frame of our messages on SGLang's ZMQ sockets."""

MAX_REMEMBERED_ROOMS = 10_000
"""Failed rooms and records kept for decode ranks and metrics that ask late."""


class Joins:
    """First contact with decode ranks, on threads of their own; what they ask for meanwhile waits for it.

    Mapping a peer's memory takes up to seconds. Credits and aborts of all others come
    through the thread that takes registrations, so it must not wait.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.turn = threading.Lock()
        """Held by whoever acts on a room, or registers a peer with SGLang's own path."""
        self._queues: dict[str, deque[tuple[int | None, Callable[[], None]]]] = {}

    def connect(self, agent: str, connect: Callable[[], None]) -> None:
        """Start ``connect``, or do it after what ``agent`` has asked for so far if it is joining already."""
        with self._lock:
            is_joining = agent in self._queues
            self._queues.setdefault(agent, deque()).append((None, connect))
        if not is_joining:
            threading.Thread(target=self._run, args=(agent,), name="pdserve-join", daemon=True).start()

    def take(self, room: int, action: Callable[[], None], agent: str | None = None) -> None:
        """Do ``action``, one at a time; later, in order, if ``agent`` or the room itself waits for a join.

        Args:
            agent: the decode rank that asks; None: any of the room's.
        """
        with self._lock:
            for name, queue in self._queues.items():
                if name == agent or any(waiting == room for waiting, _ in queue):
                    queue.append((room, action))
                    return
        with self.turn:
            action()

    def is_joining(self, agent: str) -> bool:
        """True while ``agent``'s first contact, or what waited for it, is not over."""
        with self._lock:
            return agent in self._queues

    def _run(self, agent: str) -> None:
        while True:
            with self._lock:
                room, action = self._queues[agent][0]
            try:
                with contextlib.nullcontext() if room is None else self.turn:
                    action()
            except Exception:
                logger.exception("decode rank %s: message not acted on", agent)
            with self._lock:
                self._queues[agent].popleft()
                if not self._queues[agent]:
                    del self._queues[agent]
                    return


class PrefillPlane:
    """Data plane of one prefill rank. ``manager`` is the PdserveKVManager that owns the rooms."""

    def __init__(
        self, manager: Any, engine: NixlEngine, copier: PageCopier, own: RankPool, slab: Slab,
        *, forced_path: Path | None, sends_layers: bool = False,
    ) -> None:  # fmt: skip
        self.sends_layers = sends_layers
        self._manager = manager
        self._engine = engine
        self._own = own
        self._slab = slab
        self._forced_path = forced_path
        self._blocks = engine.prepare(None, page_blocks(own.regions, own.device), own.kind)
        self.joins = Joins()
        self._links: dict[str, PeerLink] = {}
        self._refused: dict[str, str] = {}
        self._failed_rooms: OrderedDict[int, str] = OrderedDict()
        self._records: OrderedDict[int, TransferRecord] = OrderedDict()
        self._records_lock = threading.Lock()
        runner = StepRunner(
            engine, copier, slab, rank=manager._prefill_unique_rank(), kind=own.kind, device=own.device,
        )  # fmt: skip
        self.outbox = Outbox(runner, self, self._send_control)
        self.outbox.start()

    @property
    def is_gpu(self) -> bool:
        """The pools lie in GPU memory."""
        return self._own.kind is MemoryKind.VRAM

    @property
    def num_layers(self) -> int:
        """Of this rank's pools."""
        return self._own.regions.num_regions // self._own.regions.regions_per_layer

    def recorder(self, stream: Any) -> Callable[[], Callable[[], bool]]:
        """What marks a point of the forwards' ``torch.cuda.Stream``, as DeviceRuntime does."""
        return TorchRuntime(self._own.device, stream).record if self.is_gpu else _at_once

    # Peers

    def connect(self, info: Any, offer: PeerOffer) -> None:
        """A decode rank has registered, or is loaded again after the transport had dropped it.

        ``info`` is SGLang's KVArgsRegisterInfo. A rank whose pools do not fit is
        remembered: its rooms fail at once with the reason.
        """
        name = str(info.agent_name)
        try:
            peer = self._engine.connect(info.agent_metadata)
            link = connect_peer(
                self._engine, peer, offer, self._own, source_blocks=self._blocks,
                max_piece_bytes=self._slab.slot_bytes,
            )  # fmt: skip
        except PdserveError as exc:
            logger.error("decode rank %s cannot be served: %s", name, exc)
            self._refused[name] = str(exc)
            self._links.pop(name, None)
            return
        if not link.can_direct and link.piece_bytes <= 0 and offer.holder:  # 0: it is sent nothing
            self._links.pop(name, None)
            self._manager.serve_without_offer(
                info, "one side has no kernels for its GPU: use one --page-size"
            )
            return
        known = self._links.get(name)
        if known is None:
            warm_up(self._engine, link, self._slab.address)
        self._refused.pop(name, None)
        self._links[name] = link
        self.outbox.add_peer(link)

    def refuse(self, agent: str, reason: str) -> None:
        """Rooms of this decode rank fail at once with ``reason``."""
        logger.error("decode rank cannot be served: %s", reason)
        self._refused[agent] = reason

    def knows(self, agent: str) -> bool:
        """True for a decode rank that this plane serves, or refuses by name."""
        return agent in self._links or agent in self._refused

    def refusal(self, agent: str) -> str | None:
        """Why rooms of this decode rank must fail; None when they need not."""
        return self._refused.get(agent)

    # Rooms

    def serves(self, room: int) -> bool:
        """True if all decode ranks of the room are known, and can be served from here."""
        infos = [info for info in self._manager.transfer_infos.get(room, {}).values() if not info.is_dummy]
        return bool(infos) and self.is_open(room) and all(info.agent_name in self._links for info in infos)

    def submit(self, room: int, infos: list[Any], *, kv_indices: Any, first_page: int, is_last: bool,
               aux_index: int | None, events: list[Any]) -> None:  # fmt: skip
        """Queue one chunk of a room for every decode rank in ``infos`` (SGLang's TransferInfo).

        Args:
            events: what its pages wait for, CUDA events; a LayerClock among them tells of its layers.
        """
        clock = next((event for event in events if isinstance(event, LayerClock)), None)
        events = [event for event in events if event is not clock]
        tables = [self._manager.decode_kv_args_table[info.agent_name] for info in infos]
        aux = None if aux_index is None else self._own_aux(aux_index, tables)
        targets = []
        for info, table in zip(infos, tables, strict=True):
            peer_aux = None if aux is None else self._peer_aux(table, info.dst_aux_index, len(aux))
            targets.append(Target(PeerName(info.agent_name), info.dst_kv_indices, peer_aux))
        self.outbox.submit(
            ChunkJob(
                room=room,
                pages=np.asarray(kv_indices),  # of a tensor the same memory: filled when the events are over
                first_token=first_page * self._own.regions.page_size,
                is_last=is_last,
                targets=targets,
                aux=aux,
                is_ready=lambda: all(event.query() for event in events),
                num_filled=None if clock is None else self._regions_of(clock),
                forced_path=self._forced_path,
            )
        )

    def _regions_of(self, clock: LayerClock) -> Callable[[], int]:
        return lambda: clock.num_done() * self._own.regions.regions_per_layer

    def remember_failure(self, room: int, reason: str) -> None:
        """Decode may ask for this room only later; then it must hear the reason, not wait for a time-out."""
        self._failed_rooms[room] = reason
        while len(self._failed_rooms) > MAX_REMEMBERED_ROOMS:
            self._failed_rooms.popitem(last=False)

    def failure_of(self, room: int) -> str | None:
        """Why the room had failed before decode asked for it."""
        return self._failed_rooms.get(room)

    def take_record(self, room: int) -> TransferRecord | None:
        """What the room's transfer took, once; None if it never went through this plane."""
        with self._records_lock:
            return self._records.pop(room, None)

    def take_control(self, raw: bytes) -> None:
        """A message of a decode rank on the control socket."""
        try:
            message = decode_control(raw)
        except ProtocolMismatch as exc:
            logger.warning("control message not acted on: %s", exc)
            return
        if isinstance(message, Credit):
            self.outbox.credit(message)

    # RoomGate, called from the outbox thread

    def enter(self, room: int) -> bool:
        """Count first, look second: an abort that comes in between waits for the count."""
        manager = self._manager
        manager._staging_outstanding[room] += 1
        if self.is_open(room):
            manager.update_status(room, KVPoll.Transferring)
            return True
        self._leave(room)
        return False

    def is_open(self, room: int) -> bool:
        """False once SGLang or decode gave the room up."""
        status = self._manager.request_status.get(room)
        return status is not None and status != KVPoll.Failed

    def finished(self, job: ChunkJob) -> None:
        """All writes of a chunk are done; after the last chunk the room is a success on this side."""
        manager, room = self._manager, job.room
        self._keep_record(job)
        if job.is_last and manager.conclude_transfer(
            bootstrap_room=room, status=KVPoll.Success, targets=[]
        ) == KVPoll.Failed:  # fmt: skip
            manager.tell_decode(room)
        if job.is_entered:
            self._leave(room)
        if job.is_last and manager._staging_outstanding.get(room, 0) <= 0:
            manager._staging_outstanding.pop(room, None)
            manager.transfer_infos.pop(room, None)
            manager.req_to_decode_prefix_len.pop(room, None)
            wake_scheduler()

    def failed(self, job: ChunkJob, *, settled: bool) -> None:
        """A chunk failed. Decode hears of it at once and releases its pages once our count is zero."""
        manager, room = self._manager, job.room
        infos = manager.transfer_infos.get(room) or {}
        if job.may_have_written or not settled:
            manager.poison_deferred_ack_room(room)
        if not job.is_silent:
            logger.warning("room=%s: KV transfer failed: %s", room, job.failure)
            if manager.transfer_stats is not None:
                manager.transfer_stats.add(manager.stats_rank, failures=1)
            manager.conclude_failure(bootstrap_room=room, failure_reason=job.failure or "KV transfer failed")
        if job.is_entered and settled:
            self._leave(room)
        wake_scheduler()
        if not job.is_silent:
            self._reload_peers(list(infos))

    def _leave(self, room: int) -> None:
        manager = self._manager
        manager._staging_outstanding[room] -= 1
        if manager.enable_deferred_decode_kv_release:
            manager._maybe_ack_drained_abort(room)
        if room not in manager.request_status and manager._staging_outstanding[room] <= 0:
            manager._staging_outstanding.pop(room, None)

    def _keep_record(self, job: ChunkJob) -> None:
        with self._records_lock:
            self._records.setdefault(job.room, TransferRecord()).add(job.record)
            while len(self._records) > MAX_REMEMBERED_ROOMS:
                self._records.popitem(last=False)

    def _reload_peers(self, agents: list[str]) -> None:
        """NIXL forgets a peer after a disconnect and never restores it; load it again from what we hold."""
        for agent in agents:
            info = self._manager.decode_kv_args_table.get(agent)
            if info is None or agent not in self._links or self.joins.is_joining(agent):
                continue
            with contextlib.suppress(PeerLost):
                if not self._engine.is_connected(PeerName(agent)):
                    logger.warning("transport lost decode rank %s; loading it again", agent)
                    self.joins.connect(agent, functools.partial(self.connect, info, info.pdserve_offer))

    def _send_control(self, peer: PeerName, message: Void | Ask) -> None:
        info = self._manager.decode_kv_args_table.get(str(peer))
        if info is None or str(peer) not in self._links:
            return
        self._manager.send_control(info.endpoint, int(info.dst_port), [CONTROL_TAG, encode(message)])
        if isinstance(message, Void):  # a slot whose credit has not come: rare, and looking may take a second
            look = functools.partial(self.forget_if_gone, str(peer), (str(info.endpoint), int(info.dst_port)))
            threading.Thread(target=look, name="pdserve-dead-peers", daemon=True).start()

    def forget_if_gone(self, agent: str, endpoint: Endpoint) -> None:
        """Drop all that is kept for a decode rank if its control port is closed: its process is gone."""
        if not refuses_connections(endpoint) or agent not in self._links:
            return
        reason = f"decode rank {agent} at {endpoint[0]}:{endpoint[1]} is gone"
        self.refuse(agent, reason)  # first: one that is neither known nor refused is served SGLang's way
        self._links.pop(agent, None)
        self.outbox.remove_peer(PeerName(agent), reason)

    def _own_aux(self, index: int, tables: list[Any]) -> Spans:
        """Metadata rows; the leading ones if a decode rank has registered fewer, as SGLang's send_aux."""
        args = self._manager.kv_args
        count = min(len(args.aux_data_ptrs), *(len(table.dst_aux_ptrs) for table in tables))
        return _rows(args.aux_data_ptrs[:count], args.aux_item_lens, index)

    def _peer_aux(self, table: Any, index: int, count: int) -> Spans:
        # The stride is this side's item length, as SGLang's send_aux has it.
        return _rows(table.dst_aux_ptrs[:count], self._manager.kv_args.aux_item_lens, index)


def _at_once() -> Callable[[], bool]:
    """In host memory a layer is filled when the call returns."""
    return lambda: True


def _rows(pointers: list[int], lengths: list[int], index: int) -> Spans:
    return np.array(
        [(pointer + length * index, length, 0) for pointer, length in zip(pointers, lengths, strict=False)],
        dtype=np.uint64,
    )
