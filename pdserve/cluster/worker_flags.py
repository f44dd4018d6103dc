"""The SGLang flags and the environment of one worker: pdserve's defaults around what the user asked for.

A default is left out if the user passes that flag. A flag that would break the
fleet is refused; the error names the pdserve option to use instead.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

from pdserve.config.worker_env import past_proxies
from pdserve.errors import ConfigError
from pdserve.types import Role

CPU_MAX_TOTAL_TOKENS = 65536
"""KV pool of a CPU server, in tokens: SGLang would size it from all free memory, once per server."""

TRANSFER_BACKEND = "nixl"
WILDCARD_HOSTS = ("0.0.0.0", "::", "")

_OWNED_FLAGS = {
    "--port": "the port is chosen by pdserve; `worker_base_port` in the config file is the first one tried",
    "--host": "use pdserve's own --host, before the `--`",
    "--model-path": "name the model as MODEL",
    "--model": "name the model as MODEL",
    "--device": "use pdserve's own --device, before the `--`",
    "--disaggregation-mode": "use -p/--prefill and -d/--decode, or `pdserve prefill` and `pdserve decode`",
    "--disaggregation-bootstrap-port": "the bootstrap service gives every prefill server its port; "
    "its own is pdserve's --bootstrap-port",
    "--tp": "use pdserve's own --tp, before the `--`",
    "--tp-size": "use pdserve's own --tp, before the `--`",
    "--tensor-parallel-size": "use pdserve's own --tp, before the `--`",
}
_BACKEND_FLAG = "--disaggregation-transfer-backend"
_BACKUP_FLAG = "--disaggregation-decode-retraction-backup"
_HOST_POOLS = ("--enable-hierarchical-cache", "--disaggregation-decode-enable-offload-kvcache")
_POOL_FLAGS = ("--mem-fraction-static", "--max-total-tokens")


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerPlan:
    """One SGLang server that is to be started. ``device`` is "cpu" or "cuda"."""

    role: Role
    name: str
    model_path: str
    host: str
    port: int
    device: str
    bootstrap_url: str
    tp: int = 1
    gpus: tuple[int, ...] = ()
    threads: int = 1
    """OpenMP threads of a CPU server."""
    args: tuple[str, ...] = ()
    """The user's SGLang flags."""
    environ: Mapping[str, str] = field(default_factory=dict)
    """What the process inherits: a tuning variable set there wins."""
    served_model_name: str = ""
    fork_children: bool = True
    data_plane: Mapping[str, str] = field(default_factory=dict)
    prefills_locally: bool = False
    """A decode server computes prompts itself where the balancer asks for it."""


def worker_flags(plan: WorkerPlan) -> tuple[str, ...]:
    """Every SGLang flag of one worker; the user's come last.

    Raises:
        ConfigError: if ``plan.args`` hold a flag that pdserve sets itself.
    """
    check_user_flags(plan.args)
    if plan.device == "cpu":
        _check_host_pools(plan.args)
    given = {flag_name(arg) for arg in plan.args if arg.startswith("--")}
    fixed = ["--model-path", plan.model_path, "--host", plan.host, "--port", str(plan.port)]
    if plan.device == "cpu":
        fixed += ["--device", "cpu"]
    fixed += ["--disaggregation-mode", plan.role.value, "--tp-size", str(plan.tp)]
    for flag, value in _defaults(plan, given):
        if flag not in given:
            fixed += [flag, value] if value else [flag]
    return (*fixed, *plan.args)


