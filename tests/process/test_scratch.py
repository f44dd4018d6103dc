"""What killed workers leave is removed, what live ones use is not."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from pdserve.process import scratch

pytestmark = pytest.mark.process


@pytest.fixture(autouse=True)
def _own_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("tmp", "shm"):
        (tmp_path / name).mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    monkeypatch.setattr(scratch, "SHARED_MEMORY", tmp_path / "shm")
    monkeypatch.setattr(scratch, "LONGEST_FOLDER", 500)  # pytest's folders have long names


def _dead_pid() -> int:
    done = subprocess.Popen([sys.executable, "-c", ""])
    done.wait()
    return done.pid


def _leave(pid: int) -> tuple[Path, Path]:
    folder, snapshot = scratch.scratch_dir(pid), scratch.snapshot_path(pid)
    folder.mkdir()
    (folder / "socket").touch()
    snapshot.touch()
    return folder, snapshot


def test_sweep_removes_what_dead_workers_left_and_nothing_else(tmp_path: Path) -> None:
    dead, alive = _dead_pid(), os.getpid()
    gone, kept = _leave(dead), _leave(alive)
    foreign = tmp_path / "tmp" / "pdserve-notes"
    foreign.mkdir()
    (tmp_path / "shm" / "sglang_loads_other_1.shm").touch()

    assert scratch.sweep() == [dead]

    assert not any(path.exists() for path in gone)
    assert all(path.exists() for path in (*kept, foreign, tmp_path / "shm" / "sglang_loads_other_1.shm"))


def test_live_workers_are_counted_whoever_started_them() -> None:
    _leave(_dead_pid())
    _leave(os.getpid())
    assert scratch.live_workers() == [os.getpid()]


def test_zombie_counts_as_dead() -> None:
    """In a container nobody may ever collect an orphan: its files must still be cleared."""
    zombie = subprocess.Popen([sys.executable, "-c", ""])
    os.waitid(os.P_PID, zombie.pid, os.WEXITED | os.WNOWAIT)
    _leave(zombie.pid)
    try:
        assert scratch.live_workers() == []
        assert scratch.sweep() == [zombie.pid]
    finally:
        zombie.wait()
