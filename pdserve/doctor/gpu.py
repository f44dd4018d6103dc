"""GPUs, driver, CUDA and nvcc, and whether they fit what was asked for."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from pdserve.cluster.gpus import choose_device, visible_gpus
from pdserve.doctor.children import ChildResult, run_child
from pdserve.doctor.finding import Finding, error, note, ok, warning
from pdserve.errors import ConfigError

SMI_S = 20.0
"""As cluster/gpus.py: nvidia-smi takes seconds when the driver is not loaded yet."""
SMI_QUERY = (
    "nvidia-smi",
    "--query-gpu=index,uuid,name,driver_version,memory.total,memory.free,compute_cap",
    "--format=csv,noheader,nounits",
)
DEVICE, DRIVER, NVCC, PEERMEM = "gpu", "driver", "nvcc", "gpu direct"
MIN_FREE = 0.7
"""Share of a GPU's memory that SGLang expects to be free for weights and KV pool."""


@dataclass(frozen=True, slots=True)
class Gpu:
    """One line of nvidia-smi. Memory in bytes."""

    index: int
    name: str
    total_bytes: int
    free_bytes: int
    compute_cap: str = ""


@dataclass(frozen=True, slots=True)
class GpuFacts:
    """``trouble`` is why nvidia-smi gives no list, empty if it does; ``usable`` are indices left by
    CUDA_VISIBLE_DEVICES. Versions are empty where there is none."""

    gpus: tuple[Gpu, ...] = ()
    usable: tuple[int, ...] = ()
    trouble: str = ""
    has_device_files: bool = False
    driver: str = ""
    driver_cuda: str = ""
    torch_cuda: str = ""
    nvcc: str = ""
    nvcc_version: str = ""
    has_kernels: bool = False
    """The installed package carries compiled kernels."""
    has_rdma: bool = False
    has_peermem: bool = False


def gather_gpu(environ: Mapping[str, str]) -> GpuFacts:
    """Ask nvidia-smi, nvcc and the files of torch; torch itself is not imported."""
    listing = run_child(SMI_QUERY, SMI_S)
    gpus, driver = parse_listing(listing.stdout) if listing.is_good else ((), "")
    banner = run_child(("nvidia-smi",), SMI_S).stdout if gpus else ""
    uuids = "\n".join(", ".join(line.split(", ")[:2]) for line in listing.stdout.splitlines())
    nvcc, nvcc_version = _nvcc()
    return GpuFacts(
        gpus=gpus,
        usable=tuple(visible_gpus(uuids, environ.get("CUDA_VISIBLE_DEVICES"))) if gpus else (),
        trouble="" if listing.is_good else _smi_trouble(listing),
        has_device_files=Path("/dev/nvidiactl").exists(),
        driver=driver,
        driver_cuda=_first(r"CUDA Version:\s*([\d.]+)", banner),
        torch_cuda=torch_cuda(),
        nvcc=nvcc,
        has_kernels=_has_kernels(),
        nvcc_version=nvcc_version,
        has_rdma=any(Path("/sys/class/infiniband").glob("*")),
        has_peermem=any(Path(f"/sys/module/{name}").exists() for name in ("nvidia_peermem", "nv_peer_mem")),
    )


def parse_listing(text: str) -> tuple[tuple[Gpu, ...], str]:
    """The GPUs and the driver version out of an answer to SMI_QUERY."""
    gpus, driver = [], ""
    for line in text.splitlines():
        columns = [column.strip() for column in line.split(",")]
        if len(columns) == 7 and columns[0].isdigit():
            total, free = (int(c) << 20 if c.isdigit() else 0 for c in columns[4:6])
            gpus.append(Gpu(int(columns[0]), columns[2], total, free, columns[6]))
            driver = columns[3]
    return tuple(gpus), driver


def torch_cuda() -> str:
    """CUDA release that torch was built for, out of its version.py; empty without one."""
    import importlib.util

    spec = importlib.util.find_spec("torch")
    for location in (spec.submodule_search_locations or ()) if spec else ():
        file = Path(location) / "version.py"
        if file.is_file():
            return _first(r"^cuda[^=]*=\s*'([\d.]+)'", file.read_text())
    return ""


def _smi_trouble(listing: ChildResult) -> str:
    if listing.is_missing:
        return "nvidia-smi is not there"
    words = (listing.stdout.strip() or listing.complaint(SMI_S)).splitlines()
    return f"nvidia-smi: {words[0]}" if words else "nvidia-smi failed"


def _has_kernels() -> bool:
    from pdserve.kv.kernels import PREBUILT

    return PREBUILT.is_file()


def _nvcc() -> tuple[str, str]:
    from pdserve.kv.kernels import find_nvcc

    try:
        path = find_nvcc()
    except ConfigError:
        return "", ""
    try:
        done = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return str(path), ""
    return str(path), _first(r"release ([\d.]+)", done.stdout)


def _first(pattern: str, text: str) -> str:
    found = re.search(pattern, text, re.MULTILINE)
    return found[1] if found else ""


