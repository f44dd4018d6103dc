"""What the doctor is made of: running checks, child processes, hook targets, model files, reports."""

from __future__ import annotations

import json
import struct
import sys
import threading
import time
from pathlib import Path

import pytest

from pdserve.doctor.children import run_child
from pdserve.doctor.command import render_json, render_text
from pdserve.doctor.finding import Finding, Level, Report, Section, error, note, ok, warning
from pdserve.doctor.hook_targets import missing_targets
from pdserve.doctor.model_files import gather_model, judge_model, kv_bytes_per_token, server_bytes
from pdserve.doctor.runner import Check, Group, run_groups
from pdserve.model.tiny import write_tiny_model

# -- running checks ----------------------------------------------------------------------------


def findings_of(*checks: Check, in_turn: bool = False) -> list[Finding]:
    (section,) = run_groups([Group("All", checks, in_turn)])
    return list(section.findings)


def test_a_check_that_crashes_is_an_error_and_the_others_go_on() -> None:
    def crash() -> list[Finding]:
        raise KeyError("speed")

    bad, good = findings_of(Check("bad", crash), Check("good", lambda: [ok("good", "fine")]))
    assert (bad.check, bad.level) == ("bad", Level.ERROR)
    assert "KeyError: 'speed'" in bad.what
    assert "crash" in bad.what
    assert good == ok("good", "fine")


def test_a_check_that_hangs_is_an_error_and_the_others_go_on() -> None:
    released = threading.Event()

    def hang() -> list[Finding]:
        released.wait()
        return []

    bad, good = findings_of(Check("bad", hang, limit_s=0.05), Check("good", lambda: [ok("good", "fine")]))
    released.set()
    assert bad.level is Level.ERROR
    assert "0.05 s" in bad.what
    assert good.level is Level.OK


def test_findings_keep_the_order_of_checks_whatever_ends_first() -> None:
    second_is_done = threading.Event()

    def first() -> list[Finding]:
        assert second_is_done.wait(10)
        return [ok("first", "")]

    def second() -> list[Finding]:
        second_is_done.set()
        return [ok("second", "")]

    found = findings_of(Check("first", first), Check("second", second))
    assert [finding.check for finding in found] == ["first", "second"]


@pytest.mark.process
def test_a_child_that_hangs_is_killed_with_what_it_started(tmp_path: Path) -> None:
    code = (
        "import os, pathlib, subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        f"part = pathlib.Path({str(tmp_path)!r}, 'part')\n"
        "part.write_text(f'{os.getpid()} {child.pid}')\n"
        "part.rename(part.with_name('pids'))\n"
        "time.sleep(600)\n"
    )
    result = run_child([sys.executable, "-c", code], 3.0)
    pids = [int(pid) for pid in (tmp_path / "pids").read_text().split()]
    assert result.returncode is None
    assert "within 3 s" in result.complaint(3.0)
    deadline = time.monotonic() + 10
    while any(_is_running(pid) for pid in pids):
        assert time.monotonic() < deadline, "children outlive the limit"
        time.sleep(0.02)


def _is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


@pytest.mark.process
def test_a_child_tells_why_it_failed() -> None:
    failed = run_child([sys.executable, "-c", "import sys; sys.exit('no such device')"], 20)
    killed = run_child([sys.executable, "-c", "import os; os.kill(os.getpid(), 11)"], 20)
    assert failed.complaint(20) == "status 1: no such device"
    assert "signal 11" in killed.complaint(20)
    assert failed.json() is None
    assert run_child(["/nowhere/nothing"], 1).is_missing


# -- hook targets ------------------------------------------------------------------------------


@pytest.fixture
def site(tmp_path: Path) -> Path:
    package = tmp_path / "engine" / "srt"
    package.mkdir(parents=True)
    (tmp_path / "engine" / "__init__.py").write_text("")
    (package / "__init__.py").write_text("from .parts import Part as Piece\n")
    (package / "base.py").write_text("class Base:\n    def inherited(self):\n        pass\n")
    (package / "parts.py").write_text(
        "from engine.srt.base import Base\n"
        "try:\n    import fast\nexcept ImportError:\n    fast = None\n"
        "LIMIT: int = 3\n"
        "def work():\n    pass\n"
        "class Part(Base):\n    size = 1\n    def own(self):\n        pass\n"
    )
    return tmp_path


@pytest.mark.parametrize(
    "path",
    [
        "engine.srt.parts.work", "engine.srt.parts.Part", "engine.srt.parts.Part.own",
        "engine.srt.parts.Part.inherited", "engine.srt.parts.Part.size", "engine.srt.parts.LIMIT",
        "engine.srt.parts.fast", "engine.srt.Piece.own", "engine.srt.parts",
    ],
)  # fmt: skip
def test_targets_that_are_defined_are_found(site: Path, path: str) -> None:
    assert missing_targets([path], site) == []


@pytest.mark.parametrize(
    "path",
    [
        "engine.srt.parts.gone", "engine.srt.parts.Part.gone", "engine.srt.nowhere.Part",
        "engine.srt.Piece.gone", "other.package",
    ],
)  # fmt: skip
def test_targets_that_are_gone_are_missed(site: Path, path: str) -> None:
    assert missing_targets([path], site) == [path]


# -- model files -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def model(built: Path, tmp_path: Path) -> Path:
    """A copy that a test may break."""
    folder = tmp_path / "model"
    folder.mkdir()
    for file in built.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


def judged(name: Path | str, **environ: str) -> list[Finding]:
    return judge_model(gather_model(str(name), environ))


def the_error(findings: list[Finding]) -> Finding:
    (found,) = [finding for finding in findings if finding.level is Level.ERROR]
    assert found.why
    assert found.what_to_do
    return found


