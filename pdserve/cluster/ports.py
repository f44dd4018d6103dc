"""Free TCP ports of this machine, kept for the processes that will listen there, and who has a taken one.

A server imports SGLang for a long time before it listens, and restarts need its port again. Until then a
bound socket that does not listen keeps the port: with SO_REUSEADDR on both sides Linux lets one more socket
listen there, and refuses it to whoever looks for a free port without that option, as another launch does.
"""

from __future__ import annotations

import errno
import socket
from contextlib import suppress
from pathlib import Path
from typing import Self

from pdserve.errors import ConfigError

MAX_PORT = 65535
_ANY_TRIES = 100
_LISTEN = "0A"
"""State column of /proc/net/tcp."""


class SystemPorts:
    """Ports of this machine; never gives one out twice, and keeps each until ``close``."""

    def __init__(self) -> None:
        self._kept: dict[int, socket.socket] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Keep no port any longer."""
        for kept in self._kept.values():
            kept.close()
        self._kept.clear()

    def hand_on(self) -> None:
        """Let the program that this process becomes keep the ports."""
        for kept in self._kept.values():
            kept.set_inheritable(True)

    def pick(self, host: str, first: int) -> int:
        """A free port at or above ``first``; 0 means any.

        Raises:
            ConfigError: if there is none, or ``host`` is not an address of this machine.
        """
        candidates = range(first, MAX_PORT + 1) if first else [0] * _ANY_TRIES
        for candidate in candidates:
            port = self._try(host, candidate)
            if port:
                return port
        raise ConfigError(f"no free port on {host} at or above {first}; set a lower worker_base_port")

    def claim(self, host: str, port: int, option: str) -> int:
        """``port`` itself if it is free; 0 picks any.

        Raises:
            ConfigError: if it is taken, naming its owner where /proc shows it, and ``option``.
        """
        if port == 0:
            return self.pick(host, 0)
        if port in self._kept:
            raise ConfigError(f"port {port} is asked for twice; choose another with {option}")
        # As the server itself will: connections of a service that just ended do not count as "in use".
        if not self._try(host, port, reuse=True):
            raise ConfigError(f"port {port} is in use{_owner_text(port)}; choose another with {option}")
        return port

    def _try(self, host: str, port: int, *, reuse: bool = False) -> int:
        """The port that could be bound and was not given out before, else 0."""
        if port in self._kept:
            return 0
        bound = _bind(host, port, reuse)
        if bound is None:
            return 0
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        number = int(bound.getsockname()[1])
        self._kept[number] = bound
        return number


def port_owner(port: int) -> tuple[int, str] | None:
    """``(pid, command line)`` of the process listening on ``port``; None if it cannot be seen.

    Only Linux shows it, and only for processes of the same user (root sees all).
    """
    inodes = _listening_inodes(port)
    if not inodes:
        return None
    wanted = {f"socket:[{inode}]" for inode in inodes}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit() and _holds(folder / "fd", wanted):
            with suppress(OSError):
                raw = (folder / "cmdline").read_bytes()
                # split and joined: an argument may hold line breaks, the error is one line
                return int(folder.name), " ".join(raw.replace(b"\0", b" ").decode(errors="replace").split())
    return None


def _bind(host: str, port: int, reuse: bool) -> socket.socket | None:
    """A socket bound there, or None if the port is taken. ``reuse`` sets SO_REUSEADDR."""
    try:
        family, kind, proto, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except socket.gaierror as exc:
        raise ConfigError(f"--host {host} cannot be resolved: {exc.strerror}") from exc
    try:
        probe = socket.socket(family, kind, proto)
    except OSError as exc:
        raise ConfigError(f"no socket can be opened: {exc.strerror}; see `ulimit -n`") from exc
    try:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, int(reuse))
        probe.bind(address)
    except OSError as exc:
        probe.close()
        if isinstance(exc, PermissionError):
            raise ConfigError(f"port {port} needs root rights; choose one above 1023") from exc
        if exc.errno == errno.EADDRNOTAVAIL:
            raise ConfigError(f"--host {host} is not an address of this machine") from exc
        return None
    return probe


def _listening_inodes(port: int) -> set[str]:
    found = set()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        with suppress(OSError):
            for line in Path(table).read_text().splitlines()[1:]:
                columns = line.split()
                is_port = columns[1].endswith(f":{port:04X}")
                if is_port and columns[3] == _LISTEN:
                    found.add(columns[9])
    return found


def _holds(fd_folder: Path, wanted: set[str]) -> bool:
    try:
        names = list(fd_folder.iterdir())
    except OSError:
        return False
    for name in names:
        with suppress(OSError):
            if str(name.readlink()) in wanted:
                return True
    return False


def _owner_text(port: int) -> str:
    owner = port_owner(port)
    if owner is None:
        return ""
    pid, command = owner
    return f" by pid {pid} ({command if len(command) <= 80 else command[:77] + '...'})"
