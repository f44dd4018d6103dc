"""What it costs in truth that the prompt tree knows text blocks and not token blocks, and what it takes.

Three parts, one invocation.

trace   The Mooncake conversation trace: each 512-token block becomes 2048 bytes of text, equal ids equal
        text, one block after another. Truth: leading token blocks (whole ones) that some earlier request
        had. Told: what a set of text blocks of that size says, and the tree itself. Both without a bound,
        and of one of WORKERS workers in turn with a KV pool of POOL tokens, least recently used first.
        Bytes per token are constant here, so only the granularity of blocks differs.
text    Conversations of several turns on a few system prompts, made of this repository's own prose and
        code by seed, in the embedded model's chat template and tokenizer. Truth: tokens of the longest
        prefix, in pages of 16, that any earlier prompt or its answer-less form had. Told: the tree's share
        of the text, times the prompt's tokens. Canonical text is no rendering of the template and bytes
        per token vary inside a prompt: this is their price.
cost    Microseconds of read, match, send and arrive, at 16 and 128 workers, medians. Each worker holds a
        common first quarter of the prompts; every prompt is besides known to some depth to two workers.

    python bench/prompt_tree.py [--traces DIR] [--requests N]
"""

from __future__ import annotations

import argparse
import json
import random
import re
import time
from collections.abc import Callable, Sequence
from hashlib import blake2b
from itertools import accumulate
from pathlib import Path
from statistics import mean, median
from typing import Any

from common import describe_setup, print_result, print_setup

from pdserve.scheduling.prefix.blocks import block_ends, prefix_hashes
from pdserve.scheduling.prefix.tree import PromptTree
from pdserve.types import InstanceId

ROOT = Path(__file__).parents[1]
TRACE = "mooncake_conversation_trace.jsonl"
BLOCK_TOKENS, BLOCK_BYTES = 512, 2048
WORKERS, POOL = 4, 2_000_000
PAGE_TOKENS = 16
SEED = 20261121

Request = tuple[int, list[int]]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--traces", type=Path, default=ROOT.parent / "shared" / "traces", metavar="DIR")
    parser.add_argument("--requests", type=int, default=0, help="of the trace, 0: all")
    options = parser.parse_args()
    path = options.traces if options.traces.is_file() else options.traces / TRACE
    if not path.is_file():
        parser.error(f"no trace at {path}; it is Mooncake's conversation_trace.jsonl (--traces DIR)")
    setup = describe_setup(trace=path.name, workers=WORKERS, pool_tokens=POOL, seed=SEED)
    print_setup(setup)
    requests = read(path)[: options.requests or None]
    result = {"setup": setup, "trace": on_trace(requests), "text": on_text(), "cost_us": costs()}
    print_result(result)


# -- trace -----------------------------------------------------------------------------------------


def read(path: Path) -> list[Request]:
    """(input tokens, block ids) of each request."""
    rows = (json.loads(line) for line in path.read_text().splitlines() if line.strip())
    return [(row["input_length"], row["hash_ids"]) for row in rows]


