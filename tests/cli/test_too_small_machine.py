"""A launch that this machine cannot hold, or whose model cannot be had, ends before its first process starts.

Each case also names a log folder that cannot be made: a launch that passed the check would end there.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pdserve.cli.app import main
from pdserve.doctor import machine
from pdserve.doctor.limits import LimitFacts, gather_limits
from pdserve.process.limits import free_memory, usable_cores, whole_memory

GIB = 1 << 30
CONFIG = {"num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3, "hidden_size": 576}
"""Of the embedded model: 23,040 bytes of KV a token."""


@pytest.fixture
def model(tmp_path: Path) -> str:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps(CONFIG))
    return str(tmp_path / "model")


@pytest.fixture(autouse=True)
def _this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """2 cores, 24 GiB free."""

    def gather(folders: tuple[Path, ...], cores: int) -> LimitFacts:
        real = gather_limits(folders, cores)
        known = {name: getattr(real, name) for name in LimitFacts.__slots__}
        return LimitFacts(**{**known, "memory_free": 24 * GIB, "max_processes": -1})

    monkeypatch.setattr(machine, "gather_limits", gather)
    monkeypatch.setattr(machine, "usable_cores", lambda: 2)


def launch(capsys: pytest.CaptureFixture[str], tmp_path: Path, *args: str) -> str:
    """What the launch printed as its one error."""
    (tmp_path / "file").touch()
    given = ("--port", "0", "--log-dir", str(tmp_path / "file" / "logs"), "--device", "cpu", *args)
    with pytest.raises(SystemExit) as ended:
        main(("launch", *given))
    assert ended.value.code == 2
    return capsys.readouterr().err


STARTED = "cannot make the log folder"


def test_198_servers_on_two_cores_are_refused(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = launch(capsys, tmp_path, model, "-p", "99", "-d", "99")
    assert "this machine is too small: 24.0 GiB free, 198 servers need about" in said
    assert "2 cores for 198 servers" in said and "lower -p or -d" in said and "--force" in said
    assert said.count("\n") == 1


def test_what_fits_starts_and_so_does_what_is_forced(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert STARTED in launch(capsys, tmp_path, model, "-p", "2", "-d", "2")
    assert STARTED in launch(capsys, tmp_path, model, "-p", "9", "-d", "9", "--force")
    assert STARTED not in launch(capsys, tmp_path, model, "-p", "9", "-d", "9")


def test_the_kv_pool_that_is_asked_for_counts(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A million tokens are 23 GB in each server."""
    assert "2 servers need about" in launch(capsys, tmp_path, model, "--", "--max-total-tokens", "1000000")
    assert STARTED in launch(capsys, tmp_path, model, "--", "--max-total-tokens=1000")


def test_a_dry_run_prints_a_plan_of_any_size(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(("launch", model, "-p", "20", "-d", "20", "--port", "0", "--device", "cpu", "--dry-run"))
    assert ended.value.code == 0
    assert capsys.readouterr().out.count("# decode-") == 20


@pytest.mark.slow
def test_a_hub_id_that_cannot_be_had_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "model no/model is not in the local cache" in launch(capsys, tmp_path, "no/model")


def test_limits_of_a_container_count(tmp_path: Path) -> None:
    (tmp_path / "cpu.max").write_text("150000 100000\n")
    (tmp_path / "memory.max").write_text(f"{GIB}\n")
    (tmp_path / "memory.current").write_text(f"{GIB // 2}\n")
    (tmp_path / "memory.stat").write_text(f"anon 1\ninactive_file {GIB // 4}\n")
    assert usable_cores(tmp_path) <= 2
    assert free_memory(tmp_path) == GIB // 4 * 3, "the kernel gives up its file cache"
    assert whole_memory(tmp_path) == GIB
    (tmp_path / "cpu.max").write_text("max 100000\n")
    (tmp_path / "memory.max").write_text("max\n")
    assert usable_cores(tmp_path) == usable_cores(tmp_path / "nowhere")
    assert whole_memory(tmp_path) > GIB


def test_the_first_version_of_cgroups_is_read_too(tmp_path: Path) -> None:
    for name, text in {
        "cpu/cpu.cfs_quota_us": "100000",
        "cpu/cpu.cfs_period_us": "100000",
        "memory/memory.limit_in_bytes": str(GIB),
        "memory/memory.usage_in_bytes": str(GIB),
    }.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert usable_cores(tmp_path) == 1
    assert free_memory(tmp_path) == 1, "full, which is not the same as unknown"
