"""Which core does what, and what processes and cores have used, from /proc.

CPU times come from the scheduler's own count of each thread (ns); where a thread
has ended in between, from its process's clock ticks (10 ms). How long threads were
ready but not running tells whether others were in the way.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

TICKS_PER_S = os.sysconf("SC_CLK_TCK")
PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


@dataclass(frozen=True, slots=True)
class Cores:
    """The balancer has one core to itself, everything else another, not its hyperthread if that can be."""

    balancer: int
    load: int

    @classmethod
    def choose(cls) -> Cores:
        """The first and the last core this process may use; the same one if there is only one."""
        allowed = sorted(os.sched_getaffinity(0))
        balancer = allowed[-1]
        twins = _siblings(balancer)
        others = [core for core in allowed if core not in twins] or allowed
        return cls(balancer=balancer, load=others[0])

    @property
    def description(self) -> str:
        """For the set-up."""
        where = f"balancers on core {self.balancer}, load and workers on core {self.load}"
        if self.balancer == self.load:
            return f"{where}: THE SAME, figures mean nothing"
        return f"{where}{': two threads of one core' if self.load in _siblings(self.balancer) else ''}"


@dataclass(frozen=True, slots=True)
class Usage:
    """CPU seconds at one moment: of groups of processes, and of both cores."""

    at_s: float
    balancer: ProcessTimes
    ours: ProcessTimes
    balancer_core_s: float
    load_core_s: float

    @classmethod
    def now(cls, cores: Cores, balancer: Iterable[int], ours: Iterable[int]) -> Usage:
        """``balancer`` and ``ours`` (load, mock workers, this process) are lists of pids."""
        busy = core_busy_s()
        return cls(
            time.monotonic(),
            ProcessTimes.now(balancer),
            ProcessTimes.now(ours),
            busy.get(cores.balancer, 0.0),
            busy.get(cores.load, 0.0),
        )


@dataclass(frozen=True, slots=True)
class ProcessTimes:
    """Of a group of processes: by thread ``(running, ready but waiting)`` in ns, and all in clock ticks."""

    threads: Mapping[int, tuple[int, int]]
    ticks_s: float

    @classmethod
    def now(cls, pids: Iterable[int]) -> ProcessTimes:
        """Read them."""
        pids = list(pids)
        return cls({tid: found for pid in pids for tid, found in _threads(pid)}, cpu_s(pids))

    def cpu_s_until(self, later: ProcessTimes) -> float:
        """CPU seconds between two readings."""
        exact_s = self._sum(later, 0)
        ticks_s = later.ticks_s - self.ticks_s
        return ticks_s if ticks_s - exact_s > 2 / TICKS_PER_S else exact_s

    def wait_s_until(self, later: ProcessTimes) -> float:
        """Seconds that threads were ready and did not run."""
        return self._sum(later, 1)

    def _sum(self, later: ProcessTimes, index: int) -> float:
        return sum(
            found[index] - self.threads.get(tid, (0, 0))[index] for tid, found in later.threads.items()
        ) / 1e9  # fmt: skip


def _threads(pid: int) -> Iterator[tuple[int, tuple[int, int]]]:
    """``/proc/PID/task/TID/schedstat``: ns on a CPU, ns waiting for one, turns (sched-stats.rst)."""
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        for folder in Path(f"/proc/{pid}/task").iterdir():
            running, waiting, _ = (folder / "schedstat").read_text().split()
            yield int(folder.name), (int(running), int(waiting))


def _siblings(core: int) -> set[int]:
    """Hardware threads of the same core, itself too."""
    found = {core}
    with contextlib.suppress(OSError):
        text = Path(f"/sys/devices/system/cpu/cpu{core}/topology/thread_siblings_list").read_text()
        for part in text.strip().split(","):
            first, _, last = part.partition("-")
            found.update(range(int(first), int(last or first) + 1))
    return found


def session_members(session: int) -> list[int]:
    """Processes of a session that still run; what waits to be reaped does not."""
    return [pid for pid, fields in _processes() if int(fields[3]) == session and fields[0] not in "ZX"]


def process_tree(root: int) -> list[int]:
    """``root`` and all its descendants that are alive."""
    children: dict[int, list[int]] = {}
    for pid, fields in _processes():
        children.setdefault(int(fields[1]), []).append(pid)
    found = [root]
    for pid in found:
        found.extend(children.get(pid, ()))
    return found


def cpu_s(pids: Iterable[int]) -> float:
    """User and system time of these processes, with that of children they have waited for."""
    return sum(parse_cpu_ticks(fields) for pid in pids if (fields := _stat(pid))) / TICKS_PER_S


def parse_cpu_ticks(fields: list[str]) -> int:
    """utime + stime + cutime + cstime of ``/proc/PID/stat`` after the name (proc_pid_stat(5), 14 to 17)."""
    return sum(int(field) for field in fields[11:15])


def rss_bytes(pids: Iterable[int]) -> int:
    """Resident memory of these processes together."""
    return sum(int(fields[21]) for pid in pids if (fields := _stat(pid))) * PAGE_BYTES


def core_busy_s() -> dict[int, float]:
    """Seconds each core has not been idle since the machine started."""
    return parse_core_busy(Path("/proc/stat").read_text())


def parse_core_busy(text: str) -> dict[int, float]:
    """Lines ``cpuN user nice system idle iowait irq softirq steal ...`` of ``/proc/stat``."""
    busy: dict[int, float] = {}
    for line in text.splitlines():
        name, _, rest = line.partition(" ")
        if name.startswith("cpu") and name[3:].isdigit():
            ticks = [int(field) for field in rest.split()]
            busy[int(name[3:])] = (sum(ticks[:8]) - ticks[3] - ticks[4]) / TICKS_PER_S
    return busy


def _processes() -> Iterator[tuple[int, list[str]]]:
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit() and (fields := _stat(int(folder.name))):
            yield int(folder.name), fields


def _stat(pid: int) -> list[str]:
    """Fields of ``/proc/PID/stat`` from the state on; empty if the process is gone."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return []
    return text.rpartition(")")[2].split()
