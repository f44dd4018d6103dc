"""A server whose scheduler or detokenizer has crashed says so at once: its connections are closed.

SGLang looks once a second and then takes seconds to end; until then its clients see an open
stream that says nothing. Here a thread waits for the children's ends (pidfd) and shuts the
HTTP sockets down; SGLang's own way out goes on behind them.
"""

from __future__ import annotations

import contextlib
import logging
import os
import select
import socket
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)


def watch_children(original: Callable[..., Any], watchdog: Any) -> Any:
    """AROUND ``SubprocessWatchdog.start``: also close the connections when one of its processes crashes."""
    from sglang.srt.runtime_context import get_serving

    result = original(watchdog)
    pids = [process.pid for process in watchdog._processes]
    if pids:
        waiting = (pids, int(get_serving().port))
        threading.Thread(target=_close_after, args=waiting, name="children", daemon=True).start()
    return result


def _close_after(pids: Sequence[int], port: int) -> None:
    pid = wait_for_crash(pids)
    if pid is not None:
        logger.error("process %d of this server has crashed: its connections are closed", pid)
        close_connections(port)


def wait_for_crash(pids: Sequence[int]) -> int | None:
    """Return the first of these children of ours that ends, None if all end with status 0; reap none."""
    poller = select.poll()
    waiting: dict[int, int] = {}
    try:
        for pid in pids:
            try:
                descriptor = os.pidfd_open(pid)  # works after its end too, until somebody reaps it
            except ProcessLookupError:
                return pid
            waiting[descriptor] = pid
            poller.register(descriptor, select.POLLIN)
        while waiting:
            for descriptor, _ in poller.poll():
                if not _has_ended_well(descriptor):
                    return waiting[descriptor]
                del waiting[descriptor]
                poller.unregister(descriptor)
                os.close(descriptor)
        return None
    finally:
        for descriptor in waiting:
            os.close(descriptor)


def _has_ended_well(descriptor: int) -> bool:
    try:
        ended = os.waitid(os.P_PIDFD, descriptor, os.WEXITED | os.WNOWAIT)
    except ChildProcessError:
        return False  # reaped already, by SGLang, who looks for crashes only
    return ended is not None and (ended.si_code, ended.si_status) == (os.CLD_EXITED, 0)


def close_connections(port: int) -> None:
    """Shut down every TCP socket of this process on local ``port``, the listening one too."""
    for entry in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):
            connection = socket.socket(fileno=os.dup(int(entry.name)))
            with connection:
                is_tcp = connection.family in (socket.AF_INET, socket.AF_INET6)
                if is_tcp and connection.getsockname()[1] == port:
                    connection.shutdown(socket.SHUT_RDWR)
