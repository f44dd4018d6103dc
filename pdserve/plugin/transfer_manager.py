"""SGLang's NIXL manager with pdserve's data plane in it.

    decode                                     prefill
    registration + PeerOffer frame ──────────► connect, warm up
    room metadata (page ids) ────────────────► room WaitingForInput
                                               chunks ─► outbox
    inbox counts messages ◄──── NIXL writes ───┘
    Credit ──────────────────────────────────► slots of the slab again
    KV_STATUS Failed ◄──────────────────────── any failure or abort, at once

Everything else, and every peer that sends no offer, stays SGLang's own path.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import threading
from typing import Any

import numpy as np
from sglang.srt.configs.model_config import ModelConfig
from sglang.srt.disaggregation.base.conn import KVPoll
from sglang.srt.disaggregation.common.conn import ABORT_TAG, AbortNotification
from sglang.srt.disaggregation.nixl.conn import (
    GUARD,
    KVArgsRegisterInfo,
    NixlKVManager,
    TransferInfo,
)
from sglang.srt.disaggregation.utils import DisaggregationMode
from sglang.srt.environ import envs
from sglang.srt.runtime_context import get_exec, get_spec
from sglang.srt.utils.network import NetworkAddress

from pdserve.config.worker_env import WorkerEnv, ucx_transports
from pdserve.errors import ConfigError, ProtocolMismatch, RegistrationFailed
from pdserve.kv.coalesce import NoCopier, PageCopier
from pdserve.kv.cuda_copy import make_copier
from pdserve.kv.layout import PagedRegions
from pdserve.plugin.dataplane import (
    BACKENDS,
    GPU_TEARDOWN_S,
    DeadPeerWatch,
    device_id,
    make_slab,
    regions_of,
    unsupported,
)
from pdserve.plugin.geometry import rank_index
from pdserve.plugin.layers import hidden_layers, sends_layers
from pdserve.plugin.receiving import DecodePlane
from pdserve.plugin.sending import CONTROL_TAG, PrefillPlane
from pdserve.plugin.stats import TransferStats
from pdserve.transfer.engine import MemoryKind
from pdserve.transfer.messages import PeerOffer, decode_offer, encode
from pdserve.transfer.nixl import NixlEngine
from pdserve.transfer.peer import RankPool
from pdserve.transfer.plan import Path
from pdserve.transfer.slots import Slab, SlotLender
from pdserve.transfer.ucx import transport_problem

logger = logging.getLogger(__name__)

OFFER_FRAME = 24
"""Index of our frame in a registration, after SGLang's own (0 is the room, "None")."""


