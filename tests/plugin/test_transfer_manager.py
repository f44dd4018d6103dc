"""The manager's rules of telling and waiting, on SGLang's own classes without servers or transport."""

from __future__ import annotations

import threading
from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from pdserve.transfer.engine import MemoryKind

pytestmark = pytest.mark.slow

ROOM, AGENT = 77, "agent-d"


class Event:
    """A CUDA event as the manager sees it."""

    def __init__(self) -> None:
        self.is_over = False
        self.was_waited_for = False

    def query(self) -> bool:
        return self.is_over

    def synchronize(self) -> None:
        self.was_waited_for = True


class Plane:
    """Records what the manager asks of the prefill plane."""

    def __init__(self) -> None:
        self.submitted: list[dict[str, Any]] = []
        self.failed_rooms: dict[int, str] = {}
        self.refusals: dict[str, str] = {}
        self.agents = {AGENT}
        from pdserve.plugin.sending import Joins

        self.joins = Joins()

    def knows(self, agent: str) -> bool:
        return agent in self.agents

    def submit(self, room: int, infos: list[Any], **chunk: Any) -> None:
        self.submitted.append(chunk)

    def remember_failure(self, room: int, reason: str) -> None:
        self.failed_rooms[room] = reason

    def failure_of(self, room: int) -> str | None:
        return self.failed_rooms.get(room)

    def refusal(self, agent: str) -> str | None:
        return self.refusals.get(agent)

    def take_control(self, raw: bytes) -> None:
        raise ValueError("unreadable")


