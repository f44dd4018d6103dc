"""Settings of ``pdserve launch``, of one joining worker and of the bootstrap service."""

from __future__ import annotations

from dataclasses import MISSING, dataclass

from pdserve.config.balancer import LOG_LEVELS, BalancerConfig
from pdserve.config.setting import (
    ENGINE,
    FLEET,
    LISTEN,
    RUN,
    TRANSFER,
    check_choices,
    same_setting,
    setting,
)
from pdserve.config.worker_env import LAYERWISE, SWITCH, TRANSFER_PATHS, DataPlaneConfig
from pdserve.errors import ConfigError
from pdserve.types import Role

DEVICES = ("auto", "cpu", "cuda")


@dataclass(frozen=True, slots=True)
class BootstrapConfig:
    """Where the bootstrap service listens and how long a silent worker stays a member."""

    host: str = setting("127.0.0.1", "Address to listen on.", "address", "--host", panel=LISTEN)
    port: int = setting(8997, "Port to listen on.", "port", "--port")
    port_range: tuple[int, int] = setting(
        (0, 0), "Ports for prefill servers; 0 to 0: any free ones.", "ports", "--port-range A-B"
    )
    advertise_host: str = setting(
        "",
        "Host by which other machines reach this service when it listens on every address.",
        "address",
        "--advertise-host",
        empty="the one it listens on",
    )
    lease_s: float = setting(
        10.0, "Silence after which a server counts as gone.", "seconds", "--lease", panel=RUN
    )
    log_level: str = setting("info", "How much is logged.", "name", "--log-level", choices=LOG_LEVELS)


