"""How scattered a request's pages are after a long churn: SGLang's page allocator against pdserve's.

The same seeded trace on both. ``decode``: prompts of log-normal length (median
150 tokens) arrive as long as a share of the pool stays free (``--free``), every
running request grows token by token, requests end at random. ``prefill``:
conversations go on turn by turn in chunks of 2048 tokens, whole pages stay
cached, and the least recently used conversation loses its last turn when the
pool is short of that share. A request's pages form *runs*; a transfer needs one
descriptor per run that is consecutive on both sides.

``segment-gpu`` is pdserve's allocator as it behaves on a GPU, where a growing
request's last page is not known; it runs on the CPU here.

    python bench/churn.py [--pages 4096] [--seed 1]
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections import OrderedDict
from dataclasses import dataclass, field
from statistics import mean, median
from typing import Any

import numpy as np
import numpy.typing as npt
from common import describe_setup, print_result, print_setup

from pdserve.kv.allocator import SegmentAllocator
from pdserve.kv.layout import num_runs

Pages = npt.NDArray[np.int64]

KINDS = ("stock", "segment", "segment-gpu")
TRACES = ("decode", "prefill")
LENGTHS = (500, 1000, 2048, 4000, 8000)
TURNOVERS = 8
"""The pool's pages are given out so many times before anything is measured."""
CHUNK_TOKENS = 2048
CONVERSATIONS = 200


def make_allocator(kind: str, num_pages: int, page_size: int) -> Any:
    """SGLang's paged allocator as P/D servers use it, or pdserve's."""
    import torch
    from sglang.srt.mem_cache.allocator.paged import PagedTokenToKVPoolAllocator

    from pdserve.plugin.kv_pool import PdservePagedAllocator

    class AsOnGpu(PdservePagedAllocator):
        _is_host = False

        def _upload(self, pages: Pages) -> torch.Tensor:
            return torch.from_numpy(pages)

        def _record_event(self, stream: Any) -> Any:
            return Passed()

    class Passed:
        def query(self) -> bool:
            return True

    classes = {"stock": PagedTokenToKVPoolAllocator, "segment": PdservePagedAllocator, "segment-gpu": AsOnGpu}
    return classes[kind](num_pages * page_size, page_size, torch.float16, "cpu", None, True)


@dataclass
class Row:
    """One request: its pages in order and its tokens."""

    pages: list[int]
    num_tokens: int

    def last_slot(self, page_size: int) -> int:
        """Where its last token lies; -1 without one."""
        return self.pages[-1] * page_size + (self.num_tokens - 1) % page_size if self.num_tokens else -1


