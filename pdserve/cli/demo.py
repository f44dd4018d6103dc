"""``make demo``: a fleet of one prefill and one decode server answers one question, then leaves no trace.

    pdserve launch -p 1 -d 1  ──ready──►  openai client asks  ──►  SIGINT  ──►  exit 0, no process left

Every step is checked; the exit status says whether all of them held.
"""

from __future__ import annotations

import argparse
import http.client
import json
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any
from urllib.parse import urlsplit

from pdserve.errors import ConfigError, PdserveError, StartupError, WorkerUnreachable

QUESTION, EXPECTED = "What is the capital of France?", "Paris"
READY_S = 600.0  # imports of two servers on a slow machine are minutes
STOP_S = 90.0
GONE_S = 5.0
"""How long processes of an ended launcher may take to vanish; the kernel kills them with their parent."""
_TAIL_LINES = 40
_POLL_S = 0.5


@dataclass(frozen=True, slots=True)
class DemoAnswer:
    """One streamed answer as the client measured it. ``completion_tokens`` as the service reports usage."""

    text: str
    prompt_tokens: int
    completion_tokens: int
    ttft_s: float
    e2e_s: float

    @property
    def tpot_s(self) -> float:
        """Seconds per token after the first."""
        return (self.e2e_s - self.ttft_s) / max(self.completion_tokens - 1, 1)


@dataclass(frozen=True, slots=True)
class ProcessMark:
    """A process that a reused pid cannot be taken for: ``start_ticks`` is field 22 of /proc/PID/stat."""

    pid: int
    start_ticks: int
    command: str

    @property
    def is_alive(self) -> bool:
        """True unless it ended; a zombie has ended."""
        stat = _read_stat(self.pid)
        return stat is not None and stat[0] not in "ZX" and stat[2] == self.start_ticks


