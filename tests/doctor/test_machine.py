"""Judging a machine by made-up facts: what is wrong with it is named, what is fine is not."""

from __future__ import annotations

from dataclasses import replace

import pytest

from pdserve.doctor.children import ChildResult
from pdserve.doctor.finding import Finding, Level
from pdserve.doctor.gpu import Gpu, GpuFacts, judge_gpu, parse_listing
from pdserve.doctor.limits import UNLIMITED, LimitFacts, judge_limits
from pdserve.doctor.ports import PortFacts, judge_ports
from pdserve.doctor.software import SoftwareFacts, judge_deep, judge_software
from pdserve.doctor.surroundings import judge_environment
from pdserve.doctor.transport import TransportFacts, judge_loopback, judge_transport

GIB = 1 << 30
SOFTWARE = SoftwareFacts(
    python=(3, 11, 7),
    executable="/usr/bin/python3",
    pdserve_version="0.1.0",
    sglang_version="0.5.23",
    listed_version="0.5.23",
    sglang_folder="/site/sglang",
    missing_hooks=(),
    num_hooks=9,
    missing_entry_points=(),
)
H200 = Gpu(0, "NVIDIA H200", 140 * GIB, 139 * GIB, "9.0")
GPU = GpuFacts(
    gpus=(H200, replace(H200, index=1)),
    usable=(0, 1),
    has_device_files=True,
    driver="580.65",
    driver_cuda="13.0",
    torch_cuda="13.0",
    nvcc="/usr/local/cuda/bin/nvcc",
    nvcc_version="13.0",
)
TRANSPORT = TransportFacts(
    nixl_version="1.5.1",
    backend_package="nixl-cu13",
    backend_version="1.5.1",
    plugins=("POSIX", "UCX"),
    ucx_version="1.23.0",
    transports=(("cma", "memory"), ("posix", "memory"), ("self", "memory"), ("tcp", "eth0"), ("tcp", "lo")),
    rdma={},
    networks=("eth0", "lo"),
)
RDMA = replace(
    TRANSPORT,
    transports=(*(TRANSPORT.transports or ()), ("rc_mlx5", "mlx5_0:1")),
    rdma={"mlx5_0": "ACTIVE"},
)
LIMITS = LimitFacts(
    soft_files=65536,
    hard_files=65536,
    memlock=8 << 20,
    shm_total=16 * GIB,
    shm_free=16 * GIB,
    max_processes=90000,
    num_processes=500,
    memory_free=64 * GIB,
    cores=16,
    disks=(("/cache", 100 * GIB, True),),
    wall_s=1_800_000_000.0,
    drift_s=0.0,
)


def worst(findings: list[Finding]) -> Level:
    order = list(Level)
    return max((finding.level for finding in findings), key=order.index)


def the(findings: list[Finding], level: Level) -> Finding:
    """The only one of that level, with a reason and a remedy."""
    (found,) = [finding for finding in findings if finding.level is level]
    assert level is Level.OK or (found.why and found.what_to_do), found
    return found


# -- software ----------------------------------------------------------------------------------


def test_supported_software_is_fine() -> None:
    assert {finding.level for finding in judge_software(SOFTWARE)} == {Level.OK}


@pytest.mark.parametrize(
    ("change", "check", "words"),
    [
        ({"python": (3, 10, 2)}, "python", "3.10.2"),
        ({"python": (3, 14, 0)}, "python", "3.14.0"),
        ({"sglang_version": "0.5.9", "listed_version": "0.5.9"}, "sglang", "0.5.9"),
        ({"sglang_folder": "", "sglang_version": ""}, "sglang", "not installed"),
        ({"listed_version": "0.4.1"}, "sglang", "0.4.1"),
        ({"missing_hooks": ("sglang.srt.a.B",)}, "hook targets", "sglang.srt.a.B"),
        ({"missing_entry_points": ("sglang.srt.plugins",)}, "plugin", "sglang.srt.plugins"),
    ],
)
def test_software_that_does_not_fit_is_an_error(change: dict[str, object], check: str, words: str) -> None:
    found = the(judge_software(replace(SOFTWARE, **change)), Level.ERROR)  # type: ignore[arg-type]
    assert found.check == check
    assert words in found.what


