"""What a KV transfer costs, by path and by state of the pools: FlowKV's table on this machine.

Physics: a transfer takes alpha * descriptors + bytes / bandwidth. Stock engines
send one descriptor per page, layer, K and V; a fragmented pool gives no
neighbours to merge. Packed pays two more copies of the bytes instead; a segment
allocator makes runs long, so that direct needs few descriptors.

Two processes over NIXL (host memory), the very outbox, inbox and planner that
serve. A row is one request of so many tokens; columns run in turn, round after
round, in one invocation. Times are from submitting the chunk to the decode rank
having every byte in its pages, preparation, packing and unpacking included.

    stock         every page of every region its own descriptor, scattered pages
    merged        direct: neighbours on both sides merged, pages of a churned stock pool (churn.py)
    per layer     packed, one write per region, same pages
    segments      direct, pages of a churned pool under pdserve's segment allocator
    planner       what pdserve does by itself, on the churned stock pool's pages
    planner+seg   what pdserve does by itself, on the churned segment pool's pages
    contiguous    direct, one run: the floor

Rows repeat for each free share of the pool that the churn keeps (``--free``).

    python bench/transfer.py [--geometry embedded|llama8b] [--tokens 500,2048] [--free 0.15,0.05] [--rounds 9]
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections import defaultdict
from dataclasses import dataclass
from statistics import median

import msgspec
import numpy as np
from churn import fragmented_pages
from common import describe_setup, print_result, print_setup

from pdserve.kv.layout import PageIds, num_runs
from pdserve.transfer.plan import Path
from pdserve.transfer.selftest.trial import SendReport, Trial, TrialGeometry
from pdserve.transfer.slots import NUM_SLOTS

GEOMETRIES = {
    # SmolLM2-135M in float16 and Llama-3.1-8B in bfloat16, blocks of 16 tokens.
    "embedded": TrialGeometry(
        num_layers=30, num_pages=2560, page_size=16, num_kv_heads=3, head_bytes=128, slab_bytes=64 << 20
    ),
    "llama8b": TrialGeometry(
        num_layers=32, num_pages=1600, page_size=16, num_kv_heads=8, head_bytes=256, slab_bytes=64 << 20
    ),
}
TOKENS = {"embedded": "500,1000,2048,4000,8000,10000,12000", "llama8b": "500,1000,4000,8000,10000,12000"}

PIECE_BYTES = 2 << 20
"""As pdserve's default on host memory."""


@dataclass(frozen=True)
class Column:
    """One way of sending."""

    pages: str
    path: Path | None
    piece: str = "default"


COLUMNS = {
    "stock": Column("scattered", Path.DIRECT),
    "merged": Column("stock", Path.DIRECT),
    "per layer": Column("stock", Path.PACKED, "region"),
    "packed": Column("stock", Path.PACKED),
    "segments": Column("segment", Path.DIRECT),
    "planner": Column("stock", None),
    "planner+seg": Column("segment", None),
    "contiguous": Column("contiguous", Path.DIRECT),
}


