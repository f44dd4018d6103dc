"""A temporary folder with a long name: sockets of workers go to a short one, or one clear line says so."""

from __future__ import annotations

import os
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from pdserve.errors import ConfigError
from pdserve.process import scratch


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The one short folder; the temporary one is 120 bytes long."""
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        long = Path(folder) / ("x" * (119 - len(folder)))
        long.mkdir()
        monkeypatch.setattr(tempfile, "tempdir", str(long))
        monkeypatch.setattr(scratch, "SHORT_FOLDERS", (Path(folder) / "missing", Path(folder)))
        yield Path(folder)


def test_the_longest_socket_of_a_worker_can_be_bound(short: Path) -> None:
    folder = scratch.scratch_dir(4194304) / "pymp-abcdefgh"
    folder.mkdir(parents=True)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(folder / "listener-abcdefgh"))


def test_what_a_worker_left_there_is_found_and_removed(short: Path) -> None:
    own = scratch.scratch_dir(os.getpid())
    own.mkdir()
    assert own.parent == short
    assert os.getpid() in scratch.live_workers()
    dead = scratch.scratch_dir(2**22 + 1)  # above the kernel's largest process id
    dead.mkdir()
    scratch.sweep()
    assert own.exists() and not dead.exists()
    scratch.remove(os.getpid())
    assert not own.exists()


def test_a_short_temporary_folder_is_used_itself(short: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(short))
    assert scratch.scratch_dir(7) == short / "pdserve-7"


def test_no_short_folder_is_one_clear_line(short: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scratch, "SHORT_FOLDERS", (short / "missing",))
    with pytest.raises(ConfigError, match=r"too long for Unix sockets.*set TMPDIR to a short folder"):
        scratch.scratch_dir(7)
