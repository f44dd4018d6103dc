"""The processes of a fleet that ``pdserve launch`` runs on this machine, found without believing anybody.

    port of the balancer ─► who listens there ─► its parent: the launcher
    port of a worker     ─► who listens there ─► only if it descends from that launcher

A signal goes to a file descriptor of a process that was checked after it was opened, so that no other
process that got the same number later is hit. Reads /proc: Linux only.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from pdserve.errors import ConfigError

PROC = Path("/proc")
LISTEN = "0A"
"""State of a listening socket in /proc/net/tcp."""


@dataclass(frozen=True, slots=True)
class Server:
    """A worker's processes: ``leader`` is its HTTP process, ``children`` what that has started."""

    leader: int
    children: tuple[int, ...]

    @property
    def everything(self) -> tuple[int, ...]:
        """All of them, the leader first."""
        return (self.leader, *self.children)

    @property
    def scheduler(self) -> int:
        """The process that runs the model; the leader if there is none by that name."""
        return next((pid for pid in self.children if "scheduler" in command_of(pid)), self.leader)


class LaunchedFleet:
    """The launcher of the service at ``balancer_url``, and the processes below it.

    Raises:
        ConfigError: if nobody listens there on this machine, or it was not started by ``pdserve launch``.
    """

    def __init__(self, balancer_url: str) -> None:
        listening = listeners(_local_port(balancer_url))
        if not listening:
            raise ConfigError(
                f"no process of this user on this machine listens at {balancer_url}: chaos breaks only local "
                "fleets of its own user"
            )
        self.launcher = next(filter(_is_launcher, (parent_of(pid) for pid in listening)), 0)
        if not self.launcher:
            raise ConfigError(
                f"what listens at {balancer_url} was not started by `pdserve launch`: nobody would restart "
                "the servers that chaos kills"
            )

    def server(self, url: str) -> Server | None:
        """The worker that listens at ``url``; None if nobody does, or nobody of this fleet."""
        ours = set(descendants(self.launcher))
        found = [pid for pid in listeners(_local_port(url)) if pid in ours]
        leaders = [pid for pid in found if parent_of(pid) not in found]
        if len(leaders) != 1:
            return None
        return Server(leaders[0], tuple(descendants(leaders[0])))

    def send(self, pids: tuple[int, ...], number: int) -> int:
        """Signal those that are still processes of this fleet; returns how many."""
        sent = 0
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                descriptor = os.pidfd_open(pid)
                try:
                    if pid in descendants(self.launcher):
                        signal.pidfd_send_signal(descriptor, number)
                        sent += 1
                except PermissionError as exc:
                    raise ConfigError(f"process {pid} belongs to another user") from exc
                finally:
                    os.close(descriptor)
        return sent


def listeners(port: int) -> list[int]:
    """The processes that have a socket listening at ``port``; those of other users cannot be seen."""
    links = {f"socket:[{inode}]" for inode in _inodes(port)}
    return [pid for pid in _pids() if links and _has_open(pid, links)]


def parent_of(pid: int) -> int:
    """Its parent's number; 0 if it is gone."""
    return _stat(pid)


def command_of(pid: int) -> str:
    """Its command line, or the title it has given itself; empty if it is gone."""
    with contextlib.suppress(OSError):
        return (PROC / str(pid) / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    return ""


def descendants(pid: int) -> list[int]:
    """Everything below a process, parents before children."""
    children: dict[int, list[int]] = {}
    for each in _pids():
        children.setdefault(_stat(each), []).append(each)
    found = list(children.get(pid, ()))
    for each in found:  # grows while it is walked through
        found += children.get(each, ())
    return found


def _is_launcher(pid: int) -> bool:
    words = command_of(pid).split()
    return "launch" in words and any("pdserve" in word for word in words)


def _local_port(url: str) -> int:
    """The port of an address of this machine; 0 for another machine's."""
    parts = urlsplit(url)
    host = parts.hostname or ""
    try:
        with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
            probe.bind((host, 0))  # possible only with an address of this machine
    except OSError:
        return 0
    return parts.port or (443 if parts.scheme == "https" else 80)


def _pids() -> list[int]:
    return [int(entry.name) for entry in PROC.iterdir() if entry.name.isdigit()]


def _stat(pid: int) -> int:
    """The fourth field of /proc/PID/stat; the second may hold blanks and parentheses."""
    with contextlib.suppress(OSError, IndexError, ValueError):
        return int((PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()[1])
    return 0


def _inodes(port: int) -> Iterator[str]:
    """Numbers of the sockets that listen at ``port``."""
    for table in ("tcp", "tcp6"):
        with contextlib.suppress(OSError):
            for line in (PROC / "net" / table).read_text().splitlines()[1:]:
                fields = line.split()
                if port and fields[3] == LISTEN and int(fields[1].rpartition(":")[2], 16) == port:
                    yield fields[9]


def _has_open(pid: int, links: set[str]) -> bool:
    with contextlib.suppress(OSError):
        for entry in (PROC / str(pid) / "fd").iterdir():
            with contextlib.suppress(OSError):
                if str(entry.readlink()) in links:
                    return True
    return False
