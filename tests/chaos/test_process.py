"""Chaos finds the processes of one launched fleet, and touches no other."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pdserve.chaos.process import LaunchedFleet, descendants, parent_of
from pdserve.errors import ConfigError

pytestmark = pytest.mark.process

SERVER = """
import pathlib, signal, socket, subprocess, sys
sock = socket.create_server(("127.0.0.1", 0))
child = subprocess.Popen([sys.executable, "-c", "import signal; signal.pause()", "scheduler"])
scratch = pathlib.Path(sys.argv[1] + ".new")
scratch.write_text(f"{sock.getsockname()[1]} {child.pid}")
scratch.rename(sys.argv[1])
signal.pause()
"""
LAUNCHER = """
import signal, subprocess, sys
for path in sys.argv[3:]:
    subprocess.Popen([sys.executable, "-c", sys.argv[2], path])
signal.pause()
"""
"""Its own command line has the words ``pdserve`` and ``launch`` in it, or another command's."""


def eventually(path: Path) -> tuple[str, int]:
    deadline = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    port, child = path.read_text().split()
    return f"http://127.0.0.1:{port}", int(child)


@contextlib.contextmanager
def launched(folder: Path, command: str, *names: str) -> Iterator[dict[str, tuple[str, int]]]:
    """Servers by name: their address and their child."""
    paths = [str(folder / name) for name in names]
    argv = [sys.executable, "-c", LAUNCHER, f"pdserve {command}", SERVER, *paths]
    process = subprocess.Popen(argv, start_new_session=True)
    try:
        yield {name: eventually(folder / name) for name in names}
    finally:
        for pid in (*descendants(process.pid), process.pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.wait(10)


def test_servers_below_the_launcher_are_found_and_others_are_not(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    with launched(tmp_path, "launch", "balancer", "worker") as ours:
        with launched(tmp_path / "other", "launch", "balancer", "worker") as others:
            fleet = LaunchedFleet(ours["balancer"][0])
            server = fleet.server(ours["worker"][0])
            assert server is not None and server.children == (ours["worker"][1],)
            assert parent_of(server.leader) == fleet.launcher and server.scheduler == ours["worker"][1]
            assert fleet.server(others["worker"][0]) is None
            stranger = LaunchedFleet(others["balancer"][0]).server(others["worker"][0])
            assert stranger is not None
            assert fleet.send(stranger.everything, signal.SIGKILL) == 0
            assert LaunchedFleet(others["balancer"][0]).server(others["worker"][0]) == stranger
        assert fleet.send((server.scheduler,), signal.SIGKILL) == 1
        assert fleet.server("http://127.0.0.1:9") is None


def test_what_no_launcher_would_restart_is_refused(tmp_path: Path) -> None:
    with (
        launched(tmp_path, "balance", "balancer") as ours,
        pytest.raises(ConfigError, match="not started by"),
    ):
        LaunchedFleet(ours["balancer"][0])


@pytest.mark.parametrize(
    "url", ["http://127.0.0.1:9", "http://192.0.2.1:30000", "http://[2001:db8::1]:30000"]
)
def test_another_machine_is_refused(url: str) -> None:
    with pytest.raises(ConfigError, match="on this machine"):
        LaunchedFleet(url)