def test_deep_tells_why_the_hooks_did_not_take() -> None:
    good = judge_deep(ChildResult(0, 'noise\n{"hooks": 7}\n'))
    bad = judge_deep(ChildResult(1, "", "Traceback\npdserve.errors.ProtocolMismatch: no such target\n"))
    assert good[0].level is Level.OK
    assert "7 hooks" in good[0].what
    assert "ProtocolMismatch: no such target" in the(bad, Level.ERROR).what


# -- GPU ---------------------------------------------------------------------------------------


def test_gpus_with_driver_and_compiler_are_fine() -> None:
    assert worst(judge_gpu(GPU, "cuda", 2)) is Level.OK


def test_cpu_machine_is_fine_unless_a_gpu_is_asked_for() -> None:
    bare = GpuFacts(trouble="nvidia-smi is not there")
    assert worst(judge_gpu(bare, "auto", 2)) is Level.OK
    found = the(judge_gpu(bare, "cuda", 2), Level.ERROR)
    assert "nvidia-smi is not there" in found.what
    assert "--device cpu" in found.what_to_do


@pytest.mark.parametrize(
    ("change", "servers", "level", "words"),
    [
        ({}, 3, Level.ERROR, "3 needed"),
        ({"driver_cuda": "12.4"}, 2, Level.ERROR, "supports CUDA 12.4"),
        ({"torch_cuda": ""}, 2, Level.ERROR, "without CUDA"),
        ({"nvcc": ""}, 2, Level.WARNING, "no nvcc"),
        ({"gpus": (H200, replace(H200, index=1, free_bytes=GIB))}, 2, Level.WARNING, "GPU 1: 1024 of"),
    ],
)
def test_gpu_trouble_is_named(change: dict[str, object], servers: int, level: Level, words: str) -> None:
    found = the(judge_gpu(replace(GPU, **change), "cuda", servers), level)  # type: ignore[arg-type]
    assert words in found.what


def test_hidden_and_broken_gpus_are_told_apart() -> None:
    hidden = judge_gpu(replace(GPU, usable=()), "cuda", 2)
    broken = judge_gpu(GpuFacts(trouble="nvidia-smi: Driver mismatch", has_device_files=True), "cuda", 2)
    on_auto = judge_gpu(GpuFacts(trouble="nvidia-smi: Driver mismatch", has_device_files=True), "auto", 2)
    assert "CUDA_VISIBLE_DEVICES" in the(hidden, Level.ERROR).what
    assert "Driver mismatch" in the(broken, Level.ERROR).what
    assert "Driver mismatch" in the(on_auto, Level.WARNING).what


def test_listing_of_nvidia_smi_is_read() -> None:
    gpus, driver = parse_listing("0, GPU-1, NVIDIA H200, 580.65, 143771, 143000, 9.0\njunk\n")
    assert driver == "580.65"
    assert gpus == (Gpu(0, "NVIDIA H200", 143771 << 20, 143000 << 20, "9.0"),)


# -- transport ---------------------------------------------------------------------------------


def test_transport_of_a_plain_machine_is_fine() -> None:
    assert worst(judge_transport(TRANSPORT, on_gpu=False)) is Level.OK
    assert worst(judge_transport(RDMA, on_gpu=False)) is Level.OK


