"""A dead prefill rank owes no acknowledgement; a slow or unreachable one does."""

from __future__ import annotations

import socket

import pytest

from pdserve.plugin import dataplane as module
from pdserve.plugin.dataplane import DeadPeerWatch, refuses_connections
from tests.support.kv_rig import wait_until

GONE, ALIVE = ("127.0.0.1", 1), ("127.0.0.1", 2)


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "ACK_PATIENCE_S", 0.0)
    monkeypatch.setattr(module, "ACK_POLL_S", 0.01)


def test_room_is_released_once_all_its_ranks_are_dead() -> None:
    watcher = DeadPeerWatch(is_gone=lambda endpoint: endpoint == GONE)
    watcher.watch(1, [GONE])
    watcher.watch(2, [GONE, ALIVE])
    wait_until(lambda: watcher.are_all_dead(1))
    assert not watcher.are_all_dead(2)
    assert not watcher.are_all_dead(3)


def test_room_that_is_forgotten_is_asked_about_no_more() -> None:
    asked: list[object] = []
    watcher = DeadPeerWatch(is_gone=lambda endpoint: asked.append(endpoint) is not None)
    watcher.watch(1, [ALIVE])
    wait_until(lambda: bool(asked))
    watcher.forget(1)
    watcher.look()
    count = len(asked)
    watcher.look()
    assert len(asked) == count


def test_a_dead_rank_of_gpu_memory_owes_nothing_only_some_seconds_later() -> None:
    watcher = DeadPeerWatch(is_gone=lambda endpoint: True, settle_s=3600.0)
    watcher.watch(1, [GONE])
    wait_until(lambda: bool(watcher._gone_since_s))
    assert not watcher.are_all_dead(1)
    watcher._settle_s = 0.0
    assert watcher.are_all_dead(1)


def test_only_a_refused_connection_is_proof_of_death() -> None:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        endpoint = server.getsockname()
        assert not refuses_connections(endpoint)
    assert refuses_connections(endpoint)
    assert not refuses_connections(("name.that.does.not.exist.invalid", 1))
