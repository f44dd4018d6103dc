"""What each step of the copy kernel buys: GB/s of every rung of ladder.cu next to the device's own copy.

The ceiling is cudaMemcpyDeviceToDevice of as many contiguous bytes. Every rung is verified before it is
timed. Pool, pages and bytes are those of Llama-3.1-8B (device.py). Ends with one JSON line.

    python cuda/dev/ladder.py [--mb 256] [--rounds 15]      on a GPU
    python cuda/dev/ladder.py --compile-only                anywhere with nvcc
"""

from __future__ import annotations

import argparse
import ctypes
import json
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from pdserve.kv import kernels

CUDA = Path(__file__).resolve().parents[1]


def build_ladder(out_dir: Path, arch: int) -> Path:
    """Compile ladder.cu with the flags of the real library; raises CalledProcessError."""
    out = out_dir / "libladder.so"
    target = f"-gencode=arch=compute_{arch},code=sm_{arch}"
    command = [
        str(kernels.find_nvcc()),
        *kernels.NVCC_FLAGS,
        *kernels.STRICT_FLAGS,
        target,
        f"-I{CUDA / 'include'}",
    ]
    done = subprocess.run(
        [*command, str(CUDA / "dev" / "ladder.cu"), "-o", str(out)],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        sys.stderr.write(done.stdout + done.stderr)
        done.check_returncode()
    return out


def climb(library: ctypes.CDLL, num_tokens: int, rounds: int) -> list[dict[str, object]]:
    """Verify and time every rung both ways; one row each, with the copy it ran beside."""
    import torch
    from device import interleaved_seconds, llama_copy, median_gb_s, verify

    copy = llama_copy(num_tokens, seed=3)
    params = ctypes.byref(kernels._copy_struct(copy.params))
    sms = torch.cuda.get_device_properties(0).multi_processor_count
    stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
    other, rows = torch.empty_like(copy.slab), []
    for index in range(library.ladder_count()):

        def launch(to_slab: int, index: int = index) -> None:
            status = library.ladder_launch(index, params, to_slab, sms, stream)
            assert status == 0, f"rung {index}: cudaError {status}"

        verify(copy, launch, f"rung {index}")
        calls = {
            "gather": lambda: launch(1),
            "scatter": lambda: launch(0),
            "copy": lambda: other.copy_(copy.slab),
        }
        seconds = interleaved_seconds(calls, rounds=rounds, repeats=3)
        rates = {f"{name}_gb_s": round(median_gb_s(copy.num_bytes, s), 1) for name, s in seconds.items()}
        name = library.ladder_name(index).decode()
        rows.append({"rung": name, **rates})
        share = rates["gather_gb_s"] / rates["copy_gb_s"], rates["scatter_gb_s"] / rates["copy_gb_s"]
        sys.stdout.write(
            f"{name:<52} gather {rates['gather_gb_s']:8.1f} GB/s {share[0]:5.0%}   "
            f"scatter {rates['scatter_gb_s']:8.1f} GB/s {share[1]:5.0%}   "
            f"copy {rates['copy_gb_s']:8.1f} GB/s\n"
        )
        sys.stdout.flush()
    return rows


def main() -> None:
    """Compile, and unless told not to, climb."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--mb", type=int, default=256, help="payload in MiB (default 256)")
    parser.add_argument("--rounds", type=int, default=15, help="timed rounds (default 15)")
    parser.add_argument("--compile-only", action="store_true", help="build for 80, 90 and 100, run nothing")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        if args.compile_only:
            for arch in (80, 90, 100):
                build_ladder(Path(scratch), arch)
            sys.stdout.write(json.dumps({"bench": "kv_ladder", "compiled": [80, 90, 100]}) + "\n")
            return
        library = ctypes.CDLL(str(build_ladder(Path(scratch), kernels.device_arch())))
        library.ladder_name.restype = ctypes.c_char_p
        rows = climb(library, args.mb * 8, args.rounds)
    import torch

    result = {"bench": "kv_ladder", "device": torch.cuda.get_device_name(), "mb": args.mb, "rows": rows}
    sys.stdout.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
