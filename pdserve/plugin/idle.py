"""What keeps an idle or waiting scheduler from burning a core.

SGLang's P/D loops spin: ``on_idle`` returns at once while any request sits in
a bootstrap, prealloc, transfer or inflight queue, and on few cores that spin
takes the CPU from the very server the request waits for. After each idle pass
that found work parked elsewhere we wait on the request socket for at most
``PARKED_WAIT_MS``; a new request ends the wait at once, and so does the data
plane when a transfer has ended (``wake_scheduler``).
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from typing import Any

import zmq

PARKED_WAIT_MS = 2
"""Longest sleep while requests wait for a handshake or a transfer that nobody reports."""

IDLE_WAIT_MS = 1000
"""Longest sleep of a scheduler that holds no request (SGLang's IdleSleeper uses the same)."""

_wake_fd: int | None = None
"""Readable when the scheduler of this process should look at its queues; made by its first idle pass."""


def wake_scheduler() -> None:
    """End this process's scheduler's sleep, from any thread. Does nothing before it has ever slept."""
    if _wake_fd is not None:
        with contextlib.suppress(BlockingIOError):  # 2**64 wake-ups not yet read
            os.eventfd_write(_wake_fd, 1)


def sleep_when_parked(original: Callable[..., Any], scheduler: Any, *args: Any, **kwargs: Any) -> Any:
    """AROUND hook on ``Scheduler.on_idle``: wait on the request socket instead of spinning."""
    result = original(scheduler, *args, **kwargs)
    poller = getattr(scheduler, "_pdserve_poller", None)
    if poller is None:
        poller = scheduler._pdserve_poller = _make_poller(scheduler)
    if not scheduler.is_fully_idle():
        poller.poll(PARKED_WAIT_MS)
    elif scheduler.idle_sleeper is None:
        poller.poll(IDLE_WAIT_MS)
    if _wake_fd is not None:
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(_wake_fd)
    return result


def _make_poller(scheduler: Any) -> zmq.Poller:
    global _wake_fd
    poller = zmq.Poller()
    for name in ("recv_from_tokenizer", "recv_from_rpc"):
        socket = getattr(scheduler.ipc_channels, name, None)
        if isinstance(socket, zmq.Socket):
            poller.register(socket, zmq.POLLIN)
    _wake_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
    poller.register(_wake_fd, zmq.POLLIN)
    return poller
