"""How near the page gather and scatter come to the device's own copy, from 1 MB to 1 GB.

Why: a chunk of KV is packed before the network sees it, and unpacked after; each pass must cost next to
nothing. Physics: a copy reads and writes every byte once, so cudaMemcpyDeviceToDevice of as many contiguous
bytes is the ceiling; the aim is 90 % of it from 64 MB up. Below about 50 MB both sides run out of L2, and a
call of a few microseconds is launch-bound. Geometry: Llama-3.1-8B, bfloat16, pages of 16 tokens in random
order, token 0 inside a page; "half" copies as many bytes of heads 4 to 7 only, as between different
tensor-parallel sizes.

Output: a table (sizes in 2^20 bytes, 10^9 bytes of payload a second, median of interleaved rounds, share of
the copy), then one JSON line.

    python bench/gpu/coalesce.py [--rounds 21] [--max-mb 1024] [--cache DIR]
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "cuda" / "dev"))

import torch
from device import KV_HEADS, LlamaCopy, interleaved_seconds, llama_copy, median_gb_s, verify

from pdserve.kv.kernels import KernelLibrary

SIZES_MB = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
AIM, AIM_FROM_MB = 0.90, 64


def main() -> None:
    """Verify, time and print every size."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=21, help="timed rounds per size (default 21)")
    parser.add_argument("--max-mb", type=int, default=1024, help="largest payload, MiB (default 1024)")
    parser.add_argument("--cache", type=Path, help="folder for the built library (default: a temporary one)")
    args = parser.parse_args()
    setup = describe_setup(args.rounds)
    for key, value in setup.items():
        print(f"{key:>12}: {value}")
    with tempfile.TemporaryDirectory() as scratch:
        kernels = KernelLibrary.for_device(args.cache or Path(scratch), torch.cuda.current_device())
        rows = [measure(kernels, mb, args.rounds) for mb in SIZES_MB if mb <= args.max_mb]
    large = [row for row in rows if row["mb"] >= AIM_FROM_MB]
    worst = min((row[f"{name}_share"] for row in large for name in ("gather", "scatter")), default=0.0)
    print(json.dumps({
        "bench": "kv_coalesce", **setup, "worst_share_from_64_mb": worst, "aim": AIM,
        "is_aim_met": worst >= AIM, "rows": rows,
    }))  # fmt: skip


def measure(kernels: KernelLibrary, mb: int, rounds: int) -> dict[str, Any]:
    """One size: all sides in turn within each round. Prints its line."""
    stream = int(torch.cuda.current_stream().cuda_stream)
    full, half = llama_copy(mb * 8, seed=3), llama_copy(mb * 16, seed=3, heads=(4, KV_HEADS))
    for name, copy in (("full", full), ("half", half)):
        verify(copy, launcher(kernels, copy, stream), f"{mb} MB, {name}")
    other = torch.empty_like(full.slab)
    calls: dict[str, Callable[[], Any]] = {
        "copy": lambda: other.copy_(full.slab),
        "gather": lambda: kernels.gather(full.params, stream),
        "scatter": lambda: kernels.scatter(full.params, stream),
        "gather_half": lambda: kernels.gather(half.params, stream),
        "scatter_half": lambda: kernels.scatter(half.params, stream),
    }
    seconds = interleaved_seconds(calls, rounds=rounds, repeats=max(3, min(50, 512 // mb)))
    row: dict[str, Any] = {"mb": mb}
    for name in calls:
        row[f"{name}_gb_s"] = round(median_gb_s(full.num_bytes, seconds[name]), 1)
        row[f"{name}_share"] = round(row[f"{name}_gb_s"] / row["copy_gb_s"], 3)
    shown = "   ".join(f"{name} {row[f'{name}_gb_s']:7.1f} ({row[f'{name}_share']:4.0%})" for name in calls)
    print(f"{mb:5d} MB   {shown}", flush=True)
    return row


def launcher(kernels: KernelLibrary, copy: LlamaCopy, stream: int) -> Callable[[int], None]:
    """``1`` gathers, ``0`` scatters, as :func:`device.verify` wants it."""

    def launch(to_slab: int) -> None:
        (kernels.gather if to_slab else kernels.scatter)(copy.params, stream)

    return launch


def describe_setup(rounds: int) -> dict[str, object]:
    """Device, versions, commit."""
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parent,
    )
    return {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "commit": commit.stdout.strip(),
        "rounds": rounds,
    }


if __name__ == "__main__":
    main()
