"""A few copies of every kind, for compute-sanitizer: every vector width, both verbs, verified.

    compute-sanitizer --tool memcheck python bench/gpu/check.py LIBRARY_FOLDER [--cases 60]

Small on purpose: a sanitizer slows a kernel a hundredfold. Set PYTORCH_NO_CUDA_MEMORY_CACHING=1, or torch's
allocator hides reads beyond a buffer from memcheck. Exits 1 at the first wrong byte.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "cuda" / "dev"))

import numpy as np
import torch
from cases import inner, random_case
from device import DeviceCase, llama_copy, verify
from reference import gather, scatter

from pdserve.kv.kernels import KernelLibrary


def check_copy(kernels: KernelLibrary, seed: int, stream: int) -> None:
    """Gather one random case, then scatter it back over a cleared slab's complement."""
    case = random_case(seed)
    on_device, slab = DeviceCase(case), case.slab.copy()
    pools = [inner(pool) for pool in case.pools]
    gather(case.geometry, pools, case.page_ids, inner(slab))
    kernels.gather(on_device.params, stream)
    assert np.array_equal(on_device.slab.bytes(), slab), f"gather, seed {seed}"
    np.invert(slab, out=slab)
    on_device.slab.view.copy_(torch.from_numpy(slab))
    scatter(case.geometry, pools, case.page_ids, inner(slab))
    kernels.scatter(on_device.params, stream)
    for pool, expected in zip(on_device.pools, case.pools, strict=True):
        assert np.array_equal(pool.bytes(), expected), f"scatter, seed {seed}"


def main() -> None:
    """Run the cases with the library in the folder named, built there if missing."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path, help="cache folder of the library")
    parser.add_argument("--cases", type=int, default=60, help="random copies (default 60)")
    args = parser.parse_args()
    torch.cuda.init()
    kernels = KernelLibrary.for_device(args.folder, torch.cuda.current_device())
    stream = int(torch.cuda.current_stream().cuda_stream)
    for seed in range(args.cases):
        check_copy(kernels, seed, stream)
    copy = llama_copy(33, seed=1)
    verify(
        copy, lambda to_slab: (kernels.gather if to_slab else kernels.scatter)(copy.params, stream), "llama"
    )
    print(f"check: {args.cases} copies and a Llama pool are right")


if __name__ == "__main__":
    main()
