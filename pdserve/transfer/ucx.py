"""Which roads UCX may take, and settings that leave it none. Pure.

NIXL hands memory to UCX, and UCX picks transports from ``UCX_TLS`` (a list, or
``^`` and a list to leave out). A list copied from another machine is the usual
cause of a first transfer that hangs or fails with a message that names nothing.
Aliases as in UCX's ``ucs_config_doc`` and ``ucp_context.c``.
"""

from __future__ import annotations

from pdserve.transfer.engine import MemoryKind

BETWEEN_PROCESSES = frozenset(
    {
        "all", "tcp", "sm", "shm", "mm", "posix", "sysv", "xpmem", "cma", "knem",
        "ib", "rc", "rc_v", "rc_x", "rc_verbs", "rc_mlx5", "ud", "ud_v", "ud_x", "ud_verbs", "ud_mlx5",
        "dc", "dc_x", "dc_mlx5", "rdmacm", "gga", "srd", "efa",
    }
)  # fmt: skip
"""Transports that reach another process, on this machine or another."""

FOR_GPU_MEMORY = frozenset({"all", "cuda", "cuda_copy", "cuda_ipc", "gdr_copy", "rocm"})


def transport_problem(ucx_tls: str, kind: MemoryKind) -> str:
    """Why KV cannot travel with this ``UCX_TLS``; empty when nothing is wrong with it, or it is not set."""
    text = ucx_tls.strip()
    if not text:
        return ""
    is_negative = text.startswith("^")
    names = {name.strip().lstrip("^").partition(":")[0] for name in text.split(",") if name.strip()}
    needed = [(BETWEEN_PROCESSES, "reaches another process (tcp, sm, rc, ...)")]
    if kind is MemoryKind.VRAM:
        needed.append((FOR_GPU_MEMORY, "knows GPU memory (cuda_copy, cuda_ipc)"))
    for wanted, purpose in needed:
        is_missing = "all" in names if is_negative else not names & wanted
        if is_negative and wanted is FOR_GPU_MEMORY:
            is_missing = is_missing or "cuda" in names
        if is_missing:
            return f"UCX_TLS={text} leaves no transport that {purpose}; unset it or add one"
    return ""
