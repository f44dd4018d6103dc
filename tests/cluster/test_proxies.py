"""A proxy in the environment is for the world outside: workers reach the fleet's own addresses without it."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import requests

from pdserve.config.worker_env import NO_PROXY, PROXIES, go_past_proxies
from tests.cluster.test_spec import plan
from tests.support.rows import rows

DEAD = "http://127.0.0.1:9"
"""Nobody listens there (the discard port)."""


class _Service(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None: ...


@pytest.fixture
def service() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Service)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}/route"
    server.shutdown()
    server.server_close()


@pytest.fixture(autouse=True)
def _own_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*PROXIES, *NO_PROXY):
        monkeypatch.delenv(name, raising=False)


@rows("name", PROXIES)
def test_a_worker_reaches_the_bootstrap_service_past_any_proxy(
    service: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    environ = {name: DEAD, "no_proxy": "internal.example"}
    worker = plan(environ=environ).workers[0]
    for variable, value in {**environ, **worker.env}.items():
        monkeypatch.setenv(variable, value)
    assert requests.get(service, timeout=5).status_code == 200
    assert requests.utils.should_bypass_proxies("http://internal.example/", no_proxy=None)
    assert not requests.utils.should_bypass_proxies("http://hub.example/", no_proxy=None)


def test_without_a_proxy_nothing_is_set() -> None:
    assert not set(NO_PROXY) & set(plan(environ={"NO_PROXY": "a"}).workers[0].env)
    assert not set(NO_PROXY) & set(plan(environ={"http_proxy": DEAD, "NO_PROXY": "*"}).workers[0].env)


def test_the_address_of_another_machine_is_exempt_once_it_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", DEAD)
    assert not requests.utils.should_bypass_proxies("http://10.1.2.3:20000/route", no_proxy=None)
    go_past_proxies("10.1.2.3")
    assert requests.utils.should_bypass_proxies("http://10.1.2.3:20000/route", no_proxy=None)
    assert not requests.utils.should_bypass_proxies("http://10.1.2.4:20000/route", no_proxy=None)
