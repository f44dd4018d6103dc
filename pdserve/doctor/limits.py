"""What the system allows: open files, locked memory, shared memory, processes, memory, disk, clock."""

from __future__ import annotations

import os
import resource
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

from pdserve.doctor.finding import Finding, error, note, ok, warning
from pdserve.process.limits import cgroup_files, free_memory, read_number

FILES, MEMLOCK, SHM, THREADS, MEMORY, CORES, DISK, CLOCK = (
    "open files", "memlock", "/dev/shm", "processes", "memory", "cores", "disk", "clock",
)  # fmt: skip

MIN_FILES, GOOD_FILES = 1024, 4096
"""A SGLang server holds about 300 files and sockets; the balancer 256 and three per request (app.py)."""
MIN_SHM, GOOD_SHM = 64 << 20, 1 << 30
"""Docker's default is 64 MiB: UCX's and NCCL's segments of a few ranks do not fit."""
THREADS_PER_SERVER = 250
"""Of one CPU server: about 100 on 2 cores, measured; libraries start more where there are more cores."""
MAX_SERVERS_PER_CORE = 4
MIN_DISK = 1 << 30
STEP_S = 0.05
UNLIMITED = -1
CAP_IPC_LOCK = 14
"""Bit of linux/capability.h."""


@dataclass(frozen=True, slots=True)
class LimitFacts:
    """Bytes and counts; UNLIMITED where there is no limit."""

    soft_files: int
    hard_files: int
    memlock: int
    shm_total: int
    shm_free: int
    max_processes: int
    num_processes: int
    memory_free: int
    cores: int
    disks: tuple[tuple[str, int, bool], ...]
    """Folder, bytes free there, whether it can be written."""
    wall_s: float
    drift_s: float
    """By how much the wall clock ran away from the monotonic one in STEP_S."""
    may_lock: bool = False
    """CAP_IPC_LOCK: the limit of locked memory does not bind this process."""


def gather_limits(folders: tuple[Path, ...], cores: int) -> LimitFacts:
    """Ask the kernel. ``folders`` need not exist yet."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    shm = _usage(Path("/dev/shm"))
    wall_s, monotonic_s = time.time(), time.monotonic()
    time.sleep(STEP_S)
    return LimitFacts(
        soft_files=_limit(soft),
        hard_files=_limit(hard),
        memlock=_limit(resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]),
        shm_total=shm[0],
        shm_free=shm[1],
        max_processes=_max_processes(),
        num_processes=_num_processes(),
        memory_free=free_memory(),
        cores=cores,
        disks=tuple(_disk(folder) for folder in folders),
        wall_s=wall_s,
        drift_s=(time.time() - wall_s) - (time.monotonic() - monotonic_s),
        may_lock=_may_lock(),
    )


def _may_lock() -> bool:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return False
    effective = next((line.split()[1] for line in lines if line.startswith("CapEff:")), "0")
    return bool(int(effective, 16) >> CAP_IPC_LOCK & 1)


def _limit(value: int) -> int:
    return UNLIMITED if value == resource.RLIM_INFINITY else value


def _usage(folder: Path) -> tuple[int, int]:
    try:
        usage = shutil.disk_usage(folder)
    except OSError:
        return 0, 0
    return usage.total, usage.free


def _disk(folder: Path) -> tuple[str, int, bool]:
    existing = next(place for place in (folder, *folder.parents) if place.exists())
    return str(folder), _usage(existing)[1], existing.is_dir() and os.access(existing, os.W_OK)


def _max_processes() -> int:
    limits = [resource.getrlimit(resource.RLIMIT_NPROC)[0]]
    limits += [value for file in cgroup_files("pids.max") if (value := read_number(file)) is not None]
    known = [limit for limit in map(_limit, limits) if limit != UNLIMITED]
    return min(known, default=UNLIMITED)


def _num_processes() -> int:
    """Threads of every process, the kernel's count; 0 if it is unknown."""
    try:
        running = Path("/proc/loadavg").read_text().split()[3]
    except (OSError, IndexError):
        return 0
    return int(running.partition("/")[2] or 0)


def judge_limits(
    facts: LimitFacts, *, num_servers: int, needed_bytes: int, on_gpu: bool, has_rdma: bool
) -> list[Finding]:
    """``num_servers`` are to be started here and need ``needed_bytes`` of host memory; 0: none are."""
    return [
        _judge_files(facts),
        _judge_memlock(facts, has_rdma),
        _judge_shm(facts),
        *(_judge_disk(*disk) for disk in facts.disks),
        _judge_clock(facts),
        *judge_room(facts, num_servers=num_servers, needed_bytes=needed_bytes, on_gpu=on_gpu),
    ]


def judge_room(facts: LimitFacts, *, num_servers: int, needed_bytes: int, on_gpu: bool) -> list[Finding]:
    """Whether the machine has the threads, memory and cores for so many servers; an error: it has not."""
    findings = [_judge_processes(facts, num_servers)]
    if num_servers and facts.memory_free:
        findings.append(_judge_memory(facts, num_servers, needed_bytes))
    if num_servers and not on_gpu:
        findings.append(_judge_cores(facts, num_servers))
    return findings


