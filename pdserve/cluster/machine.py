"""Plans for this machine: calls the planner with its GPUs, cores, free ports and environment."""

from __future__ import annotations

import http.client
import os
import socket
from collections.abc import Sequence
from urllib.parse import urlsplit

from pdserve.cluster.gpus import choose_device, find_gpus
from pdserve.cluster.ports import SystemPorts
from pdserve.cluster.spec import ClusterSpec, ProcessSpec, http_url, plan_cluster, worker_spec
from pdserve.cluster.worker_flags import WorkerPlan
from pdserve.config.balancer import DEFLECT_AUTO
from pdserve.config.launch import DEVICES, JoinConfig, LaunchConfig, check_port
from pdserve.config.worker_env import environment
from pdserve.errors import ConfigError
from pdserve.process.limits import usable_cores
from pdserve.process.scratch import live_workers, scratch_dir

FIRST_WORKER_PORT = 31000
HEALTH_S = 5.0


def plan_on_this_machine(config: LaunchConfig, ports: SystemPorts) -> ClusterSpec:
    """The fleet of ``config`` with this machine's GPUs, cores and ports; ``config.model`` is resolved.

    ``ports`` keeps the fleet's ports until it is closed.

    Raises:
        ConfigError: as ``plan_cluster``.
    """
    scratch_dir(os.getpid())  # refuses a machine on which no worker finds a place for its sockets
    gpus = [] if config.device == "cpu" else find_gpus()
    return plan_cluster(
        config,
        model_path=config.model,
        gpus=gpus,
        cores=usable_cores(),
        ports=ports,
        environ=environment(),
    )


def plan_join(config: JoinConfig, gpus: Sequence[int], ports: SystemPorts) -> ProcessSpec:
    """The one worker process that ``config`` describes; ``gpus`` are the usable ones.

    Raises:
        ConfigError: a taken port, too few GPUs, a flag that pdserve owns.
    """
    check_port("--port", config.port)
    if config.device not in DEVICES:
        raise ConfigError(f"--device must be one of {', '.join(DEVICES)}, got {config.device!r}")
    device = choose_device(config.device, gpus)
    if device == "cuda" and config.tp > len(gpus):
        raise ConfigError(
            f"--tp {config.tp} needs {config.tp} GPUs, found {len(gpus)}; lower --tp or use --device cpu"
        )
    if config.port:
        port = ports.claim(config.host, config.port, "--port")
    else:
        port = ports.pick(config.host, FIRST_WORKER_PORT)
    plan = WorkerPlan(
        role=config.role,
        name=config.name or f"{config.role}-{socket.gethostname()}-{port}",
        model_path=config.model_path,
        host=config.host,
        port=port,
        device=device,
        bootstrap_url=config.bootstrap_url,
        tp=config.tp,
        gpus=tuple(gpus[: config.tp]) if device == "cuda" else (),
        # Others on this machine need their cores: oversubscribed threads made decode 6 times slower.
        threads=max(1, usable_cores() // (len(live_workers()) + 1)),
        args=config.sglang_args,
        environ=environment(),
        served_model_name=config.served_model_name,
        prefills_locally=config.deflect == DEFLECT_AUTO,
    )
    return worker_spec(plan)


def plan_join_here(config: JoinConfig, ports: SystemPorts) -> ProcessSpec:
    """As ``plan_join``, with this machine's GPUs."""
    scratch_dir(os.getpid())
    return plan_join(config, [] if config.device == "cpu" else find_gpus(), ports)


def join_environment(config: JoinConfig, spec: ProcessSpec) -> dict[str, str]:
    """The whole environment of a joining worker: it has no launcher to die with."""
    inherited = {
        key: value
        for key, value in environment().items()
        if key not in ("PDSERVE_PARENT_PID", "PDSERVE_INSTANCE_ID")
    }
    advertised = {"PDSERVE_ADVERTISE_HOST": config.advertise_host} if config.advertise_host else {}
    return {**inherited, **spec.env, **advertised}


def service_url(address: str, option: str) -> str:
    """``HOST:PORT`` or ``http://HOST:PORT`` as a URL.

    Raises:
        ConfigError: naming ``option`` if it is neither.
    """
    try:
        parts = urlsplit(address if "://" in address else f"//{address}")
        host, port = parts.hostname, parts.port
    except ValueError:
        host, port = None, None
    if not host or not port or parts.scheme not in ("", "http") or parts.path not in ("", "/"):
        raise ConfigError(f"{option} must be HOST:PORT, got {address!r}")
    return http_url(host, port)


def check_bootstrap_service(url: str) -> None:
    """Raise ConfigError unless a bootstrap service answers GET /health at ``url``."""
    parts = urlsplit(url)
    assert parts.hostname is not None
    connection = http.client.HTTPConnection(parts.hostname, parts.port, timeout=HEALTH_S)
    try:
        connection.request("GET", "/health")
        status = connection.getresponse().status
    except (OSError, http.client.HTTPException) as exc:
        raise ConfigError(
            f"no bootstrap service answers at {url} ({exc}); start one with `pdserve bootstrap` or "
            "`pdserve launch`, or correct --join"
        ) from exc
    finally:
        connection.close()
    if status != 200:
        raise ConfigError(f"{url}/health answers HTTP {status}: is that a pdserve bootstrap service?")
