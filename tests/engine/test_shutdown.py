"""Servers and a launch that are told to stop, under load: nobody's request is lost or tried twice."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import psutil
import pytest

from tests.engine.corpus import CORPUS
from tests.engine.fleet import Fleet, call, generate_body, launch_fleet, wait_for

pytestmark = pytest.mark.engine

CLIENTS = 4


class Load:
    """Clients that ask one request after the other, each on a kept connection while it is kept."""

    def __init__(self, url: str) -> None:
        self.answers: list[tuple[int, str, str]] = []
        """Status, finish, and ``Connection`` of each answer."""
        self.errors: list[str] = []
        self._address = urlsplit(url).netloc
        self._is_over = threading.Event()
        self._threads = [threading.Thread(target=self._run, args=(i,)) for i in range(CLIENTS)]

    def _run(self, index: int) -> None:
        connection = http.client.HTTPConnection(self._address, timeout=60)
        number = index
        while not self._is_over.is_set():
            prompt = CORPUS[number % len(CORPUS)]
            number += CLIENTS
            body = json.dumps(generate_body(prompt, stream=bool(number % 2)))
            try:
                connection.request("POST", "/generate", body, {"Content-Type": "application/json"})
                response = connection.getresponse()
                data = response.read()
            except (OSError, http.client.HTTPException) as exc:
                self.errors.append(repr(exc))
                return
            finish = "error" if b'"error"' in data else "whole"
            self.answers.append((response.status, finish, response.getheader("Connection") or ""))
        connection.close()

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """While inside; every request is over afterwards."""
        for thread in self._threads:
            thread.start()
        try:
            yield
        finally:
            self._is_over.set()
            for thread in self._threads:
                thread.join(90)

    def wait_more(self, count: int) -> None:
        """Wait for that many more answers."""
        goal = len(self.answers) + count
        wait_for(lambda: self.errors or len(self.answers) >= goal, f"{count} more answers")

    def check(self) -> None:
        """All were served."""
        assert not self.errors
        assert {answer[:2] for answer in self.answers} == {(200, "whole")}


@pytest.fixture(scope="module")
def two_pairs(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    folder = tmp_path_factory.mktemp("shutdown")
    flags = ("--shutdown-delay", "3600")  # ended by a second signal to the balancer
    with launch_fleet(tiny_model, folder, prefill=1, decode=2, flags=flags) as fleet:
        yield fleet


@pytest.mark.parametrize("name", ["decode-1", "prefill-0"])
def test_a_server_that_is_told_to_stop_leaves_first(two_pairs: Fleet, name: str) -> None:
    two_pairs.wait_ready(2)
    before, pid = two_pairs.state()["requests"], two_pairs.pid(name)
    load = Load(two_pairs.url)
    with load.running():
        load.wait_more(8)
        os.kill(pid, signal.SIGTERM)
        wait_for(lambda: two_pairs.worker(name)["state"] == "draining", "its leaving")
        if name == "decode-1":
            load.wait_more(8)
        wait_for(lambda: two_pairs.pid(name) not in (0, pid), "its successor", 120)
        two_pairs.wait_ready(2)
        load.wait_more(8)
    load.check()
    after = two_pairs.state()["requests"]
    assert {key: after[key] - before[key] for key in ("failed", "aborted", "shed", "retried")} == {
        "failed": 0, "aborted": 0, "shed": 0, "retried": 0
    }  # fmt: skip


def test_a_launch_that_is_told_to_stop_serves_until_nobody_comes(two_pairs: Fleet) -> None:
    """Clients go on for the delay and end before it does, as a load balancer sees to it."""
    two_pairs.wait_ready(2)
    children = psutil.Process(two_pairs.launcher.pid).children()
    (balancer,) = [
        child
        for child in children
        if "pdserve.process.service" in child.cmdline()[:3] and "balancer" in child.cmdline()
    ]
    load = Load(two_pairs.url)
    with load.running():
        load.wait_more(8)
        two_pairs.launcher.send_signal(signal.SIGTERM)
        wait_for(lambda: call(two_pairs.url, "GET", "/readiness")[0] == 503, "readiness 503")
        load.wait_more(2 * CLIENTS)
    load.check()
    assert load.answers[-1][2] == "close"
    balancer.send_signal(signal.SIGTERM)
    assert two_pairs.launcher.wait(60) == 0
