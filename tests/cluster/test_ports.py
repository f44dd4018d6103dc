"""Free ports: real sockets on loopback."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Iterator

import pytest

from pdserve.cluster.ports import SystemPorts, port_owner
from pdserve.errors import ConfigError

HOST = "127.0.0.1"
linux_only = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="/proc is Linux")


@pytest.fixture
def taken() -> Iterator[int]:
    with socket.create_server((HOST, 0)) as server:
        yield server.getsockname()[1]


def test_pick_skips_taken_ports(taken: int) -> None:
    assert SystemPorts().pick(HOST, taken) > taken


def test_nothing_is_given_out_twice() -> None:
    ports = SystemPorts()
    first = ports.pick(HOST, 0)
    assert ports.pick(HOST, first) > first
    anywhere = [ports.pick(HOST, 0) for _ in range(20)]
    assert len({first, *anywhere}) == 21
    with pytest.raises(ConfigError, match=rf"{first} is asked for twice.*--port"):
        ports.claim(HOST, first, "--port")


def test_claim_returns_a_free_port_and_zero_means_any() -> None:
    free = SystemPorts().claim(HOST, 0, "--port")
    assert free > 0
    assert SystemPorts().claim(HOST, free, "--port") == free


@linux_only
def test_claim_names_the_owner_of_a_taken_port(taken: int) -> None:
    with pytest.raises(ConfigError) as caught:
        SystemPorts().claim(HOST, taken, "--port")
    assert f"port {taken} is in use by pid {os.getpid()} (" in str(caught.value)
    assert str(caught.value).endswith("choose another with --port")


@linux_only
def test_listener_on_one_address_blocks_the_wildcard(taken: int) -> None:
    with pytest.raises(ConfigError, match="in use"):
        SystemPorts().claim("0.0.0.0", taken, "--port")


def test_connections_of_an_ended_service_do_not_block_its_port() -> None:
    """The side that closes first keeps the port in TIME_WAIT for a minute; a restart must not care."""
    with socket.create_server((HOST, 0)) as server:
        port = server.getsockname()[1]
        client = socket.create_connection((HOST, port))
        served, _ = server.accept()
        served.close()
        client.recv(1)
        client.close()
    assert SystemPorts().claim(HOST, port, "--port") == port


@linux_only
def test_owner_of_a_free_port_is_nobody() -> None:
    assert port_owner(SystemPorts().pick(HOST, 0)) is None


def test_foreign_host_is_a_config_error() -> None:
    with pytest.raises(ConfigError, match="not an address of this machine"):
        SystemPorts().pick("192.0.2.1", 0)
