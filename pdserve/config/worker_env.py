"""The environment of pdserve's processes; the only module that reads it.

A worker is told by its launcher through ``PDSERVE_*`` who it is and how it moves KV.
"""

from __future__ import annotations

import os
import tempfile
import uuid
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from pdserve.errors import ConfigError
from pdserve.types import Role

SWITCH = ("on", "off")
TRANSFER_PATHS = ("auto", "direct", "packed")
LAYERWISE = ("auto", "on", "off")
PROXIES = ("http_proxy", "HTTP_PROXY", "https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY")
NO_PROXY = ("no_proxy", "NO_PROXY")
LOOPBACK_HOSTS = ("127.0.0.1", "localhost", "::1")


@dataclass(frozen=True, slots=True)
class DataPlaneConfig:
    """How a worker moves KV. The switches of ``pdserve launch`` reach it by environment."""

    is_on: bool = True
    """False: SGLang's own NIXL path, for comparison."""
    path: str = "auto"
    """``direct`` or ``packed`` force one path where the geometry allows it."""
    slab_mb: int = 0
    """Slab of each rank in MiB; 0: 64 on CPU, 256 on a GPU."""
    layerwise: str = "off"
    """``on``: a layer's KV leaves prefill while the next layers compute; ``auto``: if it can, on a GPU."""
    cache_dir: str = ""
    """Where built CUDA kernels are kept; empty: pdserve's cache folder."""

    def __post_init__(self) -> None:
        if self.path not in TRANSFER_PATHS:
            raise ConfigError(f"transfer path must be one of {', '.join(TRANSFER_PATHS)}, got {self.path!r}")
        if self.layerwise not in LAYERWISE:
            raise ConfigError(f"layerwise must be one of {', '.join(LAYERWISE)}, got {self.layerwise!r}")
        if not 0 <= self.slab_mb <= 65536:
            raise ConfigError(f"slab must be 0 (default) to 65536 MiB, got {self.slab_mb}")

    def slab_bytes(self, *, is_gpu: bool) -> int:
        """What each rank allocates for it; 0 while the data plane is off."""
        return (self.slab_mb or (256 if is_gpu else 64)) << 20 if self.is_on else 0

    @classmethod
    def from_environ(cls, env: Mapping[str, str]) -> DataPlaneConfig:
        """Read PDSERVE_DATA_PLANE (on, off), _TRANSFER_PATH, _SLAB_MB, _LAYERWISE.

        Raises:
            ConfigError: naming the variable and what it may be.
        """
        switch = env.get("PDSERVE_DATA_PLANE", "on")
        if switch not in SWITCH:
            raise ConfigError(f"PDSERVE_DATA_PLANE must be on or off, got {switch!r}")
        slab_mb = env.get("PDSERVE_SLAB_MB", "") or "0"
        if not slab_mb.isdigit():
            raise ConfigError(f"PDSERVE_SLAB_MB must be a whole number, got {slab_mb!r}")
        return cls(
            is_on=switch == "on",
            path=env.get("PDSERVE_TRANSFER_PATH", "") or "auto",
            slab_mb=int(slab_mb),
            layerwise=env.get("PDSERVE_LAYERWISE", "") or "off",
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
    local_prefill: bool = False
    """A decode worker may prefill requests itself (plugin/local_prefill)."""
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
            local_prefill=env.get("PDSERVE_LOCAL_PREFILL", "") == "1",
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


def past_proxies(hosts: Iterable[str], environ: Mapping[str, str]) -> dict[str, str]:
    """``no_proxy`` and ``NO_PROXY`` with loopback and ``hosts`` added; empty if no proxy is in the way.

    SGLang asks the bootstrap service with ``requests``, which sends it to the proxy that the environment
    names for the world outside. Both spellings: clients differ in which one wins.
    """
    given = [environ.get(name, "") for name in NO_PROXY]
    exempt = [host.strip() for text in given for host in text.split(",") if host.strip()]
    wanted = list(dict.fromkeys([*exempt, *LOOPBACK_HOSTS, *filter(None, hosts)]))
    is_free = "*" in exempt or not any(environ.get(name) for name in PROXIES)
    return {} if is_free or wanted == exempt else dict.fromkeys(NO_PROXY, ",".join(wanted))


def go_past_proxies(host: str) -> None:
    """Let this process reach ``host`` without a proxy."""
    os.environ.update(past_proxies([host], os.environ))


def environment() -> dict[str, str]:
    """A copy of this process's environment."""
    return dict(os.environ)


def replace_environ(values: Mapping[str, str]) -> None:
    """Make ``values`` this process's whole environment; for a freshly forked worker."""
    os.environ.clear()
    os.environ.update(values)


def cache_dir() -> Path:
    """``$PDSERVE_CACHE``, else ``$XDG_CACHE_HOME/pdserve``, else ``~/.cache/pdserve``; not created here."""
    explicit = os.environ.get("PDSERVE_CACHE")
    if explicit:
        return Path(explicit).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "pdserve"
