"""Die with the process that started us, even when it is killed by ``kill -9``.

Linux only sends the signal when the *thread* that created us ends, so a
supervisor must spawn from its main thread (prctl(2), PR_SET_PDEATHSIG).
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


def die_with_parent(parent_pid: int) -> None:
    """Ask the kernel for SIGKILL when the parent ends; exit now if it has ended already.

    Raises:
        OSError: if the kernel refuses (never seen on Linux).
    """
    if not sys.platform.startswith("linux"):
        return
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
    # The parent may have died between our start and the call above.
    if os.getppid() != parent_pid:
        os._exit(1)