@dataclass(frozen=True, slots=True)
class LaunchConfig:
    """A whole fleet on one machine: what ``pdserve launch`` starts."""

    model: str = setting(
        "",
        "Folder or hub id; `tiny`: a toy for tests.",
        "name or path",
        "MODEL",
        panel=FLEET,
        empty="the embedded SmolLM2-135M-Instruct",
    )
    prefill: int = setting(1, "Prefill servers.", "count", "-p --prefill")
    decode: int = setting(1, "Decode servers.", "count", "-d --decode")
    served_model_name: str = setting(
        "",
        "Name in /v1/models.",
        "name",
        "",
        empty="the embedded model's name, or what SGLang makes of MODEL",
    )
    host: str = setting(
        "127.0.0.1",
        "Address of the service; 0.0.0.0 exposes the balancer, never the workers.",
        "address",
        "--host",
        panel=LISTEN,
    )
    port: int = setting(30000, "Port of the service.", "port", "--port")
    bootstrap_port: int = setting(
        0, "Port of the bootstrap service.", "port", "--bootstrap-port", empty="any free one"
    )
    worker_base_port: int = setting(
        31000, "First port tried for workers; a taken one is skipped.", "port", ""
    )
    device: str = setting(
        "auto",
        "Where workers run; auto: cuda if there is a GPU.",
        "name",
        "--device",
        panel=ENGINE,
        choices=DEVICES,
    )
    tp: int = setting(1, "Tensor parallel size of each server.", "GPUs", "--tp")
    sglang_args: tuple[str, ...] = setting(
        (),
        'SGLang flags of every worker: ["--page-size", "32"]; on the command line after `--`.',
        "words",
        "",
    )
    prefill_args: tuple[str, ...] = setting(
        (), "SGLang flags of prefill servers only.", "one string; words in a file", "--prefill-args"
    )
    decode_args: tuple[str, ...] = setting(
        (), "SGLang flags of decode servers only.", "one string; words in a file", "--decode-args"
    )
    policy: str = same_setting(BalancerConfig, "policy")
    slo: str = setting(
        "",
        "Time to first token and per further token that requests need; what cannot meet it is refused.",
        "seconds",
        "--slo ttft=S,tpot=S",
    )
    deflect: str = same_setting(BalancerConfig, "deflect")
    data_plane: str = setting(
        "on",
        "How KV travels; off: SGLang's own NIXL path.",
        "name",
        "--data-plane",
        panel=TRANSFER,
        choices=SWITCH,
    )
    transfer_path: str = setting(
        "auto",
        "direct or packed force one path where the pools allow it; auto: whatever is quicker.",
        "name",
        "--transfer-path",
        choices=TRANSFER_PATHS,
    )
    layerwise: str = setting(
        "off",
        "A layer's KV leaves prefill while the next layers compute; auto: on a GPU where nothing hides them.",
        "name",
        "--layerwise",
        choices=LAYERWISE,
    )
    slab_mb: int = setting(0, "Slab of each rank.", "MiB", "--slab-mb", empty="64 on CPU, 256 on a GPU")
    start_method: str = setting(
        "auto",
        "How workers start; fork: from one preloaded process, quicker, CPU only; spawn: each imports SGLang.",
        "name",
        "--start-method",
        panel=RUN,
        choices=("auto", "fork", "spawn"),
    )
    log_dir: str = setting(
        "", "Folder with one log per process.", "folder", "--log-dir", empty="a new one in the cache"
    )
    ready_timeout_s: float = setting(
        600.0, "Longest wait until every pair has answered.", "seconds", "--ready-timeout"
    )
    shutdown_delay_s: float = same_setting(BalancerConfig, "shutdown_delay_s")
    drain_s: float = same_setting(BalancerConfig, "drain_s")
    max_restarts: int = setting(
        5,
        "Restarts in a row of one worker (a run of 60 s resets the count) before it is given up: tried only "
        "after 1 minute, then 2, 4, and every 10.",
        "count",
    )
    config_file: str = ""
    """Set by ``--config``: the balancer and the bootstrap service read their sections of it."""

    def __post_init__(self) -> None:
        if self.prefill < 1 or self.decode < 1:
            raise ConfigError(
                f"need at least one prefill and one decode server, got -p {self.prefill} -d {self.decode}"
            )
        check_choices(self)
        if self.tp < 1:
            raise ConfigError(f"tp must be at least 1, got {self.tp}")
        DataPlaneConfig(path=self.transfer_path, slab_mb=self.slab_mb, layerwise=self.layerwise)
        for name in ("port", "bootstrap_port", "worker_base_port"):
            check_port(name, getattr(self, name))

    @property
    def data_plane_environment(self) -> dict[str, str]:
        """What workers must be told of the data plane; nothing when all is default."""
        wanted = {
            "PDSERVE_DATA_PLANE": (self.data_plane, "on"),
            "PDSERVE_TRANSFER_PATH": (self.transfer_path, "auto"),
            "PDSERVE_SLAB_MB": (str(self.slab_mb), "0"),
            "PDSERVE_LAYERWISE": (self.layerwise, "off"),
        }
        return {name: value for name, (value, default) in wanted.items() if value != default}


@dataclass(frozen=True, slots=True)
class JoinConfig:
    """One worker that joins a running fleet: what ``pdserve prefill`` and ``pdserve decode`` start."""

    role: Role
    model_path: str
    bootstrap_url: str
    host: str = setting("127.0.0.1", "Address to listen on.", "address", "--host", panel=LISTEN)
    port: int = setting(0, "Port to listen on.", "port", "--port", empty="first free from 31000")
    name: str = setting("", "Name in the fleet.", "name", "--name", panel=FLEET, empty="role-hostname-port")
    advertise_host: str = same_setting(BootstrapConfig, "advertise_host")
    device: str = same_setting(LaunchConfig, "device")
    tp: int = same_setting(LaunchConfig, "tp")
    deflect: str = same_setting(LaunchConfig, "deflect")
    sglang_args: tuple[str, ...] = ()
    served_model_name: str = ""


@dataclass(frozen=True, slots=True)
class JoinTarget:
    """What a joining worker serves, and where, as the command line names it."""

    join: str = setting(MISSING, "Bootstrap service to join.", "address", "--join HOST:PORT", panel=FLEET)
    model: str = same_setting(LaunchConfig, "model")


def check_port(name: str, port: int) -> None:
    """Raise ConfigError unless ``0 <= port <= 65535``."""
    if not 0 <= port <= 65535:
        raise ConfigError(f"{name} must be 0..65535, got {port}")
