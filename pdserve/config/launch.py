"""Settings of ``pdserve launch`` and of the bootstrap service."""

from __future__ import annotations

from dataclasses import dataclass

from pdserve.config.worker_env import SWITCH, DataPlaneConfig
from pdserve.errors import ConfigError

DEVICES = ("auto", "cpu", "cuda")
START_METHODS = ("auto", "fork", "spawn")


@dataclass(frozen=True, slots=True)
class BootstrapConfig:
    """Where the bootstrap service listens. ``port_range`` bounds the per-prefill ports (0-0: any)."""

    host: str = "127.0.0.1"
    port: int = 8997
    port_range: tuple[int, int] = (0, 0)
    advertise_host: str = ""
    """Host by which other machines reach this service when it listens on every address."""
    lease_s: float = 10.0
    log_level: str = "info"


@dataclass(frozen=True, slots=True)
class LaunchConfig:
    """A whole fleet on one machine: what ``pdserve launch`` starts."""

    model: str = ""
    """Local path or hub id; empty serves the embedded SmolLM2-135M-Instruct."""
    prefill: int = 1
    decode: int = 1
    host: str = "127.0.0.1"
    port: int = 30000
    bootstrap_port: int = 0
    """0 picks a free port."""
    worker_base_port: int = 31000
    """First port tried for workers; a taken one is skipped."""
    device: str = "auto"
    tp: int = 1
    policy: str = "pair_cost"
    slo: str = ""
    """Seconds a request may take to its first token and per further token: ``ttft=2,tpot=0.05``."""
    start_method: str = "auto"
    """``fork``: workers are forked from one preloaded process (CPU only); ``spawn``: each imports SGLang."""
    log_dir: str = ""
    """Folder for one log file per process; empty: a new folder under the cache directory."""
    ready_timeout_s: float = 600.0
    drain_s: float = 30.0
    max_restarts: int = 5
    """Restarts in a row of one worker (a run of 60 s resets the count) before the fleet gives up on it."""
    sglang_args: tuple[str, ...] = ()
    prefill_args: tuple[str, ...] = ()
    decode_args: tuple[str, ...] = ()
    data_plane: str = "on"
    """``off``: SGLang's own NIXL path, for comparison."""
    transfer_path: str = "auto"
    """``direct`` or ``packed`` force one path where the pools allow it."""
    slab_mb: int = 0
    """Slab of each rank in MiB; 0: 64 on CPU, 1024 on a GPU."""
    served_model_name: str = ""
    """Name in ``/v1/models``; empty: the embedded model's name, or what SGLang makes of ``model``."""
    config_file: str = ""
    """Set by ``--config``: the balancer and the bootstrap service read their sections of it."""

    def __post_init__(self) -> None:
        if self.prefill < 1 or self.decode < 1:
            raise ConfigError(
                f"need at least one prefill and one decode server, got -p {self.prefill} -d {self.decode}"
            )
        if self.device not in DEVICES:
            raise ConfigError(f"device must be one of {', '.join(DEVICES)}, got {self.device!r}")
        if self.start_method not in START_METHODS:
            raise ConfigError(
                f"start_method must be one of {', '.join(START_METHODS)}, got {self.start_method!r}"
            )
        if self.tp < 1:
            raise ConfigError(f"tp must be at least 1, got {self.tp}")
        if self.data_plane not in SWITCH:
            raise ConfigError(f"data_plane must be on or off, got {self.data_plane!r}")
        DataPlaneConfig(path=self.transfer_path, slab_mb=self.slab_mb)
        for name in ("port", "bootstrap_port", "worker_base_port"):
            check_port(name, getattr(self, name))

    @property
    def data_plane_environment(self) -> dict[str, str]:
        """What workers must be told of the data plane; nothing when all is default."""
        wanted = {
            "PDSERVE_DATA_PLANE": (self.data_plane, "on"),
            "PDSERVE_TRANSFER_PATH": (self.transfer_path, "auto"),
            "PDSERVE_SLAB_MB": (str(self.slab_mb), "0"),
        }
        return {name: value for name, (value, default) in wanted.items() if value != default}


def check_port(name: str, port: int) -> None:
    """Raise ConfigError unless ``0 <= port <= 65535``."""
    if not 0 <= port <= 65535:
        raise ConfigError(f"{name} must be 0..65535, got {port}")
