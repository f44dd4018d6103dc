"""What this process may take of the machine: memory and cores, a container's limits counted.

Limits stand in the files of the process's cgroup and of those around it, version 1 or 2.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path

RESERVE_SHARE = 0.05
"""Part of the memory that no pool may take: weights' temporaries, page tables, the kernel."""

_ROOT = Path("/sys/fs/cgroup")
_MEMORY = (("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes"))
"""Limit and use, of version 2 and 1."""
_NO_LIMIT = 1 << 60
"""Version 1 writes a number about as large as a signed 64-bit one for no limit."""


def usable_cores(root: Path = _ROOT) -> int:
    """CPU cores that this process may keep busy: its affinity, or the container's quota if that is less."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min([cores, *_quotas(root)])


def free_memory(root: Path = _ROOT) -> int:
    """Bytes for new processes: the kernel's estimate, or what the container has left; 0: unknown."""
    free = _meminfo("MemAvailable")
    for limit, used in _MEMORY:
        for file in cgroup_files(limit, root):
            most, now = read_number(file), read_number(file.with_name(used))
            if most is not None and now is not None:
                free = min(free, max(1, most - now + _reclaimable(file.parent)))
    return free


def whole_memory(root: Path = _ROOT) -> int:
    """Bytes of the machine, or the container's limit if that is less; 0: unknown."""
    limits = (read_number(file) for name, _ in _MEMORY for file in cgroup_files(name, root))
    return min([_meminfo("MemTotal"), *(limit for limit in limits if limit is not None)])


def cgroup_files(name: str, root: Path = _ROOT) -> list[Path]:
    """Where the limit ``name`` of this process's cgroup and of those around it may stand."""
    places = [root, root / "memory", root / "pids", root / "cpu"]
    try:
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            own = root / controllers.partition(",")[0]
            parts = Path(path.lstrip("/"))
            places += [own / parent for parent in (parts, *parts.parents)]
    except (OSError, ValueError):
        pass
    return [file for place in dict.fromkeys(places) if (file := place / name).is_file()]


def read_number(file: Path) -> int | None:
    """The number in a cgroup's file; None if it cannot be read or stands for no limit."""
    try:
        text = file.read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdigit() and int(text) < _NO_LIMIT else None


def _reclaimable(cgroup: Path) -> int:
    """Bytes of file cache that count as used and that the kernel gives up first."""
    try:
        lines = (cgroup / "memory.stat").read_text().splitlines()
    except OSError:
        return 0
    stat = dict(line.split(" ", 1) for line in lines if " " in line)
    value = stat.get("total_inactive_file") or stat.get("inactive_file", "")
    return int(value) if value.isdigit() else 0


def _quotas(root: Path) -> Iterator[int]:
    """Cores that each CPU quota is worth, rounded up."""
    for file in cgroup_files("cpu.max", root):  # version 2: "150000 100000", or "max 100000"
        try:
            quota, period = file.read_text().split()
        except (OSError, ValueError):
            continue
        if quota.isdigit() and period.isdigit() and int(period):
            yield max(1, math.ceil(int(quota) / int(period)))
    for file in cgroup_files("cpu.cfs_quota_us", root):
        share, span = read_number(file), read_number(file.with_name("cpu.cfs_period_us"))
        if share and span:
            yield max(1, math.ceil(share / span))


def _meminfo(name: str) -> int:
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith(f"{name}:"):
                return int(line.split()[1]) << 10
    except (OSError, ValueError):
        pass
    return 0
