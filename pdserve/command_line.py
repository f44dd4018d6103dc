"""What the command line means: raw option values and a file in, validated configuration out.

Knows nothing of the terminal; cli.py declares the options and calls this.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from pdserve.config import (
    BalancerConfig,
    BootstrapConfig,
    FileConfig,
    LaunchConfig,
    check_port,
    load_file,
    merge,
)
from pdserve.errors import ConfigError

Progress = Callable[[str], None]
"""Hears one line per step of preparing a model."""

ROLE_ARGS = ("prefill_args", "decode_args")
ENGINE_COMMANDS = ("launch", "prefill", "decode")
"""Commands that pass what follows ``--`` on to SGLang."""


def split_engine_flags(argv: list[str]) -> tuple[list[str], list[str]]:
    """Our own arguments, in the form typer parses, and the SGLang flags after ``--``."""
    if not argv:
        return [], []
    if argv[0] == "balance":
        return _join_prefill_ports(argv), []
    if argv[0] not in ENGINE_COMMANDS or "--" not in argv:
        return argv, []
    at = argv.index("--")
    return argv[:at], argv[at + 1 :]


def _join_prefill_ports(argv: list[str]) -> list[str]:
    """sglang_router's two-value ``--prefill URL PORT`` as one value, ``URL PORT``."""
    joined: list[str] = []
    for arg in argv:
        is_port = arg.isdigit() or arg.lower() == "none"
        is_after_url = joined[-2:-1] == ["--prefill"] or any(a.startswith("--prefill=") for a in joined[-1:])
        if is_port and is_after_url:
            joined[-1] += f" {arg}"
        else:
            joined.append(arg)
    return joined


def launch_config(path: Path | None, flags: Mapping[str, Any], progress: Progress) -> LaunchConfig:
    """Default < ``[launch]`` of the file < ``flags``, with MODEL resolved to what SGLang takes.

    In ``flags`` the arguments of one role are still one string each.

    Raises:
        ConfigError: for anything wrong in the file, the flags or the model.
    """
    file = file_config(path)
    role_args = {name: words(flags.get(name), f"--{name.replace('_', '-')}") for name in ROLE_ARGS}
    flags = {**flags, **role_args}
    config = merge(LaunchConfig(), file.launch, flags)
    _check_policy(config.policy)
    if path is not None and (file.balancer or file.bootstrap):
        config = replace(config, config_file=str(path.resolve()))
    model, served_name = resolve(config.model, config.served_model_name, progress)
    return replace(config, model=model, served_model_name=served_name)


def resolve(model: str, served_name: str, progress: Progress) -> tuple[str, str]:
    """The model's path and its name in ``/v1/models`` (empty: SGLang chooses)."""
    from pdserve.model import resolve_model

    path = resolve_model(model, progress)
    if model or served_name:
        return path, served_name
    from pdserve.model.embedded import EMBEDDED_MODEL_NAME

    return path, EMBEDDED_MODEL_NAME


def balancer_config(path: Path | None, flags: Mapping[str, Any], bootstrap: str | None) -> BalancerConfig:
    """Default < ``[balancer]`` of the file < ``flags``; ``bootstrap`` is the option's HOST:PORT.

    Raises:
        ConfigError: for a wrong value, or if neither a service nor both kinds of server are named.
    """
    if bootstrap is not None:
        from pdserve.cluster.machine import service_url

        flags = {**flags, "bootstrap_url": service_url(bootstrap, "--bootstrap")}
    config = merge(BalancerConfig(), file_config(path).balancer, flags)
    _check_policy(config.policy)
    check_port("--port", config.port)
    if not config.bootstrap_url and not (config.prefill and config.decode):
        raise ConfigError("nothing to balance: give --bootstrap HOST:PORT, or --prefill URL and --decode URL")
    return config


def bootstrap_config(path: Path | None, flags: Mapping[str, Any], ports: str | None) -> BootstrapConfig:
    """Default < ``[bootstrap]`` of the file < ``flags``; ``ports`` is ``--port-range``.

    Raises:
        ConfigError: for a wrong value.
    """
    if ports is not None:
        flags = {**flags, "port_range": port_range(ports)}
    config = merge(BootstrapConfig(), file_config(path).bootstrap, flags)
    check_port("--port", config.port)
    return config


def _check_policy(name: str) -> None:
    from pdserve.balancer.policy import make_policy

    make_policy(name)


def prefill_pair(text: str) -> tuple[str, int | None]:
    """``URL PORT``, ``URL,PORT``, ``URL none`` or ``URL`` as ``(url, bootstrap_port)``.

    Raises:
        ConfigError: if PORT is neither a port nor ``none``.
    """
    url, _, port = text.replace(",", " ").partition(" ")
    if port.lower() in ("", "none"):
        return url, None
    if not (port.isdigit() and 0 < int(port) <= 65535):
        raise ConfigError(f"--prefill URL [PORT]: PORT must be 1..65535 or none, got {port!r}")
    return url, int(port)


def port_range(text: str) -> tuple[int, int]:
    """``A-B`` as numbers; ConfigError if it is not that."""
    first, dash, last = text.partition("-")
    if not (dash and first.isdigit() and last.isdigit() and int(first) <= int(last) <= 65535):
        raise ConfigError(f"--port-range must be A-B with A <= B <= 65535, got {text!r}")
    return int(first), int(last)


def words(text: str | None, option: str) -> tuple[str, ...] | None:
    """One string split as a shell does; None stays None (not given)."""
    try:
        return None if text is None else tuple(shlex.split(text))
    except ValueError as exc:
        raise ConfigError(f"{option}: {exc}: {text!r}") from exc


def file_config(path: Path | None) -> FileConfig:
    """The parsed ``--config`` file, empty without one."""
    return FileConfig() if path is None else load_file(path)