@pytest.mark.parametrize(
    ("facts", "tls", "level", "words"),
    [
        (TRANSPORT, "rc_x", Level.ERROR, "this machine has none of these"),
        (TRANSPORT, "rc,ud", Level.ERROR, "cma, posix, tcp"),
        (TRANSPORT, "self", Level.ERROR, "leaves no transport"),
        (TRANSPORT, "cuda_copy,cuda_ipc", Level.ERROR, "leaves no transport"),
        (TRANSPORT, "^all", Level.ERROR, "leaves no transport"),
        (TRANSPORT, "tcp", Level.WARNING, "leaves only tcp"),
        (TRANSPORT, "sm,tcp", Level.NOTE, "UCX_TLS=sm,tcp"),
        (TRANSPORT, "^tcp", Level.NOTE, "UCX_TLS=^tcp"),
        (RDMA, "rc", Level.NOTE, "UCX_TLS=rc"),
        (replace(TRANSPORT, transports=None, ucx_trouble="x"), "rc", Level.NOTE, "UCX_TLS=rc"),
    ],
)
def test_pinned_transports_are_judged_by_what_the_machine_has(
    facts: TransportFacts, tls: str, level: Level, words: str
) -> None:
    findings = judge_transport(replace(facts, ucx_tls=tls), on_gpu=False)
    (found,) = [finding for finding in findings if finding.check == "UCX_TLS"]
    assert found.level is level
    assert words in found.what


def test_gpu_servers_need_transports_that_know_gpu_memory() -> None:
    blind = judge_transport(TRANSPORT, on_gpu=True)
    no_ipc = replace(TRANSPORT, transports=(*(TRANSPORT.transports or ()), ("cuda_copy", "cuda")))
    pinned = replace(no_ipc, ucx_tls="sm,tcp")
    assert "cuda_copy" in the(blind, Level.ERROR).what
    assert "cuda_ipc" in the(judge_transport(no_ipc, on_gpu=True), Level.WARNING).what
    assert "GPU memory" in the(judge_transport(pinned, on_gpu=True), Level.ERROR).what


@pytest.mark.parametrize(
    ("devices", "level"),
    [
        ("eth0", Level.NOTE),
        ("mlx5_0:1", Level.ERROR),
        ("mlx5_0:1,eth0", Level.WARNING),
        ("all", Level.OK),
        ("", Level.OK),
    ],
)
def test_network_devices_must_be_there(devices: str, level: Level) -> None:
    findings = judge_transport(replace(TRANSPORT, ucx_net_devices=devices), on_gpu=False)
    (found,) = [finding for finding in findings if finding.check == "UCX_NET_DEVICES"]
    assert found.level is level


@pytest.mark.parametrize(
    ("change", "level", "words"),
    [
        ({"nixl_version": ""}, Level.ERROR, "nixl is not installed"),
        ({"backend_version": ""}, Level.ERROR, "nixl-cu13 is not installed"),
        ({"plugins": ("POSIX",)}, Level.ERROR, "no UCX plugin"),
        ({"plugins": (), "plugin_dir": "/nowhere"}, Level.ERROR, "NIXL_PLUGIN_DIR=/nowhere"),
        ({"backend_version": "1.4.0"}, Level.WARNING, "1.4.0"),
        ({"transports": (("self", "memory"),)}, Level.ERROR, "no way to another process"),
        ({"transports": None, "ucx_trouble": "no end within 20 s"}, Level.WARNING, "no end within 20 s"),
        ({"module_dir": "/empty"}, Level.WARNING, "UCX_MODULE_DIR=/empty"),
        ({"rdma": {"mlx5_0": "DOWN"}}, Level.WARNING, "mlx5_0 (DOWN)"),
        ({"rdma": {"mlx5_0": "ACTIVE"}}, Level.WARNING, "UCX cannot use it"),
    ],
)
def test_transport_trouble_is_named(change: dict[str, object], level: Level, words: str) -> None:
    found = the(judge_transport(replace(TRANSPORT, **change), on_gpu=False), level)  # type: ignore[arg-type]
    assert words in found.what