def main(argv: list[str] | None = None) -> int:
    """Run the demo; returns 0 if every step held, 1 if not, 2 if it cannot run here, 130 on Ctrl-C."""
    parser = argparse.ArgumentParser(prog="python -m pdserve.cli.demo", description=__doc__.split("\n")[0])
    parser.add_argument("--port", type=int, default=0, help="port of the service (0: a free one)")
    parser.add_argument("--model", default="", help="MODEL to serve (default: the embedded model)")
    args = parser.parse_args(argv)
    try:
        ask = _openai_asker()
    except ConfigError as exc:
        print(f"error: {exc}", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory(prefix="pdserve-demo-") as folder:
        log = Path(folder) / "launch.log"
        try:
            port = args.port or _free_port()
            run_demo(launch_argv(port, args.model), port, log, ask)
            return 0
        except PdserveError as exc:
            print(f"\nFAILED: {exc}\n--- last lines of the launcher ---\n{_tail(log)}", file=sys.stderr)
            return 1
        except KeyboardInterrupt:
            return 130


def launch_argv(port: int, model: str) -> list[str]:
    """The command the demo shows: one prefill and one decode server behind ``port``."""
    command = ["launch", *([model] if model else []), "-p", "1", "-d", "1", "--port", str(port)]
    return [sys.executable, "-m", "pdserve", *command]


def run_demo(argv: list[str], port: int, log: Path, ask: Callable[[str], DemoAnswer]) -> None:
    """Start ``argv`` with its output in ``log``, ask through ``ask(url)``, stop it and check each step.

    Raises:
        PdserveError: at the first step that does not hold; the launcher has been stopped by then.
    """
    url = f"http://127.0.0.1:{port}"
    print(f"$ pdserve {' '.join(argv[3:])}", flush=True)
    with log.open("wb") as output:
        launcher = _start(argv, output)
        try:
            started = time.monotonic()
            _wait_ready(launcher, port)
            print(f"ready after {time.monotonic() - started:.0f} s at {url}\n", flush=True)
            before = _kv_bytes_sent(port)
            answer = ask(url)
            _print_answer(answer, _recent_request(port), _kv_bytes_sent(port, more_than=before) - before)
            if EXPECTED not in answer.text:
                raise StartupError(f"the answer lacks {EXPECTED!r}: {answer.text!r}")
            _stop_cleanly(launcher)
        finally:
            _end(launcher)


def _start(argv: list[str], output: IO[bytes]) -> subprocess.Popen[bytes]:
    # Own session: Ctrl-C in the terminal reaches only the demo, which then stops the launcher once.
    return subprocess.Popen(
        argv, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
    )


def _wait_ready(launcher: subprocess.Popen[bytes], port: int) -> None:
    """Poll the state document until every pair is ready; prints each change."""
    deadline, shown = time.monotonic() + READY_S, ""
    while time.monotonic() < deadline:
        if (status := launcher.poll()) is not None:
            raise StartupError(f"the launcher ended with status {status} before the fleet was ready")
        with suppress(OSError, http.client.HTTPException, ValueError):
            state = _state(port)
            if (line := _progress_line(state)) != shown:
                print(f"  {line}", flush=True)
                shown = line
            pairs = state.get("pairs") or []
            if pairs and all(pair.get("state") == "ready" for pair in pairs):
                return
        time.sleep(_POLL_S)
    raise StartupError(f"the fleet was not ready within {READY_S:.0f} s; last seen: {shown or 'no state'}")


def _progress_line(state: Mapping[str, Any]) -> str:
    workers = [f"{worker.get('worker_id')} {worker.get('state')}" for worker in state.get("workers") or []]
    pairs = [
        f"{pair.get('prefill')}>{pair.get('decode')} {pair.get('state')}" for pair in state.get("pairs") or []
    ]
    return " · ".join(workers + pairs) or "balancer is up, no worker yet"


def _state(port: int) -> dict[str, Any]:
    return _get_json("127.0.0.1", port, "/pdserve/state")


def _get_json(host: str, port: int, path: str) -> dict[str, Any]:
    connection = http.client.HTTPConnection(host, port, timeout=5)
    try:
        connection.request("GET", path)
        response = connection.getresponse()
        document = json.loads(response.read())
        if response.status != 200 or not isinstance(document, dict):
            raise ValueError(f"{path} answered {response.status}")
        return document
    finally:
        connection.close()


def _recent_request(port: int) -> Mapping[str, Any]:
    """The service's own record of the request; it may be filed a moment after the last byte."""
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline:
        with suppress(OSError, http.client.HTTPException, ValueError):
            if recent := _state(port).get("recent"):
                return dict(recent[-1])
        time.sleep(0.1)
    return {}


def _kv_bytes_sent(port: int, more_than: int = -1) -> int:
    """KV bytes the prefill servers have sent over NIXL so far, by their own count."""
    deadline, total = time.monotonic() + 5, 0
    while time.monotonic() < deadline:
        with suppress(OSError, http.client.HTTPException, ValueError):
            urls = [w["url"] for w in _state(port).get("workers") or [] if w.get("role") == "prefill"]
            addresses = [urlsplit(url) for url in urls]
            counts = [_get_json(a.hostname or "", a.port or 80, "/pdserve/instance") for a in addresses]
            total = sum(count["transfer"]["kv_bytes"] for count in counts)
            if total > more_than:
                break
        time.sleep(0.1)
    return total


def _print_answer(answer: DemoAnswer, record: Mapping[str, Any], kv_bytes: int) -> None:
    moved = f"{kv_bytes / 1e6:.2f} MB" if kv_bytes else "not reported"
    print(f"  Q  {QUESTION}\n  A  {answer.text}\n")
    print(f"  pair            {record.get('pair') or 'not reported'}")
    print(f"  KV over NIXL    {moved} for {answer.prompt_tokens} prompt tokens")
    print(
        f"  TTFT            {answer.ttft_s:.3f} s, from sending the request to the first text, at the client"
    )
    after = answer.completion_tokens - 1
    print(f"  TPOT            {answer.tpot_s * 1000:.0f} ms, mean of the {after} tokens after it\n")


def _openai_asker() -> Callable[[str], DemoAnswer]:
    """Import the client before anything is started.

    Raises:
        ConfigError: if it is not installed.
    """
    try:
        import openai
    except ImportError as exc:
        raise ConfigError("the demo needs the openai client: pip install 'pdserve[demo]'") from exc

    def ask(url: str) -> DemoAnswer:
        # trust_env=False: a proxy named in the environment must not see a request to 127.0.0.1.
        http_client = openai.DefaultHttpxClient(trust_env=False)
        with openai.OpenAI(
            base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=600, http_client=http_client
        ) as client:
            try:
                return _stream_answer(client)
            except openai.OpenAIError as exc:
                raise WorkerUnreachable(url, f"the request failed: {exc}") from exc

    return ask


def _stream_answer(client: Any) -> DemoAnswer:
    model = client.models.list().data[0].id
    started = time.monotonic()
    stream = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": QUESTION}],
        max_tokens=32,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    )
    text, first, last, usage = "", 0.0, started, None
    for chunk in stream:
        piece = (chunk.choices[0].delta.content or "") if chunk.choices else ""
        usage = chunk.usage or usage
        if piece:
            last = time.monotonic()
            first = first or last
            text += piece
    return DemoAnswer(
        text=text,
        prompt_tokens=usage.prompt_tokens if usage else 0,
        completion_tokens=usage.completion_tokens if usage else 0,
        ttft_s=(first or last) - started,
        e2e_s=last - started,
    )


