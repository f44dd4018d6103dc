"""A crashed child process is noticed, and the server's own connections are closed, no others."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
from collections.abc import Iterator

import pytest

from pdserve.plugin.children import close_connections, wait_for_crash

pytestmark = pytest.mark.process


def _child(code: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", code])


@pytest.fixture
def sleeper() -> Iterator[subprocess.Popen[bytes]]:
    """A child that lives until it is killed."""
    child = _child("import time; time.sleep(600)")
    yield child
    child.kill()
    child.wait(60)


def test_killed_child_is_named_and_left_for_its_owner_to_reap(sleeper: subprocess.Popen[bytes]) -> None:
    other = _child("import time; time.sleep(600)")
    other.kill()
    assert wait_for_crash([sleeper.pid, other.pid]) == other.pid
    assert other.wait(60) == -signal.SIGKILL


def test_child_that_fails_has_crashed() -> None:
    child = _child("raise SystemExit(3)")
    assert wait_for_crash([child.pid]) == child.pid
    assert child.wait(60) == 3


def test_children_that_end_well_have_not_crashed() -> None:
    children = [_child("") for _ in range(2)]
    assert wait_for_crash([child.pid for child in children]) is None
    assert [child.wait(60) for child in children] == [0, 0]


def test_child_that_was_reaped_before_has_crashed() -> None:
    child = _child("raise SystemExit(3)")
    child.wait(60)
    assert wait_for_crash([child.pid]) == child.pid


def test_connections_of_the_port_are_closed_and_no_others() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_server(("127.0.0.1", 0)) as other:
        port = server.getsockname()[1]
        client = socket.create_connection(server.getsockname())
        accepted, _ = server.accept()
        outside = socket.create_connection(other.getsockname())
        outside_accepted, _ = other.accept()
        with client, accepted, outside, outside_accepted:
            close_connections(port)
            assert client.recv(1) == b""
            outside_accepted.sendall(b"x")
            assert outside.recv(1) == b"x"
            with pytest.raises(OSError):
                socket.create_connection(("127.0.0.1", port), timeout=10)
