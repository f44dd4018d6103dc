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
            descriptor = os.pidfd_open(pid)  # of a child that nobody has reaped: there even after its end
            waiting[descriptor] = pid
            poller.register(descriptor, select.POLLIN)
        while waiting:
            for descriptor, _ in poller.poll():
                ended = os.waitid(os.P_PIDFD, descriptor, os.WEXITED | os.WNOWAIT)
                pid = waiting.pop(descriptor)
                poller.unregister(descriptor)
                os.close(descriptor)
                if ended is None or (ended.si_code, ended.si_status) != (os.CLD_EXITED, 0):
                    return pid
        return None
    except ChildProcessError:
        return pid  # SGLang has reaped it first, for it had ended
    finally:
        for descriptor in waiting:
            os.close(descriptor)


def close_connections(port: int) -> None:
    """Shut down every TCP socket of this process on local ``port``, the listening one too."""
    for entry in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):
            connection = socket.socket(fileno=os.dup(int(entry.name)))
            with connection:
                is_tcp = connection.family in (socket.AF_INET, socket.AF_INET6)
                if is_tcp and connection.getsockname()[1] == port:
                    connection.shutdown(socket.SHUT_RDWR)
