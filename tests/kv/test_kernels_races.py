"""No two lanes of a copy write the same byte: the kernel bodies, a thread a block, under ThreadSanitizer."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from tests.support.kernel_builds import CUDA

pytestmark = [
    pytest.mark.process,
    pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not on PATH"),
]

TSAN_FOUND = 66
"""Exit status of a program in which ThreadSanitizer has reported something."""


@pytest.fixture(scope="module")
def races(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The command, without address randomisation where that can be had: the sanitizer's maps are fixed."""
    out = tmp_path_factory.mktemp("races") / "races"
    flags = "-std=c++17 -O1 -g -Wall -Wextra -Werror -fsanitize=thread"
    command = ["g++", *flags.split(), f"-I{CUDA / 'include'}", str(CUDA / "dev" / "races.cpp")]
    done = subprocess.run([*command, "-o", str(out), "-lpthread"], capture_output=True, text=True)
    if done.returncode and "libtsan" in done.stderr:
        pytest.skip("g++ has no ThreadSanitizer here")
    assert done.returncode == 0, done.stderr
    setarch = shutil.which("setarch")
    return [*([setarch, "-R"] if setarch else []), str(out)]


def _run(command: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, cwd=Path("/"), timeout=60)


def test_lanes_write_disjoint_bytes_in_whole_rows_and_in_slices(races: list[str]) -> None:
    done = _run(races)
    assert (done.returncode, done.stdout) == (0, "copied\n"), done.stderr[-3000:]


def test_a_scatter_to_repeated_pages_is_reported(races: list[str]) -> None:
    done = _run([*races, "repeated"])
    assert done.returncode == TSAN_FOUND, done.stderr[-3000:]
    assert "WARNING: ThreadSanitizer: data race" in done.stderr
