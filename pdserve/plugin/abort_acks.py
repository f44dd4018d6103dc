"""Tells when a prefill rank that owes an abort acknowledgement is dead, so that its pages need not wait 30 s.

A decode server keeps the pages of an aborted transfer until every prefill rank
has said that nothing of it can land any more. A dead rank never says so; SGLang
then waits for its time-out. The rank's control port is bound by the very process
that writes: when it refuses connections, that process is gone.
"""

from __future__ import annotations

import logging
import socket
import threading
import time
from collections.abc import Callable, Sequence

logger = logging.getLogger(__name__)

PATIENCE_S = 0.5
"""A live rank acknowledges within milliseconds; ask about it only after this long."""

INTERVAL_S = 0.5

GIVE_UP_S = 120.0
"""Far beyond SGLang's own time-out: a room still here was never handed back to us."""

Endpoint = tuple[str, int]


class DeadPeerWatch:
    """Watches the endpoints of rooms that wait for acknowledgements. Thread-safe."""

    def __init__(self, is_gone: Callable[[Endpoint], bool] | None = None) -> None:
        self._is_gone = is_gone or refuses_connections
        self._waiting: dict[int, tuple[tuple[Endpoint, ...], float]] = {}
        self._dead: set[Endpoint] = set()
        self._wake = threading.Condition()
        self._thread: threading.Thread | None = None

    def watch(self, room: int, endpoints: Sequence[Endpoint]) -> None:
        """The room waits for acknowledgements of these ranks from now on."""
        with self._wake:
            self._waiting[room] = (tuple(endpoints), time.monotonic())
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="pdserve-dead-peers", daemon=True)
                self._thread.start()
            self._wake.notify()

    def forget(self, room: int) -> None:
        """The room waits no longer."""
        with self._wake:
            self._waiting.pop(room, None)

    def are_all_dead(self, room: int) -> bool:
        """True once every rank the room waits for is known to be gone."""
        with self._wake:
            endpoints, _ = self._waiting.get(room, ((), 0.0))
            return bool(endpoints) and all(endpoint in self._dead for endpoint in endpoints)

    def _run(self) -> None:
        while True:
            with self._wake:
                while not self._waiting:
                    self._wake.wait()
            time.sleep(INTERVAL_S)
            self.look()

    def look(self) -> None:
        """Ask about every rank that some room has waited for too long."""
        now_s = time.monotonic()
        with self._wake:
            for room in [room for room, (_, since_s) in self._waiting.items() if now_s - since_s > GIVE_UP_S]:
                self._waiting.pop(room)
            asked = {
                endpoint
                for endpoints, since_s in self._waiting.values()
                if now_s - since_s >= PATIENCE_S
                for endpoint in endpoints
            } - self._dead
        for endpoint in asked:
            if self._is_gone(endpoint):
                logger.warning("prefill rank %s:%d is dead; its aborted transfers are released", *endpoint)
                with self._wake:
                    self._dead.add(endpoint)


def refuses_connections(endpoint: Endpoint) -> bool:
    """True if nobody listens there. A time-out or an unreachable host proves nothing and is False."""
    try:
        socket.create_connection(endpoint, timeout=1.0).close()
    except ConnectionRefusedError:
        return True
    except OSError:
        return False
    return False
