"""How scattered a request's pages are after a long churn: SGLang's page allocator against pdserve's.

The same seeded trace on both, as a busy decode server sees it: prompts of
log-normal length (median 150 tokens) arrive as long as a share of the pool stays
free (``--free``), every running request grows page by page, requests end at
random. A request's pages form *runs*; a transfer needs one descriptor per run
that is consecutive on both sides.

    python bench/churn.py [--pages 4096] [--seed 1]
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import numpy as np
import numpy.typing as npt
from common import describe_setup, print_result, print_setup

from pdserve.kv.layout import num_runs

Pages = npt.NDArray[np.int64]

KINDS = ("stock", "segment")
TURNOVERS = 8
"""The pool's pages are given out so many times before anything is measured."""


def make_allocator(kind: str, num_pages: int, page_size: int) -> Any:
    """SGLang's paged allocator as P/D servers use it, or pdserve's."""
    import torch
    from sglang.srt.mem_cache.allocator.paged import PagedTokenToKVPoolAllocator

    from pdserve.plugin.allocator import PdservePagedAllocator

    made = {"stock": PagedTokenToKVPoolAllocator, "segment": PdservePagedAllocator}[kind]
    return made(num_pages * page_size, page_size, torch.float16, "cpu", None, True)


@dataclass
class Churn:
    """One allocator under the trace."""

    allocator: Any
    page_size: int
    rng: np.random.Generator
    free_share: float = 0.05
    rows: list[list[int]] = field(default_factory=list)
    given_out: int = 0
    seconds: dict[str, list[float]] = field(default_factory=lambda: {"alloc": [], "grow": [], "free": []})

    def arrive(self, num_tokens: int) -> list[int] | None:
        """Token slots of a new request, or None while the pool is short."""
        import torch

        zero, length = torch.tensor([0]), torch.tensor([num_tokens])
        begin = time.perf_counter()
        slots = self.allocator.alloc_extend(zero, zero, length, length, torch.tensor([-1]), num_tokens)
        self.seconds["alloc"].append(time.perf_counter() - begin)
        if slots is None:
            return None
        self.given_out += -(-num_tokens // self.page_size)
        return [int(slot) for slot in slots.tolist()]

    def grow(self) -> bool:
        """One decode step of every running request."""
        import torch

        lengths = torch.tensor([len(row) + 1 for row in self.rows])
        begin = time.perf_counter()
        slots = self.allocator.alloc_decode(lengths, lengths, torch.tensor([row[-1] for row in self.rows]))
        self.seconds["grow"].append(time.perf_counter() - begin)
        if slots is None:
            return False
        for row, slot in zip(self.rows, slots.tolist(), strict=True):
            self.given_out += len(row) % self.page_size == 0
            row.append(int(slot))
        return True

    def leave(self, index: int) -> None:
        """A request ends."""
        import torch

        row = self.rows.pop(index)
        begin = time.perf_counter()
        self.allocator.free(torch.tensor(row))
        self.seconds["free"].append(time.perf_counter() - begin)

    def run(self, num_pages: int, turnovers: int) -> None:
        """Until the pool has been given out ``turnovers`` times."""
        limit = num_pages * self.page_size // 4
        while self.given_out < turnovers * num_pages:
            while True:
                wanted = int(min(limit, self.rng.lognormal(5.0, 1.0))) + 1
                if self.allocator.available_size() < wanted + self.free_share * num_pages * self.page_size:
                    break
                row = self.arrive(wanted)
                if row is None:
                    break
                self.rows.append(row)
            if self.rows and not self.grow():
                self.leave(int(self.rng.integers(0, len(self.rows))))
            for index in range(len(self.rows) - 1, -1, -1):
                if self.rng.random() < 0.01:
                    self.leave(index)


def fragmented_pages(
    kind: str,
    num_pages: int,
    page_size: int,
    request_tokens: int,
    *,
    seed: int,
    num_requests: int = 1,
    free_share: float = 0.05,
) -> list[Pages]:
    """What the next requests of ``request_tokens`` get after the churn, one page list each.

    Between them the churn goes on, and each is freed again. Requests end until
    the pool has room for the one that is measured.
    """
    allocator = make_allocator(kind, num_pages, page_size)
    churn = Churn(allocator, page_size, np.random.default_rng(seed), free_share)
    churn.run(num_pages, TURNOVERS)
    found: list[Pages] = []
    while len(found) < num_requests:
        while churn.rows and churn.allocator.available_size() < request_tokens + page_size:
            churn.leave(int(churn.rng.integers(0, len(churn.rows))))
        row = churn.arrive(request_tokens)
        if row is None:
            raise SystemExit(f"a pool of {num_pages} pages cannot hold {request_tokens} tokens")
        found.append(np.array(row[::page_size], dtype=np.int64) // page_size)
        churn.rows.append(row)
        churn.leave(len(churn.rows) - 1)
        churn.run(num_pages, churn.given_out // num_pages + 1)
    return found


def main() -> None:
    """Print runs per request and the cost of a call for both allocators."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--pages", type=int, default=4096, help="pool size (pages of 16 tokens)")
    parser.add_argument("--requests", type=int, default=25, help="measured requests per length (count)")
    parser.add_argument("--free", default="0.15,0.05", help="free shares of the pool to churn at (ratio)")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    setup = describe_setup(pool=f"{options.pages} pages of 16", requests=options.requests, seed=options.seed,
                           turnovers=TURNOVERS)  # fmt: skip
    print_setup(setup)
    rows = []
    print(f"{'free':>5} {'tokens':>7} {'pages':>6}  {'runs stock':>16}  {'runs segment':>16}   (median, p95)")
    shares = [float(text) for text in options.free.split(",")]
    for share, tokens in itertools.product(shares, (500, 1000, 2048, 4000, 8000)):
        row: dict[str, Any] = {"free": share, "tokens": tokens}
        for kind in KINDS:
            lists = fragmented_pages(
                kind, options.pages, 16, tokens, seed=options.seed, num_requests=options.requests
            )
            runs = sorted(num_runs(pages, pages) for pages in lists)
            row[kind] = {"median": median(runs), "p95": runs[int(len(runs) * 0.95)]}
        rows.append(row)
        shown = [f"{row[kind]['median']:.0f}, {row[kind]['p95']}" for kind in KINDS]
        print(f"{share:5.2f} {tokens:7d} {-(-tokens // 16):6d}  {shown[0]:>16}  {shown[1]:>16}")
    cost = {kind: _call_cost(kind, options.pages, options.seed) for kind in KINDS}
    print("\nmedian us a call: " + "; ".join(f"{kind} {cost[kind]}" for kind in KINDS))
    print_result({"bench": "churn", "setup": setup, "rows": rows, "us_per_call": cost})


def _call_cost(kind: str, num_pages: int, seed: int) -> dict[str, float]:
    churn = Churn(make_allocator(kind, num_pages, 16), 16, np.random.default_rng(seed))
    churn.run(num_pages, 3)
    middle: Callable[[list[float]], float] = lambda values: round(median(values) * 1e6, 1)  # noqa: E731
    return {name: middle(values) for name, values in churn.seconds.items() if values}


if __name__ == "__main__":
    main()
