"""A control-plane process free of the command line's libraries: ``-m pdserve.process.service KIND FD``.

``pdserve balance`` and ``pdserve bootstrap`` parse their options and then replace themselves by this (same
pid, same output): typer and rich stay out of the process that every request passes, and keys out of its
command line. FD is an open file with the settings as JSON.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Sequence
from typing import NoReturn

import msgspec

from pdserve.config.balancer import BalancerConfig
from pdserve.config.launch import BootstrapConfig
from pdserve.config.worker_env import parent_pid
from pdserve.errors import ConfigError, PdserveError
from pdserve.process.parent_death import die_with_parent
from pdserve.telemetry import configure_logging


def become_service(config: BalancerConfig | BootstrapConfig) -> NoReturn:
    """Replace this process by the service that ``config`` describes."""
    kind = "balancer" if isinstance(config, BalancerConfig) else "bootstrap"
    fd = _pass_on(msgspec.json.encode(config))
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, "-m", "pdserve.process.service", kind, str(fd)])


def _pass_on(text: bytes) -> int:
    """A file for this process and its successor: anyone can read a command line, and there are keys in it."""
    with tempfile.TemporaryFile() as file:
        file.write(text)
        file.flush()
        fd = os.dup(file.fileno())
    os.lseek(fd, 0, os.SEEK_SET)
    os.set_inheritable(fd, True)
    return fd


def main(argv: Sequence[str] | None = None) -> None:
    """Serve until SIGTERM or SIGINT; exit 2 with one line for a wrong setting, 1 for a failure."""
    kind, fd = sys.argv[1:] if argv is None else argv
    with os.fdopen(int(fd), "rb") as file:
        text = file.read()
    if parent_pid():
        die_with_parent(parent_pid())
    try:
        _serve(kind, text)
    except PdserveError as exc:
        sys.stderr.write(f"error: {exc}\n")
        sys.exit(2 if isinstance(exc, ConfigError) else 1)


def _serve(kind: str, text: bytes) -> None:
    if kind == "balancer":
        from pdserve.balancer.app import run_balancer

        balancer = msgspec.json.decode(text, type=BalancerConfig)
        configure_logging(balancer.log_level, balancer.log_format)
        run_balancer(balancer)
    else:
        from pdserve.bootstrap.service import run_bootstrap

        bootstrap = msgspec.json.decode(text, type=BootstrapConfig)
        configure_logging(bootstrap.log_level)
        run_bootstrap(bootstrap)


if __name__ == "__main__":
    main()