def _judge_files(facts: LimitFacts) -> Finding:
    soft, hard = facts.soft_files, facts.hard_files
    text = f"{_count(soft)} open files (hard limit {_count(hard)})"
    why = "SGLang's servers hold about 300 files each, the balancer three per request in flight"
    raise_it = f"ulimit -n {65536 if hard == UNLIMITED else hard}" if hard == UNLIMITED or hard > soft else ""
    todo = (
        raise_it
        or "raise the hard limit: /etc/security/limits.conf, LimitNOFILE= of systemd, --ulimit nofile="
    )
    values = dict(soft=soft, hard=hard)
    if soft != UNLIMITED and soft < MIN_FILES:
        return error(FILES, text, why, todo, **values)
    if soft != UNLIMITED and soft < GOOD_FILES:
        return warning(FILES, text, why, todo, **values)
    return ok(FILES, text, **values)


def _judge_memlock(facts: LimitFacts, has_rdma: bool) -> Finding:
    text = f"{_size(facts.memlock)} of memory may be locked"
    if facts.memlock == UNLIMITED or facts.may_lock:
        more = "; CAP_IPC_LOCK lifts the limit" if facts.memlock != UNLIMITED else ""
        return ok(MEMLOCK, text + more, bytes=facts.memlock)
    if has_rdma:
        return warning(
            MEMLOCK,
            text,
            "an RDMA device locks the whole KV pool; registration fails beyond the limit",
            "ulimit -l unlimited (limits.conf, LimitMEMLOCK=infinity, --ulimit memlock=-1)",
            bytes=facts.memlock,
        )
    return ok(MEMLOCK, f"{text}; enough without RDMA", bytes=facts.memlock)


def _judge_shm(facts: LimitFacts) -> Finding:
    text = f"{_size(facts.shm_free)} free of {_size(facts.shm_total)}"
    why = "UCX, NCCL and SGLang's load snapshots live there; servers die of a bus error when it is full"
    todo = "docker --shm-size=8g (or --ipc=host), or remove old files there"
    values = dict(free_bytes=facts.shm_free, total_bytes=facts.shm_total)
    if facts.shm_free < MIN_SHM // 2:
        return error(SHM, text, why, todo, **values)
    if facts.shm_free < GOOD_SHM:
        return warning(SHM, text, why, todo, **values)
    return ok(SHM, text, **values)


def _judge_processes(facts: LimitFacts, num_servers: int) -> Finding:
    text = f"{facts.num_processes} threads run, {_count(facts.max_processes)} allowed"
    needed = max(1, num_servers) * THREADS_PER_SERVER
    values = dict(running=facts.num_processes, limit=facts.max_processes)
    if facts.max_processes != UNLIMITED and facts.max_processes < needed:
        return error(
            THREADS,
            text,
            f"{max(1, num_servers)} SGLang servers need about {needed} threads; "
            "one that gets none dies with `can't start new thread`",
            "ulimit -u, or --pids-limit of the container",
            **values,
        )
    return ok(THREADS, text, **values)


def _judge_memory(facts: LimitFacts, num_servers: int, needed: int) -> Finding:
    text = f"{_size(facts.memory_free)} free, {num_servers} servers need about {_size(needed)}"
    values = dict(free_bytes=facts.memory_free, needed_bytes=needed)
    why = "the kernel kills a server when memory runs out"
    todo = "lower -p or -d, take a smaller model, or give a lower --max-total-tokens after --"
    if needed > facts.memory_free:
        return error(MEMORY, text, why, todo, **values)
    if needed > 0.85 * facts.memory_free:
        return warning(MEMORY, text, why, todo, **values)
    return ok(MEMORY, text, **values)


def _judge_cores(facts: LimitFacts, num_servers: int) -> Finding:
    text = f"{facts.cores} cores for {num_servers} servers"
    if num_servers > MAX_SERVERS_PER_CORE * facts.cores:
        why = "a CPU server keeps one core busy; their health checks and leases run out before they are up"
        return error(CORES, text, why, "lower -p or -d", cores=facts.cores)
    if facts.cores < num_servers:
        return note(
            CORES, text, "a CPU server keeps one core busy; they will slow each other down", cores=facts.cores
        )
    return ok(CORES, text, cores=facts.cores)


def _judge_disk(folder: str, free: int, is_writable: bool) -> Finding:
    if not is_writable:
        return error(
            DISK,
            f"{folder} cannot be written",
            "models, kernels and the logs of servers are kept there",
            "set PDSERVE_CACHE to a folder of yours (logs also: --log-dir)",
            folder=folder,
        )
    text = f"{_size(free)} free at {folder}"
    if free < MIN_DISK:
        why = "models, kernels and the logs of servers are kept there"
        return warning(DISK, text, why, "make room, or set PDSERVE_CACHE", folder=folder, free_bytes=free)
    return ok(DISK, text, folder=folder, free_bytes=free)


def _judge_clock(facts: LimitFacts) -> Finding:
    year = time.gmtime(facts.wall_s).tm_year
    if year < 2025:
        return warning(
            CLOCK,
            f"the clock says {time.strftime('%Y-%m-%d', time.gmtime(facts.wall_s))}",
            "certificates are refused, and logs of several machines cannot be compared",
            "set the clock (chrony, systemd-timesyncd)",
        )
    if abs(facts.drift_s) > STEP_S:
        return warning(
            CLOCK,
            f"the clock jumped by {facts.drift_s:+.2f} s while it was looked at",
            "logs and traces of several machines cannot be compared",
            "see that one time service alone sets the clock, by slewing",
        )
    return ok(CLOCK, time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(facts.wall_s)))


def _count(value: int) -> str:
    return "unlimited" if value == UNLIMITED else str(value)


def _size(value: int) -> str:
    if value == UNLIMITED:
        return "unlimited"
    for unit, scale in (("GiB", 30), ("MiB", 20)):
        if value >= 1 << scale:
            return f"{value / (1 << scale):.1f} {unit}"
    return f"{value / 1024:.0f} KiB"