def main() -> None:
    """Print the table and the result line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--geometry", choices=GEOMETRIES, default="embedded")
    parser.add_argument("--tokens", default="", help="comma-separated request lengths (tokens)")
    parser.add_argument("--free", default="0.15,0.05", help="free shares of the churned pools (ratio)")
    parser.add_argument("--rounds", type=int, default=9, help="times each column is measured (count)")
    parser.add_argument("--gpu", type=int, default=-1, help="CUDA device of both pools; -1: host memory")
    parser.add_argument("--seed", type=int, default=7)
    options = parser.parse_args()
    geometry = msgspec.structs.replace(GEOMETRIES[options.geometry], gpu=options.gpu)
    lengths = [int(text) for text in (options.tokens or TOKENS[options.geometry]).split(",")]
    setup = describe_setup(
        geometry=f"{options.geometry}: {geometry.num_layers} layers, {geometry.num_kv_heads} KV heads of "
        f"{geometry.head_bytes} bytes, pages of {geometry.page_size}, {geometry.token_bytes} bytes a token",
        pool=f"{geometry.num_pages} pages a rank, slab {NUM_SLOTS} slots",
        rounds=options.rounds,
        seed=options.seed,
        transport=f"NIXL/UCX {geometry.kind}, two processes",
        copy_gb_s=round(copy_rate_bytes_per_s() / 1e9, 1),
    )
    print_setup(setup)
    shares = [float(text) for text in options.free.split(",")]
    rows = [
        _row(geometry, length, share, options.rounds, options.seed)
        for length, share in itertools.product(lengths, shares)
    ]
    print_result({"bench": "transfer", "setup": setup, "rows": rows, "checks": _checks(rows)})


def _row(geometry: TrialGeometry, tokens: int, free: float, rounds: int, seed: int) -> dict[str, object]:
    count = -(-tokens // geometry.page_size)
    reports: dict[str, list[SendReport]] = defaultdict(list)
    runs: dict[str, list[int]] = defaultdict(list)
    pages = _page_lists(geometry, count, rounds, seed, free)
    nbytes = count * geometry.page_size * geometry.token_bytes
    region_bytes = nbytes // (2 * geometry.num_layers)
    # "per layer" needs slots of a region; as many as pdserve has, so that the others have as many as there.
    slot_bytes = max(PIECE_BYTES, region_bytes)
    geometry = msgspec.structs.replace(geometry, slot_bytes=slot_bytes, slab_bytes=NUM_SLOTS * slot_bytes)
    with Trial(geometry, piece_bytes=PIECE_BYTES) as trial:
        for turn in range(-2, rounds):  # two rounds to warm up: page faults, the planner's laws
            for name, column in COLUMNS.items():
                source, target = pages[column.pages][turn % rounds]
                piece = {"default": PIECE_BYTES, "region": region_bytes}
                report = trial.send(source, target, path=column.path, piece_bytes=piece[column.piece])
                if turn >= 0:
                    reports[name].append(report)
                    runs[name].append(num_runs(source, target))
        costs = trial.link.costs
        law = {
            "alpha_us": round(costs.direct.per_item_s * 1e6, 2),
            "direct_gb_s": round(1e-9 / max(costs.direct.per_byte_s, 1e-15), 1),
            "piece_us": round(costs.packed_law().per_item_s * 1e6, 1),
            "packed_gb_s": round(1e-9 / max(costs.packed_law().per_byte_s, 1e-15), 1),
        }
    print(f"{tokens} tokens, {count} pages, churned at {free:.0%} free, {nbytes / 1e6:.1f} MB; fitted: {law}")
    print(
        f"  {'':12} {'total ms':>9} {'x floor':>8} {'GB/s':>6} {'runs':>6} {'descr.':>7} "
        f"{'plan':>6} {'gather':>7} {'post':>7} {'wait':>7} {'scatter':>8} {'P cpu':>7}"
    )
    floor = median(report.total_s for report in reports["contiguous"])
    columns = {}
    for name, found in reports.items():
        columns[name] = _summary(found, runs[name], nbytes, floor)
        c = columns[name]
        print(
            f"  {name:12} {c['total_ms']:9.2f} {c['x_floor']:8.2f} {c['gb_s']:6.1f} {c['runs']:6.0f} "
            f"{c['descriptors']:7.0f} {c['plan_ms']:6.2f} {c['gather_ms']:7.2f} {c['post_ms']:7.2f} "
            f"{c['wait_ms']:7.2f} {c['scatter_ms']:8.2f} {c['cpu_ms']:7.2f}"
        )
    print(flush=True)
    return {
        "tokens": tokens,
        "free": free,
        "pages": count,
        "mb": round(nbytes / 1e6, 1),
        "law": law,
        "columns": columns,
    }


def _summary(found: list[SendReport], runs: list[int], nbytes: int, floor: float) -> dict[str, float]:
    total = median(report.total_s for report in found)
    middle = {
        name: median(getattr(report.record, name) for report in found)
        for name in ("num_descriptors", "plan_s", "gather_s", "post_s", "wait_s")
    }
    return {
        "total_ms": round(total * 1e3, 3),
        "min_ms": round(min(report.total_s for report in found) * 1e3, 3),
        "x_floor": round(total / floor, 3),
        "gb_s": round(nbytes / total / 1e9, 2),
        "runs": median(runs),
        "descriptors": middle["num_descriptors"],
        "plan_ms": round(middle["plan_s"] * 1e3, 3),
        "gather_ms": round(middle["gather_s"] * 1e3, 3),
        "post_ms": round(middle["post_s"] * 1e3, 3),
        "wait_ms": round(middle["wait_s"] * 1e3, 3),
        "scatter_ms": round(median(report.scatter_s for report in found) * 1e3, 3),
        "cpu_ms": round(median(report.cpu_s for report in found) * 1e3, 3),
        "packed_share": round(sum(report.record.num_packed for report in found) / len(found), 2),
    }


def _page_lists(
    geometry: TrialGeometry, count: int, rounds: int, seed: int, free: float
) -> dict[str, list[tuple[PageIds, PageIds]]]:
    """Per kind of pool, ``rounds`` pairs of page lists for the source and the target side."""
    rng = np.random.default_rng(seed)
    usable = np.arange(1, geometry.num_pages, dtype=np.int32)
    lists: dict[str, list[tuple[PageIds, PageIds]]] = {
        "scattered": [
            (rng.permutation(usable)[:count], rng.permutation(usable)[:count]) for _ in range(rounds)
        ],
        "contiguous": [],
    }
    for turn in range(rounds):
        first = 1 + turn * 7 % max(1, geometry.num_pages - count - 1)
        run = np.arange(first, first + count, dtype=np.int32)
        lists["contiguous"].append((run, run[::1].copy()))
    for kind in ("stock", "segment"):
        sides = [
            fragmented_pages(
                kind, geometry.num_pages - 1, geometry.page_size, count * geometry.page_size,
                seed=seed + side, num_requests=rounds, free_share=free,
            )
            for side in range(2)
        ]  # fmt: skip
        lists[kind] = [
            (ours.astype(np.int32), theirs.astype(np.int32)) for ours, theirs in zip(*sides, strict=True)
        ]
    return lists


def _checks(rows: list[dict[str, object]]) -> list[dict[str, object]]:
    """The figures that the issue's targets are about, per row."""
    checks = []
    for row in rows:
        c = row["columns"]
        assert isinstance(c, dict)
        better = min(c["merged"]["total_ms"], c["packed"]["total_ms"])
        checks.append(
            {
                "tokens": row["tokens"],
                "free": row["free"],
                "stock_x_contiguous": c["stock"]["x_floor"],
                "pdserve_churned_x_contiguous": c["planner+seg"]["x_floor"],
                "packed_x_stock": round(c["packed"]["total_ms"] / c["stock"]["total_ms"], 3),
                "planner_x_better_path": round(c["planner"]["total_ms"] / better, 3),
            }
        )
    return checks


def copy_rate_bytes_per_s(nbytes: int = 256 << 20) -> float:
    """Plain memory copy on this machine, the ceiling of any host transfer."""
    source, target = np.ones(nbytes, dtype=np.uint8), np.zeros(nbytes, dtype=np.uint8)
    times = []
    for _ in range(5):
        begin = time.perf_counter()
        np.copyto(target, source)
        times.append(time.perf_counter() - begin)
    return nbytes / sorted(times)[2]


if __name__ == "__main__":
    main()
