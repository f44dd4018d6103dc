"""The plan of a fleet: flags, environment, GPUs, refusals. No process is started."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Any

import pytest

from pdserve.cluster.gpus import choose_device, visible_gpus
from pdserve.cluster.machine import service_url
from pdserve.cluster.spec import ClusterSpec, ProcessKind, format_plan, plan_cluster
from pdserve.config.launch import LaunchConfig
from pdserve.errors import ConfigError
from pdserve.types import Role
from tests.support.rows import rows


class CountingPorts:
    """Every port is free."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, int]] = []

    def pick(self, host: str, first: int) -> int:
        self.asked.append((host, first))
        return first or 40000

    def claim(self, host: str, port: int, option: str) -> int:
        self.asked.append((host, port))
        return port or 8997


def plan(
    *, gpus: tuple[int, ...] = (), cores: int = 8, environ: dict[str, str] | None = None, **config: Any
) -> ClusterSpec:
    settings = LaunchConfig(**config)
    ports = CountingPorts()
    return plan_cluster(
        settings, model_path="org/m", gpus=gpus, cores=cores, ports=ports, environ=environ or {}
    )


def value_of(flags: tuple[str, ...], name: str) -> str:
    assert flags.count(name) == 1
    return flags[flags.index(name) + 1]


def test_one_prefill_two_decode_on_cpu() -> None:
    spec = plan(prefill=1, decode=2)
    assert [p.name for p in spec.processes] == ["bootstrap", "balancer", "prefill-0", "decode-0", "decode-1"]
    assert [p.kind for p in spec.processes[:3]] == [
        ProcessKind.BOOTSTRAP,
        ProcessKind.BALANCER,
        ProcessKind.WORKER,
    ]
    assert (spec.device, spec.can_fork) == ("cpu", True)
    assert (spec.balancer_url, spec.bootstrap_url) == ("http://127.0.0.1:30000", "http://127.0.0.1:8997")
    assert spec.balancer.argv[:4] == (sys.executable, "-m", "pdserve", "balance")
    assert value_of(spec.balancer.argv, "--bootstrap") == "127.0.0.1:8997"
    worker = spec.workers[1]
    assert worker.role is Role.DECODE
    assert worker.argv == (sys.executable, "-m", "pdserve.plugin.worker", *worker.flags)
    assert worker.ready_url == "http://127.0.0.1:31001/health"
    wanted = {
        "--model-path": "org/m",
        "--host": "127.0.0.1",
        "--port": "31001",
        "--device": "cpu",
        "--disaggregation-mode": "decode",
        "--disaggregation-transfer-backend": "nixl",
        "--tp-size": "1",
        "--attention-backend": "torch_native",
        "--page-size": "16",
        "--max-total-tokens": "65536",
    }
    assert {name: value_of(worker.flags, name) for name in wanted} == wanted
    assert {"--skip-server-warmup", "--disable-overlap-schedule", "--sleep-on-idle"} <= set(worker.flags)
    assert "--served-model-name" not in worker.flags


def test_worker_environment() -> None:
    env = plan(prefill=1, decode=2, cores=7).workers[0].env
    assert env == {
        "PDSERVE_ACTIVE": "1",
        "PDSERVE_ROLE": "prefill",
        "PDSERVE_WORKER_ID": "prefill-0",
        "PDSERVE_BOOTSTRAP_URL": "http://127.0.0.1:8997",
        "SGLANG_PLATFORM": "pdserve",
        "SGLANG_UNIFIED_RADIX_TREE_CORE_BACKEND": "python",
        "SGLANG_ENABLE_HEALTH_ENDPOINT_GENERATION": "0",
        "SGLANG_HOST_IP": "127.0.0.1",
        "TOKENIZERS_PARALLELISM": "false",
        "OMP_NUM_THREADS": "2",
        "MKL_NUM_THREADS": "2",
        "SGLANG_DISAGGREGATION_NIXL_BACKEND_PARAMS": '{"num_threads":"0"}',
    }


def test_tuning_variable_of_the_user_wins_but_not_ours() -> None:
    env = plan(environ={"OMP_NUM_THREADS": "5", "PDSERVE_ROLE": "decode"}).workers[0].env
    assert "OMP_NUM_THREADS" not in env
    core = plan(environ={"SGLANG_UNIFIED_RADIX_TREE_CORE_BACKEND": "rust"}).workers[0].env
    assert "SGLANG_UNIFIED_RADIX_TREE_CORE_BACKEND" not in core
    assert env["PDSERVE_ROLE"] == "prefill"