@pytest.fixture
def manager(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A prefill manager with its books, and every status message kept instead of sent."""
    from pdserve.plugin.transfer_manager import TransferManager

    made = object.__new__(TransferManager)
    made.prefill_plane = Plane()  # type: ignore[assignment]
    made.transfer_infos, made.request_status, made.failure_records = {}, {}, {}
    made.failure_lock = threading.Lock()
    made.kv_args = SimpleNamespace(kv_data_mem_kinds=["DRAM"])
    made._deferred_ack_targets, made._deferred_ack_poisoned_rooms = {}, set()
    made._staging_outstanding = defaultdict(int)
    made.req_to_decode_prefix_len = {}
    made.deferred_bootstrap = None
    made.enable_deferred_decode_kv_release = True
    made.is_mla_backend = False
    made.told = []
    monkeypatch.setattr(
        TransferManager, "send_kv_status_message",
        lambda self, *, targets, bootstrap_room, status, failure_reason=None: self.told.append(
            (bootstrap_room, int(status), failure_reason, list(targets))
        ) if targets else None,
    )  # fmt: skip
    return made


def _info(agent: str = AGENT, required: int = 1) -> Any:
    return SimpleNamespace(
        room=ROOM, agent_name=agent, endpoint="10.0.0.9", dst_port=5, is_dummy=False,
        required_dst_info_num=required, decode_prefix_len=0,
        dst_kv_indices=np.array([1], dtype=np.int32), dst_aux_index=0,
    )  # fmt: skip


def _open(manager: Any) -> None:
    from sglang.srt.disaggregation.base.conn import KVPoll

    manager.update_status(ROOM, KVPoll.Bootstrapping)


def test_chunk_is_held_back_by_its_events_without_blocking_the_scheduler(manager: Any) -> None:
    manager.transfer_infos[ROOM] = {AGENT: _info()}
    events = [Event(), Event()]
    manager.add_transfer_request(
        ROOM, np.array([3]), slice(0, 1), False, wait_event=events[0], indices_event=events[1]
    )
    (chunk,) = manager.prefill_plane.submitted
    assert chunk["events"] == events
    assert not any(event.was_waited_for for event in events)


def test_page_ids_that_still_travel_to_the_host_are_read_when_their_event_is_over(manager: Any) -> None:
    import torch

    from pdserve.plugin.backend import PdserveKVSender
    from pdserve.plugin.sending import PrefillPlane

    plane: Any = object.__new__(PrefillPlane)
    jobs: list[Any] = []
    plane._forced_path, plane._links, plane._refused = None, {AGENT: None}, {}
    plane._own = SimpleNamespace(kind=MemoryKind.VRAM, regions=SimpleNamespace(page_size=4))
    plane._manager, plane.outbox = manager, SimpleNamespace(submit=jobs.append)
    manager.decode_kv_args_table = {AGENT: SimpleNamespace()}
    manager.prefill_plane, manager.transfer_infos[ROOM] = plane, {AGENT: _info()}
    pages, event = torch.full((3,), -1, dtype=torch.int32), Event()
    manager.add_transfer_request(ROOM, pages, slice(0, 3), False, indices_event=event)
    (job,) = jobs
    assert not job.is_ready()
    pages.copy_(torch.tensor([7, 8, 9]))
    event.is_over = True
    assert job.is_ready()
    assert job.pages.tolist() == [7, 8, 9]
    sender = object.__new__(PdserveKVSender)
    sender.kv_mgr = manager
    assert sender.supports_host_tensor_indices
    plane._own.kind = MemoryKind.DRAM
    assert not sender.supports_host_tensor_indices, "SGLang would make a CUDA event"


def test_peer_without_our_data_plane_gets_sglangs_path_after_the_event(
    manager: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sglang.srt.disaggregation.nixl.conn import NixlKVManager

    seen: list[bool] = []
    event = Event()
    monkeypatch.setattr(
        NixlKVManager, "add_transfer_request", lambda self, *args, **kwargs: seen.append(event.was_waited_for)
    )
    manager.transfer_infos[ROOM] = {"stock": _info("stock")}
    manager.add_transfer_request(ROOM, np.array([3]), slice(0, 1), False, wait_event=event)
    assert seen == [True]
    assert not manager.prefill_plane.submitted


def test_failure_is_told_to_every_decode_rank_with_its_reason(manager: Any) -> None:
    from sglang.srt.disaggregation.base.conn import KVPoll

    _open(manager)
    other = _info("other")
    other.dst_port = 6
    manager.transfer_infos[ROOM] = {AGENT: _info(), "other": other}
    manager.record_failure(ROOM, "Aborted by AbortReq.")
    manager.update_status(ROOM, KVPoll.Failed)
    manager.update_status(ROOM, KVPoll.Failed)
    assert manager.told == [
        (ROOM, int(KVPoll.Failed), "Aborted by AbortReq.", [("10.0.0.9", 5), ("10.0.0.9", 6)])
    ]


def test_decode_that_asks_after_the_failure_is_told_then(manager: Any) -> None:
    from sglang.srt.disaggregation.base.conn import KVPoll

    _open(manager)
    manager.record_failure(ROOM, "too long")
    manager.update_status(ROOM, KVPoll.Failed)
    assert manager.told == []
    manager._take_room(_info())
    assert manager.told == [(ROOM, int(KVPoll.Failed), "too long", [("10.0.0.9", 5)])]
    assert ROOM not in manager.transfer_infos


def test_room_waits_until_all_its_decode_ranks_have_come(manager: Any) -> None:
    from sglang.srt.disaggregation.base.conn import KVPoll

    _open(manager)
    manager._take_room(_info(required=2))
    assert manager.request_status[ROOM] == KVPoll.Bootstrapping
    manager._take_room(_info("second", required=2))
    assert manager.request_status[ROOM] == KVPoll.WaitingForInput


def test_rooms_of_a_decode_rank_that_does_not_fit_fail_with_the_difference(manager: Any) -> None:
    _open(manager)
    manager.prefill_plane.refusals[AGENT] = "6 regions, this prefill has 4"
    manager._take_room(_info())
    assert manager.told[0][2] == "6 regions, this prefill has 4"
    assert manager.prefill_plane.failed_rooms[ROOM] == "6 regions, this prefill has 4"


def test_abort_that_overtakes_its_request_is_remembered(manager: Any) -> None:
    from sglang.srt.disaggregation.common.conn import AbortNotification

    manager.transfer_infos[ROOM] = {AGENT: _info()}
    manager._maybe_ack_drained_abort = lambda room: None
    message = AbortNotification(room=ROOM, decode_ip="10.0.0.9", decode_port=5, generation=1).to_zmq()
    manager._take_message(message)
    assert manager.prefill_plane.failed_rooms == {ROOM: "aborted by the decode server"}
    assert ROOM not in manager.transfer_infos


def test_control_thread_outlives_messages_it_cannot_read(manager: Any) -> None:
    served = threading.Event()
    messages = [[b"PDSERVE", b"junk"], [b"GET / HTTP/1.1"], [b"NixlMsgGuard", b"not a room"]]

    class Socket:
        def recv_multipart(self) -> list[bytes]:
            if messages:
                return messages.pop(0)
            served.set()
            threading.Event().wait()
            raise AssertionError

    manager.server_socket = Socket()
    threading.Thread(target=manager._serve_decode_ranks, daemon=True).start()
    assert served.wait(5)


def test_pages_are_kept_while_a_scatter_runs_whoever_has_acknowledged(manager: Any) -> None:
    busy = {ROOM}
    manager.decode_plane = SimpleNamespace(inbox=SimpleNamespace(is_busy=lambda room: room in busy))
    manager._deferred_abort_ack_tracker = {}
    assert not manager.is_abort_release_safe(ROOM, 0)
    busy.clear()
    assert manager.is_abort_release_safe(ROOM, 0)
    assert not manager.is_abort_release_safe(ROOM, 1)