def test_loopback_is_judged_by_bytes_and_rate() -> None:
    answer = '{"nbytes": 1000, "seconds": 0.1, "bytes_per_s": %s, "sends": 5, "is_intact": %s}'
    good = judge_loopback(ChildResult(0, answer % ("4e9", "true")))
    slow = judge_loopback(ChildResult(0, answer % ("1e7", "true")))
    wrong = judge_loopback(ChildResult(0, answer % ("4e9", "false")))
    hung = judge_loopback(ChildResult(None))
    refused = judge_loopback(
        ChildResult(
            1, "[1:0] ucp_context.c:1770 UCX  ERROR no usable transports/devices (asked rc)\nmore\n", "E: x"
        )
    )
    assert the(good, Level.OK).values["bytes_per_s"] == 4e9
    assert "0.01 GB/s" in the(slow, Level.WARNING).what
    assert "not those that were sent" in the(wrong, Level.ERROR).what
    assert "no end within" in the(hung, Level.ERROR).what
    assert "no usable transports/devices (asked rc)" in the(refused, Level.ERROR).what


# -- limits ------------------------------------------------------------------------------------


def limits(facts: LimitFacts, *, servers: int = 2, needed: int = GIB, rdma: bool = False) -> list[Finding]:
    return judge_limits(facts, num_servers=servers, needed_bytes=needed, on_gpu=False, has_rdma=rdma)


def test_a_roomy_machine_is_fine() -> None:
    assert {finding.level for finding in limits(LIMITS)} == {Level.OK}


@pytest.mark.parametrize(
    ("change", "check", "level"),
    [
        ({"soft_files": 256}, "open files", Level.ERROR),
        ({"soft_files": 2048}, "open files", Level.WARNING),
        ({"soft_files": UNLIMITED, "hard_files": UNLIMITED}, "open files", Level.OK),
        ({"shm_total": 64 << 20, "shm_free": 60 << 20}, "/dev/shm", Level.WARNING),
        ({"shm_free": 1 << 20}, "/dev/shm", Level.ERROR),
        ({"max_processes": 200}, "processes", Level.ERROR),
        ({"max_processes": UNLIMITED}, "processes", Level.OK),
        ({"memory_free": GIB - 1}, "memory", Level.ERROR),
        ({"memory_free": GIB + 1}, "memory", Level.WARNING),
        ({"cores": 1}, "cores", Level.NOTE),
        ({"disks": (("/cache", 100 * GIB, False),)}, "disk", Level.ERROR),
        ({"disks": (("/cache", 1000, True),)}, "disk", Level.WARNING),
        ({"wall_s": 0.0}, "clock", Level.WARNING),
        ({"drift_s": -30.0}, "clock", Level.WARNING),
    ],
)
def test_each_limit_is_judged(change: dict[str, object], check: str, level: Level) -> None:
    findings = limits(replace(LIMITS, **change))  # type: ignore[arg-type]
    (found,) = [finding for finding in findings if finding.check == check]
    assert found.level is level
    assert {f.level for f in findings if f.check != check} == {Level.OK}


def test_remedy_for_open_files_depends_on_the_hard_limit() -> None:
    may_raise = limits(replace(LIMITS, soft_files=256, hard_files=4096))
    may_not = limits(replace(LIMITS, soft_files=256, hard_files=256))
    assert the(may_raise, Level.ERROR).what_to_do == "ulimit -n 4096"
    assert "hard limit" in the(may_not, Level.ERROR).what_to_do


def test_locked_memory_matters_with_rdma_only() -> None:
    assert worst(limits(LIMITS)) is Level.OK
    assert the(limits(LIMITS, rdma=True), Level.WARNING).check == "memlock"
    assert worst(limits(replace(LIMITS, may_lock=True), rdma=True)) is Level.OK
    assert worst(limits(replace(LIMITS, memlock=UNLIMITED), rdma=True)) is Level.OK


def test_memory_is_not_judged_where_nothing_is_to_be_started() -> None:
    findings = limits(replace(LIMITS, memory_free=0, cores=1), servers=0, needed=0)
    assert worst(findings) is Level.OK


# -- ports -------------------------------------------------------------------------------------


def test_free_ports_are_fine() -> None:
    facts = PortFacts(30000, workers=(31000, 31001), bootstrap=2, ephemeral=(32768, 60999))
    assert worst(judge_ports(facts)) is Level.OK


