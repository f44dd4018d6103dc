"""Which processes make up a fleet and how each is started: a plan, nothing runs here.

LaunchConfig ──plan_cluster──► ClusterSpec ──► the spawner, or ``--dry-run`` as text
"""

from __future__ import annotations

import enum
import functools
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from pdserve.cluster.worker_flags import (
    WILDCARD_HOSTS,
    worker_environment,
    worker_flags,
)
from pdserve.config.launch import LaunchConfig
from pdserve.errors import ConfigError
from pdserve.types import Role

LOOPBACK = "127.0.0.1"
MAX_PORT = 65535


class ProcessKind(enum.StrEnum):
    """What a process of the fleet is."""

    BOOTSTRAP = "bootstrap"
    BALANCER = "balancer"
    WORKER = "worker"


@dataclass(frozen=True, slots=True)
class ProcessSpec:
    """How to start one process. ``ready_url`` answers 200 once it can work.

    ``env`` is only what pdserve adds to the inherited environment; ``flags`` are a
    worker's SGLang flags, the part of ``argv`` after ``-m pdserve.plugin.worker``.
    """

    name: str
    kind: ProcessKind
    argv: tuple[str, ...]
    env: Mapping[str, str]
    ready_url: str
    role: Role | None = None
    gpus: tuple[int, ...] = ()
    flags: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class ClusterSpec:
    """All processes of a fleet. ``can_fork``: the workers may be forked from one preloaded process."""

    bootstrap: ProcessSpec
    balancer: ProcessSpec
    workers: tuple[ProcessSpec, ...]
    device: str
    balancer_url: str
    bootstrap_url: str
    can_fork: bool

    @property
    def processes(self) -> tuple[ProcessSpec, ...]:
        """Every process in the order of starting."""
        return (self.bootstrap, self.balancer, *self.workers)


class Ports(Protocol):
    """Where free ports come from; neither method gives out a port twice."""

    def pick(self, host: str, first: int) -> int:
        """A free port at or above ``first``; 0 means any."""
        ...

    def claim(self, host: str, port: int, option: str) -> int:
        """``port`` if it is free, else ConfigError naming its owner and ``option``; 0 means any."""
        ...


