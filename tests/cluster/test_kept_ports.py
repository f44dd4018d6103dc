"""A planned port stays a fleet's own from the plan to the first request, and through every restart."""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys

import pytest

from pdserve.cluster.ports import SystemPorts
from pdserve.http.sockets import bind

HOST = "127.0.0.1"


def test_two_fleets_that_plan_at_the_same_time_get_different_ports() -> None:
    with SystemPorts() as one, SystemPorts() as other:
        first = one.pick(HOST, 31000)
        ports = {first, other.pick(HOST, first), one.pick(HOST, first), other.pick(HOST, first)}
        assert len(ports) == 4
    with SystemPorts() as later:
        assert later.pick(HOST, first) == first, "an ended fleet keeps no port"


def test_the_port_is_not_given_to_an_outgoing_connection_or_to_whoever_wants_any() -> None:
    with SystemPorts() as ports:
        kept = ports.pick(HOST, 0)
        with pytest.raises(OSError, match="in use"), socket.socket() as stranger:
            stranger.bind((HOST, kept))


@pytest.mark.parametrize("how", ["pdserve", "asyncio", "uvloop"])
def test_its_own_server_listens_there_again_and_again(how: str) -> None:
    async def serve(port: int) -> None:
        if how == "pdserve":
            server = await asyncio.start_server(lambda r, w: w.close(), sock=bind(HOST, port))
        else:  # as uvicorn does, which SGLang runs in
            server = await asyncio.start_server(lambda r, w: w.close(), HOST, port)
        async with server:
            reader, writer = await asyncio.open_connection(HOST, port)
            assert await reader.read() == b""
            writer.close()

    factory = None
    if how == "uvloop":
        factory = pytest.importorskip("uvloop", reason="uvloop is not installed").new_event_loop
    with SystemPorts() as ports:
        port = ports.pick(HOST, 0)
        for _ in range(2):
            with asyncio.Runner(loop_factory=factory) as runner:
                runner.run(serve(port))
            with pytest.raises(ConnectionRefusedError):  # a dead server's port refuses, it does not hang
                socket.create_connection((HOST, port))


@pytest.mark.process
def test_a_joining_worker_keeps_its_port_after_the_command_has_become_the_worker() -> None:
    code = (
        "import os, sys\n"
        "from pdserve.cluster.ports import SystemPorts\n"
        "ports = SystemPorts()\n"
        "port = ports.pick('127.0.0.1', 0)\n"
        "ports.hand_on()\n"
        "print(port, flush=True)\n"
        "os.execv(sys.executable, [sys.executable, '-c', 'print(\"worker\", flush=True); input()'])\n"
    )
    command = [sys.executable, "-c", code]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=dict(os.environ)
    ) as process:
        assert process.stdout is not None
        port = int(process.stdout.readline())
        assert process.stdout.readline() == "worker\n"
        with SystemPorts() as ports:
            assert ports.pick(HOST, port) != port
        with socket.create_server((HOST, port)):
            pass
        process.communicate("\n")