def text_of(request: Request) -> bytes:
    """Its prompt as text, 4 bytes a token."""
    tokens, ids = request
    blocks = [blake2b(str(number).encode()).hexdigest() * (BLOCK_BYTES // 128) for number in ids]
    return ('"' + "".join(blocks)).encode()[: 4 * tokens]


def on_trace(requests: Sequence[Request]) -> dict[str, Any]:
    """Hit rates: tokens found, of all input tokens."""
    total = sum(tokens for tokens, _ in requests)
    layouts: dict[str, Sequence[int]] = {
        f"growing from {first} B": block_ends(first) for first in (64, 128, 256)
    }
    longest = max(4 * tokens for tokens, _ in requests)
    layouts |= {f"all {size} B": range(size, longest + size, size) for size in (512, 2048)}
    known: dict[str, set[int]] = {name: set() for name in layouts}
    seen: set[int] = set()
    exact, told = 0, dict.fromkeys(layouts, 0.0)
    blocks = dict.fromkeys(layouts, 0)
    for request in requests:
        tokens, ids = request
        exact += leading(ids[: tokens // BLOCK_TOKENS], seen) * BLOCK_TOKENS
        seen.update(ids[: tokens // BLOCK_TOKENS])
        text = text_of(request)
        for name, ends in layouts.items():
            hashes = prefix_hashes(text, ends, with_tail=False)
            count = leading(hashes, known[name])
            told[name] += ends[count - 1] / 4 if count else 0
            blocks[name] += len(hashes)
            known[name].update(hashes)
    rows = {"exact token blocks": exact / total} | {name: told[name] / total for name in layouts}
    print(f"{'one unbounded cache':<24} {'hit rate':>9} {'blocks/request':>15}")
    for name, rate in rows.items():
        count_text = f"{blocks[name] / len(requests):15.0f}" if name in blocks else f"{'':15}"
        print(f"{name:<24} {rate:9.4f} {count_text}")
    pools = with_pools(requests)
    print(f"\n{WORKERS} workers in turn, {POOL:,} tokens each")
    print("".join(f"{name:<24} {rate:9.4f}\n" for name, rate in pools.items()), end="")
    return {"unbounded": rounded(rows), "pools": rounded(pools)}


def leading(keys: Sequence[int], known: set[int]) -> int:
    """How many first keys are known."""
    return next((i for i, key in enumerate(keys) if key not in known), len(keys))


def with_pools(requests: Sequence[Request]) -> dict[str, float]:
    """Each worker with a bounded pool: LRU of whole token blocks, and the tree."""
    tree, total, exact, told = PromptTree(ttl_s=1e9), 0, 0, 0.0
    names = [InstanceId(f"{i:032x}") for i in range(WORKERS)]
    caches: list[dict[int, None]] = [{} for _ in names]
    for name in names:
        tree.resize(name, POOL)
    for turn, request in enumerate(requests):
        tokens, ids = request
        worker, cache, whole = names[turn % WORKERS], caches[turn % WORKERS], ids[: tokens // BLOCK_TOKENS]
        exact += next((i for i, key in enumerate(whole) if key not in cache), len(whole)) * BLOCK_TOKENS
        for key in reversed(whole):
            cache.pop(key, None)
            cache[key] = None
        for key in list(cache)[: max(0, len(cache) - POOL // BLOCK_TOKENS)]:
            del cache[key]
        prefix = tree.read(text_of(request))
        told += tree.match(prefix, [worker], float(turn))[0] * tokens
        tree.arrive(tree.send(prefix, worker, float(turn)), float(turn))
        total += tokens
    return {"exact": exact / total, "tree": told / total}


# -- text ------------------------------------------------------------------------------------------


def conversations(chance: random.Random, count: int) -> list[list[dict[str, str]]]:
    """Every prompt of so many conversations, turn by turn, interleaved as their users answer."""
    sources = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("pdserve/*/*.py")]
    texts = [path.read_text() for path in sorted(sources)]

    def piece(low: int, high: int) -> str:
        text = chance.choice(texts)
        start = chance.randrange(max(1, len(text) - low))
        return text[start : start + chance.randrange(low, high)]

    systems = [piece(400, 4000) for _ in range(3)]
    open_ones = [[{"role": "system", "content": chance.choice(systems)}] for _ in range(count)]
    prompts = []
    for _ in range(6):
        for messages in chance.sample(open_ones, count):
            messages.append({"role": "user", "content": piece(20, 1500)})
            prompts.append([*messages])
            messages.append({"role": "assistant", "content": piece(100, 2500)})
    return prompts


def page_keys(ids: Sequence[int]) -> list[int]:
    """One key for each whole page and all before it."""
    ends = range(PAGE_TOKENS, len(ids) + 1, PAGE_TOKENS)
    pages = (tuple(ids[end - PAGE_TOKENS : end]) for end in ends)
    return [*accumulate(pages, lambda before, page: hash((before, page)), initial=0)][1:]


def on_text() -> dict[str, Any]:
    """How far the tree's share is from the share in exact token pages."""
    from tokenizers import Tokenizer

    from pdserve.model import resolve_model

    tokenizer = Tokenizer.from_file(str(Path(resolve_model("")) / "tokenizer.json"))
    tree, seen, worker = PromptTree(ttl_s=1e9), set[int](), InstanceId("0" * 32)
    exact, told, sizes, density = [], [], [], []
    for messages in conversations(random.Random(SEED), 50):
        turns = [f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in messages]
        ids = tokenizer.encode("".join(turns) + "<|im_start|>assistant\n", add_special_tokens=False).ids
        pages = page_keys(ids)
        exact.append(leading(pages, seen) * PAGE_TOKENS / len(ids))
        seen.update(pages)
        prefix = tree.read(json.dumps(messages).encode())
        told.append(tree.match(prefix, [worker], 0.0)[0])
        tree.arrive(tree.send(prefix, worker, 0.0), 0.0)
        sizes.append(len(ids))
        density.append(prefix.num_bytes / len(ids))
    errors = [there - here for here, there in zip(exact, told, strict=True)]
    weighted = sum(error * size for error, size in zip(errors, sizes, strict=True)) / sum(sizes)
    hits = {
        "exact": sum(share * size for share, size in zip(exact, sizes, strict=True)) / sum(sizes),
        "tree": sum(share * size for share, size in zip(told, sizes, strict=True)) / sum(sizes),
    }
    row = {
        **hits, "difference": weighted, "mean_error": mean(map(abs, errors)),
        "p95_error": sorted(map(abs, errors))[int(0.95 * len(errors))], "most_over": max(errors),
        "bytes_per_token_low": min(density), "bytes_per_token_high": max(density),
    }  # fmt: skip
    print(f"\n{len(errors)} chat prompts, median {median(sizes):.0f} tokens, embedded model's tokenizer")
    for name, value in row.items():
        print(f"{name:<24} {value:9.4f}")
    return rounded(row) | {"prompts": len(errors), "median_tokens": median(sizes)}


# -- cost ------------------------------------------------------------------------------------------


def costs() -> dict[str, dict[str, float]]:
    """Medians in microseconds."""
    columns = ("read", "chat", "match", "coming", "send", "arrive")
    print(f"\n{'microseconds':<24} " + " ".join(f"{name:>8}" for name in columns))
    table = {}
    for num_workers in (16, 128):
        for size in (4_000, 48_000):
            row = cost(num_workers, size, random.Random(SEED))
            table[f"{num_workers} workers {size // 1000} kB"] = row
            print(
                f"{num_workers:>4} workers {size // 1000:>4} kB {'':>5} "
                + " ".join(f"{row[c]:8.1f}" for c in columns)
            )
    return table


def cost(num_workers: int, size: int, chance: random.Random) -> dict[str, float]:
    """One row of the table. ``chat``: reading the same text as a conversation of eight messages."""
    tree = PromptTree(ttl_s=1e9)
    names = [InstanceId(f"{i:032x}") for i in range(num_workers)]
    words = re.findall(r"\S+\s", (ROOT / "README.md").read_text())
    common = text(words, size // 4, chance)
    prompts = [json.dumps(common + text(words, 3 * size // 4, chance)).encode() for _ in range(60)]
    for name in names:
        tree.arrive(tree.send(tree.read(json.dumps(common).encode()), name, 0.0), 0.0)
    for prompt in prompts:
        for name in chance.sample(names, 2):
            part = prompt[: chance.randrange(size // 4, size)]
            tree.arrive(tree.send(tree.read(part), name, 0.0), 0.0)
    part = len(prompts[0]) // 8
    chat = json.dumps(
        [{"role": "user", "content": prompts[0][i * part : (i + 1) * part].decode()} for i in range(8)]
    ).encode()
    row = {"chat": timed(lambda: tree.read(chat), 200)}
    spent: dict[str, list[float]] = {name: [] for name in ("read", "match", "coming", "send", "arrive")}
    for turn in range(600):
        prompt, worker = (
            prompts[turn % 60] if turn % 2 else fresh(words, common, size, chance),
            names[turn % num_workers],
        )
        moments = [time.perf_counter()]
        prefix = tree.read(prompt)
        moments.append(time.perf_counter())
        tree.match(prefix, names, 1.0)
        moments.append(time.perf_counter())
        tree.match_coming(prefix, names, 1.0)
        moments.append(time.perf_counter())
        mark = tree.send(prefix, worker, 1.0)
        moments.append(time.perf_counter())
        tree.arrive(mark, 1.0)
        moments.append(time.perf_counter())
        for name, start, end in zip(spent, moments, moments[1:], strict=False):
            spent[name].append(end - start)
    return row | {name: round(median(values) * 1e6, 1) for name, values in spent.items()}


def fresh(words: Sequence[str], common: str, size: int, chance: random.Random) -> bytes:
    """A prompt that shares only the first quarter."""
    return json.dumps(common + text(words, 3 * size // 4, chance)).encode()


def text(words: Sequence[str], size: int, chance: random.Random) -> str:
    """Words at random, so many characters."""
    return "".join(chance.choices(words, k=size // 4))[:size]


def timed(work: Callable[[], object], count: int) -> float:
    """Median microseconds of one call."""
    spent = []
    for _ in range(count):
        start = time.perf_counter()
        work()
        spent.append(time.perf_counter() - start)
    return round(median(spent) * 1e6, 1)


def rounded(row: dict[str, float]) -> dict[str, float]:
    """Four digits."""
    return {name: round(value, 4) for name, value in row.items()}


if __name__ == "__main__":
    main()
