"""bench/gpu/run.sh keeps every step's output whatever fails, in order. No GPU: the tools are scripts."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

pytestmark = pytest.mark.process

SCRIPT = Path(__file__).parents[2] / "bench" / "gpu" / "run.sh"
ORDER = ["facts", "build", "check", "transfer", "tests", "memcheck", "initcheck", "ladder", "bench"]


def _run(folder: Path, *args: str, **environ: str) -> subprocess.CompletedProcess[str]:
    """With a python that says what it was asked for and fails in ``check.py``, and an nvidia-smi."""
    tools = folder / "bin"
    tools.mkdir(exist_ok=True)
    scripts = {
        "python": 'echo "asked: $*"; case "$*" in *check.py*) echo broken >&2; exit 3;; esac',
        "nvidia-smi": "echo made-up GPU",
        "nvcc": "echo made-up nvcc",
        "compute-sanitizer": 'echo sanitized; shift 4; exec "$@"',
    }
    for name, text in scripts.items():
        (tools / name).write_text(f"#!/bin/sh\n{text}\n")
        (tools / name).chmod(0o755)
    env = os.environ | {"PATH": f"{tools}:/usr/bin:/bin", "PYTHON": str(tools / "python"), **environ}
    return subprocess.run([SCRIPT, *args], env=env, capture_output=True, text=True, timeout=60)


def _headings(done: subprocess.CompletedProcess[str]) -> list[str]:
    return [line.split()[1].rstrip(":") for line in done.stdout.splitlines() if line.startswith("== ")][:-1]


def test_every_step_runs_and_leaves_its_raw_output_even_if_one_before_it_fails(tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = _run(tmp_path, str(out))
    assert _headings(done) == ORDER
    assert done.returncode == 3, "check, and the two sanitizers that run it"
    logs = {name: (out / f"{name}.log").read_text() for name in ORDER}
    assert "made-up GPU" in logs["facts"]
    assert "broken" in logs["check"]
    assert "bench/transfer.py --gpu 0" in logs["transfer"]
    assert "sanitized" in logs["memcheck"] and "broken" in logs["memcheck"]
    assert "asked: bench/gpu/coalesce.py" in logs["bench"]


def test_a_dry_run_lists_the_steps_and_runs_nothing(tmp_path: Path) -> None:
    done = _run(tmp_path, "--dry-run", str(tmp_path / "out"))
    assert (_headings(done), done.returncode) == (ORDER, 0)
    limits = [line.split("(at most ")[1].split()[0] for line in done.stdout.splitlines() if "at most" in line]
    assert len(limits) == len(ORDER)
    assert max(map(int, limits)) <= 150
    assert not list((tmp_path / "out").glob("*.log"))


def test_a_step_without_time_left_fails_by_name(tmp_path: Path) -> None:
    done = _run(tmp_path, str(tmp_path / "out"), "facts", "bench", LIMIT_S="0")
    assert done.returncode == 2
    assert "no time left" in (tmp_path / "out" / "bench.log").read_text()
