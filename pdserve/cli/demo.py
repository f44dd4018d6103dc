"""``make demo``: one prefill and one decode server answer one question, then leave no process behind.

    pdserve launch -p 1 -d 1  ──ready──►  openai client asks  ──►  SIGINT  ──►  exit 0, no process left

Every step is checked; the exit status is 0 if all of them held, 1 if not, 2 if the demo cannot run here.
"""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from pdserve.errors import PdserveError, StartupError, WorkerError
from pdserve.state.client import StateClient

QUESTION, EXPECTED = "What is the capital of France?", "Paris"
READY_S = 600.0  # imports of two servers on a slow machine are minutes
STOP_S = 90.0
GONE_S = 5.0
"""How long processes of an ended launcher may take to vanish; the kernel kills them with their parent."""
_POLL_S = 0.5


def main() -> int:
    """Run the demo, with the MODEL named on the command line if there is one; returns its exit status."""
    missing = [name for name in ("openai", "psutil") if find_spec(name) is None]
    if missing:
        print(f"error: the demo needs {missing[0]}: pip install 'pdserve[engine,demo]'", file=sys.stderr)
        return 2
    port = free_port()
    argv = ["launch", *sys.argv[1:2], "-p", "1", "-d", "1", "--port", str(port)]
    with tempfile.TemporaryDirectory(prefix="pdserve-demo-") as folder:
        log = Path(folder) / "launch.log"
        try:
            run_demo([sys.executable, "-m", "pdserve", *argv], port, log)
            return 0
        except PdserveError as exc:
            tail = "\n".join(log.read_text(errors="replace").splitlines()[-40:]) or "(no output)"
            print(f"\nFAILED: {exc}\n--- last lines of the launcher ---\n{tail}", file=sys.stderr)
            return 1
        except KeyboardInterrupt:
            return 130


def run_demo(argv: list[str], port: int, log: Path) -> None:
    """Start ``argv`` with its output in ``log``, ask one question, stop it and check each step.

    Raises:
        PdserveError: at the first step that does not hold; the launcher has been stopped by then.
    """
    url = f"http://127.0.0.1:{port}"
    print(f"$ pdserve {' '.join(argv[3:])}", flush=True)
    with log.open("wb") as output:
        # Own session: Ctrl-C in the terminal reaches only the demo, which then stops the launcher once.
        launcher = subprocess.Popen(argv, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)
    try:
        started = time.monotonic()
        _wait_ready(launcher, url)
        print(f"ready after {time.monotonic() - started:.0f} s at {url}\n", flush=True)
        before = _kv_bytes_sent(url)
        answer = _ask(url)
        moved = _until(lambda: _kv_bytes_sent(url) - before)
        recent = _until(lambda: StateClient(url).fetch().recent)
        print(f"  Q  {QUESTION}\n  A  {answer}\n\n  pair            {recent[-1].pair if recent else '?'}")
        print(f"  KV over NIXL    {moved / 1e6:.2f} MB\n")
        if EXPECTED not in answer:
            raise StartupError(f"the answer lacks {EXPECTED!r}: {answer!r}")
        _stop_cleanly(launcher)
    finally:
        for number, limit_s in ((signal.SIGINT, STOP_S), (signal.SIGKILL, 10.0)):
            if launcher.poll() is None:
                launcher.send_signal(number)
                with suppress(subprocess.TimeoutExpired):
                    launcher.wait(limit_s)


def free_port() -> int:
    """A port of the loopback address that nothing listens on."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def _wait_ready(launcher: subprocess.Popen[bytes], url: str) -> None:
    """Poll the state document until every pair is ready; prints each change."""
    deadline, shown = time.monotonic() + READY_S, ""
    while time.monotonic() < deadline:
        if (status := launcher.poll()) is not None:
            raise StartupError(f"the launcher ended with status {status} before the fleet was ready")
        with suppress(WorkerError):
            state = StateClient(url).fetch()
            stages = [f"{worker.worker_id} {worker.state}" for worker in state.workers]
            stages += [f"{pair.label} {pair.state}" for pair in state.pairs]
            if (line := " · ".join(stages) or "balancer is up, no worker yet") != shown:
                print(f"  {line}", flush=True)
                shown = line
            if state.pairs and all(pair.state == "ready" for pair in state.pairs):
                return
        time.sleep(_POLL_S)
    raise StartupError(f"the fleet was not ready within {READY_S:.0f} s; last seen: {shown or 'no state'}")


def _kv_bytes_sent(url: str) -> int:
    """KV bytes that the prefill servers have sent over NIXL so far, by their own count."""
    workers = StateClient(url).fetch().workers
    instances = [_get(worker.url, "/pdserve/instance") for worker in workers if worker.role == "prefill"]
    return sum(int(instance["transfer"]["kv_bytes"]) for instance in instances)


def _until(read: Callable[[], Any]) -> Any:
    """What ``read`` returns as soon as that is true; figures may follow an answer's last byte."""
    deadline = time.monotonic() + 5
    while not (value := read()) and time.monotonic() < deadline:
        time.sleep(0.1)
    return value


def _get(url: str, path: str) -> Any:
    # No proxy: one named in the environment must not see a request to 127.0.0.1.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(url + path, timeout=5) as response:
        return json.loads(response.read())


def _ask(url: str) -> str:
    """The answer to QUESTION, streamed by the openai client; prints TTFT and TPOT as measured there."""
    import openai

    http_client = openai.DefaultHttpxClient(trust_env=False)
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, http_client=http_client)
    times, pieces = [time.monotonic()], []
    try:
        model = client.models.list().data[0].id
        question: Any = [{"role": "user", "content": QUESTION}]
        for chunk in client.chat.completions.create(
            model=model, messages=question, max_tokens=32, temperature=0, stream=True
        ):
            if piece := (chunk.choices[0].delta.content or "") if chunk.choices else "":
                times.append(time.monotonic())
                pieces.append(piece)
    except openai.OpenAIError as exc:
        raise StartupError(f"the request failed: {exc}") from exc
    if pieces:
        tpot_ms = (times[-1] - times[1]) / max(len(pieces) - 1, 1) * 1000
        print(f"  TTFT {times[1] - times[0]:.3f} s, then {tpot_ms:.0f} ms for each piece, at the client")
    return "".join(pieces)


def _stop_cleanly(launcher: subprocess.Popen[bytes]) -> None:
    """SIGINT, then check: exit status 0 and none of the launcher's descendants alive."""
    import psutil

    family = psutil.Process(launcher.pid).children(recursive=True)
    print(f"SIGINT to the launcher; it has {len(family)} processes below it")
    started = time.monotonic()
    launcher.send_signal(signal.SIGINT)
    try:
        status = launcher.wait(STOP_S)
    except subprocess.TimeoutExpired as exc:
        raise StartupError(f"the launcher did not end within {STOP_S:.0f} s of SIGINT") from exc
    if status != 0:
        raise StartupError(f"the launcher ended with status {status} after SIGINT, expected 0")
    _, alive = psutil.wait_procs(family, timeout=GONE_S)
    left = []
    for process in alive:
        with suppress(psutil.NoSuchProcess):  # a zombie has ended
            if process.status() != psutil.STATUS_ZOMBIE:
                left.append(f"{process.pid} ({process.name()})")
    if left:
        raise StartupError(f"processes outlived the launcher: {', '.join(left)}")
    print(f"launcher exited 0 after {time.monotonic() - started:.1f} s, no process left")


if __name__ == "__main__":
    sys.exit(main())
