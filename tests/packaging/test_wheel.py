"""The wheel, installed with its core dependencies into an empty environment, serves without an engine."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from pdserve import __version__
from pdserve.errors import ConfigError
from pdserve.kv.kernels import find_nvcc
from pdserve.types import Role
from tests.support.sglang_server import FakeSGLang

pytestmark = pytest.mark.process
ROOT = Path(__file__).parents[2]
SOURCES = ("pdserve", "cuda", "pyproject.toml", "setup.py", "README.md", "LICENSE")
ENGINE = ("torch", "sglang", "nixl", "flashinfer", "numpy", "matplotlib", "openai", "opentelemetry")
CORE_COMMANDS = ("balance", "bootstrap", "monitor", "bench", "simulate", "chat", "doctor")
MAX_MB = 100


@dataclass(frozen=True)
class Installed:
    """The wheel and the environment that it is the only thing in."""

    wheel: Path
    bin: Path

    @property
    def environ(self) -> dict[str, str]:
        kept = {
            name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "PDSERVE"))
        }
        return kept | {"NO_PROXY": "*", "COLUMNS": "120"}

    def run(self, *args: str) -> subprocess.CompletedProcess[str]:
        """``pdserve ARGS`` there."""
        return subprocess.run(
            [self.bin / "pdserve", *args],
            capture_output=True,
            text=True,
            env=self.environ,
            timeout=120,
            cwd=self.bin,
        )

    @asynccontextmanager
    async def serving(self, *args: str) -> AsyncIterator[str]:
        """``pdserve ARGS``, balance or bootstrap, on a free port until the block ends; its URL."""
        process = await asyncio.create_subprocess_exec(
            *(self.bin / "pdserve", *args, "--host", "127.0.0.1", "--port", "0"),
            stderr=asyncio.subprocess.PIPE,
            env=self.environ,
            cwd=self.bin,
        )
        assert process.stderr is not None
        try:
            said = b""
            async with asyncio.timeout(60):
                while b"listening on" not in said:
                    said = await process.stderr.readline()
                    assert said, "it ended"
            yield said.decode().split(" on ")[1].split()[0]
        finally:
            if process.returncode is None:
                process.send_signal(signal.SIGINT)  # SIGTERM would wait for load balancers
            await process.communicate()


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Installed:
    """Build the wheel from a copy of the sources and install it; print seconds and size."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    for name in SOURCES:
        if (ROOT / name).is_dir():
            skip = shutil.ignore_patterns("__pycache__")
            shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=skip)
        else:
            shutil.copy(ROOT / name, source / name)
    uv = shutil.which("uv", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    assert uv, "the wheel's test needs uv, which make setup installs"
    started = time.monotonic()
    _uv(uv, "build", "--wheel", "--out-dir", str(folder), str(source))
    (wheel,) = folder.glob("*.whl")
    built = time.monotonic()
    _uv(uv, "venv", "--python", sys.executable, str(folder / "venv"))
    python = folder / "venv" / "bin" / "python"
    _uv(
        uv,
        "pip",
        "install",
        "--python",
        str(python),
        "--constraint",
        str(ROOT / "constraints.txt"),
        str(wheel),
    )
    files = [path for path in (folder / "venv").rglob("*") if path.is_file() and not path.is_symlink()]
    megabytes = sum(path.stat().st_size for path in files) / 1e6
    print(
        f"\nwheel {wheel.stat().st_size / 1e3:.0f} kB, built in {built - started:.1f} s; "
        f"core environment {megabytes:.0f} MB, installed in {time.monotonic() - built:.1f} s"
    )
    assert megabytes < MAX_MB
    return Installed(wheel, python.parent)


def _uv(uv: str, *args: str) -> None:
    done = subprocess.run([uv, *args], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_wheel_carries_the_package_the_cuda_sources_and_the_licence(installed: Installed) -> None:
    names = set(zipfile.ZipFile(installed.wheel).namelist())
    package = {str(path.relative_to(ROOT)) for path in (ROOT / "pdserve").rglob("*.py")}
    sources = (ROOT / "cuda").rglob("*.cu*")
    cuda = {f"pdserve/kv/cuda/{path.relative_to(ROOT / 'cuda')}" for path in sources}
    cuda = {name for name in cuda if "/dev/" not in name}
    assert cuda
    assert not (package | cuda | {f"pdserve-{__version__}.dist-info/licenses/LICENSE"}) - names
    assert not [name for name in names if name.startswith(("tests", "bench"))]
    try:
        has_nvcc = find_nvcc().is_file()
    except ConfigError:
        has_nvcc = False
    assert ("pdserve/kv/prebuilt/libpdserve_kv.so" in names) is has_nvcc
    assert installed.wheel.name.endswith("-py3-none-any.whl") is not has_nvcc


def test_core_commands_start_without_an_engine(installed: Installed) -> None:
    code = f"from importlib.util import find_spec; print([n for n in {ENGINE} if find_spec(n)])"
    present = subprocess.run([installed.bin / "python", "-c", code], capture_output=True, text=True, cwd="/")
    assert present.stdout.strip() == "[]"
    assert installed.run("version").stdout == f"pdserve {__version__}\n"
    listed = installed.run("--help")
    assert listed.returncode == 0
    for command in CORE_COMMANDS:
        assert f" {command} " in listed.stdout
    assert installed.run("bootstrap", "--help").returncode == 0
    for args in (["launch"], ["prefill", "--join", "h:1"], ["decode", "--join", "h:1"], ["calibrate"]):
        done = installed.run(*args)
        extra = "plot" if args == ["calibrate"] else "engine"
        assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
        assert done.stderr.endswith(f"pip install 'pdserve[{extra}]'\n")


def test_doctor_and_simulate_work_on_the_core_alone(installed: Installed, tmp_path: Path) -> None:
    done = installed.run("doctor", "--json", "--device", "cpu", "--port", "0")
    assert done.returncode in (0, 1), done.stderr
    findings: Any = json.loads(done.stdout)
    assert "not installed" in json.dumps(findings)
    trace = tmp_path / "trace.jsonl"
    rows = [dict(timestamp=i * 100, input_length=600, output_length=9, hash_ids=[i, -i]) for i in range(20)]
    trace.write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = installed.run("simulate", "--trace", str(trace))
    assert done.returncode == 0 and "least_load" in done.stdout, done.stderr
    done = installed.run("simulate", "--trace", str(trace), "--plot", str(tmp_path / "plot.png"))
    assert done.returncode == 2 and done.stderr.endswith("pip install 'pdserve[plot]'\n")


async def test_balancer_serves_through_two_servers_and_is_watched(installed: Installed) -> None:
    async with FakeSGLang(Role.PREFILL) as prefill, FakeSGLang(Role.DECODE) as decode:
        servers = ("--prefill", prefill.url, "8998", "--decode", decode.url)
        async with (
            installed.serving("bootstrap") as bootstrap,
            installed.serving("balance", "--bootstrap", bootstrap, *servers) as url,
        ):
            load = ("bench", url, "-n", "3", "--warmup", "1", "--input", "8", "--output", "4")
            for args in (load, ("monitor", url, "--json"), ("chat", "--url", url, "hello")):
                done = await asyncio.to_thread(installed.run, *args)
                assert done.returncode == 0, (args, done.stdout, done.stderr)
                if args[0] == "monitor":
                    assert [worker["state"] for worker in json.loads(done.stdout)["workers"]] == ["ready"] * 2
        assert len(prefill.requests) == len(decode.requests) >= 5