def judge_gpu(facts: GpuFacts, device: str, num_servers: int, gpus_per_server: int = 1) -> list[Finding]:
    """``device`` is auto, cpu or cuda, as ``pdserve launch --device``."""
    try:
        chosen = choose_device(device, facts.usable)
    except ConfigError:
        return [_no_gpu(facts)]
    if chosen == "cpu":
        return [_on_cpu(facts, device)]
    findings = [_judge_count(facts, num_servers * gpus_per_server), _judge_driver(facts), _judge_nvcc(facts)]
    findings += _judge_memory(facts)
    if facts.has_rdma and not facts.has_peermem:
        findings.append(
            note(
                PEERMEM,
                "the kernel module nvidia_peermem is not loaded",
                "without it (or dmabuf) RDMA between machines copies KV through host memory",
                "modprobe nvidia_peermem, unless driver and kernel support dmabuf",
            )
        )
    return findings


def _no_gpu(facts: GpuFacts) -> Finding:
    if facts.gpus:
        what = f"no usable GPU: CUDA_VISIBLE_DEVICES hides all {len(facts.gpus)}"
        todo = "unset CUDA_VISIBLE_DEVICES or name GPUs that nvidia-smi lists"
    elif facts.has_device_files:
        what = f"no usable GPU, but /dev/nvidiactl exists: {facts.trouble or 'nvidia-smi lists none'}"
        todo = "repair the driver (dmesg), or restart the container with --gpus all"
    else:
        what = f"no GPU: {facts.trouble or 'nvidia-smi lists none'}"
        todo = "use --device cpu, or a machine with an NVIDIA GPU and its driver (container: --gpus all)"
    return error(DEVICE, what, "--device cuda asks for one per server", todo, gpus=0)


def _on_cpu(facts: GpuFacts, device: str) -> Finding:
    if device == "cpu" and facts.gpus:
        return note(DEVICE, f"{len(facts.gpus)} GPUs are left unused by --device cpu", gpus=len(facts.gpus))
    if facts.gpus or facts.has_device_files:
        return warning(
            DEVICE,
            f"no usable GPU, workers would run on CPU: {facts.trouble or 'CUDA_VISIBLE_DEVICES hides all'}",
            "this machine seems to have one; a CPU server is a hundred times slower",
            "repair the driver or CUDA_VISIBLE_DEVICES, or say --device cpu",
            gpus=len(facts.gpus),
        )
    return ok(DEVICE, "no GPU; workers run on CPU", gpus=0)


def _judge_count(facts: GpuFacts, needed: int) -> Finding:
    names = sorted({gpu.name for gpu in facts.gpus})
    text = f"{len(facts.usable)} usable GPU{'s' * (len(facts.usable) != 1)} ({', '.join(names)})"
    if len(facts.usable) < needed:
        return error(
            DEVICE,
            f"{text}, {needed} needed",
            "every server needs GPUs of its own",
            "lower -p or -d, or use --device cpu",
            gpus=len(facts.usable),
        )
    return ok(DEVICE, text, gpus=len(facts.usable))


def _judge_driver(facts: GpuFacts) -> Finding:
    values = dict(driver=facts.driver, driver_cuda=facts.driver_cuda, torch_cuda=facts.torch_cuda)
    if not facts.torch_cuda:
        return error(
            DRIVER,
            "torch is built without CUDA",
            "SGLang cannot use the GPU with it",
            "install the CUDA build of torch that sglang asks for",
            **values,
        )
    if _major(facts.driver_cuda) and _major(facts.driver_cuda) < _major(facts.torch_cuda):
        return error(
            DRIVER,
            f"driver {facts.driver} supports CUDA {facts.driver_cuda}, torch is built for {facts.torch_cuda}",
            "CUDA does not start with a driver older than its release",
            f"install a driver for CUDA {_major(facts.torch_cuda)} or newer",
            **values,
        )
    return ok(DRIVER, f"driver {facts.driver}, CUDA {facts.driver_cuda}; torch for CUDA {facts.torch_cuda}")


def _judge_nvcc(facts: GpuFacts) -> Finding:
    if not facts.nvcc and facts.has_kernels:
        return ok(NVCC, "not needed: this pdserve carries its KV kernels")
    if not facts.nvcc:
        return warning(
            NVCC,
            "no nvcc on PATH, in /usr/local/cuda or in this Python environment",
            "pdserve's KV kernels are compiled at first use; without them KV cannot be packed or converted",
            "pip install nvidia-cuda-nvcc, or put a CUDA toolkit on PATH",
        )
    return ok(NVCC, f"nvcc {facts.nvcc_version} at {facts.nvcc}", version=facts.nvcc_version)


def _judge_memory(facts: GpuFacts) -> list[Finding]:
    full = [gpu for gpu in facts.gpus if gpu.total_bytes and gpu.free_bytes < MIN_FREE * gpu.total_bytes]
    busy = [f"GPU {gpu.index}: {gpu.free_bytes >> 20} of {gpu.total_bytes >> 20} MiB free" for gpu in full]
    if not busy:
        return []
    return [
        warning(
            "gpu memory",
            "; ".join(busy),
            "SGLang sizes its KV pool from the GPU's whole memory and fails when others hold it",
            "end what holds it (nvidia-smi lists it), or lower --mem-fraction-static after --",
        )
    ]


def _major(version: str) -> int:
    head = version.partition(".")[0]
    return int(head) if head.isdigit() else 0
