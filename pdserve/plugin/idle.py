"""What keeps an idle or waiting scheduler from burning a core.

SGLang's P/D loops spin: ``on_idle`` returns at once while any request sits in
a bootstrap, prealloc, transfer or inflight queue, and on few cores that spin
takes the CPU from the very server the request waits for. After each idle pass
that found work parked elsewhere we wait on the request socket for at most
``PARKED_WAIT_MS``; a new request ends the wait at once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import zmq

PARKED_WAIT_MS = 2
"""Longest sleep while requests wait for a handshake or a transfer: adds half of it to such a wait."""

IDLE_WAIT_MS = 1000
"""Longest sleep of a scheduler that holds no request (SGLang's IdleSleeper uses the same)."""


def sleep_when_parked(original: Callable[..., Any], scheduler: Any, *args: Any, **kwargs: Any) -> Any:
    """AROUND hook on ``Scheduler.on_idle``: wait on the request socket instead of spinning."""
    result = original(scheduler, *args, **kwargs)
    poller = getattr(scheduler, "_pdserve_poller", None)
    if poller is None:
        poller = zmq.Poller()
        for name in ("recv_from_tokenizer", "recv_from_rpc"):
            socket = getattr(scheduler.ipc_channels, name, None)
            if isinstance(socket, zmq.Socket):
                poller.register(socket, zmq.POLLIN)
        scheduler._pdserve_poller = poller
    if not scheduler.is_fully_idle():
        poller.poll(PARKED_WAIT_MS)
    elif scheduler.idle_sleeper is None:
        poller.poll(IDLE_WAIT_MS)
    return result
