"""A server joins only once it answers at its address itself: another fleet's worker may have the port."""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import pytest

from pdserve.bootstrap.client import LeaseClient, LeaseKeeper
from pdserve.plugin.membership import ask_instance
from pdserve.plugin.patches import wait_until_listening
from tests.support.bootstrap_parts import report, service, until, worker

KEY = "secret"


@contextlib.contextmanager
def listening(instance_id: str, port: int = 0) -> Iterator[ThreadingHTTPServer]:
    """A worker's HTTP server that says who it is to whoever has the key; ``asked`` counts the questions."""

    class Instance(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            server.asked += 1  # type: ignore[attr-defined]
            is_allowed = self.headers["Authorization"] == f"Bearer {KEY}"
            self.send_response(200 if is_allowed else 401)
            self.end_headers()
            self.wfile.write(json.dumps({"instance_id": instance_id}).encode())

        def log_message(self, format: str, *args: object) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", port), Instance)
    server.asked = 0  # type: ignore[attr-defined]
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


async def test_a_server_that_lost_its_port_does_not_join_under_the_winners_address(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PDSERVE_ACTIVE", "1")
    monkeypatch.setenv("PDSERVE_INSTANCE_ID", "ours")
    async with service() as fleet:
        info = worker("prefill-0", "ours")
        await asyncio.to_thread(LeaseClient(fleet.url).report_rank, info.instance_id, report())
        keeper = LeaseKeeper(fleet.url, info, on_refused=lambda exc: None)
        with listening("of another fleet") as winner:
            port = winner.server_address[1]
            args = SimpleNamespace(host="127.0.0.1", port=port, api_key=KEY, admin_api_key=None)
            # As SGLang does in its warm-up thread: this step, then the launch callback.
            starting = asyncio.create_task(asyncio.to_thread(wait_until_listening, lambda _: "done", args))
            starting.add_done_callback(lambda _: keeper.start())
            await until(lambda: winner.asked >= 3, "did not ask who listens")  # type: ignore[attr-defined]
            assert not starting.done() and not fleet.fleet.members()
        with listening("ours", port):
            assert await asyncio.wait_for(starting, 60) == "done"
            await until(lambda: len(fleet.fleet.members()) == 1, "did not join")
            await asyncio.to_thread(keeper.stop)


def test_who_is_no_worker_has_no_instance() -> None:
    with listening("ours") as server:
        port = server.server_address[1]
        assert ask_instance("127.0.0.1", port, KEY) == {"instance_id": "ours"}
        assert ask_instance("127.0.0.1", port) == {}
    assert ask_instance("127.0.0.1", port, KEY) == {}