@dataclass
class Churn:
    """One allocator under the decode trace."""

    allocator: Any
    num_pages: int
    page_size: int
    rng: np.random.Generator
    free_share: float = 0.05
    rows: list[Row] = field(default_factory=list)
    given_out: int = 0
    whole_runs: list[int] = field(default_factory=list)
    seconds: dict[str, list[float]] = field(default_factory=lambda: {"alloc": [], "grow": [], "free": []})

    def extend(self, row: Row, num_tokens: int) -> bool:
        """So many tokens more for one request; False while the pool is short."""
        import torch

        before, after = torch.tensor([row.num_tokens]), torch.tensor([row.num_tokens + num_tokens])
        last = torch.tensor([row.last_slot(self.page_size)])
        begin = time.perf_counter()
        slots = self.allocator.alloc_extend(before, before, after, after, last, num_tokens)
        self.seconds["alloc"].append(time.perf_counter() - begin)
        if slots is None:
            return False
        # Slots that begin a page, counted from where the row ends now.
        pages = slots[-row.num_tokens % self.page_size :: self.page_size] // self.page_size
        row.pages += pages.tolist()
        row.num_tokens += num_tokens
        self.given_out += len(pages)
        return True

    def grow(self) -> bool:
        """One decode step of every running request."""
        import torch

        size = self.page_size
        lengths = torch.tensor([row.num_tokens + 1 for row in self.rows])
        lasts = torch.tensor([row.last_slot(size) for row in self.rows])
        begin = time.perf_counter()
        slots = self.allocator.alloc_decode(lengths, lengths, lasts)
        self.seconds["grow"].append(time.perf_counter() - begin)
        if slots is None:
            return False
        for row, slot in zip(self.rows, slots.tolist(), strict=True):
            if row.num_tokens % size == 0:
                row.pages.append(slot // size)
                self.given_out += 1
            row.num_tokens += 1
        return True

    def release(self, pages: list[int]) -> None:
        """Whole pages go back."""
        import torch

        freed = torch.tensor(pages)
        begin = time.perf_counter()
        self.allocator.free_page_ids(freed)
        self.seconds["free"].append(time.perf_counter() - begin)

    def has_room(self, num_tokens: int) -> bool:
        """Whether so much can come in with the free share left."""
        spare = self.free_share * self.num_pages * self.page_size
        return bool(self.allocator.available_size() >= num_tokens + self.page_size + spare)

    def evict(self) -> bool:
        """Somebody leaves; False when nobody is left."""
        if not self.rows:
            return False
        row = self.rows.pop(int(self.rng.integers(0, len(self.rows))))
        self.whole_runs.append(_runs(row.pages))
        self.release(row.pages)
        return True

    def step(self) -> None:
        """Arrivals while there is room, one token for everybody, departures."""
        limit = self.num_pages * self.page_size // 4
        while self.has_room(wanted := int(min(limit, self.rng.lognormal(5.0, 1.0))) + 1):
            row = Row([], 0)
            if not self.extend(row, wanted):
                break
            self.rows.append(row)
        if self.rows and not self.grow():
            self.evict()
        for _ in range(int(self.rng.binomial(len(self.rows), 0.01))):
            self.evict()

    def run(self, num_pages: int) -> None:
        """Until so many pages more are given out."""
        goal = self.given_out + num_pages
        while self.given_out < goal:
            self.step()

    def measure(self, num_tokens: int) -> Pages:
        """The pages a new request of ``num_tokens`` gets now; they are free again afterwards."""
        while self.allocator.available_size() < num_tokens + self.page_size:
            if not self.evict():
                raise SystemExit(f"a pool of {self.num_pages} pages cannot hold {num_tokens} tokens")
        row = Row([], 0)
        assert self.extend(row, num_tokens)
        self.release(row.pages)
        return np.array(row.pages, dtype=np.int64)


@dataclass
class CacheChurn(Churn):
    """One allocator under the prefill trace: a prefix cache of conversations, least recently used first."""

    cached: OrderedDict[int, list[Row]] = field(default_factory=OrderedDict)

    def evict(self) -> bool:
        """The oldest conversation loses its last turn: the leaf of its branch."""
        if not self.cached:
            return False
        oldest = next(iter(self.cached))
        self.release(self.cached[oldest].pop().pages)
        if not self.cached[oldest]:
            del self.cached[oldest]
        return True

    def step(self) -> None:
        """One prompt: a conversation goes on behind what is cached of it; its whole pages stay cached."""
        wanted = int(min(self.num_pages * self.page_size // 4, self.rng.lognormal(6.0, 1.0))) + 1
        name = int(self.rng.zipf(1.3)) % CONVERSATIONS
        turns = self.cached.pop(name, [])  # not evictable while it runs
        while not self.has_room(wanted):
            if not self.evict():
                break
        pages = [page for turn in turns for page in turn.pages]
        row = Row(pages.copy(), len(pages) * self.page_size)
        while wanted and self.extend(row, min(wanted, CHUNK_TOKENS)):
            wanted -= min(wanted, CHUNK_TOKENS)
        self.whole_runs.append(_runs(row.pages))
        whole = row.num_tokens // self.page_size
        if whole < len(row.pages):
            self.release(row.pages[whole:])
        if whole > len(pages):
            turns.append(Row(row.pages[len(pages) : whole], 0))
        if turns and len(pages) < self.num_pages // 4:
            self.cached[name] = turns
        else:
            for turn in turns:
                self.release(turn.pages)


def make_churn(
    kind: str, num_pages: int, page_size: int, *, seed: int, free_share: float, trace: str = "decode"
) -> Churn:
    """An allocator whose pool the trace has turned over ``TURNOVERS`` times."""
    made = {"decode": Churn, "prefill": CacheChurn}[trace]
    allocator = make_allocator(kind, num_pages, page_size)
    churn = made(allocator, num_pages, page_size, np.random.default_rng(seed), free_share)
    churn.run(TURNOVERS * num_pages)
    churn.whole_runs.clear()
    return churn


def fragmented_pages(
    kind: str,
    num_pages: int,
    page_size: int,
    request_tokens: int,
    *,
    seed: int,
    num_requests: int = 1,
    free_share: float = 0.05,
    trace: str = "decode",
) -> list[Pages]:
    """What the next requests of ``request_tokens`` get after the churn, one page list each.

    Between them half the pool is given out anew, and each is freed again. Requests
    end until the pool has room for the one that is measured.
    """
    churn = make_churn(kind, num_pages, page_size, seed=seed, free_share=free_share, trace=trace)
    found = []
    for _ in range(num_requests):
        found.append(churn.measure(request_tokens))
        churn.run(num_pages // 2)
    return found


def main() -> None:
    """Print runs per request and the cost of a call for every allocator."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--pages", type=int, default=4096, help="pool size (pages of 16 tokens)")
    parser.add_argument("--requests", type=int, default=25, help="measured requests per length (count)")
    parser.add_argument("--free", default="0.55,0.15,0.05", help="free shares to churn at (ratio)")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    setup = describe_setup(pool=f"{options.pages} pages of 16", requests=options.requests, seed=options.seed,
                           turnovers=TURNOVERS)  # fmt: skip
    print_setup(setup)
    rows: list[dict[str, Any]] = []
    print(f"{'trace':8} {'free':>5} {'tokens':>9}" + "".join(f"  {kind:>14}" for kind in KINDS)
          + "   (runs per request: median, p95)")  # fmt: skip
    for trace, share in itertools.product(TRACES, [float(text) for text in options.free.split(",")]):
        rows += _cell(trace, share, options)
    micro = _segment_cost(10_000)
    print(f"\nhost side, {micro['segments']} free segments: alloc {micro['alloc_us']} us, "
          f"free {micro['free_us']} us a request of 32 pages")  # fmt: skip
    print_result({"bench": "churn", "setup": setup, "rows": rows, "host_side": micro})


def _cell(trace: str, share: float, options: argparse.Namespace) -> list[dict[str, Any]]:
    """One fill level: a row per length, then whole requests as they end, then alloc/grow/free in us."""
    lengths = [tokens for tokens in LENGTHS if tokens <= options.pages * 16 // 2]
    rows: dict[int | str, dict[str, Any]] = {
        key: {"trace": trace, "free": share, "tokens": key} for key in (*lengths, "whole", "us a call")
    }
    for kind in KINDS:
        churn = make_churn(kind, options.pages, 16, seed=options.seed, free_share=share, trace=trace)
        runs: dict[int, list[int]] = {tokens: [] for tokens in lengths}
        for _, tokens in itertools.product(range(options.requests), lengths):
            runs[tokens].append(_runs(churn.measure(tokens).tolist()))
            churn.run(options.pages // 8)
        for key, values in {**runs, "whole": churn.whole_runs}.items():
            p95 = sorted(values)[int(len(values) * 0.95)]
            rows[key][kind] = {"median": median(values), "p95": p95, "mean": round(mean(values), 2)}
        rows["us a call"][kind] = {
            name: round(median(values) * 1e6, 1) for name, values in churn.seconds.items() if values
        }
    for key, row in rows.items():
        shown = [
            "/".join(f"{value:.0f}" for value in row[kind].values()) if key == "us a call"
            else f"{row[kind]['median']:.0f}, {row[kind]['p95']}"
            for kind in KINDS
        ]  # fmt: skip
        head = f"{trace:8} {share:5.2f} {key:>9}"
        print(head + "".join(f"  {text:>14}" for text in shown), flush=True)
    return list(rows.values())


def _segment_cost(num_segments: int) -> dict[str, float]:
    """The segment allocator alone: every third page run held, so that all free segments stay apart."""
    rng = np.random.default_rng(1)
    allocator = SegmentAllocator(num_segments * 80)
    allocator.alloc(allocator.num_pages)
    for index in range(num_segments):
        first = 1 + index * 80
        allocator.free(np.arange(first, first + int(rng.integers(1, 79))))
    seconds: dict[str, list[float]] = {"alloc": [], "free": []}
    for _ in range(2000):
        begin = time.perf_counter()
        pages = allocator.alloc(32)
        middle = time.perf_counter()
        assert pages is not None
        allocator.free(pages)
        seconds["alloc"].append(middle - begin)
        seconds["free"].append(time.perf_counter() - middle)
    cost = {f"{name}_us": round(median(values) * 1e6, 1) for name, values in seconds.items()}
    return {"segments": allocator.num_segments, **cost}


def _runs(pages: list[int]) -> int:
    array = np.array(pages, dtype=np.int64)
    return num_runs(array, array)


if __name__ == "__main__":
    main()
