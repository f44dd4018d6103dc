"""What a server holds open to a peer is closed when the peer has left: classes of SGLang, real sockets."""

from __future__ import annotations

import pkgutil
import threading
from collections import defaultdict
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import psutil
import pytest

from tests.support.kv_rig import wait_until

pytestmark = pytest.mark.slow


class _Route(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        body = b'{"rank_ip": "127.0.0.1", "rank_port": 1}'
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None: ...


@pytest.fixture
def prefills() -> Iterator[list[str]]:
    """Addresses at which the bootstrap service answers, one for each of three prefill servers."""
    servers = [ThreadingHTTPServer(("127.0.0.1", 0), _Route) for _ in range(3)]
    for server in servers:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    yield [f"127.0.0.1:{server.server_address[1]}" for server in servers]
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.fixture
def decode(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A decode manager with the books that ``_handle_node_failure`` reads, hooked as a worker is."""
    from sglang.srt.disaggregation.common import conn

    from pdserve.plugin.backend import PdserveKVManager
    from pdserve.plugin.hooks import HOOKS, load

    for hook in HOOKS:
        if hook.path.rpartition(".")[0] == conn.__name__:
            monkeypatch.setattr(
                pkgutil.resolve_name(conn.__name__), hook.path.rpartition(".")[2], load(hook.replacement)
            )
    made = object.__new__(PdserveKVManager)
    made.decode_plane = None
    made.connection_lock = threading.Lock()
    made.connection_pool, made.prefill_info_table, made.heartbeat_failures = {}, {}, {}
    made.addr_to_rooms_tracker = defaultdict(set)
    return made


def _connections(addresses: list[str]) -> int:
    """Sockets of this process that lead to the servers there."""
    ports = {int(address.rpartition(":")[2]) for address in addresses}
    found = psutil.Process().net_connections("tcp")
    return sum(bool(one.raddr) and one.raddr.port in ports for one in found)


def test_no_http_connection_is_left_to_prefills_that_have_left(decode: Any, prefills: list[str]) -> None:
    from sglang.srt.disaggregation.common.conn import CommonKVReceiver

    receiver = object.__new__(CommonKVReceiver)
    for address in prefills:
        receiver.bootstrap_addr = address
        assert receiver._get_bootstrap_info_from_server(0, 0, 0, 0)["rank_port"] == 1
    assert _connections(prefills) == 3
    thread = threading.Thread(target=lambda: [decode._handle_node_failure(one) for one in prefills[:2]])
    thread.start()  # SGLang's heartbeat thread notices, the scheduler's thread has asked
    thread.join()
    assert _connections(prefills[:2]) == 0
    assert _connections(prefills) == 1, "the prefill that is still there keeps its connection"
    receiver.bootstrap_addr = prefills[0]
    assert receiver._get_bootstrap_info_from_server(0, 0, 0, 0), "one that comes back is asked again"


def test_control_sockets_of_lost_peers_are_closed_when_another_peer_comes() -> None:
    import zmq

    from pdserve.plugin.transfer_manager import TransferManager

    context = zmq.Context()
    manager = object.__new__(TransferManager)
    manager._zmq_ctx, manager._socket_lock = context, threading.RLock()
    manager._socket_cache, manager._monitor_cache, manager._socket_send_locks = {}, {}, {}
    manager.defer_decode_allocation = False
    stays = context.socket(zmq.PULL)
    stays_port = stays.bind_to_random_port("tcp://127.0.0.1")
    for _ in range(3):
        leaves = context.socket(zmq.PULL)
        port = leaves.bind_to_random_port("tcp://127.0.0.1")
        manager.send_control("127.0.0.1", port, [b"hello"])
        assert leaves.recv_multipart() == [b"hello"]
        leaves.close(linger=0)
        monitor = manager._monitor_cache[f"tcp://127.0.0.1:{port}"]
        wait_until(lambda monitor=monitor: bool(monitor.poll(10)))
    for _ in range(2):
        manager.send_control("127.0.0.1", stays_port, [b"still here"])
        assert stays.recv_multipart() == [b"still here"]
    assert list(manager._socket_cache) == [f"tcp://127.0.0.1:{stays_port}"]
    assert list(manager._monitor_cache) == list(manager._socket_cache)
    context.destroy(linger=0)
