"""The decode rank's data plane: rooms whose pages are ready in, completion and credits out."""

from __future__ import annotations

import logging
from typing import Any

from sglang.srt.disaggregation.base.conn import KVPoll

from pdserve.errors import ProtocolMismatch
from pdserve.kv.coalesce import PageCopier
from pdserve.kv.layout import PageIds
from pdserve.plugin.dataplane import WindowTable
from pdserve.plugin.idle import wake_scheduler
from pdserve.transfer.inbox import Inbox, Window
from pdserve.transfer.messages import Credit, Void, decode_control, encode
from pdserve.transfer.nixl import NixlEngine

logger = logging.getLogger(__name__)


class DecodePlane:
    """Data plane of one decode rank. ``manager`` is the PdserveKVManager that owns the rooms."""

    def __init__(self, manager: Any, engine: NixlEngine, copier: PageCopier, windows: WindowTable) -> None:
        self._manager = manager
        self.windows = windows
        self.inbox = Inbox(engine, copier, self, self._send_credit)
        self.inbox.start()

    def window_for(self, endpoint: str) -> Window | None:
        """The slab window that a prefill rank (``ip:port``) may write to; None when all are out."""
        window = self.windows.window_of(endpoint)
        self.inbox.expect_connection()
        if window is not None:
            self.inbox.close_window(window.number - self.windows.count)
            self.inbox.open_window(window)
        return window

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
        if isinstance(message, Void):
            self.inbox.void(message)

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

    def _send_credit(self, credit: Credit) -> None:
        endpoint = self.windows.holder(credit.window)
        if endpoint is None:
            return
        host, _, port = endpoint.rpartition(":")
        self._manager.send_control(host, int(port), [b"PDSERVE", encode(credit)])
