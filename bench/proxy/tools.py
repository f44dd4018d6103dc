"""The programs that make the load and answer it: C++ built at first use, Python where there is no compiler.

Both must cost far less than what is measured. The Python ones speak the same
protocol at less than half the speed; the reader is told which ones ran.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent
FLAGS = ("-std=c++17", "-O2")


@dataclass(frozen=True, slots=True)
class Tools:
    """Commands of the mock workers and of the load generator."""

    mock: tuple[str, ...]
    load: tuple[str, ...]
    description: str
    floor: str = ""
    """The balancer that does the least possible (floor.cpp); empty without a compiler."""


def prepare_tools(cache: Path, *, use_python: bool = False) -> Tools:
    """Build what is not built yet, below ``cache``."""
    compiler = None if use_python else shutil.which("g++") or shutil.which("clang++")
    if compiler is not None:
        try:
            mock, load, floor = (str(_build(compiler, name, cache)) for name in ("mock", "load", "floor"))
            return Tools((mock,), (load,), "C++, one thread each", floor)
        except subprocess.CalledProcessError as exc:
            print(f"{compiler} failed, Python instead:\n{exc.stderr}", file=sys.stderr)
    python = sys.executable
    return Tools(
        (python, str(HERE / "py_mock.py")),
        (python, str(HERE / "py_load.py")),
        "Python (no C++ compiler): slower",
    )


def _build(compiler: str, name: str, cache: Path) -> Path:
    sources = [*sorted(HERE.glob("*.hpp")), HERE / f"{name}.cpp"]
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in sources) + repr(FLAGS).encode())
    program = cache / f"{name}-{digest.hexdigest()[:16]}"
    if not program.exists():
        cache.mkdir(parents=True, exist_ok=True)
        half_built = program.with_suffix(f".{os.getpid()}")
        command = [compiler, *FLAGS, "-o", str(half_built), str(HERE / f"{name}.cpp")]
        subprocess.run(command, check=True, capture_output=True, text=True)
        half_built.rename(program)
    return program