def test_a_whole_model_is_fine(model: Path) -> None:
    findings = judged(model)
    assert {finding.level for finding in findings} == {Level.OK}
    assert next(f.values["bytes"] for f in findings if f.check == "weights") == (
        (model / "model.safetensors").stat().st_size
    )


def test_a_missing_folder_is_an_error(tmp_path: Path) -> None:
    assert str(tmp_path / "gone") in the_error(judged(tmp_path / "gone")).what


@pytest.mark.parametrize(
    ("file", "content", "words"),
    [
        ("config.json", b"{", "is not JSON"),
        ("config.json", b"{}", "names no architecture"),
        ("model.safetensors", b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        ("model.safetensors", b"short", "cut off"),
        ("model.safetensors", struct.pack("<Q", 1 << 60) + b"{}", "cut off"),
        ("model.safetensors", struct.pack("<Q", 2) + b"[]", "broken safetensors header"),
    ],
)
def test_broken_files_are_named(model: Path, file: str, content: bytes, words: str) -> None:
    (model / file).write_bytes(content)
    assert words in the_error(judged(model)).what


def test_weights_that_end_early_are_named_with_both_sizes(model: Path) -> None:
    weights = model / "model.safetensors"
    size = weights.stat().st_size
    with weights.open("r+b") as file:
        file.truncate(size - 10)
    assert f"has {size - 10} bytes, {size} expected" in the_error(judged(model)).what


def test_every_file_of_the_index_must_be_there(model: Path) -> None:
    weight_map = {"a": "model.safetensors", "b": "model-2.safetensors"}
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert the_error(judged(model)).what == "model-2.safetensors is missing"


def test_a_model_without_weights_or_tokenizer_is_an_error(model: Path) -> None:
    (model / "model.safetensors").unlink()
    assert "no safetensors" in the_error(judged(model)).what
    (model / "model.safetensors").write_bytes(struct.pack("<Q", 2) + b"{}")
    for file in model.glob("*token*"):
        file.unlink()
    assert the_error(judged(model)).check == "tokenizer"


def test_a_hub_model_must_be_in_the_cache_or_downloadable(model: Path, tmp_path: Path) -> None:
    home = tmp_path / "hub"
    online = judged("owner/name", HF_HUB_CACHE=str(home))
    offline = judged("owner/name", HF_HUB_CACHE=str(home), HF_HUB_OFFLINE="1")
    snapshot = home / "models--owner--name" / "snapshots" / "abc"
    snapshot.parent.mkdir(parents=True)
    model.rename(snapshot)
    assert [finding.level for finding in online] == [Level.WARNING]
    assert "HF_HUB_OFFLINE" in the_error(offline).why
    assert {finding.level for finding in judged("owner/name", HF_HUB_CACHE=str(home))} == {Level.OK}


def test_kv_size_is_read_from_the_configuration() -> None:
    llama = {"num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3, "hidden_size": 576}
    latent = {"num_hidden_layers": 61, "kv_lora_rank": 512, "qk_rope_head_dim": 64, "torch_dtype": "bfloat16"}
    assert kv_bytes_per_token({**llama, "torch_dtype": "bfloat16"}) == 2 * 30 * 3 * 64 * 2
    assert kv_bytes_per_token({"text_config": {**llama, "torch_dtype": "float32"}}) == 2 * 30 * 3 * 64 * 4
    assert kv_bytes_per_token(latent) == 61 * 576 * 2
    assert kv_bytes_per_token({}) == 0


def test_a_cpu_server_needs_its_weights_and_its_pool(model: Path) -> None:
    facts = gather_model(str(model), {})
    small, large = (server_bytes(facts, on_gpu=False, kv_tokens=n) for n in (0, 1000))
    assert large - small == 1000 * kv_bytes_per_token(facts.config)
    assert small > facts.weight_bytes


# -- reports -----------------------------------------------------------------------------------

REPORT = Report(
    (
        Section("Machine", (ok("port", "30000 is free"), note("cores", "2 cores"))),
        Section(
            "KV transfer",
            (
                warning("UCX_TLS", "UCX_TLS=tcp leaves only tcp", "slow " * 30, "unset it"),
                error("loopback DRAM", "no end within 60 s", "every request does this", "look above", rate=0),
            ),
        ),
    ),
    took_s=4.25,
)


@pytest.mark.parametrize("width", [60, 80, 120, 20, 1000])
def test_text_fits_the_width_and_says_everything(width: int) -> None:
    text = render_text(REPORT, width)
    assert max(map(len, text.splitlines())) <= max(60, min(width, 120))
    for words in ("Machine", "KV transfer", "30000 is free", "WARNING", "ERROR", "why:", "do:", "look above"):
        assert words in text
    assert "1 error, 1 warning, 1 note, 1 ok in 4.2 s" in text
    assert text.count("slow") == 30


def test_text_without_unicode_is_plain_ascii() -> None:
    assert render_text(REPORT, 80, is_unicode=False).isascii()


def test_json_carries_every_finding_and_the_verdict() -> None:
    document = json.loads(render_json(REPORT))
    assert document["ok"] is False
    assert document["counts"] == {"ok": 1, "note": 1, "warning": 1, "error": 1}
    assert document["findings"][-1] == {
        "section": "KV transfer", "check": "loopback DRAM", "level": "error", "what": "no end within 60 s",
        "why": "every request does this", "what_to_do": "look above", "values": {"rate": 0},
    }  # fmt: skip


def test_only_errors_make_it_fail() -> None:
    mild = Report((Section("A", (warning("x", "", "", ""), note("y", ""))),), 1.0)
    assert mild.exit_code == 0
    assert REPORT.exit_code == 1
