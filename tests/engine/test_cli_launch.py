"""The launcher itself: starts that must fail clearly, and an end that must leave nothing.

Named to run before the session's fleet exists: at most four SGLang servers are up at a time.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from pdserve.process import scratch
from tests.engine.corpus import CORPUS
from tests.engine.fleet import StockPair, call, free_port, generate_body, launch_fleet, wait_for

pytestmark = pytest.mark.engine


def _launch(*args: str, timeout_s: float = 600.0) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "pdserve", "launch", *args],
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )


def _assert_one_clear_line(done: subprocess.CompletedProcess[str], code: int, *words: str) -> None:
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, done.stderr
    assert all(word in errors[0] for word in words), errors[0]
    assert done.returncode == code
    assert "Traceback" not in errors[0]


def test_missing_model_is_named_before_anything_starts(tmp_path: Path) -> None:
    _assert_one_clear_line(_launch(str(tmp_path / "nowhere")), 2, "no such model folder", "nowhere")


def test_folder_without_a_model_is_named_before_anything_starts(tmp_path: Path) -> None:
    _assert_one_clear_line(_launch(str(tmp_path)), 2, "config.json", str(tmp_path))


def test_port_in_use_is_named_with_its_owner(tiny_model: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        done = _launch(str(tiny_model), "--port", str(port))
    _assert_one_clear_line(done, 2, f"port {port} is in use", f"pid {os.getpid()}", "--port")


def test_flag_that_sglang_does_not_know_is_named(tiny_model: Path, tmp_path: Path) -> None:
    done = _launch(
        str(tiny_model), "--port", str(free_port()), "--log-dir", str(tmp_path), "--", "--no-such-flag", "1"
    )
    _assert_one_clear_line(done, 1, "--no-such-flag")


def test_model_that_does_not_fit_says_so(tiny_model: Path, tmp_path: Path) -> None:
    """A KV pool larger than the machine's memory: refused before a byte of it is allocated."""
    args = [str(tiny_model), "--port", str(free_port()), "--log-dir", str(tmp_path)]
    flags = ["--mem-fraction-static", "0.99", "--max-total-tokens", "4000000000", "--dtype", "float32"]
    done = _launch(*args, "--", *flags)
    _assert_one_clear_line(done, 2, "this machine is too small", "--max-total-tokens", "--force")
    done = _launch(*args, "--force", "--", *flags)
    _assert_one_clear_line(done, 1, "not enough memory", "KV pool", "--max-total-tokens")


def test_workers_that_do_not_fit_each_other_are_refused_by_name(tiny_model: Path, tmp_path: Path) -> None:
    args = [str(tiny_model), "--port", str(free_port()), "--log-dir", str(tmp_path)]
    # Another page size alone is converted; a decode radix cache needs prefill's.
    done = _launch(*args, "--decode-args", "--page-size 32 --disaggregation-decode-enable-radix-cache")
    _assert_one_clear_line(done, 1, "cannot join", "page_size", "16", "32")


def test_killed_launcher_leaves_no_process_and_the_next_start_clears_the_rest(
    tiny_model: Path, tmp_path: Path
) -> None:
    with launch_fleet(tiny_model, tmp_path, prefill=1, decode=1) as fleet:
        status, _ = call(fleet.url, "POST", "/generate", {"text": "hello", "sampling_params": {}})
        assert status == 200
        descendants = psutil.Process(fleet.launcher.pid).children(recursive=True)
        workers = [fleet.pid(name) for name in ("prefill-0", "decode-0")]
        assert len(descendants) >= 9, "two services, a forkserver, two servers of three processes"
        assert set(workers) <= set(scratch.live_workers())

        os.kill(fleet.launcher.pid, signal.SIGKILL)
        fleet.launcher.wait()

        wait_for(lambda: not [p for p in descendants if _runs(p)], "the end of every descendant", 15)
        fleet.is_expected_dead = True
    scratch.sweep()
    assert not any(scratch.scratch_dir(pid).exists() for pid in workers)
    assert not any(scratch.snapshot_path(pid).exists() for pid in workers)


def test_plain_sglang_is_unchanged_by_an_installed_pdserve() -> None:
    """No environment of ours: the platform plugin stays silent and no class is replaced."""
    code = (
        "from sglang.srt.plugins import load_plugins; load_plugins()\n"
        "from sglang.srt.disaggregation.nixl import conn\n"
        "from sglang.srt.platforms import current_platform\n"
        "print(conn.NixlKVManager.__module__, type(current_platform).__module__)\n"
    )
    environ = {key: value for key, value in os.environ.items() if not key.startswith(("PDSERVE", "SGLANG"))}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environ
    )
    modules = done.stdout.split()
    assert modules[0] == "sglang.srt.disaggregation.nixl.conn"
    assert not modules[1].startswith("pdserve")


def test_hook_that_does_not_take_ends_the_worker_with_one_line(tmp_path: Path) -> None:
    code = (
        "import pdserve.plugin.hooks as hooks\n"
        "bad = hooks.HookTarget('sglang.srt.managers.scheduler.Scheduler.no_such', 'around',\n"
        "                       'pdserve.plugin.idle:sleep_when_parked', 'test')\n"
        "hooks.HOOKS = (bad,)\n"
        "hooks.register()\n"
        "print('served anyway')\n"
    )
    environ = {**os.environ, "PDSERVE_ACTIVE": "1", "SGLANG_PLATFORM": "pdserve"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environ
    )
    assert done.returncode == 78
    assert "served anyway" not in done.stdout
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("pdserve: plugin could not be applied: hook target sglang.srt.managers.scheduler")


def _runs(process: psutil.Process) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@pytest.mark.exhaustive
def test_balancer_fronts_servers_started_without_pdserve(
    tiny_model: Path, tmp_path: Path, expected: dict[str, list[int]]
) -> None:
    """``pdserve balance --prefill URL PORT --decode URL``: SGLang's own bootstrap server, no membership."""
    with StockPair(tiny_model, tmp_path) as pair:
        port = free_port()
        command = [sys.executable, "-m", "pdserve", "balance", "--port", str(port), "--pd-disaggregation"]
        command += ["--prefill", pair.prefill_url, str(pair.bootstrap_port), "--decode", pair.decode_url]
        with (tmp_path / "balance.log").open("wb") as log:
            balancer = subprocess.Popen(command, stdout=log, stderr=log)
        try:
            url = f"http://127.0.0.1:{port}"
            wait_for(lambda: call(url, "GET", "/health")[0] == 200, "a tested pair", 60)
            for prompt in CORPUS[::20]:
                status, answer = call(url, "POST", "/generate", generate_body(prompt))
                assert status == 200, answer
                assert answer["output_ids"] == expected[prompt.name]
        finally:
            balancer.send_signal(signal.SIGINT)
            assert balancer.wait(30) == 0