def test_a_taken_port_names_its_owner_and_what_else_to_do() -> None:
    refusal = "port 30000 is in use by pid 7 (nginx); choose another with --port"
    other = judge_ports(PortFacts(30000, refusal, (7, "nginx"), (31000,), 2))
    ours = judge_ports(PortFacts(30000, refusal, (7, "python -m pdserve balance"), (31000,), 2))
    assert "pid 7 (nginx)" in the(other, Level.ERROR).what
    assert "--port" in the(other, Level.ERROR).what_to_do
    assert "pdserve doctor http://127.0.0.1:30000" in the(ours, Level.ERROR).what_to_do


def test_servers_that_run_already_are_noted() -> None:
    findings = judge_ports(PortFacts(30000, workers=(31000,), running=(7, 8)))
    assert "pid 7, 8" in next(finding.what for finding in findings if finding.level is Level.NOTE)


def test_ports_that_the_kernel_gives_away_are_noted() -> None:
    facts = PortFacts(40000, workers=(31000,), bootstrap=2, ephemeral=(32768, 60999))
    (found,) = [f for f in judge_ports(facts) if f.level is Level.NOTE]
    assert "40000" in found.what


# -- environment -------------------------------------------------------------------------------


def environment(values: dict[str, str], *, on_gpu: bool = False) -> list[Finding]:
    return judge_environment(values, on_gpu=on_gpu, num_servers=3, cores=6)


def test_an_empty_environment_is_fine() -> None:
    assert worst(environment({})) is Level.OK
    assert worst(environment({}, on_gpu=True)) is Level.OK


@pytest.mark.parametrize(
    ("values", "level", "words"),
    [
        ({"http_proxy": "http://user:secret@proxy:3128"}, Level.NOTE, "http_proxy=http://proxy:3128"),
        ({"HTTP_PROXY": "http://p", "no_proxy": "127.0.0.1"}, Level.NOTE, "HTTP_PROXY=http://p"),
        ({"PDSERVE_ACTIVE": "1", "PDSERVE_ROLE": "prefill"}, Level.WARNING, "PDSERVE_ACTIVE, PDSERVE_ROLE"),
        ({"PDSERVE_DATA_PLANE": "maybe"}, Level.ERROR, "PDSERVE_DATA_PLANE must be on or off"),
        ({"SGLANG_PLUGINS": "other"}, Level.ERROR, "SGLANG_PLUGINS=other"),
        ({"SGLANG_USE_HND_KVCACHE": "true"}, Level.ERROR, "SGLANG_USE_HND_KVCACHE"),
        ({"SGLANG_DISAGGREGATION_NIXL_BACKEND": "LIBFABRIC"}, Level.WARNING, "LIBFABRIC"),
        ({"SGLANG_TEST_DISAGG_FAILURE_PROB": "0.1"}, Level.WARNING, "0.1"),
        ({"OMP_NUM_THREADS": "6"}, Level.WARNING, "3 servers on 6 cores"),
        ({"OMP_NUM_THREADS": "many"}, Level.WARNING, "many"),
    ],
)
def test_bad_settings_are_named(values: dict[str, str], level: Level, words: str) -> None:
    found = the(environment(values), level)
    assert words in found.what
    assert "secret" not in found.what


@pytest.mark.parametrize(
    "values", [{"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments: True"}, {"CUDA_LAUNCH_BLOCKING": "1"}]
)
def test_settings_that_hurt_gpu_servers_are_named_on_gpus_only(values: dict[str, str]) -> None:
    (name,) = values
    assert name in the(environment(values, on_gpu=True), Level.WARNING).what
    assert worst(environment(values)) is Level.OK


@pytest.mark.parametrize(
    "values",
    [
        {"http_proxy": "http://p", "no_proxy": "127.0.0.1, localhost, ::1"},
        {"http_proxy": "http://p", "NO_PROXY": "*"},
        {"SGLANG_PLUGINS": "pdserve,other"},
        {"OMP_NUM_THREADS": "2"},
    ],
)
def test_good_settings_are_left_alone(values: dict[str, str]) -> None:
    assert worst(environment(values)) is Level.OK
