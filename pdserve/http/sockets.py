"""How the balancer sets its TCP sockets: no waiting to fill segments, no trust in a silent peer's host."""

from __future__ import annotations

import asyncio
import socket

KEEP_ALIVE = (("TCP_KEEPIDLE", 15), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 3))
"""A host that vanished without a word (power, network) is noticed after 15 + 3 * 5 = 30 s of silence;
otherwise an exchange with it would last for the whole silence limit. Named as in Linux's tcp(7)."""


def tune(transport: asyncio.BaseTransport) -> None:
    """Apply TCP_NODELAY and keep-alive probes; other kinds of sockets are left as they are."""
    sock = transport.get_extra_info("socket")
    if sock is None or sock.family not in (socket.AF_INET, socket.AF_INET6):
        return
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in KEEP_ALIVE:
        if hasattr(socket, name):
            sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
