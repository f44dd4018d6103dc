"""``pdserve doctor`` as a command: a sound machine and fleet, and eight broken set-ups that it must name."""

from __future__ import annotations

import os
import resource
import shutil
import socket
from pathlib import Path

import pytest

from pdserve.doctor.transport import judge_loopback, send_over_loopback
from pdserve.model.tiny import write_tiny_model
from tests.doctor.test_fleet import fleet_with_page_sizes
from tests.support.balancer_client import running_site
from tests.support.doctor_command import DoctorRun, doctor
from tests.support.sglang_server import until

pytestmark = pytest.mark.slow

CPU = ("--device", "cpu")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_tiny_model(tmp_path_factory.mktemp("tiny")))


@pytest.fixture
def port() -> str:
    """Free a moment ago, outside of the kernel's own range."""
    for candidate in range(21_000 + os.getpid() % 1000, 30_000):
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", candidate))
            except OSError:
                continue
            return str(candidate)
    raise AssertionError("no free port")


def errors(run: DoctorRun) -> set[str]:
    """Checks with an error; each of them gives a reason and a remedy."""
    found = run.findings("error")
    assert all(each["why"] and each["what_to_do"] for each in found), found
    return {each["check"] for each in found}


# -- sound -------------------------------------------------------------------------------------


async def test_a_healthy_machine_passes(model: str, port: str) -> None:
    run = await doctor("--json", "--model", model, "--port", port, *CPU)
    assert run.code == 0, run.out
    assert run.report["ok"] is True
    assert run.report["counts"]["error"] == 0
    checks = {each["check"] for each in run.findings("ok", "note", "warning")}
    assert checks >= {
        "python", "sglang", "hook targets", "plugin", "gpu", "open files", "memlock", "/dev/shm", "memory",
        "disk", "clock", "port", "weights", "config.json", "nixl", "ucx", "UCX_TLS", "loopback DRAM",
    }  # fmt: skip
    loopback = run.finding("loopback DRAM", "ok", "warning")["values"]
    assert loopback["bytes_per_s"] > 0
    assert loopback["is_intact"] is True


async def test_a_healthy_fleet_passes_in_words() -> None:
    async with running_site(prefill=1, decode=2) as site:
        url = site.balancer.url
        run = await doctor(url)
    assert run.code == 0, run.out
    assert f"Fleet at {url}" in run.out
    assert "came through 2 of 2 pairs" in run.out
    assert "\n0 errors, " in run.out


def test_loopback_moves_real_bytes() -> None:
    (found,) = judge_loopback(send_over_loopback())
    assert found.values["bytes_per_s"] > 0  # type: ignore[operator]
    assert found.values["nbytes"] == 16 << 20


# -- eight broken set-ups ----------------------------------------------------------------------


async def test_wrong_ucx_tls_is_named(model: str, port: str) -> None:
    args = ("--model", model, "--port", port, *CPU)
    run = await doctor("--json", *args, env={"UCX_TLS": "rc_x,cuda_copy"})
    text = await doctor(*args, env={"UCX_TLS": "rc_x,cuda_copy"})
    assert (run.code, text.code) == (1, 1)
    assert errors(run) == {"UCX_TLS", "loopback DRAM"}
    assert "UCX_TLS=rc_x,cuda_copy" in run.finding("UCX_TLS", "error")["what"]
    assert "no usable transports" in run.finding("loopback DRAM", "error")["what"]
    assert "ERROR    UCX_TLS " in text.out
    assert "unset UCX_TLS" in text.out
    assert "to repair: UCX_TLS, loopback DRAM" in text.out


async def test_a_port_in_use_is_named(model: str) -> None:
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        taken = str(holder.getsockname()[1])
        run = await doctor("--json", "--model", model, "--port", taken, *CPU)
    assert run.code == 1
    assert errors(run) == {"port"}
    found = run.finding("port", "error")
    assert f"port {taken} is in use by pid {os.getpid()}" in found["what"]
    assert found["values"]["owner_pid"] == os.getpid()


async def test_a_missing_model_is_named(tmp_path: Path, port: str) -> None:
    gone = str(tmp_path / "no" / "such" / "model")
    run = await doctor("--json", "--model", gone, "--port", port, *CPU)
    assert run.code == 1
    assert errors(run) == {"model"}
    assert gone in run.finding("model", "error")["what"]


async def test_a_low_limit_of_open_files_is_named(model: str, port: str) -> None:
    lower = lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))  # noqa: E731
    run = await doctor("--json", "--model", model, "--port", port, *CPU, before=lower)
    assert run.code == 1
    assert errors(run) == {"open files"}
    assert "256 open files" in run.finding("open files", "error")["what"]


async def test_page_sizes_that_do_not_fit_are_named() -> None:
    async with fleet_with_page_sizes(16, 32) as balancer:
        run = await doctor(balancer.url, "--json")
    assert run.code == 1
    assert errors(run) == {"KV layouts"}
    assert "page_size: 16 != 32" in run.finding("KV layouts", "error")["what"]
    assert "--page-size" in run.finding("KV layouts", "error")["what_to_do"]
    assert "prefill-0>decode-0" in run.finding("KV layouts", "error")["what"]


async def test_a_dead_worker_is_named() -> None:
    async with running_site(prefill=1, decode=2, load_poll_s=0.05) as site:
        site.decodes[1].kill()
        await until(lambda: site.state("decode-1") == "suspect", "a suspect")
        run = await doctor(site.balancer.url, "--json")
    assert run.code == 1
    assert errors(run) == {"decode-1"}
    found = run.finding("decode-1", "error")
    assert "suspect" in found["what"]
    assert site.decodes[1].url in found["why"]


async def test_a_wrong_sglang_is_named(tmp_path: Path, model: str, port: str) -> None:
    """Another release found first on the path, as an old environment or PYTHONPATH brings it."""
    package, listing = tmp_path / "sglang", tmp_path / "sglang-0.4.6.dist-info"
    package.mkdir()
    listing.mkdir()
    (package / "__init__.py").write_text("")
    (package / "_version.py").write_text('__version__ = version = "0.4.6"\n')
    (listing / "METADATA").write_text("Metadata-Version: 2.1\nName: sglang\nVersion: 0.4.6\n")
    run = await doctor("--json", "--model", model, "--port", port, *CPU, env={"PYTHONPATH": str(tmp_path)})
    assert run.code == 1
    assert errors(run) == {"sglang", "hook targets"}
    found = run.finding("sglang", "error")
    assert "SGLang 0.4.6" in found["what"]
    assert "sglang==0.5.23" in found["what_to_do"]


@pytest.mark.skipif(shutil.which("nvidia-smi") is not None, reason="this machine may have a GPU")
async def test_no_gpu_when_asked_for_one_is_named(model: str, port: str) -> None:
    run = await doctor("--json", "--model", model, "--port", port, "--device", "cuda")
    assert run.code == 1
    assert errors(run) == {"gpu"}
    assert "no GPU" in run.finding("gpu", "error")["what"]
    assert "--device cpu" in run.finding("gpu", "error")["what_to_do"]


# -- more --------------------------------------------------------------------------------------


async def test_no_balancer_at_the_address_is_named(port: str) -> None:
    run = await doctor(f"127.0.0.1:{port}", "--json")
    assert run.code == 1
    assert errors(run) == {"balancer"}


async def test_a_wrong_argument_is_a_users_mistake() -> None:
    run = await doctor("ftp://nowhere")
    assert run.code == 2
    assert "no address of a balancer" in run.err
