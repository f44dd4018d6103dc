"""The balancers under test: how each is installed, started and known to serve.

    NAME[:POLICY]     pdserve, before, sglang-router, smg, mini_lb, floor; POLICY of the gateways is
                      round_robin unless said, "default" is what they do by themselves

pdserve runs from this checkout with its default settings, everything on; ``before`` is
pdserve of another checkout (--before), for a change's cost. The others run from an
environment of their own, quiet, and otherwise as their documentation starts them.
``floor`` is no balancer but the least that one can do (floor.cpp): what is paid to the
kernel whatever the language. Only where events come faster than they are passed on can
a balancer be below it: they go in fewer writes.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from proxy.mock_fleet import MockFleet, ask
from proxy.processes import Child, free_port
from proxy.prompts import Prompt

PACKAGES = (
    "sglang-router==0.3.2",
    "smg==1.13.0",
    "fastapi",
    "uvicorn",
    "aiohttp",
    "orjson",
    "uvloop",
    "httptools",
)
"""mini_lb, in sglang-router, declares none of its imports; uvloop and httptools make its uvicorn faster."""

START_S = 60.0


class Unavailable(Exception):
    """This balancer cannot be measured here; the message says why."""


@dataclass(frozen=True, slots=True)
class Programs:
    """What runs the balancers: their interpreter, or why there is none, the floor if it was built, and the
    folder of an earlier checkout of pdserve."""

    python: Path
    why_not: str
    floor: str
    before: str = ""

    def find(self, name: str) -> list[str]:
        """The beginning of a balancer's command line. Raises Unavailable."""
        if name == "pdserve":
            return [sys.executable, "-m"]
        if name == "before":
            if not self.before:
                raise Unavailable("no --before FOLDER")
            return ["env", f"PYTHONPATH={self.before}", sys.executable, "-m"]
        if name == "floor":
            if not self.floor:
                raise Unavailable("no C++ compiler")
            return [self.floor]
        if self.why_not:
            raise Unavailable(self.why_not)
        return [str(self.python), "-m"]


@dataclass(frozen=True, slots=True)
class Contender:
    """A balancer to start."""

    name: str
    policy: str = ""

    @classmethod
    def parse(cls, text: str) -> Contender:
        """``NAME`` or ``NAME:POLICY``; raises ValueError for an unknown name."""
        name, _, policy = text.strip().partition(":")
        if name not in COMMANDS:
            raise ValueError(f"unknown balancer {name!r}: one of {', '.join(COMMANDS)}")
        return cls(name, policy or ("round_robin" if name in ("sglang-router", "smg") else ""))

    @property
    def label(self) -> str:
        """As in the tables."""
        return f"{self.name}:{self.policy}" if self.policy else self.name

    def command(self, programs: Programs, fleet: MockFleet, port: int) -> list[str]:
        """Its command line. Raises Unavailable."""
        program = programs.find(self.name)
        command = [*program, *COMMANDS[self.name], "--host", "127.0.0.1", "--port", str(port)]
        for index, prefill in enumerate(fleet.prefill):
            command += ["--prefill", f"http://127.0.0.1:{prefill}", str(9000 + index)]
        for decode in fleet.decode:
            command += ["--decode", f"http://127.0.0.1:{decode}"]
        if self.name in ("sglang-router", "smg"):
            command += ["--prometheus-port", str(free_port()), "--worker-startup-check-interval", "1"]
        if self.policy and self.policy != "default":
            command += ["--policy", self.policy]
        return command


COMMANDS: dict[str, tuple[str, ...]] = {
    "floor": (),
    "pdserve": ("pdserve", "balance", "--log-level", "warning"),
    "before": ("pdserve", "balance", "--log-level", "warning"),
    "sglang-router": ("sglang_router.launch_router", "--pd-disaggregation", "--log-level", "warn"),
    "smg": ("smg", "launch", "--pd-disaggregation", "--log-level", "warn"),
    "mini_lb": ("sglang_router.launch_router", "--pd-disaggregation", "--mini-lb", "--policy", "random"),
}


def prepare_environment(folder: Path) -> Path:
    """The environment's interpreter, made and filled if it is not there. Raises Unavailable."""
    python = folder / "bin" / "python"
    try:
        if not python.exists():
            _run([sys.executable, "-m", "venv", str(folder)])
        if not _has_packages(python):
            uv = shutil.which("uv") or shutil.which("uv", path=str(Path(sys.executable).parent))
            pip = (
                [uv, "pip", "install", "--python", str(python)]
                if uv
                else [str(python), "-m", "pip", "install"]
            )
            print(f"installing {', '.join(PACKAGES)} into {folder}", file=sys.stderr)
            _run([*pip, "--quiet", *PACKAGES])
    except (subprocess.CalledProcessError, OSError) as exc:
        text = getattr(exc, "stderr", None) or str(exc)
        raise Unavailable(f"not installed: {text.strip().splitlines()[-1][:200]}") from exc
    return python


def _has_packages(python: Path) -> bool:
    check = (
        "import sys, importlib.metadata as m\n"
        "for name, _, version in (p.partition('==') for p in sys.argv[1:]):\n"
        "    assert not version or m.version(name) == version, name\n"
        "    m.version(name)\n"
    )
    return (
        subprocess.run([str(python), "-c", check, *PACKAGES], capture_output=True, check=False).returncode
        == 0
    )


def _run(command: list[str]) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True)


@contextmanager
def running(
    contender: Contender, programs: Programs, fleet: MockFleet, core: int, logs: Path
) -> Iterator[Started]:
    """Start it on ``core`` and wait until a request comes through. Raises Unavailable."""
    port = free_port()
    log = logs / f"{contender.label.replace(':', '-')}.log"
    started_s = time.monotonic()
    with Child(contender.command(programs, fleet, port), core, log) as child:
        _wait_serving(child, port, started_s)
        yield Started(contender, child, port, time.monotonic() - started_s)


@dataclass(frozen=True, slots=True)
class Started:
    """A balancer that serves."""

    contender: Contender
    child: Child
    port: int
    start_s: float


def _wait_serving(child: Child, port: int, started_s: float) -> None:
    prompt = Prompt()
    last = "no connection"
    while time.monotonic() < started_s + START_S:
        if child.process.poll() is not None:
            raise Unavailable(f"ended with {child.process.returncode}: {child.last_words}")
        try:
            status, body = ask(port, prompt.render())
        except OSError as exc:
            last = str(exc)
        else:
            if status == 200 and prompt.expected in body:
                return
            last = f"HTTP {status}: {body[:200]}"
        time.sleep(0.1)
    raise Unavailable(f"no right answer within {START_S:g} s, last: {last}; log: {child.last_words}")
