"""A decode rank that joins slowly holds up its own rooms, and nobody else's credits, aborts and rooms."""

from __future__ import annotations

import threading
from types import SimpleNamespace
from typing import Any

import pytest

from tests.plugin.test_transfer_manager import AGENT, ROOM, Plane, _info, _open, manager
from tests.support.kv_rig import wait_until

__all__ = ["manager"]
pytestmark = pytest.mark.slow

OTHER_ROOM = 78


class SlowPlane(Plane):
    """First contact is over when the test says so."""

    def __init__(self) -> None:
        super().__init__()
        self.agents = {"other"}
        self.credits: list[bytes] = []
        self.may_connect = threading.Event()

    def connect(self, info: Any, offer: Any) -> None:
        assert self.may_connect.wait(60)
        self.agents.add(info.agent_name)

    def take_control(self, raw: bytes) -> None:
        self.credits.append(raw)


@pytest.fixture
def joining(manager: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A prefill manager that has just taken ``AGENT``'s registration and knows ``other``."""
    from pdserve.plugin import transfer_manager as module

    manager.prefill_plane = SlowPlane()
    manager.decode_kv_args_table = {}
    manager._maybe_ack_drained_abort = lambda room: None
    monkeypatch.setattr(type(manager), "check_peer_aux_buffer_count", lambda *args: None)
    registration = SimpleNamespace(agent_name=AGENT, dst_aux_ptrs=[])
    monkeypatch.setattr(module, "KVArgsRegisterInfo", SimpleNamespace(from_zmq=lambda frames: registration))
    monkeypatch.setattr(module, "_read_offer", lambda frames: (SimpleNamespace(), ""))
    rooms = {b"mine": _info(), b"other": _info("other")}
    rooms[b"other"].room = OTHER_ROOM
    monkeypatch.setattr(module, "TransferInfo", SimpleNamespace(from_zmq=lambda frames: rooms[frames[0]]))
    manager._take_message([b"NixlMsgGuard", b"None"])
    return manager


def _abort(room: int) -> list[bytes]:
    from sglang.srt.disaggregation.common.conn import AbortNotification

    return AbortNotification(room=room, decode_ip="10.0.0.9", decode_port=5, generation=1).to_zmq()


def test_credits_aborts_and_rooms_of_others_pass_a_join(joining: Any) -> None:
    from sglang.srt.disaggregation.base.conn import KVPoll

    joining.update_status(OTHER_ROOM, KVPoll.Bootstrapping)
    joining._take_message([b"PDSERVE", b"credit"])
    joining._take_message([b"NixlMsgGuard", b"other"])
    assert joining.prefill_plane.credits == [b"credit"]
    assert joining.request_status[OTHER_ROOM] == KVPoll.WaitingForInput
    joining._take_message(_abort(OTHER_ROOM))
    assert joining.request_status[OTHER_ROOM] == KVPoll.Failed
    joining.prefill_plane.may_connect.set()


def test_rooms_of_the_joining_rank_start_when_it_is_known(joining: Any) -> None:
    from sglang.srt.disaggregation.base.conn import KVPoll

    _open(joining)
    joining._take_message([b"NixlMsgGuard", b"mine"])
    assert joining.request_status[ROOM] == KVPoll.Bootstrapping
    joining.prefill_plane.may_connect.set()
    wait_until(lambda: joining.request_status[ROOM] == KVPoll.WaitingForInput, timeout_s=60)
    assert joining.prefill_plane.knows(AGENT)


def test_an_abort_does_not_overtake_its_room_that_waits_for_the_join(joining: Any) -> None:
    from sglang.srt.disaggregation.base.conn import KVPoll

    _open(joining)
    joining._take_message([b"NixlMsgGuard", b"mine"])
    joining._take_message(_abort(ROOM))
    assert joining.request_status[ROOM] == KVPoll.Bootstrapping
    joining.prefill_plane.may_connect.set()
    wait_until(lambda: not joining.prefill_plane.joins.is_joining(AGENT), timeout_s=60)
    assert joining.request_status[ROOM] == KVPoll.Failed


def test_a_join_that_fails_lets_what_waited_go_on(joining: Any) -> None:
    plane, done = joining.prefill_plane, []
    plane.joins.connect(AGENT, lambda: done.append("again") or 1 / 0)  # type: ignore[func-returns-value]
    plane.joins.take(ROOM, lambda: done.append("room"), AGENT)
    plane.may_connect.set()
    wait_until(lambda: not plane.joins.is_joining(AGENT), timeout_s=60)
    assert done == ["again", "room"]