def worker_environment(plan: WorkerPlan) -> dict[str, str]:
    """What a worker needs on top of ``plan.environ``; tuning variables that are set there win."""
    env = {
        "PDSERVE_ACTIVE": "1",
        "PDSERVE_ROLE": plan.role.value,
        "PDSERVE_WORKER_ID": plan.name,
        "PDSERVE_BOOTSTRAP_URL": plan.bootstrap_url,
        "SGLANG_PLATFORM": "pdserve",
        "SGLANG_ENABLE_HEALTH_ENDPOINT_GENERATION": "0",
    }
    if plan.gpus:
        env["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, plan.gpus))
        # nvidia-smi, which found them, numbers by bus; CUDA by default the fastest first.
        env["CUDA_DEVICE_ORDER"] = "PCI_BUS_ID"
    tuning = {"TOKENIZERS_PARALLELISM": "false", "SGLANG_UNIFIED_RADIX_TREE_CORE_BACKEND": "python"}
    if plan.host not in WILDCARD_HOSTS:
        tuning["SGLANG_HOST_IP"] = plan.host
    if Path(plan.model_path).is_dir():
        tuning["HF_HUB_OFFLINE"] = "1"
    if plan.device == "cpu":
        tuning["OMP_NUM_THREADS"] = tuning["MKL_NUM_THREADS"] = str(plan.threads)
        if plan.tp > 1:
            # SGLang wants a NUMA node per rank unless told which cores each may use: all of them.
            cores = ",".join(str(core) for core in sorted(os.sched_getaffinity(0)))
            tuning["SGLANG_CPU_OMP_THREADS_BIND"] = "|".join([cores] * plan.tp)
        # SGLang has NIXL start 8 posting threads per prefill server; on host memory they only take cores.
        tuning["SGLANG_DISAGGREGATION_NIXL_BACKEND_PARAMS"] = '{"num_threads":"0"}'
    env |= {key: value for key, value in tuning.items() if key not in plan.environ}
    env |= past_proxies((plan.host, urlsplit(plan.bootstrap_url).hostname or ""), plan.environ)
    if not plan.fork_children:
        env["PDSERVE_FORK_CHILDREN"] = "0"
    if plan.role is Role.DECODE and plan.prefills_locally:
        env["PDSERVE_LOCAL_PREFILL"] = "1"
    return {**env, **plan.data_plane}


def check_user_flags(args: Sequence[str]) -> None:
    """Raise ConfigError for a flag that pdserve sets itself, naming what to use instead."""
    for index, arg in enumerate(args):
        name = flag_name(arg)
        if owned := _owned_flag(name):
            raise ConfigError(f"SGLang's {owned} is set by pdserve: {_OWNED_FLAGS[owned]}")
        if name != _BACKEND_FLAG:
            continue
        value = _value_of(args, index)
        if value != TRANSFER_BACKEND:
            raise ConfigError(
                f"SGLang's {name} {value} cannot be used: pdserve moves KV with {TRANSFER_BACKEND}; "
                "leave the flag out"
            )


def _check_host_pools(args: Sequence[str]) -> None:
    """Refuse what SGLang copies to the host with functions that it has on GPUs only: a server would die."""
    for index, arg in enumerate(args):
        name, value = flag_name(arg), _value_of(args, index)
        if name in _HOST_POOLS or (name == _BACKUP_FLAG and value == "host_pool"):
            raise ConfigError(
                f"SGLang's {name} cannot be used on a CPU: SGLang has no function there that copies KV to "
                "the host; leave the flag out"
            )


def flag_value(flags: Sequence[str], name: str) -> str:
    """The last value that ``flags`` give ``name``; empty if they do not name it."""
    values = [_value_of(flags, index) for index, flag in enumerate(flags) if flag_name(flag) == name]
    return values[-1] if values else ""


def _value_of(args: Sequence[str], index: int) -> str:
    rest = args[index + 1] if index + 1 < len(args) else ""
    return args[index].partition("=")[2] if "=" in args[index] else rest


def _owned_flag(name: str) -> str | None:
    """The flag of ours that ``name`` is, or abbreviates: SGLang's argparse takes ``--por`` for ``--port``."""
    if name in _OWNED_FLAGS:
        return name
    if not name.startswith("--") or name == "--":
        return None
    return next((owned for owned in _OWNED_FLAGS if owned.startswith(name)), None)


def flag_name(arg: str) -> str:
    """``--page-size=32`` and ``--page-size`` → ``--page-size``; underscores count as dashes."""
    name = arg.partition("=")[0]
    return name.replace("_", "-") if name.startswith("--") else name


def _defaults(plan: WorkerPlan, given: set[str]) -> list[tuple[str, str]]:
    defaults = [(_BACKEND_FLAG, TRANSFER_BACKEND), ("--skip-server-warmup", "")]
    if plan.role is Role.DECODE and plan.prefills_locally:
        defaults.append(("--enable-mixed-chunk", ""))
    if plan.served_model_name:
        defaults.append(("--served-model-name", plan.served_model_name))
    if plan.device == "cpu":
        if plan.role is Role.DECODE:
            # KV of requests that are set aside. SGLang's own default copies it into a pool on the host
            # with a function that exists on GPUs only; here it is on the host already.
            defaults.append((_BACKUP_FLAG, "cpu_tensor"))
        defaults += [
            ("--attention-backend", "torch_native"),
            ("--disable-overlap-schedule", ""),
            ("--sleep-on-idle", ""),
            ("--page-size", "16"),
        ]
        if not given.intersection(_POOL_FLAGS):
            defaults.append(("--max-total-tokens", str(CPU_MAX_TOTAL_TOKENS)))
    return defaults
