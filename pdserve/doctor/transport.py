"""NIXL and the UCX below it: what is installed, which roads there are here, which settings close them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from pdserve.doctor.children import ChildResult, run_module
from pdserve.doctor.finding import Finding, error, note, ok, warning
from pdserve.doctor.gpu import torch_cuda
from pdserve.doctor.software import installed_version
from pdserve.transfer.engine import MemoryKind
from pdserve.transfer.ucx import BETWEEN_PROCESSES, transport_problem

LOOPBACK_S = 60.0
SLOW_BYTES_PER_S = 0.3e9
"""Below what TCP over the loopback gives on one old core; shared memory gives several GB/s."""
UCX_S = 20.0
NIXL, UCX, MODULES, TLS, NET, RDMA = "nixl", "ucx", "UCX_MODULE_DIR", "UCX_TLS", "UCX_NET_DEVICES", "rdma"

_ALIASES = {
    "sm": {"posix", "sysv", "xpmem", "cma", "knem"},
    "shm": {"posix", "sysv", "xpmem"},
    "mm": {"posix", "sysv", "xpmem"},
    "ib": {"rc_verbs", "rc_mlx5", "ud_verbs", "ud_mlx5", "dc_mlx5"},
    "rc": {"rc_verbs", "rc_mlx5"},
    "rc_v": {"rc_verbs"},
    "rc_x": {"rc_mlx5"},
    "ud": {"ud_verbs", "ud_mlx5"},
    "ud_v": {"ud_verbs"},
    "ud_x": {"ud_mlx5"},
    "dc": {"dc_mlx5"},
    "dc_x": {"dc_mlx5"},
    "cuda": {"cuda_copy", "cuda_ipc", "gdr_copy"},
}
"""What a name in UCX_TLS stands for (UCX's ucp_context.c)."""


@dataclass(frozen=True, slots=True)
class TransportFacts:
    """``transports``: (name, device) pairs UCX can use here, None when it could not be asked
    (``ucx_trouble`` says why). ``rdma``: RDMA devices with their link state; ``networks``: interfaces."""

    nixl_version: str = ""
    backend_package: str = ""
    """``nixl-cu13`` for a torch of CUDA 13."""
    backend_version: str = ""
    plugins: tuple[str, ...] = ()
    plugin_dir: str = ""
    """NIXL_PLUGIN_DIR, if it is set."""
    ucx_version: str = ""
    transports: tuple[tuple[str, str], ...] | None = None
    ucx_trouble: str = ""
    rdma: Mapping[str, str] | None = None
    networks: tuple[str, ...] = ()
    module_dir: str = ""
    """UCX_MODULE_DIR, if it is set and holds no UCX modules."""
    ucx_tls: str = ""
    ucx_net_devices: str = ""

    @property
    def names(self) -> set[str]:
        """Transports without their devices."""
        return {name for name, _ in self.transports or ()}


def gather_transport(environ: Mapping[str, str]) -> TransportFacts:
    """Look at packages and devices, and ask UCX in a child process."""
    package = f"nixl-cu{torch_cuda().partition('.')[0] or '13'}"
    folder = _libraries(package)
    plugin_dir = environ.get("NIXL_PLUGIN_DIR", "")
    plugin_folder = Path(plugin_dir) if plugin_dir else folder / "nixl"
    child = run_module("pdserve.doctor.ucx_child", str(folder), limit_s=UCX_S)
    answer = child.json()
    return TransportFacts(
        nixl_version=installed_version("nixl"),
        backend_package=package,
        backend_version=installed_version(package),
        plugins=tuple(sorted(file.stem.removeprefix("libplugin_") for file in _plugins(plugin_folder))),
        plugin_dir=plugin_dir,
        ucx_version=str(answer["version"]) if answer else "",
        transports=tuple((str(n), str(d)) for n, d in answer["resources"]) if answer else None,
        ucx_trouble="" if answer else child.complaint(UCX_S),
        rdma={device.name: _link_state(device) for device in Path("/sys/class/infiniband").glob("*")},
        networks=tuple(sorted(link.name for link in Path("/sys/class/net").glob("*"))),
        module_dir=_useless_module_dir(environ.get("UCX_MODULE_DIR", "")),
        ucx_tls=environ.get("UCX_TLS", ""),
        ucx_net_devices=environ.get("UCX_NET_DEVICES", ""),
    )


def _libraries(package: str) -> Path:
    import importlib.util

    module = package.replace("-", "_")
    spec = importlib.util.find_spec(module)
    locations = list(spec.submodule_search_locations or ()) if spec else []
    return Path(locations[0]).parent / f"{module}.libs" if locations else Path(f"{module}.libs")


def _useless_module_dir(folder: str) -> str:
    return folder if folder and not any(Path(folder).glob("libuct_*.so*")) else ""


def _plugins(folder: Path) -> list[Path]:
    return list(folder.glob("libplugin_*.so"))


def _link_state(device: Path) -> str:
    states = []
    for state in sorted(device.glob("ports/*/state")):
        try:
            states.append(state.read_text().partition(":")[2].strip())
        except OSError:
            states.append("unreadable")
    return ",".join(states)


def judge_transport(facts: TransportFacts, *, on_gpu: bool) -> list[Finding]:
    """Whether KV can be sent, as far as settings and libraries show it."""
    kind = MemoryKind.VRAM if on_gpu else MemoryKind.DRAM
    return [
        *_judge_nixl(facts),
        _judge_ucx(facts, on_gpu),
        *_judge_modules(facts),
        *_judge_tls(facts, kind),
        *_judge_net_devices(facts),
        *_judge_rdma(facts),
    ]


def _judge_nixl(facts: TransportFacts) -> list[Finding]:
    version = dict(version=facts.nixl_version, plugins=list(facts.plugins))
    if not facts.nixl_version or not facts.backend_version:
        missing = "nixl" if not facts.nixl_version else facts.backend_package
        return [
            error(NIXL, f"{missing} is not installed", "KV travels by NIXL", f"pip install {missing}==1.5.1")
        ]
    if "UCX" not in facts.plugins:
        where = f"NIXL_PLUGIN_DIR={facts.plugin_dir}" if facts.plugin_dir else facts.backend_package
        todo = "unset NIXL_PLUGIN_DIR" if facts.plugin_dir else f"reinstall {facts.backend_package}"
        what = f"no UCX plugin in {where}"
        return [error(NIXL, what, "pdserve moves KV with NIXL's UCX backend", todo, **version)]
    if facts.nixl_version != facts.backend_version:
        what = f"nixl {facts.nixl_version} with {facts.backend_package} {facts.backend_version}"
        todo = f"pip install nixl=={facts.nixl_version} {facts.backend_package}=={facts.nixl_version}"
        return [warning(NIXL, what, "the two are built for each other", todo, **version)]
    others = [name for name in facts.plugins if name != "UCX"]
    text = f"{facts.backend_package} {facts.backend_version}, plugins UCX{', ' if others else ''}"
    return [ok(NIXL, text + ", ".join(others), **version)]


def _judge_ucx(facts: TransportFacts, on_gpu: bool) -> Finding:
    if facts.transports is None:
        return warning(
            UCX,
            f"UCX could not be asked for its transports: {facts.ucx_trouble}",
            "a driver may hang or crash it; the loopback transfer below is what counts",
            "run `python -m pdserve.doctor.ucx_child FOLDER` with the .libs folder of NIXL's package",
        )
    text, by_name = _described(facts.transports)
    values = dict(version=facts.ucx_version, transports=by_name)
    if not facts.names & BETWEEN_PROCESSES:
        return error(
            UCX,
            f"UCX {facts.ucx_version} has no way to another process here: {text or 'no transports'}",
            "prefill and decode are processes of their own",
            "allow shared memory (/dev/shm) or a network interface in this container",
            **values,
        )
    if on_gpu and not facts.names & {"cuda_copy", "cuda_ipc"}:
        return error(
            UCX,
            f"UCX {facts.ucx_version} sees no GPU memory (cuda_copy, cuda_ipc): {text}",
            "KV of GPU servers cannot be sent",
            "make libcuda.so.1 visible to this process and reinstall NIXL's CUDA package",
            **values,
        )
    if on_gpu and "cuda_ipc" not in facts.names:
        return warning(
            UCX,
            f"UCX {facts.ucx_version} without cuda_ipc: {text}",
            "KV between GPUs of this machine goes through host memory, many times slower",
            "share the PID and IPC namespaces of the servers' containers (--pid=host --ipc=host)",
            **values,
        )
    return ok(UCX, f"UCX {facts.ucx_version}: {text}", **values)


def _described(transports: tuple[tuple[str, str], ...]) -> tuple[str, dict[str, list[str]]]:
    """One line on the transports, and their devices by name."""
    by_name: dict[str, list[str]] = {}
    for name, device in transports:
        by_name.setdefault(name, []).append(device)
    parts = (
        name if devices == ["memory"] else f"{name} on {', '.join(devices)}"
        for name, devices in sorted(by_name.items())
    )
    return "; ".join(parts), by_name


def _judge_modules(facts: TransportFacts) -> list[Finding]:
    if not facts.module_dir:
        return []
    what = f"UCX_MODULE_DIR={facts.module_dir} holds no UCX modules"
    why = "CUDA and RDMA are modules of UCX: without them only shared memory and TCP are left"
    return [warning(MODULES, what, why, "unset UCX_MODULE_DIR: NIXL's package brings its own")]


def _judge_tls(facts: TransportFacts, kind: MemoryKind) -> list[Finding]:
    text = facts.ucx_tls.strip()
    if not text:
        return [ok(TLS, "not set: UCX chooses")]
    why = "a list copied from another machine leaves the first transfer hanging or failing without a name"
    if problem := transport_problem(text, kind):
        return [error(TLS, problem.partition(";")[0], why, "unset UCX_TLS, or add what is missing")]
    wanted, is_negative = asked_transports(text)
    if facts.transports is None or is_negative or "all" in wanted:
        return [
            note(TLS, f"UCX_TLS={text}", "it restricts what UCX may choose", "unset it unless you need it")
        ]
    here = wanted & facts.names & BETWEEN_PROCESSES
    if not here:
        have = ", ".join(sorted(facts.names & BETWEEN_PROCESSES))
        what = f"UCX_TLS={text}: this machine has none of these to reach another process (it has {have})"
        return [error(TLS, what, why, "unset UCX_TLS, or name a transport of this machine")]
    if here == {"tcp"} and facts.names & {"posix", "sysv", "cma", "rc_mlx5", "rc_verbs"}:
        what = f"UCX_TLS={text} leaves only tcp"
        why = "servers on one machine would move KV by sockets although shared memory or RDMA is there"
        return [warning(TLS, what, why, "unset UCX_TLS, or add sm (and rc on RDMA)")]
    return [note(TLS, f"UCX_TLS={text}", "it restricts what UCX may choose", "unset it unless you need it")]


def asked_transports(text: str) -> tuple[set[str], bool]:
    """The transports that UCX_TLS names, aliases spelled out; True if it is a list of what to leave out."""
    names = {name.strip().lstrip("^\\").partition(":")[0] for name in text.split(",") if name.strip()}
    wanted = set(names)
    for name in names:
        wanted |= _ALIASES.get(name, set())
    return wanted, text.strip().startswith("^")


def _judge_net_devices(facts: TransportFacts) -> list[Finding]:
    text = facts.ucx_net_devices.strip()
    if not text or text == "all" or text.startswith("^"):
        return [ok(NET, f"UCX_NET_DEVICES={text}" if text else "not set: UCX uses every network device")]
    devices = [name.strip() for name in text.split(",") if name.strip()]
    there = {*facts.networks, *(facts.rdma or {}), *(device for _, device in facts.transports or ())}
    missing = [name for name in devices if name not in there and name.partition(":")[0] not in there]
    if not missing:
        return [note(NET, f"UCX_NET_DEVICES={text}", "other devices are not used")]
    have = ", ".join(sorted({*(facts.rdma or {}), *facts.networks}))
    what = f"UCX_NET_DEVICES={text}: not on this machine: {', '.join(missing)} (it has {have})"
    why = "UCX leaves out what is not there; transfers fail or hang when nothing is left"
    todo = "unset UCX_NET_DEVICES or name devices of this machine"
    level = error if len(missing) == len(devices) else warning
    return [level(NET, what, why, todo)]


def _judge_rdma(facts: TransportFacts) -> list[Finding]:
    devices = facts.rdma or {}
    if not devices:
        return [ok(RDMA, "no RDMA device; shared memory on one machine, TCP between machines", devices=[])]
    down = [name for name, state in devices.items() if "ACTIVE" not in state]
    text = ", ".join(f"{name} ({state or 'no port'})" for name, state in sorted(devices.items()))
    if len(down) == len(devices):
        return [
            warning(
                RDMA,
                f"no RDMA port is active: {text}",
                "KV between machines falls back to TCP",
                "look at the cable and `ibstat`",
                devices=sorted(devices),
            )
        ]
    used = facts.names & {"rc_mlx5", "rc_verbs", "dc_mlx5", "ud_mlx5", "ud_verbs", "srd"}
    if facts.transports is not None and not used:
        return [
            warning(
                RDMA,
                f"{text}, but UCX cannot use it",
                "KV between machines falls back to TCP",
                "give the container /dev/infiniband (--device) and unlimited memlock (--ulimit memlock=-1)",
                devices=sorted(devices),
            )
        ]
    return [ok(RDMA, text, devices=sorted(devices))]


# -- a real transfer: bytes of one process written into another by NIXL -------------------------


def send_over_loopback(gpu: int = -1) -> ChildResult:
    """Run the transfer in a child process; ``gpu`` -1: host memory."""
    return run_module("pdserve.doctor.loopback_child", str(gpu), limit_s=LOOPBACK_S)


def judge_loopback(result: ChildResult, memory: str = "DRAM") -> list[Finding]:
    """``memory`` is DRAM or VRAM."""
    check = f"loopback {memory}"
    answer = result.json()
    if answer is None:
        return [
            error(
                check,
                f"KV cannot be sent between two processes here: {result.complaint(LOOPBACK_S)}",
                "every request of a P/D pair does exactly this",
                "see the findings on NIXL, UCX_TLS, UCX_NET_DEVICES and /dev/shm above; "
                "`python -m pdserve.doctor.loopback_child` shows the whole message",
            )
        ]
    if not answer["is_intact"]:
        return [
            error(
                check,
                "the bytes that arrived are not those that were sent",
                "answers would be wrong without any error",
                "do not serve on this machine; try UCX_TLS=tcp and report this",
            )
        ]
    rate = float(answer["bytes_per_s"])
    text = (
        f"{answer['nbytes'] / 2**20:.0f} MiB of KV in {answer['seconds'] * 1e3:.1f} ms, "
        f"{rate / 1e9:.2f} GB/s, bytes equal (fastest of {answer['sends']} sends)"
    )
    if rate < SLOW_BYTES_PER_S:
        return [
            warning(
                check,
                text,
                "slower than TCP over the loopback should be; every request waits for its KV",
                "look for UCX_TLS=tcp, a small /dev/shm, or a machine under load",
                **answer,
            )
        ]
    return [ok(check, text, **answer)]