def test_model_folder_is_served_offline(tmp_path: Path) -> None:
    spec = plan_cluster(LaunchConfig(), model_path=str(tmp_path), gpus=(), cores=1, ports=CountingPorts())
    assert spec.workers[0].env["HF_HUB_OFFLINE"] == "1"


@rows("given", [("--page-size", "32"), ("--page-size=32",), ("--page_size", "32")])
def test_flag_of_the_user_replaces_the_default(given: tuple[str, ...]) -> None:
    flags = plan(sglang_args=given).workers[0].flags
    assert flags[-len(given) :] == given
    assert not {"16", "--page-size=16"} & set(flags)


@rows("given", [("--mem-fraction-static", "0.2"), ("--max-total-tokens=9",)])
def test_pool_size_is_left_to_the_user_who_sets_it(given: tuple[str, ...]) -> None:
    assert "65536" not in plan(sglang_args=given).workers[0].flags


def test_role_arguments_come_last_and_reach_their_role_only() -> None:
    args: dict[str, Any] = dict(sglang_args=("--log-level", "debug"), prefill_args=("--page-size", "64"))
    prefill, decode = plan(**args).workers
    assert prefill.flags[-4:] == ("--log-level", "debug", "--page-size", "64")
    assert value_of(decode.flags, "--page-size") == "16"


@rows(
    ("given", "instead"),
    [
        (("--port", "1"), "worker_base_port"),
        (("--host=0.0.0.0",), "--host"),
        (("--model-path", "x"), "MODEL"),
        (("--model=x",), "MODEL"),
        (("--device", "cpu"), "--device"),
        (("--disaggregation-mode", "prefill"), "--prefill"),
        (("--disaggregation-bootstrap-port", "1"), "--bootstrap-port"),
        (("--disaggregation-transfer-backend", "mooncake"), "nixl"),
        (("--disaggregation-transfer-backend=mooncake",), "nixl"),
        (("--tp-size", "2"), "--tp"),
        (("--tp=2",), "--tp"),
        (("--tensor_parallel_size", "2"), "--tp"),
    ],
)
@rows("field", ["sglang_args", "decode_args"])
def test_flag_that_pdserve_owns_is_refused(field: str, given: tuple[str, ...], instead: str) -> None:
    with pytest.raises(ConfigError) as caught:
        plan(**dict[str, Any]({field: given}))
    message = str(caught.value)
    assert given[0].partition("=")[0].replace("_", "-") in message
    assert instead in message


@rows("given", ["--por", "--disaggregation-mod", "--tensor-parallel"])
def test_abbreviation_of_an_owned_flag_is_refused(given: str) -> None:
    with pytest.raises(ConfigError, match=f"{given}.* is set by pdserve"):
        plan(sglang_args=(given, "1"))


def test_requests_that_a_cpu_decode_server_sets_aside_are_kept_in_tensors() -> None:
    flag = "--disaggregation-decode-retraction-backup"
    prefill, decode = plan().workers
    assert value_of(decode.flags, flag) == "cpu_tensor"
    assert flag not in prefill.flags
    assert value_of(plan(decode_args=(flag, "none")).workers[1].flags, flag) == "none"
    assert flag not in plan(gpus=(0, 1)).workers[1].flags, "SGLang's pool on the host works on GPUs"


@rows(
    "given",
    [
        ("--disaggregation-decode-retraction-backup", "host_pool"),
        ("--disaggregation-decode-retraction-backup=host_pool",),
        ("--enable-hierarchical-cache",),
        ("--disaggregation-decode-enable-offload-kvcache",),
    ],
)
def test_copies_to_the_host_that_need_a_gpu_are_refused_on_a_cpu(given: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError, match=f"{given[0].partition('=')[0]} cannot be used on a CPU"):
        plan(decode_args=given)
    assert given[-1] in plan(gpus=(0, 1), decode_args=given).workers[1].flags


def test_nixl_backend_may_be_named() -> None:
    flags = plan(sglang_args=("--disaggregation-transfer-backend=nixl",)).workers[0].flags
    assert sum("transfer-backend" in flag for flag in flags) == 1


