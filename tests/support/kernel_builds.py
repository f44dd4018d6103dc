"""Built kernel libraries of the tests, kept in ``.cache`` of the checkout under a hash of their sources."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from pdserve.kv import kernels

CHECKOUT = Path(__file__).parents[2]
CUDA = CHECKOUT / "cuda"
sys.path.insert(0, str(CUDA / "dev"))

from host import GXX_FLAGS, UBSAN, build_host  # noqa: E402

ARCHS = (80, 90, 100)


def host_library(sanitizer: str = UBSAN) -> Path:
    """The g++ build with ``sanitizer``."""
    return _cached("g++", f"{GXX_FLAGS} {sanitizer}", lambda folder: build_host(folder, sanitizer))


def cuda_library(nvcc: Path) -> Path:
    """The nvcc build for ``ARCHS``, warnings and spills refused."""
    flags = " ".join([*kernels.NVCC_FLAGS, *kernels.STRICT_FLAGS, *map(str, ARCHS)])
    return _cached(str(nvcc), flags, lambda folder: kernels.build(folder, ARCHS, nvcc))


def _cached(compiler: str, flags: str, build: Callable[[Path], Path]) -> Path:
    digest = hashlib.sha256(flags.encode())
    digest.update(subprocess.run([compiler, "--version"], capture_output=True, check=True).stdout)
    sources = [
        CUDA / "dev" / "host.py",
        Path(kernels.__file__),
        *CUDA.glob("coalesce*"),
        *CUDA.rglob("*.cuh"),
    ]
    for path in sorted(sources):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    cache = CHECKOUT / ".cache" / "kernels"
    cache.mkdir(parents=True, exist_ok=True)
    folder = cache / digest.hexdigest()[:16]
    if not folder.is_dir():
        scratch = Path(tempfile.mkdtemp(dir=cache))
        try:
            build(scratch)
            scratch.rename(folder)
        except FileExistsError:  # another process of the same test run was quicker
            pass
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    return next(folder.glob("*.so"))
