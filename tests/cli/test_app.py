"""The command line: what it prints, refuses and hands over. Nothing is started."""

from __future__ import annotations

import os
import shlex
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from pdserve import __version__
from pdserve.cli import settings as command_line
from pdserve.cli.app import main
from pdserve.errors import ConfigError, StartupError

COMMANDS = ("launch", "prefill", "decode", "bootstrap", "balance", "chat", "bench", "doctor", "simulate")
COMMANDS += ("calibrate", "monitor", "version")


@dataclass(frozen=True, slots=True)
class Done:
    code: int
    out: str
    err: str


Run = Callable[..., Done]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Run the command line in this process."""

    def call(*args: str) -> Done:
        with pytest.raises(SystemExit) as ended:
            main(args)
        assert isinstance(ended.value.code, int)
        out, err = capsys.readouterr()
        return Done(ended.value.code, out, err)

    return call


@pytest.fixture
def model(tmp_path: Path) -> str:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    return str(tmp_path / "model")


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def dry_run(run: Run, model: str, *args: str) -> Done:
    return run("launch", model, "--dry-run", "--device", "cpu", "--port", free_port(), *args)


@contextmanager
def health_server(status: int) -> Iterator[str]:
    class Health(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status if self.path == "/health" else 404)
            self.end_headers()

        def log_message(self, *args: Any) -> None:
            return

    server = HTTPServer(("127.0.0.1", 0), Health)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield f"127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.mark.process
def test_module_help_lists_all_commands() -> None:
    done = subprocess.run([sys.executable, "-m", "pdserve", "--help"], capture_output=True, text=True)
    assert done.returncode == 0
    for command in COMMANDS:
        assert f" {command} " in done.stdout


def test_no_arguments_is_help(run: Run) -> None:
    done = run()
    assert done.code == 0
    assert "launch" in done.out


def test_help_of_every_option_ends_with_its_default(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "400")
    wrong = []
    for command in COMMANDS:
        done = run(command, "--help")
        assert done.code == 0
        for line in done.out.splitlines():
            if "--" in line and "--help" not in line and line.startswith("│"):
                text = line.strip("│ ")
                has_default = text.endswith(")") and "default" in text
                if not has_default and not text.endswith("[required]"):
                    wrong.append((command, text))
    assert not wrong


def test_version(run: Run) -> None:
    assert run("version") == Done(0, f"pdserve {__version__}\n", "")


@pytest.mark.process
def test_missing_model_is_one_line_and_exit_2(tmp_path: Path) -> None:
    missing = tmp_path / "nowhere"
    command = [sys.executable, "-m", "pdserve", "launch", str(missing), "--device", "cpu"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith(f"error: no such model folder: {missing}")
    assert done.stderr.count("\n") == 1


def test_dry_run_prints_every_process(run: Run, model: str) -> None:
    done = dry_run(
        run, model, "-p", "1", "-d", "2", "--policy", "random", "--prefill-args", "--log-level debug"
    )
    assert (done.code, done.err) == (0, "")
    comments = [line.split()[1].strip(",:") for line in done.out.splitlines() if line.startswith("#")]
    assert comments == ["bootstrap", "balancer", "prefill-0", "decode-0", "decode-1"]
    commands = [shlex.split(line) for line in done.out.splitlines() if line and not line.startswith("#")]
    assert commands[1][-2:] == ["--policy", "random"]
    prefill, decode = commands[2], commands[3]
    assert {"PDSERVE_WORKER_ID=prefill-0", "HF_HUB_OFFLINE=1", "pdserve.plugin.worker", model} <= set(prefill)
    assert prefill[-2:] == ["--log-level", "debug"]
    assert "--log-level" not in decode


def test_flags_after_the_dashes_go_to_sglang(run: Run, model: str) -> None:
    done = dry_run(run, model, "--", "--page-size=32", "--served-model-name", "mine")
    assert done.out.count("--page-size=32 --served-model-name mine\n") == 2
    assert "--page-size 16" not in done.out


def test_option_wins_over_file_and_file_over_default(run: Run, model: str, tmp_path: Path) -> None:
    file = tmp_path / "f.toml"
    file.write_text('[launch]\nprefill = 2\ndecode = 3\npolicy = "random"\n[balancer]\nload_poll_s = 1.0\n')
    done = dry_run(run, model, "--config", str(file), "-d", "1")
    assert "# prefill-1" in done.out
    assert "# decode-1" not in done.out
    assert done.out.count(f"--config {file}") == 2  # balancer and bootstrap read their own sections


def test_a_launch_waits_as_long_as_its_balancer_was_told_to(run: Run, model: str, tmp_path: Path) -> None:
    file = tmp_path / "f.toml"
    file.write_text("[launch]\nshutdown_delay_s = 2.0\n[balancer]\ndrain_s = 120.0\nshutdown_delay_s = 9.0\n")
    assert "--shutdown-delay 2 --drain 120" in dry_run(run, model, "--config", str(file)).out
    assert "--shutdown-delay 2 --drain 3" in dry_run(run, model, "--config", str(file), "--drain", "3").out


def test_mistake_is_one_line_and_exit_2(run: Run, model: str) -> None:
    mistakes: tuple[tuple[Sequence[str], str], ...] = (
        (("--page-size", "32"), "SGLang's own flags follow a `--`"),
        (("-p", "0"), "at least one prefill"),
        (("-p", "two"), "--prefill"),
        (("--device", "tpu"), "auto, cpu, cuda"),
        (("--policy", "best"), "unknown policy 'best'"),
        (("--start-method", "magic"), "auto, fork, spawn"),
        (("--prefill-args", "'open"), "--prefill-args: No closing quotation"),
        (("--config", "nowhere.toml"), "cannot read config file nowhere.toml"),
        (("--tp", "0"), "tp must be at least 1"),
        (("--", "--tp-size", "2"), "pdserve's own --tp"),
    )
    wrong = []
    for args, said in mistakes:
        done = dry_run(run, model, *args)
        is_one_line = done.err.startswith("error: ") and done.err.count("\n") == 1
        if (done.code, done.out) != (2, "") or not is_one_line or said not in done.err:
            wrong.append((args, done))
    assert not wrong


def test_taken_port_is_named_with_its_owner(run: Run, model: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        done = run("launch", model, "--device", "cpu", "--port", str(port), "--dry-run")
    assert done.code == 2
    assert f"port {port} is in use by pid {os.getpid()}" in done.err
    assert "--port" in done.err


@pytest.mark.process
def test_cuda_without_a_gpu_offers_cpu(run: Run, model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    done = run("launch", model, "--device", "cuda", "--dry-run")
    assert done.code == 2
    assert "use --device cpu" in done.err


def test_unknown_command(run: Run) -> None:
    done = run("serve")
    assert done.code == 2
    assert "serve" in done.err


def test_startup_error_shows_the_log_tail(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(name: str, progress: object) -> str:
        raise StartupError("prefill-0 ended with status 1", log_tail="last words\n")

    monkeypatch.setattr("pdserve.model.resolve_model", fail)
    assert run("launch") == Done(1, "", "error: prefill-0 ended with status 1\nlast words\n")


def test_join_needs_a_bootstrap_service(run: Run, model: str) -> None:
    done = run("prefill", model, "--join", f"127.0.0.1:{free_port()}")
    assert done.code == 2
    assert "no bootstrap service answers at http://127.0.0.1:" in done.err
    with health_server(404) as address:
        assert "answers HTTP 404" in run("decode", model, "--join", address).err
    assert "--join must be HOST:PORT" in run("decode", model, "--join", "nonsense").err
    assert "--join" in run("decode", model).err


def test_join_becomes_the_worker(run: Run, model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[tuple[str, tuple[str, ...], dict[str, str]]] = []

    def become(file: str, argv: tuple[str, ...], env: dict[str, str]) -> None:
        started.append((file, argv, env))
        sys.exit(0)

    monkeypatch.setattr(os, "execvpe", become)
    monkeypatch.setenv("PDSERVE_PARENT_PID", "1")
    monkeypatch.setenv("UNRELATED", "kept")
    with health_server(200) as address:
        args = ["--port", free_port(), "--name", "mine", "--advertise-host", "h.example", "--device", "cpu"]
        done = run("decode", model, "--join", address, *args, "--", "--page-size", "64")
    assert done.code == 0, done.err
    file, argv, env = started[0]
    assert (file, argv[1:3]) == (sys.executable, ("-m", "pdserve.plugin.worker"))
    assert argv[-2:] == ("--page-size", "64")
    assert env["PDSERVE_ROLE"] == "decode"
    assert env["PDSERVE_WORKER_ID"] == "mine"
    assert env["PDSERVE_BOOTSTRAP_URL"] == f"http://{address}"
    assert env["PDSERVE_ADVERTISE_HOST"] == "h.example"
    assert env["UNRELATED"] == "kept"
    assert "PDSERVE_PARENT_PID" not in env


def test_two_value_prefill_of_sglang_router() -> None:
    given = ["balance", "--prefill", "http://a:1", "8998", "--prefill", "http://b:1", "none"]
    ours, _ = command_line.split_foreign_flags([*given, "--prefill", "http://c:1", "--port", "30"])
    assert ours == [
        *("balance", "--prefill", "http://a:1 8998", "--prefill", "http://b:1 none"),
        *("--prefill", "http://c:1", "--port", "30"),
    ]
    pairs = [command_line.prefill_pair(ours[i]) for i in (2, 4, 6)]
    assert pairs == [("http://a:1", 8998), ("http://b:1", None), ("http://c:1", None)]
    for given in (["--prefill=http://a:1", "8998"], ["--prefill", "http://a:1,8998"]):
        ours, _ = command_line.split_foreign_flags(["balance", *given])
        assert command_line.prefill_pair(ours[-1].removeprefix("--prefill=")) == ("http://a:1", 8998)
    for text in ("http://a:1 x", "http://a:1,0", "http://a:1 70000"):
        with pytest.raises(ConfigError, match=r"1\.\.65535 or none"):
            command_line.prefill_pair(text)


def test_port_range() -> None:
    config = command_line.bootstrap_config(None, {"port_range": "9000-9010"})
    assert config.port_range == (9000, 9010)
    for bad in ("9000", "9-1", "a-b", "1-70000", ""):
        with pytest.raises(ConfigError, match="--port-range"):
            command_line.port_range(bad)


def test_chat_reports_an_absent_service(run: Run) -> None:
    done = run("chat", "--url", f"http://127.0.0.1:{free_port()}", "hello")
    assert done.code == 1
    assert "error" in done.err.lower()
    assert "Traceback" not in done.err


@pytest.mark.process
def test_service_process_is_light_and_serves() -> None:
    """What ``pdserve bootstrap`` becomes: the same pid, no pydantic, ends cleanly on SIGTERM."""
    port = free_port()
    command = [sys.executable, "-m", "pdserve", "bootstrap", "--port", port, "--log-level", "warning"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            wait_for_health(int(port))
            maps = Path(f"/proc/{process.pid}/maps")
            loaded = maps.read_text() if maps.exists() else ""
            assert "pydantic_core" not in loaded
            assert "pdserve.process.service" in Path(f"/proc/{process.pid}/cmdline").read_text()
        finally:
            process.terminate()
        _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (0, "")


@pytest.mark.process
def test_service_on_a_taken_port_says_so() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        command = [sys.executable, "-m", "pdserve", "bootstrap", "--port", str(server.getsockname()[1])]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("error: ")
    assert "Traceback" not in done.stderr


def wait_for_health(port: int) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1) as answer:
                assert answer.status == 200
                return
        except urllib.error.URLError:
            time.sleep(0.05)
    raise TimeoutError(f"nothing answers on port {port}")


def test_slo_is_read_or_says_what_was_expected(run: Run) -> None:
    cases = {"ttft=2,tpot=0.05": {"slo_ttft_s": 2.0, "slo_tpot_s": 0.05}, " ttft=1.5s ": {"slo_ttft_s": 1.5}}
    cases |= {"": {}}
    for text, settings in cases.items():
        assert command_line.slo_settings(text) == settings
    for text in ("2", "ttft", "ttft=", "ttft=-1", "ttft=nan", "itl=1", "ttft=1;tpot=2"):
        done = run("balance", "--slo", text)
        assert done.code == 2 and "ttft=SECONDS,tpot=SECONDS" in done.err, text


def test_wrong_choice_names_the_known_ones(run: Run) -> None:
    for flag, known in (("--queue-order", "shortest"), ("--log-format", "json"), ("--log-level", "debug")):
        done = run("balance", flag, "sideways")
        assert done.code == 2 and known in done.err and "sideways" in done.err, flag


def test_a_missing_extra_is_one_line_with_the_command_that_installs_it(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pdserve.cli.app.find_spec", lambda name: None)
    for command in (["launch"], ["prefill", "--join", "h:1"], ["decode", "--join", "h:1"]):
        said = f"pdserve {command[0]} needs sglang, of the extra 'engine': pip install 'pdserve[engine]'"
        assert run(*command) == Done(2, "", f"error: {said}\n")
    for name in [name for name in sys.modules if name.startswith("pdserve.sim.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "numpy", None)
    done = run("calibrate", "http://127.0.0.1:1")
    assert (done.code, done.err.count("\n")) == (2, 1) and "pip install 'pdserve[plot]'" in done.err
