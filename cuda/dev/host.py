"""The kernels on a CPU: coalesce_host.cpp built by g++ with UBSan, and calls on a case's own buffers."""

from __future__ import annotations

import ctypes
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
from cases import GUARD, Case, random_case

from pdserve.kv.kernels import CopyParams, KernelLibrary

CUDA = Path(__file__).parents[1]
GXX_FLAGS = "-std=c++17 -O1 -g -Wall -Wextra -Wconversion -Werror -fPIC -shared"
UBSAN = "-fsanitize=undefined -fsanitize-recover=undefined"
"""Recovering: a finding goes to stderr and fails its test, instead of ending the process."""
ORDERS = {"forward": 0, "reversed": 1, "shuffled": 2}


class HostKernels(KernelLibrary):
    """The g++ build, with the knobs that only it has."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.raw = self._library
        self.raw.pdserve_host_launch.argtypes = [ctypes.c_int64] * 3
        self.raw.pdserve_host_vector_bytes.restype = ctypes.c_int64

    def launch_as(self, order: str, seed: int = 0, num_threads: int = 32) -> None:
        """How the next launches run their lanes: ``ORDERS``, the shuffle's seed, and threads per block."""
        self.raw.pdserve_host_launch(ORDERS[order], seed, num_threads)


def build_host(out_dir: Path, sanitizer: str = UBSAN) -> Path:
    """Compile the host library into ``out_dir``; AssertionError carries the compiler's output."""
    out = out_dir / "libpdserve_kv_host.so"
    command = [
        "g++",
        *GXX_FLAGS.split(),
        *sanitizer.split(),
        f"-I{CUDA / 'include'}",
        str(CUDA / "coalesce_host.cpp"),
    ]
    done = subprocess.run([*command, "-o", str(out)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return out


def run_case(call: Callable[[CopyParams, int], None], case: Case, **changes: int) -> None:
    """Call one export on the case's own buffers, in place."""
    pointers = np.array([p.ctypes.data + GUARD for p in case.pools], np.uint64)
    slab = case.slab.ctypes.data + GUARD
    call(replace(case.params(pointers.ctypes.data, case.page_ids.ctypes.data, slab), **changes), 0)


def main() -> None:
    """Copy the first 100 cases both ways with the library named: a child process for AddressSanitizer."""
    library = HostKernels(Path(sys.argv[1]))
    for seed in range(100):
        library.launch_as("forward", num_threads=(1, 7, 32, 128)[seed % 4])
        case = random_case(seed)
        run_case(library.gather, case)
        run_case(library.scatter, case)
    sys.stdout.write("100 cases\n")


if __name__ == "__main__":
    main()
