"""The demo script against a stand-in launcher: it passes when all holds and says which step does not."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from pdserve.cli import demo
from pdserve.errors import PdserveError

pytestmark = pytest.mark.process

LAUNCHER = """
import json, signal, subprocess, sys, threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

port, text, fault = int(sys.argv[1]), sys.argv[2], sys.argv[3]
if fault == "start":
    sys.exit("the model is broken")
child = subprocess.Popen(["sleep", "60"], start_new_session=True)
polls = answers = 0

class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        global polls
        polls += 1
        state = "ready" if polls > 1 else "probing"
        self.answer("application/json", json.dumps({
            "data": [{"id": "toy"}],
            "workers": [{"worker_id": "prefill-0", "state": "ready", "role": "prefill",
                         "url": f"http://127.0.0.1:{port}"}],
            "pairs": [{"prefill": "prefill-0", "decode": "decode-0", "state": state}],
            "recent": [{"pair": "prefill-0>decode-0"}],
            "transfer": {"kv_bytes": 500_000 + answers * 2_000_000},
        }))

    def do_POST(self):
        global answers
        answers += 1
        self.rfile.read(int(self.headers["Content-Length"]))
        def event(choices, usage=None):
            chunk = {"id": "x", "object": "chat.completion.chunk", "created": 1, "model": "toy"}
            return "data: " + json.dumps(chunk | {"choices": choices, "usage": usage}) + "\\n\\n"
        pieces = [event([{"index": 0, "delta": {"content": word + " "}}]) for word in text.split()]
        usage = event([], {"prompt_tokens": 37, "completion_tokens": 8, "total_tokens": 45})
        self.answer("text/event-stream", "".join([*pieces, usage, "data: [DONE]\\n\\n"]))

    def answer(self, kind, body):
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body.encode())))
        self.end_headers()
        self.wfile.write(body.encode())

    def log_message(self, *args):
        pass

def stop(*_):
    if fault == "orphan":
        print(f"orphan {child.pid}", flush=True)
    else:
        child.kill()
        child.wait()
    sys.exit(3 if fault == "status" else 0)

server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
threading.Thread(target=server.serve_forever, daemon=True).start()
signal.signal(signal.SIGINT, stop)
while True:
    signal.pause()
"""


def _run(folder: Path, text: str = "The capital of France is Paris.", fault: str = "") -> Path:
    pytest.importorskip("openai", reason="the demo's client is in the extra 'demo'")
    script, log, port = folder / "launcher.py", folder / "launch.log", demo.free_port()
    script.write_text(LAUNCHER)
    argv = [sys.executable, str(script), str(port), text, fault]
    demo.run_demo(argv, port, log)
    return log


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "GONE_S", 0.2)
    monkeypatch.setattr(demo, "_POLL_S", 0.02)


def test_demo_prints_answer_pair_bytes_and_leaves_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _run(tmp_path)

    out = capsys.readouterr().out
    assert "A  The capital of France is Paris." in out
    assert "prefill-0>decode-0" in out
    assert "2.00 MB" in out
    assert "TTFT" in out and "ms for each piece" in out
    assert "it has 1 processes below it" in out
    assert "no process left" in out


def test_demo_names_the_step_that_fails(tmp_path: Path) -> None:
    for fault, text, message in (
        ("start", "Paris", "ended with status 1 before the fleet was ready"),
        ("", "It is Lyon.", "the answer lacks 'Paris': 'It is Lyon. '"),
        ("status", "Paris", "ended with status 3 after SIGINT, expected 0"),
    ):
        with pytest.raises(PdserveError, match=message):
            _run(tmp_path, text, fault)


def test_demo_finds_a_process_that_outlives_the_launcher(tmp_path: Path) -> None:
    with pytest.raises(PdserveError, match=r"processes outlived the launcher: \d+ \(sleep\)"):
        _run(tmp_path, fault="orphan")
    orphan = (tmp_path / "launch.log").read_text().split()[-1]
    subprocess.run(["kill", orphan], check=True)


def test_missing_client_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(demo, "find_spec", lambda name: None)
    assert demo.main() == 2
    assert "pip install 'pdserve[engine,demo]'" in capsys.readouterr().err
