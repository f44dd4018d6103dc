"""Every setting of pdserve, read once and validated once; the only module that reads the environment.

Files are TOML, one table per section, keys named as the fields below. A flag
given on the command line wins over the file, the file over the default.
"""

from __future__ import annotations

import os
import tempfile
import tomllib
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from pdserve.balancer_config import BalancerConfig as BalancerConfig
from pdserve.errors import ConfigError
from pdserve.types import Role

T = TypeVar("T")

DEVICES = ("auto", "cpu", "cuda")
SWITCH = ("on", "off")
TRANSFER_PATHS = ("auto", "direct", "packed")
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
    kv_events: bool = False
    """Workers publish what their prefix caches hold, and the balancer's ``pair_cost`` knows it exactly."""
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


@dataclass(frozen=True, slots=True)
class DataPlaneConfig:
    """How a worker moves KV. The switches of ``pdserve launch`` reach it by environment."""

    is_on: bool = True
    """False: SGLang's own NIXL path, for comparison."""
    path: str = "auto"
    """``direct`` or ``packed`` force one path where the geometry allows it."""
    slab_mb: int = 0
    """Slab of each rank in MiB; 0: 64 on CPU, 1024 on a GPU."""
    windows: int = 8
    """Parts of a decode rank's slab, one per prefill rank that writes to it."""
    cache_dir: str = ""
    """Where built CUDA kernels are kept; empty: pdserve's cache folder."""

    def __post_init__(self) -> None:
        if self.path not in TRANSFER_PATHS:
            raise ConfigError(f"transfer path must be one of {', '.join(TRANSFER_PATHS)}, got {self.path!r}")
        if not 0 <= self.slab_mb <= 65536:
            raise ConfigError(f"slab must be 0 (default) to 65536 MiB, got {self.slab_mb}")
        if not 1 <= self.windows <= 1024:
            raise ConfigError(f"slab windows must be 1 to 1024, got {self.windows}")

    @classmethod
    def from_environ(cls, env: Mapping[str, str]) -> DataPlaneConfig:
        """Read PDSERVE_DATA_PLANE (on, off), _TRANSFER_PATH, _SLAB_MB, _SLAB_WINDOWS.

        Raises:
            ConfigError: naming the variable and what it may be.
        """
        switch = env.get("PDSERVE_DATA_PLANE", "on")
        if switch not in SWITCH:
            raise ConfigError(f"PDSERVE_DATA_PLANE must be on or off, got {switch!r}")
        numbers = {}
        for name, default in (("PDSERVE_SLAB_MB", 0), ("PDSERVE_SLAB_WINDOWS", 8)):
            text = env.get(name, "") or str(default)
            if not text.isdigit():
                raise ConfigError(f"{name} must be a whole number, got {text!r}")
            numbers[name] = int(text)
        return cls(
            is_on=switch == "on",
            path=env.get("PDSERVE_TRANSFER_PATH", "") or "auto",
            slab_mb=numbers["PDSERVE_SLAB_MB"],
            windows=numbers["PDSERVE_SLAB_WINDOWS"],
            cache_dir=str(cache_dir() / "kernels"),
        )


@dataclass(frozen=True, slots=True)
class WorkerEnv:
    """What the launcher told a worker process through its environment."""

    is_active: bool = False
    role: Role | None = None
    worker_id: str = ""
    instance_id: str = ""
    bootstrap_url: str = ""
    parent_pid: int = 0
    fork_children: bool = True
    """On CPU, whether SGLang's own processes are forked from the server process, or spawned as stock does."""
    stock: bool = False
    """Only what SGLang cannot do without on CPU; everything else stays SGLang's own, for comparisons."""
    advertise_host: str = ""
    """Host by which other machines reach this worker; empty: the host it listens on."""
    data_plane: DataPlaneConfig = field(default_factory=DataPlaneConfig)

    @classmethod
    def from_environ(cls, environ: Mapping[str, str] | None = None) -> WorkerEnv:
        """Read ``PDSERVE_*``; an inactive plugin ignores everything else.

        Raises:
            ConfigError: if PDSERVE_ACTIVE is set and another value is malformed.
        """
        env = os.environ if environ is None else environ
        if env.get("PDSERVE_ACTIVE", "") != "1":
            return cls()
        role = env.get("PDSERVE_ROLE", "")
        if role not in ("", *Role):
            raise ConfigError(f"PDSERVE_ROLE must be prefill or decode, got {role!r}")
        parent = env.get("PDSERVE_PARENT_PID", "0")
        if not parent.isdigit():
            raise ConfigError(f"PDSERVE_PARENT_PID must be a process id, got {parent!r}")
        return cls(
            is_active=True,
            role=Role(role) if role else None,
            worker_id=env.get("PDSERVE_WORKER_ID", ""),
            instance_id=env.get("PDSERVE_INSTANCE_ID", ""),
            bootstrap_url=env.get("PDSERVE_BOOTSTRAP_URL", "").rstrip("/"),
            parent_pid=int(parent),
            fork_children=env.get("PDSERVE_FORK_CHILDREN", "1") == "1",
            stock=env.get("PDSERVE_STOCK", "") == "1",
            advertise_host=env.get("PDSERVE_ADVERTISE_HOST", ""),
            data_plane=DataPlaneConfig.from_environ(env),
        )