class TransferManager(NixlKVManager):
    """Data plane side of ``PdserveKVManager``; the planes are None while it is off or not possible."""

    prefill_plane: PrefillPlane | None = None
    decode_plane: DecodePlane | None = None
    _pdserve_env: WorkerEnv
    transfer_stats: TransferStats | None = None

    @functools.cached_property
    def dead_peer_watch(self) -> DeadPeerWatch:
        """Watches prefill ranks that owe an abort acknowledgement."""
        is_gpu = set(self.kv_args.kv_data_mem_kinds) == {MemoryKind.VRAM}
        return DeadPeerWatch(settle_s=GPU_TEARDOWN_S if is_gpu else 0.0)

    @property
    def stats_rank(self) -> int:
        """This rank's row in the server's transfer counters."""
        return rank_index(self)[0]

    @property
    def converts_pages(self) -> bool:
        """True if this rank exchanges KV with pools of another page size.

        A decode radix cache cannot: the prefix it holds ends on its own page, which
        need not be a page of the prefill's.
        """
        has_radix = bool(self.server_args.disaggregation_decode_enable_radix_cache)
        is_decode = self.disaggregation_mode == DisaggregationMode.DECODE
        return not unsupported(self, self._pdserve_env) and not (is_decode and has_radix)

    def register_buffer_to_engine(self) -> None:
        """SGLang registers its pools; then, before any of its threads run, the planes come up."""
        super().register_buffer_to_engine()
        backend = str(envs.SGLANG_DISAGGREGATION_NIXL_BACKEND.get())
        reason = unsupported(self, self._pdserve_env)
        if not reason and backend not in BACKENDS:
            reason = f"NIXL backend {backend}"
        if not reason and envs.SGLANG_DISAGG_STAGING_BUFFER.get():
            reason = "SGLang's own staging buffer"
        kind = MemoryKind(self.kv_args.kv_data_mem_kinds[0]) if self.kv_args.kv_data_ptrs else None
        if backend == "UCX" and kind is not None and (problem := transport_problem(ucx_transports(), kind)):
            raise RegistrationFailed(problem)
        if reason:
            logger.info("data plane off (%s): KV goes SGLang's way", reason)
            return
        self._make_plane()

    def _make_plane(self) -> None:
        config, args = self._pdserve_env.data_plane, self.kv_args
        model = ModelConfig.from_server_args(self.server_args)
        is_mla = bool(self.is_mla_backend)
        total_heads = 1 if is_mla else int(model.get_total_num_kv_heads())
        # Every MLA rank holds the same latent row: as if there were one rank.
        tp_size = 1 if is_mla else int(self.attn_tp_size)
        tp_rank = 0 if is_mla else int(self.attn_tp_rank)
        regions = regions_of(args, is_mla=is_mla, total_kv_heads=total_heads, tp_size=tp_size)
        kind, device = MemoryKind(args.kv_data_mem_kinds[0]), int(args.gpu_id)
        dtype = str(args.kv_cache_dtype_str)
        dtype = str(model.dtype).removeprefix("torch.") if dtype == "auto" else dtype
        engine = NixlEngine(self.agent)
        copier = self._make_copier(regions, kind, device)
        slab_bytes = config.slab_bytes(is_gpu=kind is MemoryKind.VRAM)
        slab = make_slab(engine, slab_bytes, kind, device) if copier else Slab(0, 0, 0, None)
        copier = copier or NoCopier()
        pool = RankPool(regions, total_heads, tp_size, tp_rank, kind, device_id(kind, device), dtype)
        if self.disaggregation_mode == DisaggregationMode.PREFILL:
            forced_path = None if config.path == "auto" else Path(config.path)
            hidden = hidden_layers(
                get_exec(), get_spec(), is_mla=is_mla, num_regions=regions.num_regions,
                num_layers=int(model.num_hidden_layers),
            )  # fmt: skip
            self.prefill_plane = PrefillPlane(
                self, engine, copier, pool, slab, forced_path=forced_path,
                sends_layers=sends_layers(config.layerwise, hidden, is_gpu=kind is MemoryKind.VRAM),
            )  # fmt: skip
        else:
            lender = SlotLender(slab)
            self.decode_plane = DecodePlane(self, engine, copier, pool, lender)
        logger.info(
            "data plane on: %d regions of %d pages, slab %d MiB in slots of %d KiB, path %s",
            regions.num_regions, regions.num_pages, slab.nbytes >> 20, slab.slot_bytes >> 10, config.path,
        )  # fmt: skip

    def _make_copier(self, regions: PagedRegions, kind: MemoryKind, device: int) -> PageCopier | None:
        """None if this machine has no kernels for its GPU: only pages of the same bytes can be sent then."""
        is_gpu, cache = kind is MemoryKind.VRAM, self._pdserve_env.data_plane.cache_dir
        try:
            return make_copier(regions, is_gpu=is_gpu, device=device, cache_dir=cache)
        except ConfigError as exc:
            problem = str(exc).partition("\n")[0]
            logger.warning("no packing of KV, page by page only, and no conversion: %s", problem)
            return None

    def send_control(self, host: str, port: int, frames: list[bytes]) -> None:
        """Best-effort message to a peer's ZMQ socket; one that is gone does not need it."""
        address = NetworkAddress(host, port)
        try:
            self._send_multipart_locked(address.to_tcp(), frames, is_ipv6=address.is_ipv6)
        except Exception as exc:
            logger.warning("control message to %s not sent: %s", address.to_host_port_str(), exc)

    def _connect(self, endpoint: str, is_ipv6: bool = False) -> Any:
        """As SGLang's; before a new peer's socket is made, those of peers that are gone are closed."""
        if endpoint not in self._socket_cache:
            self._close_lost_sockets()
        return super()._connect(endpoint, is_ipv6=is_ipv6)

    def _close_lost_sockets(self) -> None:
        with self._socket_lock:
            for endpoint, monitor in list(self._monitor_cache.items()):
                sending = self._socket_send_locks[endpoint]
                if not monitor.poll(0) or not sending.acquire(blocking=False):
                    continue  # connected, or in use by another thread: the next new peer finds it
                with contextlib.closing(monitor), contextlib.closing(self._socket_cache.pop(endpoint)):
                    del self._monitor_cache[endpoint]
                    sending.release()

    # Prefill side

    def _start_bootstrap_thread(self) -> None:
        if self.prefill_plane is None:
            super()._start_bootstrap_thread()
            return
        threading.Thread(target=self._serve_decode_ranks, name="pdserve-control", daemon=True).start()

    def _serve_decode_ranks(self) -> None:
        """Messages of decode ranks. Unlike SGLang's thread it outlives a message it cannot read."""
        while True:
            frames = self.server_socket.recv_multipart()
            try:
                self._take_message(frames)
            except Exception:
                logger.exception("control socket: message of %d frames not acted on", len(frames))

    def _take_message(self, frames: list[bytes]) -> None:
        plane = self.prefill_plane
        assert plane is not None
        if frames[0] == CONTROL_TAG:
            plane.take_control(frames[1])
        elif frames[0] == ABORT_TAG:
            if notification := AbortNotification.from_zmq(frames):
                room = notification.room
                plane.joins.take(room, functools.partial(self._take_abort, frames, room))
        elif frames[0] != GUARD:
            logger.warning("control socket: foreign message of %d frames", len(frames))
        elif frames[1] == b"None":
            self._take_registration(frames[1:])
        else:
            info = TransferInfo.from_zmq(frames[1:])
            plane.joins.take(info.room, functools.partial(self._take_room, info), info.agent_name)

    def _take_abort(self, frames: list[bytes], room: int) -> None:
        """An abort may overtake the request itself: its room must then fail at once, not after 300 s."""
        self._handle_abort_notification(frames)
        if room in self.request_status:
            return
        assert self.prefill_plane is not None
        self.transfer_infos.pop(room, None)
        self.prefill_plane.remember_failure(room, "aborted by the decode server")

    def _take_registration(self, frames: list[bytes]) -> None:
        info = KVArgsRegisterInfo.from_zmq(frames)
        offer, problem = _read_offer(frames)
        plane = self.prefill_plane
        assert plane is not None
        if offer is None:
            self.serve_without_offer(info, problem or "it is off there: use one --page-size")
            return
        info.pdserve_offer = offer
        self.check_peer_aux_buffer_count(info.agent_name, len(info.dst_aux_ptrs))
        self.decode_kv_args_table[info.agent_name] = info
        plane.joins.connect(info.agent_name, functools.partial(plane.connect, info, offer))

    def serve_without_offer(self, info: Any, why: str) -> None:
        """Let SGLang's own path serve a decode rank that the data plane cannot, if pages are alike.

        Args:
            why: what keeps the data plane from converting, and what to do.
        """
        plane = self.prefill_plane
        assert plane is not None
        ours, theirs = list(self.kv_args.kv_item_lens), list(info.dst_kv_item_lens)
        if info.decode_tp_size == self.attn_tp_size and theirs[: len(ours)] != ours:
            plane.refuse(
                str(info.agent_name),
                f"decode rank {info.agent_name}: pages of {theirs[0]} bytes, this prefill's {ours[0]}; "
                f"only pdserve's data plane converts, and {why}",
            )
            return
        with plane.joins.turn:
            self._add_remote_peer(info)

    def _take_room(self, info: Any) -> None:
        plane, room = self.prefill_plane, info.room
        assert plane is not None
        infos = self.transfer_infos.setdefault(room, {})
        infos[info.agent_name] = info
        if (reason := plane.failure_of(room)) is not None:
            self.transfer_infos.pop(room, None)
            self._send_failure([(info.endpoint, info.dst_port)], room, reason)
            return
        if (reason := plane.refusal(info.agent_name)) is not None:
            # This server may not have heard of the room yet: its request fails when it comes.
            plane.remember_failure(room, reason)
            self.record_failure(room, reason)
            self.tell_decode(room, reason)
            self.update_status(room, KVPoll.Failed)
            return
        if len(infos) != info.required_dst_info_num:
            return
        self.resolve_kv_replica_factor(infos)
        lengths = (one.decode_prefix_len for one in infos.values() if one.decode_prefix_len is not None)
        self.req_to_decode_prefix_len[room] = next(lengths, 0)
        self.update_status(room, KVPoll.WaitingForInput)

    def update_status(self, bootstrap_room: int, status: Any) -> None:
        """As SGLang's; a prefill rank's failure is told to decode at once instead of after 300 s."""
        was = self.request_status.get(bootstrap_room)
        super().update_status(bootstrap_room, status)
        plane = self.prefill_plane
        if plane is None or status != KVPoll.Failed or was in (None, KVPoll.Failed):
            return
        self.tell_decode(bootstrap_room)

    def tell_decode(self, room: int, reason: str | None = None) -> None:
        """Send KV_STATUS Failed to the room's decode ranks, or keep the news for those still to come."""
        plane = self.prefill_plane
        assert plane is not None
        with self.failure_lock:
            reason = reason or self.failure_records.get(room) or "prefill gave the request up"
        targets = self._room_notify_targets(room)
        if targets:
            self._send_failure(targets, room, reason)
        else:
            plane.remember_failure(room, reason)

    def _send_failure(self, targets: list[tuple[str, int]], room: int, reason: str) -> None:
        self.send_kv_status_message(
            targets=targets, bootstrap_room=room, status=KVPoll.Failed, failure_reason=reason
        )

    def add_transfer_request(
        self, bootstrap_room: int, kv_indices: Any, index_slice: slice, is_last_chunk: bool,
        aux_index: int | None = None, state_indices: Any = None, num_kv_tokens: int | None = None,
        *, wait_event: Any = None, indices_event: Any = None, trace_ctx: Any = None,
    ) -> None:  # fmt: skip
        """Queue a chunk. Waits, without blocking, for the events that SGLang's NIXL manager drops."""
        infos = [info for info in self.transfer_infos.get(bootstrap_room, {}).values() if not info.is_dummy]
        plane = self.prefill_plane
        if plane is None or not infos or not all(plane.knows(info.agent_name) for info in infos):
            for event in (wait_event, indices_event):
                if event is not None:
                    event.synchronize()
            super().add_transfer_request(
                bootstrap_room, np.asarray(kv_indices), index_slice, is_last_chunk,
                aux_index=aux_index, state_indices=state_indices, num_kv_tokens=num_kv_tokens,
            )  # fmt: skip
            return
        plane.submit(
            bootstrap_room, infos, kv_indices=kv_indices, first_page=index_slice.start or 0,
            is_last=is_last_chunk, aux_index=aux_index if is_last_chunk else None,
            events=[event for event in (wait_event, indices_event) if event is not None],
        )  # fmt: skip

    # Decode side

    def handle_chunk_ready(self, msg: list[bytes]) -> bool:
        """First look at every message on the decode listener; ours go to the plane."""
        if msg and msg[0] == CONTROL_TAG:
            if self.decode_plane is not None:
                self.decode_plane.take_control(msg[1])
            return True
        return bool(super().handle_chunk_ready(msg))

    def is_abort_release_safe(self, bootstrap_room: int, required_acks: int) -> bool:
        """As SGLang's, and no scatter runs into the room's pages; a dead prefill rank owes nothing."""
        if self.decode_plane is not None and self.decode_plane.inbox.is_busy(bootstrap_room):
            return False
        if self.dead_peer_watch.are_all_dead(bootstrap_room):
            return True
        return bool(super().is_abort_release_safe(bootstrap_room, required_acks))

    def clear_deferred_abort_state(self, bootstrap_room: int) -> None:
        """The room's pages are released."""
        self.dead_peer_watch.forget(bootstrap_room)
        super().clear_deferred_abort_state(bootstrap_room)

    def offer_frames(self, endpoint: str, *, wants_slots: bool) -> list[bytes]:
        """Our frame for the registration with this prefill rank (``ip:port``); none without a plane."""
        plane = self.decode_plane
        if plane is None:
            return []
        return [encode(plane.offer(endpoint, self._pdserve_env.instance_id, wants_slots=wants_slots))]


def _read_offer(frames: list[bytes]) -> tuple[PeerOffer | None, str]:
    """A registration's offer, or None and why one that is there cannot be used."""
    if len(frames) <= OFFER_FRAME or not frames[OFFER_FRAME]:
        return None, ""
    try:
        return decode_offer(frames[OFFER_FRAME]), ""
    except ProtocolMismatch as exc:
        logger.warning("decode rank %s: %s; it is served SGLang's way", frames[3].decode(), exc)
        return None, str(exc)
