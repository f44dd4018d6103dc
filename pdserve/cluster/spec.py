"""Plans a fleet: its processes, their command lines and environments. Starts nothing.

LaunchConfig ──plan_cluster──► ClusterSpec ──► the spawner, or ``--dry-run`` as text
"""

from __future__ import annotations

import enum
import functools
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from pdserve.cluster.gpus import choose_device
from pdserve.cluster.ports import SystemPorts
from pdserve.cluster.worker_flags import WILDCARD_HOSTS, WorkerPlan, worker_environment, worker_flags
from pdserve.config.balancer import DEFLECT_AUTO
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


def plan_cluster(
    config: LaunchConfig,
    *,
    model_path: str,
    gpus: Sequence[int],
    cores: int,
    ports: SystemPorts,
    environ: Mapping[str, str] | None = None,
) -> ClusterSpec:
    """Plan every process of the fleet that ``config`` describes; pure apart from ``ports``.

    Args:
        gpus: usable GPU indices. ``cores``: CPU cores, divided among CPU workers.
        environ: the environment the workers will inherit: a tuning variable set there wins.

    Only the balancer listens on a wildcard host: all else has no authentication and stays on loopback.

    Raises:
        ConfigError: a taken port, too few GPUs, a flag that pdserve owns.
    """
    device = choose_device(config.device, gpus)
    if device == "cuda" and config.start_method == "fork":
        raise ConfigError("--start-method fork works on CPU only: a forked CUDA context is not usable")
    host = inner_address(config.host)
    balancer_port = ports.claim(config.host, config.port, "--port")
    bootstrap_port = ports.claim(host, config.bootstrap_port, "--bootstrap-port")
    balancer_url, bootstrap_url = http_url(host, balancer_port), http_url(host, bootstrap_port)
    make_plan = functools.partial(
        WorkerPlan, model_path=model_path, host=host, device=device, bootstrap_url=bootstrap_url,
        threads=max(1, cores // (config.prefill + config.decode)), environ=environ or {},
    )  # fmt: skip
    return ClusterSpec(
        bootstrap=_bootstrap_spec(config, host, bootstrap_port),
        balancer=_balancer_spec(config, balancer_port, balancer_url, join_host_port(host, bootstrap_port)),
        workers=tuple(_plan_workers(config, make_plan, _gpu_shares(config, device, gpus), ports)),
        device=device,
        balancer_url=balancer_url,
        bootstrap_url=bootstrap_url,
        can_fork=device == "cpu" and config.start_method != "spawn",
    )


def worker_spec(plan: WorkerPlan) -> ProcessSpec:
    """The process of one SGLang server.

    Raises:
        ConfigError: if ``plan.args`` hold a flag that pdserve sets itself.
    """
    flags = worker_flags(plan)
    argv = (sys.executable, "-m", "pdserve.plugin.worker", *flags)
    ready_url = http_url(inner_address(plan.host), plan.port) + "/health"
    env = worker_environment(plan)
    return ProcessSpec(plan.name, ProcessKind.WORKER, argv, env, ready_url, plan.role, plan.gpus, flags)


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


def _plan_workers(
    config: LaunchConfig,
    make_plan: Callable[..., WorkerPlan],
    shares: Sequence[tuple[int, ...]],
    ports: SystemPorts,
) -> Iterator[ProcessSpec]:
    """One process for each share of the GPUs, prefill workers first."""
    counts = {Role.PREFILL: config.prefill, Role.DECODE: config.decode}
    names = [(role, f"{role}-{i}") for role, count in counts.items() for i in range(count)]
    first, host = config.worker_base_port, inner_address(config.host)
    for (role, name), gpus in zip(names, shares, strict=True):
        port = ports.pick(host, first)
        first = min(port + 1, MAX_PORT) if first else 0
        yield worker_spec(
            make_plan(
                role=role,
                name=name,
                port=port,
                tp=config.tp,
                gpus=gpus,
                args=(*config.sglang_args, *_role_args(config, role)),
                served_model_name=config.served_model_name,
                fork_children=config.start_method != "spawn",
                data_plane=config.data_plane_environment,
                prefills_locally=config.deflect == DEFLECT_AUTO,
            )
        )


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
    expected = ("--expect-prefill", str(config.prefill), "--expect-decode", str(config.decode))
    fleet = ("--bootstrap", bootstrap, *expected, "--policy", config.policy)
    options = ("--deflect", config.deflect) if config.deflect == DEFLECT_AUTO else ()
    options = (*options, *_file_args(config))
    slo = ("--slo", config.slo) if config.slo else ()
    times = ("--shutdown-delay", f"{config.shutdown_delay_s:g}", "--drain", f"{config.drain_s:g}")
    argv = (sys.executable, "-m", "pdserve", "balance", *listen, *times, *fleet, *slo, *options)
    return ProcessSpec("balancer", ProcessKind.BALANCER, argv, {}, url + "/liveness")


def _file_args(config: LaunchConfig) -> tuple[str, ...]:
    return ("--config", config.config_file) if config.config_file else ()