def _stop_cleanly(launcher: subprocess.Popen[bytes]) -> None:
    """SIGINT, then check: exit status 0 and none of the launcher's descendants alive."""
    family = descendants(launcher.pid)
    print(f"SIGINT to the launcher; it has {len(family)} processes below it")
    started = time.monotonic()
    launcher.send_signal(signal.SIGINT)
    try:
        status = launcher.wait(STOP_S)
    except subprocess.TimeoutExpired as exc:
        raise StartupError(f"the launcher did not end within {STOP_S:.0f} s of SIGINT") from exc
    if status != 0:
        raise StartupError(f"the launcher ended with status {status} after SIGINT, expected 0")
    deadline = time.monotonic() + GONE_S
    while (left := [mark for mark in family if mark.is_alive]) and time.monotonic() < deadline:
        time.sleep(0.05)
    if left:
        names = ", ".join(f"{mark.pid} ({mark.command})" for mark in left)
        raise StartupError(f"processes outlived the launcher: {names}")
    print(f"launcher exited 0 after {time.monotonic() - started:.1f} s, no process left")


def _end(launcher: subprocess.Popen[bytes]) -> None:
    """Whatever happened: no launcher survives the demo. Asks first, then kills."""
    for number, limit_s in ((signal.SIGINT, STOP_S), (signal.SIGKILL, 10.0)):
        if launcher.poll() is not None:
            return
        launcher.send_signal(number)
        with suppress(subprocess.TimeoutExpired):
            launcher.wait(limit_s)


def descendants(pid: int) -> list[ProcessMark]:
    """Every live process below ``pid``, from one scan of /proc; empty where there is no /proc."""
    children: dict[int, list[ProcessMark]] = {}
    for entry in Path("/proc").glob("[0-9]*"):
        if stat := _read_stat(int(entry.name)):
            mark = ProcessMark(int(entry.name), stat[2], stat[3])
            children.setdefault(stat[1], []).append(mark)
    found: list[ProcessMark] = []
    queue = [pid]
    while queue:
        below = children.get(queue.pop(), [])
        found += below
        queue += [mark.pid for mark in below]
    return found


def _read_stat(pid: int) -> tuple[str, int, int, str] | None:
    """``(state, parent pid, start ticks, command)`` of a process, None if it is gone."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    command = text[text.index("(") + 1 : text.rindex(")")]  # may itself hold spaces and parentheses
    fields = text[text.rindex(")") + 2 :].split()
    return fields[0], int(fields[1]), int(fields[19]), command


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def _tail(log: Path) -> str:
    try:
        lines = log.read_text(errors="replace").splitlines()
    except OSError:
        return "(no output)"
    return "\n".join(lines[-_TAIL_LINES:]) or "(no output)"


if __name__ == "__main__":
    sys.exit(main())
