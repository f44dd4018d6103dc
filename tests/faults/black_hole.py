"""A port that takes connection attempts and never completes them, as a machine that is gone does.

Linux drops a SYN whose listener has a full accept queue; the client then waits for an
answer that does not come. No packet filter is needed.
"""

from __future__ import annotations

import select
import socket
from typing import Self

FILLERS = 4


class BlackHole:
    """``with BlackHole(port):`` a connect to the port on 127.0.0.1 hangs."""

    def __init__(self, port: int) -> None:
        self._listener = socket.socket()
        self._listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._listener.bind(("127.0.0.1", port))
        self._listener.listen(0)
        self._fillers = [socket.socket() for _ in range(FILLERS)]
        for filler in self._fillers:
            filler.setblocking(False)
            filler.connect_ex(("127.0.0.1", port))
        _, done, _ = select.select([], self._fillers, [], 0)
        assert len(done) < FILLERS, "every connection was accepted"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        for sock in (*self._fillers, self._listener):
            sock.close()
