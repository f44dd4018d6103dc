"""TCP sockets: bound ones to listen on, and options of connections."""

from __future__ import annotations

import asyncio
import socket

BACKLOG = 2048

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


def bind(host: str, port: int) -> socket.socket:
    """Return a bound TCP socket; SO_REUSEADDR lets a restarted service have its former port.

    Raises:
        OSError: if there is no such host here, or the port is taken.
    """
    family, kind, proto, _, address = socket.getaddrinfo(
        host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    )[0]
    listener = socket.socket(family, kind, proto)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(BACKLOG)
    except BaseException:
        listener.close()
        raise
    listener.setblocking(False)
    return listener