def test_decode_servers_that_may_prefill_are_told_so_and_the_balancer_that_it_may_ask() -> None:
    off, auto = plan(deflect="off"), plan(deflect="auto")
    for spec, is_on in ((off, False), (auto, True)):
        prefill, decode = spec.workers
        assert ("--enable-mixed-chunk" in decode.flags) is is_on
        assert (decode.env.get("PDSERVE_LOCAL_PREFILL") == "1") is is_on
        assert ("--deflect" in spec.balancer.argv) is is_on
        assert "--enable-mixed-chunk" not in prefill.flags
        assert "PDSERVE_LOCAL_PREFILL" not in prefill.env


def test_gpus_are_dealt_out_consecutively() -> None:
    spec = plan(gpus=(1, 2, 5, 7), tp=2)
    assert [worker.gpus for worker in spec.workers] == [(1, 2), (5, 7)]
    assert spec.workers[1].env["CUDA_VISIBLE_DEVICES"] == "5,7"
    assert "OMP_NUM_THREADS" not in spec.workers[0].env
    assert not {"--device", "--attention-backend", "--max-total-tokens"} & set(spec.workers[0].flags)
    assert (spec.device, spec.can_fork) == ("cuda", False)


def test_too_few_gpus_says_how_many_and_offers_cpu() -> None:
    with pytest.raises(ConfigError, match=r"need 6 GPUs, found 4.*--device cpu"):
        plan(gpus=(0, 1, 2, 3), prefill=1, decode=2, tp=2)


def test_cpu_can_be_asked_for_on_a_gpu_machine() -> None:
    spec = plan(gpus=(0,), device="cpu", start_method="spawn")
    assert (spec.device, spec.can_fork, spec.workers[0].gpus) == ("cpu", False, ())


def test_fork_with_cuda_is_refused() -> None:
    with pytest.raises(ConfigError, match="fork works on CPU only"):
        plan(gpus=(0, 1), start_method="fork")


def test_wildcard_host_exposes_only_the_balancer() -> None:
    spec = plan(host="0.0.0.0")
    assert value_of(spec.balancer.argv, "--host") == "0.0.0.0"
    assert spec.balancer_url == "http://127.0.0.1:30000"
    assert {value_of(p.argv, "--host") for p in (spec.bootstrap, *spec.workers)} == {"127.0.0.1"}


def test_served_name_and_config_file_are_passed_on() -> None:
    spec = plan(served_model_name="mine", config_file="f.toml")
    assert value_of(spec.workers[0].flags, "--served-model-name") == "mine"
    assert value_of(spec.balancer.argv, "--config") == value_of(spec.bootstrap.argv, "--config") == "f.toml"


def test_printed_plan_can_be_pasted() -> None:
    spec = plan(prefill=1, decode=2)
    lines = format_plan(spec).splitlines()
    commands = [line for line in lines if line and not line.startswith("#")]
    for process, command in zip(spec.processes, commands, strict=True):
        words = shlex.split(command)
        env = dict(word.split("=", 1) for word in words[: len(process.env)])
        assert env == dict(process.env)
        assert tuple(words[len(process.env) :]) == process.argv
        assert any(line.startswith(f"# {process.name}") and process.ready_url in line for line in lines)


def test_visible_gpus_follow_cuda_visible_devices() -> None:
    listing = "0, GPU-aaa1\n1, GPU-bbb2\n2, GPU-bbb3\n"
    assert visible_gpus(listing, None) == [0, 1, 2]
    assert visible_gpus(listing, "2,0") == [2, 0]
    assert visible_gpus(listing, "GPU-aaa,GPU-bbb3") == [0, 2]
    assert visible_gpus(listing, "1,-1,0") == [1]
    assert visible_gpus(listing, "") == []


def test_choose_device() -> None:
    assert (choose_device("auto", []), choose_device("auto", [0])) == ("cpu", "cuda")
    assert choose_device("cpu", [0]) == "cpu"
    with pytest.raises(ConfigError, match="--device cpu"):
        choose_device("cuda", [])


def test_service_url() -> None:
    assert service_url("h:1", "--join") == service_url("http://h:1/", "--join") == "http://h:1"
    assert service_url("[::1]:8997", "--join") == "http://[::1]:8997"
    for bad in ("h", "h:x", "https://h:1", "h:1/path", ":1", ""):
        with pytest.raises(ConfigError, match="--join must be HOST:PORT"):
            service_url(bad, "--join")
