"""The decode rank's data plane: rooms whose pages are ready in, completion and credits out."""

from __future__ import annotations

import logging
from typing import Any

from sglang.srt.disaggregation.base.conn import KVPoll
from sglang.srt.disaggregation.nixl.conn import NixlKVReceiver

from pdserve.errors import ProtocolMismatch
from pdserve.kv.coalesce import PageCopier
from pdserve.kv.layout import PageIds
from pdserve.plugin.idle import wake_scheduler
from pdserve.transfer.inbox import Inbox
from pdserve.transfer.messages import Credit, PeerOffer, decode_control, encode
from pdserve.transfer.nixl import NixlEngine
from pdserve.transfer.peer import RankPool
from pdserve.transfer.slots import SlotLender

logger = logging.getLogger(__name__)


class DecodePlane:
    """Data plane of one decode rank. ``manager`` is the PdserveKVManager that owns the rooms."""

    def __init__(
        self, manager: Any, engine: NixlEngine, copier: PageCopier, pool: RankPool, lender: SlotLender
    ) -> None:
        self._manager = manager
        self._pool = pool
        self._lender = lender
        self.inbox = Inbox(engine, copier, self, lender, self._send_credit)
        self.inbox.start()

    def offer(self, endpoint: str, instance_id: str, *, wants_slots: bool) -> PeerOffer:
        """What the prefill rank at ``endpoint`` (``ip:port``), which is about to connect, is told."""
        self.inbox.expect_connection()
        return self._pool.offer(self._lender, endpoint, instance_id, wants_slots=wants_slots)

    def bury(self, endpoints: set[str]) -> None:
        """These prefill ranks (``ip:port``) are believed dead."""
        self._lender.bury(endpoints)

    def expect(self, room: int, pages: PageIds) -> None:
        """The room's pages are about to be announced."""
        self.inbox.expect(room, pages)

    def take_control(self, raw: bytes) -> None:
        """A message of a prefill rank on the listener socket."""
        try:
            message = decode_control(raw)
        except ProtocolMismatch as exc:
            logger.warning("control message not acted on: %s", exc)
            return
        if not isinstance(message, Credit):
            self.inbox.take_control(message)

    # RoomOwner, called from the inbox thread

    def is_open(self, room: int) -> bool:
        """False once SGLang gave the room up."""
        status = self._manager.request_status.get(room)
        return status is not None and status not in (KVPoll.Failed, KVPoll.Success)

    def rank_arrived(self, room: int, rank: int) -> None:
        """SGLang counts the ranks and makes the room a success after the last one."""
        stats = self._manager.transfer_stats
        if stats is not None:
            own = self.inbox.stats
            stats.set(
                self._manager.stats_rank,
                messages=own.num_messages,
                scattered_bytes=own.scattered_bytes,
                scatter_us=round(own.scatter_s * 1e6),
            )
        self._manager.apply_prefill_status(bootstrap_room=room, status=int(KVPoll.Success), prefill_rank=rank)

    def failed(self, room: int, reason: str) -> None:
        """SGLang aborts the room at its next look, and asks the prefill ranks to stop."""
        logger.warning("room=%s: %s", room, reason)
        self._manager.apply_prefill_status(
            bootstrap_room=room, status=int(KVPoll.Failed), prefill_rank=-1, failure_reason=reason
        )
        wake_scheduler()

    def _send_credit(self, endpoint: str, credit: Credit) -> None:
        host, _, port = endpoint.rpartition(":")
        self._manager.send_control(host, int(port), [b"PDSERVE", encode(credit)])


class PdserveKVReceiver(NixlKVReceiver):
    """SGLang's receiver; announces its rooms to the inbox and offers slots of the slab."""

    def _register_kv_args(self) -> bool:
        if self.bootstrap_infos is None:
            return False
        message = self.kv_mgr.build_receiver_registration_message()
        for info in self.bootstrap_infos:
            endpoint = f"{info['rank_ip']}:{info['rank_port']}"
            # A dummy rank of MLA sends no KV: it would only hold slots that others need.
            frames = self.kv_mgr.offer_frames(endpoint, wants_slots=not info.get("is_dummy", False))
            if not self._send_bootstrap_message(
                bootstrap_info=info, message=[*message, *frames], operation="_register_kv_args"
            ):
                return False
        return True

    def send_metadata(self, kv_indices: Any, *args: Any, **kwargs: Any) -> None:
        """Expect the room before its prefill learns the pages."""
        plane = self.kv_mgr.decode_plane
        if plane is not None:
            plane.expect(self.bootstrap_room, kv_indices)
        super().send_metadata(kv_indices, *args, **kwargs)

    def _send_abort_notification(self, *, force_arm: bool = False) -> None:
        super()._send_abort_notification(force_arm=force_arm)
        if self._abort_generation is None:
            return  # nothing was announced to the prefill, so no page waits for an acknowledgement
        infos = self.bootstrap_infos or []
        endpoints = [(str(info["rank_ip"]), int(info["rank_port"])) for info in infos]
        self.kv_mgr.dead_peer_watch.watch(self.bootstrap_room, endpoints)

    def clear(self) -> None:
        """The room is over: later messages of it are nobody's."""
        plane = self.kv_mgr.decode_plane
        if plane is not None:
            plane.inbox.forget(self.bootstrap_room)
        super().clear()
