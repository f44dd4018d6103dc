"""Building the KV page kernels: cache, lock and what a user is told. The compiler here is a script."""

from __future__ import annotations

import shutil
import threading
from pathlib import Path

import pytest

from pdserve.errors import ConfigError
from pdserve.kv import kernels
from pdserve.kv.kernels import KernelLibrary
from tests.support.kernel_builds import host_library


def fake_nvcc(folder: Path, says: str = "", status: int = 0) -> Path:
    """A compiler that notes each build in ``builds``, prints, and makes an empty library."""
    path = folder / "nvcc"
    path.write_text(
        f'#!/bin/sh\n[ "$1" = --version ] && echo fake 1 && exit\necho "$@" >> {folder}/builds\n'
        f'echo "{says}"\nfor last; do :; done; : > "$last"; sleep 0.1; exit {status}\n'
    )
    path.chmod(0o755)
    return path


@pytest.mark.process
def test_cache_builds_once_per_architecture_and_compiler(tmp_path: Path) -> None:
    nvcc, cache = fake_nvcc(tmp_path), tmp_path / "cache"
    threads = [threading.Thread(target=kernels.build_cached, args=(cache, 90, nvcc)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len((tmp_path / "builds").read_text().splitlines()) == 1
    first = kernels.build_cached(cache, 90, nvcc)
    assert kernels.build_cached(cache, 100, nvcc) != first
    nvcc.write_text(nvcc.read_text().replace("fake 1", "fake 2"))
    assert kernels.build_cached(cache, 90, nvcc) not in (first, None)
    assert len((tmp_path / "builds").read_text().splitlines()) == 3


@pytest.mark.process
def test_a_failed_or_spilling_build_leaves_no_library(tmp_path: Path) -> None:
    spilling = fake_nvcc(tmp_path, "12 bytes spill stores, 0 bytes spill loads")
    with pytest.raises(ConfigError, match="12 bytes spill stores"):
        kernels.build(tmp_path / "cache", [90], spilling)
    failing = fake_nvcc(tmp_path, "boom.cu: bad", 1)
    with pytest.raises(ConfigError, match=r"boom\.cu"):
        kernels.build_cached(tmp_path / "cache", 90, failing)
    assert not list((tmp_path / "cache").rglob("*.so"))


def test_missing_tools_and_files_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="nvcc is not at"):
        kernels.find_nvcc(tmp_path / "nvcc")
    monkeypatch.setattr(shutil, "which", lambda _: None)
    monkeypatch.setattr(Path, "is_file", lambda _: False)
    with pytest.raises(ConfigError, match="nvcc not found on PATH"):
        kernels.find_nvcc()
    with pytest.raises(ConfigError, match="reinstall pdserve"):
        kernels.find_sources()
    with pytest.raises(ConfigError, match="not a usable library"):
        KernelLibrary(tmp_path / "absent.so")


@pytest.mark.process
def test_command_line_reports_a_failed_build(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    nvcc = fake_nvcc(tmp_path, "boom", 1)
    with pytest.raises(SystemExit, match="1"):
        kernels.main(["--out", str(tmp_path / "out"), "--archs", "90", "--nvcc", str(nvcc)])
    assert "boom" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        kernels.main(["--out", str(tmp_path), "--archs", "ninety"])


@pytest.mark.process
def test_on_a_server_no_warning_and_no_spill_stops_the_build(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    nvcc = fake_nvcc(tmp_path, "warning: new in this compiler; 12 bytes spill stores, 0 bytes spill loads")
    assert kernels.build_cached(tmp_path / "cache", 90, nvcc).is_file()
    assert "Werror" not in (tmp_path / "builds").read_text()
    assert "slower, not wrong" in caplog.text
    kernels.main(["--out", str(tmp_path / "out"), "--archs", "90", "--nvcc", str(fake_nvcc(tmp_path))])
    assert "-Werror" in (tmp_path / "builds").read_text(), "strict where kernels are developed"


@pytest.mark.process
def test_the_wheels_library_comes_first_if_it_knows_the_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arch = 90
    made = tmp_path / "built.so"
    monkeypatch.setattr(kernels, "device_arch", lambda device: arch)
    monkeypatch.setattr(kernels, "build_cached", lambda *args: made)
    monkeypatch.setattr(kernels, "PREBUILT", tmp_path / "absent.so")
    source = host_library()
    shutil.copy(source, made)
    assert KernelLibrary.for_device(tmp_path).path == made
    prebuilt = tmp_path / "prebuilt.so"
    shutil.copy(source, prebuilt)
    monkeypatch.setattr(kernels, "PREBUILT", prebuilt)
    assert KernelLibrary.for_device(tmp_path).path == prebuilt
    arch = 75
    assert KernelLibrary.for_device(tmp_path).path == made
    arch = 120
    monkeypatch.setattr(kernels, "PREBUILT", made.with_name("broken.so"))
    kernels.PREBUILT.write_bytes(b"of another machine")
    assert KernelLibrary.for_device(tmp_path).path == made