def plan_cluster(
    config: LaunchConfig,
    *,
    model_path: str,
    gpus: Sequence[int],
    cores: int,
    ports: Ports,
    environ: Mapping[str, str] | None = None,
) -> ClusterSpec:
    """Every process of the fleet that ``config`` describes; pure apart from ``ports``.

    Args:
        model_path: what SGLang's ``--model-path`` gets; an existing folder is served offline.
        gpus: usable GPU indices; ``config.device`` "auto" means CUDA if there is one.
        cores: CPU cores, divided among CPU workers.
        environ: the environment the workers will inherit: a tuning variable set there wins.

    When ``config.host`` is a wildcard only the balancer listens on it: the bootstrap
    service and the workers have no authentication and stay on loopback.

    Raises:
        ConfigError: a taken port, too few GPUs, a flag that pdserve owns.
    """
    device = _device(config, gpus)
    if device == "cuda" and config.start_method == "fork":
        raise ConfigError("--start-method fork works on CPU only: a forked CUDA context is not usable")
    inner_host = inner_address(config.host)
    balancer_port = ports.claim(config.host, config.port, "--port")
    bootstrap_port = ports.claim(inner_host, config.bootstrap_port, "--bootstrap-port")
    bootstrap_url = http_url(inner_host, bootstrap_port)
    balancer_url = http_url(inner_host, balancer_port)
    make_worker = functools.partial(
        worker_spec,
        model_path=model_path,
        host=inner_host,
        device=device,
        tp=config.tp,
        threads=max(1, cores // (config.prefill + config.decode)),
        bootstrap_url=bootstrap_url,
        environ=environ,
        served_model_name=config.served_model_name,
        fork_children=config.start_method != "spawn",
        data_plane=config.data_plane_environment,
    )
    shares = _gpu_shares(config, device, gpus)
    bootstrap_address = join_host_port(inner_host, bootstrap_port)
    return ClusterSpec(
        bootstrap=_bootstrap_spec(config, inner_host, bootstrap_port),
        balancer=_balancer_spec(config, balancer_port, balancer_url, bootstrap_address),
        workers=tuple(_plan_workers(config, make_worker, shares, inner_host, ports)),
        device=device,
        balancer_url=balancer_url,
        bootstrap_url=bootstrap_url,
        can_fork=device == "cpu" and config.start_method != "spawn",
    )


def worker_spec(
    *,
    role: Role,
    name: str,
    model_path: str,
    host: str,
    port: int,
    device: str,
    bootstrap_url: str,
    tp: int = 1,
    gpus: Sequence[int] = (),
    threads: int = 1,
    args: Sequence[str] = (),
    environ: Mapping[str, str] | None = None,
    served_model_name: str = "",
    fork_children: bool = True,
    data_plane: Mapping[str, str] | None = None,
) -> ProcessSpec:
    """One SGLang server; ``device`` is "cpu" or "cuda", ``args`` the user's SGLang flags.


    Raises:
        ConfigError: if ``args`` hold a flag that pdserve sets itself.
    """
    flags = worker_flags(
        role=role,
        model_path=model_path,
        host=host,
        port=port,
        device=device,
        tp=tp,
        served_model_name=served_model_name,
        args=args,
    )
    env = worker_environment(
        role=role,
        name=name,
        host=host,
        bootstrap_url=bootstrap_url,
        model_path=model_path,
        device=device,
        gpus=gpus,
        threads=threads,
        environ=environ or {},
        tp=tp,
    )
    if not fork_children:
        env["PDSERVE_FORK_CHILDREN"] = "0"
    env.update(data_plane or {})
    argv = (sys.executable, "-m", "pdserve.plugin.worker", *flags)
    ready_url = http_url(inner_address(host), port) + "/health"
    return ProcessSpec(name, ProcessKind.WORKER, argv, env, ready_url, role, tuple(gpus), flags)


def format_plan(spec: ClusterSpec) -> str:
    """The plan as shell text: per process a comment, then a command line that can be pasted."""
    blocks = []
    for process in spec.processes:
        place = f"GPU {','.join(map(str, process.gpus))}" if process.gpus else "CPU"
        where = f", {place}" if process.kind is ProcessKind.WORKER else ""
        env = [f"{key}={shlex.quote(value)}" for key, value in process.env.items()]
        command = " ".join([*env, shlex.join(process.argv)])
        blocks.append(f"# {process.name}{where}: ready when {process.ready_url} answers 200\n{command}\n")
    return "\n".join(blocks)


def http_url(host: str, port: int) -> str:
    """``http://host:port``, with brackets around an IPv6 address."""
    return f"http://{join_host_port(host, port)}"


def join_host_port(host: str, port: int) -> str:
    """``host:port``, with brackets around an IPv6 address."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def inner_address(host: str) -> str:
    """How this machine reaches what listens on ``host``: loopback for a wildcard."""
    return LOOPBACK if host in WILDCARD_HOSTS else host


def _device(config: LaunchConfig, gpus: Sequence[int]) -> str:
    if config.device == "auto":
        return "cuda" if gpus else "cpu"
    return config.device


def _plan_workers(
    config: LaunchConfig,
    make_worker: Callable[..., ProcessSpec],
    shares: Sequence[tuple[int, ...]],
    host: str,
    ports: Ports,
) -> Iterator[ProcessSpec]:
    counts = {Role.PREFILL: config.prefill, Role.DECODE: config.decode}
    names = [(role, f"{role}-{i}") for role, count in counts.items() for i in range(count)]
    first = config.worker_base_port
    for (role, name), gpus in zip(names, shares, strict=True):
        port = ports.pick(host, first)
        first = min(port + 1, MAX_PORT) if first else 0
        args = (*config.sglang_args, *_role_args(config, role))
        yield make_worker(role=role, name=name, port=port, gpus=gpus, args=args)


def _role_args(config: LaunchConfig, role: Role) -> tuple[str, ...]:
    return config.prefill_args if role is Role.PREFILL else config.decode_args


def _gpu_shares(config: LaunchConfig, device: str, gpus: Sequence[int]) -> list[tuple[int, ...]]:
    """``tp`` consecutive GPUs for each worker; empty tuples on CPU."""
    num_workers = config.prefill + config.decode
    if device != "cuda":
        return [()] * num_workers
    needed = num_workers * config.tp
    if needed > len(gpus):
        raise ConfigError(
            f"{num_workers} servers with --tp {config.tp} need {needed} GPUs, found {len(gpus)}; "
            "lower -p, -d or --tp, or use --device cpu"
        )
    return [tuple(gpus[i : i + config.tp]) for i in range(0, needed, config.tp)]


def _bootstrap_spec(config: LaunchConfig, host: str, port: int) -> ProcessSpec:
    listen = ("--host", host, "--port", str(port))
    argv = (sys.executable, "-m", "pdserve", "bootstrap", *listen, *_file_args(config))
    return ProcessSpec("bootstrap", ProcessKind.BOOTSTRAP, argv, {}, http_url(host, port) + "/health")


def _balancer_spec(config: LaunchConfig, port: int, url: str, bootstrap: str) -> ProcessSpec:
    listen = ("--host", config.host, "--port", str(port))
    fleet = ("--bootstrap", bootstrap, "--policy", config.policy)
    slo = ("--slo", config.slo) if config.slo else ()
    argv = (sys.executable, "-m", "pdserve", "balance", *listen, *fleet, *slo, *_file_args(config))
    return ProcessSpec("balancer", ProcessKind.BALANCER, argv, {}, url + "/liveness")


def _file_args(config: LaunchConfig) -> tuple[str, ...]:
    return ("--config", config.config_file) if config.config_file else ()