def adopt_worker_defaults() -> WorkerEnv:
    """Complete this process's own worker environment, so that its SGLang children inherit it.

    A missing PDSERVE_INSTANCE_ID is made here: new at every start of a worker.
    """
    os.environ["PDSERVE_ACTIVE"] = "1"
    if not os.environ.get("PDSERVE_INSTANCE_ID"):
        os.environ["PDSERVE_INSTANCE_ID"] = uuid.uuid4().hex
    return WorkerEnv.from_environ()


def adopt_scratch(folder: Path) -> None:
    """Make ``folder`` the temporary folder of this process and of the children it starts."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    os.environ["TMPDIR"] = str(folder)
    os.environ["PDSERVE_WORKER_PID"] = str(os.getpid())
    tempfile.tempdir = str(folder)


def worker_pid() -> int:
    """Process id of the server this process belongs to; its own if it is not a pdserve worker."""
    return int(os.environ.get("PDSERVE_WORKER_PID") or os.getpid())


def ucx_transports() -> str:
    """The transports UCX is restricted to (``UCX_TLS``); empty: it chooses."""
    return os.environ.get("UCX_TLS", "")


def publish_stats_path(path: str) -> None:
    """Tell this process's children where the transfer counters lie (plugin/stats.py)."""
    os.environ["PDSERVE_STATS"] = path


def stats_path() -> str:
    """Where the transfer counters of this server lie; empty if it has none."""
    return os.environ.get("PDSERVE_STATS", "")


def parent_pid() -> int:
    """Process id of the launcher that started this process and must not be outlived; 0: none."""
    value = os.environ.get("PDSERVE_PARENT_PID", "")
    return int(value) if value.isdigit() else 0


def keys_from_environment() -> dict[str, str]:
    """Keys of the balancer that the environment holds, by their names in BalancerConfig.

    ``PDSERVE_API_KEY``, ``PDSERVE_ADMIN_API_KEY``, ``PDSERVE_WORKER_API_KEY``: other users of the
    machine can read a command line, but not an environment.
    """
    names = ("api_key", "admin_api_key", "worker_api_key")
    return {name: value for name in names if (value := os.environ.get(f"PDSERVE_{name.upper()}", ""))}


def environment() -> dict[str, str]:
    """A copy of this process's environment."""
    return dict(os.environ)


def replace_environ(values: Mapping[str, str]) -> None:
    """Make ``values`` this process's whole environment; for a freshly forked worker."""
    os.environ.clear()
    os.environ.update(values)


def check_port(name: str, port: int) -> None:
    """Raise ConfigError unless ``0 <= port <= 65535``."""
    if not 0 <= port <= 65535:
        raise ConfigError(f"{name} must be 0..65535, got {port}")


def cache_dir() -> Path:
    """``$PDSERVE_CACHE``, else ``$XDG_CACHE_HOME/pdserve``, else ``~/.cache/pdserve``; not created here."""
    explicit = os.environ.get("PDSERVE_CACHE")
    if explicit:
        return Path(explicit).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "pdserve"


@dataclass(frozen=True, slots=True)
class FileConfig:
    """A parsed configuration file: only the keys it names, by section."""

    launch: Mapping[str, Any] = field(default_factory=dict)
    balancer: Mapping[str, Any] = field(default_factory=dict)
    bootstrap: Mapping[str, Any] = field(default_factory=dict)


_SECTIONS: dict[str, type[Any]] = {
    "launch": LaunchConfig,
    "balancer": BalancerConfig,
    "bootstrap": BootstrapConfig,
}


def load_file(path: Path) -> FileConfig:
    """Parse a TOML file and check its names and the types of its values.

    Raises:
        ConfigError: if the file is missing, is not TOML, has an unknown section or key,
            or a value of another type than the default.
    """
    try:
        raw = tomllib.loads(path.read_text())
    except OSError as exc:
        raise ConfigError(f"cannot read config file {path}: {exc.strerror}") from exc
    except tomllib.TOMLDecodeError as exc:
        raise ConfigError(f"{path} is not valid TOML: {exc}") from exc
    for section, values in raw.items():
        known = _SECTIONS.get(section)
        if known is None or not isinstance(values, dict):
            raise ConfigError(f"{path}: unknown section [{section}]; known: {', '.join(_SECTIONS)}")
        names = {f.name for f in fields(known)}
        for key in values:
            if key not in names:
                raise ConfigError(f"{path}: unknown key {section}.{key}; known: {', '.join(sorted(names))}")
        try:
            msgspec.convert(values, type=known)
        except msgspec.ValidationError as exc:
            raise ConfigError(f"{path}: {str(exc).replace('$', section)}") from exc
    return FileConfig(**raw)


def merge(default: T, file_values: Mapping[str, Any], flags: Mapping[str, Any]) -> T:
    """Default < file < flags; a flag that is ``None`` was not given. Lists become tuples."""
    values = {**file_values, **{k: v for k, v in flags.items() if v is not None}}
    clean = {k: _tuples(v) for k, v in values.items()}
    try:
        return replace(default, **clean)  # type: ignore[type-var]
    except TypeError as exc:
        raise ConfigError(f"bad configuration value: {exc}") from exc


def _tuples(value: Any) -> Any:
    return tuple(_tuples(item) for item in value) if isinstance(value, list) else value
