"""What the command line means: raw option values and a file in, validated configuration out.

Knows nothing of the terminal; cli/commands.py calls this with the options that were given.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from pdserve.cli.router_flags import RouterOptions, take_router_flags
from pdserve.config.balancer import BalancerConfig
from pdserve.config.file import FileConfig, load_file, merge
from pdserve.config.launch import BootstrapConfig, LaunchConfig, check_port
from pdserve.config.setting import check_choices
from pdserve.config.worker_env import environment, keys_from_environment, replace_environ
from pdserve.errors import ConfigError

Progress = Callable[[str], None]
"""Hears one line per step of preparing a model."""

ROLE_ARGS = ("prefill_args", "decode_args")
STOP_TIMES = ("shutdown_delay_s", "drain_s")
"""Settings of the balancer that a launch must know, too: it kills a balancer that takes longer."""
ENGINE_COMMANDS = ("launch", "prefill", "decode")
"""Commands that pass what follows ``--`` on to SGLang."""


def split_foreign_flags(argv: list[str]) -> tuple[list[str], RouterOptions | tuple[str, ...]]:
    """Our own arguments, in the form typer parses, and what is not ours.

    For ``balance`` those are sglang-router's flags, for commands that start SGLang the flags after ``--``.

    Raises:
        ConfigError: for a flag of sglang-router that is refused, or has a wrong value.
    """
    if argv and argv[0] == "balance":
        ours, options = take_router_flags(argv)
        return _join_prefill_ports(ours), options
    if not argv or argv[0] not in ENGINE_COMMANDS or "--" not in argv:
        return argv, ()
    at = argv.index("--")
    return argv[:at], tuple(argv[at + 1 :])


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


def launch_config(
    path: Path | None, flags: Mapping[str, Any], sglang_args: tuple[str, ...], progress: Progress
) -> LaunchConfig:
    """Default < ``[launch]`` of the file < ``flags``, with MODEL resolved to what SGLang takes.

    In ``flags`` the arguments of one role are still one string each; ``sglang_args`` followed a ``--``.

    Raises:
        ConfigError: for anything wrong in the file, the flags or the model.
    """
    from pdserve.scheduling.policy import make_policy

    file = file_config(path)
    role_args = {
        name: words(flags[name], f"--{name.replace('_', '-')}") for name in ROLE_ARGS if name in flags
    }
    flags = {**flags, **role_args, "sglang_args": sglang_args or None}
    of_balancer = {name: file.balancer[name] for name in STOP_TIMES if name in file.balancer}
    config = merge(LaunchConfig(), {**of_balancer, **file.launch}, flags)
    make_policy(config.policy)
    slo_settings(config.slo)
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


def balancer_config(
    default: BalancerConfig,
    path: Path | None,
    router: RouterOptions,
    options: Mapping[str, Any],
    note: Progress,
) -> BalancerConfig:
    """``default`` < ``[balancer]`` of the file < environment (keys) < sglang-router's flags < ``options``.

    In ``options``, ``prefill`` is still in texts of URL and port, and ``bootstrap_url`` may be HOST:PORT.
    ``note`` hears what the user should know before it starts.

    Raises:
        ConfigError: for a wrong value.
    """
    flags: dict[str, Any] = {**router.settings, **options}
    if "prefill" in flags:
        flags["prefill"] = tuple(prefill_pair(text) for text in flags["prefill"])
    if flags.get("log_level") == "warn":  # sglang-router's name for it
        flags["log_level"] = "warning"
    if "bootstrap_url" in flags:
        from pdserve.cluster.machine import service_url

        flags["bootstrap_url"] = service_url(flags["bootstrap_url"], "--bootstrap")
    config = merge(default, file_config(path).balancer, {**keys_from_environment(), **flags})
    _check_balancer(config)
    for line in (router.note, *_warnings(config)):
        if line:
            note(line)
    return config


def _check_balancer(config: BalancerConfig) -> None:
    """What would otherwise be found out only by the balancer's own process."""
    from pdserve.balancer.api.worker_url import AllowedHosts
    from pdserve.balancer.tracing.trace import traces_url
    from pdserve.scheduling.policy import policy_of

    policy_of(config)
    AllowedHosts(config)
    if config.otlp_endpoint:
        traces_url(config.otlp_endpoint)
    check_choices(config)
    check_port("--port", config.port)
    if bool(config.tls_cert_path) != bool(config.tls_key_path):
        raise ConfigError("TLS needs both --tls-cert-path and --tls-key-path")


def _warnings(config: BalancerConfig) -> Iterator[str]:
    if not (config.bootstrap_url or config.prefill or config.decode):
        yield (
            'note: no workers yet: POST /workers {"url": …, "worker_type": "prefill" or "decode"} adds one, '
            "on loopback or a host of --worker-hosts; --bootstrap, --prefill and --decode name them at once"
        )
    is_open = config.host not in ("localhost", "::1") and not config.host.startswith("127.")
    if is_open and not config.control_key:
        yield (
            f"note: whoever reaches {config.host} may also add workers and change them: set "
            "PDSERVE_ADMIN_API_KEY, or PDSERVE_API_KEY for every route, or listen on --host 127.0.0.1"
        )


def pass_keys_on(path: Path | None, flags: Mapping[str, str | None]) -> None:
    """Put the keys of a whole service into this process's environment, where its balancer finds them.

    Nowhere else: other users of the machine can read a command line.
    """
    names = ("api_key", "admin_api_key", "worker_api_key")
    given = {name: value for name, value in flags.items() if value}
    keys = {**file_config(path).balancer, **keys_from_environment(), **given}
    values = {f"PDSERVE_{name.upper()}": str(keys[name]) for name in names if keys.get(name)}
    if values:
        replace_environ({**environment(), **values})


def admin_key(given: str = "") -> str:
    """The key for control routes: as given, else from the environment; empty if there is none."""
    keys = keys_from_environment()
    return given or keys.get("admin_api_key", "") or keys.get("api_key", "")


def bootstrap_config(path: Path | None, flags: Mapping[str, Any]) -> BootstrapConfig:
    """Default < ``[bootstrap]`` of the file < ``flags``, whose ``port_range`` is still ``A-B``.

    Raises:
        ConfigError: for a wrong value.
    """
    if "port_range" in flags:
        flags = {**flags, "port_range": port_range(flags["port_range"])}
    config = merge(BootstrapConfig(), file_config(path).bootstrap, flags)
    check_choices(config)
    check_port("--port", config.port)
    return config


def slo_settings(text: str | None) -> dict[str, float]:
    """``ttft=2,tpot=0.05``, either or both, as settings of the balancer; nothing for an empty text.

    Raises:
        ConfigError: for anything else.
    """
    settings: dict[str, float] = {}
    for part in (text or "").replace(" ", "").split(","):
        name, _, value = part.partition("=")
        if not part:
            continue
        try:
            seconds = float(value.removesuffix("s"))
        except ValueError:
            seconds = 0.0
        if name not in ("ttft", "tpot") or not 0 < seconds < float("inf"):
            raise ConfigError(f"--slo takes ttft=SECONDS,tpot=SECONDS (either or both), got {text!r}")
        settings[f"slo_{name}_s"] = seconds
    return settings


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


def words(text: str, option: str) -> tuple[str, ...]:
    """One string split as a shell does."""
    try:
        return tuple(shlex.split(text))
    except ValueError as exc:
        raise ConfigError(f"{option}: {exc}: {text!r}") from exc


def file_config(path: Path | None) -> FileConfig:
    """The parsed ``--config`` file, empty without one."""
    return FileConfig() if path is None else load_file(path)
